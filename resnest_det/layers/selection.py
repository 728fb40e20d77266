"""Soft selection among feature maps: what split attention and selective kernels end with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_softly(maps: Sequence[Tensor], logits: Tensor) -> Tensor:
    """The sum of the maps, each channel weighed by its share.

    Args:
        maps: each (N, channels, H, W).
        logits: (N, maps, channels).

    Returns:
        (N, channels, H, W), in the memory format of the maps.
    """
    return weighted_sum(maps, selection_shares(logits, len(maps)))


def selection_shares(logits: Tensor, num_maps: int) -> Tensor:
    """Each map's share in each channel: the softmax of (N, maps, channels) over the maps, or of one map the sigmoid."""
    return logits.softmax(dim=1) if num_maps > 1 else logits.sigmoid()


def weighted_sum(maps: Sequence[Tensor], shares: Tensor) -> Tensor:
    """The sum of the maps by `selection_shares`: of two one interpolation, as their shares sum to one."""
    # Under autocast a norm may return float32 where the attention's last convolution returns half precision.
    weights = shares[..., None, None].to(maps[0].dtype)  # (N, maps, channels, 1, 1)
    if len(maps) == 2:
        return torch.lerp(maps[1], maps[0], weights[:, 0])
    out = maps[0] * weights[:, 0]
    for index in range(1, len(maps)):
        out = out + maps[index] * weights[:, index]
    return out
