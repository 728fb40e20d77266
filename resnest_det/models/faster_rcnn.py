"""Faster R-CNN on a feature pyramid: torchvision's detector with our backbones.

Papers: Ren et al., "Faster R-CNN", arXiv 1506.01497; those of the parts are named in regions.py.
Reference implementation: torchvision's `fasterrcnn_resnet50_fpn` and `fasterrcnn_resnet50_fpn_v2`, whose state dicts
this has with backbone resnet50: docs/detectors.md has the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models.detection import FasterRCNN

from resnest_det.layers import NormName
from resnest_det.models.regions import (
    BOX_REGION_SIZE,
    BoxHead,
    anchor_generator,
    check_box_head,
    check_num_classes,
    feature_pyramid,
    make_box_head,
    make_box_predictor,
    make_region_pool,
    make_rpn_head,
    pyramid_channels,
)


def faster_rcnn(
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
) -> FasterRCNN:
    """Build Faster R-CNN on a backbone.

    The model takes a list of float images (3, H, W) in [0, 1] of any sizes. In training `model(images, targets)`
    returns a dict of four losses; otherwise `model(images)` returns for each image a dict with `boxes` (M, 4) xyxy in
    pixels of the image as given, `labels` (M,) and `scores` (M,), best first. It normalises and resizes by itself.

    Args:
        backbone: a network of create_backbone, or one of torchvision, timm or your own that stage_extractor takes,
            which gets a pyramid on layer1 to layer4; or a pyramid made already, as fpn_backbone makes it by default
            (`out_channels`, and features "0" to "3" and "pool"), for which trainable_stages and the fpn arguments are
            not allowed.
        num_classes: number of classes with the background, which is label 0.
        trainable_stages: see fpn_backbone; 5 trains everything.
        fpn_channels: channels of the pyramid.
        fpn_norm: norm in the pyramid; None for none.
        rpn_convolutions: 3x3 convolutions of the head that proposes regions.
        box_head: "2fc" two fully connected layers; "4conv1fc" four 3x3 convolutions of fpn_channels and one fully
            connected layer.
        box_head_channels: width of the fully connected layers.
        box_head_norm: norm in the convolutions of "4conv1fc"; None for none.
        anchor_sizes: side in pixels of the square anchors, one for each level of the pyramid.
        aspect_ratios: height over width of the anchors at each level.
        min_size: short side in pixels that images are resized to. Of several, training draws one an image, and
            inference takes the last.
        max_size: bound of the long side, in pixels.
        resize_in_training: False where the training images come resized, as those of this package's pipelines do.
        image_mean: mean of each channel of the images in [0, 1], subtracted by the model; ImageNet's, unless the
            backbone was trained with another, as some of timm's were (`pretrained_cfg["mean"]` and `["std"]`).
        image_std: standard deviation of each channel, divided by.
        rpn_proposals_train: proposals kept in training, before and after suppression.
        rpn_proposals_eval: proposals kept in inference, before and after suppression.
        roi_batch_size: regions that the box head trains on, an image.
        score_threshold: detections below it are dropped.
        nms_threshold: of two detections of a class with a larger IoU than this, the weaker is dropped.
        detections_per_image: detections kept, an image.

    Raises:
        ValueError: an argument is out of range or contradicts another.

    Note:
        torchvision's builder sets `eps` of the frozen norms to 0 with its COCO_V1 weights, which were trained so. For
        its outputs, set it to 0 on each FrozenBatchNorm2d of the model after loading them.
    """
    check_num_classes(num_classes)
    check_box_head(box_head, box_head_norm)
    pyramid = feature_pyramid(backbone, trainable_stages=trainable_stages, fpn_channels=fpn_channels, fpn_norm=fpn_norm)
    channels = pyramid_channels(pyramid)
    anchors = anchor_generator(pyramid, [(size,) for size in anchor_sizes], aspect_ratios)
    return FasterRCNN(
        pyramid,
        min_size=min_size,
        max_size=max_size,
        image_mean=list(image_mean),
        image_std=list(image_std),
        box_roi_pool=make_region_pool(BOX_REGION_SIZE),
        box_head=make_box_head(box_head, channels, box_head_channels, box_head_norm),
        box_predictor=make_box_predictor(box_head_channels, num_classes),
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
