"""Faster R-CNN on a feature pyramid: torchvision's detector with our backbones.

Papers: Ren et al., "Faster R-CNN", arXiv 1506.01497; the pyramid, arXiv 1612.03144; the box head of four convolutions,
Wu and He, arXiv 1803.08494, as the released ResNeSt detectors use it.
Reference implementation: torchvision's `fasterrcnn_resnet50_fpn`, whose state dict this has with backbone resnet50,
norm "frozen_bn" and the default arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead

from resnest_det.backbones import STAGES, fpn_backbone
from resnest_det.layers import NormName, norm_layer

BoxHead = Literal["2fc", "4conv1fc"]

_REGION_SIZE = 7  # side of the features that a region is pooled to


def faster_rcnn(
    backbone: nn.Module,
    num_classes: int,
    *,
    trainable_stages: int = 5,
    fpn_channels: int = 256,
    fpn_norm: NormName | None = None,
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
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be 2 or more: the classes and the background")
    if box_head not in ("2fc", "4conv1fc"):
        raise ValueError(f"box_head={box_head!r} must be '2fc' or '4conv1fc'")
    if box_head == "2fc" and box_head_norm:
        raise ValueError(f"box_head_norm={box_head_norm!r} needs box_head='4conv1fc': '2fc' has no convolutions")
    if not hasattr(backbone, "out_channels"):
        backbone = fpn_backbone(backbone, trainable_stages=trainable_stages, out_channels=fpn_channels, norm=fpn_norm)
        num_levels = len(STAGES) + 1
        if len(anchor_sizes) != num_levels:
            raise ValueError(
                f"anchor_sizes has {len(anchor_sizes)} sizes and the pyramid has {num_levels} levels: give one a level"
            )
    elif (trainable_stages, fpn_channels, fpn_norm) != (5, 256, None):
        raise ValueError(
            "trainable_stages, fpn_channels and fpn_norm are for a backbone without a pyramid; this one has "
            f"out_channels={backbone.out_channels}: give them to fpn_backbone"
        )
    channels: int = backbone.out_channels  # type: ignore[assignment]
    if box_head == "2fc":
        head: nn.Module = TwoMLPHead(channels * _REGION_SIZE**2, box_head_channels)
    else:
        head = FastRCNNConvFCHead(
            (channels, _REGION_SIZE, _REGION_SIZE),
            [channels] * 4,
            [box_head_channels],
            norm_layer=norm_layer(box_head_norm) if box_head_norm else None,
        )
    return FasterRCNN(
        backbone,
        min_size=min_size,
        max_size=max_size,
        image_mean=list(image_mean),
        image_std=list(image_std),
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in anchor_sizes), (tuple(aspect_ratios),) * len(anchor_sizes)
        ),
        rpn_pre_nms_top_n_train=rpn_proposals_train,
        rpn_pre_nms_top_n_test=rpn_proposals_eval,
        rpn_post_nms_top_n_train=rpn_proposals_train,
        rpn_post_nms_top_n_test=rpn_proposals_eval,
        box_head=head,
        box_predictor=FastRCNNPredictor(box_head_channels, num_classes),
        box_score_thresh=score_threshold,
        box_nms_thresh=nms_threshold,
        box_detections_per_img=detections_per_image,
        box_batch_size_per_image=roi_batch_size,
        _skip_resize=not resize_in_training,
    )
