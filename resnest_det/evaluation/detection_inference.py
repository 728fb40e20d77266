"""How a detector is run on images of any size: at several sizes and mirrored, whole or in tiles.

Paper of the tiles: Akyon et al., "Slicing Aided Hyper Inference", arXiv 2202.06934. Reference implementation: the
package sahi, whose last tiles, too, are moved inwards. It unites an object's boxes by default; here the best is kept,
and a box that a tile's edge has cut counts for less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from resnest_det.evaluation.box_fusion import Overlap, check_threshold, non_maximum_suppression, weighted_boxes_fusion

TILES_AT_ONCE = 8  # tiles in one call of the model, which bounds its memory
EDGE = 0.01  # of a tile's side: a box that ends nearer to an edge than this is taken for cut by it
CUT_RANK = 0.8  # of its score: where such a box ranks among those of the other tiles

_NEEDED = ("boxes", "labels", "scores")
_LEAVE_OUT = "leave out flip, tile and all but one of short_sides for this model"

Detections = dict[str, Any]


class DetectionInference:
    """Detections in images, each in its own pixels: the `predict` of `evaluate`, and usable by itself.

    Without arguments the model sees every image once, and its answer is returned as it is. Each argument adds to that,
    and all go together: the image, or each of its tiles, is seen at every size, as it is and mirrored; what was found
    in these passes is merged, and then what was found in the tiles.

    Args:
        short_sides: pixels that the shorter side is resized to, one pass for each; none takes the model's own. It is
            the model that resizes, by `model.transform`, which is set for the length of a call.
        max_side: pixels that the longer side may have at most, in each of these passes; 0 takes the model's own bound,
            in proportion to the short side.
        flip: look at the mirror image too.
        merge: how passes become one: "nms" keeps of each object the best detection, with its mask; "wbf" fuses the
            boxes of all passes (see weighted_boxes_fusion), and knows no masks.
        merge_threshold: IoU above which two boxes of a class are the same object's.
        tile: side in pixels of the square tiles that images are cut into; 0 runs them whole. The last ones are moved
            inwards to end at the border. A side of an image that is smaller than a tile is not cut.
        tile_overlap: part of a tile's side that neighbours share, from 0 to below 1. An object is seen whole in some
            tile where it is at most this large.
        whole_image: see the whole image too, beside its tiles, for what is larger than a tile.
        tile_match: by what two detections of a class are known for the same object's, whichever tile they are from:
            "ios", the part of the lower-scored box that lies in the other, which also knows a piece of an object, but
            takes a small object before a large one of its class for such a piece; or "iou".
        tile_match_threshold: above which they are, and the lower-scored is dropped. Here the score of a box that ends
            at an edge between tiles counts for 0.8 of what it is.
        detections_per_image: the best that are kept of an image; 0 keeps all.

    Raises:
        ValueError: an argument is out of its range, or has no effect without another.

    Note:
        Of a model with masks, the masks of all passes exist at once, each float32 at the image's size. Where `tile` is
        given, "masks" is therefore a list of COCO's compressed run lengths at the image's size, one a detection, of
        where a mask is above 0.5. With `whole_image` the model itself draws that pass's masks at the image's size.

    Example:
        >>> predict = DetectionInference(short_sides=(640, 800, 960), flip=True, merge="wbf")
        >>> evaluate(model, loader, CocoMeanAveragePrecision(class_names), predict=predict)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        short_sides: Sequence[int] = (),
        max_side: int = 0,
        flip: bool = False,
        merge: Literal["nms", "wbf"] = "nms",
        merge_threshold: float = 0.5,
        tile: int = 0,
        tile_overlap: float = 0.2,
        whole_image: bool = False,
        tile_match: Overlap = "ios",
        tile_match_threshold: float = 0.5,
        detections_per_image: int = 0,
    ) -> None:
        if not isinstance(short_sides, Iterable):
            raise ValueError(f"short_sides={short_sides!r} must be a sequence of sides, such as (640,) or (640, 800)")
        short_sides = tuple(short_sides)
        for short_side in short_sides:
            if not isinstance(short_side, Integral) or short_side < 1:
                raise ValueError(f"short_sides has {short_side!r}; a side is a whole number of pixels from 1")
        for name, number in {"max_side": max_side, "tile": tile, "detections_per_image": detections_per_image}.items():
            if not isinstance(number, Integral):
                raise ValueError(f"{name}={number!r} is no whole number; give one from 1, or 0 to leave it out")
            if number < 0:
                raise ValueError(f"{name}={number} is negative; give a number from 1, or 0 to leave it out")
        if max_side and not short_sides:
            raise ValueError(f"max_side={max_side} has no effect without short_sides; give these too")
        if max_side and max_side < max(short_sides):
            raise ValueError(
                f"short_sides has {max(short_sides)}, above max_side={max_side}, and no image can have both; lower "
                f"the short side, or raise max_side or set it to 0"
            )
        if merge not in ("nms", "wbf"):
            raise ValueError(f"merge={merge!r} must be 'nms' or 'wbf'")
        if merge == "wbf" and not flip and len(short_sides) < 2:
            raise ValueError("merge='wbf' has no effect on one pass; give flip=True or several short_sides")
        check_threshold("merge_threshold", merge_threshold)
        if not 0 <= tile_overlap < 1:
            raise ValueError(f"tile_overlap={tile_overlap} must be from 0 to below 1: a part of a tile's side")
        if whole_image and not tile:
            raise ValueError("whole_image=True has no effect without tile; give the tile's side too")
        if tile_match not in ("iou", "ios"):
            raise ValueError(f"tile_match={tile_match!r} must be 'iou' or 'ios'")
        check_threshold("tile_match_threshold", tile_match_threshold)
        self.short_sides = short_sides
        self.max_side = max_side
        self.flip = flip
        self.merge = merge
        self.merge_threshold = merge_threshold
        self.tile = tile
        self.tile_overlap = tile_overlap
        self.whole_image = whole_image
        self.tile_match: Overlap = tile_match
        self.tile_match_threshold = tile_match_threshold
        self.detections_per_image = detections_per_image

    @torch.no_grad()
    def __call__(self, model: nn.Module, images: Sequence[Tensor] | Tensor) -> list[Detections]:
        """The detections in every image.

        Args:
            model: a detector in evaluation mode that returns a list of dicts with "boxes" (M, 4) xyxy in pixels of
                the image, "labels" (M,), "scores" (M,) and, if it has them, "masks" (M, 1, H, W) in [0, 1], as
                torchvision's do. For `short_sides` it must resize by a torchvision transform, `model.transform`.
            images: float in [0, 1], on the model's device: a list of (3, H, W) of any sizes, or (N, 3, H, W). Whole
                images go to the model together, tiles image by image.

        Returns:
            For each image a dict with the same keys, best first, in pixels of the image as given.

        Raises:
            ValueError: an image has another shape or type; the model is in training mode, returns something else, or
                something that cannot be merged; its size cannot be set, for `short_sides`; it has masks, for "wbf".
        """
        _check(model, images)
        if self.short_sides:
            _check_resizing(model)
        if self.tile:
            results = [self._in_tiles(model, image) for image in images]
        else:
            results = self._in_passes(model, list(images)) if len(images) else []
        return [self._best(found) for found in results]

    def _in_passes(self, model: nn.Module, images: list[Tensor]) -> list[Detections]:
        """What is found in each image over all sizes, and mirrored."""
        are_merged = bool(self.flip or self.tile or len(self.short_sides) > 1)
        passes: list[list[Detections]] = []
        for short_side in self.short_sides or (None,):
            with _resizing_to(model, short_side, self.max_side):
                passes.append(_detect(model, images, are_merged))
                if self.flip:
                    mirrored = _detect(model, [image.flip(-1) for image in images], are_merged)
                    passes.append(
                        [_mirrored(found, image.shape[-1]) for found, image in zip(mirrored, images, strict=True)]
                    )
        if len(passes) == 1:
            return passes[0]
        return [self._merge(of_image) for of_image in zip(*passes, strict=True)]

    def _merge(self, passes: Sequence[Detections]) -> Detections:
        if self.merge == "wbf":
            return dict(weighted_boxes_fusion(passes, iou_threshold=self.merge_threshold))
        boxes, labels, scores = _joined(passes)
        return _select(passes, non_maximum_suppression(boxes, scores, labels, threshold=self.merge_threshold))

    def _in_tiles(self, model: nn.Module, image: Tensor) -> Detections:
        height, width = image.shape[-2:]
        corners = [(top, left) for top in self._starts(height) for left in self._starts(width)]
        parts: list[Detections] = []
        are_cut: list[Tensor] = []
        for first in range(0, len(corners), TILES_AT_ONCE):
            some = corners[first : first + TILES_AT_ONCE]
            tiles = [image[:, top : top + self.tile, left : left + self.tile] for top, left in some]
            for (top, left), found in zip(some, self._in_passes(model, tiles), strict=True):
                parts.append(_placed(found, top, left, (height, width)))
                are_cut.append(self._cut(parts[-1]["boxes"], top, left, (height, width)))
        if len(corners) == 1:
            return parts[0]
        if self.whole_image:
            parts.append(_placed(self._in_passes(model, [image])[0], 0, 0, (height, width)))
            are_cut.append(parts[-1]["scores"].new_zeros(len(parts[-1]["scores"]), dtype=torch.bool))
        boxes, labels, scores = _joined(parts)
        ranks = torch.where(torch.cat(are_cut), CUT_RANK * scores, scores)
        kept = non_maximum_suppression(
            boxes, ranks, labels, threshold=self.tile_match_threshold, overlap=self.tile_match
        )
        return _select(parts, kept[scores[kept].argsort(descending=True, stable=True)])

    def _starts(self, length: int) -> list[int]:
        """Where tiles start along a side of `length` pixels."""
        last = max(0, length - self.tile)
        return [*range(0, last, max(1, int(self.tile * (1 - self.tile_overlap)))), last]

    def _cut(self, boxes: Tensor, top: int, left: int, size: tuple[int, int]) -> Tensor:
        """Which boxes (M, 4), in pixels of the image, end at an edge of their tile that is not the image's: (M,)."""
        height, width = size
        bottom, right = min(top + self.tile, height), min(left + self.tile, width)
        margin = EDGE * self.tile
        x1, y1, x2, y2 = boxes.unbind(1)
        return (
            ((x1 < left + margin) & (left > 0))
            | ((y1 < top + margin) & (top > 0))
            | ((x2 > right - margin) & (right < width))
            | ((y2 > bottom - margin) & (bottom < height))
        )

    def _best(self, found: Detections) -> Detections:
        limit = self.detections_per_image
        if limit == 0 or len(found["scores"]) <= limit:
            return found
        return _select([found], found["scores"].argsort(descending=True, stable=True)[:limit])


def _check(model: nn.Module, images: Sequence[Tensor] | Tensor) -> None:
    if model.training:
        raise ValueError("the model is in training mode, where a detector wants targets and has losses; call eval()")
    for position, image in enumerate(images):
        if image.ndim != 3 or not image.is_floating_point() or image.numel() == 0:
            raise ValueError(
                f"image {position} is {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}; an image is "
                f"float (3, H, W) in [0, 1] with at least one pixel: bytes are to be divided by 255"
            )


def _check_resizing(model: nn.Module) -> None:
    transform = getattr(model, "transform", None)
    if not isinstance(transform, GeneralizedRCNNTransform):
        raise ValueError(
            f"{type(model).__name__}.transform is {type(transform).__name__}; short_sides needs a detector that "
            f"resizes by torchvision's GeneralizedRCNNTransform there: leave short_sides out for this model"
        )
    if transform.fixed_size is not None:
        raise ValueError(
            f"{type(model).__name__} resizes every image to its fixed_size of {tuple(transform.fixed_size)}, so that "
            f"short_sides would have no effect; leave them out for this model"
        )


@contextmanager
def _resizing_to(model: nn.Module, short_side: int | None, max_side: int) -> Iterator[None]:
    """The model resizes to that short side within; its own size is put back also after an error."""
    if short_side is None:
        yield
        return
    transform: Any = model.transform
    before = transform.min_size, transform.max_size
    # In evaluation torchvision takes the last of min_size, and `_skip_resize` is for training alone.
    transform.min_size = (short_side,)
    transform.max_size = max_side or round(before[1] * short_side / before[0][-1])
    try:
        yield
    finally:
        transform.min_size, transform.max_size = before


def _detect(model: nn.Module, images: list[Tensor], are_merged: bool) -> list[Detections]:
    answer: Any = model(images)
    if not isinstance(answer, Sequence) or len(answer) != len(images):
        count = f" of {len(answer)}" if isinstance(answer, Sequence) else ""
        raise ValueError(
            f"the model returned {type(answer).__name__}{count}; a detector returns a list with a dict for each image, "
            f"here {len(images)}"
        )
    for found in answer:
        if not isinstance(found, Mapping) or not set(_NEEDED) <= found.keys():
            held = f"dict of {sorted(found)}" if isinstance(found, Mapping) else type(found).__name__
            raise ValueError(
                f"the model returned {held} for an image; a detector returns a dict with boxes, labels and scores"
            )
        if are_merged:
            _check_mergeable(found)
    return list(answer)


def _check_mergeable(found: Mapping[str, Any]) -> None:
    if others := sorted(found.keys() - {*_NEEDED, "masks"}):
        raise ValueError(
            f"the model returns {', '.join(others)}, which cannot be turned back, moved and merged as boxes and masks "
            f"are; {_LEAVE_OUT}"
        )
    if "masks" not in found:
        return
    masks = found["masks"]
    shape = tuple(masks.shape) if isinstance(masks, Tensor) else None
    if shape is None or len(shape) != 4 or shape[:2] != (len(found["boxes"]), 1):
        came = f"of the type {type(masks).__name__}" if shape is None else f"of the shape {shape}"
        raise ValueError(
            f"the model returns masks {came} beside {len(found['boxes'])} boxes, and only a tensor of (M, 1, H, W), as "
            f"torchvision's detectors have it, can be turned back, moved and merged; {_LEAVE_OUT}"
        )


def _mirrored(found: Detections, width: int) -> Detections:
    """Detections in the mirror image, as they are in an image of that width."""
    x1, y1, x2, y2 = found["boxes"].unbind(1)
    turned = {**found, "boxes": torch.stack([width - x2, y1, width - x1, y2], dim=1)}
    if "masks" in found:
        turned["masks"] = found["masks"].flip(-1)
    return turned


def _placed(found: Detections, top: int, left: int, size: tuple[int, int]) -> Detections:
    """Detections in a tile, as they are in the image of `size` (height, width) that has the tile's corner there."""
    placed = {**found, "boxes": found["boxes"] + found["boxes"].new_tensor([left, top, left, top])}
    if "masks" in found:
        placed["masks"] = [_run_lengths((mask[0] > 0.5).cpu().numpy(), top, left, size) for mask in found["masks"]]
    return placed


def _run_lengths(mask: NDArray[np.bool_], top: int, left: int, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's compressed run lengths of a tile's mask in its image, which is never drawn."""
    height, width = size
    columns = np.zeros((mask.shape[1], mask.shape[0] + 2), dtype=np.int8)  # with a 0 above and below: every run ends
    columns[:, 1:-1] = mask.T
    changes = np.diff(columns, axis=1)
    (first_columns, first_rows), (_, last_rows) = np.nonzero(changes == 1), np.nonzero(changes == -1)
    starts, lengths = (left + first_columns) * height + top + first_rows, last_rows - first_rows
    ends = starts + lengths
    continued = np.flatnonzero(ends[:-1] == starts[1:])  # a run to the image's lower edge goes on in the next column
    starts, ends = np.delete(starts, continued + 1), np.delete(ends, continued)
    counts = np.diff(np.stack([starts, ends], axis=1).ravel(), prepend=0, append=height * width).tolist()
    if counts[-1] == 0:  # pycocotools writes no empty run at the end
        counts.pop()
    run_lengths: dict[str, Any] = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return run_lengths


def _joined(parts: Sequence[Detections]) -> tuple[Tensor, Tensor, Tensor]:
    boxes, labels, scores = (torch.cat([part[key] for part in parts]) for key in _NEEDED)
    return boxes, labels, scores


def _select(parts: Sequence[Detections], positions: Tensor) -> Detections:
    """The detections at these positions, counted over all parts.

    Row by row: to join the masks of all parts would have them twice in memory.
    """
    chosen: Detections = {}
    for key, values in parts[0].items():
        rows = [row for part in parts for row in part[key]]
        picked = [rows[position] for position in positions.tolist()]
        if isinstance(values, Tensor):
            chosen[key] = torch.stack(picked) if picked else values[:0]
        else:
            chosen[key] = picked
    return chosen
