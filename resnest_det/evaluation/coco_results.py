"""Files of detections in COCO's format of results: written, and read back as predictions.

The format is a list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}, in pixels; for masks also
"segmentation", run lengths {"size": [height, width], "counts": compressed string}. Ids are those of the annotation
file. Source: https://cocodataset.org/#format-results.
"""

from __future__ import annotations

import codecs
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from resnest_det.coco_format import EncodedMask, RunLengths, encoded_masks, syntax_error

_NUM_SHOWN = 5  # how many detections or ids a message lists
_MAX_COORDINATE = 1e9  # pixels; far above any image


class _Detection(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    score: float
    bbox: tuple[float, float, float, float] | None = None
    segmentation: msgspec.Raw = msgspec.Raw(b"null")  # decoded where it is needed


_decode_segmentation = msgspec.json.Decoder(RunLengths | None).decode


def write_coco_results(path: str | os.PathLike[str], detections: Sequence[Mapping[str, Any]]) -> None:
    """Write detections, such as those of `CocoMeanAveragePrecision.results_json`, as a file of results."""
    Path(path).write_bytes(msgspec.json.encode(detections))


def read_coco_results(
    path: str | os.PathLike[str], *, image_ids: Iterable[int], labels: Mapping[int, int], masks: bool = False
) -> dict[int, dict[str, Any]]:
    """The predictions that a file of results holds, for `CocoMeanAveragePrecision.update`.

    Args:
        path: the JSON file. An empty bbox is taken for none, and an id such as 5.0 for 5.
        image_ids: of the annotation file's images.
        labels: the annotation file's category id -> label.
        masks: read the segmentations too. Every detection must then have one.

    Returns:
        For each of the image ids "boxes" (M, 4) xyxy in pixels, float64, around the mask where a detection has no
        bbox; "boxes_xywh" (M, 4), the same as the file has them, to the last bit; "labels" (M,) int64; "scores" (M,)
        float64; and, with masks, "masks", a list of M run lengths. Detections of an image keep the file's order. Of a
        file that holds none it warns.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is no file of results of these images and categories; the message lists every kind of mistake.
    """
    path = Path(path)
    detections = _decode(path)
    if not detections:
        warnings.warn(
            f"{path} holds no detection, so no object counts as found; check that it is the right file, and that the "
            f"detector's score threshold lets some through",
            stacklevel=2,
        )
    found_masks, mistakes = _read_masks(detections, masks)
    # As columns, so that every rule is checked of all at once: COCO's validation set has half a million detections.
    places = {image_id: place for place, image_id in enumerate(dict.fromkeys(image_ids))}
    found_places = np.array([places.get(detection.image_id, -1) for detection in detections], np.int64)
    found_labels = np.array([labels.get(detection.category_id, -1) for detection in detections], np.int64)
    scores = np.array([detection.score for detection in detections], np.float64)
    boxes_xywh = np.array([detection.bbox or (0, 0, 0, 0) for detection in detections], np.float64).reshape(-1, 4)
    mistakes += _mistakes(detections, found_places < 0, found_labels < 0, boxes_xywh, labels)
    if mistakes:
        raise ValueError(
            f"{path} is no file of results for these annotations; detections count from 0:"
            + "".join(f"\n- {mistake}" for mistake in mistakes)
        )
    boxless = [place for place, detection in enumerate(detections) if detection.bbox is None]
    if boxless:
        boxes_xywh[boxless] = coco_mask.toBbox([found_masks[place] for place in boxless])
    boxes_xyxy = np.concatenate((boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]), axis=1)
    order = np.argsort(found_places, kind="stable")  # by image, each one's as in the file
    counts = np.bincount(found_places, minlength=len(places)).tolist()
    columns = {"boxes": boxes_xyxy, "boxes_xywh": boxes_xywh, "labels": found_labels, "scores": scores}
    by_image = [torch.from_numpy(column[order]).split(counts) for column in columns.values()]
    predictions: dict[int, dict[str, Any]] = {
        image_id: dict(zip(columns, values, strict=True)) for image_id, *values in zip(places, *by_image, strict=True)
    }
    if masks:
        in_order = iter(order.tolist())
        for prediction, count in zip(predictions.values(), counts, strict=True):
            prediction["masks"] = [found_masks[place] for place in itertools.islice(in_order, count)]
    return predictions


def _decode(path: Path) -> list[_Detection]:
    """The file's detections; every mistake of syntax or type ends here."""
    if not path.is_file():
        raise FileNotFoundError(
            f"the file of results {path} {'is a folder' if path.is_dir() else 'does not exist'}; give the JSON file "
            f"that a detector's detections were written to"
        )
    text = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not text:
        raise ValueError(f"{path} is empty; it should be a file of results, a list of detections in JSON")
    try:
        try:
            return msgspec.json.decode(text, type=list[_Detection])
        except msgspec.ValidationError:
            return _decode_each(path, text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise syntax_error(path, text, error) from None
    except RecursionError:
        raise ValueError(
            f"{path} nests lists or objects too deeply to be read; a file of results is a list of detections, none of "
            f"them deeper than its segmentation"
        ) from None


def _decode_each(path: Path, text: bytes) -> list[_Detection]:
    """The detections of a file that has some in another form: brought into the usual one, or all of them told."""
    try:
        entries = msgspec.json.decode(text, type=list[msgspec.Raw])
    except msgspec.ValidationError as error:
        hint = " (an object with annotations is an annotation file)" if b'"annotations"' in text else ""
        raise ValueError(f"{path}: {error} at its top{hint}; a file of results is a list of detections") from None
    detections, wrong = [], []
    for place, entry in enumerate(entries):
        try:
            detections.append(msgspec.json.decode(_usual_form(entry), type=_Detection))
        except (msgspec.ValidationError, UnicodeDecodeError) as reason:
            wrong.append(f"\n- detection {place}: {reason}")
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} of {len(entries)} detections cannot be read; each needs image_id, category_id, "
            f"score and bbox = [x, y, width, height] or a segmentation. The first, counted from 0:"
            f"{''.join(wrong[:_NUM_SHOWN])}"
        ) from None
    return detections


def _usual_form(entry: msgspec.Raw) -> bytes:
    """A detection without the empty bbox that pycocotools reads as none, and without the floats pandas makes of ids."""
    fields = msgspec.json.decode(entry, type=dict[str, msgspec.Raw])
    for key in ("image_id", "category_id"):
        value = msgspec.json.decode(fields.get(key, b"null"))
        if isinstance(value, float) and value.is_integer():
            fields[key] = msgspec.Raw(b"%d" % value)
    if bytes(fields.get("bbox", b"")).translate(None, b" \t\r\n") == b"[]":
        del fields["bbox"]
    return msgspec.json.encode(fields)


def _mistakes(
    detections: Sequence[_Detection],
    unknown_images: NDArray[np.bool_],
    unknown_categories: NDArray[np.bool_],
    boxes_xywh: NDArray[np.float64],
    labels: Mapping[int, int],
) -> list[str]:
    """Every rule on ids and boxes that some detections break, in the order in which they are first broken."""
    categories = f"category_id is none of the annotation file's {len(labels)} (ids {_listed(sorted(labels))})"
    if unknown_categories.any() and max(d.category_id for d in detections) <= len(labels) < max(labels):
        categories += "; labels, which count the categories from 1, must be turned into the file's ids"
    too_far = ~(np.abs(boxes_xywh).max(axis=1) <= _MAX_COORDINATE)
    rules: list[tuple[NDArray[np.bool_], str, Callable[[_Detection], object]]] = [
        (unknown_images, "image_id names no image of the annotation file", lambda found: found.image_id),
        (unknown_categories, categories, lambda found: found.category_id),
        (
            boxes_xywh[:, 2:].min(axis=1) < 0,
            "the width and height of bbox = [x, y, width, height] must not be negative; convert corners",
            lambda found: list(found.bbox or ()),
        ),
        (too_far, f"bbox must be within ± {_MAX_COORDINATE:g} pixels", lambda found: list(found.bbox or ())),
    ]
    broken = [(np.flatnonzero(wrong).tolist(), rule, value) for wrong, rule, value in rules if wrong.any()]
    return [
        _mistake(rule, [f"detection {place}: {value(detections[place])}" for place in places], len(detections))
        for places, rule, value in sorted(broken, key=lambda one: one[0][0])
    ]


def _read_masks(detections: Sequence[_Detection], masks: bool) -> tuple[dict[int, EncodedMask], list[str]]:
    """The masks of all detections, or of those without a box, by place; and what is wrong with them."""
    given: dict[int, RunLengths] = {}
    missing, malformed = [], []
    for place, detection in enumerate(detections):
        if not masks and detection.bbox is not None:
            continue
        try:
            run_lengths = _decode_segmentation(detection.segmentation)
        except (msgspec.ValidationError, UnicodeDecodeError) as error:
            malformed.append(f"detection {place}: {error}")
            continue
        if run_lengths is None:
            missing.append(f"detection {place}")
        else:
            given[place] = run_lengths
    found = dict(zip(given, encoded_masks([(mask.size, mask.counts) for mask in given.values()]), strict=True))
    senseless = [f"detection {place}: {str(given[place].counts)[:40]}" for place, mask in found.items() if mask is None]
    needed = "masks need a segmentation" if masks else "bbox and segmentation are missing; one is needed"
    form = (
        'segmentation must be run lengths, {"size": [height, width], "counts": ...}, as pycocotools.mask.encode gives'
    )
    sum_rule = "the counts of segmentation must be numbers from 0 that add up to height x width"
    rules = ((needed, missing), (form, malformed), (sum_rule, senseless))
    mistakes = [_mistake(rule, shown, len(detections)) for rule, shown in rules if shown]
    return {place: mask for place, mask in found.items() if mask is not None}, mistakes


def _mistake(rule: str, shown: Sequence[str], num_detections: int) -> str:
    return f"{len(shown)} of {num_detections} detections: {rule} ({_listed(shown)})"


def _listed(items: Sequence[object]) -> str:
    """The first few items, and how many more there are."""
    more = len(items) - _NUM_SHOWN
    return ", ".join(map(str, items[:_NUM_SHOWN])) + (f" and {more} more" if more > 0 else "")
