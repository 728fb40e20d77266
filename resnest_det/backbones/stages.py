"""Backbones as feature extractors: a network's stages, their channels and strides, and pyramids on them.

torchvision's IntermediateLayerGetter runs the children of a network in order and returns the outputs of the named
ones; BackboneWithFPN puts a feature pyramid (Lin et al., arXiv 1612.03144) on them. Both take our networks as they
are. What is added here: channels and strides are read off the stages, and freezing is complete.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from typing import Literal

from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from resnest_det.layers import NormName, norm_layer

STAGES = ("layer1", "layer2", "layer3", "layer4")


class StageExtractor(IntermediateLayerGetter):
    """A network that ends at its last wanted stage and returns the features of each wanted one.

    It shares its modules with the network that it was made from.

    Attributes:
        channels: channels of each stage's features, by the stage's name.
        strides: pixels of the input for one step of each stage's features, by the stage's name.
    """

    def __init__(self, net: nn.Module, stages: Sequence[str]) -> None:
        shapes = _stage_shapes(net, stages)
        super().__init__(net, {name: name for name in stages})
        self.channels = {name: channels for name, (channels, _) in shapes.items()}
        self.strides = {name: stride for name, (_, stride) in shapes.items()}


def stage_extractor(net: nn.Module, stages: Sequence[str] = STAGES) -> StageExtractor:
    """The features of a network's stages: images (N, 3, H, W) to a dict of (N, channels, H / stride, W / stride).

    Args:
        net: a network of create_backbone, or any module whose children run in order and whose stages have the
            attributes `channels` and `stride`.
        stages: names of stages, the keys of the features.

    Raises:
        ValueError: a stage does not exist or does not state its channels and stride.
    """
    return StageExtractor(net, stages)


def fpn_backbone(
    net: nn.Module,
    *,
    trainable_stages: int = 5,
    stages: Sequence[str] = STAGES,
    out_channels: int = 256,
    extra_level: Literal["pool", "p6p7"] = "pool",
    norm: NormName | None = None,
) -> BackboneWithFPN:
    """A feature pyramid on a network's stages, as torchvision's detectors take it.

    Args:
        net: a network of create_backbone; its modules are shared, and frozen as asked.
        trainable_stages: how many of (layer4, layer3, layer2, layer1, stem) train, from the back; the rest is frozen,
            see freeze_stages.
        stages: the stages under the pyramid, from the finest.
        out_channels: channels of each level.
        extra_level: "pool" adds a level of half the size of the last (Faster R-CNN), "p6p7" adds two by strided
            convolutions (RetinaNet).
        norm: norm after each of the pyramid's convolutions; None for none, and biases in its place.

    Returns:
        torchvision's BackboneWithFPN. Its features are named "0", "1", ... from the finest, then "pool" or "p6",
        "p7"; it has `out_channels`.

    Raises:
        ValueError: a stage does not exist, or an argument is out of range.
    """
    if extra_level not in ("pool", "p6p7"):
        raise ValueError(f"extra_level={extra_level!r} must be 'pool' or 'p6p7'")
    channels = [channels for channels, _ in _stage_shapes(net, stages).values()]
    freeze_stages(net, trainable_stages)
    return BackboneWithFPN(
        net,
        {name: str(index) for index, name in enumerate(stages)},
        channels,
        out_channels,
        extra_blocks=LastLevelMaxPool() if extra_level == "pool" else LastLevelP6P7(out_channels, out_channels),
        norm_layer=norm_layer(norm) if norm else None,
    )


def freeze_stages(net: nn.Module, trainable_stages: int) -> None:
    """Freeze all but the last stages of a network, in place.

    A frozen stage has no gradients, and its BatchNorm becomes FrozenBatchNorm2d: otherwise its running statistics
    would go on changing under weights that do not.

    Args:
        net: a network with children conv1, bn1, layer1 ... layer4.
        trainable_stages: how many of (layer4, layer3, layer2, layer1, stem) stay trainable, from the back: 5 is all.

    Warns:
        UserWarning: what is frozen has random weights.

    Raises:
        ValueError: trainable_stages is not between 0 and 5.
    """
    if not 0 <= trainable_stages <= 5:
        raise ValueError(f"trainable_stages={trainable_stages} must be between 0 (none) and 5 (all)")
    parts = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
    frozen = [name for part in parts[: 5 - trainable_stages] for name in part]
    if frozen and not getattr(net, "weights_loaded", True):
        warnings.warn(
            f"trainable_stages={trainable_stages} freezes {', '.join(frozen)}, whose weights are random: load weights "
            f"first, or use trainable_stages=5",
            stacklevel=2,
        )
    for name in frozen:
        net.set_submodule(name, _frozen_norms(net.get_submodule(name)))
        net.get_submodule(name).requires_grad_(False)


def _frozen_norms(module: nn.Module) -> nn.Module:
    """`module` with each BatchNorm in it replaced by a FrozenBatchNorm2d of the same function."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        frozen = FrozenBatchNorm2d(module.num_features, eps=module.eps)
        frozen.load_state_dict(module.state_dict(), strict=False)
        return frozen.to(module.weight.device)
    for name, child in module.named_children():
        setattr(module, name, _frozen_norms(child))
    return module


def _stage_shapes(net: nn.Module, stages: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Channels and stride of each stage by its name, checked to exist and to be in the order they run."""
    children = dict(net.named_children())
    shapes = {}
    for name in stages:
        if name not in children:
            (nearest,) = difflib.get_close_matches(name, children, n=1, cutoff=0) or [""]
            raise ValueError(
                f"{type(net).__name__} has no stage {name!r}; did you mean {nearest!r}? "
                f"Its children: {', '.join(children)}"
            )
        channels, stride = getattr(children[name], "channels", None), getattr(children[name], "stride", None)
        if not isinstance(channels, int) or not isinstance(stride, int):
            raise ValueError(
                f"{name!r} of {type(net).__name__} does not state its channels and stride: stages of create_backbone "
                f"do; give a stage of your own the integer attributes `channels` and `stride`"
            )
        shapes[name] = channels, stride
    if list(shapes) != [name for name in children if name in shapes]:
        raise ValueError(f"stages={tuple(stages)} must be in the order they run, that of {', '.join(children)}")
    return shapes
