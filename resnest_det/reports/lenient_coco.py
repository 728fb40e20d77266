"""A COCO instances file read as far as it can be: arrays of what is there, and a list of what is not as it should be.

`data.coco` refuses a file at its first kinds of mistakes, as training must; here reading goes on. Entries are decoded
strictly first, many at a time; only those that fail are looked at key by key.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from resnest_det.coco_format import EncodedMask, RunLengths, encoded_masks, syntax_error
from resnest_det.data.files import describe_near

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]
Segmentation: TypeAlias = list[list[float]] | RunLengths | None

NO_ID = -(2**63)  # of an entry whose id cannot be read

_LARGEST_ID = 2**63 - 1
_LARGEST_SIDE = 2**31 - 1
_CHUNK = 1024  # annotations decoded before they are moved into the arrays
_SECTIONS = ("images", "annotations", "categories")
_ABSENT = object()
_FAR = 1e6  # pixels; pycocotools walks along a polygon's edges in steps of a fifth of a pixel

# The forms of a segmentation.
NO_MASK, POLYGONS, RUN_LENGTHS, MALFORMED = range(4)

_Id: TypeAlias = Annotated[int, msgspec.Meta(gt=NO_ID, le=_LARGEST_ID)]
_Side: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=_LARGEST_SIDE)]


class _Image(msgspec.Struct, gc=False):
    id: _Id
    file_name: Annotated[str, msgspec.Meta(min_length=1)]
    width: _Side
    height: _Side


class _Category(msgspec.Struct, gc=False):
    id: _Id
    name: str


class _Annotation(msgspec.Struct, gc=False):
    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool = 0
    segmentation: Segmentation = None


class Mistake(NamedTuple):
    """An entry that is not as it should be."""

    place: int  # in its list; -1 is the file itself
    reason: str


@dataclass
class CocoContent:
    """What a COCO instances file holds, in its order.

    Attributes:
        mistakes: by code: "json-broken", "json-nonstandard", "key-missing", "image-malformed",
            "annotation-malformed", "category-malformed" and "mask-malformed".
        image_ids: (I,); NO_ID where there is none.
        sizes: widths and heights, (I, 2); 0 where they are not known.
        file_names: I of them; "" where there is none.
        category_ids: (C,).
        category_names: C of them.
        annotation_ids: (A,).
        annotation_image_ids: (A,).
        annotation_category_ids: (A,).
        boxes_xywh: (A, 4); NaN where there is no number.
        has_box: whether bbox is a list of four, (A,).
        areas: (A,); NaN where there is none.
        iscrowd: (A,).
        mask_forms: NO_MASK, POLYGONS, RUN_LENGTHS or MALFORMED, (A,).
        mask_bounds_xyxy: (A, 4); NaN where there is no mask.
        mask_areas: (A,); NaN where there is no mask. Polygons count as if they did not overlap.
        mask_sizes: height and width of run lengths, (A, 2); 0 where there are none.
        texts: the annotations' JSON.
    """

    mistakes: dict[str, list[Mistake]] = field(default_factory=dict)
    image_ids: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    sizes: IntArray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    file_names: list[str] = field(default_factory=list)
    category_ids: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    category_names: list[str] = field(default_factory=list)
    annotation_ids: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    annotation_image_ids: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    annotation_category_ids: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    boxes_xywh: FloatArray = field(default_factory=lambda: np.zeros((0, 4)))
    has_box: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    areas: FloatArray = field(default_factory=lambda: np.zeros(0))
    iscrowd: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    mask_forms: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    mask_bounds_xyxy: FloatArray = field(default_factory=lambda: np.zeros((0, 4)))
    mask_areas: FloatArray = field(default_factory=lambda: np.zeros(0))
    mask_sizes: IntArray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    texts: list[msgspec.Raw] = field(default_factory=list)

    def add(self, code: str, place: int, reasons: Iterable[str]) -> None:
        """Note that the entry at this place is mistaken; nothing where there is no reason."""
        if reason := "; ".join(reasons):
            self.mistakes.setdefault(code, []).append(Mistake(place, reason))

    def encoded_mask(self, annotation: int, height: int, width: int) -> EncodedMask | None:
        """The mask of the annotation at that place in an image of that size, or None where it has none."""
        if self.mask_forms[annotation] == POLYGONS and height:
            polygons = msgspec.json.decode(self.texts[annotation])["segmentation"]
            return coco_mask.merge(coco_mask.frPyObjects([np.array(polygon) for polygon in polygons], height, width))
        if self.mask_forms[annotation] == RUN_LENGTHS and (*self.mask_sizes[annotation].tolist(),) == (height, width):
            counts = msgspec.json.decode(self.texts[annotation])["segmentation"]["counts"]
            return encoded_masks([((height, width), counts)])[0]
        return None


def read_leniently(path: Path) -> CocoContent:
    """Read a COCO instances file as far as it can be read.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"the annotation file {path} {what}; {describe_near(path, '.json')}")
    content = CocoContent()
    if not path.stat().st_size:
        content.add("json-broken", -1, ["the file is empty"])
        return content
    with path.open("rb") as file:
        # Not closed by hand: the undecoded annotations point into it. It goes when they do.
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sections = _sections(path, text, content)
    if "images" in sections:
        _read_images(sections["images"], content)
    if "categories" in sections:
        _read_categories(sections["categories"], content)
    if "annotations" in sections:
        _read_annotations(sections["annotations"], content)
    return content


def _sections(path: Path, text: mmap.mmap, content: CocoContent) -> dict[str, list[msgspec.Raw]]:
    """The file's three lists, of undecoded entries."""
    document = _document(path, text, content)
    if document is None:
        return {}
    sections = {}
    for name in _SECTIONS:
        if name not in document:
            content.add(
                "key-missing", -1, [f"{name} is missing; the file has the keys {', '.join(document) or 'none'}"]
            )
            continue
        try:
            sections[name] = msgspec.json.decode(document[name], type=list[msgspec.Raw])
        except msgspec.ValidationError as error:
            content.add("key-missing", -1, [f"{name} is no list ({error})"])
    return sections


def _document(path: Path, text: mmap.mmap, content: CocoContent) -> dict[str, msgspec.Raw] | None:
    try:
        return msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        hint = "; a list of detections is a results file" if text[:64].lstrip().startswith(b"[") else ""
        content.add("key-missing", -1, [f"{error} at its top{hint}"])
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        strict_error: Exception = syntax_error(path, text, error)
    except RecursionError as error:
        strict_error = error
    # Python reads more than JSON: NaN, Infinity, UTF-16, a byte order mark. What is no number becomes null.
    not_numbers: list[str] = []
    try:
        document = json.loads(bytes(text), parse_constant=not_numbers.append)
        renewed = msgspec.json.encode(document)
    except json.JSONDecodeError as error:
        excerpt = error.doc[max(0, error.pos - 30) : error.pos + 20]
        content.add("json-broken", -1, [f"line {error.lineno}, column {error.colno}: {error.msg}, near {excerpt!r}"])
        return None
    except (ValueError, RecursionError) as error:
        content.add("json-broken", -1, [f"{error}"])
        return None
    reason = f"{len(not_numbers)} times {', '.join(sorted(set(not_numbers)))}" if not_numbers else str(strict_error)
    content.add("json-nonstandard", -1, [reason])
    try:
        return msgspec.json.decode(renewed, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        content.add("key-missing", -1, [f"{error} at its top"])
        return None


def _read_images(section: Sequence[msgspec.Raw], content: CocoContent) -> None:
    ids, sizes, names = [], [], []
    for place, text in enumerate(section):
        try:
            image = msgspec.json.decode(text, type=_Image)
            ids.append(image.id)
            sizes.append((image.width, image.height))
            names.append(image.file_name)
        except (msgspec.ValidationError, UnicodeDecodeError):
            entry, reasons = _entry(text)
            ids.append(_id(entry, "id", reasons))
            width, height = _side(entry, "width", reasons), _side(entry, "height", reasons)
            sizes.append((width, height) if width and height else (0, 0))
            name = entry.get("file_name", _ABSENT)
            if not isinstance(name, str) or not name:
                reasons.append(_said("file_name", name, "text"))
                name = ""
            names.append(name)
            content.add("image-malformed", place, reasons)
    content.image_ids = np.array(ids, np.int64)
    content.sizes = np.array(sizes, np.int64).reshape(-1, 2)
    content.file_names = names


def _read_categories(section: Sequence[msgspec.Raw], content: CocoContent) -> None:
    ids = []
    for place, text in enumerate(section):
        try:
            category = msgspec.json.decode(text, type=_Category)
            ids.append(category.id)
            content.category_names.append(category.name)
        except (msgspec.ValidationError, UnicodeDecodeError):
            entry, reasons = _entry(text)
            ids.append(_id(entry, "id", reasons))
            name = entry.get("name", _ABSENT)
            if not isinstance(name, str):
                reasons.append(_said("name", name, "text"))
            content.category_names.append(name if isinstance(name, str) else f"category {ids[-1]}")
            content.add("category-malformed", place, reasons)
    content.category_ids = np.array(ids, np.int64)


def _read_annotations(section: list[msgspec.Raw], content: CocoContent) -> None:
    number = len(section)
    content.texts = section
    content.annotation_ids, content.annotation_image_ids, content.annotation_category_ids = np.empty(
        (3, number), np.int64
    )
    content.boxes_xywh = np.empty((number, 4))
    content.has_box = np.ones(number, np.bool_)
    content.areas = np.empty(number)
    content.iscrowd = np.empty(number, np.bool_)
    content.mask_forms = np.zeros(number, np.uint8)
    content.mask_bounds_xyxy = np.full((number, 4), np.nan)
    content.mask_areas = np.full(number, np.nan)
    content.mask_sizes = np.zeros((number, 2), np.int64)
    decode = msgspec.json.Decoder(_Annotation).decode
    for start in range(0, number, _CHUNK):
        texts = section[start : start + _CHUNK]
        try:
            chunk = [decode(text) for text in texts]
        except (msgspec.ValidationError, UnicodeDecodeError):
            chunk = [_annotation(text, place, content) for place, text in enumerate(texts, start)]
        part = slice(start, start + len(chunk))
        content.annotation_ids[part] = [annotation.id for annotation in chunk]
        content.annotation_image_ids[part] = [annotation.image_id for annotation in chunk]
        content.annotation_category_ids[part] = [annotation.category_id for annotation in chunk]
        content.boxes_xywh[part] = [annotation.bbox for annotation in chunk]
        content.areas[part] = [math.nan if annotation.area is None else annotation.area for annotation in chunk]
        content.iscrowd[part] = [bool(annotation.iscrowd) for annotation in chunk]
        _read_masks([annotation.segmentation for annotation in chunk], start, content)


def _annotation(text: msgspec.Raw, place: int, content: CocoContent) -> _Annotation:
    """One annotation, if need be key by key."""
    try:
        return msgspec.json.decode(text, type=_Annotation)
    except (msgspec.ValidationError, UnicodeDecodeError):
        entry, reasons = _entry(text)
    box = entry.get("bbox", _ABSENT)
    content.has_box[place] = isinstance(box, list) and len(box) == 4
    numbers = [_number(value) for value in box] if isinstance(box, list) else []
    if not content.has_box[place] or any(isinstance(value, str | list | dict | bool) for value in box):
        reasons.append(_said("bbox", box, "four numbers"))
    area = entry.get("area")
    if area is not None and (isinstance(area, bool) or not isinstance(area, int | float)):
        reasons.append(_said("area", area, "a number"))
    crowd = entry.get("iscrowd", 0)
    if not isinstance(crowd, int):
        reasons.append(_said("iscrowd", crowd, "0 or 1"))
    own_id, image_id, category_id = (_id(entry, key, reasons) for key in ("id", "image_id", "category_id"))
    content.add("annotation-malformed", place, reasons)
    segmentation: Segmentation = None
    try:
        segmentation = msgspec.convert(entry.get("segmentation"), Segmentation)
    except msgspec.ValidationError as error:
        content.add("mask-malformed", place, [str(error)])
        content.mask_forms[place] = MALFORMED
    x, y, width, height = numbers if content.has_box[place] else [math.nan] * 4
    return _Annotation(
        own_id,
        image_id,
        category_id,
        bbox=(x, y, width, height),
        area=_number(area),
        iscrowd=crowd == "1" or (isinstance(crowd, int) and crowd != 0),
        segmentation=segmentation,
    )


def _read_masks(segmentations: Sequence[Segmentation], start: int, content: CocoContent) -> None:
    """Measure the masks of the annotations from place `start` on."""
    owners: list[int] = []
    polygons: list[list[float]] = []
    runs: list[tuple[int, RunLengths]] = []
    for place, segmentation in enumerate(segmentations, start):
        if isinstance(segmentation, RunLengths):
            runs.append((place, segmentation))
        elif segmentation:
            wrong = [len(polygon) for polygon in segmentation if len(polygon) < 6 or len(polygon) % 2]
            if wrong:
                content.mask_forms[place] = MALFORMED
                content.add(
                    "mask-malformed", place, [f"a polygon of {wrong[0]} numbers, expected x, y of 3 points or more"]
                )
            else:
                content.mask_forms[place] = POLYGONS
                polygons += segmentation
                owners += [place] * len(segmentation)
    if polygons:
        _measure_polygons(np.array(owners), polygons, content)
    if runs:
        masks = encoded_masks([(run.size, run.counts) for _, run in runs])
        for (place, run), mask in zip(runs, masks, strict=True):
            content.mask_sizes[place] = run.size
            if mask is None:
                content.mask_forms[place] = MALFORMED
                reason = f"run lengths that do not add up to {run.size[0]} x {run.size[1]} pixels"
                content.add("mask-malformed", place, [reason])
                continue
            content.mask_forms[place] = RUN_LENGTHS
            left, top, width, height = coco_mask.toBbox(mask).tolist()
            content.mask_bounds_xyxy[place] = left, top, left + width, top + height
            content.mask_areas[place] = float(coco_mask.area(mask))


def _measure_polygons(owners: IntArray, polygons: Sequence[Sequence[float]], content: CocoContent) -> None:
    """Bounds and area of the annotations at the places `owners`, which rise, (P,), one for each polygon."""
    num_points = np.fromiter(map(len, polygons), np.int64, len(polygons)) // 2
    coordinates = np.fromiter(itertools.chain.from_iterable(polygons), np.float64, 2 * int(num_points.sum()))
    x, y = coordinates[0::2], coordinates[1::2]
    starts = np.cumsum(num_points) - num_points
    following = np.arange(1, len(x) + 1)
    following[starts + num_points - 1] = starts
    doubled_areas = np.add.reduceat(x * y[following] - x[following] * y, starts)  # the shoelace formula
    first_polygons = np.flatnonzero(np.diff(owners, prepend=-1))
    places, first_points = owners[first_polygons], starts[first_polygons]
    content.mask_areas[places] = np.add.reduceat(np.abs(doubled_areas), first_polygons) / 2
    for column, (axis, extreme) in enumerate(((x, np.minimum), (y, np.minimum), (x, np.maximum), (y, np.maximum))):
        content.mask_bounds_xyxy[places, column] = extreme.reduceat(axis, first_points)
    for place in places[np.abs(content.mask_bounds_xyxy[places]).max(axis=1) > _FAR].tolist():
        content.mask_forms[place] = MALFORMED
        content.add("mask-malformed", place, [f"a polygon beyond ±{_FAR:g} pixels"])


def _entry(text: msgspec.Raw) -> tuple[dict[str, Any], list[str]]:
    """An entry's keys and values, and what is wrong so far."""
    try:
        entry = msgspec.json.decode(text)
    except UnicodeDecodeError as error:
        return {}, [f"it is not UTF-8 text ({error})"]
    return (entry, []) if isinstance(entry, dict) else ({}, [f"it is {_shown(entry)}, expected an object"])


def _id(entry: dict[str, Any], key: str, reasons: list[str]) -> int:
    """The id under the key; NO_ID where it is no whole number, even as text."""
    value = entry.get(key, _ABSENT)
    if isinstance(value, int) and not isinstance(value, bool) and NO_ID < value <= _LARGEST_ID:
        return value
    reasons.append(_said(key, value, "an integer of 64 bits"))
    try:
        number = int(value) if isinstance(value, str | float) else NO_ID
    except (ValueError, OverflowError):
        return NO_ID
    return number if NO_ID < number <= _LARGEST_ID and number == _number(value) else NO_ID


def _side(entry: dict[str, Any], key: str, reasons: list[str]) -> int:
    """The width or height under the key; 0 where it is none."""
    value = entry.get(key, _ABSENT)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_SIDE:
        return value
    reasons.append(_said(key, value, f"an integer from 1 to {_LARGEST_SIDE}"))
    return 0


def _number(value: Any) -> float:
    """The value as a number, also of text; NaN where it is none."""
    try:
        return math.nan if isinstance(value, bool | list | dict | None) else float(value)
    except (ValueError, OverflowError):
        return math.nan


def _said(key: str, value: Any, rule: str) -> str:
    return f"{key} is missing" if value is _ABSENT else f"{key} is {_shown(value)}, expected {rule}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
