"""Where a folder has its data set: COCO's layout, Roboflow's, ADE20K's, or images beside masks."""

from __future__ import annotations

import itertools
import mmap
import re
from pathlib import Path
from typing import NamedTuple

from resnest_det.data.files import listed
from resnest_det.data.mask_folder import IMAGE_SUFFIXES, MASK_SUFFIXES

Splits = dict[str, tuple[Path, Path]]

_NUM_NAMES = 20  # of images, by which their folder is known
_ROBOFLOW = "_annotations.coco.json"
_HEAD = 2**20  # bytes of a JSON file, in which a list of its own says that it is one of COCO's
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*"([^"\\]+)"')
_COCO_LIST = re.compile(rb'"(images|annotations)"\s*:\s*\[')
_CLASS_LISTS = ("objectInfo150.txt", "classes.txt", "class_names.txt", "labels.txt")
_MASK_FOLDERS = ("masks", "labels", "annotations")
_ORDER = ("train", "val", "test")  # of splits, by what their names begin with or hold


class MaskSplits(NamedTuple):
    """The splits of a folder of masks, and how their values are meant."""

    splits: Splits  # by name: the folder of images and the folder of masks
    class_list: Path | None  # a file found in the folder
    is_ade20k: bool  # as ADE20K lies: 0 is not labelled, classes begin with 1


def find_coco_splits(folder: Path) -> Splits:
    """The annotation files of a folder and their images' folders, by split; empty where there are none.

    Looked for are `instances_*.json`, else any JSON file with a list of images or annotations, in `annotations*/` and
    the folder itself, and Roboflow's `*/_annotations.coco.json`. The images' folder is the one that holds most of the
    first names in the file.

    Raises:
        ValueError: the images of a file are in none of the folders.
    """
    beside = [path for pattern in ("annotations*/*.json", "*.json") for path in sorted(folder.glob(pattern))]
    instances = [path for path in beside if path.name.startswith("instances")]
    roboflow = sorted(folder.glob(f"*/{_ROBOFLOW}"))
    splits: Splits = {}
    for file in roboflow or instances or filter(_is_coco, beside):
        name = file.parent.name if file.name == _ROBOFLOW else re.sub("^instances_?", "", file.stem) or file.stem
        splits[name] = (find_image_folder(folder, file, name), file)
    return dict(sorted(splits.items(), key=lambda item: _place_of_split(item[0])))


def find_image_folder(folder: Path, file: Path, split: str) -> Path:
    """The folder that the file names of an annotation file are relative to.

    Args:
        folder: the data set's.
        file: a COCO instances file.
        split: its name, such as train2017.

    Raises:
        ValueError: no folder has any of the first images.
    """
    names = _first_names(file)
    plain = re.sub(r"\d{4}$", "", split)
    parts = [split, plain, f"images/{split}", f"images/{plain}", f"{split}/images", f"{plain}/images"]
    candidates = [folder / part for part in (*parts, "JPEGImages", "images", ".")] + [file.parent]
    candidates = [path for path in dict.fromkeys(candidates) if path.is_dir()]
    best = max(candidates, key=lambda path: sum(_is_file(path / name) for name in names), default=folder)
    if names and not any(_is_file(best / name) for name in names):
        tried = listed(path.relative_to(folder).as_posix() for path in candidates if path.is_relative_to(folder))
        raise ValueError(
            f"the images of {file}, such as {names[0]}, are in none of the folders {tried} of {folder}; name theirs "
            f"with --images"
        )
    return best


def find_mask_splits(folder: Path) -> MaskSplits | None:
    """The folders of images and masks in a folder, by split; None where there are none.

    Looked for are `images/` beside `masks/`, `annotations/` or `labels/`, each with sub-folders of the same names, the
    splits, or without; and the other way round, `train/images` beside `train/masks`. A folder that has
    `annotations*/instances_*.json` is COCO's, whose pictures in `annotations/` are of panoptic segmentation.
    """
    if any(folder.glob("annotations*/instances_*.json")):
        return None
    class_list = next((folder / name for name in _CLASS_LISTS if (folder / name).is_file()), None)
    for name in _MASK_FOLDERS:
        images, masks = folder / "images", folder / name
        if not images.is_dir() or not _holds_masks(masks):
            continue
        shared = sorted(path.name for path in images.iterdir() if path.is_dir() and (masks / path.name).is_dir())
        if shared and not any(path.suffix.lower() in IMAGE_SUFFIXES for path in images.iterdir()):
            splits = {split: (images / split, masks / split) for split in sorted(shared, key=_place_of_split)}
        else:
            splits = {folder.resolve().name: (images, masks)}
        return MaskSplits(splits, class_list, is_ade20k=name == "annotations")
    for name in _MASK_FOLDERS[:2]:  # */annotations may be a data set's beside this one
        beside_images = (path for path in folder.glob(f"*/{name}") if (path.parent / "images").is_dir())
        found = sorted(path.parent for path in beside_images if _holds_masks(path))
        if found:
            splits = {path.name: (path / "images", path / name) for path in found}
            ordered = dict(sorted(splits.items(), key=lambda item: _place_of_split(item[0])))
            return MaskSplits(ordered, class_list, is_ade20k=False)
    return None


def _holds_masks(folder: Path) -> bool:
    """Whether there is a mask in the folder, which in COCO's layout has JSON files."""
    return folder.is_dir() and any(path.suffix.lower() in MASK_SUFFIXES for path in folder.rglob("*"))


def _is_coco(file: Path) -> bool:
    """Whether a JSON file begins with what COCO's have, be it broken or of UTF-16."""
    with file.open("rb") as stream:
        return bool(_COCO_LIST.search(stream.read(_HEAD).replace(b"\0", b"")))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _first_names(file: Path) -> list[str]:
    """The first file names in an annotation file, be it broken."""
    if not file.stat().st_size:
        return []
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = itertools.islice(_FILE_NAME.finditer(text), _NUM_NAMES)
        return [match[1].decode(errors="replace") for match in found]


def _place_of_split(name: str) -> tuple[int, str]:
    """Training before validation before test before others, and then by name."""
    places = [place for place, part in enumerate(_ORDER) if part in name.lower()]
    return (places[0] if places else len(_ORDER), name)
