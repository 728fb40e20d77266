"""Cascade R-CNN on a feature pyramid: box heads in a row, each trained on the boxes that the one before it refined.

Papers: Cai and Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection", arXiv 1712.00726, and, with
masks, "Cascade R-CNN: High Quality Object Detection and Instance Segmentation", arXiv 1906.09756.
Reference implementation: detectron2's `CascadeROIHeads`, which the released ResNeSt detectors use. As in it, regions
are sampled once, before the first stage, and only there the ground truth is added to them; a later stage trains on all
boxes that the one before it gave. (mmdetection samples and adds anew in every stage, weighs the stages' losses 1, 0.5
and 0.25, and has a mask head for each.)

What differs from detectron2 is what torchvision's Faster and Mask R-CNN have otherwise, on whose parts this is built:

- the box loss is smooth L1 with beta 1/9, where detectron2 has L1; both divide its sum by the number of regions;
- regions are pooled from 2x2 samples a bin and without the half-pixel shift, where detectron2 adapts the number of
  samples to the region's size and shifts;
- the mask loss is against the object's share of each bin, where detectron2 rounds it to 0 or 1;
- the layers begin with torch's and torchvision's random weights, where detectron2 begins the last ones near zero;
- detections with a side below 0.01 pixels are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

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
    make_mask_head,
    make_mask_predictor,
    make_region_pool,
    make_rpn_head,
    pyramid_channels,
)

_POSITIVE_FRACTION = 0.25  # of the sampled regions, at most
_SMOOTH_L1_BETA = 1 / 9
_MIN_SIDE = 0.01  # pixels, of a detection


class CascadeRCNN(GeneralizedRCNN):
    """Proposals, then the stages of CascadeRoIHeads; see `cascade_rcnn`."""


def cascade_rcnn(
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
    stage_ious: Sequence[float] = (0.5, 0.6, 0.7),
    masks: bool = False,
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
) -> CascadeRCNN:
    """Build Cascade R-CNN, or with masks=True Cascade Mask R-CNN, on a backbone.

    The model is used as faster_rcnn's, or with masks as mask_rcnn's. In training it returns `loss_objectness` and
    `loss_rpn_box_reg`, for each stage from 1 on `loss_classifier_1` and `loss_box_reg_1`, and with masks `loss_mask`.

    Args:
        backbone: see faster_rcnn.
        num_classes: number of classes with the background, which is label 0.
        trainable_stages: see fpn_backbone; 5 trains everything.
        fpn_channels: channels of the pyramid.
        fpn_norm: norm in the pyramid; None for none.
        rpn_convolutions: see faster_rcnn, as for all that is not said here.
        box_head: of each stage, which has its own; see faster_rcnn.
        box_head_channels: see faster_rcnn.
        box_head_norm: see faster_rcnn.
        stage_ious: for each stage, the IoU with an object from which a region counts as it, between 0 and 1. Their
            number is the number of stages.
        masks: whether there is a mask head. It trains on the sampled regions that count as an object in the first
            stage, and draws the masks of the detections.
        mask_head_channels: see mask_rcnn.
        mask_head_norm: see mask_rcnn.
        anchor_sizes: see faster_rcnn.
        aspect_ratios: see faster_rcnn.
        min_size: see faster_rcnn.
        max_size: see faster_rcnn.
        resize_in_training: see faster_rcnn.
        image_mean: see faster_rcnn.
        image_std: see faster_rcnn.
        rpn_proposals_train: see faster_rcnn.
        rpn_proposals_eval: see faster_rcnn.
        roi_batch_size: regions that are sampled for the first stage, an image; the later ones take what it gives them.
        score_threshold: see faster_rcnn; the score is the mean of the stages'.
        nms_threshold: see faster_rcnn.
        detections_per_image: see faster_rcnn.

    Raises:
        ValueError: an argument is out of range or contradicts another.
    """
    check_num_classes(num_classes)
    check_box_head(box_head, box_head_norm)
    if not stage_ious or not all(0 < iou < 1 for iou in stage_ious):
        raise ValueError(f"stage_ious={tuple(stage_ious)} must be one number for each stage, each between 0 and 1")
    if not masks and (mask_head_channels, mask_head_norm) != (256, None):
        raise ValueError(
            f"mask_head_channels={mask_head_channels} and mask_head_norm={mask_head_norm!r} are for the mask head: "
            "give masks=True, or leave them out"
        )
    pyramid = feature_pyramid(backbone, trainable_stages=trainable_stages, fpn_channels=fpn_channels, fpn_norm=fpn_norm)
    channels = pyramid_channels(pyramid)
    anchors = anchor_generator(pyramid, [(size,) for size in anchor_sizes], aspect_ratios)
    num_proposals = {"training": rpn_proposals_train, "testing": rpn_proposals_eval}
    rpn = RegionProposalNetwork(
        anchors,
        make_rpn_head(channels, anchors, rpn_convolutions),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=num_proposals,
        post_nms_top_n=num_proposals,
        nms_thresh=0.7,
    )
    roi_heads = CascadeRoIHeads(
        box_roi_pool=make_region_pool(BOX_REGION_SIZE),
        box_heads=[make_box_head(box_head, channels, box_head_channels, box_head_norm) for _ in stage_ious],
        box_predictors=[ClassAgnosticPredictor(box_head_channels, num_classes) for _ in stage_ious],
        stage_ious=stage_ious,
        roi_batch_size=roi_batch_size,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        detections_per_image=detections_per_image,
        mask_roi_pool=make_region_pool(MASK_REGION_SIZE) if masks else None,
        mask_head=make_mask_head(channels, mask_head_channels, mask_head_norm) if masks else None,
        mask_predictor=make_mask_predictor(mask_head_channels, num_classes) if masks else None,
    )
    transform = GeneralizedRCNNTransform(
        min_size, max_size, list(image_mean), list(image_std), _skip_resize=not resize_in_training
    )
    return CascadeRCNN(pyramid, rpn, roi_heads, transform)


class ClassAgnosticPredictor(nn.Module):
    """The last layers of a stage: a region's class, and one box whatever the class.

    Args:
        in_channels: length of a region's vector.
        num_classes: with the background.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, in_channels) to class logits (R, num_classes) and the box's deltas (R, 4)."""
        return self.cls_score(x), self.bbox_pred(x)


@dataclass(frozen=True, slots=True)
class _Regions:
    """What a stage trains on in one image."""

    boxes: Tensor  # (R, 4) xyxy
    labels: Tensor  # (R,), 0 where the box counts as no object
    objects: Tensor  # (R,), which of the image's objects the box counts as; of no meaning where labels is 0

    def at(self, chosen: Tensor) -> _Regions:
        """Those where `chosen` (R,) is true."""
        return _Regions(self.boxes[chosen], self.labels[chosen], self.objects[chosen])

    def positives(self) -> _Regions:
        """Those that count as an object."""
        return self.at(self.labels > 0)


class CascadeRoIHeads(nn.Module):
    """The stages: each classifies the regions and refines their boxes, which are the regions of the next.

    It stands where torchvision's detectors have RoIHeads. The box coder's weights are (10, 10, 5, 5) times the stage's
    number: the better the boxes are, the smaller what is left to correct, and so it stays of the order of 1.

    Args:
        box_roi_pool: features of the pyramid, boxes and image sizes to features of regions, as MultiScaleRoIAlign.
        box_heads: for each stage, features of regions to a vector a region.
        box_predictors: for each stage, vectors to class logits (R, num_classes) and deltas (R, 4).
        stage_ious: for each stage, the IoU with an object from which a region counts as it.
        roi_batch_size: regions that are sampled in training, an image; at most a quarter of them are objects.
        score_threshold: detections must score higher.
        nms_threshold: of two detections of a class with a larger IoU than this, the weaker is dropped.
        detections_per_image: detections kept, an image.
        mask_roi_pool: as box_roi_pool, for masks; None for a detector without them.
        mask_head: features of regions to those that the mask predictor takes.
        mask_predictor: features of regions to mask logits (R, num_classes, side, side).

    Attributes:
        score_thresh, nms_thresh, detections_per_img: as of torchvision's RoIHeads; may be changed.
    """

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[nn.Module],
        *,
        stage_ious: Sequence[float],
        roi_batch_size: int,
        score_threshold: float,
        nms_threshold: float,
        detections_per_image: int,
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_stages = len(stage_ious)
        self.box_roi_pool = box_roi_pool
        self.box_head = nn.ModuleList(box_heads)
        self.box_predictor = nn.ModuleList(box_predictors)
        self.box_coders = [
            BoxCoder((10.0 * stage, 10.0 * stage, 5.0 * stage, 5.0 * stage)) for stage in range(1, self.num_stages + 1)
        ]
        self.matchers = [Matcher(iou, iou) for iou in stage_ious]
        self.fg_bg_sampler = BalancedPositiveNegativeSampler(roi_batch_size, _POSITIVE_FRACTION)
        self.score_thresh = score_threshold
        self.nms_thresh = nms_threshold
        self.detections_per_img = detections_per_image
        self.mask_roi_pool = mask_roi_pool
        self.mask_head = mask_head
        self.mask_predictor = mask_predictor

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Losses in training, else detections; all boxes are xyxy in pixels of the images as the pyramid saw them.

        Args:
            features: the pyramid's levels (N, C, H, W).
            proposals: for each image, boxes (P, 4).
            image_shapes: height and width of each image.
            targets: in training, for each image, a dict of `boxes` (G, 4) and `labels` (G,), and for a detector with
                masks `masks` (G, H, W) of 0 and 1.

        Returns:
            In training an empty list and the losses. Otherwise for each image a dict of `boxes` (D, 4), `labels` (D,)
            and `scores` (D,), best first, and with masks `masks` (D, 1, side, side) in [0, 1], as seen within the
            boxes; and no losses.

        Raises:
            ValueError: there are no targets in training, or no masks in them.
        """
        # Under autocast proposals come in 16 bits, and bfloat16 holds whole pixels up to 256 only.
        boxes = [own.to(torch.promote_types(own.dtype, torch.float32)) for own in proposals]
        if self.training:
            return [], self._losses(features, boxes, image_shapes, self._checked(targets))
        return self._detections(features, boxes, image_shapes), {}

    def _losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        losses = {}
        boxes = [torch.cat([own, target["boxes"].to(own)]) for own, target in zip(proposals, targets, strict=True)]
        regions = sampled = self._sample(self._match(boxes, targets, stage=0))
        for stage in range(self.num_stages):
            boxes = [own.boxes for own in regions]
            logits, deltas = self._run_stage(stage, features, boxes, image_shapes)
            classifier_loss, box_loss = self._box_losses(stage, logits, deltas, regions, targets)
            losses[f"loss_classifier_{stage + 1}"] = classifier_loss
            losses[f"loss_box_reg_{stage + 1}"] = box_loss
            if stage + 1 < self.num_stages:
                boxes = self._refine(stage, deltas, boxes, image_shapes)
                regions = self._match([own[_has_area(own)] for own in boxes], targets, stage + 1)
        if self.mask_head is not None:
            losses["loss_mask"] = self._mask_loss(features, sampled, image_shapes, targets)
        return losses

    def _detections(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        scores_of_stages = []
        for stage in range(self.num_stages):
            logits, deltas = self._run_stage(stage, features, boxes, image_shapes)
            scores_of_stages.append(F.softmax(logits, dim=-1))
            boxes = self._refine(stage, deltas, boxes, image_shapes)
        scores = torch.stack(scores_of_stages).mean(dim=0).split(_lengths(boxes))
        detections = [self._strongest(*of_image) for of_image in zip(boxes, scores, strict=True)]
        if self.mask_head is not None:
            logits = self._mask_logits(features, [own["boxes"] for own in detections], image_shapes)
            masks = maskrcnn_inference(logits, [own["labels"] for own in detections])
            for own, masks_of_image in zip(detections, masks, strict=True):
                own["masks"] = masks_of_image
        return detections

    def _run_stage(
        self, stage: int, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Class logits (R, num_classes) and deltas (R, 4) of the regions of all images, in the boxes' precision."""
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        if self.training:
            # The losses of the stages are added up, so the pyramid would learn from boxes several times as fast.
            pooled = _DividedGradient.apply(pooled, self.num_stages)
        logits, deltas = self.box_predictor[stage](self.box_head[stage](pooled))
        return logits.to(boxes[0]), deltas.to(boxes[0])

    def _refine(
        self, stage: int, deltas: Tensor, boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """The boxes moved by the stage's deltas and clipped to their images; as proposals they carry no gradient."""
        moved = self.box_coders[stage].decode_single(deltas.detach(), torch.cat(boxes))
        by_image = moved.split(_lengths(boxes))
        return [clip_boxes_to_image(own, shape) for own, shape in zip(by_image, image_shapes, strict=True)]

    @torch.no_grad()
    def _match(self, boxes: list[Tensor], targets: list[dict[str, Tensor]], stage: int) -> list[_Regions]:
        """Which object each box counts as in this stage: that of the largest IoU, where it is large enough."""
        regions = []
        for own, target in zip(boxes, targets, strict=True):
            true_boxes = target["boxes"].to(own)
            if len(own) and len(true_boxes):
                matches = self.matchers[stage](box_iou(true_boxes, own))
                objects = matches.clamp(min=0)
                labels = target["labels"][objects].to(torch.int64).where(matches >= 0, 0)
            else:
                objects = labels = torch.zeros(len(own), dtype=torch.int64, device=own.device)
            regions.append(_Regions(own, labels, objects))
        return regions

    def _sample(self, regions: list[_Regions]) -> list[_Regions]:
        positive, negative = self.fg_bg_sampler([own.labels for own in regions])
        chosen = ((of_objects | of_none).bool() for of_objects, of_none in zip(positive, negative, strict=True))
        return [own.at(these) for own, these in zip(regions, chosen, strict=True)]

    def _box_losses(
        self,
        stage: int,
        logits: Tensor,
        deltas: Tensor,
        regions: list[_Regions],
        targets: list[dict[str, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Those of the classes and of the boxes. Without regions they are 0, and so are all gradients."""
        labels = torch.cat([own.labels for own in regions])
        positives = [own.positives() for own in regions]
        true_boxes = [target["boxes"][own.objects] for own, target in zip(positives, targets, strict=True)]
        wanted = self.box_coders[stage].encode_single(
            torch.cat(true_boxes).to(deltas), torch.cat([own.boxes for own in positives])
        )
        num_regions = max(1, len(labels))
        classifier_loss = F.cross_entropy(logits, labels, reduction="sum") / num_regions
        box_loss = F.smooth_l1_loss(deltas[labels > 0], wanted, reduction="sum", beta=_SMOOTH_L1_BETA) / num_regions
        return classifier_loss, box_loss

    def _mask_loss(
        self,
        features: Mapping[str, Tensor],
        regions: list[_Regions],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        """Of the regions that count as objects. The head runs without any too: its parameters need a gradient."""
        positives = [own.positives() for own in regions]
        boxes = [own.boxes for own in positives]
        return maskrcnn_loss(
            self._mask_logits(features, boxes, image_shapes),
            boxes,
            [target["masks"] for target in targets],
            [target["labels"] for target in targets],
            [own.objects for own in positives],
        )

    def _mask_logits(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        assert self.mask_roi_pool is not None
        assert self.mask_head is not None
        assert self.mask_predictor is not None
        pooled = self.mask_roi_pool(features, boxes, image_shapes)
        return self.mask_predictor(self.mask_head(pooled)).to(boxes[0])

    def _strongest(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """The detections of one image: (R, 4) boxes and (R, num_classes) scores, thresholded and suppressed."""
        region, column = torch.where(scores[:, 1:] > self.score_thresh)
        boxes, scores, labels = boxes[region], scores[region, column + 1], column + 1
        keep = remove_small_boxes(boxes, _MIN_SIDE)
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": boxes[keep], "labels": labels[keep], "scores": scores[keep]}

    def _checked(self, targets: list[dict[str, Tensor]] | None) -> list[dict[str, Tensor]]:
        """The targets, if training can begin with them."""
        if targets is None:
            raise ValueError("targets is None, and training needs them: a dict of boxes and labels for each image")
        for index, target in enumerate(targets):
            if self.mask_head is not None and "masks" not in target:
                raise ValueError(
                    f"targets[{index}] has {', '.join(target)} and no masks: give masks (G, H, W) of 0 and 1, or build "
                    "the detector with masks=False"
                )
        return targets


def _lengths(tensors: Sequence[Tensor]) -> list[int]:
    """How many rows each has; not by `len`, which would be a constant in a traced model."""
    return [own.shape[0] for own in tensors]


def _has_area(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(dim=1)


class _DividedGradient(torch.autograd.Function):
    """The identity, whose gradient is divided by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.divisor, None
