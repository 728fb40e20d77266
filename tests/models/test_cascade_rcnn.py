"""Cascade R-CNN: a slow implementation of it, torchvision's heads where it has one stage, and hand-made regressors."""

from __future__ import annotations

import math
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_iou, nms, roi_align

from resnest_det import create_backbone
from resnest_det.data import CocoDetection
from resnest_det.data.sample import write_sample_dataset
from resnest_det.models import RowRoIAlign
from resnest_det.models.cascade_rcnn import CascadeRoIHeads, ClassAgnosticPredictor, cascade_rcnn

SMALL = {
    "min_size": 64,
    "max_size": 96,
    "fpn_channels": 32,
    "box_head_channels": 32,
    "roi_batch_size": 32,
    "rpn_proposals_eval": 50,
}

CHANNELS = 8  # of the small heads' features
NUM_CLASSES = 4
BATCH_SHAPE = (128, 160)
IMAGE_SHAPES = [(128, 150), (110, 160)]


def small_heads(
    *, stage_ious: tuple[float, ...] = (0.5, 0.6, 0.7), masks: bool = False, roi_batch_size: int = 24
) -> CascadeRoIHeads:
    """Heads with random weights, under which boxes move by some pixels in each stage."""
    torch.manual_seed(0)
    predictors = [ClassAgnosticPredictor(16, NUM_CLASSES) for _ in stage_ious]
    for predictor in predictors:
        nn.init.normal_(predictor.cls_score.weight, std=2)
        nn.init.normal_(predictor.bbox_pred.weight, std=1)
    return CascadeRoIHeads(
        MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        [TwoMLPHead(CHANNELS * 7**2, 16) for _ in stage_ious],
        predictors,
        stage_ious=stage_ious,
        roi_batch_size=roi_batch_size,
        score_threshold=0.2,
        nms_threshold=0.5,
        detections_per_image=20,
        mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2) if masks else None,
        mask_head=MaskRCNNHeads(CHANNELS, [CHANNELS], 1) if masks else None,
        mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, NUM_CLASSES) if masks else None,
    )


def random_features() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    height, width = BATCH_SHAPE
    return {
        str(level): torch.randn(2, CHANNELS, height // stride, width // stride, generator=generator).requires_grad_()
        for level, stride in enumerate((4, 8, 16, 32))
    }


def random_boxes(count: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Boxes of 12 to 60 pixels a side inside an image."""
    sides = 12 + 48 * torch.rand(count, 2, generator=generator)
    corners = torch.rand(count, 2, generator=generator) * (torch.tensor([shape[1], shape[0]]) - sides)
    return torch.cat([corners, corners + sides], dim=1)


def random_scene(num_objects: tuple[int, int] = (3, 2)) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Proposals near the objects and elsewhere, and the targets."""
    generator = torch.Generator().manual_seed(2)
    proposals, targets = [], []
    for count, shape in zip(num_objects, IMAGE_SHAPES, strict=True):
        boxes = random_boxes(count, shape, generator)
        near = boxes.repeat(8, 1) + 4 * torch.randn(8 * count, 4, generator=generator)
        bounds = torch.tensor([shape[1], shape[0]] * 2)
        proposals.append(torch.cat([near.clamp(min=0).minimum(bounds), random_boxes(12, shape, generator)]))
        targets.append(
            {
                "boxes": boxes,
                "labels": torch.randint(1, NUM_CLASSES, (count,), generator=generator),
                "masks": (torch.rand(count, *BATCH_SHAPE, generator=generator) < 0.5).to(torch.uint8),
            }
        )
    return proposals, targets


# ---------------------------------------------------------------------- the slow implementation, a box at a time


def slow_iou(a: Tensor, b: Tensor) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = float(max(width, 0) * max(height, 0))
    return common / (float((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])) - common)


def slow_counts_as(box: Tensor, target: dict[str, Tensor], iou: float) -> int | None:
    """Index of the object, or None for background."""
    overlaps = [slow_iou(box, true_box) for true_box in target["boxes"]]
    best = max(range(len(overlaps)), key=overlaps.__getitem__, default=None)
    return best if best is not None and overlaps[best] >= iou else None


def slow_sample(objects: list[int | None], size: int) -> list[int]:
    """Indices of the sampled boxes; draws as torchvision's sampler does."""
    positive = [index for index, matched in enumerate(objects) if matched is not None]
    negative = [index for index, matched in enumerate(objects) if matched is None]
    num_positive = min(len(positive), size // 4)
    num_negative = min(len(negative), size - num_positive)
    chosen = [positive[place] for place in torch.randperm(len(positive))[:num_positive]]
    return sorted(chosen + [negative[place] for place in torch.randperm(len(negative))[:num_negative]])


def slow_pool(features: dict[str, Tensor], image: int, box: Tensor, size: int) -> Tensor:
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    level = min(5, max(2, math.floor(4 + math.log2(side / 224 + 1e-9))))
    feature = features[str(level - 2)][image : image + 1]
    return roi_align(feature, [box[None]], size, spatial_scale=2.0**-level, sampling_ratio=2)


def slow_deltas(box: Tensor, true_box: Tensor, stage: int) -> Tensor:
    (width, height), (true_width, true_height) = ((b[2:] - b[:2]).tolist() for b in (box, true_box))
    shift_x, shift_y = ((true_box[:2] + true_box[2:]) / 2 - (box[:2] + box[2:]) / 2).tolist()
    return stage * torch.tensor(
        [
            10 * shift_x / width,
            10 * shift_y / height,
            5 * math.log(true_width / width),
            5 * math.log(true_height / height),
        ]
    )


def slow_move(box: Tensor, deltas: Tensor, stage: int, shape: tuple[int, int]) -> Tensor:
    dx, dy, dw, dh = (deltas / stage / torch.tensor([10, 10, 5, 5])).tolist()
    width, height = (box[2:] - box[:2]).tolist()
    x, y = ((box[:2] + box[2:]) / 2).tolist()
    x, y, width, height = x + dx * width, y + dy * height, width * math.exp(dw), height * math.exp(dh)
    moved = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return moved.clamp(min=0).minimum(torch.tensor([shape[1], shape[0]] * 2))


def slow_stage(heads: CascadeRoIHeads, stage: int, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits and deltas of one region; stages count from 1."""
    logits, deltas = heads.box_predictor[stage - 1](heads.box_head[stage - 1](pooled))
    return logits[0], deltas[0]


def slow_losses(
    heads: CascadeRoIHeads,
    stage_ious: tuple[float, ...],
    features: dict[str, Tensor],
    proposals: list[Tensor],
    targets: list[dict[str, Tensor]],
) -> tuple[dict[str, Tensor], list[int]]:
    """The losses, and how many regions count as objects in each stage."""
    regions = []  # pairs of an image and a box
    mask_losses = []
    for image, (own, target) in enumerate(zip(proposals, targets, strict=True)):
        boxes = [*own, *target["boxes"]]
        objects = [slow_counts_as(box, target, stage_ious[0]) for box in boxes]
        for index in slow_sample(objects, heads.fg_bg_sampler.batch_size_per_image):
            regions.append((image, boxes[index]))
            if heads.mask_head is not None and objects[index] is not None:
                pooled = slow_pool(features, image, boxes[index], 14)
                mask = target["masks"][objects[index]][None, None].float()
                wanted = roi_align(mask, [boxes[index][None]], 28, spatial_scale=1.0)[0, 0]
                logits = heads.mask_predictor(heads.mask_head(pooled))[0, target["labels"][objects[index]]]
                mask_losses.append(F.binary_cross_entropy_with_logits(logits, wanted))
    losses, num_positive = {}, []
    for stage, iou in enumerate(stage_ious, start=1):
        classifier_losses, box_losses, refined = [], [torch.zeros(())], []
        for image, box in regions:
            logits, deltas = slow_stage(heads, stage, slow_pool(features, image, box, 7))
            matched = slow_counts_as(box, targets[image], iou)
            label = 0 if matched is None else int(targets[image]["labels"][matched])
            classifier_losses.append(-logits.log_softmax(0)[label])
            if matched is not None:
                error = (deltas - slow_deltas(box, targets[image]["boxes"][matched], stage)).abs()
                box_losses += [e - 1 / 18 if e > 1 / 9 else e**2 * 9 / 2 for e in error]
            moved = slow_move(box, deltas.detach(), stage, IMAGE_SHAPES[image])
            if moved[2] > moved[0] and moved[3] > moved[1]:
                refined.append((image, moved))
        num_positive.append(len(box_losses) // 4)
        losses[f"loss_classifier_{stage}"] = torch.stack(classifier_losses).sum() / len(regions)
        losses[f"loss_box_reg_{stage}"] = torch.stack(box_losses).sum() / len(regions)
        regions = refined
    if mask_losses:
        losses["loss_mask"] = torch.stack(mask_losses).mean()
    return losses, num_positive


def slow_detections(heads: CascadeRoIHeads, features: dict[str, Tensor], proposals: list[Tensor]) -> list[dict]:
    detections = []
    for image, own in enumerate(proposals):
        found = []  # (score, label, box)
        for box in own:
            scores = []
            for stage in range(1, heads.num_stages + 1):
                logits, deltas = slow_stage(heads, stage, slow_pool(features, image, box, 7))
                scores.append(logits.softmax(0))
                box = slow_move(box, deltas, stage, IMAGE_SHAPES[image])
            mean = sum(scores) / len(scores)
            found += [
                (float(mean[label]), label, box)
                for label in range(1, NUM_CLASSES)
                if mean[label] > heads.score_thresh and min(box[2:] - box[:2]) >= 0.01
            ]
        kept = []
        for label in range(1, NUM_CLASSES):
            of_class = [entry for entry in found if entry[1] == label]
            if of_class:
                boxes = torch.stack([box for _, _, box in of_class])
                kept += [of_class[k] for k in nms(boxes, torch.tensor([s for s, _, _ in of_class]), heads.nms_thresh)]
        kept = sorted(kept, key=lambda entry: -entry[0])[: heads.detections_per_img]
        detection: dict[str, Any] = {
            "boxes": torch.stack([box for _, _, box in kept]),
            "labels": torch.tensor([label for _, label, _ in kept]),
            "scores": torch.tensor([score for score, _, _ in kept]),
        }
        if heads.mask_head is not None:
            detection["masks"] = torch.stack(
                [
                    heads.mask_predictor(heads.mask_head(slow_pool(features, image, box, 14)))[0, label, None].sigmoid()
                    for _, label, box in kept
                ]
            )
        detections.append(detection)
    return detections


@pytest.mark.parametrize("num_objects", [(3, 2), (0, 2)], ids=["objects", "an image without"])
@pytest.mark.parametrize("masks", [False, True])
def test_training_equals_a_slow_implementation(masks: bool, num_objects: tuple[int, int]) -> None:
    stage_ious = (0.5, 0.6, 0.7)
    heads, features = small_heads(stage_ious=stage_ious, masks=masks).train(), random_features()
    proposals, targets = random_scene(num_objects)
    torch.manual_seed(3)  # the regions are sampled at random
    detections, losses = heads(features, proposals, IMAGE_SHAPES, targets)
    assert detections == []
    torch.manual_seed(3)
    expected, num_positive = slow_losses(heads, stage_ious, features, proposals, targets)
    assert len(set(num_positive)) == 3
    assert min(num_positive) > 0
    assert list(losses) == list(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    parameters, levels = list(heads.parameters()), list(features.values())
    sum(losses.values()).backward()
    weight_gradients = torch.autograd.grad(sum(expected.values()), parameters, retain_graph=True)
    from_boxes = sum(loss for name, loss in expected.items() if name != "loss_mask") / heads.num_stages
    feature_gradients = torch.autograd.grad(from_boxes + expected.get("loss_mask", 0), levels, allow_unused=True)
    for tensor, gradient in zip(parameters + levels, weight_gradients + feature_gradients, strict=True):
        torch.testing.assert_close(
            tensor.grad, torch.zeros_like(tensor) if gradient is None else gradient, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("masks", [False, True])
def test_inference_equals_a_slow_implementation(masks: bool) -> None:
    heads, features = small_heads(masks=masks).eval(), random_features()
    proposals, _ = random_scene()
    with torch.inference_mode():
        detections, losses = heads(features, proposals, IMAGE_SHAPES)
        expected = slow_detections(heads, features, proposals)
    assert losses == {}
    for found, slow in zip(detections, expected, strict=True):
        assert list(found) == list(slow)
        assert 5 < len(found["boxes"]) <= 20
        assert len(set(found["labels"].tolist())) > 1
        for key in slow:
            torch.testing.assert_close(found[key], slow[key], rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------------------- torchvision's, of one stage


class PerClass(nn.Module):
    """A class-agnostic predictor in the form of torchvision's: the same box for every class."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = self.predictor(x)
        return logits, deltas.repeat(1, NUM_CLASSES)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("iou", [0.5, 0.7])
def test_one_stage_is_torchvisions(iou: float, masks: bool) -> None:
    ours, features = small_heads(stage_ious=(iou,), masks=masks), random_features()
    theirs = RoIHeads(
        ours.box_roi_pool,
        ours.box_head[0],
        PerClass(ours.box_predictor[0]),
        *(iou, iou, 24, 0.25, None, 0.2, 0.5, 20),
        *((ours.mask_roi_pool, ours.mask_head, ours.mask_predictor) if masks else ()),
    )
    proposals, targets = random_scene()
    for training in (True, False):
        results = []
        for heads in (ours.train(training), theirs.train(training)):
            torch.manual_seed(3)
            results.append(heads(features, list(proposals), IMAGE_SHAPES, targets if training else None))
        (detections, losses), (their_detections, their_losses) = results
        assert {name.removesuffix("_1") for name in losses} == set(their_losses)
        for name, loss in losses.items():
            torch.testing.assert_close(loss, their_losses[name.removesuffix("_1")])
        assert training or all(len(found["boxes"]) > 5 for found in detections)
        for found, their in zip(detections, their_detections, strict=True):
            assert sorted(found) == sorted(their)
            for key in found:
                torch.testing.assert_close(found[key], their[key])


def test_masks_and_proposals_are_those_of_torchvision() -> None:
    with torch.device("meta"):
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        ours = cascade_rcnn(create_backbone("resnet50"), 91, masks=True)
    shapes = [
        {key: value.shape for key, value in model.state_dict().items() if not key.startswith("roi_heads.box")}
        for model in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    for name in (
        "anchor_generator.sizes",
        "anchor_generator.aspect_ratios",
        "box_coder.weights",
        "proposal_matcher.high_threshold",
        "proposal_matcher.low_threshold",
        "proposal_matcher.allow_low_quality_matches",
        "fg_bg_sampler.batch_size_per_image",
        "fg_bg_sampler.positive_fraction",
        "nms_thresh",
        "score_thresh",
        "_pre_nms_top_n",
        "_post_nms_top_n",
    ):
        assert attrgetter(name)(ours.rpn) == attrgetter(name)(theirs.rpn), name
    for name in (
        "fg_bg_sampler.batch_size_per_image",
        "fg_bg_sampler.positive_fraction",
        "score_thresh",
        "nms_thresh",
        "detections_per_img",
    ):
        assert attrgetter(name)(ours.roi_heads) == attrgetter(name)(theirs.roi_heads), name
    assert repr(ours.transform) == repr(theirs.transform)
    for name in ("box_roi_pool", "mask_roi_pool"):
        assert isinstance(getattr(ours.roi_heads, name), RowRoIAlign)
        assert vars(getattr(ours.roi_heads, name)) == vars(getattr(theirs.roi_heads, name))


# ------------------------------------------------------------------------------------- heads whose outputs are known


def known_heads(deltas: list[list[float]], scores: list[list[float]], **arguments: Any) -> CascadeRoIHeads:
    """Heads that answer every region with the same: for each stage, deltas (4) and the classes' scores."""
    stage_ious = arguments.pop("stage_ious", (0.5, 0.6, 0.7)[: len(deltas)])
    heads = small_heads(stage_ious=stage_ious, **arguments)
    for predictor, own_deltas, own_scores in zip(heads.box_predictor, deltas, scores, strict=True):
        predictor.cls_score = nn.Linear(16, len(own_scores))
        for layer, outputs in (
            (predictor.cls_score, torch.tensor(own_scores).log()),
            (predictor.bbox_pred, own_deltas),
        ):
            nn.init.zeros_(layer.weight)
            layer.bias.data.copy_(torch.as_tensor(outputs))
    return heads


def features_of(height: int, width: int, num_images: int = 1) -> dict[str, Tensor]:
    return {
        str(level): torch.ones(num_images, CHANNELS, height // stride, width // stride)
        for level, stride in enumerate((4, 8, 16, 32))
    }


@pytest.mark.parametrize(
    ("stage_ious", "num_background"),
    [((0.5, 0.6, 0.7), [1, 3, 4]), ((0.7, 0.5), [4, 1]), ((0.51, 0.8, 0.5, 0.6), [2, 5, 1, 3])],
)
def test_each_stage_has_its_threshold(stage_ious: tuple[float, ...], num_background: list[int]) -> None:
    stays, background = [0.0] * 4, math.exp(-10)
    scores = [background, 1 - background]  # a region that counts as background costs 10
    heads = known_heads([stays] * len(stage_ious), [scores] * len(stage_ious), stage_ious=stage_ious).train()
    target = {"boxes": torch.tensor([[0.0, 0, 100, 100]]), "labels": torch.tensor([1])}
    widths = [50.0, 55, 65, 75]  # of 100: the IoUs; the object itself is added
    proposals = torch.tensor([[0.0, 0, width, 100] for width in widths] + [[100.0, 100, 120, 120]])
    _, losses = heads(features_of(128, 128), [proposals], [(128, 128)], [target])
    costs = [losses[f"loss_classifier_{stage}"].item() for stage in range(1, len(stage_ious) + 1)]
    assert costs == pytest.approx([10 * number / 6 for number in num_background], abs=1e-3)


def test_boxes_move_through_the_stages_and_scores_are_averaged() -> None:
    right = [10 * 0.1, 0, 0, 0]  # by a tenth of the width; the second stage's coder weighs twice, the third's thrice
    down = [0, 20 * 0.1, 0, 0]
    wider = [0, 0, 15 * math.log(2), 0]
    heads = known_heads([right, down, wider], [[0.2, 0.8], [0.4, 0.6], [0.9, 0.1]]).eval()
    proposal = torch.tensor([[40.0, 40, 60, 80]])
    (found,), _ = heads(features_of(128, 128), [proposal], [(128, 128)])
    torch.testing.assert_close(found["boxes"], torch.tensor([[32.0, 44, 72, 84]]))
    torch.testing.assert_close(found["scores"], torch.tensor([0.5]))
    assert found["labels"].tolist() == [1]


def test_boxes_are_clipped_between_the_stages() -> None:
    right, wider, stays = [10 * 0.5, 0, 0, 0], [0, 0, 10 * math.log(2), 0], [0.0] * 4
    heads = known_heads([right, wider, stays], [[0.1, 0.9]] * 3).eval()
    # To 90..110, clipped to 90..100; then twice as wide, 85..105, clipped to 85..100.
    (found,), _ = heads(features_of(128, 128), [torch.tensor([[80.0, 10, 100, 30]])], [(128, 100)])
    torch.testing.assert_close(found["boxes"], torch.tensor([[85.0, 10, 100, 30]]))


def test_boxes_without_area_are_dropped_in_training() -> None:
    away, stays = [10 * 2.0, 0, 0, 0], [0.0] * 4  # two widths to the right
    heads = known_heads([away, stays, stays], [[0.5, 0.5]] * 3, masks=True).train()
    targets = [
        {"boxes": torch.tensor([box]), "labels": torch.tensor([1]), "masks": torch.ones(1, 128, 256, dtype=torch.uint8)}
        for box in ([10.0, 10, 50, 50], [100.0, 10, 140, 50])
    ]
    shapes = [(128, 60), (128, 256)]  # the first image's box leaves it, the second's does not
    proposals = [target["boxes"] for target in targets]
    seen: list[list[int]] = []
    heads.box_roi_pool.register_forward_pre_hook(lambda _, inputs: seen.append([len(own) for own in inputs[1]]))
    features = features_of(128, 256, num_images=2)
    heads(features, proposals, shapes, targets)
    assert seen == [[2, 2], [0, 2], [0, 2]]

    del seen[:]
    first = {key: level[:1] for key, level in features.items()}
    _, losses = heads(first, proposals[:1], shapes[:1], targets[:1])
    assert seen == [[2], [0], [0]]
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(losses[f"loss_{kind}_{stage}"] == 0 for kind in ("classifier", "box_reg") for stage in (2, 3))
    sum(losses.values()).backward()
    assert [key for key, p in heads.named_parameters() if p.grad is None] == []
    (found,), _ = heads.eval()(first, proposals[:1], shapes[:1])
    assert len(found["boxes"]) == 0


def test_16_bit_proposals_do_not_round_boxes() -> None:
    right, stays = [10 / 128, 0, 0, 0], [0.0] * 4
    heads = known_heads([right, stays, stays], [[0.25, 0.75]] * 3)
    proposal = torch.tensor([[512.0, 512, 640, 640]], dtype=torch.bfloat16)  # which has steps of 4 pixels there
    target = {"boxes": torch.tensor([[513.0, 512, 641, 640]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = heads.train()(features_of(1024, 1024), [proposal], [(1024, 1024)], [target])
        (found,), _ = heads.eval()(features_of(1024, 1024), [proposal], [(1024, 1024)])
    torch.testing.assert_close(found["boxes"], torch.tensor([[513.0, 512, 641, 640]]))
    torch.testing.assert_close(found["scores"], torch.tensor([0.75]), rtol=1e-2, atol=0)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    # Of the two regions, the proposal is moved onto the object; the object itself is moved as far beyond it.
    assert losses["loss_box_reg_1"].item() == pytest.approx((10 / 128) ** 2 * 9 / 2 / 2)


@pytest.mark.parametrize("num_proposals", [(0, 3), (0, 0)])
def test_no_proposals_in_inference(num_proposals: tuple[int, int]) -> None:
    heads, features = small_heads(masks=True).eval(), random_features()
    proposals = [own[:count] for own, count in zip(random_scene()[0], num_proposals, strict=True)]
    detections, _ = heads(features, proposals, IMAGE_SHAPES)
    for found, count in zip(detections, num_proposals, strict=True):
        assert (len(found["boxes"]) > 0) == (count > 0)
        assert found["boxes"].shape[1:] == (4,)
        assert found["masks"].shape == (len(found["boxes"]), 1, 28, 28)
        assert len(found["labels"]) == len(found["scores"]) == len(found["boxes"])


# ---------------------------------------------------------------------------------------------- the whole detector


def a_target(*boxes: list[float], height: int = 64, width: int = 64) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.full((len(boxes),), 2, dtype=torch.int64),
        "masks": masks,
    }


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnest14", {}),
        ("resnet18", {"masks": True, "mask_head_channels": 16, "rpn_convolutions": 2}),
        ("resnet18", {"masks": True, "box_head": "4conv1fc", "box_head_norm": "bn", "mask_head_norm": "bn"}),
    ],
    ids=["boxes", "masks", "norms"],
)
def test_trains_and_predicts(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = cascade_rcnn(create_backbone(name), 4, **SMALL, **arguments)
    images = [torch.rand(3, 64, 64), torch.rand(3, 50, 70)]
    losses = model(images, [a_target([8.0, 8, 40, 40]), a_target(height=50, width=70)])
    kinds = ("loss_classifier", "loss_box_reg")
    expected = {f"{kind}_{stage}" for kind in kinds for stage in (1, 2, 3)} | {"loss_objectness", "loss_rpn_box_reg"}
    assert set(losses) == (expected | {"loss_mask"} if "masks" in arguments else expected)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    # A predictor of one box a region learns from every object; of masks, the class that was there.
    assert [key for key, p in model.roi_heads.named_parameters() if "weight" in key and not p.grad.any()] == []
    with torch.inference_mode():
        model.roi_heads.score_thresh = 0.1
        predictions = model.eval()(images)
    for image, prediction in zip(images, predictions, strict=True):
        assert prediction["boxes"].shape == (len(prediction["scores"]), 4)
        assert len(prediction["boxes"]) > 0
        assert (prediction["boxes"] >= 0).all()
        assert (prediction["boxes"][:, 2] <= image.shape[2]).all()
        assert ((prediction["labels"] >= 1) & (prediction["labels"] <= 3)).all()
        if "masks" in arguments:
            assert prediction["masks"].shape == (len(prediction["boxes"]), 1, *image.shape[1:])
        else:
            assert "masks" not in prediction


def test_images_without_objects_train_every_parameter() -> None:
    """A process whose images are all empty takes part in every exchange of gradients, and learns no statistics."""
    torch.manual_seed(0)
    norms = {"box_head": "4conv1fc", "box_head_norm": "bn", "mask_head_norm": "bn"}
    model = cascade_rcnn(create_backbone("resnet18"), 4, masks=True, **norms, **SMALL)
    before = {key: value.clone() for key, value in model.roi_heads.mask_head.state_dict().items()}
    losses = model([torch.rand(3, 64, 64)] * 2, [a_target()] * 2)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert [name for name, loss in losses.items() if loss == 0] == [
        *(f"loss_box_reg_{stage}" for stage in (1, 2, 3)),
        "loss_mask",
        "loss_rpn_box_reg",
    ]
    sum(losses.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    after = model.roi_heads.mask_head.state_dict()
    assert [key for key, value in before.items() if "num_batches" not in key and not value.equal(after[key])] == []


def test_bfloat16_autocast() -> None:
    torch.manual_seed(0)
    model = cascade_rcnn(create_backbone("resnet18"), 4, masks=True, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.rand(3, 64, 64)] * 2, [a_target([8.0, 8, 40, 40]), a_target()])
        sum(losses.values()).backward()
        predictions = model.eval()([torch.rand(3, 64, 64)])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert [key for key, p in model.named_parameters() if not torch.isfinite(p.grad).all()] == []
    assert predictions[0]["boxes"].dtype == predictions[0]["scores"].dtype == torch.float32


def test_arguments_arrive() -> None:
    model = cascade_rcnn(
        create_backbone("resnet18"),
        5,
        rpn_convolutions=2,
        stage_ious=(0.4, 0.8),
        masks=True,
        mask_head_channels=24,
        anchor_sizes=(8, 16, 32, 64, 128),
        aspect_ratios=(1.0, 2.0),
        rpn_proposals_train=70,
        rpn_proposals_eval=60,
        roi_batch_size=50,
        score_threshold=0.2,
        nms_threshold=0.4,
        detections_per_image=30,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
        min_size=(96, 128),
        max_size=256,
        resize_in_training=False,
    )
    assert len(model.rpn.head.conv) == 2
    assert [matcher.high_threshold for matcher in model.roi_heads.matchers] == [0.4, 0.8]
    assert [coder.weights for coder in model.roi_heads.box_coders] == [(10, 10, 5, 5), (20, 20, 10, 10)]
    assert len(model.roi_heads.box_head) == len(model.roi_heads.box_predictor) == model.roi_heads.num_stages == 2
    assert model.roi_heads.mask_predictor.mask_fcn_logits.weight.shape[:2] == (5, 24)
    assert model.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))
    assert model.rpn.anchor_generator.aspect_ratios == ((1.0, 2.0),) * 5
    assert model.rpn._pre_nms_top_n == model.rpn._post_nms_top_n == {"training": 70, "testing": 60}
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 50
    assert (model.roi_heads.score_thresh, model.roi_heads.nms_thresh) == (0.2, 0.4)
    assert model.roi_heads.detections_per_img == 30
    assert (model.transform.min_size, model.transform.max_size) == ((96, 128), 256)
    assert (model.transform.image_mean, model.transform.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert model.transform._skip_resize


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 must be 2 or more: the classes and the background"),
        ({"stage_ious": ()}, r"stage_ious=\(\) must be one number for each stage, each between 0 and 1"),
        ({"stage_ious": (0.5, 1.2)}, r"stage_ious=\(0.5, 1.2\) must be one number for each stage"),
        ({"box_head": "1fc"}, "box_head='1fc' must be '2fc' or '4conv1fc'"),
        ({"box_head_norm": "bn"}, "box_head_norm='bn' needs box_head='4conv1fc'"),
        ({"mask_head_norm": "bn"}, "mask_head_norm='bn' are for the mask head: give masks=True, or leave them out"),
        ({"mask_head_channels": 64}, "mask_head_channels=64 and mask_head_norm=None are for the mask head"),
        ({"rpn_convolutions": 0}, "rpn_convolutions=0 must be 1 or more"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cascade_rcnn(create_backbone("resnet18"), **{"num_classes": 3, **arguments})


def test_targets_that_training_needs() -> None:
    heads, (proposals, targets) = small_heads(masks=True).train(), random_scene()
    with pytest.raises(ValueError, match="targets is None, and training needs them"):
        heads(random_features(), proposals, IMAGE_SHAPES)
    del targets[1]["masks"]
    with pytest.raises(ValueError, match=r"targets\[1\] has boxes, labels and no masks: give masks \(G, H, W\)"):
        heads(random_features(), proposals, IMAGE_SHAPES, targets)


@pytest.mark.slow
def test_learns_a_few_images_by_heart(tmp_path: Path) -> None:
    write_sample_dataset(tmp_path / "sample", num_train=3, num_val=1)
    dataset = CocoDetection(
        tmp_path / "sample/train", tmp_path / "sample/annotations/instances_train.json", train=True, masks=True
    )
    images, targets = zip(*((image / 255, target) for image, target in map(dataset.__getitem__, range(3))), strict=True)
    torch.manual_seed(0)
    model = cascade_rcnn(
        create_backbone("resnet18"),
        dataset.num_classes,
        fpn_channels=64,
        fpn_norm="bn",
        box_head_channels=128,
        masks=True,
        mask_head_channels=32,
        anchor_sizes=(10, 20, 40, 80, 160),
        rpn_proposals_train=200,
        rpn_proposals_eval=100,
        roi_batch_size=48,
        min_size=128,
        max_size=192,
    )
    optimizer = torch.optim.AdamW(model.parameters())
    num_steps = 120
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        sum(model(list(images), list(targets)).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        predictions = model.eval()(list(images))
    box_ious, mask_ious = [], []
    for prediction, target in zip(predictions, targets, strict=True):
        assert len(prediction["boxes"]) > 0
        ious = box_iou(target["boxes"], prediction["boxes"])
        ious[target["labels"][:, None] != prediction["labels"]] = 0
        best = ious.max(dim=1)
        box_ious += best.values.tolist()
        for true_mask, mask in zip(target["masks"].bool(), prediction["masks"][best.indices, 0] > 0.5, strict=True):
            mask_ious.append(((true_mask & mask).sum() / (true_mask | mask).sum()).item())
    assert len(box_ious) == len(mask_ious) == 15
    assert min(box_ious) > 0.75
    assert np.mean(box_ious) > 0.88
    assert np.mean(mask_ious) > 0.85
