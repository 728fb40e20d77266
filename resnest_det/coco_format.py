"""What COCO's files have in common, be they annotations or results: masks as run lengths, and broken JSON."""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

_MAX_DIGITS = 7  # of a number in a compressed string: 35 bits
_CHUNK = 256  # masks checked at a time, for the memory it takes

Side: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**16 - 1)]  # pycocotools counts pixels in 32 bits

EncodedMask: TypeAlias = dict[str, Any]  # pycocotools' {"size": [height, width], "counts": the compressed string}
Counts: TypeAlias = str | bytes | Sequence[int]  # of 0s, 1s, 0s ... down the columns, compressed or not


class RunLengths(msgspec.Struct, gc=False):
    """A run-length mask as the JSON has it."""

    size: tuple[Side, Side]  # height, width
    counts: str | list[int]


def encoded_mask(height: int, width: int, counts: Counts) -> EncodedMask | None:
    """A mask as pycocotools has it, or None where the counts do not make one of height x width pixels."""
    return encoded_masks([((height, width), counts)])[0]


def encoded_masks(masks: Sequence[tuple[Sequence[int], Counts]]) -> list[EncodedMask | None]:
    """Masks, each of a size (height, width) and its counts, as pycocotools has them.

    Returns:
        For each mask what `encoded_mask` says; those of one size share its list. Checked together, they take a tenth
        of the time.
    """
    encoded: list[EncodedMask | None] = []
    shared: dict[tuple[int, int], list[int]] = {}
    for start in range(0, len(masks), _CHUNK):
        chunk = [
            _compressed(shared.setdefault((size[0], size[1]), [*size]), counts)
            for size, counts in masks[start : start + _CHUNK]
        ]
        sound = _are_sound([mask for mask in chunk if mask is not None])
        encoded += chunk if sound else [mask if mask is not None and _are_sound([mask]) else None for mask in chunk]
    return encoded


def _compressed(size: list[int], counts: Counts) -> EncodedMask | None:
    """The mask with its counts as a compressed string, which is yet to be checked where it was one."""
    height, width = size
    if isinstance(counts, str):
        counts = counts.encode()
    elif not isinstance(counts, bytes):
        if not counts or min(counts) < 0 or sum(counts) != height * width:
            return None
        counts = coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)["counts"]
    return {"size": size, "counts": counts}


def _are_sound(masks: Sequence[EncodedMask]) -> bool:
    """Whether all counts are strings that make a mask of their size; others pycocotools may read past the end of.

    A number is a group of characters with 5 bits each, the lowest first, offset by 48; bit 6 says that the group
    goes on, bit 5 of its last character is the sign. From the fourth on, numbers are differences to the one before
    the last (rleFrString in pycocotools' maskApi.c).
    """
    texts = [mask["counts"] for mask in masks]
    if not texts or not all(texts):
        return not texts
    codes = np.frombuffer(b"".join(texts), np.uint8) - np.uint8(48)  # below 0 they are large
    is_last = codes < 32
    text_ends = np.cumsum([len(text) for text in texts])
    if codes.max() > 63 or not is_last[text_ends - 1].all():
        return False
    lasts = np.flatnonzero(is_last)  # where each number ends
    lengths = np.diff(lasts, prepend=-1)
    if lengths.max() > _MAX_DIGITS:
        return False
    numbers = (codes[lasts].astype(np.int64) ^ 16) - 16
    longer = np.flatnonzero(lengths > 1)
    for digit in range(1, lengths.max()):
        longer = longer[lengths[longer] > digit]
        numbers[longer] = numbers[longer] * 32 + (codes[lasts[longer] - digit] & 31)

    ends = np.searchsorted(lasts, text_ends)  # of each text's numbers
    starts = np.concatenate(([0], ends[:-1]))
    # Differences add up over the odd places of a text, and over its even ones but the first: here over every second
    # place of them all, and the sums at the end of the text before are subtracted.
    first_counts = numbers[starts]
    numbers[starts] = 0
    sums = np.zeros((len(numbers) + 3) // 2 * 2, np.int64)
    sums[2 : len(numbers) + 2] = numbers
    sums = sums.reshape(-1, 2).cumsum(axis=0).ravel()
    places = np.arange(len(numbers))
    before = np.repeat(starts, ends - starts)
    counts = sums[2 : len(numbers) + 2] - sums[before + ((places - before) & 1)]
    num_pixels = [mask["size"][0] * mask["size"][1] for mask in masks]
    return (
        bool(first_counts.min() >= 0)
        and bool(counts.min() >= 0)
        and bool(np.all(first_counts + np.add.reduceat(counts, starts) == num_pixels))
    )


def syntax_error(path: Path, text: bytes | mmap.mmap, error: Exception) -> ValueError:
    """The message for a file of broken JSON: the place, and what stands there.

    Args:
        path: the file.
        text: what it holds.
        error: what msgspec raised, a DecodeError or UnicodeDecodeError.
    """
    found = re.search(r"\(byte (\d+)\)", str(error))
    if isinstance(error, UnicodeDecodeError):
        return ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8")
    if found is None:  # "Input data was truncated"
        tail = text[-60:].decode(errors="replace")
        return ValueError(
            f"{path} is cut off: the JSON does not end where the file does, after {len(text)} bytes, at "
            f"...{tail!r}; copy or download it again"
        )
    byte = int(found[1])
    excerpt = text[max(0, byte - 40) : byte + 20].decode(errors="replace")
    line = text[:byte].count(b"\n") + 1
    place = f"{path} is broken JSON at byte {byte}, line {line}, near ...{excerpt!r}..."
    if text[byte : byte + 8].startswith((b"NaN", b"Infinity")):
        return ValueError(
            f"{place}: NaN and Infinity are no JSON numbers, although Python writes them; find the entry whose box, "
            f"area or score was not finite and write a number, or leave it out"
        )
    return ValueError(f"{place}: {error}; repair it there or write it again")
