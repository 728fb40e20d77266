"""Every file of a data set opened, in several processes: does it decode, what size is it, which files are the same."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from resnest_det.reports.data_doctor import KINDS, NUM_EXAMPLES, Finding, Occurrence, SplitFindings

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_LEAST_FILES_A_PROCESS = 100  # fewer are opened before another process has started
_BATCH = 16  # files a process answers for at a time
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF's orientations that exchange width and height


class OpenedImage(NamedTuple):
    """What an image's file holds."""

    error: str  # "" where it decodes
    width: int  # as stored
    height: int
    orientation: int  # of EXIF, 1 to 8; 1 is as stored
    digest: bytes  # the hash of its content, b"" where it cannot be read

    @property
    def turned_size(self) -> tuple[int, int]:
        """Width and height after turning it as EXIF says."""
        return (self.height, self.width) if self.orientation in _QUARTER_TURNS else (self.width, self.height)


def open_image(path: str) -> OpenedImage:
    """Decode an image file as far as it takes to know that it can be decoded."""
    digest = b""
    try:
        content = Path(path).read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            # A JPEG is decoded to an eighth of its size: all of its bits are read, and pixels are not wanted.
            image.draft("L", (1, 1))
            image.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        return OpenedImage(f"{type(error).__name__}: {error}".replace(path, Path(path).name), 0, 0, 1, digest)
    return OpenedImage("", width, height, orientation if orientation in range(1, 9) else 1, digest)


def in_processes(
    function: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    *,
    description: str,
    num_workers: int | None = None,
    progress: bool = True,
) -> list[ResultT]:
    """The function's result for each item, in order, with a progress bar.

    Args:
        function: of a module's top level, as every process needs it.
        items: what it is called with.
        description: stands before the bar.
        num_workers: processes; 0 works in this one, None takes a process a core, as far as there is work for them.
        progress: show a bar on stderr, in a terminal only.
    """
    if num_workers is None:
        num_workers = min(_num_cores(), len(items) // _LEAST_FILES_A_PROCESS)
    results: list[ResultT] = []
    if not items:
        return results
    loader = DataLoader(
        _Calls(function, items),
        batch_size=_BATCH,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # the caller's random numbers stay as they are
    )
    # tqdm reads None as "off where stderr is no terminal".
    with tqdm(total=len(items), desc=description, unit="file", leave=False, disable=None if progress else True) as bar:
        for batch in loader:
            results += batch
            bar.update(len(batch))
    return results


class _Calls(Dataset[ResultT], Generic[ItemT, ResultT]):
    """A function's results, for DataLoader's processes."""

    def __init__(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> None:
        self._function, self._items = function, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> ResultT:
        return self._function(self._items[index])


def _num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def repeated(digests: Sequence[bytes], names: Sequence[str]) -> list[list[int]]:
    """The places of images that are one: of one content, or of one name; b"" and "" are not known."""
    first_of: dict[bytes | str, int] = {}
    groups: dict[int, list[int]] = defaultdict(list)
    for place, keys in enumerate(zip(digests, names, strict=True)):
        known = [key for key in keys if key]
        first = next((first_of[key] for key in known if key in first_of), place)
        for key in known:
            first_of.setdefault(key, first)
        groups[first].append(place)
    return [places for places in groups.values() if len(places) > 1]


class SplitImages(NamedTuple):
    """The images of a split, for `compare_images`."""

    findings: SplitFindings
    folder: Path
    names: Sequence[str]  # relative to the folder; "" is not known
    digests: Sequence[bytes]  # of their content, or none where they were not opened


def compare_images(splits: Sequence[SplitImages]) -> list[Finding]:
    """Images that two splits have in common: one file, files of one content, or only one name."""
    findings = []
    for ours, theirs in itertools.combinations(splits, 2):
        same = _pairs(ours.digests, theirs.digests)
        if ours.folder.samefile(theirs.folder):
            same |= _pairs(ours.names, theirs.names)
        named = {other: one for other, one in _pairs(ours.names, theirs.names).items() if other not in same}
        for code, pairs in (("split-leak", same), ("split-same-name", named)):
            if not pairs:
                continue
            other_split = theirs.findings.split
            examples = tuple(
                Occurrence(ours.names[one], None, f"in {other_split}: {theirs.names[other]}")
                for other, one in itertools.islice(sorted(pairs.items()), NUM_EXAMPLES)
            )
            between = f"{ours.findings.split}, {other_split}"
            findings.append(Finding(code, KINDS[code].severity, between, len(pairs), examples))
            if KINDS[code].severity == "error":
                ours.findings.mark(code, list(pairs.values()))
                theirs.findings.mark(code, list(pairs))
    return findings


def _pairs(ours: Sequence[bytes | str], theirs: Sequence[bytes | str]) -> dict[int, int]:
    """The places of theirs that are among ours, with the first of ours; b"" and "" are not known."""
    place_of = {key: place for place, key in reversed(list(enumerate(ours))) if key}
    return {place: place_of[key] for place, key in enumerate(theirs) if key in place_of}
