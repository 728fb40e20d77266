"""COCO's segmentations as the text they are in the file, and the pixels they stand for.

Segmentations are most of a COCO file. Each is decoded once when the file is read, to check it, and again when its mask
is wanted: as text they take no more room than as numbers, and the file opens in half of the time.

Polygons become float64: pycocotools rounds coordinates to fifths of a pixel, and one such as 10.3, half-way between two
of them, would fall to the other side as float32.
"""

from __future__ import annotations

from array import array
from typing import Annotated, NamedTuple, TypeAlias

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from resnest_det.coco_format import EncodedMask, RunLengths, encoded_mask

# Pixels; far above any image. pycocotools walks along a polygon's edges in steps of a fifth of a pixel.
_MAX_COORDINATE = 1e6

Segmentation: TypeAlias = list[list[float]] | RunLengths | None
Mistake: TypeAlias = tuple[NDArray[np.bool_], str]  # the annotations that are wrong (A,), and the rule

_decode = msgspec.json.Decoder(Segmentation).decode
# The same with the rules that a decoder can check, which is quicker than to check them afterwards.
_Coordinate: TypeAlias = Annotated[float, msgspec.Meta(ge=-_MAX_COORDINATE, le=_MAX_COORDINATE)]
_Polygon: TypeAlias = Annotated[list[_Coordinate], msgspec.Meta(min_length=6)]
_decode_strictly = msgspec.json.Decoder(Annotated[list[_Polygon], msgspec.Meta(min_length=1)] | RunLengths).decode

_RULES = (
    "segmentation is missing or empty; masks need polygons or run lengths",
    "a polygon of segmentation needs at least 3 points, written x, y, x, y ...",
    f"the coordinates of segmentation must be within ± {_MAX_COORDINATE:g} pixels",
    "the run lengths of segmentation must be numbers from 0 that add up to its height x width",
)
_MISSING, _POINTS, _FAR, _COUNTS = (1 << number for number in range(len(_RULES)))  # broken rules of an annotation


class Segmentations(NamedTuple):
    """The segmentations of A annotations."""

    text: Tensor  # uint8 (B,): their JSON, one after the other
    spans: Tensor  # int64 (A, 2): where each begins and ends in the text

    def select(self, annotations: NDArray[np.int64]) -> Segmentations:
        """Those of the annotations at these places, in this order; the text stays as it is."""
        return self._replace(spans=self.spans[torch.from_numpy(annotations)])

    def rasterise(self, first: int, last: int, height: int, width: int) -> NDArray[np.uint8]:
        """The masks of the annotations first to last - 1, of 0 and 1, (N, height, width): pycocotools' annToMask."""
        if first == last:
            return np.zeros((0, height, width), np.uint8)
        columns_first = coco_mask.decode(self.encoded(first, last, height, width))
        return np.ascontiguousarray(columns_first.transpose(2, 0, 1))  # (H, W, N) -> (N, H, W)

    def encoded(self, first: int, last: int, height: int, width: int) -> list[EncodedMask]:
        """The same masks as run lengths."""
        return [self._encoded(place, height, width) for place in range(first, last)]

    def _encoded(self, annotation: int, height: int, width: int) -> EncodedMask:
        """One annotation's mask as pycocotools' compressed run lengths."""
        begin, end = self.spans[annotation].tolist()
        segmentation = _decode(self.text[begin:end].numpy().tobytes())
        assert segmentation is not None  # by the rules
        if isinstance(segmentation, RunLengths):
            mask = encoded_mask(height, width, segmentation.counts)
            assert mask is not None  # by the rules
            return mask
        polygons = [np.array(polygon) for polygon in segmentation]
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


class SegmentationReader:
    """Checks segmentations in the file's order and gathers their text, keeping no Python object of any."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q")
        self._sizes = array("q")  # height and width of a run-length mask, 0 and 0 for polygons
        self._broken_rules = bytearray()

    def add(self, text: msgspec.Raw) -> None:
        """Take up the next annotation's.

        Raises:
            msgspec.ValidationError: it is of another form than a segmentation.
        """
        try:
            segmentation: Segmentation = _decode_strictly(text)
            is_checked = True
        except msgspec.ValidationError:
            segmentation = _decode(text)
            is_checked = False
        size = (0, 0)
        if isinstance(segmentation, RunLengths):
            size = segmentation.size
            broken = 0 if encoded_mask(*size, segmentation.counts) else _COUNTS
        elif is_checked and segmentation:
            broken = _POINTS if any(len(polygon) % 2 for polygon in segmentation) else 0
        else:
            broken = _broken_rules(segmentation)
        self._text += text
        self._ends.append(len(self._text))
        self._sizes.extend(size)
        self._broken_rules.append(broken)

    def segmentations(self) -> Segmentations:
        """All of them. Only those without mistakes become masks."""
        ends = np.array(self._ends, np.int64)
        return Segmentations(
            # Not copied, as it is the bulk of it all; an empty buffer is refused.
            text=torch.frombuffer(self._text or bytearray(1), dtype=torch.uint8),
            spans=torch.from_numpy(np.stack((np.concatenate(([0], ends))[:-1], ends), axis=1)),
        )

    def mistakes(self, image_sizes: NDArray[np.int64], image_indices: NDArray[np.int64]) -> list[Mistake]:
        """What is wrong with them.

        Args:
            image_sizes: width and height of the images, (I, 2).
            image_indices: which of them each annotation belongs to, (A,); -1 for none.

        Returns:
            Every rule, with the annotations that break it.
        """
        broken = np.array(self._broken_rules, np.uint8)
        sizes = np.array(self._sizes, np.int64).reshape(-1, 2)
        resized = (sizes[:, 0] > 0) & (image_indices >= 0)
        resized[resized] = (sizes[resized, ::-1] != image_sizes[image_indices[resized]]).any(axis=1)
        return [
            *((broken & (1 << number) > 0, rule) for number, rule in enumerate(_RULES)),
            (resized, "the size of a run-length segmentation must be the [height, width] of its image"),
        ]


def _broken_rules(polygons: list[list[float]] | None) -> int:
    """What is wrong with polygons, as bits."""
    if not polygons:
        return _MISSING
    broken = 0
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            broken |= _POINTS
        if polygon and not -_MAX_COORDINATE <= min(polygon) <= max(polygon) <= _MAX_COORDINATE:
            broken |= _FAR
    return broken
