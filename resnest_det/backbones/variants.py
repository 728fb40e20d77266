"""The table of networks: literal numbers, one line a variant, and the functions that build them by name.

The numbers are those of the papers' tables and of the released code: torchvision for ResNet and ResNeXt,
zhanghang1989/ResNeSt for ResNeSt.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from torch import nn

from resnest_det.backbones.resnet import (
    BasicBlock,
    Block,
    Bottleneck,
    Gate,
    OutputStride,
    ResNet,
    SpatialConv,
)
from resnest_det.backbones.weights import load_imagenet_weights, load_weights
from resnest_det.layers import (
    NormLayer,
    NormName,
    SplitAttentionConv2d,
    group_norm,
    norm_layer,
    pooled_group_norm,
)


@dataclass(frozen=True)
class Variant:
    """What tells one network from another; the fields are arguments of ResNet."""

    block: type[Block]
    layers: Sequence[int]
    groups: int = 1
    width_per_group: int = 64
    stem_width: int | None = None
    spatial_conv: SpatialConv | None = None
    gate: Gate | None = None
    average_pool: Literal["before", "after"] | None = None
    pooled_shortcut: bool = False


def _split_attention(
    channels: int, *, stride: int, dilation: int, groups: int, norm_layer: NormLayer, radix: int
) -> nn.Module:
    return SplitAttentionConv2d(
        channels,
        channels,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        radix=radix,
        norm_layer=norm_layer,
        pooled_norm_layer=pooled_group_norm if norm_layer is group_norm else norm_layer,
    )


def _resnest(
    layers: Sequence[int],
    stem_width: int = 32,
    *,
    radix: int = 2,
    groups: int = 1,
    width: int = 64,
    average_pool: Literal["before", "after"] = "after",
) -> Variant:
    return Variant(
        Bottleneck,
        layers,
        groups=groups,
        width_per_group=width,
        stem_width=stem_width,
        spatial_conv=partial(_split_attention, radix=radix),
        average_pool=average_pool,
        pooled_shortcut=True,
    )


# In resnest50_fast_RsGxWd, R is the radix, G the groups and W the width of a group; "fast" pools before the 3x3.
_fast = partial(_resnest, (3, 4, 6, 3), average_pool="before")

VARIANTS: dict[str, Variant] = {
    "resnet18": Variant(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Variant(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Variant(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Variant(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Variant(Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": Variant(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": Variant(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnest14": _resnest((1, 1, 1, 1)),
    "resnest26": _resnest((2, 2, 2, 2)),
    "resnest50": _resnest((3, 4, 6, 3)),
    "resnest101": _resnest((3, 4, 23, 3), stem_width=64),
    "resnest200": _resnest((3, 24, 36, 3), stem_width=64),
    "resnest269": _resnest((3, 30, 48, 8), stem_width=64),
    "resnest50_fast_1s1x64d": _fast(radix=1),
    "resnest50_fast_2s1x64d": _fast(radix=2),
    "resnest50_fast_4s1x64d": _fast(radix=4),
    "resnest50_fast_1s2x40d": _fast(radix=1, groups=2, width=40),
    "resnest50_fast_2s2x40d": _fast(radix=2, groups=2, width=40),
    "resnest50_fast_4s2x40d": _fast(radix=4, groups=2, width=40),
    "resnest50_fast_1s4x24d": _fast(radix=1, groups=4, width=24),
}


def list_backbones(prefix: str = "") -> list[str]:
    """The names that create_backbone builds, in the order of the table.

    Args:
        prefix: only names that begin with it, such as "resnest".
    """
    return [name for name in VARIANTS if name.startswith(prefix)]


def create_backbone(
    name: str,
    weights: str | None = None,
    num_classes: int = 1000,
    norm: NormName = "bn",
    output_stride: OutputStride = 32,
    drop_path: float = 0.0,
    checkpoint: bool = False,
) -> ResNet:
    """Build a network by name, as a torchvision-style classifier.

    Args:
        name: one of list_backbones().
        weights: None for random weights; "imagenet" for the published ones (downloaded once into torch.hub's
            folder, checked by hash); else a file's path, see load_weights.
        num_classes: outputs of the classifier. Published weights need their own 1000.
        norm: "bn", "frozen_bn", "sync_bn" or "gn", see layers.norm_layer.
        output_stride: 8, 16 or 32: the smaller, the larger the last feature maps, through dilation.
        drop_path: stochastic depth of the last block, in [0, 1).
        checkpoint: activation checkpointing: less memory in training, more time.

    Raises:
        ValueError: unknown name, argument out of range, or weights that do not fit.
        FileNotFoundError: no file at the path `weights`.
    """
    if name not in VARIANTS:
        nearest = difflib.get_close_matches(name, VARIANTS, n=1, cutoff=0)[0]
        raise ValueError(f"backbone {name!r} is unknown; did you mean {nearest!r}? There are: {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    net = ResNet(
        variant.block,
        variant.layers,
        num_classes=num_classes,
        norm_layer=norm_layer(norm),
        stem_width=variant.stem_width,
        groups=variant.groups,
        width_per_group=variant.width_per_group,
        spatial_conv=variant.spatial_conv,
        gate=variant.gate,
        average_pool=variant.average_pool,
        pooled_shortcut=variant.pooled_shortcut,
        output_stride=output_stride,
        drop_path=drop_path,
        checkpoint=checkpoint,
    )
    if weights == "imagenet":
        load_imagenet_weights(net, name)
    elif weights is not None:
        if not Path(weights).expanduser().is_file():
            raise FileNotFoundError(f"weights={weights!r} is neither 'imagenet' nor the path of a file")
        load_weights(net, weights)
    return net


class Builder(Protocol):
    """create_backbone with its name filled in; the arguments are explained there."""

    def __call__(
        self,
        weights: str | None = None,
        num_classes: int = 1000,
        norm: NormName = "bn",
        output_stride: OutputStride = 32,
        drop_path: float = 0.0,
        checkpoint: bool = False,
    ) -> ResNet:
        """Build the network."""
        ...


def _builder(name: str) -> Builder:
    def build(
        weights: str | None = None,
        num_classes: int = 1000,
        norm: NormName = "bn",
        output_stride: OutputStride = 32,
        drop_path: float = 0.0,
        checkpoint: bool = False,
    ) -> ResNet:
        return create_backbone(name, weights, num_classes, norm, output_stride, drop_path, checkpoint)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build {name}; the arguments are those of create_backbone."
    return build


resnet18 = _builder("resnet18")
resnet34 = _builder("resnet34")
resnet50 = _builder("resnet50")
resnet101 = _builder("resnet101")
resnet152 = _builder("resnet152")
resnext50_32x4d = _builder("resnext50_32x4d")
resnext101_32x8d = _builder("resnext101_32x8d")
resnest14 = _builder("resnest14")
resnest26 = _builder("resnest26")
resnest50 = _builder("resnest50")
resnest101 = _builder("resnest101")
resnest200 = _builder("resnest200")
resnest269 = _builder("resnest269")
resnest50_fast_1s1x64d = _builder("resnest50_fast_1s1x64d")
resnest50_fast_2s1x64d = _builder("resnest50_fast_2s1x64d")
resnest50_fast_4s1x64d = _builder("resnest50_fast_4s1x64d")
resnest50_fast_1s2x40d = _builder("resnest50_fast_1s2x40d")
resnest50_fast_2s2x40d = _builder("resnest50_fast_2s2x40d")
resnest50_fast_4s2x40d = _builder("resnest50_fast_4s2x40d")
resnest50_fast_1s4x24d = _builder("resnest50_fast_1s4x24d")
