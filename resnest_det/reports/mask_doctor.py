"""Every mistake of a segmentation data set at once: its pairs of files, the masks' values, classes and splits."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnest_det.data.ade20k import ADE20K_CLASS_NAMES, ADE20K_PALETTE
from resnest_det.data.files import describe_near, listed, read_rgb
from resnest_det.data.mask_folder import IMAGE_SUFFIXES, MASK_SUFFIXES, MAX_CLASSES, files_by_stem, read_mask_values
from resnest_det.reports.data_doctor import (
    DataReport,
    Occurrence,
    SplitFindings,
    SplitSummary,
    in_order,
)
from resnest_det.reports.image_files import OpenedImage, SplitImages, compare_images, in_processes, open_image, repeated
from resnest_det.visualize import class_colour, class_legend, paint_segmentation
from resnest_det.visualize.pictures import Picture, readable_scale

_NUM_VALUES = 2**16  # that a mask file of up to 16 bits can hold
_MOSTLY = 0.5  # share of the pixels, or the masks, that are not labelled, from which on it is a warning
_IMBALANCE = 50  # times as many pixels, from which on it is said
_DRAWN_SIDE = 640  # pixels; a larger image is reduced before it is painted
_UNKNOWN_COLOUR = (255, 0, 255)
_UNKNOWN, _IGNORED = _NUM_VALUES, _NUM_VALUES + 1  # in a drawn mask; classes are below


class OpenedMask(NamedTuple):
    """What a mask's file holds."""

    error: str  # "" where it decodes
    mode: str  # Pillow's where it is a picture of colours, else ""
    width: int
    height: int
    values: NDArray[np.int64]  # that it holds, rising
    counts: NDArray[np.int64]  # the pixels of each


class MaskPair(NamedTuple):
    """An image and its mask."""

    image: OpenedImage
    mask: OpenedMask


@dataclass
class _Split:
    """A split, its pairs of files, and what was found in it."""

    name: str
    image_folder: Path
    mask_folder: Path
    images: list[str]  # of the pairs, relative to the folder
    masks: list[str]
    findings: SplitFindings
    pairs: list[MaskPair] | None = None  # None where none was opened

    @property
    def digests(self) -> list[bytes]:
        return [pair.image.digest for pair in self.pairs or ()]


def examine_masks(
    splits: Mapping[str, tuple[str | os.PathLike[str], str | os.PathLike[str]]],
    class_names: Sequence[str],
    *,
    first_class_value: int = 0,
    ignore_value: int | None = 255,
    decode: bool = True,
    num_workers: int | None = None,
    num_pictures: int = 12,
    progress: bool = True,
) -> DataReport:
    """Examine images and their index masks, which lie as MaskFolder reads them: images/a/b.jpg and masks/a/b.png.

    Nothing is refused: every mistake is reported with its first examples.

    Args:
        splits: for each split's name, the folder of images and the folder of masks. The first split is what is trained
            on.
        class_names: the classes in the order of their values.
        first_class_value: the first class's value in the files, the second's is one more.
        ignore_value: the value of pixels that are not labelled; None where every pixel has a class.
        decode: open every image and mask; False only looks for pairs.
        num_workers: processes that open files; 0 opens them in this one, None takes one a core.
        num_pictures: images drawn by the report's `draw`, shared by the splits.
        progress: show a progress bar on stderr, in a terminal only.

    Returns:
        The report.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: there is no split, no class, or the values clash.
    """
    if not splits:
        raise ValueError("splits is empty; name at least one, with its folders of images and masks")
    if not class_names:
        raise ValueError("class_names is empty; name the classes in the order of their values")
    classes = _Classes(tuple(class_names), first_class_value, ignore_value)
    if first_class_value < 0:
        raise ValueError(f"first_class_value={first_class_value} is negative; mask files hold values from 0")
    if ignore_value is not None and classes.is_class(np.array([ignore_value])).any():
        raise ValueError(f"ignore_value={ignore_value} is a class's value too: {_rule(classes)}; choose another")
    opened = [_open_split(name, Path(images), Path(masks)) for name, (images, masks) in splits.items()]
    for split in opened:
        if decode:
            _open_files(split, num_workers, progress)
            _check_files(split)
            _check_values(split, classes)
        _check_repeated_images(split)
    if len(class_names) > MAX_CLASSES:
        example = Occurrence("", None, f"{len(class_names)} classes, expected 1 to {MAX_CLASSES}")
        opened[0].findings.add("too-many-classes", 1, [example])
    between = compare_images([SplitImages(s.findings, s.image_folder, s.images, s.digests) for s in opened])
    if decode:
        _check_classes(opened, classes)
    number = -(-num_pictures // len(opened))
    return DataReport(
        splits={split.name: _summary(split, classes) for split in opened},
        findings=in_order([*(finding for split in opened for finding in split.findings.findings), *between]),
        drawings=tuple(drawing for split in opened for drawing in _drawings(split, classes, number)),
    )


class _Classes(NamedTuple):
    """The classes, and what stands for them in the files."""

    names: tuple[str, ...]
    first_value: int
    ignore_value: int | None

    def is_class(self, values: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (values >= self.first_value) & (values < self.first_value + len(self.names))

    def is_ignored(self, values: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.zeros(len(values), np.bool_) if self.ignore_value is None else values == self.ignore_value

    def is_unknown(self, values: NDArray[np.int64]) -> NDArray[np.bool_]:
        return ~self.is_class(values) & ~self.is_ignored(values)

    def counts(self, pairs: Sequence[MaskPair]) -> NDArray[np.int64]:
        """Pixels of each class."""
        counts = np.zeros(len(self.names), np.int64)
        for _, mask in pairs:
            known = self.is_class(mask.values)
            counts[mask.values[known] - self.first_value] += mask.counts[known]
        return counts


def open_pair(paths: tuple[str, str]) -> MaskPair:
    """Decode an image and its mask, and count the mask's values."""
    image = open_image(paths[0])
    nothing = np.zeros(0, np.int64)
    try:
        with Image.open(paths[1]) as file:
            values = read_mask_values(file)
            if values is None:
                file.load()  # a broken picture of colours is broken first of all
                return MaskPair(image, OpenedMask("", file.mode, 0, 0, nothing, nothing))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        name = Path(paths[1]).name
        return MaskPair(
            image, OpenedMask(f"{type(error).__name__}: {error}".replace(paths[1], name), "", 0, 0, nothing, nothing)
        )
    height, width = values.shape
    if values.dtype == np.uint8:
        histogram = np.bincount(values.ravel(), minlength=256)
        present = np.flatnonzero(histogram)
        return MaskPair(image, OpenedMask("", "", width, height, present, histogram[present]))
    present, counts = np.unique(values.astype(np.int64), return_counts=True)
    return MaskPair(image, OpenedMask("", "", width, height, present, counts))


def _open_split(name: str, image_folder: Path, mask_folder: Path) -> _Split:
    for kind, folder in (("image", image_folder), ("mask", mask_folder)):
        if not folder.is_dir():
            raise FileNotFoundError(f"the {kind} folder {folder} does not exist; {describe_near(folder, '')}")
    images, masks = files_by_stem(image_folder, IMAGE_SUFFIXES), files_by_stem(mask_folder, MASK_SUFFIXES)
    stems = sorted(images.keys() & masks.keys())
    findings = SplitFindings(name, len(stems))
    for folder, files in ((image_folder, images), (mask_folder, masks)):
        doubles = [paths for paths in files.values() if len(paths) > 1]
        findings.add(
            "name-twice",
            len(doubles),
            [Occurrence(f"{folder.name}/{paths[0]}", None, f"and {paths[1]}") for paths in doubles],
        )
    for code, ours, theirs in (("image-without-mask", images, masks), ("mask-without-image", masks, images)):
        alone = sorted(paths[0] for stem, paths in ours.items() if stem not in theirs)
        folder = mask_folder if ours is images else image_folder
        findings.add(code, len(alone), [Occurrence(path, None, f"there is none in {folder}") for path in alone])
    if not images:
        findings.add("no-images", 1, [Occurrence("", None, f"{image_folder} holds no images")])
    return _Split(
        name,
        image_folder,
        mask_folder,
        images=[images[stem][0] for stem in stems],
        masks=[masks[stem][0] for stem in stems],
        findings=findings,
    )


def _open_files(split: _Split, num_workers: int | None, progress: bool) -> None:
    paths = [
        (str(split.image_folder / image), str(split.mask_folder / mask))
        for image, mask in zip(split.images, split.masks, strict=True)
    ]
    split.pairs = in_processes(open_pair, paths, description=split.name, num_workers=num_workers, progress=progress)


def _check_files(split: _Split) -> None:
    assert split.pairs is not None
    found: dict[str, list[tuple[int, Occurrence]]] = defaultdict(list)
    for place, (image, mask) in enumerate(split.pairs):
        image_name, mask_name = split.images[place], split.masks[place]
        if image.error:
            found["image-broken"].append((place, Occurrence(image_name, None, image.error)))
        if mask.error:
            found["mask-broken"].append((place, Occurrence(mask_name, None, mask.error)))
        elif mask.mode:
            found["mask-not-index"].append((place, Occurrence(mask_name, None, f"mode {mask.mode}")))
        elif not image.error:
            size, said = (image.width, image.height), (mask.width, mask.height)
            detail = f"the mask is {mask.width} x {mask.height}, the image {image.width} x {image.height}"
            tag = f", EXIF orientation {image.orientation}"
            if said not in (size, image.turned_size):
                code = "size-mismatch"
            elif image.orientation == 1:
                continue
            else:
                code = "exif-ambiguous" if said == size else "exif-rotated"
            example = Occurrence(image_name, None, detail + (tag if image.orientation != 1 else ""))
            found[code].append((place, example))
    for code, cases in found.items():
        split.findings.add(code, len(cases), [example for _, example in cases], images=[place for place, _ in cases])


def _check_values(split: _Split, classes: _Classes) -> None:
    assert split.pairs is not None
    unknown: list[tuple[int, Occurrence]] = []
    ignored: list[tuple[int, Occurrence]] = []
    unknown_values: set[int] = set()
    num_pixels = num_ignored = 0
    for place, (_, mask) in enumerate(split.pairs):
        total = int(mask.counts.sum())
        if not total:
            continue
        num_pixels += total
        num_ignored += (own := int(mask.counts[classes.is_ignored(mask.values)].sum()))
        if own == total:
            ignored.append(
                (place, Occurrence(split.masks[place], None, f"all {total} pixels are {classes.ignore_value}"))
            )
        wrong = classes.is_unknown(mask.values)
        if wrong.any():
            values = mask.values[wrong].tolist()
            unknown_values.update(values)
            share = mask.counts[wrong].sum() / total
            detail = f"the values {listed(values)} in {share:.1%} of the pixels; {_rule(classes)}"
            unknown.append((place, Occurrence(split.masks[place], None, detail)))
    split.findings.add(
        "mask-values",
        len(unknown),
        [example for _, example in unknown],
        images=[place for place, _ in unknown],
        suggestion=_values_suggestion(unknown_values, classes),
    )
    split.findings.add(
        "mask-all-ignored",
        len(ignored),
        [example for _, example in ignored],
        images=[place for place, _ in ignored],
        severity="warning" if len(ignored) > _MOSTLY * len(split.pairs) else None,
    )
    if num_ignored:
        share = num_ignored / num_pixels
        example = Occurrence("", None, f"{share:.1%} of the pixels, value {classes.ignore_value}")
        split.findings.add("ignored-fraction", num_ignored, [example], severity="warning" if share > _MOSTLY else None)


def _rule(classes: _Classes) -> str:
    last = classes.first_value + len(classes.names) - 1
    ignored = "nothing is ignored" if classes.ignore_value is None else f"{classes.ignore_value} is ignored"
    return f"classes are {classes.first_value} to {last}, {ignored}"


def _values_suggestion(unknown: set[int], classes: _Classes) -> str:
    """Settings with which the unknown values would have a meaning, where the values themselves tell."""
    if (classes.first_value, classes.ignore_value) == (1, 0):
        return ""  # as ADE20K has them, which no setting changes
    if unknown == {len(classes.names)} and classes.first_value == 0:
        return "data.first_class_value=1 data.ignore_value=0"  # without a 0, ignoring it changes nothing
    if unknown == {255}:
        return "data.ignore_value=255"
    if unknown == {0}:
        return "data.ignore_value=0"
    return ""


def _check_repeated_images(split: _Split) -> None:
    if split.pairs is None:
        return
    groups = repeated(split.digests, split.images)
    examples = []
    for first, *others in groups:
        for other in others:
            alike = _digest(split.mask_folder / split.masks[first]) == _digest(split.mask_folder / split.masks[other])
            detail = f"the content of {split.images[first]} and {'the same' if alike else 'another'} mask"
            examples.append((alike, Occurrence(split.images[other], None, detail)))
    examples.sort(key=lambda example: example[0])  # those that contradict one another first
    places = [place for group in groups for place in group]
    split.findings.add("image-twice", len(examples), [example for _, example in examples], images=places)


def _digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes()).digest()


def _check_classes(splits: Sequence[_Split], classes: _Classes) -> None:
    counts = [classes.counts(split.pairs or []) for split in splits]
    total = sum(counts, np.zeros(len(classes.names), np.int64))
    first = splits[0]
    unused = [classes.names[place] for place in np.flatnonzero(total == 0)]
    first.findings.add("category-unused", len(unused), [Occurrence("", None, listed(unused))])
    values = {value for split in splits for pair in split.pairs or () for value in pair.mask.values.tolist()}
    if len(classes.names) == 2 and values == {0, 255} and classes.first_value == 0 and classes.ignore_value == 255:
        first.findings.add("mask-binary", 1, [Occurrence("", None, f"no pixel is {classes.names[1]}, value 1")])
    for split, own in zip(splits, counts, strict=True):
        absent = np.flatnonzero((own == 0) & (total > 0)).tolist()
        examples = [Occurrence("", None, f"{classes.names[i]}: none here, {total[i]} pixels elsewhere") for i in absent]
        split.findings.add("class-absent", len(absent), examples, severity="warning" if split is first else "info")
    present = np.flatnonzero(counts[0])
    if len(present) and counts[0].max() >= _IMBALANCE * counts[0][present].min():
        shares = counts[0] / counts[0].sum()
        most = int(counts[0].argmax())
        rare = [
            place
            for place in present[np.argsort(shares[present])].tolist()
            if _IMBALANCE * counts[0][place] <= counts[0][most]
        ]
        examples = [
            Occurrence(
                "",
                None,
                f"{classes.names[i]}: {shares[i]:.3%} of the pixels; {classes.names[most]}: {shares[most]:.1%}",
            )
            for i in rare
        ]
        first.findings.add("class-imbalance", len(rare), examples)


def _summary(split: _Split, classes: _Classes) -> SplitSummary:
    numbers: dict[str, Any] = {
        "images": len(split.images),
        "image_folder": str(split.image_folder),
        "mask_folder": str(split.mask_folder),
    }
    if split.pairs is not None:
        numbers["classes"] = dict(zip(classes.names, classes.counts(split.pairs).tolist(), strict=True))
    description = f"{split.image_folder}: {len(split.images)} images with masks, {len(classes.names)} classes"
    return SplitSummary(description, numbers)


@dataclass(frozen=True)
class _MaskDrawing:
    """An image painted with its mask; values that are no class are magenta."""

    title: str
    image: Path
    mask: Path
    classes: _Classes

    def draw(self) -> Picture | None:
        """The picture, or None where a file cannot be read or the two do not fit."""
        try:
            with Image.open(self.mask) as file:
                values = read_mask_values(file)
            if values is None:
                return None
            image = read_rgb(self.image, values.shape[1], values.shape[0])
        except (OSError, SyntaxError, ValueError):
            return None
        if image.shape[:2] != values.shape:
            return None
        factor = min(readable_scale(*image.shape[:2]), _DRAWN_SIDE / max(image.shape[:2]))
        size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
        rows, columns = (
            np.arange(side) * length // side for side, length in zip(size[::-1], values.shape, strict=True)
        )
        flat = values[np.ix_(rows, columns)].astype(np.int64).ravel()
        labels = np.where(self.classes.is_ignored(flat), _IGNORED, flat - self.classes.first_value)
        labels[self.classes.is_unknown(flat)] = _UNKNOWN
        first_names = tuple(name.partition(",")[0] for name in self.classes.names)  # of ADE20K's synonyms
        is_ade20k = first_names == ADE20K_CLASS_NAMES
        own = ADE20K_PALETTE if is_ade20k else map(class_colour, range(len(self.classes.names)))
        colours = dict(enumerate(own)) | {_UNKNOWN: _UNKNOWN_COLOUR}
        names = dict(enumerate(first_names)) | {_UNKNOWN: "no class"}
        drawn = np.asarray(
            cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR), np.uint8
        )
        painted = paint_segmentation(drawn, labels.reshape(size[::-1]), colours, ignore_index=_IGNORED)
        seen, width = np.unique(labels).tolist(), max(size[0], _DRAWN_SIDE)
        legend = class_legend(seen, names, colours, width=width, ignore_index=_IGNORED)
        painted = np.pad(painted, ((0, 0), (0, legend.shape[1] - size[0]), (0, 0)), constant_values=255)
        return np.concatenate((painted, legend))


def _drawings(split: _Split, classes: _Classes, number: int) -> list[_MaskDrawing]:
    usable = np.ones(len(split.images), np.bool_)
    if split.pairs is not None:
        usable = np.array([not image.error and bool(len(mask.values)) for image, mask in split.pairs], np.bool_)
    drawings = []
    for place in split.findings.worst_and_others(usable, number):
        codes = split.findings.codes_of(place)
        found = f": {', '.join(codes)}" if codes else ""
        title = f"{split.name} {split.images[place]}{found}"
        image, mask = split.image_folder / split.images[place], split.mask_folder / split.masks[place]
        drawings.append(_MaskDrawing(title, image, mask, classes))
    return drawings
