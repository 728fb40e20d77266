"""Every mistake of a data set in COCO's format at once: its files, images, boxes, masks, classes and splits."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from resnest_det.coco_format import EncodedMask
from resnest_det.data.files import UnreadableImageError, describe_near, listed, read_rgb
from resnest_det.data.mask_folder import IMAGE_SUFFIXES
from resnest_det.data.mixing import MIN_BOX_SIDE
from resnest_det.reports.anchor_fit import Anchors, better_anchors
from resnest_det.reports.data_doctor import (
    NUM_EXAMPLES,
    DataReport,
    Finding,
    Occurrence,
    Severity,
    SplitFindings,
    SplitSummary,
    in_order,
)
from resnest_det.reports.image_files import OpenedImage, SplitImages, compare_images, in_processes, open_image, repeated
from resnest_det.reports.lenient_coco import NO_ID, NO_MASK, POLYGONS, RUN_LENGTHS, CocoContent, read_leniently
from resnest_det.visualize import draw_boxes
from resnest_det.visualize.pictures import Picture

Place: TypeAlias = int  # of an image, an annotation or a category in its file's list

_MAX_COORDINATE = 1e9  # pixels, beyond which CocoDetection refuses a box
_TOLERANCE = 1.0  # pixels that boxes and polygons may reach beyond their image, as by rounding
_LEAST_BOXES = 20  # from which on a format is guessed
_WRONG_FORMAT = 0.2  # share of boxes beyond their image that makes one look whether they are corners
_SAME_BOX = 0.8  # IoU from which on bbox and the box of the mask are one
_SAME_BOX_TOLERANCE = 2.0  # pixels, each side
_IMBALANCE = 50  # times as many objects, from which on it is said
_POOR_FIT = 0.5  # share of objects below an IoU of 0.5 with every anchor, from which on it is a warning
_DRAWN_SIDE = 640  # pixels; a larger image is reduced before boxes are drawn
_MOST_PIXELS = 2**27  # of a mask that is drawn


@dataclass
class _Split:
    """A split, what its files hold, and what was found in it."""

    name: str
    folder: Path
    annotation_file: Path
    content: CocoContent
    findings: SplitFindings
    image_indices: NDArray[np.int64]  # (A,): the place of each annotation's image, -1 where there is none
    category_indices: NDArray[np.int64]  # (A,)
    present: NDArray[np.bool_]  # (I,): the file is in the folder
    files: list[OpenedImage] | None = None  # of the images; None where none was opened
    digests: Sequence[bytes] = ()  # of the images, or none
    wrong_annotations: dict[str, NDArray[np.bool_]] = field(default_factory=dict)  # by code, (A,)

    def image_example(self, place: Place, detail: str) -> Occurrence:
        name = self.content.file_names[place] if place >= 0 else ""
        return Occurrence(name or f"{self.annotation_file.name}, images[{place}]", None, detail)

    def annotation_example(self, place: Place, detail: str) -> Occurrence:
        image, annotation_id = self.image_indices[place], int(self.content.annotation_ids[place])
        name = self.content.file_names[image] if image >= 0 else ""
        if annotation_id == NO_ID:
            return Occurrence(name or self.annotation_file.name, None, f"annotations[{place}]: {detail}")
        return Occurrence(name or self.annotation_file.name, annotation_id, detail)

    def add_images(
        self, code: str, wrong: NDArray[np.bool_], detail: Callable[[Place], str], severity: Severity | None = None
    ) -> None:
        """Take up what is wrong with images, (I,)."""
        places = np.flatnonzero(wrong)
        examples = (self.image_example(place, detail(place)) for place in places.tolist())
        self.findings.add(code, len(places), examples, images=places, severity=severity)

    def add_annotations(
        self, code: str, wrong: NDArray[np.bool_], detail: Callable[[Place], str], severity: Severity | None = None
    ) -> None:
        """Take up what is wrong with annotations, (A,)."""
        places = np.flatnonzero(wrong)
        examples = (self.annotation_example(place, detail(place)) for place in places.tolist())
        self.findings.add(code, len(places), examples, images=self.image_indices[places], severity=severity)
        if severity != "info" and len(places):
            self.wrong_annotations[code] = wrong

    def image_sizes(self) -> NDArray[np.int64]:
        """Width and height of each annotation's image, (A, 2); 0 where they are not known."""
        sizes = np.zeros((len(self.image_indices), 2), np.int64)
        known = self.image_indices >= 0
        sizes[known] = self.content.sizes[self.image_indices[known]]
        return sizes

    def box_detail(self, place: Place) -> str:
        """bbox, and the size of its image."""
        numbers = ", ".join(f"{number:g}" for number in self.content.boxes_xywh[place].tolist())
        image = self.image_indices[place]
        width, height = self.content.sizes[image].tolist() if image >= 0 else (0, 0)
        return f"bbox [{numbers}]" + (f" in {width} x {height}" if width else "")


@np.errstate(over="ignore", invalid="ignore")  # of numbers that are far too large, which are reported
def examine_coco(
    splits: Mapping[str, tuple[str | os.PathLike[str], str | os.PathLike[str]]],
    *,
    masks: bool = False,
    anchors: Anchors | None = None,
    decode: bool = True,
    num_workers: int | None = None,
    num_pictures: int = 12,
    progress: bool = True,
) -> DataReport:
    """Examine a data set of COCO instances files and their images.

    Nothing is refused: files are read as far as they can be, and every mistake is reported with its first examples.

    Args:
        splits: for each split's name, the folder that file names are relative to and the annotation file. The first
            split is what is trained on.
        masks: the objects' masks are trained on, so that what is wrong with them are errors.
        anchors: the detector's, which are held against the objects of the first split; None for none.
        decode: open every image: whether it can be decoded, its size, and by its content's hash whether it comes twice.
            False only looks for the files.
        num_workers: processes that open images; 0 opens them in this one, None takes one a core.
        num_pictures: images drawn by the report's `draw`, shared by the splits.
        progress: show a progress bar on stderr, in a terminal only.

    Returns:
        The report.

    Raises:
        FileNotFoundError: a folder or an annotation file does not exist.
        ValueError: there is no split.
    """
    if not splits:
        raise ValueError("splits is empty; name at least one, with its folder of images and its annotation file")
    opened = [_open_split(name, Path(folder), Path(file)) for name, (folder, file) in splits.items()]
    training = opened[0]
    for split in opened:
        _check_file(split)
        _check_ids(split)
        _check_images_exist(split, opened)
        if decode:
            _check_images(split, num_workers, progress)
        _check_repeated_images(split)
        _check_boxes(split)
        _check_masks(split, trained=masks)
        _check_crowds(split, trained=split is training)
    between = [
        *_compare_categories(opened),
        *compare_images([SplitImages(s.findings, s.folder, s.content.file_names, s.digests) for s in opened]),
    ]
    _check_classes(opened)
    if anchors is not None:
        _check_anchors(training, anchors)
    return DataReport(
        splits={split.name: _summary(split) for split in opened},
        findings=in_order([*(finding for split in opened for finding in split.findings.findings), *between]),
        drawings=tuple(drawing for split in opened for drawing in _drawings(split, -(-num_pictures // len(opened)))),
    )


def _open_split(name: str, folder: Path, file: Path) -> _Split:
    if not folder.is_dir():
        raise FileNotFoundError(f"the image folder {folder} does not exist; {describe_near(folder, '')}")
    content = read_leniently(file)
    return _Split(
        name,
        folder,
        file,
        content,
        SplitFindings(name, len(content.image_ids)),
        image_indices=_places(content.annotation_image_ids, content.image_ids),
        category_indices=_places(content.annotation_category_ids, content.category_ids),
        present=np.zeros(len(content.image_ids), np.bool_),
    )


def _check_file(split: _Split) -> None:
    """Take up what could not be read."""
    content, file = split.content, split.annotation_file.name
    for code, mistakes in content.mistakes.items():
        places = np.array([mistake.place for mistake in mistakes])
        if code in ("annotation-malformed", "mask-malformed"):
            continue
        examples = (
            split.image_example(mistake.place, mistake.reason)
            if code == "image-malformed"
            else Occurrence(file if mistake.place < 0 else f"{file}, categories[{mistake.place}]", None, mistake.reason)
            for mistake in mistakes
        )
        split.findings.add(code, len(mistakes), examples, images=places if code == "image-malformed" else ())
    _add_mistakes(split, "annotation-malformed", None)
    unreadable = {"json-broken", "key-missing"} & content.mistakes.keys()
    if not unreadable and not len(content.image_ids):
        split.findings.add("no-images", 1, [Occurrence(file, None, "images is an empty list")])
    if not unreadable and not len(content.category_ids):
        split.findings.add("no-categories", 1, [Occurrence(file, None, "categories is an empty list")])


def _add_mistakes(split: _Split, code: str, severity: Severity | None) -> None:
    """Take up the annotations that could not be read."""
    mistakes = {mistake.place: mistake.reason for mistake in split.content.mistakes.get(code, ())}
    wrong = np.zeros(len(split.image_indices), np.bool_)
    wrong[list(mistakes)] = True
    split.add_annotations(code, wrong, lambda place: mistakes[place], severity)


def _check_ids(split: _Split) -> None:
    content, file = split.content, split.annotation_file.name
    ids = content.image_ids
    split.add_images("image-id-twice", _repeats(ids), lambda place: f"id {ids[place]} was used before")
    annotation_ids = content.annotation_ids
    split.add_annotations("annotation-id-twice", _repeats(annotation_ids), lambda _: "the id was used before")
    categories = list(zip(content.category_ids.tolist(), content.category_names, strict=True))
    for code, wrong in (
        ("category-id-twice", _repeats(content.category_ids)),
        (
            "category-name-twice",
            np.array(
                [content.category_names.index(name) < place for place, (_, name) in enumerate(categories)], np.bool_
            ),
        ),
    ):
        shown = [categories[place] for place in np.flatnonzero(wrong)]
        examples = [Occurrence(file, None, f"id {category_id}, {name!r}") for category_id, name in shown]
        split.findings.add(code, len(shown), examples)
    image_ids, category_ids = content.annotation_image_ids, content.annotation_category_ids
    split.add_annotations(
        "annotation-without-image",
        (split.image_indices < 0) & (image_ids != NO_ID),
        lambda place: f"image_id {image_ids[place]}",
    )
    split.add_annotations(
        "annotation-without-category",
        (split.category_indices < 0) & (category_ids != NO_ID),
        lambda place: f"category_id {category_ids[place]}",
    )
    empty = np.bincount(split.image_indices[split.image_indices >= 0], minlength=len(ids)) == 0
    severity: Severity | None = "warning" if 2 * empty.sum() > len(ids) else None
    split.add_images("image-without-annotations", empty, lambda place: f"id {ids[place]}", severity)


def _check_images_exist(split: _Split, splits: Sequence[_Split]) -> None:
    """Compare the names with the folders' listings: a stat an image takes minutes on a network."""
    names = split.content.file_names
    leaving = np.array([_leaves_folder(name) for name in names], np.bool_)
    split.add_images("file-name-outside", leaving, lambda place: f"file_name {names[place]!r}")
    parents = {posixpath.dirname(name) for name in names if not _leaves_folder(name)}
    in_folder, unreadable = _listing(split.folder, parents)
    split.present = np.array([name in in_folder for name in map(posixpath.normpath, names)], np.bool_) & ~leaving
    near = {name.lower().rpartition(".")[0]: name for name in in_folder}

    def detail(place: Place) -> str:
        if reason := unreadable.get(posixpath.dirname(names[place])):
            return reason
        other = near.get(names[place].lower().rpartition(".")[0])
        return f"the folder has {other}" if other else f"id {split.content.image_ids[place]}"

    named = np.array([name != "" for name in names], np.bool_)
    split.add_images("image-missing", ~split.present & ~leaving & named, detail)
    beside = [other for other in splits if other.folder.samefile(split.folder)]
    if beside[0] is not split:
        return  # one folder serves several splits, and its other images were taken up with the first
    listed_names = {posixpath.normpath(name) for other in beside for name in other.content.file_names}
    unlisted = sorted(name for name in in_folder - listed_names if name.lower().endswith(IMAGE_SUFFIXES))
    split.findings.add(
        "image-unlisted", len(unlisted), [Occurrence(name, None, "in no file") for name in unlisted[:NUM_EXAMPLES]]
    )


def _check_images(split: _Split, num_workers: int | None, progress: bool) -> None:
    """Open every image that is there."""
    content = split.content
    places = np.flatnonzero(split.present)
    paths = [str(split.folder / content.file_names[place]) for place in places]
    found = in_processes(open_image, paths, description=split.name, num_workers=num_workers, progress=progress)
    unknown = OpenedImage("", 0, 0, 1, b"")
    files = [unknown] * len(content.file_names)
    for place, file in zip(places.tolist(), found, strict=True):
        files[place] = file
    split.files, split.digests = files, [file.digest for file in files]

    broken = np.array([bool(file.error) for file in files], np.bool_)
    split.add_images("image-broken", broken, lambda place: files[place].error)
    stored = np.array([(file.width, file.height) for file in files], np.int64).reshape(-1, 2)
    turned = np.array([file.turned_size for file in files], np.int64).reshape(-1, 2)
    has_tag = np.array([file.orientation != 1 for file in files], np.bool_)
    comparable = split.present & ~broken & (content.sizes[:, 0] > 0)
    as_stored, as_turned = ((sizes == content.sizes).all(axis=1) for sizes in (stored, turned))

    def detail(place: Place) -> str:
        (width, height), (said_width, said_height) = stored[place].tolist(), content.sizes[place].tolist()
        text = f"the file is {width} x {height}, the annotations say {said_width} x {said_height}"
        tag = f", EXIF orientation {files[place].orientation}" if has_tag[place] else ""
        swapped = "; width and height are exchanged" if (width, height) == (said_height, said_width) and not tag else ""
        return text + tag + swapped

    split.add_images("size-mismatch", comparable & ~as_stored & ~as_turned, detail)
    split.add_images("exif-ambiguous", comparable & has_tag & as_stored, detail)
    split.add_images("exif-rotated", comparable & has_tag & ~as_stored & as_turned, detail)


def _check_repeated_images(split: _Split) -> None:
    content = split.content
    digests = split.digests or [b""] * len(content.file_names)
    groups = repeated(digests, content.file_names)
    if not groups:
        return
    order = np.argsort(split.image_indices, kind="stable")
    ends = np.searchsorted(split.image_indices[order], np.arange(len(content.file_names)), side="right")
    starts = np.searchsorted(split.image_indices[order], np.arange(len(content.file_names)))

    def annotations_of(image: Place) -> Counter[Any]:
        own = order[starts[image] : ends[image]]
        return Counter(
            zip(
                content.annotation_category_ids[own].tolist(),
                map(tuple, content.boxes_xywh[own].round(2).tolist()),
                strict=True,
            )
        )

    examples = []
    for first, *others in groups:
        for other in others:
            annotations = "the same" if annotations_of(first) == annotations_of(other) else "other"
            by_name = content.file_names[first] == content.file_names[other]
            same = "one name" if by_name else f"the content of {content.file_names[first]}"
            detail = (
                f"{same} and {annotations} annotations (ids {content.image_ids[first]} and {content.image_ids[other]})"
            )
            examples.append((annotations == "the same", split.image_example(other, detail)))
    examples.sort(key=lambda example: example[0])  # those that contradict one another first
    places = [place for group in groups for place in group]
    split.findings.add("image-twice", len(examples), [example for _, example in examples], images=places)


def _check_boxes(split: _Split) -> None:
    content = split.content
    boxes, detail = content.boxes_xywh, split.box_detail
    finite = np.isfinite(boxes).all(axis=1) & (np.abs(boxes) <= _MAX_COORDINATE).all(axis=1)
    split.add_annotations("box-not-finite", content.has_box & ~finite, detail)
    with np.errstate(invalid="ignore"):
        negative = finite & (boxes[:, 2:].min(axis=1) < 0)
    split.add_annotations("box-negative", negative, detail)

    limits = split.image_sizes()
    sound = finite & ~negative
    in_image = sound & (limits[:, 0] > 0)
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    with np.errstate(invalid="ignore"):
        over_edge = in_image & ((corners[:, :2] < -_TOLERANCE) | (corners[:, 2:] > limits + _TOLERANCE)).any(axis=1)
        outside = in_image & ((corners[:, 2:] <= 0) | (corners[:, :2] >= limits)).any(axis=1)
        clipped = np.clip(corners, 0, np.tile(limits, 2))
        # Rounded, since 1.8 + 1 - 1.8 is a little less than 1.
        thin = (np.round(clipped[:, 2:] - clipped[:, :2], 6) < MIN_BOX_SIDE).any(axis=1)
        degenerate = (in_image & thin & ~outside) | (sound & (boxes[:, 2:] <= 0).any(axis=1))
    if wrong_format := _other_format(boxes, limits, in_image, over_edge):
        split.add_annotations("box-format", in_image, lambda place: f"{detail(place)}; {wrong_format}")
    else:
        split.add_annotations("box-outside", outside & ~degenerate, detail)
        split.add_annotations("box-over-edge", over_edge & ~outside, detail)
        split.add_annotations("box-degenerate", degenerate, detail)

    # The same image, class and box: neighbours in the order of all three.
    keys = np.column_stack((split.image_indices, split.category_indices, boxes.round(2)))
    order = np.lexsort(keys.T)
    same = np.zeros(len(boxes), np.bool_)
    same[order[1:]] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    twice = same & finite & (split.image_indices >= 0)
    split.add_annotations("annotation-twice", twice, detail)


def _other_format(
    boxes: NDArray[np.float64],
    limits: NDArray[np.int64],
    in_image: NDArray[np.bool_],
    over_edge: NDArray[np.bool_],
) -> str:
    """What format the boxes seem to have, if not x, y, width, height in pixels; else ""."""
    given, sizes = boxes[in_image], limits[in_image]
    if len(given) < _LEAST_BOXES:
        return ""
    if (given <= 1).all() and (given >= 0).all():
        return "all are within 0 and 1, like fractions of the image"
    is_corners = (given[:, 2:] >= given[:, :2]) & (given[:, 2:] <= sizes + _TOLERANCE)
    if over_edge[in_image].mean() > _WRONG_FORMAT and is_corners.all():
        return "the last two numbers seem to be a corner, x2 and y2, not width and height"
    return ""


def _check_masks(split: _Split, *, trained: bool) -> None:
    content = split.content
    forms = content.mask_forms
    severity: Severity | None = "error" if trained else None
    if trained or (forms != NO_MASK).any():
        split.add_annotations("mask-missing", forms == NO_MASK, split.box_detail, severity)
    _add_mistakes(split, "mask-malformed", severity)
    limits = split.image_sizes()
    sized = limits[:, 0] > 0
    other_size = (forms == RUN_LENGTHS) & sized & (content.mask_sizes[:, ::-1] != limits).any(axis=1)

    def size_detail(place: Place) -> str:
        (height, width), (said_width, said_height) = content.mask_sizes[place].tolist(), limits[place].tolist()
        return f"run lengths of {width} x {height}, the image is {said_width} x {said_height}"

    split.add_annotations("mask-size", other_size, size_detail, severity)
    bounds = content.mask_bounds_xyxy
    x1, y1, width, height = content.boxes_xywh.T
    boxes = np.stack((x1, y1, x1 + width, y1 + height), axis=1)

    def bounds_detail(place: Place) -> str:
        numbers = ", ".join(f"{number:g}" for number in bounds[place].round(2).tolist())
        return f"segmentation from x, y to x, y [{numbers}], {split.box_detail(place)}"

    with np.errstate(invalid="ignore", divide="ignore"):
        beyond = sized & ((bounds[:, :2] < -_TOLERANCE) | (bounds[:, 2:] > limits + _TOLERANCE)).any(axis=1)
        split.add_annotations("polygon-outside", beyond, bounds_detail)
        apart = (np.abs(bounds - boxes) > _SAME_BOX_TOLERANCE).any(axis=1)
        mismatch = ~other_size & apart & (_ious(bounds, boxes) < _SAME_BOX)
        split.add_annotations("mask-box-mismatch", mismatch, bounds_detail)
        # Pixels are counted, or an outline is measured: they differ by what lies on the outline.
        box_area, outline = width * height, width + height + 1
        areas, mask_areas = content.areas, content.mask_areas
        too_large = areas > 1.1 * box_area + outline
        unlike = np.abs(areas - mask_areas) > 0.5 * np.maximum(areas, mask_areas) + outline
        wrong_area = (width > 0) & (height > 0) & ((areas <= 0) | too_large | unlike)

    def area_detail(place: Place) -> str:
        of_mask = f", of the segmentation {mask_areas[place]:g}" if np.isfinite(mask_areas[place]) else ""
        return f"area {areas[place]:g}, of the box {box_area[place]:g}{of_mask}"

    split.add_annotations("area-mismatch", wrong_area, area_detail)


def _check_crowds(split: _Split, *, trained: bool) -> None:
    content = split.content
    crowds = content.iscrowd
    mostly = len(crowds) > 0 and crowds.mean() > 0.5
    split.add_annotations("crowd-region", crowds, split.box_detail, "warning" if mostly else "info")
    if trained and len(content.image_ids):
        usable = ~crowds & content.has_box & ~_has_wrong_box(split) & (split.category_indices >= 0)
        known = split.image_indices >= 0
        usable &= known
        usable[known] &= split.present[split.image_indices[known]]
        if not usable.any():
            detail = f"{len(crowds)} annotations, {int(crowds.sum())} of them crowds"
            split.findings.add("no-objects", 1, [Occurrence(split.annotation_file.name, None, detail)])


def _has_wrong_box(split: _Split) -> NDArray[np.bool_]:
    """Which annotations have a box that training refuses or drops, (A,)."""
    wrong = np.zeros(len(split.image_indices), np.bool_)
    for code in ("box-not-finite", "box-negative", "box-degenerate", "box-outside"):
        wrong |= split.wrong_annotations.get(code, False)
    return wrong


def _compare_categories(splits: Sequence[_Split]) -> list[Finding]:
    """Splits whose lists of categories are not those of the first."""
    findings = []
    first = splits[0]
    ours = dict(zip(first.content.category_ids.tolist(), first.content.category_names, strict=True))
    for split in splits[1:]:
        theirs = dict(zip(split.content.category_ids.tolist(), split.content.category_names, strict=True))
        differing = sorted({category_id for category_id, _ in ours.items() ^ theirs.items()})
        if ours and theirs and differing:
            examples = [
                Occurrence(
                    "", None, f"id {i}: {ours.get(i, 'none')} in {first.name}, {theirs.get(i, 'none')} in {split.name}"
                )
                for i in differing[:NUM_EXAMPLES]
            ]
            pair = f"{first.name}, {split.name}"
            findings.append(Finding("categories-differ", "error", pair, len(differing), tuple(examples)))
    return findings


def _class_counts(split: _Split) -> dict[str, int]:
    """Objects of each class, crowds not counted."""
    objects = split.category_indices[(split.category_indices >= 0) & ~split.content.iscrowd]
    numbers = np.bincount(objects, minlength=len(split.content.category_names)).tolist()
    counts = dict.fromkeys(split.content.category_names, 0)
    for name, number in zip(split.content.category_names, numbers, strict=True):
        counts[name] += number  # a name may come twice
    return counts


def _check_classes(splits: Sequence[_Split]) -> None:
    counts = [_class_counts(split) for split in splits]
    total = sum((Counter(each) for each in counts), Counter())
    first = splits[0]
    unused = [name for name in counts[0] if not total[name]]
    first.findings.add("category-unused", len(unused), [Occurrence("", None, listed(unused))])
    ids = np.unique(first.content.category_ids[first.content.category_ids != NO_ID])
    least, greatest = (int(ids[0]), int(ids[-1])) if len(ids) else (0, -1)
    if holes := greatest - least + 1 - len(ids):
        detail = f"{len(ids)} ids from {least} to {greatest}"
        first.findings.add("category-ids-have-holes", holes, [Occurrence("", None, detail)])
    for split, own in zip(splits, counts, strict=True):
        absent = [name for name, count in own.items() if not count and total[name]]
        examples = [Occurrence("", None, f"{name}: none here, {total[name]} elsewhere") for name in absent]
        split.findings.add("class-absent", len(absent), examples, severity="warning" if split is first else "info")
    present = {name: count for name, count in counts[0].items() if count}
    if present and max(present.values()) >= _IMBALANCE * min(present.values()):
        most = max(present, key=lambda name: present[name])
        rarest = sorted(present, key=lambda name: present[name])
        rare = [name for name in rarest if _IMBALANCE * present[name] <= present[most]]
        examples = [Occurrence("", None, f"objects: {name} {present[name]}, {most} {present[most]}") for name in rare]
        first.findings.add("class-imbalance", len(rare), examples)


def _check_anchors(split: _Split, anchors: Anchors) -> None:
    content = split.content
    sizes, image_sizes = content.boxes_xywh[:, 2:], split.image_sizes()
    with np.errstate(invalid="ignore"):
        known = np.isfinite(sizes).all(axis=1) & (sizes >= MIN_BOX_SIDE).all(axis=1)
    known &= (image_sizes[:, 0] > 0) & ~content.iscrowd & ~_has_wrong_box(split)
    if not known.any() or "box-format" in split.wrong_annotations:
        return
    objects = anchors.resized(sizes[known], image_sizes[known])
    ious = anchors.best_ious(objects)
    better = better_anchors(objects, anchors)
    sides = np.quantile(np.sqrt(objects.prod(axis=1)), (0.05, 0.5, 0.95)).round().astype(int).tolist()
    examples = [
        Occurrence("", None, f"{len(objects)} objects, sides of {sides[0]} to {sides[2]} px (median {sides[1]})"),
        Occurrence("", None, f"sizes {list(anchors.sizes)}, aspect ratios {list(anchors.aspect_ratios)}: {_fit(ious)}"),
    ]
    suggestion = ""
    if better is not None:
        suggestion = better.overrides(anchors)
        examples.append(Occurrence("", None, f"as suggested: {_fit(better.best_ious(objects))}"))
    poor = better is not None and (ious < 0.5).mean() >= _POOR_FIT
    split.findings.add(
        "anchors",
        len(objects),
        examples,
        severity="warning" if poor else None,
        suggestion=suggestion,
    )


def _fit(ious: NDArray[np.float64]) -> str:
    return f"best IoU below 0.5 for {(ious < 0.5).mean():.0%} of the objects, below 0.3 for {(ious < 0.3).mean():.0%}"


def _summary(split: _Split) -> SplitSummary:
    content = split.content
    counts = _class_counts(split)
    numbers: dict[str, Any] = {
        "images": len(content.image_ids),
        "annotations": len(content.annotation_ids),
        "crowd_regions": int(content.iscrowd.sum()),
        "classes": counts,
        "image_folder": str(split.folder),
        "annotation_file": str(split.annotation_file),
    }
    description = (
        f"{split.annotation_file}: {numbers['images']} images, {numbers['annotations']} annotations "
        f"({numbers['crowd_regions']} crowd regions), {len(content.category_ids)} classes"
    )
    return SplitSummary(description, numbers)


@dataclass(frozen=True)
class _BoxDrawing:
    """An image with its boxes and masks; what was found about an annotation stands behind its class."""

    title: str
    path: Path
    size: tuple[int, int]  # width, height; 0, 0 where it is not known
    boxes_xyxy: NDArray[np.float64]
    labels: list[int]
    captions: dict[int, str]
    iscrowd: NDArray[np.bool_]
    masks: list[EncodedMask | None]

    def draw(self) -> Picture | None:
        """The picture, or None where the file cannot be read."""
        try:
            image = read_rgb(self.path, *self.size)
        except UnreadableImageError:
            return None
        height, width = image.shape[:2]
        factor = min(1.0, _DRAWN_SIDE / max(height, width))
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        drawn = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        masks = [np.zeros(size[::-1], np.uint8)] * len(self.masks)
        for place, mask in enumerate(self.masks):
            if mask is not None:
                # An image of another size than is said has its masks where it has its boxes: cut off, or with a margin.
                dense: NDArray[np.uint8] = coco_mask.decode(mask)[:height, :width]
                margins = ((0, height - dense.shape[0]), (0, width - dense.shape[1]))
                resized = cv2.resize(np.pad(dense, margins), size, interpolation=cv2.INTER_NEAREST)
                masks[place] = np.asarray(resized, np.uint8)
        return draw_boxes(
            drawn,
            self.boxes_xyxy * factor,
            np.array(self.labels, np.int64),
            self.captions,
            iscrowd=self.iscrowd,
            masks=masks if any(mask is not None for mask in self.masks) else None,
        )


def _drawings(split: _Split, number: int) -> list[_BoxDrawing]:
    usable = split.present.copy()
    if split.files is not None:
        usable &= np.array([not file.error for file in split.files], np.bool_)
    return [_drawing(split, image) for image in split.findings.worst_and_others(usable, number)]


def _drawing(split: _Split, image: Place) -> _BoxDrawing:
    content = split.content
    annotations = np.flatnonzero(split.image_indices == image)
    boxes = content.boxes_xywh[annotations]
    annotations = annotations[(np.abs(boxes) <= _MAX_COORDINATE).all(axis=1)]  # not where it is NaN
    # Those of mistakes last, so that they are drawn over the others and have their names where not all have.
    mistaken = sum(
        (wrong[annotations] for wrong in split.wrong_annotations.values()), split.category_indices[annotations] < 0
    )
    annotations = annotations[np.argsort(mistaken, kind="stable")]
    captions: dict[int, str] = {}
    labels = []
    num_categories = len(content.category_names)
    for annotation in annotations.tolist():
        category = int(split.category_indices[annotation])
        name = content.category_names[category] if category >= 0 else "?"
        codes = [code for code, wrong in split.wrong_annotations.items() if wrong[annotation]]
        # Labels of mistaken annotations lie behind those of the classes, so that they have colours of their own.
        label = num_categories + 1 + len(captions) if codes or category < 0 else category + 1
        captions[label] = ": ".join([name, *([", ".join(codes)] if codes else [])])
        labels.append(label)
    width, height = content.sizes[image].tolist()
    mask_size = (width, height)
    if split.files is not None and mask_size != (split.files[image].width, split.files[image].height):
        mask_size = split.files[image].turned_size  # as the image is drawn
    boxes = content.boxes_xywh[annotations]
    codes = split.findings.codes_of(image)
    found = f": {', '.join(codes)}" if codes else ""
    return _BoxDrawing(
        title=f"{split.name} {content.file_names[image]}{found}",
        path=split.folder / content.file_names[image],
        size=(width, height),
        boxes_xyxy=np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1),
        labels=labels,
        captions=captions,
        iscrowd=content.iscrowd[annotations],
        masks=[_drawn_mask(content, place, (width, height), mask_size) for place in annotations.tolist()],
    )


def _drawn_mask(
    content: CocoContent, annotation: Place, said_size: tuple[int, int], drawn_size: tuple[int, int]
) -> EncodedMask | None:
    """The annotation's mask in its image, whose width and height are said and drawn; None where it has none."""
    # A polygon is of any size; run lengths are of the one that is said.
    width, height = drawn_size if content.mask_forms[annotation] == POLYGONS else said_size
    return content.encoded_mask(annotation, height, width) if width * height <= _MOST_PIXELS else None


def _places(values: NDArray[np.int64], table: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first place of each value in the unsorted table, -1 where it is not in there; NO_ID is nowhere."""
    if not len(table):
        return np.full(len(values), -1, np.int64)
    order = np.argsort(table, kind="stable")
    found = order[np.searchsorted(table, values, sorter=order).clip(max=len(table) - 1)]
    return np.where((table[found] == values) & (values != NO_ID), found, -1)


def _repeats(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True at every id that stands in the array a second time; NO_ID may."""
    repeats = np.ones(len(ids), np.bool_)
    repeats[np.unique(ids, return_index=True)[1]] = False
    return repeats & (ids != NO_ID)


def _ious(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """The IoU of boxes xyxy, row by row; NaN where one is not known."""
    sides = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    overlap = np.clip(sides, 0, None).prod(axis=1)
    union = (first[:, 2:] - first[:, :2]).prod(axis=1) + (second[:, 2:] - second[:, :2]).prod(axis=1) - overlap
    return overlap / union


def _leaves_folder(name: str) -> bool:
    return posixpath.isabs(name) or (".." in name and posixpath.normpath(name).split("/")[0] == "..")


def _listing(folder: Path, parents: set[str]) -> tuple[set[str], dict[str, str]]:
    """The names of the files in these sub-folders, relative to the folder; and which cannot be read, and why."""
    found, unreadable = set(), {}
    for parent in parents:
        try:
            with os.scandir(folder / parent) as entries:
                found |= {
                    posixpath.normpath(posixpath.join(parent, entry.name)) for entry in entries if _is_file(entry)
                }
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # no permission, a name that is too long, or a null byte in it
            unreadable[parent] = f"its folder cannot be read: {getattr(error, 'strerror', None) or error}"
    return found, unreadable


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # such as a link to itself
        return False
