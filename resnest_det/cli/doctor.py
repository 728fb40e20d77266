"""`resnest-det doctor`: a data set -> every mistake in it, with a page of pictures."""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from resnest_det.build import build_coco_set, build_mask_set
from resnest_det.config import (
    DetectionSettings,
    DetectorSettings,
    SegmentationSettings,
    find_experiment,
    load_either_settings,
)
from resnest_det.data import ADE20K_CLASS_NAMES, read_class_list
from resnest_det.data.mask_folder import IMAGE_SUFFIXES, MASK_SUFFIXES
from resnest_det.reports.anchor_fit import Anchors
from resnest_det.reports.coco_doctor import examine_coco
from resnest_det.reports.data_doctor import DataReport
from resnest_det.reports.data_folders import Splits, find_coco_splits, find_image_folder, find_mask_splits
from resnest_det.reports.lenient_coco import read_leniently
from resnest_det.reports.mask_doctor import examine_masks
from resnest_det.shipped import shipped_file

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers
_SUFFIXES = (IMAGE_SUFFIXES, MASK_SUFFIXES)


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "doctor",
        help="examine a data set: every mistake in it at once, with pictures",
        description="Examine a data set: every mistake in its files, images and annotations at once, what is "
        "suspicious, and what is worth knowing. The exit status is 1 where there are errors.",
        epilog="docs/doctor.md lists what is looked for, and what to do about each.",
    )
    parser.add_argument(
        "data",
        metavar="CONFIG|FOLDER",
        help="a configuration, or the name of a shipped one; a folder in the layout of COCO, Roboflow or ADE20K, or of "
        "images/ and masks/; or a COCO instances file",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings of the configuration, such as data.root=DIR"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="the images of a COCO instances file")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="the classes of a folder of masks, one a line")
    parser.add_argument(
        "--first-class-value",
        type=int,
        metavar="N",
        help="the first class's value in a folder of masks (0; ADE20K's 1)",
    )
    parser.add_argument(
        "--ignore-value", type=int, metavar="N", help="the value that is not labelled; -1 for none (255; ADE20K's 0)"
    )
    parser.add_argument("--fast", action="store_true", help="look for the images, and open none")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that open images (one a core)")
    parser.add_argument("--pictures", type=int, default=12, metavar="N", help="images on the page (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a folder for doctor.json and the page doctor.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the findings go for machines")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    output: Path | None = arguments.output
    json_file: Path | None = arguments.json
    for name, least in (("workers", 0), ("pictures", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}, expected at least {least}")
    if json_file and not json_file.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {json_file.parent} for {json_file.name}; create it")
    if output:
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output {output} is a file; name a folder")
        output.mkdir(parents=True, exist_ok=True)  # before the long work
    _spare(arguments, [Path(arguments.data).expanduser(), arguments.classes])
    report = _examine(arguments)
    content = (json.dumps(report.as_dict(), indent=2) + "\n").encode()
    written = ""
    if json_file:
        _write(json_file, content)
    if output:
        _write(output / "doctor.json", content)
        picture = report.draw()
        if picture is not None:
            encoded = io.BytesIO()
            Image.fromarray(picture).save(encoded, "PNG")
            _write(output / "doctor.png", encoded.getvalue())
        written = f"\n\nfindings{' and pictures' if picture is not None else ''}: {output}"
    unopened = "\n\n--fast: no image and no mask was opened" if arguments.fast else ""
    print(report.table() + unopened + written)  # when all is written, as a terminal may refuse a file's name
    return 1 if report.has_errors else 0


def _targets(arguments: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """The files that are written and are already there, with their flags."""
    output: Path | None = arguments.output
    targets = [("--json", arguments.json)]
    targets += [("--output", output / name) for name in ("doctor.json", "doctor.png") if output]
    yield from ((flag, path) for flag, path in targets if path and path.exists())


def _spare(arguments: argparse.Namespace, inputs: Sequence[Path | None]) -> None:
    """Refuse to write over what is examined."""
    for flag, target in _targets(arguments):
        for path in inputs:
            if path and path.is_file() and target.samefile(path):
                raise ValueError(f"{flag} would overwrite {target}, which is examined; name another place")


def _write(path: Path, content: bytes) -> None:
    """Write the file whole or not at all."""
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_bytes(content)
        return
    path = path.resolve()  # a link stays one
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _examine(arguments: argparse.Namespace) -> DataReport:
    path = Path(arguments.data).expanduser()
    is_config = path.suffix == ".toml" or not path.exists()
    given = [
        name
        for name in ("images", "classes", "first_class_value", "ignore_value")
        if getattr(arguments, name) is not None
    ]
    if is_config:
        if given:
            flag = given[0].replace("_", "-")
            raise ValueError(
                f"--{flag} goes with a folder or an annotation file; override the configuration's settings"
            )
        settings = _load_config(arguments.data, arguments.overrides)
        if isinstance(settings, DetectionSettings):
            return _examine_detection(settings, arguments)
        return _examine_segmentation(settings, arguments)
    if arguments.overrides:
        raise ValueError(
            f"{arguments.overrides[0]} overrides a configuration's setting, and {path} is none; a shipped one that "
            f"has a folder's name is det/NAME or seg/NAME"
        )
    if path.is_dir():
        if arguments.images:
            raise ValueError(f"--images goes with an annotation file, and {path} is a folder: name the file")
        return _examine_folder(path, arguments)
    split = path.stem.removeprefix("instances_")
    root = path.parent.parent if path.parent.name.startswith("annotations") else path.parent
    images = arguments.images or find_image_folder(root, path, split)
    return _examine_coco({split: (images, path)}, arguments, anchors=_anchors(DetectorSettings()))


def _load_config(name: str, overrides: Sequence[str]) -> DetectionSettings | SegmentationSettings:
    """The settings of a file, or of a shipped configuration by its name."""
    file = Path(name).expanduser()
    if file.suffix != ".toml":
        try:
            file = find_experiment(name, shipped_file("configs"))
        except ValueError as error:
            raise ValueError(f"there is no folder or file {name}, and {error}") from None
    return load_either_settings(file, overrides)


def _examine_detection(settings: DetectionSettings, arguments: argparse.Namespace) -> DataReport:
    data = settings.data
    if data.sample is not None:
        built = {"train": build_coco_set(data, "train"), "val": build_coco_set(data, "val")}
        splits = {split: (dataset.folder, dataset.annotation_file) for split, dataset in built.items()}
    else:
        root = Path(data.root).expanduser()
        splits = {
            "train": (root / data.train.images, root / data.train.annotations),
            "val": (root / data.val.images, root / data.val.annotations),
        }
    masks = settings.model.has_masks or data.copy_paste > 0
    return _examine_coco(splits, arguments, masks=masks, anchors=_anchors(settings.model))


def _anchors(model: DetectorSettings) -> Anchors | None:
    """The detector's anchors; FCOS has none."""
    if model.detector == "fcos":
        return None
    anchors = Anchors(model.anchor_sizes, model.aspect_ratios, model.min_size, model.max_size)
    return replace(anchors, strides=(8, 16, 32, 64, 128), octaves=3) if model.detector == "retinanet" else anchors


def _examine_segmentation(settings: SegmentationSettings, arguments: argparse.Namespace) -> DataReport:
    data = settings.data
    root, classes = Path(data.root).expanduser(), data.classes
    if data.sample is not None:
        root, classes = build_mask_set(data, "train").folder.parents[1], "classes.txt"
    _spare(arguments, [root / classes if classes else None])
    class_names = read_class_list(root / classes) if classes else ADE20K_CLASS_NAMES
    if data.sample is not None or data.layout == "ade20k":
        splits = {name: (root / "images" / name, root / "annotations" / name) for name in ("training", "validation")}
        return _examine_masks(splits, class_names, 1, 0, arguments)
    splits = {
        "train": (root / data.train.images, root / data.train.masks),
        "val": (root / data.val.images, root / data.val.masks),
    }
    ignore_value = None if data.ignore_value < 0 else data.ignore_value
    return _examine_masks(splits, class_names, data.first_class_value, ignore_value, arguments)


def _examine_folder(folder: Path, arguments: argparse.Namespace) -> DataReport:
    found = find_mask_splits(folder)
    coco = find_coco_splits(folder) if found is None else {}
    if coco:
        return _examine_coco(coco, arguments, anchors=_anchors(DetectorSettings()))
    if found is None:
        raise ValueError(
            f"{folder} holds no data set that is known: neither annotations/*.json or */_annotations.coco.json, nor "
            f"images/ beside masks/ or annotations/; name a configuration or an annotation file"
        )
    class_list = arguments.classes or found.class_list
    if class_list is None and not found.is_ade20k:
        raise ValueError(f"{folder} holds no list of classes, such as classes.txt; name one with --classes")
    first, ignored = (1, 0) if found.is_ade20k else (0, 255)
    if arguments.first_class_value is not None:
        first = arguments.first_class_value
    if arguments.ignore_value is not None:
        ignored = arguments.ignore_value
    _spare(arguments, [class_list])
    class_names = read_class_list(class_list) if class_list else ADE20K_CLASS_NAMES
    return _examine_masks(found.splits, class_names, first, None if ignored < 0 else ignored, arguments)


def _examine_coco(
    splits: Splits, arguments: argparse.Namespace, *, masks: bool = False, anchors: Anchors | None = None
) -> DataReport:
    _spare(arguments, [file for _, file in splits.values()])
    for _, target in _targets(arguments):
        path = target.resolve()
        for folder, file in splits.values():
            if path.is_relative_to(folder.resolve()):  # it may be one of the images
                names = read_leniently(file).file_names
                _spare(arguments, [folder / name for name in names if name.endswith(path.name)])
    return examine_coco(
        splits,
        masks=masks,
        anchors=anchors,
        decode=not arguments.fast,
        num_workers=arguments.workers,
        num_pictures=arguments.pictures,
    )


def _examine_masks(
    splits: Splits,
    class_names: Sequence[str],
    first_class_value: int,
    ignore_value: int | None,
    arguments: argparse.Namespace,
) -> DataReport:
    for _, target in _targets(arguments):
        path = target.resolve()
        for folder, suffixes in (pair for both in splits.values() for pair in zip(both, _SUFFIXES, strict=True)):
            if path.suffix.lower() in suffixes and path.is_relative_to(folder.resolve()):
                _spare(arguments, [path])
    return examine_masks(
        splits,
        class_names,
        first_class_value=first_class_value,
        ignore_value=ignore_value,
        decode=not arguments.fast,
        num_workers=arguments.workers,
        num_pictures=arguments.pictures,
    )
