"""A folder of images and a folder of masks as a segmentation data set: index masks, one value a class."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, TypeAlias

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch import Tensor

from resnest_det.data.files import (
    ImageFiles,
    IncompleteDataError,
    UnreadableImageError,
    channels_first,
    describe_near,
    listed,
    pack_names,
    read_rgb,
    unpack_name,
    walk_folders,
)

MaskedImage: TypeAlias = tuple[Tensor, Tensor]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # none that changes values to save space
MAX_CLASSES = 254  # a mask is uint8: 0..253 are classes, 255 is ignored

_SPREAD = {"L;2": 85, "L;4": 17}  # Pillow spreads grey of 2 and 4 bits over 0..255 by these factors
_INDEX_MODES = ("L", "P", "1")  # of Pillow, besides the integer modes that begin with I
_IGNORED = 255
_UNKNOWN = 254  # in the table, a value that is neither a class nor ignored
_NUM_VALUES = 2**16  # that a mask file of up to 16 bits can hold


class MaskTransform(Protocol):
    """What `MaskFolder` calls on every sample it loads, e.g. `augment.SegmentationAugmentation`."""

    def __call__(
        self, image: NDArray[np.uint8], mask: NDArray[np.uint8], seed: int | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The transformed image (H, W, 3) and mask (H, W), equally large.

        All randomness comes from `seed`; None draws afresh.
        """
        ...


class MaskFolder(ImageFiles[MaskedImage]):
    """Images with index masks: images/a/b.jpg belongs to masks/a/b.png.

    `dataset[i]` is `(image, mask)`: the image a uint8 RGB tensor (3, H, W), the mask uint8 (H, W) of 0..K-1, and
    255 where nothing is to be learnt. Sub-folders are searched; hidden files and files with other suffixes are
    left alone. An image whose EXIF tag turns it to its mask's size is turned.

    Args:
        images: folder of jpg, jpeg, png, bmp, webp, tif or tiff files.
        masks: folder of png, bmp, tif or tiff files: grey or palette (the index counts, not the colour), 1, 8 or
            16 bit. Two classes saved as 0 and 255 must be saved as 0 and 1, as 255 is ignored here.
        class_names: the classes in the order of their values, see `read_class_list`.
        transform: applied to every sample, e.g. `augment.SegmentationAugmentation`.
        first_class_value: the first class's value in the files, the second's is one more.
        ignore_value: the value in the files that becomes 255; None where every pixel has a class.
        on_unreadable: what `load` does with an image or mask that cannot be decoded: "raise", or "skip" (returns
            None, warns once and lists the image in `skipped`).

    Attributes:
        class_names: {0: first class, ...}.
        num_classes: K; there is no background beyond the classes given.

    Raises:
        FileNotFoundError: a folder is missing or without images, an image without mask or a mask without image.
        ValueError: no or more than 254 classes, a name given twice, two files for one image, values that clash.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        masks: str | os.PathLike[str],
        class_names: Sequence[str],
        *,
        transform: MaskTransform | None = None,
        first_class_value: int = 0,
        ignore_value: int | None = _IGNORED,
        on_unreadable: Literal["raise", "skip"] = "raise",
    ) -> None:
        _check_class_names(class_names)
        self.class_names = dict(enumerate(class_names))
        self.num_classes = len(self.class_names)
        self._first_value, self._ignore_value = first_class_value, ignore_value
        self._table = _value_table(self.num_classes, first_class_value, ignore_value)
        self._transform = transform

        folder, self._mask_folder = Path(images), Path(masks)
        names, mask_names = _matched(folder, self._mask_folder)
        super().__init__(folder, names, on_unreadable)
        self._mask_names, self._mask_name_offsets = pack_names(mask_names)

    def _load(self, index: int, seed: int | None) -> MaskedImage:
        mask = self._read_mask(index)
        height, width = mask.shape
        image = read_rgb(self.image_path(index), width, height)
        if image.shape[:2] != mask.shape:
            raise ValueError(
                f"{self.mask_path(index)} is {width} x {height} pixels, but its image {self.image_path(index)} is "
                f"{image.shape[1]} x {image.shape[0]}; a mask needs its image's size, resized without mixing values "
                f"(nearest neighbour)"
            )
        if self._transform is not None:
            image, mask = self._transform(image, mask, seed)
        return channels_first(image), torch.from_numpy(np.ascontiguousarray(mask))

    def _read_mask(self, index: int) -> NDArray[np.uint8]:
        """The mask (H, W) of 0..K-1 and 255."""
        path = self.mask_path(index)
        try:
            with Image.open(path) as file:
                mode, values = file.mode, read_mask_values(file)
        except Exception as error:  # as in read_rgb
            raise UnreadableImageError(f"cannot read the mask {path} ({type(error).__name__}: {error})") from error
        if values is None:
            raise ValueError(
                f"{path} is a picture of mode {mode}, but a mask holds one class index a pixel; turn its colours into "
                f"indices and save it as grey (mode L) or palette (mode P)"
            )
        if values.dtype != np.uint8:  # 1, 16 or 32 bit
            inside = (values >= 0) & (values < _NUM_VALUES)
            mask = np.where(inside, self._table[np.where(inside, values, 0).astype(np.uint16)], np.uint8(_UNKNOWN))
        else:
            mask = np.asarray(cv2.LUT(values, self._table[:256]), np.uint8)
        if (mask == _UNKNOWN).any():
            self._raise_value_error(path, np.unique(values[mask == _UNKNOWN]).tolist())
        return mask

    def _raise_value_error(self, path: Path, values: list[int]) -> NoReturn:
        """Say which values have no class, and what would give them one."""
        fixes = []
        if 255 in values and self.num_classes == 2:
            fixes.append("where 255 is the second class, save it as 1")
        if 255 in values and self._ignore_value is None:
            fixes.append("where 255 means not labelled, use ignore_value=255")
        elif 255 in values:
            fixes.append(
                f"where 255 means not labelled, write {self._ignore_value} instead, the one value that is ignored"
            )
        if 0 in values:
            fixes.append("where 0 is the first class, use first_class_value=0; where it is none, ignore_value=0")
        if values == [self.num_classes] and self._first_value == 0:
            fixes.append(
                "where the first class is 1 in the masks, use first_class_value=1, and ignore_value=0 where 0 is none"
            )
        raise ValueError(
            f"{path} holds values that are no class: {listed(values)}; {self._values_text()}; "
            f"{'; '.join(fixes) or 'correct the mask or the class list'}"
        )

    def mask_path(self, index: int) -> Path:
        """The mask's file."""
        first, last = self._span(self._mask_name_offsets, index)
        return self._mask_folder / unpack_name(self._mask_names[first:last])

    def _values_text(self) -> str:
        last = self._first_value + self.num_classes - 1
        ignored = "nothing is ignored" if self._ignore_value is None else f"{self._ignore_value} is ignored"
        return f"the {self.num_classes} classes are {self._first_value}..{last} and {ignored}"

    def summary(self) -> str:
        """One paragraph on what the folders hold."""
        return f"{self._folder}: {len(self)} images with masks; in the masks, {self._values_text()}."


def _check_class_names(class_names: Sequence[str]) -> None:
    if isinstance(class_names, str):
        raise ValueError(f"class_names={class_names!r} is one string; give a list of names (see read_class_list)")
    if not 1 <= len(class_names) <= MAX_CLASSES:
        raise ValueError(
            f"class_names has {len(class_names)} names; it needs 1 to {MAX_CLASSES}, as masks are held in 8 bits of "
            f"which 255 means ignored"
        )
    if empty := [place for place, name in enumerate(class_names) if not name.strip()]:
        raise ValueError(f"class_names has empty names at the places {listed(empty)}; every class needs a name")
    if repeated := sorted({name for name in class_names if list(class_names).count(name) > 1}):
        raise ValueError(f"class_names has names more than once: {listed(repeated)}; every class needs its own")


def _value_table(num_classes: int, first_value: int, ignore_value: int | None) -> NDArray[np.uint8]:
    """What each value of a mask file becomes, (65536,): a class, 255 or the mark of unknown values."""
    last_value = first_value + num_classes - 1
    if first_value < 0 or last_value >= _NUM_VALUES:
        raise ValueError(
            f"first_class_value={first_value} puts {num_classes} classes at {first_value}..{last_value}; mask files "
            f"hold values of 0..{_NUM_VALUES - 1}"
        )
    table = np.full(_NUM_VALUES, _UNKNOWN, np.uint8)
    table[first_value : last_value + 1] = np.arange(num_classes)
    if ignore_value is None:
        return table
    if not 0 <= ignore_value < _NUM_VALUES:
        raise ValueError(
            f"ignore_value={ignore_value} is outside 0..{_NUM_VALUES - 1}, which mask files hold; use None to ignore "
            f"nothing"
        )
    if first_value <= ignore_value <= last_value:
        raise ValueError(
            f"ignore_value={ignore_value} is a class's value too: {num_classes} classes from first_class_value="
            f"{first_value} on take {first_value}..{last_value}; choose another, or leave the class out of class_names"
        )
    table[ignore_value] = _IGNORED
    return table


def _matched(images: Path, masks: Path) -> tuple[list[str], list[str]]:
    """The names of the images, sorted, and of their masks."""
    for kind, folder in (("image", images), ("mask", masks)):
        if not folder.is_dir():
            raise FileNotFoundError(f"the {kind} folder {folder} does not exist; {describe_near(folder, '')}")
    if images.samefile(masks):
        raise ValueError(f"images and masks are one folder, {images}; put the masks into a folder of their own")
    image_of, mask_of = _file_of_each_stem(images, IMAGE_SUFFIXES), _file_of_each_stem(masks, MASK_SUFFIXES)
    if not image_of:
        raise FileNotFoundError(f"{images} holds no images; they end in {', '.join(IMAGE_SUFFIXES)}")
    without_mask = sorted(image_of[stem] for stem in image_of.keys() - mask_of.keys())
    without_image = sorted(mask_of[stem] for stem in mask_of.keys() - image_of.keys())
    if without_mask or without_image:
        parts = []
        if without_mask:
            parts.append(
                f"{len(without_mask)} of {len(image_of)} images have no mask in {masks}: {listed(without_mask)}"
            )
        if without_image:
            parts.append(
                f"{len(without_image)} of {len(mask_of)} masks have no image in {images}: {listed(without_image)}"
            )
        raise IncompleteDataError(
            f"{'; '.join(parts)}. An image and its mask have the same path but for the suffix (a mask's is "
            f"{', '.join(MASK_SUFFIXES)}): rename, add or remove files"
        )
    stems = sorted(image_of, key=lambda stem: image_of[stem])
    return [image_of[stem] for stem in stems], [mask_of[stem] for stem in stems]


def read_mask_values(file: ImageFile.ImageFile) -> NDArray[Any] | None:
    """The values (H, W) of a mask that Pillow opened, as they were saved; None of a picture of colours."""
    mode = file.mode
    if mode not in _INDEX_MODES and not mode.startswith("I"):
        return None
    form = file.tile[0][3] if file.tile else None  # known until the pixels are read
    values = np.array(file)
    if mode == "L" and form in _SPREAD:
        values //= _SPREAD[form]
    return values


def files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, list[str]]:
    """Relative path without suffix -> relative paths, of the files below `folder` that end in one of `suffixes`."""
    found: dict[str, list[str]] = defaultdict(list)
    for parent, files in walk_folders(folder):
        for name in sorted(files):
            if name.lower().endswith(tuple(suffixes)):
                path = (parent.relative_to(folder) / name).as_posix()
                found[posixpath.splitext(path)[0]].append(path)
    return dict(found)


def _file_of_each_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, str]:
    """Relative path without suffix -> relative path; a ValueError where several files differ in their suffix only."""
    found = files_by_stem(folder, suffixes)
    if doubles := sorted(stem for stem, paths in found.items() if len(paths) > 1):
        raise ValueError(
            f"{folder} has {len(doubles)} names with more than one file: {listed(sorted(found[doubles[0]]))}"
            f"{' and others' if len(doubles) > 1 else ''}; keep one of each, since only the suffix tells them apart"
        )
    return {stem: paths[0] for stem, paths in found.items()}
