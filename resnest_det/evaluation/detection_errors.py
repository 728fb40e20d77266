"""What keeps a detector's average precision below 1: precision by recall, which classes are confused, kinds of error.

Each function reads the images that CocoMeanAveragePrecision has collected (`metric.images.values()`). Overlaps are
those of pycocotools, and detections are matched to objects as COCOeval does it, so that the average precision here is
that of the metric's own table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from resnest_det.evaluation.image_boxes import ImageBoxes

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]

RECALLS: Numbers = np.linspace(0, 1, 101)  # COCOeval's to the last bit: ten differ from i / 100
LONGEST_NAME = 25  # characters of a class name in a table, so that a row fits 80 columns

# The kinds of wrong detections, and where each stands among them.
WRONG_DETECTIONS = ("classification", "localisation", "both", "duplicate", "background")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(5)
MAIN_ERRORS = (*WRONG_DETECTIONS, "missed")
SPECIAL_ERRORS = ("false positives", "false negatives")


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision by recall of each class at some IoU thresholds, in [0, 1], as COCOeval interpolates it.

    At each recall stands the highest precision at that recall or a higher one, 0 where no recall is as high. A class
    without objects has -1 throughout, as in pycocotools.
    """

    class_names: tuple[str, ...]  # by label
    iou_thresholds: tuple[float, ...]
    recalls: Numbers  # (101,), 0.00, 0.01 … 1.00
    precisions: Numbers  # (IoU thresholds, classes, 101)

    def mean(self) -> Numbers:
        """The mean over the classes that have objects, (IoU thresholds, 101); -1 where none has."""
        present = (self.precisions[0] >= 0).all(axis=1)
        if not present.any():
            return np.full((len(self.iou_thresholds), len(self.recalls)), -1.0)
        return self.precisions[:, present].mean(axis=1)


@dataclass(frozen=True)
class ConfusedPair:
    """How often objects of one class were found as another: `count` times, a `share` in [0, 1] of all its objects."""

    true_name: str
    found_name: str
    count: int
    share: float


@dataclass(frozen=True)
class ConfusionMatrix:
    """What was found where an object is: rows are the objects' classes, columns those of the detections.

    The last row and column are the background: objects without a detection, and detections without an object.
    """

    class_names: tuple[str, ...]  # by label, without the background
    counts: Indices  # (classes + 1, classes + 1)
    score_threshold: float
    iou_threshold: float

    def most_confused(self, limit: int = 20) -> list[ConfusedPair]:
        """The pairs of different classes with the highest counts, at most `limit`; the background is left out."""
        wrong = self.counts[:-1, :-1].copy()
        np.fill_diagonal(wrong, 0)
        highest = np.argsort(-wrong, axis=None, kind="stable")[:limit]
        num_objects = self.counts.sum(axis=1)
        pairs = []
        for true, found in zip(*np.unravel_index(highest, wrong.shape), strict=True):
            count = int(wrong[true, found])
            if count:
                share = count / int(num_objects[true])
                pairs.append(ConfusedPair(self.class_names[true], self.class_names[found], count, share))
        return pairs

    def table(self, limit: int = 20) -> str:
        """What became of the objects, and the most confused pairs as aligned text, 80 columns wide at most."""
        right = int(np.trace(self.counts[:-1, :-1]))
        wrong = int(self.counts[:-1, :-1].sum()) - right
        missed, invented = int(self.counts[:-1, -1].sum()), int(self.counts[-1].sum())
        lines = [
            f"scores from {self.score_threshold:g}, IoU from {self.iou_threshold:g}",
            f"{right + wrong + missed} objects: {right} found, {wrong} found as another class, {missed} missed",
            f"{right + wrong + invented} detections: {invented} of them where no object is",
        ]
        pairs = self.most_confused(limit)
        if pairs:
            width = min(max(len("found as"), *(len(name) for name in self.class_names)), LONGEST_NAME)
            lines += ["", f"{'class':<{width}}  {'found as':<{width}}{'times':>8}  of its objects"]
        for pair in pairs:
            names = f"{_shortened(pair.true_name):<{width}}  {_shortened(pair.found_name):<{width}}"
            lines.append(f"{names}{pair.count:>8}{pair.share:>16.1%}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ImageF1:
    """What became of one image: detections that are right and wrong, objects that were missed, and their F1 score."""

    right: int
    wrong: int
    missed: int

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall, in [0, 1]; 1 of an image without objects and detections."""
        mistakes = self.wrong + self.missed
        return 2 * self.right / (2 * self.right + mistakes) if self.right or mistakes else 1.0


@dataclass(frozen=True)
class ErrorEffect:
    """One kind of error: how often it occurs, and by how much AP rises, in [0, 1], if nothing but it is put right."""

    count: int
    delta_ap: float


@dataclass(frozen=True)
class ErrorBreakdown:
    """What each kind of error costs; `dataclasses.asdict` makes it plain data.

    The effects do not add up to 1 - AP: to put one kind right makes others weigh more.
    """

    AP: float  # at foreground_iou
    foreground_iou: float
    background_iou: float
    masks: bool
    main: dict[str, ErrorEffect]  # by the names of MAIN_ERRORS
    special: dict[str, ErrorEffect]  # by the names of SPECIAL_ERRORS

    def table(self) -> str:
        """The breakdown as aligned text, 80 columns wide at most."""
        meanings = error_meanings(self.foreground_iou, self.background_iou)
        lines = [f"AP of {'masks' if self.masks else 'boxes'} at IoU {self.foreground_iou:g}: {self.AP:.4f}"]
        for effects in (self.main, self.special):
            lines += ["", f"{'error':<16}{'dAP':>8}{'count':>9}"]
            for name, effect in effects.items():
                lines.append(f"{name:<16}{effect.delta_ap:>8.4f}{effect.count:>9}  {meanings[name]}")
        return "\n".join(lines)


def error_meanings(foreground_iou: float, background_iou: float) -> dict[str, str]:
    """What each kind of error is, in a few words, by the names of MAIN_ERRORS and SPECIAL_ERRORS."""
    foreground, background = f"{foreground_iou:g}", f"{background_iou:g}"
    return {
        "classification": f"on an object of another class, IoU from {foreground}",
        "localisation": f"right class, IoU {background} to {foreground}",
        "both": f"another class, IoU {background} to {foreground}",
        "duplicate": "on an object found with a higher score",
        "background": f"on no object, IoU to {background}",
        "missed": "object not found, no detection to correct",
        "false positives": "all detections that are wrong",
        "false negatives": "all objects that are not found",
    }


def precision_recall(
    images: Iterable[ImageBoxes],
    class_names: Mapping[int, str],
    *,
    iou_thresholds: Sequence[float] = (0.5, 0.75),
    max_detections: int = 100,
    masks: bool = False,
) -> PrecisionRecall:
    """Each class's precision by recall: the `precision` array of pycocotools' COCOeval, for objects of all sizes.

    Args:
        images: in the order of their ids, as equal scores rank in the order in which they come.
        class_names: each label's name.
        iou_thresholds: the lowest IoU of a detection with its object, each in (0, 1].
        max_detections: how many detections of a class in an image count, those of highest score.
        masks: compares masks in place of boxes.

    Raises:
        ValueError: a threshold or limit out of its range, no thresholds; a label that is not in `class_names`; masks
            asked for of images that have none.
    """
    if not len(iou_thresholds):
        raise ValueError("iou_thresholds is empty; give at least one IoU in (0, 1], such as 0.5")
    for threshold in iou_thresholds:
        _check_iou("iou_thresholds", threshold)
    overlaps = _find_overlaps(images, class_names, max_detections=max_detections, masks=masks)
    precisions = []
    for threshold in iou_thresholds:
        matched, left_out = overlaps.match(threshold)
        precisions.append(_precisions(overlaps.found_labels, matched >= 0, ~left_out, overlaps.num_objects()))
    return PrecisionRecall(
        class_names=overlaps.class_names,
        iou_thresholds=tuple(float(threshold) for threshold in iou_thresholds),
        recalls=RECALLS.copy(),
        precisions=np.stack(precisions),
    )


def confusion_matrix(
    images: Iterable[ImageBoxes],
    class_names: Mapping[int, str],
    *,
    score_threshold: float = 0.3,
    iou_threshold: float = 0.5,
    masks: bool = False,
) -> ConfusionMatrix:
    """Counts which class was found where an object of which class is.

    Classes play no part in the matching. Of all pairs of a detection and an object in one image whose IoU reaches the
    threshold, the one with the highest IoU is taken, then the next one of which neither is taken yet, and so on. Of
    pairs with the same IoU that with the right class comes first, then that with the higher score, then that which
    stands first in the data. A detection without an object that lies on a crowd of its class, with the threshold's
    share of its area, is left out, and crowds are no objects.

    Args:
        images: the images, in any order.
        class_names: each label's name.
        score_threshold: detections of a lower score are passed over, in [0, 1].
        iou_threshold: the lowest IoU of a pair, in (0, 1].
        masks: compares masks in place of boxes.

    Raises:
        ValueError: a threshold out of its range; a label that is not in `class_names`; masks asked for of images that
            have none.
    """
    _check_score(score_threshold)
    _check_iou("iou_threshold", iou_threshold)
    overlaps = _find_overlaps(images, class_names, min_score=score_threshold, masks=masks)
    candidates = np.flatnonzero(overlaps.pair_is_real & overlaps.reach(iou_threshold))
    order = np.lexsort(
        (
            overlaps.pair_true[candidates],
            overlaps.pair_found[candidates],
            ~overlaps.pair_same_class[candidates],
            -overlaps.pair_ious[candidates],
        )
    )
    matched = overlaps.take_greedily(candidates[order])
    left_out = overlaps.lies_on_crowd(iou_threshold) & (matched < 0)

    num_classes = len(overlaps.class_names)
    rows = np.full(len(matched), num_classes)
    rows[matched >= 0] = overlaps.true_labels[matched[matched >= 0]]
    missed = overlaps.true_labels[overlaps.is_real & ~overlaps.hit(matched)]
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    np.add.at(counts, (rows[~left_out], overlaps.found_labels[~left_out]), 1)
    counts[:-1, -1] = np.bincount(missed, minlength=num_classes)
    return ConfusionMatrix(
        class_names=overlaps.class_names,
        counts=counts,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
    )


def image_f1_scores(
    images: Iterable[ImageBoxes],
    class_names: Mapping[int, str],
    *,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
    masks: bool = False,
) -> list[ImageF1]:
    """How well each image went, to find those that went best and worst.

    Detections take objects of their class as in COCOeval, those of higher score first, and one that lies on a crowd
    without taking an object is left out.

    Args:
        images: the images.
        class_names: each label's name.
        score_threshold: detections of a lower score are passed over, in [0, 1].
        iou_threshold: the lowest IoU of a right detection with its object, in (0, 1].
        masks: compares masks in place of boxes.

    Returns:
        One for each image, in their order.

    Raises:
        ValueError: a threshold out of its range; a label that is not in `class_names`; masks asked for of images that
            have none.
    """
    _check_score(score_threshold)
    _check_iou("iou_threshold", iou_threshold)
    overlaps = _find_overlaps(images, class_names, min_score=score_threshold, masks=masks)
    matched, left_out = overlaps.match(iou_threshold)
    missed = overlaps.is_real & ~overlaps.hit(matched)
    counts = (
        np.bincount(image_indices, minlength=overlaps.num_images).tolist()
        for image_indices in (
            overlaps.found_images[matched >= 0],
            overlaps.found_images[(matched < 0) & ~left_out],
            overlaps.true_images[missed],
        )
    )
    return [ImageF1(*row) for row in zip(*counts, strict=True)]


def error_breakdown(
    images: Iterable[ImageBoxes],
    class_names: Mapping[int, str],
    *,
    foreground_iou: float = 0.5,
    background_iou: float = 0.1,
    max_detections: int = 100,
    masks: bool = False,
) -> ErrorBreakdown:
    """What each kind of error costs: by how much AP rises if that kind alone is put right.

    Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors (arXiv 2008.08115). Every wrong
    detection is of the first kind that fits:

    - localisation: its best IoU with objects of its class is from `background_iou` to `foreground_iou`;
    - classification: its best IoU with objects of other classes is at least `foreground_iou`;
    - duplicate: so is that with an object of its class, which a detection of higher score has;
    - background: its IoU with every object is at most `background_iou`;
    - both, that is wrong class and inaccurate: the rest.

    An object that is not found is missed, unless there is an error of localisation or classification at it. To put
    errors right means: of localisation and classification, the detection of highest score among the errors of both
    kinds at an object that is not found becomes right, and the others of the kind are dropped; of the other kinds,
    all detections are dropped; missed objects are no longer counted. Without false positives, all wrong detections are
    dropped; without false negatives, no object that is not found is counted.

    As in the authors' package tidecv (1.0.1), a detection that lies on a crowd may put an object right but is no error;
    a main error costs at least 0; a class left with detections only has an AP of 0, and one left with nothing takes no
    part in the mean. What differs makes AP that of COCOeval: classes without objects take no part in the mean, where
    tidecv gives those that were detected an AP of 0; recalls are those of linspace(0, 1, 101), ten of which differ
    from tidecv's i / 100 in their last bit; equal scores keep their order in every correction; of equal IoUs the later
    object's counts; a detection lies on a crowd with `foreground_iou` of its area, not only with more; and
    `max_detections` are those of a class, not of all classes together.

    Args:
        images: in the order of their ids, as equal scores rank in the order in which they come.
        class_names: each label's name.
        foreground_iou: the lowest IoU of a right detection with its object, in (0, 1].
        background_iou: up to this IoU a detection has nothing to do with an object; above 0, below `foreground_iou`.
        max_detections: how many detections of a class in an image count, those of highest score.
        masks: compares masks in place of boxes.

    Raises:
        ValueError: a threshold or limit out of its range; a label that is not in `class_names`; masks asked for of
            images that have none; no image has an object.
    """
    _check_iou("foreground_iou", foreground_iou)
    if not 0 < background_iou < foreground_iou:
        raise ValueError(
            f"background_iou is {background_iou}, expected an IoU above 0 and below foreground_iou, which is "
            f"{foreground_iou}; TIDE's are 0.1 and 0.5"
        )
    overlaps = _find_overlaps(images, class_names, max_detections=max_detections, masks=masks)
    num_objects = overlaps.num_objects()
    if not num_objects.any():
        raise ValueError(
            "the images have no objects, of which a precision could be said; evaluate images with ground truth"
        )
    matched, left_out = overlaps.match(foreground_iou)
    right, counted, labels = matched >= 0, ~left_out, overlaps.found_labels
    ap = _mean_ap(labels, right, counted, num_objects, num_objects)

    hit = overlaps.hit(matched)
    kinds, targets = _kinds_of_error(overlaps, matched, hit, foreground_iou, background_iou)
    correctable = np.flatnonzero((targets >= 0) & ~hit[targets])
    # Detections are in the order of falling scores, so that the first at each object is the highest.
    correctable_objects, first = np.unique(targets[correctable], return_index=True)
    corrects = np.zeros(len(kinds), dtype=np.bool_)
    corrects[correctable[first]] = True
    not_found = overlaps.is_real & ~hit
    missed = not_found.copy()
    missed[correctable_objects] = False

    main = {}
    for kind, name in enumerate(WRONG_DETECTIONS):
        of_kind = kinds == kind
        corrected = of_kind & corrects
        new_labels = np.where(corrected, overlaps.true_labels[targets], labels)
        new_ap = _mean_ap(new_labels, right | corrected, counted & ~of_kind | corrected, num_objects, num_objects)
        main[name] = ErrorEffect(int(np.count_nonzero(of_kind & counted)), max(new_ap - ap, 0.0))
    without_missed = _mean_ap(labels, right, counted, num_objects - overlaps.num_objects(missed), num_objects)
    main["missed"] = ErrorEffect(int(np.count_nonzero(missed)), max(without_missed - ap, 0.0))
    all_right = _mean_ap(labels, right, right, num_objects, num_objects)
    all_found = _mean_ap(labels, right, counted, num_objects - overlaps.num_objects(not_found), num_objects)
    special = {
        "false positives": ErrorEffect(int(np.count_nonzero(~right & counted)), all_right - ap),
        "false negatives": ErrorEffect(int(np.count_nonzero(not_found)), all_found - ap),
    }
    return ErrorBreakdown(
        AP=ap, foreground_iou=foreground_iou, background_iou=background_iou, masks=masks, main=main, special=special
    )


@dataclass(frozen=True, slots=True)
class _Overlaps:
    """All images' M detections and N objects, and the P pairs of them that overlap.

    Detections are in the order of falling scores, equal ones as they came. Pairs are in the order of their detections;
    those of a detection in the order of falling IoU, of equal IoUs the later object first, which is COCOeval's choice.
    Labels are positions in `class_names`.
    """

    class_names: tuple[str, ...]
    found_labels: Indices  # (M,)
    true_labels: Indices  # (N,)
    num_images: int
    found_images: Indices  # (M,), the place of each detection's image
    true_images: Indices  # (N,)
    is_real: Flags  # (N,), false for crowds
    pair_found: Indices  # (P,), a detection
    pair_true: Indices  # (P,), an object or crowd in its image
    pair_ious: Numbers  # (P,), above 0; of a crowd, the share of the detection's area
    pair_is_real: Flags  # (P,)
    pair_same_class: Flags  # (P,)

    def num_objects(self, chosen: Flags | None = None) -> Indices:
        """How many of the chosen objects each class has, (classes,); of all that are no crowds by default."""
        chosen = self.is_real if chosen is None else chosen
        return np.bincount(self.true_labels[chosen], minlength=len(self.class_names))

    def match(self, iou_threshold: float) -> tuple[Indices, Flags]:
        """COCOeval's matching: each detection in turn takes the free object of its class with the highest IoU.

        Returns:
            Each detection's object, -1 for none; and which detections are left out as they lie on a crowd, each (M,).
        """
        candidates = self.pair_is_real & self.pair_same_class & self.reach(iou_threshold)
        matched = self.take_greedily(np.flatnonzero(candidates))
        return matched, self.lies_on_crowd(iou_threshold) & (matched < 0)

    def reach(self, iou_threshold: float) -> Flags:
        """Which pairs have that IoU, (P,)."""
        return self.pair_ious >= min(iou_threshold, 1 - 1e-10)  # as COCOeval: that of equal boxes may round to below 1

    def take_greedily(self, pairs: Indices) -> Indices:
        """Goes through pairs and takes each of which neither is taken; returns each detection's object or -1, (M,)."""
        matched = [-1] * len(self.found_labels)
        free = [True] * len(self.true_labels)
        for found, true in zip(self.pair_found[pairs].tolist(), self.pair_true[pairs].tolist(), strict=True):
            if free[true] and matched[found] < 0:
                matched[found] = true
                free[true] = False
        return np.array(matched, dtype=np.int64)

    def hit(self, matched: Indices) -> Flags:
        """Which objects are some detection's, (N,)."""
        hit = np.zeros(len(self.true_labels), dtype=np.bool_)
        hit[matched[matched >= 0]] = True
        return hit

    def lies_on_crowd(self, share: float) -> Flags:
        """Which detections have at least that share of their area on a crowd of their class, (M,)."""
        on_crowd = np.zeros(len(self.found_labels), dtype=np.bool_)
        on_crowd[self.pair_found[~self.pair_is_real & self.pair_same_class & self.reach(share)]] = True
        return on_crowd

    def best(self, pairs: Flags) -> tuple[Indices, Numbers]:
        """Each detection's object with the highest IoU among the chosen pairs, and that IoU, (M,); -1 and 0 if none."""
        objects, ious = np.full(len(self.found_labels), -1), np.zeros(len(self.found_labels))
        places = np.flatnonzero(pairs)
        found, first = np.unique(self.pair_found[places], return_index=True)
        objects[found] = self.pair_true[places[first]]
        ious[found] = self.pair_ious[places[first]]
        return objects, ious


def _find_overlaps(
    images: Iterable[ImageBoxes],
    class_names: Mapping[int, str],
    *,
    min_score: float = -math.inf,
    max_detections: int | None = None,
    masks: bool,
) -> _Overlaps:
    if max_detections is not None and max_detections < 1:
        raise ValueError(f"max_detections is {max_detections}, expected a whole number from 1; COCO's is 100")
    known = np.array(sorted(class_names), dtype=np.int64)
    found_labels, found_scores, true_labels, crowds = [], [], [], []
    nums_found, nums_true = [], []
    pair_found, pair_true, pair_ious = [], [], []
    num_found = num_true = 0
    for number, image in enumerate(images):
        chosen = np.flatnonzero(image.found_scores >= min_score)
        if max_detections is not None:
            labels, scores = image.found_labels[chosen], image.found_scores[chosen]
            chosen = chosen[_highest_of_each_class(labels, scores, max_detections)]
        found_labels.append(_positions(known, image.found_labels[chosen], f"the detections of image {number}"))
        found_scores.append(image.found_scores[chosen])
        true_labels.append(_positions(known, image.true_labels, f"the objects of image {number}"))
        crowds.append(image.true_crowds)
        ious = _ious(image, chosen, number, masks)
        found, true = np.nonzero(ious > 0)
        pair_found.append(found + num_found)
        pair_true.append(true + num_true)
        pair_ious.append(ious[found, true])
        nums_found.append(len(chosen))
        nums_true.append(len(image.true_labels))
        num_found += len(chosen)
        num_true += len(image.true_labels)

    by_score = np.argsort(-_joined(found_scores, np.float64), kind="stable")
    rank = np.empty(num_found, dtype=np.int64)
    rank[by_score] = np.arange(num_found)
    found, true, ious = (
        rank[_joined(pair_found, np.int64)],
        _joined(pair_true, np.int64),
        _joined(pair_ious, np.float64),
    )
    order = np.lexsort((-true, -ious, found))
    found, true, ious = found[order], true[order], ious[order]
    all_found, all_true = _joined(found_labels, np.int64)[by_score], _joined(true_labels, np.int64)
    is_real = ~_joined(crowds, np.bool_)
    return _Overlaps(
        class_names=tuple(class_names[label] for label in known.tolist()),
        found_labels=all_found,
        true_labels=all_true,
        num_images=len(nums_found),
        found_images=_repeated_places(nums_found)[by_score],
        true_images=_repeated_places(nums_true),
        is_real=is_real,
        pair_found=found,
        pair_true=true,
        pair_ious=ious,
        pair_is_real=is_real[true],
        pair_same_class=all_found[found] == all_true[true],
    )


def _ious(image: ImageBoxes, chosen: Indices, number: int, masks: bool) -> Numbers:
    """The IoU of each chosen detection with each object, (detections, objects)."""
    if masks and (image.found_masks is None or image.true_masks is None):
        raise ValueError(
            f"image {number} has no masks, and masks is True; collect them with CocoMeanAveragePrecision(masks=True), "
            f"or leave masks out to compare boxes"
        )
    if not len(chosen) or not len(image.true_labels):
        return np.zeros((len(chosen), len(image.true_labels)))  # where pycocotools gives an empty list
    if image.found_masks is not None and image.true_masks is not None and masks:
        return coco_mask.iou([image.found_masks[place] for place in chosen], image.true_masks, image.true_crowds)
    # pycocotools reads the rows as they lie in memory.
    found, true = np.ascontiguousarray(image.found_boxes_xywh[chosen]), np.ascontiguousarray(image.true_boxes_xywh)
    return coco_mask.iou(found, true, image.true_crowds)


def _highest_of_each_class(labels: Indices, scores: Numbers, limit: int) -> Indices:
    """The places of the `limit` detections of highest score of each class, in their order."""
    if len(labels) <= limit:
        return np.arange(len(labels))
    order = np.lexsort((-scores, labels))
    place_in_class = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
    return np.sort(order[place_in_class < limit])


def _positions(known: Indices, labels: Indices, source: str) -> Indices:
    """Where each label stands among the sorted known ones."""
    unknown = labels[~np.isin(labels, known)]
    if len(unknown):
        raise ValueError(
            f"{source} have the label {unknown[0]}, which is not among the {len(known)} labels of class_names; give "
            f"the names of the metric that collected the images"
        )
    return np.searchsorted(known, labels)


def _repeated_places(lengths: Sequence[int]) -> Indices:
    """0, 1, 2, ..., each as often as `lengths` says."""
    return np.repeat(np.arange(len(lengths)), np.array(lengths, dtype=np.int64))


def _joined(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts])


def _precisions(labels: Indices, right: Flags, counted: Flags, num_objects: Indices) -> Numbers:
    """COCOeval's precision at each recall, (classes, 101), of detections by falling score; -1 without objects."""
    precisions = np.full((len(num_objects), len(RECALLS)), -1.0)
    by_class = np.flatnonzero(counted)[np.argsort(labels[counted], kind="stable")]
    starts = np.searchsorted(labels[by_class], np.arange(len(num_objects) + 1))
    for label in np.flatnonzero(num_objects):
        num_right = np.cumsum(right[by_class[starts[label] : starts[label + 1]]])
        recalls = num_right / num_objects[label]
        precision = num_right / (np.arange(1, len(num_right) + 1) + np.spacing(1))
        highest_from_here = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(recalls, RECALLS)
        precisions[label] = np.append(highest_from_here, 0.0)[places]
    return precisions


def _mean_ap(labels: Indices, right: Flags, counted: Flags, remaining: Indices, num_objects: Indices) -> float:
    """AP after a correction that left `remaining` of each class's objects, over the classes that had objects."""
    aps = _precisions(labels, right, counted, remaining).mean(axis=1)
    aps[remaining == 0] = 0.0
    num_detections = np.bincount(labels[counted], minlength=len(num_objects))
    in_mean = (num_objects > 0) & (remaining + num_detections > 0)
    return float(aps[in_mean].mean()) if in_mean.any() else 1.0  # nothing left to find, and nothing found


def _kinds_of_error(
    overlaps: _Overlaps, matched: Indices, hit: Flags, foreground_iou: float, background_iou: float
) -> tuple[Indices, Indices]:
    """Each detection's kind of error, -1 for none; and for localisation and classification its object, else -1."""
    real, same = overlaps.pair_is_real, overlaps.pair_same_class
    same_objects, same_ious = overlaps.best(real & same)
    other_objects, other_ious = overlaps.best(real & ~same)
    _, taken_ious = overlaps.best(real & same & hit[overlaps.pair_true])
    _, ious = overlaps.best(real)
    conditions = [
        matched >= 0,
        (background_iou <= same_ious) & (same_ious <= foreground_iou),
        other_ious >= foreground_iou,
        taken_ious >= foreground_iou,
        ious <= background_iou,
    ]
    kinds = np.select(conditions, [-1, LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND], default=BOTH)
    targets = np.select([kinds == LOCALISATION, kinds == CLASSIFICATION], [same_objects, other_objects], default=-1)
    return kinds, targets


def _check_score(score_threshold: float) -> None:
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold is {score_threshold}, expected a score in [0, 1]; 0 counts every detection")


def _check_iou(name: str, iou: float) -> None:
    if not 0 < iou <= 1:
        raise ValueError(f"{name} has {iou}, expected an IoU in (0, 1], such as 0.5; 50 percent are 0.5")


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
