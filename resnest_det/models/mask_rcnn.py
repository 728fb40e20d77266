"""Mask R-CNN on a feature pyramid: torchvision's detector with our backbones.

Papers: He et al., "Mask R-CNN", arXiv 1703.06870; those of the parts are named in regions.py.
Reference implementation: torchvision's `maskrcnn_resnet50_fpn` and `maskrcnn_resnet50_fpn_v2`, whose state dicts this
has with backbone resnet50: docs/detectors.md has the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models.detection import MaskRCNN

from resnest_det.layers import NormName
from resnest_det.models.regions import (
    BOX_REGION_SIZE,
    MASK_REGION_SIZE,
    BoxHead,
    anchor_generator,
    check_box_head,
    check_num_classes,
    feature_pyramid,
    make_box_head,
    make_box_predictor,
    make_mask_head,
    make_mask_predictor,
    make_region_pool,
    make_rpn_head,
    pyramid_channels,
)


def mask_rcnn(
    backbone: nn.Module,
    num_classes: int,
    *,
    trainable_stages: int = 5,
    fpn_channels: int = 256,
    fpn_norm: NormName | None = None,
    rpn_convolutions: int = 1,
    box_head: BoxHead = "2fc",
    box_head_channels: int = 1024,
    box_head_norm: NormName | None = None,
    mask_head_channels: int = 256,
    mask_head_norm: NormName | None = None,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    resize_in_training: bool = True,
    image_mean: Sequence[float] = (0.485, 0.456, 0.406),
    image_std: Sequence[float] = (0.229, 0.224, 0.225),
    rpn_proposals_train: int = 2000,
    rpn_proposals_eval: int = 1000,
    roi_batch_size: int = 512,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    detections_per_image: int = 100,
) -> MaskRCNN:
    """Build Mask R-CNN on a backbone.

    It is Faster R-CNN with one head more. In training, a target also has `masks` (N, H, W), 1 on the object and 0
    elsewhere, and there is a fifth loss, `loss_mask`. A prediction also has `masks` (M, 1, H, W), for each pixel of the
    image as given the probability that it belongs to the object: float32, so 100 objects on 800x1333 take 427 MB.

    Args:
        backbone: see faster_rcnn.
        num_classes: number of classes with the background, which is label 0.
        trainable_stages: see fpn_backbone; 5 trains everything.
        fpn_channels: channels of the pyramid.
        fpn_norm: norm in the pyramid; None for none.
        rpn_convolutions: see faster_rcnn, as for all that is not of the masks.
        box_head: see faster_rcnn.
        box_head_channels: see faster_rcnn.
        box_head_norm: see faster_rcnn.
        mask_head_channels: channels of the mask head, of its four 3x3 convolutions and the one that doubles the size.
        mask_head_norm: norm in the four convolutions; None for none.
        anchor_sizes: see faster_rcnn.
        aspect_ratios: see faster_rcnn.
        min_size: see faster_rcnn.
        max_size: see faster_rcnn.
        resize_in_training: see faster_rcnn.
        image_mean: see faster_rcnn.
        image_std: see faster_rcnn.
        rpn_proposals_train: see faster_rcnn.
        rpn_proposals_eval: see faster_rcnn.
        roi_batch_size: see faster_rcnn; the mask head trains on those of them that are on objects.
        score_threshold: see faster_rcnn.
        nms_threshold: see faster_rcnn.
        detections_per_image: see faster_rcnn.

    Raises:
        ValueError: an argument is out of range or contradicts another.

    Note:
        torchvision's builder sets `eps` of the frozen norms to 0 with its COCO_V1 weights; see faster_rcnn.
    """
    check_num_classes(num_classes)
    check_box_head(box_head, box_head_norm)
    pyramid = feature_pyramid(backbone, trainable_stages=trainable_stages, fpn_channels=fpn_channels, fpn_norm=fpn_norm)
    channels = pyramid_channels(pyramid)
    anchors = anchor_generator(pyramid, [(size,) for size in anchor_sizes], aspect_ratios)
    return MaskRCNN(
        pyramid,
        min_size=min_size,
        max_size=max_size,
        image_mean=list(image_mean),
        image_std=list(image_std),
        box_roi_pool=make_region_pool(BOX_REGION_SIZE),
        box_head=make_box_head(box_head, channels, box_head_channels, box_head_norm),
        box_predictor=make_box_predictor(box_head_channels, num_classes),
        mask_roi_pool=make_region_pool(MASK_REGION_SIZE),
        mask_head=make_mask_head(channels, mask_head_channels, mask_head_norm),
        mask_predictor=make_mask_predictor(mask_head_channels, num_classes),
        rpn_anchor_generator=anchors,
        rpn_head=make_rpn_head(channels, anchors, rpn_convolutions),
        rpn_pre_nms_top_n_train=rpn_proposals_train,
        rpn_pre_nms_top_n_test=rpn_proposals_eval,
        rpn_post_nms_top_n_train=rpn_proposals_train,
        rpn_post_nms_top_n_test=rpn_proposals_eval,
        box_score_thresh=score_threshold,
        box_nms_thresh=nms_threshold,
        box_detections_per_img=detections_per_image,
        box_batch_size_per_image=roi_batch_size,
        _skip_resize=not resize_in_training,
    )
