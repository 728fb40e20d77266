"""Normalisation layers by name: the one place that knows what "bn", "frozen_bn", "sync_bn" and "gn" build.

GroupNorm: Wu and He, "Group Normalization", arXiv 1803.08494, with its 32 groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch.distributed as dist
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

NormName = Literal["bn", "frozen_bn", "sync_bn", "gn"]
NormLayer = Callable[[int], nn.Module]  # channels -> a module that normalises (N, channels, H, W)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or the most below 32 that divide `channels`."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def pooled_group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with one group, for features pooled to 1x1.

    There, a group is all that the statistics are taken over. 32 groups of a 32-channel layer would hold one
    value each, which normalises to zero whatever it was.
    """
    return nn.GroupNorm(1, channels)


_NORM_LAYERS: dict[str, NormLayer] = {
    "bn": nn.BatchNorm2d,
    "frozen_bn": FrozenBatchNorm2d,
    "sync_bn": nn.SyncBatchNorm,
    "gn": group_norm,
}


def norm_layer(name: NormName) -> NormLayer:
    """The layer of that name, as a function of its channels.

    Args:
        name: "bn" BatchNorm2d; "frozen_bn" torchvision's FrozenBatchNorm2d (statistics and affine fixed);
            "sync_bn" SyncBatchNorm (statistics over all processes; plain BatchNorm in one process);
            "gn" GroupNorm, independent of the batch.

    Raises:
        ValueError: no layer has that name.
    """
    if name not in _NORM_LAYERS:
        raise ValueError(f"norm {name!r} is unknown; choose one of {', '.join(_NORM_LAYERS)}")
    return _NORM_LAYERS[name]


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether `norm`, as it stands, normalises by the statistics of this process's own batch.

    True for BatchNorm in training; for SyncBatchNorm only where there are no other processes to share with.
    """
    if not (isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training):
        return False
    shared = isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()
    return not (shared and dist.get_world_size() > 1)


def check_pooled_batch(norm: nn.Module, num_images: int, attention: str) -> None:
    """Refuse one image where `norm` needs several: features pooled to 1x1 have one value an image and channel.

    Args:
        norm: the norm behind the pool.
        num_images: images of the batch, as `x.shape[0]`: torch.export fixes the batch where `len(x)` is asked for.
        attention: what the message calls the layer.

    Raises:
        ValueError: there is one image, and `norm` takes its statistics from the batch.
    """
    if uses_batch_statistics(norm) and num_images == 1:
        raise ValueError(
            f"{attention} normalises pooled features with BatchNorm, which cannot train on one image "
            "(one value a channel); use 2 or more images a step and process, or norm='frozen_bn' or 'gn'"
        )
