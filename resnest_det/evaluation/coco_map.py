"""COCO's average precision and recall of boxes.

The numbers are those of pycocotools' COCOeval, which does the matching and the averaging; this file
collects the boxes of a run, checks them, brings the processes together, and names the results.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnest_det.distributed import gather_objects

# The order of COCOeval.stats.
AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
AR_NAMES = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

# Where COCOeval's arrays keep an area range and, on their last axis, the limit of 100 detections a class
# and image.
ALL, SMALL, MEDIUM, LARGE = range(4)
LIMIT_100 = 2
IOU_50 = 0  # the first of the thresholds 0.50, 0.55 … 0.95

LONGEST_NAME = 25  # characters of a class name in the table, so that a row fits 80 columns


@dataclass(frozen=True)
class ClassAveragePrecision:
    """One class's results, in [0, 1], or -1.0 where the class has no ground truth in that area range.

    AP, APs, APm and APl average over the IoU thresholds 0.50 to 0.95, as AR100 does; `num_boxes` counts the
    ground-truth boxes of all sizes, crowds left out.
    """

    label: int
    name: str
    AP: float
    AP50: float
    APs: float
    APm: float
    APl: float
    AR100: float
    num_boxes: int


@dataclass(frozen=True, slots=True)
class _ImageBoxes:
    """One image's N ground-truth boxes and M detections, as COCO's (x, y, width, height) in pixels."""

    true_boxes_xywh: NDArray[np.float64]  # (N, 4)
    true_labels: NDArray[np.int64]  # (N,)
    true_areas: NDArray[np.float64]  # (N,)
    true_crowds: NDArray[np.bool_]  # (N,)
    found_boxes_xywh: NDArray[np.float64]  # (M, 4)
    found_labels: NDArray[np.int64]  # (M,)
    found_scores: NDArray[np.float64]  # (M,)


@dataclass(frozen=True, slots=True)
class _Results:
    """What COCOeval computed; -1 in the arrays marks a class and area range without ground truth."""

    summary: dict[str, float]
    precision: NDArray[np.float64]  # (10 IoU thresholds, 101 recalls, classes, 4 area ranges, 3 limits)
    recall: NDArray[np.float64]  # (10 IoU thresholds, classes, 4 area ranges, 3 limits)


class CocoMeanAveragePrecision:
    """COCO's twelve numbers for boxes, and the average precision of each class.

    Feed it with `update`, call `merge` once when every process has seen its images, then `compute`;
    `per_class` and `table` read what `compute` left. All of an image's predictions come in one update,
    each image once.

    Args:
        class_names: each label's name. Labels are whole numbers from 1: 0 is the background, which no box
            has. A class without boxes takes no part in the means.

    Raises:
        ValueError: `class_names` is empty, is no mapping, or has a label that is no int from 1.

    Example:
        >>> metric = CocoMeanAveragePrecision({1: "cat", 2: "dog"})
        >>> box = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
        >>> found = {"boxes": box, "labels": torch.tensor([2]), "scores": torch.tensor([0.9])}
        >>> metric.update([found], [{"image_id": 7, "boxes": box, "labels": torch.tensor([2])}])
        >>> round(metric.compute()["AP"], 3)
        1.0
    """

    def __init__(self, class_names: Mapping[int, str]) -> None:
        if not isinstance(class_names, Mapping) or not class_names:
            raise ValueError(
                f"class_names is {class_names!r}; give a mapping from label to name that is not empty, "
                f'such as {{1: "cat", 2: "dog"}}'
            )
        for label in class_names:
            if not isinstance(label, int) or label < 1:
                raise ValueError(
                    f"class_names has the label {label!r}; a label is an int from 1, as 0 is the background: "
                    f"leave the background out and count the classes from 1"
                )
        self.class_names = {label: class_names[label] for label in sorted(class_names)}
        self._images: dict[int, _ImageBoxes] = {}
        self._results: _Results | None = None

    def reset(self) -> None:
        """Forgets every image and every result."""
        self._images = {}
        self._results = None

    def update(self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Adds a batch of images. Nothing is added if it raises.

        Args:
            predictions: one dict an image, as torchvision's detectors return it: "boxes" (M, 4) xyxy in
                pixels, "labels" (M,), "scores" (M,). Boxes with the same score keep the order they have
                here.
            targets: one dict an image, in the same order: "image_id", an int; "boxes" (N, 4) xyxy in
                pixels; "labels" (N,); if present "area" (N,), the area in pixels² that decides between
                small, medium and large, the box's own where absent; if present "iscrowd" (N,), true for a
                box over a crowd, which is no object to find: detections that match it do not count. Other
                keys are not looked at.

        Raises:
            ValueError: predictions and targets differ in number; a key is missing; an array's shape is
                wrong; a box, score or area is not finite; a box ends before it starts; a label is not in
                `class_names`; an image came before.
        """
        if isinstance(predictions, Mapping):
            raise ValueError(
                f"predictions is one dict with the keys {sorted(map(str, predictions))}; it must be a list "
                f"with a dict for each image, which a detector returns in evaluation mode"
            )
        if len(predictions) != len(targets):
            raise ValueError(
                f"{len(predictions)} predictions came for {len(targets)} targets; give one of each for every image"
            )
        batch: dict[int, _ImageBoxes] = {}
        for prediction, target in zip(predictions, targets, strict=True):
            image_id = _image_id(target)
            if image_id in self._images or image_id in batch:
                raise ValueError(_seen_twice(image_id))
            batch[image_id] = self._read(image_id, prediction, target)
        self._images.update(batch)
        self._results = None

    def merge(self) -> None:
        """Brings together the images of all processes of a distributed run, on each of them.

        Afterwards every process computes the same numbers, whichever process saw which image. To be called
        once, by every process. In a single process it changes nothing.

        Raises:
            ValueError: two processes saw the same image.
        """
        merged: dict[int, _ImageBoxes] = {}
        for images in gather_objects(self._images):
            for image_id, image in images.items():
                if image_id in merged:
                    raise ValueError(_seen_twice(image_id))
                merged[image_id] = image
        self._images = merged
        self._results = None

    def compute(self) -> dict[str, float]:
        """The twelve numbers that COCO reports, each in [0, 1].

        AP averages precision over recall, over the IoU thresholds 0.50 to 0.95 and over the classes; AP50
        and AP75 take one threshold; APs, APm and APl take the objects with an area up to 32² pixels, from
        32² to 96², and from 96² on. AR1, AR10 and AR100 are the recall that so many detections of a class
        in an image reach, averaged alike; ARs, ARm and ARl are AR100 by area.

        Returns:
            The keys AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl in this order. A number
            is -1.0 where there is no ground truth to find (no large object: APl and ARl), as in
            pycocotools, and 0.0 where there is but nothing was detected.

        Raises:
            ValueError: no image was added.
        """
        if not self._images:
            raise ValueError("no images to evaluate: call update() first, and check that the loader is not empty")
        # COCOeval goes through the images by id, whatever their order here, and sorts scores stably. So equal
        # scores are ranked alike, whichever process saw which image and when. Its progress goes to print().
        with redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._ground_truth(), self._detections(), iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        numbers = (float(number) for number in evaluation.stats)
        self._results = _Results(
            summary=dict(zip(AP_NAMES + AR_NAMES, numbers, strict=True)),
            precision=evaluation.eval["precision"],
            recall=evaluation.eval["recall"],
        )
        return dict(self._results.summary)

    def per_class(self) -> list[ClassAveragePrecision]:
        """Each class's results, by label.

        Raises:
            ValueError: `compute` has not run since images were last added.
        """
        results = self._computed()
        num_boxes = dict.fromkeys(self.class_names, 0)
        for image in self._images.values():
            for label in image.true_labels[~image.true_crowds].tolist():
                num_boxes[label] += 1
        rows = []
        for k, (label, name) in enumerate(self.class_names.items()):
            precision = results.precision[:, :, k, :, LIMIT_100]  # (10 thresholds, 101 recalls, 4 area ranges)
            row = ClassAveragePrecision(
                label=label,
                name=name,
                AP=_mean(precision[:, :, ALL]),
                AP50=_mean(precision[IOU_50, :, ALL]),
                APs=_mean(precision[:, :, SMALL]),
                APm=_mean(precision[:, :, MEDIUM]),
                APl=_mean(precision[:, :, LARGE]),
                AR100=_mean(results.recall[:, k, ALL, LIMIT_100]),
                num_boxes=num_boxes[label],
            )
            rows.append(row)
        return rows

    def table(self) -> str:
        """The twelve numbers and each class's results as aligned text, 80 columns wide at most; "-" for -1.

        Raises:
            ValueError: `compute` has not run since images were last added.
        """
        summary = self._computed().summary
        lines = []
        for names in (AP_NAMES, AR_NAMES):
            lines.append("".join(f"{name:>8}" for name in names))
            lines.append("".join(f"{_number(summary[name]):>8}" for name in names))
        rows = self.per_class()
        width = min(max(len("class"), *(len(row.name) for row in rows)), LONGEST_NAME)
        heads = "".join(f"{head:>7}" for head in ("AP", "AP50", "APs", "APm", "APl", "AR100"))
        lines += ["", f"label {'class':<{width}}{heads}  boxes"]
        for row in rows:
            name = row.name if len(row.name) <= width else row.name[: width - 1] + "…"
            numbers = (row.AP, row.AP50, row.APs, row.APm, row.APl, row.AR100)
            cells = "".join(f"{_number(number):>7}" for number in numbers)
            lines.append(f"{row.label:>5} {name:<{width}}{cells}{row.num_boxes:>7}")
        return "\n".join(lines)

    def _read(self, image_id: int, prediction: Mapping[str, Any], target: Mapping[str, Any]) -> _ImageBoxes:
        """One image's values, checked, and copied so that no tensor of the model or the loader is kept."""
        expected, found = f"target of image {image_id}", f"prediction for image {image_id}"
        true_boxes_xywh = _boxes_xywh(target, expected)
        found_boxes_xywh = _boxes_xywh(prediction, found)
        num_true, num_found = len(true_boxes_xywh), len(found_boxes_xywh)
        return _ImageBoxes(
            true_boxes_xywh=true_boxes_xywh,
            true_labels=self._labels(target, num_true, expected),
            true_areas=(
                _one_per_box(target, "area", num_true, expected)
                if "area" in target
                else true_boxes_xywh[:, 2] * true_boxes_xywh[:, 3]
            ),
            true_crowds=(
                _one_per_box(target, "iscrowd", num_true, expected).astype(np.bool_)
                if "iscrowd" in target
                else np.zeros(num_true, dtype=np.bool_)
            ),
            found_boxes_xywh=found_boxes_xywh,
            found_labels=self._labels(prediction, num_found, found),
            found_scores=_one_per_box(prediction, "scores", num_found, found),
        )

    def _labels(self, item: Mapping[str, Any], num_boxes: int, source: str) -> NDArray[np.int64]:
        labels = _one_per_box(item, "labels", num_boxes, source)
        for label in labels.tolist():
            if label not in self.class_names:
                raise ValueError(
                    f"{source}: label {label:g} is not in class_names, which has {len(self.class_names)} "
                    f"labels from {min(self.class_names)} to {max(self.class_names)}; give the model and the "
                    f"metric the classes of the data set being evaluated"
                )
        return labels.astype(np.int64)

    def _ground_truth(self) -> COCO:
        annotations: list[dict[str, Any]] = []
        for image_id, image in self._images.items():
            columns = (image.true_boxes_xywh, image.true_labels, image.true_areas, image.true_crowds)
            for box, label, area, crowd in zip(*(column.tolist() for column in columns), strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # from 1: COCOeval reads 0 as "not matched"
                        "image_id": image_id,
                        "category_id": label,
                        "bbox": box,
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
        return self._indexed(annotations)

    def _detections(self) -> COCO:
        # What COCO.loadRes builds, without the masks it draws around the boxes, and for no detections too.
        annotations: list[dict[str, Any]] = []
        for image_id, image in self._images.items():
            columns = (image.found_boxes_xywh, image.found_labels, image.found_scores)
            for box, label, score in zip(*(column.tolist() for column in columns), strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": label,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "score": score,
                    }
                )
        return self._indexed(annotations)

    def _indexed(self, annotations: Sequence[dict[str, Any]]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image_id} for image_id in self._images],
            "annotations": annotations,
            "categories": [{"id": label, "name": name} for label, name in self.class_names.items()],
        }
        coco.createIndex()
        return coco

    def _computed(self) -> _Results:
        if self._results is None:
            raise ValueError("there are no results of the images added so far: call compute() first")
        return self._results


def _image_id(target: Mapping[str, Any]) -> int:
    value = _value(target, "image_id", "a target")
    try:
        return operator.index(value)  # an int, a NumPy integer, or a tensor with one integer
    except TypeError as error:
        raise ValueError(f"a target's image_id is {value!r}; it must be one int") from error


def _seen_twice(image_id: int) -> str:
    return (
        f"image {image_id} came twice; every image counts once. Call reset() before a new evaluation and "
        f"merge() once; in a distributed run use a sampler that does not pad (DistributedSampler repeats "
        f"images to give every process as many)"
    )


def _value(item: Mapping[str, Any], key: str, source: str) -> Any:
    if key not in item:
        raise ValueError(f"{source} has no {key!r}, only {sorted(item)}; {key!r} is needed")
    return item[key]


def _array(value: Any) -> NDArray[np.float64]:
    # On the CPU first, as not every device has float64; float32 and bfloat16 become float64 exactly.
    return torch.as_tensor(value).detach().cpu().double().numpy().copy()


def _boxes_xywh(item: Mapping[str, Any], source: str) -> NDArray[np.float64]:
    boxes_xyxy = _array(_value(item, "boxes", source))
    if boxes_xyxy.ndim != 2 or boxes_xyxy.shape[1] != 4:
        raise ValueError(
            f"{source}: boxes has the shape {boxes_xyxy.shape}; it must be (N, 4), so (0, 4) without boxes"
        )
    _check_finite(boxes_xyxy, "boxes", source)
    sizes = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    reversed_boxes = boxes_xyxy[(sizes < 0).any(axis=1)]
    if len(reversed_boxes):
        raise ValueError(
            f"{source}: the box {reversed_boxes[0].tolist()} ends before it starts; boxes are xyxy (x1, y1, "
            f"x2, y2) in pixels: convert boxes given as (x, y, width, height)"
        )
    return np.concatenate([boxes_xyxy[:, :2], sizes], axis=1)


def _one_per_box(item: Mapping[str, Any], key: str, num_boxes: int, source: str) -> NDArray[np.float64]:
    values = _array(_value(item, key, source))
    if values.shape != (num_boxes,):
        raise ValueError(
            f"{source}: {key} has the shape {values.shape} beside {num_boxes} boxes; it must be ({num_boxes},)"
        )
    _check_finite(values, key, source)
    return values


def _check_finite(values: NDArray[np.float64], key: str, source: str) -> None:
    wrong = values[~np.isfinite(values)]
    if wrong.size:
        raise ValueError(
            f"{source}: {key} holds {wrong[0]} ({wrong.size} of {values.size} values are not finite); every "
            f"value must be a number: did the training diverge?"
        )


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of what COCOeval computed, -1.0 if it had no ground truth."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _number(value: float) -> str:
    return "-" if value == -1 else f"{value:.3f}"
