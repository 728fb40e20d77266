"""What the detectors share: the pyramid under them, their anchors, and the heads that see a region.

Papers: the pyramid, Lin et al., arXiv 1612.03144; the box head of four convolutions, Wu and He, arXiv 1803.08494, as
the released ResNeSt detectors use it; the mask head, He et al., "Mask R-CNN", arXiv 1703.06870.
Reference implementation: torchvision's builders of detectors, whose modules these are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from resnest_det.backbones import STAGES, fpn_backbone
from resnest_det.backbones.stages import ExtraLevel
from resnest_det.distributed import any_process
from resnest_det.layers import NormName, SyncBatchNorm, norm_layer
from resnest_det.layers.linear import OneDNNLinear
from resnest_det.models.roi_align import RowRoIAlign

BoxHead = Literal["2fc", "4conv1fc"]
PyramidTop = Literal["p5", "c5"]

BOX_REGION_SIZE = 7  # side of the features that the box head sees of a region
MASK_REGION_SIZE = 14  # side of the features that the mask head sees of a region; its masks have twice that

_SYNC_BATCH_NORMS = (SyncBatchNorm, nn.SyncBatchNorm)


def check_num_classes(num_classes: int) -> None:
    """Refuse fewer than one class beside the background, with a ValueError."""
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be 2 or more: the classes and the background")


def check_box_head(box_head: BoxHead, norm: NormName | None) -> None:
    """Refuse an unknown box head, and a norm where it has no convolutions, with a ValueError."""
    if box_head not in get_args(BoxHead):
        raise ValueError(f"box_head={box_head!r} must be '2fc' or '4conv1fc'")
    if box_head == "2fc" and norm:
        raise ValueError(f"box_head_norm={norm!r} needs box_head='4conv1fc': '2fc' has no convolutions")


def feature_pyramid(
    backbone: nn.Module,
    *,
    trainable_stages: int,
    fpn_channels: int,
    fpn_norm: NormName | None,
    stages: Sequence[str] = STAGES,
    extra_level: ExtraLevel = "pool",
) -> nn.Module:
    """A pyramid on the backbone, or the backbone itself where it is one already.

    Args:
        backbone: a network that stage_extractor takes, or a pyramid, which is known by its `out_channels`.
        trainable_stages: see fpn_backbone.
        fpn_channels: channels of each level.
        fpn_norm: norm in the pyramid; None for none.
        stages: the stages under the pyramid.
        extra_level: see fpn_backbone.

    Returns:
        torchvision's BackboneWithFPN, or a module that is used like it.

    Raises:
        ValueError: an argument of the pyramid's is given beside a pyramid made already.
    """
    if not hasattr(backbone, "out_channels"):
        return fpn_backbone(
            backbone,
            trainable_stages=trainable_stages,
            stages=stages,
            out_channels=fpn_channels,
            extra_level=extra_level,
            norm=fpn_norm,
        )
    if (trainable_stages, fpn_channels, fpn_norm) != (5, 256, None):
        raise ValueError(
            "trainable_stages, fpn_channels and fpn_norm are for a backbone without a pyramid; this one has "
            f"out_channels={backbone.out_channels}: give them to fpn_backbone"
        )
    return backbone


def one_stage_pyramid(
    backbone: nn.Module,
    *,
    trainable_stages: int,
    fpn_channels: int,
    fpn_norm: NormName | None,
    pyramid_top: PyramidTop,
) -> nn.Module:
    """The pyramid of a detector of one stage: layer2 to layer4, and two levels above, strides 8 to 128.

    layer1's level would have four times the places of layer2's.

    Args:
        backbone: see feature_pyramid.
        trainable_stages: see fpn_backbone.
        fpn_channels: channels of each level.
        fpn_norm: norm in the pyramid; None for none.
        pyramid_top: what the two levels are made of: "p5" the pyramid's level on layer4, "c5" layer4's features.

    Raises:
        ValueError: pyramid_top is unknown, or an argument of the pyramid's is given beside a pyramid made already.
    """
    if pyramid_top not in get_args(PyramidTop):
        raise ValueError(f"pyramid_top={pyramid_top!r} must be 'p5' or 'c5'")
    if pyramid_top != "p5" and hasattr(backbone, "out_channels"):
        raise ValueError(
            f"pyramid_top={pyramid_top!r} is for a backbone without a pyramid; this one has "
            f"out_channels={backbone.out_channels}: give fpn_backbone extra_level='p6p7_c5'"
        )
    return feature_pyramid(
        backbone,
        trainable_stages=trainable_stages,
        fpn_channels=fpn_channels,
        fpn_norm=fpn_norm,
        stages=("layer2", "layer3", "layer4"),
        extra_level="p6p7" if pyramid_top == "p5" else "p6p7_c5",
    )


def pyramid_channels(pyramid: nn.Module) -> int:
    """Channels of each level of what feature_pyramid gave."""
    channels: int = pyramid.out_channels  # type: ignore[assignment]
    return channels


def anchor_generator(
    pyramid: nn.Module, sizes: Sequence[Sequence[int]], aspect_ratios: Sequence[float]
) -> AnchorGenerator:
    """Anchors of every size and aspect ratio at each place of each level.

    Args:
        pyramid: what feature_pyramid gave.
        sizes: for each level, the sides in pixels of the square anchors.
        aspect_ratios: height over width of the anchors, the same at each level.

    Raises:
        ValueError: the pyramid has another number of levels, as far as that can be known without running it.
    """
    levels = num_levels(pyramid)
    if levels not in (None, len(sizes)):
        raise ValueError(f"anchor_sizes has {len(sizes)} sizes and the pyramid has {levels} levels: give one a level")
    return Float32AnchorGenerator(tuple(tuple(level) for level in sizes), (tuple(aspect_ratios),) * len(sizes))


class Float32AnchorGenerator(AnchorGenerator):
    """torchvision's AnchorGenerator, whose anchors do not become 16-bit numbers where the features are such.

    Under autocast to bfloat16, which has 8 bits for a number's digits, anchors beyond 512 pixels would stand on a grid
    of 4 pixels.
    """

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """The anchors around a place, for the device that the features are on."""
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


H = TypeVar("H", bound=nn.Module)


def with_float32_outputs(head: H) -> H:
    """The head, whose outputs are float32 where autocast has it compute in 16 bits.

    torchvision decodes boxes in the precision of the head's numbers, anchors and regions included.
    """
    head.register_forward_hook(_widen_outputs)
    return head


def _widen_outputs(_head: nn.Module, _inputs: object, outputs: Any) -> Any:
    return _widened(outputs)


def _widened(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if isinstance(outputs, dict):
        return {key: _widened(value) for key, value in outputs.items()}
    return type(outputs)(_widened(value) for value in outputs)


def make_rpn_head(channels: int, anchors: AnchorGenerator, num_convolutions: int) -> RPNHead:
    """The head that proposes regions: 3x3 convolutions, then an objectness and a box for each anchor.

    Raises:
        ValueError: there is no convolution.
    """
    if num_convolutions < 1:
        raise ValueError(f"rpn_convolutions={num_convolutions} must be 1 or more")
    head = RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=num_convolutions)
    return with_float32_outputs(head)


def make_region_pool(size: int) -> RowRoIAlign:
    """What a head of `size` x `size` features sees of a region of the pyramid, as torchvision's detectors take it."""
    return RowRoIAlign(featmap_names=["0", "1", "2", "3"], output_size=size, sampling_ratio=2)


def make_box_predictor(in_channels: int, num_classes: int) -> FastRCNNPredictor:
    """Vectors of regions (R, in_channels) to class logits (R, num_classes) and deltas (R, 4 num_classes)."""
    return with_float32_outputs(FastRCNNPredictor(in_channels, num_classes))


def make_box_head(box_head: BoxHead, in_channels: int, channels: int, norm: NormName | None) -> nn.Module:
    """Features of regions (R, in_channels, 7, 7) to vectors (R, channels).

    Args:
        box_head: "2fc" two fully connected layers; "4conv1fc" four 3x3 convolutions of in_channels and one fully
            connected layer.
        in_channels: channels of the pyramid.
        channels: width of the fully connected layers.
        norm: norm in the convolutions of "4conv1fc"; None for none.
    """
    head: nn.Module
    if box_head == "2fc":
        head = TwoMLPHead(in_channels * BOX_REGION_SIZE**2, channels)
    else:
        head = FastRCNNConvFCHead(
            (in_channels, BOX_REGION_SIZE, BOX_REGION_SIZE),
            [in_channels] * 4,
            [channels],
            norm_layer=norm_layer(norm) if norm else None,
        )
    for name, child in list(head.named_children()):
        if isinstance(child, nn.Linear):
            setattr(head, name, OneDNNLinear.like(child))
    return head


class MaskHead(MaskRCNNHeads):
    """torchvision's mask head, which also takes a step in which no process has a region.

    SyncBatchNorm, which has nothing to take statistics of then, leaves the running ones as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Features of regions (R, in_channels, 14, 14) to (R, channels, 14, 14)."""
        live = [norm for norm in self.modules() if norm.training and isinstance(norm, _SYNC_BATCH_NORMS)]
        if not live or any_process(len(input) > 0, device=input.device)[0]:
            return super().forward(input)
        for norm in live:
            norm.training = False
        features = super().forward(input)
        for norm in live:
            norm.training = True
        return features


def make_mask_head(in_channels: int, channels: int, norm: NormName | None) -> MaskHead:
    """Features of regions (R, in_channels, 14, 14) to (R, channels, 14, 14): four 3x3 convolutions.

    What follows it is make_mask_predictor's, which doubles the size.
    """
    return MaskHead(in_channels, [channels] * 4, dilation=1, norm_layer=norm_layer(norm) if norm else None)


def make_mask_predictor(channels: int, num_classes: int) -> MaskRCNNPredictor:
    """Features of the mask head (R, channels, 14, 14) to mask logits (R, num_classes, 28, 28)."""
    return with_float32_outputs(MaskRCNNPredictor(channels, channels, num_classes))


def without_background(head_outputs: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Outputs of a head of one stage, after which no detection has label 0.

    torchvision's RetinaNet and FCOS give the background a score of its own, which nothing in training asks for, and
    would return what exceeds the threshold.

    Args:
        head_outputs: for each level, `cls_logits` (N, places, num_classes); and others, which stay as they are.
    """
    logits = head_outputs["cls_logits"]
    background = torch.arange(logits[0].shape[-1], device=logits[0].device) == 0
    return {**head_outputs, "cls_logits": [level.masked_fill(background, -math.inf) for level in logits]}


def num_levels(pyramid: nn.Module) -> int | None:
    """Levels of torchvision's BackboneWithFPN, as fpn_backbone makes it too; None where only running it would tell."""
    extra = {LastLevelMaxPool: 1, LastLevelP6P7: 2}
    if not isinstance(pyramid, BackboneWithFPN) or type(pyramid.fpn.extra_blocks) not in extra:
        return None
    return len(pyramid.fpn.inner_blocks) + extra[type(pyramid.fpn.extra_blocks)]
