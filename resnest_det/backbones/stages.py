"""Backbones as feature extractors: a network's stages, their channels and strides, and pyramids on them.

torchvision's IntermediateLayerGetter runs the children of a network in order and returns the outputs of the named
ones; BackboneWithFPN puts a feature pyramid (Lin et al., arXiv 1612.03144) on them. Both take our networks as they
are. What is added here: channels and strides are read off the stages or measured, networks of torchvision and timm
that are not flat are taken too, and freezing is complete.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn
from torchvision.models import densenet, swin_transformer
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, StochasticDepth
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from resnest_det.backbones.other_networks import (
    ACCEPTED,
    TimmLevels,
    flat_network,
    is_timm_network,
    measured_shapes,
    stage_parts,
)
from resnest_det.layers import NormLayer, NormName, SyncBatchNorm, norm_layer

STAGES = ("layer1", "layer2", "layer3", "layer4")
ExtraLevel = Literal["pool", "p6p7", "p6p7_c5"]

# What drops features at random in training, and where it keeps the probability.
_DROPPING: dict[type[nn.Module], tuple[str, ...]] = {
    nn.modules.dropout._DropoutNd: ("p",),
    StochasticDepth: ("p",),
    densenet._DenseLayer: ("drop_rate",),
    swin_transformer.ShiftedWindowAttention: ("attention_dropout", "dropout"),
}


class StageExtractor(nn.Module):
    """A network that ends at its last wanted stage and returns the features of each wanted one.

    stage_extractor makes it, in the form that fits the network, with which it shares its modules.

    Attributes:
        channels: channels of each stage's features, by the stage's name.
        strides: pixels of the input for one step of each stage's features, by the stage's name.
    """

    channels: dict[str, int]
    strides: dict[str, int]


class _FlatStageExtractor(StageExtractor, IntermediateLayerGetter):
    """The stages of a flat network, its children up to the last of them; `keys` are the features' by the stages'."""

    def __init__(self, net: nn.Module, keys: Mapping[str, str]) -> None:
        shapes = _stage_shapes(net, list(keys))
        super().__init__(net, dict(keys))
        self.channels = {name: channels for name, (channels, _) in shapes.items()}
        self.strides = {name: stride for name, (_, stride) in shapes.items()}


class _TimmStageExtractor(StageExtractor):
    """The stages of one of timm's networks; `keys` are the features' by the stages'."""

    def __init__(self, net: nn.Module, keys: Mapping[str, str]) -> None:
        super().__init__()
        _check_stages(net, list(keys), STAGES)
        self.levels = TimmLevels(net, [STAGES.index(name) for name in keys])
        self.channels = {name: channels for name, (channels, _) in zip(keys, self.levels.shapes, strict=True)}
        self.strides = {name: stride for name, (_, stride) in zip(keys, self.levels.shapes, strict=True)}
        self.features = tuple(keys.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to the features of each stage."""
        return dict(zip(self.features, self.levels(x), strict=True))


class _StagesWithFPN(BackboneWithFPN):
    """torchvision's BackboneWithFPN on an extractor made already, which torchvision's own makes itself."""

    def __init__(
        self, body: StageExtractor, out_channels: int, extra_blocks: ExtraFPNBlock, norm_layer: NormLayer | None
    ) -> None:
        nn.Module.__init__(self)
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(body.channels.values()), out_channels, extra_blocks, norm_layer)
        self.out_channels = out_channels


def stage_extractor(net: nn.Module, stages: Sequence[str] = STAGES) -> StageExtractor:
    """The features of a network's stages: images (N, 3, H, W) to a dict of (N, channels, H / stride, W / stride).

    Args:
        net: one of
            - a network of create_backbone;
            - one of torchvision: ResNet (also as ResNeXt and Wide ResNet), ConvNeXt, DenseNet, EfficientNet,
              MobileNetV2, MobileNetV3, RegNet, SwinTransformer. Where the stride grows a stage begins: "layer1" is of
              stride 4, "layer4" of stride 32 with the last 1x1 convolution, what comes before is "stem";
            - one of timm whose features have the strides 4, 8, 16 and 32, or fewer with output_stride=16 or 8; the
              stages are "layer1" to "layer4" whatever timm names them (set its grad_checkpointing before);
            - any module whose children run in order. Channels and stride of a stage are its integer attributes
              `channels` and `stride`, or are measured.
            Measuring runs the network on one image of 64x64, without changing it.
        stages: names of stages, the keys of the features.

    Raises:
        ValueError: a stage does not exist, or the network is of no such kind.
    """
    return _extractor(net, {name: name for name in stages})


def fpn_backbone(
    net: nn.Module,
    *,
    trainable_stages: int = 5,
    stages: Sequence[str] = STAGES,
    out_channels: int = 256,
    extra_level: ExtraLevel = "pool",
    norm: NormName | None = None,
) -> BackboneWithFPN:
    """A feature pyramid on a network's stages, as torchvision's detectors take it.

    Args:
        net: a network of create_backbone or another, see stage_extractor; its modules are shared, and frozen as asked.
        trainable_stages: how many of (layer4, layer3, layer2, layer1, stem) train, from the back; the rest is frozen,
            see freeze_stages.
        stages: the stages under the pyramid, from the finest.
        out_channels: channels of each level.
        extra_level: "pool" adds a level of half the size of the last (Faster R-CNN); "p6p7" adds two by strided
            convolutions of the pyramid's last level, "p6p7_c5" of the last stage's features (RetinaNet).
        norm: norm after each of the pyramid's convolutions; None for none, and biases in its place.

    Returns:
        torchvision's BackboneWithFPN. Its features are named "0", "1", ... from the finest, then "pool" or "p6",
        "p7"; it has `out_channels`.

    Raises:
        ValueError: a stage does not exist, or an argument is out of range.
    """
    if extra_level not in get_args(ExtraLevel):
        raise ValueError(f"extra_level={extra_level!r} must be 'pool', 'p6p7' or 'p6p7_c5'")
    keys = {name: str(index) for index, name in enumerate(stages)}
    _extractor(net, keys)  # refuses what it must before anything is frozen
    freeze_stages(net, trainable_stages)
    body = _extractor(net, keys)
    return _StagesWithFPN(
        body,
        out_channels,
        _extra_levels(extra_level, body.channels[stages[-1]], out_channels),
        norm_layer(norm) if norm else None,
    )


def freeze_stages(net: nn.Module, trainable_stages: int) -> None:
    """Freeze all but the last stages of a network, in place.

    A frozen stage has no gradients, and its BatchNorm becomes FrozenBatchNorm2d, or timm's FrozenBatchNormAct2d where
    an activation is part of it: otherwise its running statistics would go on changing under weights that do not. Its
    dropout and stochastic depth drop nothing any more.

    Args:
        net: a network that stage_extractor takes, with the stages layer1 ... layer4.
        trainable_stages: how many of (layer4, layer3, layer2, layer1, stem) stay trainable, from the back: 5 is all.

    Warns:
        UserWarning: what is frozen has random weights, all or some.

    Raises:
        ValueError: trainable_stages is not between 0 and 5, or the network cannot be frozen by stages. It is then as
            it was.
    """
    if not 0 <= trainable_stages <= 5:
        raise ValueError(f"trainable_stages={trainable_stages} must be between 0 (none) and 5 (all)")
    if trainable_stages == 5:
        return
    parts = stage_parts(net)
    frozen = [name for part in parts[: 5 - trainable_stages] for name in part if net.get_submodule(name).state_dict()]
    norms = {name: _frozen_norm(norm) for name, norm in _norms(net, frozen)}
    random = [] if getattr(net, "weights_loaded", True) else _random(net, frozen)
    if random:
        more = f" and {len(random) - 6} more" if len(random) > 6 else ""
        warnings.warn(
            f"trainable_stages={trainable_stages} freezes {', '.join(random[:6])}{more}, whose weights are random: "
            f"load weights first, or use trainable_stages=5",
            stacklevel=2,
        )
    for name, norm in norms.items():
        net.set_submodule(name, norm)
    for name in frozen:
        part = net.get_submodule(name).requires_grad_(False)
        for module in part.modules():
            _drop_nothing(module)
    for parameter in net.parameters(recurse=False):  # a position embedding, which belongs to the stem
        parameter.requires_grad_(False)


def _norms(net: nn.Module, parts: Sequence[str]) -> Iterator[tuple[str, nn.modules.batchnorm._BatchNorm]]:
    """Each BatchNorm in the parts with its name in the network."""
    for part in parts:
        for name, module in net.get_submodule(part).named_modules(prefix=part, remove_duplicate=False):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                yield name, module


def _random(net: nn.Module, parts: Sequence[str]) -> list[str]:
    """The parts whose tensors no loaded weights held; of the parts that they held in part, the other tensors."""
    random_tensors: set[str] = getattr(net, "random_tensors", set(net.state_dict()))
    names: list[str] = []
    for part in parts:
        tensors = net.get_submodule(part).state_dict(prefix=f"{part}.")
        weights = [key for key in tensors if not key.endswith(".num_batches_tracked")]
        random = [key for key in weights if key in random_tensors]
        names += [part] if random and random == weights else random
    return names


def _drop_nothing(module: nn.Module) -> None:
    """Set a module's probability of dropping features, where it has one, to zero.

    In place and not by an Identity, because attention reads the probability off its dropout.
    """
    attributes = [attribute for kind, own in _DROPPING.items() if isinstance(module, kind) for attribute in own]
    if type(module).__module__.startswith("timm.") and hasattr(module, "drop_prob"):  # DropPath, DropBlock2d
        attributes.append("drop_prob")
    for attribute in attributes:
        setattr(module, attribute, 0.0)


def _frozen_norm(norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    """A norm of the same function, whose statistics stay."""
    if norm.running_var is None:
        raise ValueError(
            f"{type(norm).__name__} without running statistics cannot be frozen: build the network with "
            f"track_running_stats=True, or use trainable_stages=5"
        )
    with norm.running_var.device:
        if type(norm).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward):
            frozen: nn.Module = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
            frozen.load_state_dict(norm.state_dict(), strict=False)
        elif type(norm).__module__.startswith("timm."):
            frozen = importlib.import_module("timm.layers").freeze_batch_norm_2d(norm)
        else:
            raise ValueError(
                f"{type(norm).__name__} is a BatchNorm with a forward of its own, whose frozen form is not known: "
                f"replace it yourself and use trainable_stages=5"
            )
    return frozen.to(norm.running_var.dtype)


def _extra_levels(extra_level: ExtraLevel, last_channels: int, out_channels: int) -> ExtraFPNBlock:
    """What adds the levels above the stages'; the last stage has `last_channels`."""
    if extra_level == "pool":
        return LastLevelMaxPool()
    from_pyramid = extra_level == "p6p7"
    levels = LastLevelP6P7(out_channels if from_pyramid else last_channels, out_channels)
    levels.use_P5 = from_pyramid  # torchvision tells it by the channels, which may be equal
    return levels


def _extractor(net: nn.Module, keys: Mapping[str, str]) -> StageExtractor:
    """The extractor that fits the network; `keys` are the features' by the stages'."""
    return _TimmStageExtractor(net, keys) if is_timm_network(net) else _FlatStageExtractor(flat_network(net), keys)


def _stage_shapes(net: nn.Module, stages: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Channels and stride of each stage of a flat network by its name, stated or measured."""
    children = dict(net.named_children())
    _check_stages(net, stages, list(children))
    stated = {}
    for name in stages:
        channels, stride = getattr(children[name], "channels", None), getattr(children[name], "stride", None)
        if isinstance(channels, int) and isinstance(stride, int):
            stated[name] = channels, stride
    if len(stated) == len(stages):
        return stated
    measured = measured_shapes(net, [name for name in stages if name not in stated])
    return {name: stated.get(name) or measured[name] for name in stages}


def _check_stages(net: nn.Module, stages: Sequence[str], choices: Sequence[str]) -> None:
    """Check that the stages are among `choices`, and in their order, in which they run."""
    unknown = [name for name in stages if name not in choices]
    if unknown and len(unknown) == len(stages) and set(stages) <= set(STAGES):
        raise ValueError(
            f"{type(net).__name__} has no stage {unknown[0]!r}, only {', '.join(choices)}. Accepted are {ACCEPTED}"
        )
    if unknown:
        (nearest,) = difflib.get_close_matches(unknown[0], choices, n=1, cutoff=0) or [""]
        raise ValueError(
            f"{type(net).__name__} has no stage {unknown[0]!r}; did you mean {nearest!r}? "
            f"Its children: {', '.join(choices)}"
        )
    if not stages or list(stages) != [name for name in choices if name in stages]:
        raise ValueError(
            f"stages={tuple(stages)} must be in the order they run, that of {', '.join(choices)}, and at least one"
        )
