"""Suppression and weighted boxes fusion, beside torchvision, beside plain loops, and beside the authors' package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

import resnest_det.evaluation.box_fusion as box_fusion
from resnest_det.evaluation import non_maximum_suppression, weighted_boxes_fusion

Found = dict[str, Tensor]


def random_detections(seed: int, count: int = 60, *, num_classes: int = 3, ties: bool = False) -> Found:
    """Boxes around a few centres, so that many overlap, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(6, 2, generator=torch.Generator().manual_seed(7)) * 0.6 + 0.2
    middle = centres[torch.randint(6, (count,), generator=generator)]
    middle = middle + 0.03 * torch.randn(count, 2, generator=generator)
    half = 0.05 + 0.06 * torch.rand(count, 2, generator=generator)
    scores = torch.rand(count, generator=generator) * 0.98 + 0.01
    return {
        "boxes": torch.cat([middle - half, middle + half], dim=1).clamp(0, 1).double(),
        "labels": torch.randint(1, num_classes + 1, (count,), generator=generator),
        "scores": (scores.mul(5).ceil().div(5) if ties else scores).double(),
    }


def found(*objects: tuple[Sequence[float], int, float]) -> Found:
    """Detections from (box, label, score)."""
    boxes, labels, scores = zip(*objects, strict=True) if objects else ((), (), ())
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


def plain_overlap(one: Sequence[float], other: Sequence[float], kind: str) -> float:
    """Of the lower-scored with the other."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)]
    return width * height / (areas[0] if kind == "ios" else sum(areas) - width * height)


def plain_suppression(given: Found, threshold: float, kind: str) -> list[int]:
    boxes, labels, scores = (given[key].tolist() for key in ("boxes", "labels", "scores"))
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(labels[i] != labels[k] or plain_overlap(boxes[i], boxes[k], kind) <= threshold for k in kept):
            kept.append(i)
    return kept


def plain_fusion(passes: Sequence[Found], threshold: float) -> list[tuple[float, int, list[float]]]:
    """The algorithm as section 3 of the paper lists it, in loops over lists; (score, label, box), best first."""
    everything = [
        (score, label, box)
        for one in passes
        for box, label, score in zip(*(one[key].tolist() for key in ("boxes", "labels", "scores")), strict=True)
    ]
    clusters: list[list[tuple[float, int, list[float]]]] = []
    fused: list[tuple[float, int, list[float]]] = []
    for score, label, box in sorted(everything, key=lambda one: -one[0]):
        best, best_overlap = -1, threshold
        for position, (_, fused_label, fused_box) in enumerate(fused):
            overlap = plain_overlap(box, fused_box, "iou")
            if label == fused_label and overlap > best_overlap:
                best, best_overlap = position, overlap
        if best < 0:
            clusters.append([(score, label, box)])
            fused.append((score, label, box))
            continue
        clusters[best].append((score, label, box))
        total = sum(member[0] for member in clusters[best])
        mean = [sum(member[0] * member[2][side] for member in clusters[best]) / total for side in range(4)]
        fused[best] = (total / len(clusters[best]), label, mean)
    results = [
        (score * min(len(members), len(passes)) / len(passes), label, box)
        for (score, label, box), members in zip(fused, clusters, strict=True)
    ]
    return sorted(results, key=lambda one: -one[0])


def as_rows(result: Found) -> Tensor:
    """(N, 6), in an order that does not depend on ties."""
    rows = torch.cat([result["scores"][:, None], result["labels"][:, None], result["boxes"]], dim=1).double()
    return rows[sorted(range(len(rows)), key=lambda i: [round(value, 9) for value in rows[i].tolist()])]


# --- suppression ---


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [False, True])
def test_suppression_equals_torchvisions(seed: int, threshold: float, ties: bool) -> None:
    given = random_detections(seed, 200, ties=ties)
    kept = non_maximum_suppression(given["boxes"], given["scores"], given["labels"], threshold=threshold)
    expected = batched_nms(given["boxes"], given["scores"], given["labels"], threshold)
    if ties:  # torchvision orders classes of equal scores in its own way
        assert set(kept.tolist()) == set(expected.tolist())
        assert given["scores"][kept].diff().max() <= 0
    else:
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["iou", "ios"])
def test_suppression_equals_a_plain_loop(seed: int, kind: Any) -> None:
    given = random_detections(seed, 120, ties=True)
    kept = non_maximum_suppression(given["boxes"], given["scores"], given["labels"], threshold=0.6, overlap=kind)
    assert kept.tolist() == plain_suppression(given, 0.6, kind)


def slow_suppression(given: Found, threshold: float, kind: str) -> list[int]:
    """Each box beside all lower-scored ones of its class that are left, in float64."""
    boxes, labels = given["boxes"].double().numpy(), given["labels"].numpy()
    order = np.argsort(-given["scores"].double().numpy(), kind="stable")
    kept: set[int] = set()
    for label in np.unique(labels):
        rest = order[labels[order] == label]
        while len(rest):
            best, rest = rest[0], rest[1:]
            kept.add(int(best))
            box, others = boxes[best], boxes[rest]
            sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
            intersections = sides.clip(min=0).prod(axis=1)
            area, areas = (box[2:] - box[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(axis=1)
            whole = areas if kind == "ios" else area + areas - intersections
            overlaps = np.divide(intersections, whole, out=np.zeros_like(intersections), where=intersections > 0)
            rest = rest[overlaps <= threshold]
    return [position for position in order.tolist() if position in kept]


def boxes_of_a_grid(seed: int, kind: str) -> Found:
    """Boxes whose corners and overlaps are often equal, of every extent."""
    generator = torch.Generator().manual_seed(seed)
    corner, size = (torch.randint(end, (90, 2), generator=generator).double() for end in (14, 7))
    boxes = torch.cat([corner, corner + size], dim=1)
    if kind == "tenths":
        boxes = 0.1 * boxes
    elif kind == "float32":
        boxes = (boxes / 3 - 1000).float()
    elif kind == "far apart":
        boxes[:45] += 1e9
        boxes[0] = torch.tensor([-5e8, -5e8, 2e9, 2e9])
    elif kind == "not finite":
        boxes[0, 2], boxes[1, 0], boxes[2, 3] = torch.inf, -torch.inf, torch.nan
    scores = torch.randint(1, 4, (90,), generator=generator).double()
    return {"boxes": boxes, "labels": torch.randint(1, 3, (90,), generator=generator), "scores": scores}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", ["whole", "tenths", "float32", "far apart", "not finite"])
@pytest.mark.parametrize("overlap", ["iou", "ios"])
def test_suppression_compares_near_boxes_alone_and_gives_the_same(overlap: Any, kind: str) -> None:
    for seed in range(20):
        given = boxes_of_a_grid(seed, kind)
        for threshold in (0.0, 0.2, 1 / 3, 0.5, 1.0):
            kept = non_maximum_suppression(
                given["boxes"], given["scores"], given["labels"], threshold=threshold, overlap=overlap
            )
            assert kept.tolist() == slow_suppression(given, threshold, overlap)


def test_a_class_of_many_boxes_is_compared_in_strips() -> None:
    generator = torch.Generator().manual_seed(0)
    corner, size = 4000 * torch.rand(3000, 2, generator=generator), 5 + 40 * torch.rand(3000, 2, generator=generator)
    boxes = torch.cat([corner, corner + size], dim=1).double()
    boxes[-1] = torch.tensor([0.0, 0.0, 4000.0, 4000.0])
    places, starts, ends = box_fusion._near_in_x(boxes.numpy())
    assert len(places) < 3 * len(boxes)
    assert np.median(ends - starts) < len(boxes) / 20
    given = {"boxes": boxes, "labels": torch.ones(3000), "scores": torch.linspace(1, 0, 3000)}
    kept = non_maximum_suppression(given["boxes"], given["scores"], given["labels"], overlap="ios")
    assert kept.tolist() == slow_suppression(given, 0.5, "ios")


def test_a_piece_is_dropped_for_the_whole_and_never_the_whole_for_a_piece() -> None:
    whole_and_piece = found(([0, 0, 40, 40], 1, 0.9), ([0, 0, 40, 10], 1, 0.8), ([0, 0, 40, 10], 2, 0.7))
    boxes, labels, scores = (whole_and_piece[key] for key in ("boxes", "labels", "scores"))
    assert non_maximum_suppression(boxes, scores, labels, overlap="iou").tolist() == [0, 1, 2]
    assert non_maximum_suppression(boxes, scores, labels, overlap="ios").tolist() == [0, 2]
    assert non_maximum_suppression(boxes, 1 - scores, labels, overlap="ios").tolist() == [2, 1, 0]


def test_suppression_of_no_boxes() -> None:
    none = found()
    kept = non_maximum_suppression(none["boxes"], none["scores"], none["labels"])
    assert kept.dtype == torch.int64
    assert kept.tolist() == []


@pytest.mark.parametrize("kind", ["iou", "ios"])
def test_boxes_without_area_overlap_nothing(kind: Any) -> None:
    points = found(([5, 5, 5, 5], 1, 0.9), ([5, 5, 5, 5], 1, 0.8), ([0, 0, 9, 9], 1, 0.7))
    kept = non_maximum_suppression(points["boxes"], points["scores"], points["labels"], overlap=kind)
    assert kept.tolist() == [0, 1, 2]


# --- fusion ---


@pytest.mark.parametrize("num_passes", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [False, True])
def test_fusion_equals_a_plain_loop(seed: int, num_passes: int, ties: bool) -> None:
    passes = [random_detections(10 * seed + number, 30 + number, ties=ties) for number in range(num_passes)]
    result = weighted_boxes_fusion(passes, iou_threshold=0.55)
    expected = plain_fusion(passes, 0.55)
    scores, labels, boxes = (torch.tensor(values, dtype=torch.float64) for values in zip(*expected, strict=True))
    assert len(result["boxes"]) < sum(len(one["boxes"]) for one in passes), "some boxes should fuse"
    assert result["scores"].diff().max() <= 0
    wanted = as_rows({"boxes": boxes, "labels": labels, "scores": scores})
    assert torch.allclose(as_rows(result), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("passes", ["several", "one twice"])
@pytest.mark.parametrize("seed", range(3))
def test_fusion_equals_the_authors(seed: int, passes: str) -> None:
    # Of equal scores theirs takes any order, which decides nothing where the boxes are equal too.
    theirs = pytest.importorskip("ensemble_boxes")
    given = [random_detections(10 * seed + number, 40) for number in range(3)]
    if passes == "one twice":
        given = [given[0], given[0], random_detections(99, 0)]
    boxes, scores, labels = theirs.weighted_boxes_fusion(
        *([one[key].tolist() for one in given] for key in ("boxes", "scores", "labels")), iou_thr=0.55
    )
    expected = {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}
    assert torch.allclose(as_rows(weighted_boxes_fusion(given)), as_rows(expected), rtol=0, atol=1e-6)


def test_a_fused_box_is_the_mean_weighted_by_the_scores() -> None:
    result = weighted_boxes_fusion([found(([0, 0, 10, 10], 1, 0.9)), found(([2, 0, 12, 10], 1, 0.3))])
    assert result["boxes"].tolist() == [pytest.approx([0.5, 0, 10.5, 10])]
    assert result["scores"].tolist() == pytest.approx([0.6])
    assert result["labels"].tolist() == [1]


def test_what_one_pass_alone_found_counts_less_and_more_boxes_than_passes_count_no_more() -> None:
    alone, twice = found(([0, 0, 10, 10], 1, 0.9)), found(([50, 50, 60, 60], 1, 0.6), ([50, 50, 60, 60], 1, 0.6))
    result = weighted_boxes_fusion([found(*[([0, 0, 10, 10], 1, 0.9)], ([50, 50, 60, 60], 1, 0.6)), twice])
    assert result["scores"].tolist() == pytest.approx([0.6, 0.45])  # three boxes of two passes, one of two
    assert weighted_boxes_fusion([alone, found(), found()])["scores"].tolist() == pytest.approx([0.3])


def test_classes_are_not_fused_with_each_other() -> None:
    result = weighted_boxes_fusion([found(([0, 0, 10, 10], 1, 0.9)), found(([0, 0, 10, 10], 2, 0.8))])
    assert sorted(result["labels"].tolist()) == [1, 2]


def test_one_pass_without_overlaps_comes_back_to_the_last_bit() -> None:
    given = found(([0.1, 0.2, 7.3, 9.9], 3, 0.7), ([50.3, 50.7, 60.1, 66.6], 1, 0.3))
    result = weighted_boxes_fusion([given])
    for key, values in given.items():
        assert result[key].dtype == values.dtype
        assert torch.equal(result[key], values)


def test_fusion_of_no_boxes() -> None:
    result = weighted_boxes_fusion([found(), found()])
    assert {key: tuple(values.shape) for key, values in result.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "scores": (0,),
    }
    assert result["labels"].dtype == torch.int64


def test_scores_of_0_and_boxes_without_area() -> None:
    given = found(([0, 0, 10, 10], 1, 0.0), ([0, 0, 10, 11], 1, 0.0), ([5, 5, 5, 5], 1, 0.4))
    result = weighted_boxes_fusion([given, found()])
    assert result["scores"].tolist() == pytest.approx([0.2, 0.0])
    assert result["boxes"].tolist() == [[5, 5, 5, 5], [0, 0, 10, 10]]


# --- mistakes ---


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_wrong_thresholds(threshold: float) -> None:
    none = found()
    with pytest.raises(ValueError, match=rf"threshold={threshold} must be from 0 to 1"):
        non_maximum_suppression(none["boxes"], none["scores"], none["labels"], threshold=threshold)
    with pytest.raises(ValueError, match=rf"iou_threshold={threshold} must be from 0 to 1"):
        weighted_boxes_fusion([none], iou_threshold=threshold)


def test_an_unknown_overlap() -> None:
    none = found()
    with pytest.raises(ValueError, match="overlap='iom' must be 'iou' or 'ios'"):
        non_maximum_suppression(none["boxes"], none["scores"], none["labels"], overlap="iom")  # type: ignore[arg-type]


def test_no_passes() -> None:
    with pytest.raises(ValueError, match="detections is empty; give the detections of at least one pass"):
        weighted_boxes_fusion([])


def test_masks_cannot_be_fused() -> None:
    masks = {**found(([0, 0, 4, 4], 1, 0.5)), "masks": torch.zeros(1, 1, 8, 8)}
    with pytest.raises(ValueError, match="detections hold masks, and weighted boxes fusion makes new boxes"):
        weighted_boxes_fusion([masks])
