"""The table of networks: literal numbers, one line a variant, and the functions that build them by name.

The numbers are those of the papers' tables and of the released code: torchvision for ResNet and ResNeXt,
zhanghang1989/ResNeSt for ResNeSt, hujie-frank/SENet for SE, implus/SKNet for SK, Jongchan/attention-module for CBAM,
BangguWu/ECANet for ECA. SE, CBAM and ECA stand on torchvision's ResNet and ResNeXt, whose stride is on the 3x3.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from resnest_det.backbones.weights import load_backbone_weights
from resnest_det.layers import (
    CBAM,
    EfficientChannelAttention,
    NormLayer,
    NormName,
    SelectiveKernelConv2d,
    SplitAttentionConv2d,
    SqueezeExcitation,
    group_norm,
    norm_layer,
    pooled_group_norm,
)


class VariantGate(Protocol):
    """Builds a variant's gate from the channels of a block's output and the norm of the network."""

    def __call__(self, channels: int, *, norm_layer: NormLayer) -> nn.Module:
        """A module that scales (N, channels, H, W)."""
        ...


@dataclass(frozen=True)
class Variant:
    """What tells one network from another; the fields are arguments of ResNet, the gate with its norm still open."""

    block: type[Block]
    layers: Sequence[int]
    groups: int = 1
    width_per_group: int = 64
    stem_width: int | None = None
    spatial_conv: SpatialConv | None = None
    gate: VariantGate | None = None
    average_pool: Literal["before", "after"] | None = None
    pooled_shortcut: bool = False


def _pooled(norm_layer: NormLayer) -> NormLayer:
    """The norm for features pooled to 1x1 in a network with that norm."""
    return pooled_group_norm if norm_layer is group_norm else norm_layer


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
        pooled_norm_layer=_pooled(norm_layer),
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


def _selective_kernel(channels: int, *, stride: int, dilation: int, groups: int, norm_layer: NormLayer) -> nn.Module:
    return SelectiveKernelConv2d(
        channels,
        channels,
        stride=stride,
        dilation=dilation,
        groups=groups,
        norm_layer=norm_layer,
        pooled_norm_layer=_pooled(norm_layer),
    )


def _squeeze_excitation(
    channels: int,
    *,
    norm_layer: NormLayer,  # noqa: ARG001 (it has no norm)
    gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid",
) -> nn.Module:
    return SqueezeExcitation(channels, reduction=16, gate=gate)


def _eca_resnet(block: type[Block], layers: Sequence[int], *, kernel_sizes: tuple[int, int, int, int]) -> Variant:
    """A ResNet with ECA; `kernel_sizes` are those of the four stages, as released, and not those of ECA's formula."""
    by_channels = {planes * block.expansion: k for planes, k in zip((64, 128, 256, 512), kernel_sizes, strict=True)}

    def gate(channels: int, *, norm_layer: NormLayer) -> nn.Module:  # noqa: ARG001 (it has no norm)
        return EfficientChannelAttention(channels, kernel_size=by_channels[channels])

    return Variant(block, layers, gate=gate)


# In resnest50_fast_RsGxWd, R is the radix, G the groups and W the width of a group; "fast" pools before the 3x3.
_fast = partial(_resnest, (3, 4, 6, 3), average_pool="before")
_se = partial(Variant, gate=_squeeze_excitation)
_cbam = partial(Variant, gate=CBAM)

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
    "se_resnet18": _se(BasicBlock, (2, 2, 2, 2)),
    "se_resnet34": _se(BasicBlock, (3, 4, 6, 3)),
    "se_resnet50": _se(Bottleneck, (3, 4, 6, 3)),
    "se_resnet101": _se(Bottleneck, (3, 4, 23, 3)),
    "se_resnet152": _se(Bottleneck, (3, 8, 36, 3)),
    "se_resnext50_32x4d": _se(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4),
    "se_resnext101_32x4d": _se(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=4),
    "sk_resnet50": Variant(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4, spatial_conv=_selective_kernel),
    "sk_resnet101": Variant(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=4, spatial_conv=_selective_kernel),
    "cbam_resnet18": _cbam(BasicBlock, (2, 2, 2, 2)),
    "cbam_resnet34": _cbam(BasicBlock, (3, 4, 6, 3)),
    "cbam_resnet50": _cbam(Bottleneck, (3, 4, 6, 3)),
    "cbam_resnet101": _cbam(Bottleneck, (3, 4, 23, 3)),
    "eca_resnet18": _eca_resnet(BasicBlock, (2, 2, 2, 2), kernel_sizes=(3, 5, 7, 7)),
    "eca_resnet34": _eca_resnet(BasicBlock, (3, 4, 6, 3), kernel_sizes=(3, 3, 5, 7)),
    "eca_resnet50": _eca_resnet(Bottleneck, (3, 4, 6, 3), kernel_sizes=(3, 5, 5, 7)),
    "eca_resnet101": _eca_resnet(Bottleneck, (3, 4, 23, 3), kernel_sizes=(3, 3, 5, 7)),
    "eca_resnet152": _eca_resnet(Bottleneck, (3, 8, 36, 3), kernel_sizes=(3, 3, 5, 7)),
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
    *,
    hard_sigmoid: bool = False,
    gate: Gate | None = None,
    spatial_conv: SpatialConv | None = None,
    new_classifier: bool = False,
) -> ResNet:
    """Build a network by name, as a torchvision-style classifier.

    Args:
        name: one of list_backbones().
        weights: None for random weights; "imagenet" or another name of list_weights(name) for published ones
            (downloaded once into torch.hub's folder, checked by hash); else a file's path or URL, see load_weights.
        num_classes: outputs of the classifier. ImageNet's weights have 1000; see new_classifier.
        norm: "bn", "frozen_bn", "sync_bn" or "gn", see layers.norm_layer.
        output_stride: 8, 16 or 32: the smaller, the larger the last feature maps, through dilation.
        drop_path: stochastic depth of the last block, in [0, 1).
        checkpoint: activation checkpointing: less memory in training, more time.
        hard_sigmoid: SE's gate is relu6(x + 3) / 6 in place of the sigmoid, see SqueezeExcitation; for networks with
            SE. The tensors are the same, but published weights were trained with the sigmoid.
        gate: attention of one's own in the slot before each block's addition, in place of the network's: a function
            from the block's channels to a module. Weights may lack its tensors, which then keep their initial
            values, and hold those of the network's gate, which are left out; a warning names both.
        spatial_conv: a convolution of one's own in place of each bottleneck's 3x3, see SpatialConv. Weights must
            hold its tensors; for a file of the plain network, call load_weights with `keep` and `drop`.
        new_classifier: weights with another number of classes, or with none, are accepted: the classifier then
            keeps its initial values, with a warning.

    Raises:
        ValueError: unknown name, argument out of range, or weights that do not fit.
        FileNotFoundError: there is no such file, or no program can fetch it.
        ConnectionError: the weights could not be downloaded.
    """
    if name not in VARIANTS:
        nearest = difflib.get_close_matches(name, VARIANTS, n=1, cutoff=0)[0]
        raise ValueError(f"backbone {name!r} is unknown; did you mean {nearest!r}? There are: {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    make_norm = norm_layer(norm)
    if hard_sigmoid and (gate is not None or variant.gate is not _squeeze_excitation):
        reason = f"{name} has none" if gate is None else "a gate of one's own stands in its place"
        with_se = ", ".join(other for other, row in VARIANTS.items() if row.gate is _squeeze_excitation)
        raise ValueError(
            f"hard_sigmoid=True is about the gate of squeeze and excitation, and {reason}; leave it out, or use one of "
            f"{with_se}"
        )
    filled_gate = gate
    if hard_sigmoid:
        filled_gate = partial(_squeeze_excitation, norm_layer=make_norm, gate="hard_sigmoid")
    elif gate is None and variant.gate is not None:
        filled_gate = partial(variant.gate, norm_layer=make_norm)
    net = ResNet(
        variant.block,
        variant.layers,
        num_classes=num_classes,
        norm_layer=make_norm,
        stem_width=variant.stem_width,
        groups=variant.groups,
        width_per_group=variant.width_per_group,
        spatial_conv=variant.spatial_conv if spatial_conv is None else spatial_conv,
        gate=filled_gate,
        average_pool=variant.average_pool,
        pooled_shortcut=variant.pooled_shortcut,
        output_stride=output_stride,
        drop_path=drop_path,
        checkpoint=checkpoint,
    )
    if weights is not None:
        load_backbone_weights(net, name, weights, new_classifier=new_classifier, own_gate=gate is not None)
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
        *,
        hard_sigmoid: bool = False,
        gate: Gate | None = None,
        spatial_conv: SpatialConv | None = None,
        new_classifier: bool = False,
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
        *,
        hard_sigmoid: bool = False,
        gate: Gate | None = None,
        spatial_conv: SpatialConv | None = None,
        new_classifier: bool = False,
    ) -> ResNet:
        return create_backbone(
            name,
            weights,
            num_classes,
            norm,
            output_stride,
            drop_path,
            checkpoint,
            hard_sigmoid=hard_sigmoid,
            gate=gate,
            spatial_conv=spatial_conv,
            new_classifier=new_classifier,
        )

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
se_resnet18 = _builder("se_resnet18")
se_resnet34 = _builder("se_resnet34")
se_resnet50 = _builder("se_resnet50")
se_resnet101 = _builder("se_resnet101")
se_resnet152 = _builder("se_resnet152")
se_resnext50_32x4d = _builder("se_resnext50_32x4d")
se_resnext101_32x4d = _builder("se_resnext101_32x4d")
sk_resnet50 = _builder("sk_resnet50")
sk_resnet101 = _builder("sk_resnet101")
cbam_resnet18 = _builder("cbam_resnet18")
cbam_resnet34 = _builder("cbam_resnet34")
cbam_resnet50 = _builder("cbam_resnet50")
cbam_resnet101 = _builder("cbam_resnet101")
eca_resnet18 = _builder("eca_resnet18")
eca_resnet34 = _builder("eca_resnet34")
eca_resnet50 = _builder("eca_resnet50")
eca_resnet101 = _builder("eca_resnet101")
eca_resnet152 = _builder("eca_resnet152")
