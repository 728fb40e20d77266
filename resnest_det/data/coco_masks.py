"""COCO's segmentations as a few tensors, and the pixels they stand for.

Polygons keep their coordinates as float64: pycocotools rounds them to fifths of a pixel, and a coordinate such as
10.3, half-way between two of them, would fall to the other side as float32. Run lengths, of crowd regions mostly,
are kept as pycocotools' compressed strings, lists of counts being compressed first.
"""

from __future__ import annotations

from array import array
from itertools import pairwise
from typing import Annotated, NamedTuple, TypeAlias

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

# Pixels; far above any image. pycocotools walks along a polygon's edges in steps of a fifth of a pixel.
_MAX_COORDINATE = 1e6
_MAX_DIGITS = 7  # of a number in a compressed string: 35 bits

_Side: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**16 - 1)]  # pycocotools counts pixels in 32 bits


class RunLengths(msgspec.Struct, gc=False):
    """A run-length mask as the JSON has it: counts of 0s, 1s, 0s ... down the columns, as a list or compressed."""

    size: tuple[_Side, _Side]  # height, width
    counts: str | list[int]


Segmentation: TypeAlias = list[list[float]] | RunLengths | None
Mistake: TypeAlias = tuple[NDArray[np.bool_], str]  # the annotations that are wrong (A,), and the rule


class Segmentations(NamedTuple):
    """The segmentations of A annotations; each is either polygons or run lengths."""

    coordinates: Tensor  # float64 (C,): x, y, x, y ... in pixels, polygon after polygon
    polygon_offsets: Tensor  # int64 (P + 1,): where each polygon begins among the coordinates
    run_lengths: Tensor  # uint8 (B,): compressed strings, one after the other
    is_run_lengths: Tensor  # bool (A,)
    spans: Tensor  # int64 (A, 2): the first and the one after the last of its polygons, or of its string's bytes

    def select(self, annotations: NDArray[np.int64]) -> Segmentations:
        """Those of the annotations at these places, in this order; polygons and strings stay where they are."""
        places = torch.from_numpy(annotations)
        return self._replace(is_run_lengths=self.is_run_lengths[places], spans=self.spans[places])

    def rasterise(self, first: int, last: int, height: int, width: int) -> NDArray[np.uint8]:
        """The masks of the annotations first to last - 1, of 0 and 1, (N, height, width): pycocotools' annToMask."""
        if first == last:
            return np.zeros((0, height, width), np.uint8)
        columns_first = coco_mask.decode([self._encoded(place, height, width) for place in range(first, last)])
        return np.ascontiguousarray(columns_first.transpose(2, 0, 1))  # (H, W, N) -> (N, H, W)

    def _encoded(self, annotation: int, height: int, width: int) -> dict[str, object]:
        """One annotation's mask as pycocotools' compressed run lengths."""
        first, last = self.spans[annotation].tolist()
        if self.is_run_lengths[annotation]:
            return {"size": [height, width], "counts": self.run_lengths[first:last].numpy().tobytes()}
        offsets = self.polygon_offsets[first : last + 1].tolist()
        polygons = [self.coordinates[begin:end].numpy() for begin, end in pairwise(offsets)]
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


class SegmentationReader:
    """Gathers segmentations in the file's order, keeping no Python object of any."""

    def __init__(self) -> None:
        self._coordinates = array("d")
        self._polygon_offsets = array("q", [0])
        self._run_lengths = bytearray()
        self._spans = array("q")
        self._sizes = array("q")  # height and width of a run-length mask, 0 and 0 for polygons
        self._is_broken = bytearray()  # 1 where the counts do not make a mask

    def add(self, segmentation: Segmentation) -> None:
        """Take up the next annotation's."""
        if isinstance(segmentation, RunLengths):
            compressed = _compressed(segmentation)
            first = len(self._run_lengths)
            self._run_lengths += compressed or b""
            self._spans.extend((first, len(self._run_lengths)))
            self._sizes.extend(segmentation.size)
            self._is_broken.append(compressed is None)
        else:
            first = len(self._polygon_offsets) - 1
            for polygon in segmentation or ():
                self._coordinates.fromlist(polygon)
                self._polygon_offsets.append(len(self._coordinates))
            self._spans.extend((first, len(self._polygon_offsets) - 1))
            self._sizes.extend((0, 0))
            self._is_broken.append(0)

    def segmentations(self) -> Segmentations:
        """All of them. Only those without mistakes can be rasterised."""
        return Segmentations(
            coordinates=torch.from_numpy(np.asarray(self._coordinates)),  # not copied: the bulk of it all
            polygon_offsets=torch.from_numpy(np.array(self._polygon_offsets, np.int64)),
            run_lengths=torch.from_numpy(np.array(self._run_lengths, np.uint8)),
            is_run_lengths=torch.from_numpy(_pairs(self._sizes)[:, 0] > 0),
            spans=torch.from_numpy(_pairs(self._spans)),
        )

    def mistakes(self, image_sizes: NDArray[np.int64], image_indices: NDArray[np.int64]) -> list[Mistake]:
        """What is wrong with them.

        Args:
            image_sizes: width and height of the images, (I, 2).
            image_indices: which of them each annotation belongs to, (A,); -1 for none.

        Returns:
            Every rule, with the annotations that break it.
        """
        spans, sizes = _pairs(self._spans), _pairs(self._sizes)
        is_run_lengths = sizes[:, 0] > 0
        with_polygons = np.flatnonzero(~is_run_lengths)

        def owners(polygons: NDArray[np.int64]) -> NDArray[np.bool_]:
            wrong = np.zeros(len(spans), np.bool_)
            wrong[with_polygons[np.searchsorted(spans[with_polygons, 1], polygons, side="right")]] = True
            return wrong

        offsets = np.array(self._polygon_offsets, np.int64)
        lengths = np.diff(offsets)
        short_or_odd = np.flatnonzero((lengths < 6) | (lengths % 2 == 1))
        coordinates = np.asarray(self._coordinates)
        far = np.flatnonzero((coordinates > _MAX_COORDINATE) | (coordinates < -_MAX_COORDINATE))
        resized = is_run_lengths & (image_indices >= 0)
        resized[resized] = (sizes[resized, ::-1] != image_sizes[image_indices[resized]]).any(axis=1)
        return [
            (
                ~is_run_lengths & (spans[:, 0] == spans[:, 1]),
                "segmentation is missing or empty; masks need polygons or run lengths",
            ),
            (owners(short_or_odd), "a polygon of segmentation needs at least 3 points, written x, y, x, y ..."),
            (
                owners(np.searchsorted(offsets, far, side="right") - 1),
                f"the coordinates of segmentation must be within ± {_MAX_COORDINATE:g} pixels",
            ),
            (
                np.array(self._is_broken, np.bool_),
                "the run lengths of segmentation must be numbers from 0 that add up to its height x width",
            ),
            (resized, "the size of a run-length segmentation must be the [height, width] of its image"),
        ]


def _pairs(numbers: array[int]) -> NDArray[np.int64]:
    return np.array(numbers, np.int64).reshape(-1, 2)


def _compressed(run_lengths: RunLengths) -> bytes | None:
    """The compressed string, or None where the counts do not make a mask of the given size."""
    (height, width), given = run_lengths.size, run_lengths.counts
    counts = _decompressed(given.encode()) if isinstance(given, str) else given
    if not counts or min(counts) < 0 or sum(counts) != height * width:
        return None
    if isinstance(given, str):
        return given.encode()
    encoded: bytes = coco_mask.frPyObjects({"size": [height, width], "counts": given}, height, width)["counts"]
    return encoded


def _decompressed(text: bytes) -> list[int]:
    """The counts in a compressed string; none where it is not one, which pycocotools would read past the end of.

    A number is a group of characters with 5 bits each, the lowest first, offset by 48; bit 6 says that the group
    goes on, bit 5 of its last character is the sign. From the fourth on, numbers are differences to the one before
    the last (rleFrString in pycocotools' maskApi.c).
    """
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return []
    ends = np.flatnonzero(codes & 32 == 0) + 1
    lengths = np.diff(ends, prepend=0)
    if lengths.max() > _MAX_DIGITS:
        return []
    starts = ends - lengths
    digits = np.arange(len(codes)) - np.repeat(starts, lengths)
    counts = np.add.reduceat((codes & 31) << (5 * digits), starts)
    counts -= np.where(codes[ends - 1] & 16, 1 << (5 * lengths), 0)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts.tolist()
