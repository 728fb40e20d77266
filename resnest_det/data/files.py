"""Image files by name: reading them, sharing their names with workers, skipping what cannot be read."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

SampleT = TypeVar("SampleT")

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in a JPEG's scan: any but those that restart it
_END_OF_IMAGE = b"\xff\xd9"
_NUM_SHOWN = 5  # how many ids or names a message lists


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded."""


class IncompleteDataError(FileNotFoundError):
    """A data set is there, and lacks some of its files."""


class ImageFiles(Dataset[SampleT]):
    """A data set of named image files in a folder: what every data set here shares.

    A subclass says in `_load` what the sample of an image is. The names are kept as tensors: only those stay
    shared with workers under spawn, and no Python object an image is kept.

    Args:
        folder: what the names are relative to.
        names: of the image files, with "/" between folders.
        on_unreadable: what `load` does with a file that cannot be decoded: "raise", or "skip" (returns None,
            warns once a file and lists the file in `skipped`).

    Raises:
        ValueError: on_unreadable is neither of the two.
    """

    def __init__(self, folder: Path, names: Sequence[str], on_unreadable: Literal["raise", "skip"] = "raise") -> None:
        if on_unreadable not in ("raise", "skip"):
            raise ValueError(f"on_unreadable={on_unreadable!r} is unknown; use 'raise' or 'skip'")
        self._folder, self._on_unreadable = folder, on_unreadable
        self._names, self._name_offsets = pack_names(names)
        # Shared from the start: what a forked worker writes here must be seen by the main process.
        self._skipped = torch.zeros(len(names), dtype=torch.bool).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._skipped.share_memory_()  # read from a file, it is not yet; in a spawned worker, it is the parent's

    def __len__(self) -> int:
        return len(self._name_offsets) - 1

    def __getitem__(self, index: int) -> SampleT:
        return self._load(index, None)

    def load(self, index: int, seed: int | None = None) -> SampleT | None:
        """The sample at `index`, its transform's randomness drawn from `seed`.

        Args:
            index: place in the data set.
            seed: for the transform; None draws afresh.

        Returns:
            As `dataset[index]`, or None where a file cannot be decoded and on_unreadable="skip".

        Raises:
            ValueError: a file cannot be decoded (on_unreadable="raise"), or what it holds is not what it should.
        """
        try:
            return self._load(index, seed)
        except UnreadableImageError as error:
            self._pass_over(index, error)
            return None

    def _pass_over(self, index: int, error: UnreadableImageError) -> None:
        """Note an image that cannot be decoded, or raise the error, as `on_unreadable` says."""
        if self._on_unreadable == "raise":
            raise error
        if not self._skipped[index]:
            self._skipped[index] = True
            warnings.warn(f"skipped: {error}", stacklevel=3)

    def _load(self, index: int, seed: int | None) -> SampleT:
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """The folder that the names are relative to."""
        return self._folder

    @property
    def skipped(self) -> list[str]:
        """File names of the images skipped so far, by this process and by the loaders' workers."""
        return [self.file_name(index) for index in self._skipped.nonzero().flatten().tolist()]

    def file_name(self, index: int) -> str:
        """The image's file name, relative to the folder of images."""
        first, last = self._span(self._name_offsets, index)
        return unpack_name(self._names[first:last])

    def image_path(self, index: int) -> Path:
        """The image's file."""
        return self._folder / self.file_name(index)

    def _span(self, offsets: Tensor, index: int) -> list[int]:
        """Where the piece of the image at `index` begins and ends."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside this data set of {len(self)} images")
        place = index % len(self)
        return offsets[place : place + 2].tolist()


def pack_names(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Names as one tensor of bytes, and where each begins and the last one ends, (len(names) + 1,)."""
    # A name that is no valid UTF-8 on disk reaches Python as surrogates, and goes back as it came.
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    characters = np.frombuffer(b"".join(encoded), np.uint8).copy()
    return torch.from_numpy(characters), torch.from_numpy(offsets_of([len(name) for name in encoded]))


def unpack_name(characters: Tensor) -> str:
    """The name whose bytes these are."""
    return characters.numpy().tobytes().decode("utf-8", "surrogateescape")


def offsets_of(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of consecutive pieces begins and the last one ends, (len(lengths) + 1,)."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def read_rgb(path: Path, width: int, height: int) -> NDArray[np.uint8]:
    """The image as RGB (H, W, 3), whatever its mode: grey, palette, with alpha, CMYK, 16 bit.

    An image of another size than width x height is turned as its EXIF tag says: the annotator may have seen the
    picture as cameras mean it. Whether it fits then is for the caller to check.

    Raises:
        UnreadableImageError: the file cannot be decoded.
    """
    try:
        with path.open("rb") as stream, Image.open(stream) as file:
            image: Image.Image = file
            if image.size != (width, height):
                image = ImageOps.exif_transpose(image)
            elif image.format == "JPEG" and image.mode in ("RGB", "L"):
                scan = stream.tell()  # Pillow has read the header
                stream.seek(0)
                content = stream.read()
                first_marker = _MARKER.search(content, scan)
                # The same pixels in less time: both decode by libjpeg-turbo, but Pillow copies them out twice. Yet
                # OpenCV fills up what is missing, where Pillow refuses; so it gets files of one scan with its end.
                if first_marker is not None and content[first_marker.start() :] == _END_OF_IMAGE:
                    decoded = cv2.imdecode(
                        np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
                    )
                    if decoded is not None:
                        return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), np.uint8)
            return rgb_pixels(image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        raise UnreadableImageError(f"cannot read the image {path} ({type(error).__name__}: {error})") from error


def rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """An image of Pillow's of any mode as RGB (H, W, 3), as it lies: its EXIF tag is for the caller."""
    if image.mode.startswith("I"):
        # 16 bit grey, whose upper byte is the picture: Pillow's convert() would cut it off at 255.
        image = Image.fromarray((np.array(image) // 256).clip(0, 255).astype(np.uint8))
    return np.array(image.convert("RGB"))


def channels_first(image: NDArray[np.uint8]) -> Tensor:
    """The image (H, W, 3) as a tensor (3, H, W), contiguous: what the data sets yield."""
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))  # a tenth of the time of permute(2, 0, 1).contiguous()
    return torch.from_numpy(planes)


def walk_folders(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below it, links followed, each with the names of its files; what is hidden is passed over.

    A link to a folder that it lies in itself is not followed: there would be no end.
    """
    above: dict[Path, frozenset[tuple[int, int]]] = {}  # the folders that one lies in, by device and inode
    for name, folders, files in os.walk(folder, followlinks=True):
        parent = Path(name)
        status = parent.stat()
        entered, own = above.pop(parent, frozenset()), (status.st_dev, status.st_ino)
        if own in entered:
            folders.clear()
            continue
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        above.update(dict.fromkeys((parent / inner for inner in folders), entered | {own}))
        yield parent, [file for file in files if not file.startswith(".")]


def describe_near(path: Path, suffix: str) -> str:
    """What is near a missing path: the files with that suffix in its nearest existing folder, or the folders."""
    absolute = path.absolute()
    near = next(p for p in (path, *absolute.parents) if p.is_dir())
    if near == near.parent:  # what stands at the root says nothing about the path
        first_missing = [absolute, *absolute.parents][-2:][0]
        return "check the path" if first_missing in (near, absolute) else f"there is no folder {first_missing}"
    entries = sorted(near.iterdir())
    names = [p.name for p in entries if (p.suffix == suffix and p.is_file() if suffix else p.is_dir())]
    kind = f"{suffix} files" if suffix else "folders"
    return f"{near} holds the {kind} {listed(names)}" if names else f"{near} holds no {kind}"


def listed(items: Iterable[object]) -> str:
    """The first few items, and how many more there are."""
    names = [str(item) for item in items]
    more = len(names) - _NUM_SHOWN
    return ", ".join(names[:_NUM_SHOWN]) + (f" and {more} more" if more > 0 else "")
