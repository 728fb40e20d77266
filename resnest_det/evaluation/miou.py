"""Mean intersection over union, and the accuracies beside it, from one confusion matrix.

Pixels are counted where the predictions are, image by image, so that images of any size stream through and
only the matrix is kept. Its counts are whole numbers: no order of images and no split over processes changes
a digit.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resnest_det.distributed import gather_objects, rank

SUMMARY_NAMES = ("mIoU", "mAcc", "aAcc", "fwIoU")
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)

# On a CPU pixels are counted in parts whose copies stay in its cache. Whole images' copies would each be memory
# fresh from the system, which can take longer to hand out than the counting.
PIXELS_AT_ONCE = 32768

TABLE_WIDTH = 80
LONGEST_NAME = 25  # characters of a class name in the table, so that a row fits its width


@dataclass(frozen=True)
class ClassIoU:
    """One class's results, in [0, 1], or -1.0 where they are not defined.

    IoU is the pixels where truth and prediction agree on the class over those where either has it: -1.0 for
    a class in neither. `accuracy` is the share of the class's true pixels that were found: -1.0 for a class
    without any. `share` is the class's part of all true pixels. Ignored pixels count nowhere.
    """

    label: int
    name: str
    IoU: float
    accuracy: float
    share: float


@dataclass(frozen=True, slots=True)
class _Results:
    summary: dict[str, float]
    rows: list[ClassIoU]


class MeanIoU:
    """Mean IoU of a segmentation, its accuracies, and the results of each class.

    Feed it with `update`, call `merge` once when every process has seen its images, then `compute`;
    `per_class`, `table` and `absent` read what `compute` left. In a distributed run use a sampler that does not pad, as
    DistributedSampler would have some images counted twice.

    Args:
        class_names: each class's name, by its value in the masks: 0 to K-1.
        ignore_index: the mask value of pixels that count nowhere, whatever is predicted there.

    Raises:
        ValueError: `class_names` is no mapping, is empty, or has other keys than 0 to K-1; `ignore_index` is
            one of them.

    Example:
        >>> metric = MeanIoU({0: "road", 1: "car"})
        >>> metric.update([torch.tensor([[0, 0, 0, 1]])], [torch.tensor([[0, 0, 1, 255]])])
        >>> round(metric.compute()["mIoU"], 3)
        0.333
    """

    def __init__(self, class_names: Mapping[int, str], *, ignore_index: int = 255) -> None:
        if not isinstance(class_names, Mapping) or not class_names:
            raise ValueError(
                f"class_names is {class_names!r}; give a mapping from mask value to name that is not empty, "
                f'such as {{0: "road", 1: "car"}}'
            )
        num_classes = len(class_names)
        for label in class_names:
            if not isinstance(label, int) or not 0 <= label < num_classes:
                raise ValueError(
                    f"class_names has the label {label!r} among {num_classes} classes; labels are the ints from "
                    f"0 to {num_classes - 1} without gaps, as the channels of the model's output"
                )
        if 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index={ignore_index} is the label of {class_names[ignore_index]!r}; give a value that is "
                f"no class: below 0 or from {num_classes}"
            )
        self.class_names = {label: class_names[label] for label in range(num_classes)}
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Forgets every image and every result."""
        num_classes = len(self.class_names)
        self._matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # row: truth, column: prediction
        self._num_images = 0
        self._image_scores: dict[str, Tensor | float] | None = {}  # None: the names do not tell the images apart
        self._merged = False
        self._results: _Results | None = None

    def update(
        self,
        predictions: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
        targets: Any,
        names: Sequence[str] | None = None,
    ) -> None:
        """Adds a batch of images. Nothing is added if it raises.

        Args:
            predictions: a model's dict with the logits "out" (N, K, H, W); or one tensor an image, in a list
                or stacked: logits (K, H, W), or a label map (H, W) of integers. Logits of another size than
                the mask are resized to it, bilinearly; the mask never is.
            targets: one mask (H, W) of integers an image, in the same order, in a list or stacked, on any
                device: labels, or `ignore_index`.
            names: of the images, such as those of their files; with them, `image_scores` has each image's. Where they
                are not one string an image, each another, there are no image scores until `reset`: this is warned of.

        Raises:
            ValueError: predictions and targets differ in number; a tensor's shape or type is wrong; a label
                map has another size than its mask; a label is not in `class_names`; a logit is NaN.
        """
        if isinstance(predictions, Mapping):
            if "out" not in predictions:
                raise ValueError(
                    f"predictions has no 'out', only {sorted(map(str, predictions))}; 'out' holds the logits that a "
                    f"segmentation model returns in evaluation mode"
                )
            predictions = predictions["out"]
        if len(predictions) != len(targets):
            raise ValueError(
                f"{len(predictions)} predictions came for {len(targets)} masks; give one of each for every image"
            )
        matrix = self._matrix
        scores = []
        for position, (prediction, mask) in enumerate(zip(predictions, targets, strict=True)):
            counts = self._counts(prediction, mask, position)
            if names is not None and self._image_scores is not None:
                scores.append(_mean_iou(counts))
            # Not in place: a tensor made in inference mode refuses that outside of it.
            matrix = matrix.to(counts.device) + counts
        self._matrix = matrix
        self._num_images += len(targets)
        self._results = None
        if names is not None and self._image_scores is not None:
            if mistake := _mistake_in_names(names, len(targets), self._image_scores):
                self._image_scores = None
                warnings.warn(_without_scores(mistake), stacklevel=2)
            else:
                self._image_scores.update(zip(names, scores, strict=True))

    def merge(self) -> None:
        """Sums the matrices of all processes of a distributed run, on each of them.

        Afterwards every process computes the same numbers. To be called once, by every process. In a single
        process it changes nothing. Where two processes saw an image of the same name there are no image scores, which
        the first process warns of.

        Raises:
            ValueError: the processes were brought together before, and every image would count twice.
        """
        own_scores = None if self._image_scores is None else self.image_scores
        parts = gather_objects((self._matrix.cpu(), self._num_images, self._merged, own_scores))
        if any(merged for _, _, merged, _ in parts):
            raise ValueError(
                "merge() came twice, and every image would count more than once; call reset() before a new "
                "evaluation and merge() once"
            )
        merged_scores: dict[str, Tensor | float] | None = {}
        for *_, scores in parts:
            if scores is None or merged_scores is None:
                merged_scores = None
            elif repeated := merged_scores.keys() & scores.keys():
                merged_scores = None
                if rank() == 0:
                    warnings.warn(_without_scores(f"the name {min(repeated)!r} came twice"), stacklevel=2)
            else:
                merged_scores.update(scores)
        self._matrix = sum((matrix for matrix, *_ in parts), torch.zeros_like(parts[0][0]))
        self._num_images = sum(num_images for _, num_images, *_ in parts)
        self._image_scores = merged_scores
        self._merged = len(parts) > 1
        self._results = None

    def compute(self) -> dict[str, float]:
        """The four numbers, each in [0, 1].

        mIoU is the mean IoU of the classes that occur in the truth or the predictions: one that was
        predicted and is nowhere in the truth counts 0. mAcc is the mean accuracy of the classes in the
        truth. aAcc is the share of all pixels that is right. fwIoU is the mean IoU weighted by each class's
        pixels in the truth.

        Returns:
            The keys mIoU, mAcc, aAcc, fwIoU in this order; each -1.0 if every pixel was ignored.

        Raises:
            ValueError: no image was added.
        """
        if self._num_images == 0:
            raise ValueError("no images to evaluate: call update() first, and check that the loader is not empty")
        matrix = self._matrix.cpu().double()  # exact up to 2**53 pixels
        right, true, found = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
        total = true.sum()
        seen, occurs = true > 0, true + found > 0
        # Without a pixel of the class the divisor is 0 and the quotient NaN: -1 in its place.
        iou = torch.where(occurs, right / (true + found - right), -1.0)
        accuracy = torch.where(seen, right / true, -1.0)
        share = true / total.clamp(min=1)
        values = (iou[occurs].mean(), accuracy[seen].mean(), right.sum() / total, (true * iou)[seen].sum() / total)
        numbers = (float(value) if total > 0 else -1.0 for value in values)
        columns = (column.tolist() for column in (iou, accuracy, share))
        self._results = _Results(
            summary=dict(zip(SUMMARY_NAMES, numbers, strict=True)),
            rows=[ClassIoU(*row) for row in zip(*zip(*self.class_names.items(), strict=True), *columns, strict=True)],
        )
        return dict(self._results.summary)

    def per_class(self) -> list[ClassIoU]:
        """Each class's results, by label.

        Raises:
            ValueError: `compute` has not run since images were last added.
        """
        return list(self._computed().rows)

    @property
    def absent(self) -> list[str]:
        """The names of the classes that no mean counts: in no truth and no prediction.

        Raises:
            ValueError: `compute` has not run since images were last added.
        """
        return [row.name for row in self._computed().rows if row.IoU == -1]

    @property
    def image_scores(self) -> dict[str, float]:
        """The mean IoU of each image that came with a name, by name; -1.0 where every pixel was ignored.

        The mean is over the classes that occur in the image, in its truth or in its prediction. Empty where the names
        did not tell the images apart.
        """
        scores = self._image_scores or {}
        return {name: float(scores[name]) for name in sorted(scores)}

    def table(self) -> str:
        """The four numbers and each class's results as aligned text, 80 columns wide at most; "-" for -1.

        Classes absent from truth and predictions are named below, in place of a row each.

        Raises:
            ValueError: `compute` has not run since images were last added.
        """
        summary = self._computed().summary
        lines = [
            "".join(f"{name:>8}" for name in SUMMARY_NAMES),
            "".join(f"{_number(summary[name]):>8}" for name in SUMMARY_NAMES),
        ]
        rows = [row for row in self.per_class() if row.IoU != -1]
        if rows:
            width = min(max(len("class"), *(len(row.name) for row in rows)), LONGEST_NAME)
            lines += ["", f"label {'class':<{width}}     IoU  accuracy  pixels"]
            for row in rows:
                name = row.name if len(row.name) <= width else row.name[: width - 1] + "…"
                numbers = f"{_number(row.IoU):>8}{_number(row.accuracy):>10}{row.share:>8.2%}"
                lines.append(f"{row.label:>5} {name:<{width}}{numbers}")
        if self.absent:
            left_out = f"absent from ground truth and predictions, left out: {', '.join(self.absent)}"
            lines += ["", *textwrap.wrap(left_out, TABLE_WIDTH, subsequent_indent="  ")]
        return "\n".join(lines)

    def _counts(self, prediction: Tensor, mask: Tensor, position: int) -> Tensor:
        """One image's pixels by true and predicted class: int64 (K, K), on the prediction's device."""
        expected, found = f"mask {position} of the batch", f"prediction {position} of the batch"
        if not _is_label_map(mask):
            raise ValueError(
                f"{expected} is {_kind(mask)}; it must be a tensor (H, W) of integers: the class of every pixel, not "
                f"a picture in colours"
            )
        if _is_logits(prediction):
            prediction = self._labels_of_logits(prediction, mask.shape, found)
        elif not _is_label_map(prediction):
            raise ValueError(
                f"{found} is {_kind(prediction)}; it must be logits (K, H, W) of floats or a label map (H, W) of "
                f"integers"
            )
        if prediction.shape != mask.shape:
            raise ValueError(
                f"{found} is a label map of {_size(prediction)} beside a mask of {_size(mask)}; labels are not "
                f"resized: predict at the mask's size, or give the logits, which are"
            )
        num_classes = len(self.class_names)
        mask = mask.to(prediction.device)
        num_pixels = mask.numel()
        at_once = max(PIXELS_AT_ONCE, num_classes**2) if mask.device.type == "cpu" else num_pixels
        counts = torch.zeros(num_classes**2, dtype=torch.int64, device=mask.device)
        for truth, labels in zip(mask.flatten().split(at_once), prediction.flatten().split(at_once), strict=True):
            if truth.dtype != torch.int64:
                truth = truth.int()  # uint8 would compare ignore_index modulo 256
            valid = truth != self.ignore_index
            # Ignored pixels are counted as class 0 found as class 0 and taken off again: quicker than selecting
            # the others, as a product is quicker than masked_fill.
            truth, labels = self._checked(truth * valid, expected), self._checked(labels * valid, found)
            counts += torch.bincount(truth.mul_(num_classes).add_(labels), minlength=num_classes**2)
            counts[0] -= len(valid) - valid.sum()
        return counts.reshape(num_classes, num_classes)

    def _labels_of_logits(self, logits: Tensor, size: torch.Size, source: str) -> Tensor:
        num_classes = len(self.class_names)
        if len(logits) != num_classes:
            raise ValueError(
                f"{source} has {len(logits)} channels for {num_classes} classes; give the model and the metric the "
                f"classes of the data set being evaluated"
            )
        if logits.shape[1:] != size:
            # In float32 or better: logits rounded to 16 bits would tie.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits = F.interpolate(logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
        best, labels = logits.max(dim=0)
        if best.isnan().any():
            raise ValueError(
                f"{source} has logits that are NaN; every logit must be a number: did the training diverge?"
            )
        return labels

    def _checked(self, labels: Tensor, source: str) -> Tensor:
        """`labels` as int32, which holds the index of any matrix that fits into memory, and is quick to count."""
        last = len(self.class_names) - 1
        for label in map(int, labels.aminmax()):
            if not 0 <= label <= last:
                raise ValueError(
                    f"{source} holds {label}; there are {last + 1} classes, 0 to {last}, and in masks "
                    f"{self.ignore_index} for pixels to ignore: give the model, the masks and the metric the same "
                    f"classes, counted from 0"
                )
        return labels.int()

    def _computed(self) -> _Results:
        if self._results is None:
            raise ValueError("there are no results of the images added so far: call compute() first")
        return self._results


def _mean_iou(counts: Tensor) -> Tensor:
    """The mean IoU of one image over the classes that occur in it, of one element; -1 where none does."""
    found_or_true = counts.sum(dim=0) + counts.sum(dim=1)
    right = counts.diagonal()
    # Without a pixel of the class 0 is divided by 1: it adds nothing to the sum.
    total = (right / (found_or_true - right).clamp(min=1)).sum()
    occurring = (found_or_true > 0).sum()
    return torch.where(occurring > 0, total / occurring.clamp(min=1), -1.0)


def _mistake_in_names(names: Sequence[str], num_images: int, former: Mapping[str, Any]) -> str:
    """Why names cannot be those of a batch's images, after the `former` ones; "" where they can."""
    if isinstance(names, str) or len(names) != num_images:
        came = "one string" if isinstance(names, str) else f"{len(names)} names"
        return f"{came} came for {num_images} images"
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            return f"a name is of type {type(name).__name__}, no string"
        if name in former or name in seen:
            return f"the name {name!r} came twice"
        seen.add(name)
    return ""


def _without_scores(mistake: str) -> str:
    return (
        f"{mistake}: there are no scores of single images; give every image a name of its own. An image that really "
        f"came twice counts twice in the results: call reset() before a new evaluation, and in a distributed run use a "
        f"sampler that does not pad"
    )


def _is_label_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.numel() > 0 and value.dtype in LABEL_DTYPES


def _is_logits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.numel() > 0 and value.is_floating_point()


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _size(labels: Tensor) -> str:
    return "x".join(map(str, labels.shape))


def _number(value: float) -> str:
    return "-" if value == -1 else f"{value:.3f}"
