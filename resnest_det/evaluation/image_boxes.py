"""One image's ground truth and detections in arrays: what the metrics of detection read.

The tensors of a model and of a loader are checked here, and copied, so that none of them is kept. Masks are kept as
COCO's run lengths, of dense ones a thousandth of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from resnest_det.coco_format import EncodedMask, encoded_masks

MASK_THRESHOLD = 0.5  # of a pixel's probability, above which it belongs to the object

_ROUNDING = 1e-5  # of a box's largest coordinate: by how much boxes and boxes_xywh may differ


@dataclass(frozen=True, slots=True)
class ImageBoxes:
    """One image's N ground-truth objects and M detections, boxes as COCO's (x, y, width, height) in pixels.

    Both lists of masks are None where masks are not evaluated.
    """

    true_boxes_xywh: NDArray[np.float64]  # (N, 4)
    true_labels: NDArray[np.int64]  # (N,)
    true_areas: NDArray[np.float64]  # (N,), in pixels²
    true_crowds: NDArray[np.bool_]  # (N,)
    found_boxes_xywh: NDArray[np.float64]  # (M, 4)
    found_labels: NDArray[np.int64]  # (M,)
    found_scores: NDArray[np.float64]  # (M,)
    true_masks: list[EncodedMask] | None = None  # N of them
    found_masks: list[EncodedMask] | None = None  # M of them


def read_image_boxes(
    image_id: int,
    prediction: Mapping[str, Any],
    target: Mapping[str, Any],
    class_names: Mapping[int, str],
    *,
    masks: bool = False,
) -> ImageBoxes:
    """One image's values, checked and copied.

    Args:
        image_id: names the image in messages.
        prediction: as `CocoMeanAveragePrecision.update` takes it.
        target: as `CocoMeanAveragePrecision.update` takes it.
        class_names: each label's name.
        masks: read the masks too.

    Raises:
        ValueError: a key is missing, or what it holds is not what it should.
    """
    expected, found = f"target of image {image_id}", f"prediction for image {image_id}"
    true_boxes_xywh = _boxes_xywh(target, expected)
    found_boxes_xywh = _boxes_xywh(prediction, found)
    num_true, num_found = len(true_boxes_xywh), len(found_boxes_xywh)
    true_areas = true_boxes_xywh[:, 2] * true_boxes_xywh[:, 3]
    if "area" in target:
        true_areas = _one_per_box(target, "area", num_true, expected)
        _check_areas(true_areas, expected)
    true_masks = _masks(target, num_true, expected) if masks else None
    found_masks = _masks(prediction, num_found, found) if masks else None
    if true_masks and found_masks and true_masks[0]["size"] != found_masks[0]["size"]:
        raise ValueError(
            f"{found}: its masks are {_height_x_width(found_masks[0])} pixels, those of the target "
            f"{_height_x_width(true_masks[0])}; both must have the size of the image: did the model see it resized?"
        )
    return ImageBoxes(
        true_boxes_xywh=true_boxes_xywh,
        true_labels=_labels(target, num_true, class_names, expected),
        true_areas=true_areas,
        true_crowds=(
            _one_per_box(target, "iscrowd", num_true, expected).astype(np.bool_)
            if "iscrowd" in target
            else np.zeros(num_true, dtype=np.bool_)
        ),
        found_boxes_xywh=found_boxes_xywh,
        found_labels=_labels(prediction, num_found, class_names, found),
        found_scores=_one_per_box(prediction, "scores", num_found, found),
        true_masks=true_masks,
        found_masks=found_masks,
    )


def value_of(item: Mapping[str, Any], key: str, source: str) -> Any:
    """The value at `key`, or an error that says what `source` has instead."""
    if key not in item:
        raise ValueError(f"{source} has no {key!r}, only {sorted(item)}; {key!r} is needed")
    return item[key]


def _array(value: Any) -> NDArray[np.float64]:
    # On the CPU first, as not every device has float64; float32 and bfloat16 become float64 exactly.
    return torch.as_tensor(value).detach().cpu().double().numpy().copy()


def _boxes_xywh(item: Mapping[str, Any], source: str) -> NDArray[np.float64]:
    boxes_xyxy = _array(value_of(item, "boxes", source))
    if boxes_xyxy.ndim != 2 or boxes_xyxy.shape[1] != 4:
        raise ValueError(
            f"{source}: boxes has the shape {boxes_xyxy.shape}; it must be (N, 4), so (0, 4) without boxes"
        )
    _check_finite(boxes_xyxy, "boxes", source)
    sizes = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    if (sizes < 0).any():
        reversed_box = boxes_xyxy[(sizes < 0).any(axis=1)][0]
        raise ValueError(
            f"{source}: the box {reversed_box.tolist()} ends before it starts; boxes are xyxy (x1, y1, "
            f"x2, y2) in pixels: convert boxes given as (x, y, width, height)"
        )
    boxes_xywh = np.concatenate([boxes_xyxy[:, :2], sizes], axis=1)
    if "boxes_xywh" not in item:
        return boxes_xywh
    exact_xywh = _array(item["boxes_xywh"])
    if exact_xywh.shape != boxes_xywh.shape:
        raise ValueError(
            f"{source}: boxes_xywh has the shape {exact_xywh.shape} and boxes {boxes_xywh.shape}; they must be the "
            f"same boxes: where boxes are changed, leave boxes_xywh out"
        )
    _check_finite(exact_xywh, "boxes_xywh", source)
    differences = np.abs(exact_xywh - boxes_xywh)
    negative = exact_xywh[:, 2:] < 0
    if differences.max(initial=0) <= _ROUNDING and not negative.any():  # which spares most files what follows
        return exact_xywh
    tolerances = _ROUNDING * np.abs(boxes_xyxy).max(axis=1, initial=1)
    wrong = np.flatnonzero((differences.max(axis=1) > tolerances) | negative.any(axis=1))
    if len(wrong):
        given_xywh, given_xyxy = exact_xywh[wrong[0]].tolist(), boxes_xyxy[wrong[0]].tolist()
        raise ValueError(
            f"{source}: boxes_xywh has {given_xywh} where boxes has {given_xyxy}; "
            f"they must be the same boxes, once as (x, y, width, height) and once as xyxy: where boxes are changed, "
            f"leave boxes_xywh out"
        )
    return exact_xywh


def _labels(item: Mapping[str, Any], num_boxes: int, class_names: Mapping[int, str], source: str) -> NDArray[np.int64]:
    labels = _one_per_box(item, "labels", num_boxes, source)
    for label in labels.tolist():
        if label not in class_names:
            raise ValueError(
                f"{source}: label {label:g} is not in class_names, which has {len(class_names)} "
                f"labels from {min(class_names)} to {max(class_names)}; give the model and the "
                f"metric the classes of the data set being evaluated"
            )
    return labels.astype(np.int64)


def _one_per_box(item: Mapping[str, Any], key: str, num_boxes: int, source: str) -> NDArray[np.float64]:
    values = _array(value_of(item, key, source))
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


def _check_areas(areas: NDArray[np.float64], source: str) -> None:
    negative = areas[areas < 0]
    if len(negative):
        raise ValueError(
            f"{source}: area holds {negative[0]:g} ({len(negative)} of {len(areas)} are negative); an area is a number "
            f"of pixels² from 0: correct it, or leave area out for the boxes' own"
        )


def _masks(item: Mapping[str, Any], num_boxes: int, source: str) -> list[EncodedMask]:
    """The masks of one size as compressed run lengths, be they dense or run lengths already."""
    value = value_of(item, "masks", source)
    if not isinstance(value, (list, tuple)):
        return _encoded(_dense_masks(torch.as_tensor(value).detach(), num_boxes, source))
    if len(value) != num_boxes:
        raise ValueError(f"{source}: {len(value)} masks came beside {num_boxes} boxes; every box needs one")
    for number, mask in enumerate(value):
        _check_form(mask, number, source)
    encoded = encoded_masks([(mask["size"], mask["counts"]) for mask in value])
    masks: list[EncodedMask] = []
    for number, mask in enumerate(encoded):
        if mask is None:
            height, width = value[number]["size"]
            raise ValueError(
                f"{source}: masks[{number}] has the counts {str(value[number]['counts'])[:40]}, which make no mask of "
                f"{height} x {width} pixels; run lengths are numbers from 0 that add up to height x width, compressed "
                f"as pycocotools.mask.encode does it or not"
            )
        if masks and mask["size"] != masks[0]["size"]:
            raise ValueError(
                f"{source}: masks[{number}] is {_height_x_width(mask)} pixels and masks[0] "
                f"{_height_x_width(masks[0])}; all must have the size of the image"
            )
        masks.append(mask)
    return masks


def _dense_masks(masks: Tensor, num_boxes: int, source: str) -> Tensor:
    """(N, H, W) where each pixel's probability is in [0, 1]."""
    shape = tuple(masks.shape)
    if masks.ndim == 4 and shape[1] == 1:
        masks = masks.squeeze(1)
    if masks.ndim != 3 or len(masks) != num_boxes:
        raise ValueError(
            f"{source}: masks has the shape {shape} beside {num_boxes} boxes; it must be ({num_boxes}, height, width) "
            f"or ({num_boxes}, 1, height, width), or a list of run lengths"
        )
    if masks.dtype != torch.bool and masks.numel():
        low, high = masks.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{source}: masks holds values from {low:g} to {high:g}; they must be probabilities, or 0 and 1: is a "
                f"sigmoid missing, or did the training diverge?"
            )
    return masks


def _encoded(masks: Tensor) -> list[EncodedMask]:
    if not len(masks):
        return []
    # pycocotools wants (H, W, N) in Fortran's order, which is (N, W, H) in ours; turned where the model left them.
    columns = (masks > MASK_THRESHOLD).to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    encoded: list[EncodedMask] = coco_mask.encode(columns.T)
    return encoded


def _check_form(mask: Any, number: int, source: str) -> None:
    """Whether a mask has a size and counts of the right types."""
    if not isinstance(mask, Mapping) or "size" not in mask or "counts" not in mask:
        came = f"has the keys {sorted(mask)}" if isinstance(mask, Mapping) else f"is of the type {type(mask).__name__}"
        raise ValueError(
            f'{source}: masks[{number}] {came}; run lengths are {{"size": [height, width], "counts": ...}}, and dense '
            f"masks come as one tensor"
        )
    size, counts = mask["size"], mask["counts"]
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and _is_side(size[0]) and _is_side(size[1])):
        raise ValueError(f"{source}: masks[{number}] has the size {size!r}; it must be [height, width] in pixels")
    if not isinstance(counts, (str, bytes, list)):
        raise ValueError(
            f"{source}: masks[{number}] has counts of the type {type(counts).__name__}; they must be a list, or "
            f"compressed to a string"
        )


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _height_x_width(mask: EncodedMask) -> str:
    height, width = mask["size"]
    return f"{height} x {width}"
