"""FCOS: one stage without anchors, in which each place of a level predicts one box; torchvision's with our backbones.

Papers: Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", arXiv 1904.01355, and "FCOS: A Simple and
Strong Anchor-Free Object Detector", arXiv 2006.09214; the pyramid, arXiv 1612.03144.
Reference implementation: torchvision's `fcos_resnet50_fpn`, whose state dict this has with backbone resnet50 and the
default arguments.
What differs from torchvision's: no detection has label 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.detection import fcos as torchvision_fcos

from resnest_det.backbones import StageExtractor
from resnest_det.layers import NormName
from resnest_det.models.regions import (
    Float32AnchorGenerator,
    PyramidTop,
    check_num_classes,
    num_levels,
    one_stage_pyramid,
    pyramid_channels,
    with_float32_outputs,
    without_background,
)

_STRIDES = (8, 16, 32, 64, 128)  # of the levels, each of which has a range of box sizes
_GROUPS = 32  # of the head's GroupNorm


class FCOS(torchvision_fcos.FCOS):
    """torchvision's FCOS, whose detections never have label 0, the background; see `fcos`."""

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Outputs of the head for the levels' places to detections, see torchvision's FCOS."""
        return super().postprocess_detections(without_background(head_outputs), anchors, image_shapes)


def fcos(
    backbone: nn.Module,
    num_classes: int,
    *,
    trainable_stages: int = 5,
    fpn_channels: int = 256,
    fpn_norm: NormName | None = None,
    pyramid_top: PyramidTop = "p5",
    center_sampling_radius: float = 1.5,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    resize_in_training: bool = True,
    image_mean: Sequence[float] = (0.485, 0.456, 0.406),
    image_std: Sequence[float] = (0.229, 0.224, 0.225),
    score_threshold: float = 0.2,
    nms_threshold: float = 0.6,
    detections_per_image: int = 100,
    candidates_per_level: int = 1000,
) -> FCOS:
    """Build FCOS on a backbone.

    The model is used as faster_rcnn's. In training it returns three losses, `classification`, `bbox_regression` and
    `bbox_ctrness`. A detection's score is the geometric mean of its class's and its centre-ness.

    Args:
        backbone: a network of create_backbone, or one of torchvision, timm or your own that stage_extractor takes,
            which gets a pyramid on layer2 to layer4 with two levels above; or a pyramid of five levels made already,
            such as `fpn_backbone(net, stages=("layer2", "layer3", "layer4"), extra_level="p6p7")`, for which
            trainable_stages, pyramid_top and the fpn arguments are not allowed.
        num_classes: number of classes with the background, which is label 0. The head has an output for it, as
            torchvision's has, which is never found.
        trainable_stages: see fpn_backbone; 5 trains everything.
        fpn_channels: channels of the pyramid and of the head, a multiple of 32: the head has GroupNorm.
        fpn_norm: norm in the pyramid; None for none.
        pyramid_top: what the two levels above the stages' are made of: "p5" the pyramid's level on layer4, "c5"
            layer4's features.
        center_sampling_radius: a place counts as an object's where it is within the box and, in both directions, not
            farther from its centre than this many strides of the level.
        min_size: see faster_rcnn.
        max_size: see faster_rcnn.
        resize_in_training: see faster_rcnn.
        image_mean: see faster_rcnn.
        image_std: see faster_rcnn.
        score_threshold: detections must score higher.
        nms_threshold: of two detections of a class with a larger IoU than this, the weaker is dropped.
        detections_per_image: detections kept, an image.
        candidates_per_level: best detections of a level that go into the suppression, an image.

    Raises:
        ValueError: an argument is out of range or contradicts another.
    """
    check_num_classes(num_classes)
    channels = fpn_channels if not hasattr(backbone, "out_channels") else pyramid_channels(backbone)
    if channels % _GROUPS:
        raise ValueError(
            f"fpn_channels={channels} must be a multiple of {_GROUPS}: the head normalises them in as many groups"
        )
    pyramid = one_stage_pyramid(
        backbone,
        trainable_stages=trainable_stages,
        fpn_channels=fpn_channels,
        fpn_norm=fpn_norm,
        pyramid_top=pyramid_top,
    )
    if num_levels(pyramid) not in (None, len(_STRIDES)):
        raise ValueError(
            f"the pyramid has {num_levels(pyramid)} levels and FCOS needs {len(_STRIDES)}, of the strides 8 to 128: "
            f'make it by fpn_backbone(net, stages=("layer2", "layer3", "layer4"), extra_level="p6p7")'
        )
    body = getattr(pyramid, "body", None)
    strides = tuple(body.strides.values()) if isinstance(body, StageExtractor) else _STRIDES
    if strides != _STRIDES[: len(strides)]:
        raise ValueError(
            f"the pyramid stands on stages of the strides {strides} and FCOS needs {_STRIDES[:3]}: make it by "
            f'fpn_backbone(net, stages=("layer2", "layer3", "layer4"), extra_level="p6p7")'
        )
    model = FCOS(
        pyramid,
        num_classes,
        anchor_generator=Float32AnchorGenerator(tuple((stride,) for stride in _STRIDES), ((1.0,),) * len(_STRIDES)),
        center_sampling_radius=center_sampling_radius,
        min_size=min_size,
        max_size=max_size,
        image_mean=list(image_mean),
        image_std=list(image_std),
        score_thresh=score_threshold,
        nms_thresh=nms_threshold,
        detections_per_img=detections_per_image,
        topk_candidates=candidates_per_level,
        _skip_resize=not resize_in_training,
    )
    with_float32_outputs(model.head)
    return model
