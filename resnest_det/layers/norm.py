"""Normalisation layers by name, what a model has of them, and where they hurt: the one place that knows norms.

GroupNorm: Wu and He, "Group Normalization", arXiv 1803.08494, with its 32 groups. Its table 2 is also why few images
are warned about: with BatchNorm, ResNet-50's ImageNet error is 23.6 % at 32 images a process, 27.3 % at 4, 34.7 % at 2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from resnest_det.layers.sync_batch_norm import SyncBatchNorm, num_processes

NormName = Literal["bn", "frozen_bn", "sync_bn", "gn"]
NormLayer = Callable[[int], nn.Module]  # channels -> a module that normalises (N, channels, H, W)

FEWEST_IMAGES = 4  # with statistics from fewer, live BatchNorm is warned about

_KINDS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


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
    "sync_bn": SyncBatchNorm,
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
    return _is_live(norm) and not (_is_shared(norm) and num_processes() > 1)


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


def describe_norms(model: nn.Module) -> str:
    """The model's norms in one line: how many of each kind, in which of its children, and how many of them are frozen.

    Frozen are those of which training changes nothing: no parameter of theirs is trained, and their statistics stay.

    Returns:
        Such as "norms: 11 FrozenBatchNorm2d (backbone; frozen), 42 SyncBatchNorm (backbone 38, head 4)".
    """
    by_kind: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, norm in _norms(model):
        by_kind.setdefault(type(norm).__name__, []).append((path.split(".")[0] or "the model itself", norm))
    parts = []
    for kind, norms in by_kind.items():
        children = Counter(child for child, _ in norms)
        where = ", ".join(f"{child} {count}" if len(children) > 1 else child for child, count in children.items())
        num_frozen = sum(_is_frozen(norm) for _, norm in norms)
        frozen = "" if num_frozen == 0 else "; frozen" if num_frozen == len(norms) else f"; {num_frozen} frozen"
        parts.append(f"{len(norms)} {kind} ({where}{frozen})")
    return f"norms: {', '.join(parts) or 'none'}"


def norm_warnings(model: nn.Module, images_per_process: int) -> list[str]:
    """What hurts when the model's norms, in their present modes, train on so few images.

    Args:
        model: in training mode.
        images_per_process: images of one forward pass of one process: accumulating gradients over several passes adds
            none to a norm's statistics.

    Returns:
        A sentence for each thing, with the value, the rule and the fix; none where nothing hurts.
    """
    warnings = []
    pooled = {module.bn1 for module in model.modules() if hasattr(module, "needs_several_images")}
    for shared in (False, True):
        norms = [norm for _, norm in _norms(model) if _is_live(norm) and _is_shared(norm) == shared]
        num_images = images_per_process * (num_processes() if shared else 1)
        if not norms or num_images >= FEWEST_IMAGES:
            continue
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(type(norm).__name__ for norm in norms).items())
        scope = "of all processes together" if shared else "of one process"
        others = "'frozen_bn' or 'gn'" if shared or num_processes() == 1 else "'sync_bn', 'frozen_bn' or 'gn'"
        fix = f"use {FEWEST_IMAGES} or more, or norm={others}"
        images = f"{num_images} image{'s' if num_images > 1 else ''}"
        warnings.append(
            f"the statistics of {kinds} come from {images} {scope}; with fewer than {FEWEST_IMAGES}, networks train to "
            f"worse results: {fix}"
        )
        num_pooled = len(pooled.intersection(norms))
        if num_pooled:
            warnings.append(
                f"{num_pooled} of these norms are the attention's own, behind its pool, where an image is one value a "
                f"channel: of {images} {scope}, normalising leaves little more than which value is larger; {fix}"
            )
    return warnings


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each norm with its path: torch's, and others that hold running statistics."""
    for path, module in model.named_modules():
        if isinstance(module, _KINDS) or isinstance(getattr(module, "running_var", None), Tensor):
            yield path, module


def _is_live(norm: nn.Module) -> bool:
    """Whether it is a BatchNorm that normalises by, and learns from, the batches it sees."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training


def _is_shared(norm: nn.Module) -> bool:
    return isinstance(norm, (SyncBatchNorm, nn.SyncBatchNorm))


def _is_frozen(norm: nn.Module) -> bool:
    return not _is_live(norm) and not any(parameter.requires_grad for parameter in norm.parameters())
