"""RetinaNet: one stage, that classifies and refines anchors everywhere; torchvision's detector with our backbones.

Papers: Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002; the pyramid, arXiv 1612.03144.
Reference implementation: torchvision's `retinanet_resnet50_fpn` and `retinanet_resnet50_fpn_v2`, whose state dicts this
has with backbone resnet50: docs/detectors.md has the arguments.
What differs from torchvision's: no detection has label 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn
from torchvision.models.detection import retinanet as torchvision_retinanet
from torchvision.models.detection.retinanet import RetinaNetHead

from resnest_det.layers import NormName, norm_layer
from resnest_det.models.regions import (
    PyramidTop,
    anchor_generator,
    check_num_classes,
    one_stage_pyramid,
    pyramid_channels,
    with_float32_outputs,
    without_background,
)

BoxLoss = Literal["l1", "giou"]


class RetinaNet(torchvision_retinanet.RetinaNet):
    """torchvision's RetinaNet, whose detections never have label 0, the background; see `retinanet`."""

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Outputs of the head for the levels' anchors to detections, see torchvision's RetinaNet."""
        return super().postprocess_detections(without_background(head_outputs), anchors, image_shapes)


def retinanet(
    backbone: nn.Module,
    num_classes: int,
    *,
    trainable_stages: int = 5,
    fpn_channels: int = 256,
    fpn_norm: NormName | None = None,
    pyramid_top: PyramidTop = "p5",
    head_norm: NormName | None = None,
    box_loss: BoxLoss = "l1",
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    resize_in_training: bool = True,
    image_mean: Sequence[float] = (0.485, 0.456, 0.406),
    image_std: Sequence[float] = (0.229, 0.224, 0.225),
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    detections_per_image: int = 300,
    candidates_per_level: int = 1000,
) -> RetinaNet:
    """Build RetinaNet on a backbone.

    The model is used as faster_rcnn's. In training it returns two losses, `classification` and `bbox_regression`.

    Args:
        backbone: a network of create_backbone, or one of torchvision, timm or your own that stage_extractor takes,
            which gets a pyramid on layer2 to layer4 with two levels above; or a pyramid made already, such as
            `fpn_backbone(net, stages=("layer2", "layer3", "layer4"), extra_level="p6p7")`, for which trainable_stages,
            pyramid_top and the fpn arguments are not allowed.
        num_classes: number of classes with the background, which is label 0. The head has an output for it, as
            torchvision's has, which is never found.
        trainable_stages: see fpn_backbone; 5 trains everything.
        fpn_channels: channels of the pyramid and of the head.
        fpn_norm: norm in the pyramid; None for none.
        pyramid_top: what the two levels above the stages' are made of: "p5" the pyramid's level on layer4, "c5"
            layer4's features, as in the paper.
        head_norm: norm in the head's convolutions; None for none. The levels share the head, so each of them counts as
            a batch of its own in a BatchNorm's statistics: "gn" or "frozen_bn" do not mind.
        box_loss: "l1" on the boxes' deltas, "giou" on the boxes (arXiv 1902.09630).
        anchor_sizes: for each level of the pyramid, side in pixels of the smallest square anchors; there are also those
            2^(1/3) and 2^(2/3) times as large, rounded down.
        aspect_ratios: height over width of the anchors at each level.
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

    Note:
        torchvision's builder sets `eps` of the frozen norms to 0 with its COCO_V1 weights; see faster_rcnn.
    """
    check_num_classes(num_classes)
    if box_loss not in get_args(BoxLoss):
        raise ValueError(f"box_loss={box_loss!r} must be 'l1' or 'giou'")
    pyramid = one_stage_pyramid(
        backbone,
        trainable_stages=trainable_stages,
        fpn_channels=fpn_channels,
        fpn_norm=fpn_norm,
        pyramid_top=pyramid_top,
    )
    anchors = anchor_generator(
        pyramid, [(size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in anchor_sizes], aspect_ratios
    )
    head = RetinaNetHead(
        pyramid_channels(pyramid),
        anchors.num_anchors_per_location()[0],
        num_classes,
        norm_layer=norm_layer(head_norm) if head_norm else None,
    )
    head.regression_head._loss_type = box_loss  # where torchvision's own builder sets it
    return RetinaNet(
        pyramid,
        num_classes,
        anchor_generator=anchors,
        head=with_float32_outputs(head),
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
