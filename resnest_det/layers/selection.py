"""Soft selection among feature maps: what split attention and selective kernels end with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_softly(maps: Sequence[Tensor], logits: Tensor) -> Tensor:
    """The sum of two or more maps, each channel weighed by the softmax of its logits over the maps.

    Of two, softmax(a, b) is (s, 1 - s) with s = sigmoid(a - b), and the sum is one interpolation.

    Args:
        maps: each (N, channels, H, W).
        logits: (N, maps, channels).

    Returns:
        (N, channels, H, W), in the memory format of the maps.
    """
    if len(maps) == 2:
        first = (logits[:, 0] - logits[:, 1]).sigmoid()[:, :, None, None]
        # lerp takes one dtype; under autocast a norm may return float32 where fc2 returns half precision.
        return torch.lerp(maps[1], maps[0], first.to(maps[0].dtype))
    weights = logits.softmax(dim=1)[..., None, None]  # (N, maps, channels, 1, 1)
    out = maps[0] * weights[:, 0]
    for index in range(1, len(maps)):
        out = out + maps[index] * weights[:, index]
    return out
