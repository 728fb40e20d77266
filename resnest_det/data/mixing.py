"""Training images made of several: mosaic and copy-paste.

Mosaic: Bochkovskiy et al., "YOLOv4: Optimal Speed and Accuracy of Object Detection", arXiv 2004.10934; reference
implementation: load_mosaic of https://github.com/ultralytics/yolov5.
Copy-paste: Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation",
arXiv 2012.07177; reference implementation: CopyPaste of https://github.com/open-mmlab/mmdetection.

`data.coco.CocoDetection` reads the images that are mixed and decides, from the seed of the draw, which they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

# In training, a box less than this many pixels wide or high after clipping is left out: it covers no whole
# pixel, and the regression target log(width) runs away for thinner ones.
MIN_BOX_SIDE = 1.0

_MEAN_COLOUR = (124, 116, 104)  # ImageNet's: nothing but zeros once the model has normalised


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image with its N objects."""

    image: NDArray[np.uint8]  # RGB, (H, W, 3)
    boxes_xyxy: NDArray[np.float32]  # (N, 4) in pixels
    labels: NDArray[np.int64]  # (N,)
    areas: NDArray[np.float64]  # (N,) in pixels
    iscrowd: NDArray[np.bool_]  # (N,)
    masks: NDArray[np.uint8] | None  # (N, H, W) of 0 and 1; None where they were not asked for

    def keep(self, objects: NDArray[np.bool_]) -> AnnotatedImage:
        """The image with those of its objects, (N,)."""
        return AnnotatedImage(
            self.image,
            self.boxes_xyxy[objects],
            self.labels[objects],
            self.areas[objects],
            self.iscrowd[objects],
            None if self.masks is None else self.masks[objects],
        )


class Mosaic:
    """Four images around a random point of one square canvas.

    Each image is scaled so that its long side is that of the canvas, touches the point with a corner, and is cut
    where the canvas ends. The point lies in the middle half of the canvas, both ways. What no image covers is
    ImageNet's mean colour; images of 4:3 leave nothing over. The reference lays the images out on a canvas twice as
    wide and high, and then warps and crops it; here that is left to the transform.

    Of an object that is cut, the box is clipped. The object is left out if less than `min_visible` of it remains,
    or less than 1 px of the width or height of its box. Its area is that of its mask on the canvas; where there
    are no masks, the annotated area, scaled, times the share of the box that remains.

    Args:
        probability: of a mosaic in the place of an image, in [0, 1].
        side: of the canvas in pixels; 0 for the long side of the first image, which then keeps its size.
        min_visible: the least share of an object that must remain, in [0, 1]: of its mask, or of its box where
            there are no masks.

    Raises:
        ValueError: a probability or share outside [0, 1], or a negative side.
    """

    def __init__(self, probability: float, *, side: int = 0, min_visible: float = 0.1) -> None:
        _check_fraction("probability", probability)
        _check_fraction("min_visible", min_visible)
        if side < 0:
            raise ValueError(f"side={side} is negative; give pixels, or 0 for the long side of the first image")
        self.probability, self.side, self.min_visible = probability, side, min_visible

    def __call__(self, images: Sequence[AnnotatedImage], generator: np.random.Generator) -> AnnotatedImage:
        """Lay out four images.

        Args:
            images: upper left, upper right, lower left, lower right; all with masks or all without.
            generator: draws the point where they meet.

        Returns:
            The canvas with the objects of all, in the order of the images.

        Raises:
            ValueError: another number of images.
        """
        if len(images) != 4:
            raise ValueError(f"{len(images)} images make no mosaic; give 4")
        side = self.side or max(images[0].image.shape[:2])
        x, y = generator.integers(side // 4, side - side // 4, size=2, endpoint=True).tolist()
        canvas = np.full((side, side, 3), _MEAN_COLOUR, np.uint8)
        parts = []
        for place, annotated in enumerate(images):
            scaled = _resize(annotated, side / max(annotated.image.shape[:2]))
            height, width = scaled.image.shape[:2]
            left = x if place % 2 else x - width
            top = y if place >= 2 else y - height
            parts.append(self._put(scaled, left, top, canvas))
        return AnnotatedImage(
            canvas,
            np.concatenate([part.boxes_xyxy for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.areas for part in parts]),
            np.concatenate([part.iscrowd for part in parts]),
            None
            if images[0].masks is None
            else np.concatenate([part.masks for part in parts if part.masks is not None]),
        )

    def _put(self, annotated: AnnotatedImage, left: int, top: int, canvas: NDArray[np.uint8]) -> AnnotatedImage:
        """Paint the image onto the canvas, its corner at (left, top), and return the canvas with its objects."""
        (height, width), side = annotated.image.shape[:2], len(canvas)
        rows = slice(max(top, 0), min(top + height, side))  # of the canvas
        columns = slice(max(left, 0), min(left + width, side))
        seen = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        canvas[rows, columns] = annotated.image[seen]
        boxes = np.clip(annotated.boxes_xyxy + np.array([left, top, left, top], np.float32), 0, side)
        if annotated.masks is None:
            whole, visible = _box_areas(annotated.boxes_xyxy), _box_areas(boxes)
        else:
            whole, visible = _num_pixels(annotated.masks), _num_pixels(annotated.masks[:, *seen])
        kept = _remains(visible, whole, self.min_visible) & (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(axis=1)
        part = annotated.keep(kept)
        visible, whole, masks = visible[kept], whole[kept], None
        if part.masks is not None:
            masks = np.zeros((len(part.masks), side, side), np.uint8)
            masks[:, rows, columns] = part.masks[:, *seen]
        areas = visible if part.masks is not None else part.areas * visible / whole
        return AnnotatedImage(canvas, boxes[kept], part.labels, areas, part.iscrowd, masks)


class CopyPaste:
    """Objects of one image pasted onto another, in their places.

    A random number of the other image's objects, at least one, is cut out along the masks and pasted, the upper
    left corners of the images meeting, as if both were padded to one size on the right and below. Nothing is
    blended: the paper found that blending the edges changes nothing.

    A pasted object, and one that is now partly covered, has its visible mask, and the box around that. Those
    with less than `min_visible` of their mask left, and those with nothing left, are left out; the paper leaves
    out what is covered altogether. All areas are counted from the masks, in pixels of the mixed image.

    Args:
        probability: of pasting onto an image, in [0, 1].
        min_visible: the least share of its mask that an object must keep, in [0, 1].

    Raises:
        ValueError: a probability or share outside [0, 1].
    """

    def __init__(self, probability: float, *, min_visible: float = 0.1) -> None:
        _check_fraction("probability", probability)
        _check_fraction("min_visible", min_visible)
        self.probability, self.min_visible = probability, min_visible

    def __call__(self, below: AnnotatedImage, above: AnnotatedImage, generator: np.random.Generator) -> AnnotatedImage:
        """Paste.

        Args:
            below: the image that is pasted onto.
            above: the image whose objects are pasted.
            generator: draws how many and which.

        Returns:
            `below` with what is left of its objects, then the pasted ones; `below` itself where nothing of the
            drawn objects would be visible on it.

        Raises:
            ValueError: an image without masks.
        """
        if below.masks is None or above.masks is None:
            raise ValueError("copy-paste needs masks, and an image came without; use CocoDetection(masks=True)")
        num_objects = len(above.labels)
        if not num_objects:
            return below
        drawn = np.zeros(num_objects, np.bool_)
        drawn[generator.permutation(num_objects)[: generator.integers(1, num_objects, endpoint=True)]] = True
        chosen = above.keep(drawn)
        assert chosen.masks is not None
        height, width = below.image.shape[:2]
        shared = (slice(min(height, above.image.shape[0])), slice(min(width, above.image.shape[1])))
        whole, visible = _num_pixels(chosen.masks), _num_pixels(chosen.masks[:, *shared])
        remains = _remains(visible, whole, self.min_visible)
        if not remains.any():
            return below
        chosen = chosen.keep(remains)
        assert chosen.masks is not None
        pasted = np.zeros((len(chosen.masks), height, width), np.uint8)
        pasted[:, *shared] = chosen.masks[:, *shared]
        cover: NDArray[np.bool_] = np.any(pasted, axis=0)

        image = below.image.copy()
        image[cover] = above.image[shared][cover[shared]]
        uncovered = below.masks * ~cover
        whole, visible = _num_pixels(below.masks), _num_pixels(uncovered)
        boxes = below.boxes_xyxy.copy()
        touched = (visible > 0) & (visible < whole)
        boxes[touched] = _boxes_around(uncovered[touched])
        remains = _remains(visible, whole, self.min_visible)
        return AnnotatedImage(
            image,
            np.concatenate((boxes[remains], _boxes_around(pasted))),
            np.concatenate((below.labels[remains], chosen.labels)),
            np.concatenate((visible[remains], _num_pixels(pasted))),
            np.concatenate((below.iscrowd[remains], chosen.iscrowd)),
            np.concatenate((uncovered[remains], pasted)),
        )


def _resize(annotated: AnnotatedImage, scale: float) -> AnnotatedImage:
    """The image and its objects at another size, the sides rounded to whole pixels."""
    height, width = annotated.image.shape[:2]
    size = (max(round(width * scale), 1), max(round(height * scale), 1))  # as OpenCV writes it: width, height
    x_scale, y_scale = size[0] / width, size[1] / height
    masks = None
    if annotated.masks is not None:
        masks = np.empty((len(annotated.masks), size[1], size[0]), np.uint8)
        for source, destination in zip(annotated.masks, masks, strict=True):
            # Exact: the plain nearest neighbour shifts masks by up to half a pixel against the image.
            cv2.resize(source, size, dst=destination, interpolation=cv2.INTER_NEAREST_EXACT)
    return AnnotatedImage(
        np.asarray(cv2.resize(annotated.image, size, interpolation=cv2.INTER_LINEAR), np.uint8),
        annotated.boxes_xyxy * np.array([x_scale, y_scale, x_scale, y_scale], np.float32),
        annotated.labels,
        annotated.areas * (x_scale * y_scale),
        annotated.iscrowd,
        masks,
    )


def _remains(visible: NDArray[np.float64], whole: NDArray[np.float64], min_visible: float) -> NDArray[np.bool_]:
    """Which objects still show enough of themselves."""
    return (visible > 0) & (visible >= min_visible * whole)


def _num_pixels(masks: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The pixels of each mask of 0 and 1, (N,), as areas are counted."""
    # As bools, which NumPy counts many at a time.
    return np.array([np.count_nonzero(mask) for mask in masks.view(np.bool_)], np.float64)


def _box_areas(boxes_xyxy: NDArray[np.float32]) -> NDArray[np.float64]:
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).astype(np.float64).prod(axis=1)


def _boxes_around(masks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The smallest boxes around masks (N, H, W) that all have a pixel, xyxy (N, 4)."""
    height, width = masks.shape[1:]
    rows: NDArray[np.bool_] = np.any(masks, axis=2)  # (N, H)
    columns: NDArray[np.bool_] = np.any(masks, axis=1)  # (N, W)
    left, top = columns.argmax(axis=1), rows.argmax(axis=1)
    right, bottom = width - columns[:, ::-1].argmax(axis=1), height - rows[:, ::-1].argmax(axis=1)
    return np.stack((left, top, right, bottom), axis=1).astype(np.float32)


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is outside [0, 1]; it is a fraction")
