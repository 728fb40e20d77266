"""Detections of several passes over an image made one: duplicates suppressed, or fused.

Papers: weighted boxes fusion, Solovyev et al., arXiv 1910.13302; suppression by the intersection over the smaller box,
as sliced inference has it, Akyon et al., arXiv 2202.06934.
Reference implementations: torchvision's `batched_nms`, which `non_maximum_suppression` equals by IoU; the authors'
package ensemble-boxes, whose `weighted_boxes_fusion` with its defaults this one equals. Here equal scores keep their
order on every device, boxes are in any unit, sums are float64, and a box without area is kept. By "ios" a box is never
dropped for a smaller one within it, as the package sahi does: on a scene of many sizes that lost large objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Overlap = Literal["iou", "ios"]

_FUSED = ("boxes", "labels", "scores")


def non_maximum_suppression(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, threshold: float = 0.5, overlap: Overlap = "iou"
) -> Tensor:
    """Which detections to keep: of two of a class that overlap by more than `threshold`, the lower-scored is dropped.

    Runs on the CPU, holds no matrix of all pairs and compares only boxes that are near each other in x: tens of
    thousands need megabytes, and seconds where they are small beside the image.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,) of any range. Of equal ones, the first is taken for the higher.
        labels: (N,); boxes of two classes do not see each other.
        threshold: in [0, 1].
        overlap: "iou", the intersection over the union; or "ios", over the box that would be dropped: a piece of an
            object is dropped for the whole, but not the whole for a piece of it that is scored higher.

    Returns:
        int64 (K,), the positions of those kept, highest score first, on the boxes' device.

    Raises:
        ValueError: `threshold` or `overlap` is none of these.
    """
    check_threshold("threshold", threshold)
    if overlap not in ("iou", "ios"):
        raise ValueError(f"overlap={overlap!r} must be 'iou' or 'ios'")
    corners, classes = _float64(boxes), labels.cpu().numpy()
    order = np.argsort(-_float64(scores), kind="stable")
    kept = np.zeros(len(order), dtype=bool)
    for label in np.unique(classes):
        members = order[classes[order] == label]
        kept[members] = _unsuppressed(corners[members], threshold, overlap)
    return torch.from_numpy(order[kept[order]]).to(boxes.device)


def weighted_boxes_fusion(
    detections: Sequence[Mapping[str, Tensor]], *, iou_threshold: float = 0.55
) -> dict[str, Tensor]:
    """Fuse what several passes, or several models, found in one image.

    Highest score first, each box joins that fused box of its class with which its IoU is highest, if it is above
    `iou_threshold`, and else begins a new one. A fused box is the mean of its boxes, weighted by their scores. Its
    score is the mean of theirs, times the number of boxes over that of passes, at most 1: what one of P passes alone
    found falls to 1 / P of its score.

    Args:
        detections: of each pass a dict with "boxes" (M, 4) xyxy, "labels" (M,) and "scores" (M,) in [0, 1], all in
            the pixels of the same image, and of any number of detections.
        iou_threshold: in [0, 1].

    Returns:
        A dict of the same form, best first.

    Raises:
        ValueError: `detections` is empty or holds more than boxes, labels and scores, such as masks; `iou_threshold`
            is out of its range.
    """
    check_threshold("iou_threshold", iou_threshold)
    if not detections:
        raise ValueError("detections is empty; give the detections of at least one pass")
    for found in detections:
        if others := sorted(found.keys() - set(_FUSED)):
            raise ValueError(
                f"detections hold {', '.join(others)}, and weighted boxes fusion makes new boxes, to which only labels "
                f"and scores can follow; merge by NMS, or leave {', '.join(others)} out"
            )
    boxes, labels, scores = (torch.cat([found[key] for found in detections]) for key in _FUSED)
    corners, classes, weights = _float64(boxes), labels.cpu().numpy(), _float64(scores)
    order = np.argsort(-weights, kind="stable")
    fused_boxes, fused_labels, fused_scores = [np.zeros((0, 4))], [classes[:0]], [np.zeros(0)]
    for label in np.unique(classes):
        members = order[classes[order] == label]
        clusters, means, counts = _clusters(corners[members], weights[members], iou_threshold)
        fused_boxes.append(clusters)
        fused_labels.append(np.full(len(clusters), label))
        fused_scores.append(means * np.minimum(counts, len(detections)) / len(detections))
    best_first = np.argsort(-np.concatenate(fused_scores), kind="stable")
    return {
        "boxes": torch.from_numpy(np.concatenate(fused_boxes)[best_first]).to(boxes),
        "labels": torch.from_numpy(np.concatenate(fused_labels)[best_first]).to(labels),
        "scores": torch.from_numpy(np.concatenate(fused_scores)[best_first]).to(scores),
    }


def check_threshold(name: str, threshold: float) -> None:
    """Refuse what is no overlap. Raises ValueError."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"{name}={threshold} must be from 0 to 1: an overlap is a part of an area")


def _unsuppressed(boxes: NDArray[np.float64], threshold: float, overlap: Overlap) -> NDArray[np.bool_]:
    """Which boxes (N, 4) of one class, best first, no better one suppresses: (N,)."""
    places, starts, ends = _near_in_x(boxes)
    kept = np.ones(len(boxes), dtype=bool)
    for best, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if kept[best]:
            rest = places[start:end]
            rest = rest[(rest > best) & kept[rest]]
            kept[rest] = _overlaps(boxes[best], boxes[rest], overlap) <= threshold
    return kept


def _near_in_x(boxes: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Places (P,) of boxes, strip by strip, and of each box the start (N,) and end (N,) of those in its strips.

    Strips go from top to bottom and are as wide as the mean box, so that P is at most a few N. Boxes that meet share
    one, since the number of a strip never falls as x rises, however it is rounded.
    """
    left, right = boxes[:, 0], boxes[:, 2]
    firsts = lasts = np.zeros(len(boxes), dtype=np.int64)
    if len(boxes) and np.isfinite(boxes).all():
        origin = min(left.min(), right.min())
        width = max(np.abs(right - left).mean(), (max(left.max(), right.max()) - origin) / len(boxes))
        if 0 < width < np.inf:
            firsts, lasts = (np.floor((side - origin) / width).astype(np.int64) for side in (left, right))
    counts = (lasts - firsts + 1).clip(min=0)
    places = np.repeat(np.arange(len(boxes)), counts)
    strips = np.arange(len(places)) + np.repeat(firsts - np.cumsum(counts) + counts, counts)
    order = np.argsort(strips, kind="stable")
    strips = strips[order]
    return places[order], np.searchsorted(strips, firsts, "left"), np.searchsorted(strips, lasts, "right")


def _clusters(
    boxes: NDArray[np.float64], scores: NDArray[np.float64], threshold: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """The fused boxes (C, 4) of one class, best first as they come, the mean score (C,) and the number (C,) of each."""
    fused, sums = np.zeros_like(boxes), np.zeros_like(boxes)
    totals, counts = np.zeros(len(boxes)), np.zeros(len(boxes), dtype=np.int64)
    num_clusters = 0
    for box, score in zip(boxes, scores, strict=True):
        overlaps = _overlaps(box, fused[:num_clusters], "iou")
        if num_clusters and overlaps.max() > threshold:
            cluster = int(overlaps.argmax())
        else:
            cluster, num_clusters = num_clusters, num_clusters + 1
            fused[cluster] = box
        sums[cluster] += score * box
        totals[cluster] += score
        counts[cluster] += 1
        if counts[cluster] > 1 and totals[cluster] > 0:  # one box stays as it is, to the last bit
            fused[cluster] = sums[cluster] / totals[cluster]
    return fused[:num_clusters], totals[:num_clusters] / counts[:num_clusters], counts[:num_clusters]


def _overlaps(box: NDArray[np.float64], boxes: NDArray[np.float64], overlap: Overlap) -> NDArray[np.float64]:
    """Of one box (4,) with each of lower-scored ones (N, 4): (N,). Where they do not meet, or have no area, it is 0."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    intersections = sides.clip(min=0).prod(axis=1)
    area, areas = (box[2:] - box[:2]).prod(), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    whole = areas if overlap == "ios" else area + areas - intersections
    return np.divide(intersections, whole, out=np.zeros_like(intersections), where=intersections > 0)


def _float64(values: Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().double().numpy()
