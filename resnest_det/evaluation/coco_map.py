"""COCO's average precision and recall, of boxes and of masks.

The matching and the precisions and recalls are those of pycocotools' COCOeval, or of hotcoco, which computes the same
in Rust; this file collects the objects of a run, brings the processes together, averages, and names the results.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import itertools
import operator
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from resnest_det.coco_format import EncodedMask
from resnest_det.distributed import gather_objects
from resnest_det.evaluation.image_boxes import ImageBoxes, read_image_boxes, value_of

Backend: TypeAlias = Literal["pycocotools", "hotcoco"]
Kind: TypeAlias = Literal["bbox", "segm"]

# Objects of all images, one behind the other: COCO's name of a field -> an array of its values, of masks a list.
_Columns: TypeAlias = dict[str, Any]
_Rows: TypeAlias = list[dict[str, Any]]

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MASK_PREFIX = "mask_"

# Where COCOeval's arrays keep an area range, a threshold, and the largest limit of detections.
ALL, SMALL, MEDIUM, LARGE = range(4)
IOU_50, IOU_75 = 0, 5  # of the thresholds 0.50, 0.55 … 0.95
ALL_DETECTIONS = -1
LARGEST_AREA = 1e5**2  # COCO's: an object beyond it has no size

LONGEST_NAME = 25  # characters of a class name in the table, so that a row fits 80 columns


@dataclass(frozen=True)
class ClassAveragePrecision:
    """One class's results, in [0, 1], or -1.0 where the class has no ground truth in that area range.

    AP, APs, APm and APl average over the IoU thresholds 0.50 to 0.95, as AR does, the recall with all detections up
    to the largest of `max_detections`; `num_boxes` counts the ground truth of all sizes, crowds left out.
    """

    label: int
    name: str
    AP: float
    AP50: float
    APs: float
    APm: float
    APl: float
    AR: float
    num_boxes: int


@dataclass(frozen=True, slots=True)
class _Results:
    """What COCOeval computed; -1 in the arrays marks a class and area range without ground truth."""

    precision: NDArray[np.float64]  # (10 IoU thresholds, 101 recalls, classes, 4 area ranges, limits of detections)
    recall: NDArray[np.float64]  # (10 IoU thresholds, classes, 4 area ranges, limits of detections)


class CocoMeanAveragePrecision:
    """COCO's twelve numbers for boxes, twelve for masks where asked for, and the average precision of each class.

    Feed it with `update`, call `merge` once when every process has seen its images, then `compute`;
    `per_class` and `table` read what `compute` left. All of an image's predictions come in one update,
    each image once.

    Args:
        class_names: each label's name. Labels are whole numbers from 1: 0 is the background, which no box
            has. A class without boxes takes no part in the means.
        masks: evaluate masks beside boxes.
        backend: what matches and counts: "pycocotools", or "hotcoco", a package of its own, which gives the same
            numbers in a fraction of the time.
        max_detections: how many detections of a class in an image count, the best ones, in rising order. Each gives
            a recall (AR1, AR10, AR100); everything else is of the largest.
        area_ranges: pixels² up to which an object is small, and up to which it is medium.

    Attributes:
        class_names: by rising label.
        backend: as given.
        max_detections: as a tuple.
        images: each image's objects and detections, by rising image id.

    Raises:
        ValueError: `class_names` is empty, is no mapping, or has a label that is no int from 1; the backend is unknown
            or not installed; max_detections or area_ranges do not rise.

    Example:
        >>> metric = CocoMeanAveragePrecision({1: "cat", 2: "dog"})
        >>> box = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
        >>> found = {"boxes": box, "labels": torch.tensor([2]), "scores": torch.tensor([0.9])}
        >>> metric.update([found], [{"image_id": 7, "boxes": box, "labels": torch.tensor([2])}])
        >>> round(metric.compute()["AP"], 3)
        1.0
    """

    def __init__(
        self,
        class_names: Mapping[int, str],
        *,
        masks: bool = False,
        backend: Backend = "pycocotools",
        max_detections: Sequence[int] = (1, 10, 100),
        area_ranges: Sequence[float] = (32**2, 96**2),
    ) -> None:
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
        _check_backend(backend)
        limits, borders = tuple(max_detections), tuple(area_ranges)
        if not limits or not all(isinstance(limit, int) for limit in limits) or not _rises((0, *limits)):
            raise ValueError(
                f"max_detections is {max_detections!r}; give one or more numbers of detections from 1, each larger "
                f"than the one before, such as (1, 10, 100)"
            )
        if len(borders) != 2 or not _rises((0, *borders, LARGEST_AREA)):
            raise ValueError(
                f"area_ranges is {area_ranges!r}; give the two areas in pixels² at which medium and large objects "
                f"begin, rising between 0 and {LARGEST_AREA:g}, such as (32**2, 96**2)"
            )
        self.class_names = {label: class_names[label] for label in sorted(class_names)}
        self._kinds: tuple[Kind, ...] = ("bbox", "segm") if masks else ("bbox",)
        self.backend, self.max_detections = backend, limits
        small, medium = borders
        self._area_ranges = [[0, LARGEST_AREA], [0, small], [small, medium], [medium, LARGEST_AREA]]
        self._images: dict[int, ImageBoxes] = {}
        self._results: dict[Kind, _Results] = {}

    @property
    def images(self) -> Mapping[int, ImageBoxes]:
        """Each image's objects and detections, by rising image id."""
        return MappingProxyType(dict(sorted(self._images.items())))

    def reset(self) -> None:
        """Forgets every image and every result."""
        self._images = {}
        self._results = {}

    def update(self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Adds a batch of images. Nothing is added if it raises.

        Args:
            predictions: one dict an image, as torchvision's detectors return it: "boxes" (M, 4) xyxy in
                pixels, "labels" (M,), "scores" (M,). Boxes with the same score keep the order they have
                here. Where masks are evaluated also "masks": the probability of each pixel, (M, 1, H, W) in [0, 1],
                an object's where it is above 0.5; or M run lengths, {"size": [height, width], "counts": ...}.
            targets: one dict an image, in the same order: "image_id", an int; "boxes" (N, 4) xyxy in
                pixels; "labels" (N,); if present "area" (N,), the area in pixels² that decides between
                small, medium and large, the box's own where absent; if present "iscrowd" (N,), true for a
                box over a crowd, which is no object to find: detections that match it do not count. Where masks are
                evaluated also "masks": (N, H, W) of 0 and 1, or N run lengths. Other keys are not looked at.

        Both may have "boxes_xywh" beside "boxes": the same as (x, y, width, height), where a file has them so. These
        are then evaluated, as turning them into xyxy and back costs the last bit.

        Raises:
            ValueError: predictions and targets differ in number; a key is missing; an array's shape is
                wrong; a box, score or area is not finite; a box ends before it starts, or is another in
                "boxes_xywh"; an area is negative; a label is not in `class_names`; masks are of several sizes, no
                probabilities or no run lengths; an image came before.
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
        batch: dict[int, ImageBoxes] = {}
        for prediction, target in zip(predictions, targets, strict=True):
            image_id = _image_id(target)
            if image_id in self._images or image_id in batch:
                raise ValueError(_seen_twice(image_id))
            masks = "segm" in self._kinds
            batch[image_id] = read_image_boxes(image_id, prediction, target, self.class_names, masks=masks)
        self._images.update(batch)
        self._results = {}

    def merge(self) -> None:
        """Brings together the images of all processes of a distributed run, on each of them.

        Afterwards every process computes the same numbers, whichever process saw which image. To be called
        once, by every process. In a single process it changes nothing.

        Raises:
            ValueError: two processes saw the same image.
        """
        merged: dict[int, ImageBoxes] = {}
        for images in gather_objects(self._images):
            for image_id, image in images.items():
                if image_id in merged:
                    raise ValueError(_seen_twice(image_id))
                merged[image_id] = image
        self._images = merged
        self._results = {}

    def compute(self) -> dict[str, float]:
        """The twelve numbers that COCO reports, each in [0, 1], of boxes and, where asked for, of masks.

        AP averages precision over recall, over the IoU thresholds 0.50 to 0.95 and over the classes; AP50
        and AP75 take one threshold; APs, APm and APl take the objects with an area up to 32² pixels, from
        32² to 96², and from 96² on. AR1, AR10 and AR100 are the recall that so many detections of a class
        in an image reach, averaged alike; ARs, ARm and ARl are AR100 by area. Other `max_detections` and
        `area_ranges` take the places of 1, 10 and 100 and of 32² and 96².

        Returns:
            The keys AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl in this order, then those of masks
            with "mask_" before them. A number is -1.0 where there is no ground truth to find (no large object: APl and
            ARl), as in pycocotools, and 0.0 where there is but nothing was detected.

        Raises:
            ValueError: no image was added.
        """
        if not self._images:
            raise ValueError("no images to evaluate: call update() first, and check that the loader is not empty")
        self._results = {kind: self._evaluate(kind) for kind in self._kinds}
        return {
            f"{MASK_PREFIX if kind == 'segm' else ''}{name}": number
            for kind in self._kinds
            for name, number in self._summary(kind).items()
        }

    def per_class(self, *, masks: bool = False) -> list[ClassAveragePrecision]:
        """Each class's results by label, of its boxes or of its masks.

        Raises:
            ValueError: `compute` has not run since images were last added, or masks are not evaluated.
        """
        results = self._computed("segm" if masks else "bbox")
        num_boxes = dict.fromkeys(self.class_names, 0)
        for image in self._images.values():
            for label in image.true_labels[~image.true_crowds].tolist():
                num_boxes[label] += 1
        rows = []
        for k, (label, name) in enumerate(self.class_names.items()):
            precision = results.precision[:, :, k, :, ALL_DETECTIONS]  # (10 thresholds, 101 recalls, 4 area ranges)
            row = ClassAveragePrecision(
                label=label,
                name=name,
                AP=_mean(precision[:, :, ALL]),
                AP50=_mean(precision[IOU_50, :, ALL]),
                APs=_mean(precision[:, :, SMALL]),
                APm=_mean(precision[:, :, MEDIUM]),
                APl=_mean(precision[:, :, LARGE]),
                AR=_mean(results.recall[:, k, ALL, ALL_DETECTIONS]),
                num_boxes=num_boxes[label],
            )
            rows.append(row)
        return rows

    def table(self) -> str:
        """The numbers and each class's results as aligned text, and what computed them; "-" for -1.

        The text is 80 columns wide at most, with up to seven `max_detections`.

        Raises:
            ValueError: `compute` has not run since images were last added.
        """
        return "\n\n".join(self._table(kind) for kind in self._kinds)

    def results_json(self, category_ids: Mapping[int, int]) -> list[dict[str, Any]]:
        """The detections in COCO's format of results, which `coco_results` writes and reads, by rising image id.

        Args:
            category_ids: each label's category id in the annotation file, such as `CocoDetection.category_ids`.

        Raises:
            ValueError: a label has no category id.
        """
        unknown = sorted(self.class_names.keys() - category_ids.keys())
        if unknown:
            raise ValueError(
                f"category_ids has no id for the label {unknown[0]}, only for {sorted(category_ids)}; give the "
                f"category_ids of the data set whose classes these are"
            )
        detections = []
        for image_id, image in self.images.items():
            columns = (image.found_boxes_xywh, image.found_labels, image.found_scores)
            for m, (box, label, score) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
                detection = {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
                if image.found_masks is not None:
                    mask = image.found_masks[m]
                    detection["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode()}
                detections.append(detection)
        return detections

    def _table(self, kind: Kind) -> str:
        summary, objects = self._summary(kind), "boxes" if kind == "bbox" else "masks"
        lines = [f"{objects}, by {self.backend}"]
        for prefix in ("AP", "AR"):
            named = {name: number for name, number in summary.items() if name.startswith(prefix)}
            lines.append("".join(f"{name:>8}" for name in named))
            lines.append("".join(f"{_number(number):>8}" for number in named.values()))
        rows = self.per_class(masks=kind == "segm")
        width = min(max(len("class"), *(len(row.name) for row in rows)), LONGEST_NAME)
        heads = ("AP", "AP50", "APs", "APm", "APl", f"AR{self.max_detections[ALL_DETECTIONS]}")
        lines += ["", f"label {'class':<{width}}{''.join(f'{head:>7}' for head in heads)}  {objects}"]
        for row in rows:
            name = row.name if len(row.name) <= width else row.name[: width - 1] + "…"
            numbers = (row.AP, row.AP50, row.APs, row.APm, row.APl, row.AR)
            cells = "".join(f"{_number(number):>7}" for number in numbers)
            lines.append(f"{row.label:>5} {name:<{width}}{cells}{row.num_boxes:>7}")
        return "\n".join(lines)

    def _summary(self, kind: Kind) -> dict[str, float]:
        """The means over classes, by name: those of COCOeval.summarize, which knows no other limits and ranges."""
        results = self._computed(kind)
        precision, recall = results.precision[..., ALL_DETECTIONS], results.recall
        numbers = [
            _mean(precision[..., ALL]),
            _mean(precision[IOU_50, ..., ALL]),
            _mean(precision[IOU_75, ..., ALL]),
            *(_mean(precision[..., size]) for size in (SMALL, MEDIUM, LARGE)),
        ]
        summary = dict(zip(AP_NAMES, numbers, strict=True))
        for m, limit in enumerate(self.max_detections):
            summary[f"AR{limit}"] = _mean(recall[:, :, ALL, m])
        for name, size in (("ARs", SMALL), ("ARm", MEDIUM), ("ARl", LARGE)):
            summary[name] = _mean(recall[:, :, size, ALL_DETECTIONS])
        return summary

    def _evaluate(self, kind: Kind) -> _Results:
        categories = [{"id": label, "name": name} for label, name in self.class_names.items()]
        make_evaluation = _hotcoco_evaluation if self.backend == "hotcoco" else _pycocotools_evaluation
        # Progress goes to print(); hotcoco warns of limits and ranges that are not COCO's.
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            evaluation = make_evaluation(kind, self._image_sizes(kind), categories, *self._columns(kind))
            evaluation.params.maxDets = list(self.max_detections)
            evaluation.params.areaRng = self._area_ranges
            evaluation.evaluate()
            evaluation.accumulate()
            return _Results(evaluation.eval["precision"], evaluation.eval["recall"])

    # COCOeval goes through the images by id and sorts scores stably, so images are numbered here by rising id: equal
    # scores are ranked alike, whichever process saw which image and when.

    def _image_sizes(self, kind: Kind) -> list[dict[str, Any]]:
        sizes = []
        for number, image in enumerate(self.images.values()):
            size = {"id": number}
            if kind == "segm":
                masks = [*(image.true_masks or []), *(image.found_masks or [])]
                size["height"], size["width"] = masks[0]["size"] if masks else (0, 0)
            sizes.append(size)
        return sizes

    def _columns(self, kind: Kind) -> tuple[_Columns, _Columns]:
        """The ground truth and the detections of all images."""
        images = list(self.images.values())

        def all_of(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(image, name) for image in images])

        truth: _Columns = {
            "category_id": all_of("true_labels"),
            "bbox": all_of("true_boxes_xywh"),
            "area": all_of("true_areas"),
            "iscrowd": all_of("true_crowds").astype(np.int64),
        }
        found: _Columns = {
            "category_id": all_of("found_labels"),
            "bbox": all_of("found_boxes_xywh"),
            "score": all_of("found_scores"),
        }
        if kind == "segm":
            truth["segmentation"] = [mask for image in images for mask in image.true_masks or []]
            found["segmentation"] = masks = [mask for image in images for mask in image.found_masks or []]
            found["area"] = _areas(masks)
        else:
            found["area"] = found["bbox"][:, 2] * found["bbox"][:, 3]
        numbers = np.arange(len(images))
        truth["image_id"] = np.repeat(numbers, [len(image.true_labels) for image in images])
        found["image_id"] = np.repeat(numbers, [len(image.found_labels) for image in images])
        for columns in (truth, found):
            columns["id"] = np.arange(1, len(columns["bbox"]) + 1)  # from 1: COCOeval reads 0 as "not matched"
        return truth, found

    def _computed(self, kind: Kind) -> _Results:
        if kind not in self._kinds:
            raise ValueError("masks are not evaluated; make the metric with masks=True")
        if kind not in self._results:
            raise ValueError("there are no results of the images added so far: call compute() first")
        return self._results[kind]


def _areas(masks: Sequence[EncodedMask]) -> NDArray[np.float64]:
    """Their pixels, (N,)."""
    # pycocotools writes the number of masks into a byte, which NumPy 2 refuses from 256 on.
    starts = range(0, len(masks), 255)
    return np.concatenate([np.zeros(0), *(coco_mask.area(masks[start : start + 255]) for start in starts)])


def _pycocotools_evaluation(kind: Kind, images: _Rows, categories: _Rows, truth: _Columns, found: _Columns) -> Any:
    """COCOeval of what COCO.loadRes builds of detections, without the masks it draws around boxes, and for none too."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    datasets = []
    for columns in (truth, found):
        values = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values()]
        annotations = [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
        dataset = COCO()
        dataset.dataset = {"images": images, "annotations": annotations, "categories": categories}
        dataset.createIndex()
        datasets.append(dataset)
    return COCOeval(*datasets, iouType=kind)


def _hotcoco_evaluation(kind: Kind, images: _Rows, categories: _Rows, truth: _Columns, found: _Columns) -> Any:
    """The same from the columns themselves: to make a dict of each detection takes longer than to evaluate them."""
    hotcoco = importlib.import_module("hotcoco")
    true_set = hotcoco.COCO.from_arrays(
        images,
        categories,
        truth["image_id"],
        truth["category_id"],
        truth["bbox"],
        ids=truth["id"],
        area=truth["area"],
        iscrowd=truth["iscrowd"],
        segmentation=truth.get("segmentation"),
    )
    rows = np.column_stack([found[name] for name in ("image_id", "bbox", "score", "category_id")])
    found_set = true_set.loadRes(rows, segmentation=found.get("segmentation"))
    found_set.update_anns(ids=found["id"], area=found["area"])  # loadRes takes the box's for the mask's
    return hotcoco.COCOeval(true_set, found_set, iouType=kind)


def _check_backend(backend: str) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(map(repr, get_args(Backend)))}")
    if importlib.util.find_spec(backend) is None:
        raise ValueError(
            f"backend={backend!r} needs the package {backend}, which is not installed: "
            f'pip install "resnest-det[{backend}]", or use backend="pycocotools"'
        )


def _rises(numbers: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))


def _image_id(target: Mapping[str, Any]) -> int:
    value = value_of(target, "image_id", "a target")
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


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of what COCOeval computed, -1.0 if it had no ground truth."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _number(value: float) -> str:
    return "-" if value == -1 else f"{value:.3f}"
