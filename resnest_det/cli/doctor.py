"""`resnest-det doctor`: a data set -> every mistake in it, with a page of pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from resnest_det.build import build_coco_set, build_mask_set
from resnest_det.config import (
    DetectionSettings,
    DetectorSettings,
    SegmentationSettings,
    SettingsError,
    load_settings,
    shipped_configs,
)
from resnest_det.data import ADE20K_CLASS_NAMES, read_class_list
from resnest_det.reports.anchor_fit import Anchors
from resnest_det.reports.coco_doctor import examine_coco
from resnest_det.reports.data_doctor import DataReport
from resnest_det.reports.data_folders import Splits, find_coco_splits, find_image_folder, find_mask_splits
from resnest_det.reports.mask_doctor import examine_masks
from resnest_det.shipped import shipped_file

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers

_KINDS: dict[str, type[DetectionSettings | SegmentationSettings]] = {
    "det": DetectionSettings,
    "seg": SegmentationSettings,
}


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
        output.mkdir(parents=True, exist_ok=True)  # before the long work
    report = _examine(arguments)
    print(report.table())
    content = json.dumps(report.as_dict(), indent=2) + "\n"
    if json_file:
        json_file.write_text(content)
    if output:
        (output / "doctor.json").write_text(content)
        picture = report.draw()
        if picture is not None:
            Image.fromarray(picture).save(output / "doctor.png")
        print(f"\nfindings{' and pictures' if picture is not None else ''}: {output}")
    return 1 if report.has_errors else 0


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
    kinds = list(_KINDS.values())
    file = Path(name).expanduser()
    if file.suffix != ".toml":
        folder = shipped_file("configs")
        files = {f"{task}/{stem}": path for task in _KINDS for stem, path in shipped_configs(folder / task).items()}
        found = [full for full in files if name in (full, full.partition("/")[2])]
        if not found:
            raise FileNotFoundError(
                f"{name} is neither a folder or file nor one of the shipped configurations, {', '.join(files)}"
            )
        if len(found) > 1:
            raise ValueError(f"{name} is in det and in seg; name det/{name} or seg/{name}")
        kinds, file = [_KINDS[found[0].partition("/")[0]]], files[found[0]]
    fitting, errors = [], []
    for kind in kinds:
        try:
            fitting.append(load_settings(kind, file, overrides))
        except SettingsError as error:
            errors.append(error)
    if not fitting:
        raise min(errors, key=lambda error: str(error).count("\n"))  # the kind that is meant has fewer mistakes
    if len(fitting) > 1:
        raise ValueError(
            f"{file} may be for detection or for segmentation; add model.detector=faster_rcnn or "
            f"model.segmenter=deeplabv3plus to it, or as an override"
        )
    return fitting[0]


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
    class_names = read_class_list(class_list) if class_list else ADE20K_CLASS_NAMES
    return _examine_masks(found.splits, class_names, first, None if ignored < 0 else ignored, arguments)


def _examine_coco(
    splits: Splits, arguments: argparse.Namespace, *, masks: bool = False, anchors: Anchors | None = None
) -> DataReport:
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
    return examine_masks(
        splits,
        class_names,
        first_class_value=first_class_value,
        ignore_value=ignore_value,
        decode=not arguments.fast,
        num_workers=arguments.workers,
        num_pictures=arguments.pictures,
    )
