"""The training augmentations of detection and segmentation, on albumentations.

There is no pipeline for evaluation: what is resized there is the model's matter. Nothing here normalises; images
stay uint8, since the model normalises.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from typing import Any

# Importing albumentations asks the network for a newer version unless this is set.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
from albumentations.core.type_definitions import Targets
from numpy.typing import NDArray

# Jitter of strength 1: factors in 1 ± 0.4 for brightness, contrast and saturation, hue turned by up to ± 0.1
# of the circle.
_MAX_FACTOR, _MAX_HUE = 0.4, 0.1

_MAX_DRAWS = 10  # of a crop with more than one class in it
_MEAN_COLOUR = (124, 116, 104)  # ImageNet's
_IGNORED = 255


class DetectionAugmentation:
    """Random colours, flips and size of an image, its boxes following.

    What becomes of an image depends on `seed` alone: neither on the worker nor on what came before.

    Args:
        short_sides: short sides in pixels, one drawn for each image; empty leaves sizes as they are.
        max_side: limit of the long side in pixels, which wins over the short side (torchvision's rule).
        horizontal_flip: probability in [0, 1].
        vertical_flip: probability in [0, 1].
        color_jitter: strength in [0, 1]; 0 for none, 1 for factors in 1 ± 0.4 of brightness, contrast and
            saturation and a hue turned by up to ± 0.1 of the circle.

    Raises:
        ValueError: a probability or strength outside [0, 1], or a size that is not positive.
    """

    def __init__(
        self,
        short_sides: Sequence[int] = (),
        max_side: int = 1333,
        *,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        color_jitter: float = 0.0,
    ) -> None:
        _check_fractions(horizontal_flip, vertical_flip, color_jitter)
        if any(side < 1 for side in (*short_sides, max_side)):
            raise ValueError(
                f"short_sides={tuple(short_sides)}, max_side={max_side}: sizes are pixels and must be positive"
            )
        if short_sides and min(short_sides) > max_side:
            raise ValueError(
                f"short_sides={tuple(short_sides)} are all above max_side={max_side}, so none could ever be "
                f"reached; raise max_side or lower short_sides"
            )
        steps: list[A.BasicTransform] = []
        if color_jitter:
            steps.append(_jitter(color_jitter))  # first, while the image is small
        steps += _flips(horizontal_flip, vertical_flip)
        if short_sides:
            steps.append(RandomShortSide(short_sides, max_side))
        if not any(isinstance(step, A.DualTransform) for step in steps):
            steps.append(A.NoOp())  # albumentations warns where no step could move a box
        # The format "albumentations" (fractions of the image) is the only one that is not rounded to float32
        # on its way through the pipeline.
        boxes = A.BboxParams("albumentations", clip=True, filter_invalid_bboxes=True)
        self._pipeline = A.Compose(steps, bbox_params=boxes)

    def __call__(
        self, image: NDArray[np.uint8], boxes_xyxy: NDArray[np.float32], seed: int | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
        """Augment one image.

        Args:
            image: RGB, (H, W, 3).
            boxes_xyxy: (N, 4) in pixels; N may be 0.
            seed: decides everything random; None draws afresh.

        Returns:
            The image (H', W', 3), its boxes (M, 4) in its own pixels and clipped to it, and which of the N
            boxes these are (M,), rising. Where neither flip nor resizing happens, boxes inside the image come
            back bit for bit.
        """
        _set_seed(self._pipeline, seed)
        height, width = image.shape[:2]
        fractions = np.empty((len(boxes_xyxy), 5))  # the last column: the box's place
        fractions[:, :4] = boxes_xyxy / np.array([width, height, width, height], np.float64)
        fractions[:, 4] = np.arange(len(boxes_xyxy))
        result = self._pipeline(image=image, bboxes=fractions)
        height, width = result["image"].shape[:2]
        # With no box left, albumentations returns four columns.
        fractions = result["bboxes"] if len(result["bboxes"]) else np.empty((0, 5))
        boxes = (fractions[:, :4] * (width, height, width, height)).astype(np.float32)
        return result["image"], boxes, fractions[:, 4].astype(np.int64)


class SegmentationAugmentation:
    """A random square of a randomly scaled image and its mask, flipped and recoloured.

    Both come out crop_size x crop_size. What the image does not fill, on the right and below, is ImageNet's mean
    colour, ignored (255) in the mask. What becomes of an image depends on `seed` alone.

    Args:
        crop_size: side of the square in pixels.
        base_size: short side in pixels that scale 1 stands for; 0 for the image's own.
        scale: smallest and largest scale, drawn evenly.
        max_class_ratio: a crop whose most frequent class has a larger share of the pixels not ignored is drawn
            again, up to 10 times in all; in (0, 1], 1 for no limit.
        horizontal_flip: probability in [0, 1].
        vertical_flip: probability in [0, 1].
        color_jitter: strength in [0, 1], as of `DetectionAugmentation`.

    Raises:
        ValueError: a probability, strength or ratio out of its range, a size or scale that is not positive.
    """

    def __init__(
        self,
        crop_size: int,
        *,
        base_size: int = 0,
        scale: tuple[float, float] = (0.5, 2.0),
        max_class_ratio: float = 0.75,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        color_jitter: float = 0.0,
    ) -> None:
        _check_fractions(horizontal_flip, vertical_flip, color_jitter)
        if crop_size < 1 or base_size < 0:
            raise ValueError(
                f"crop_size={crop_size}, base_size={base_size}: sizes are pixels; crop_size must be positive, "
                f"base_size may be 0 for the image's own size"
            )
        if not 0 < scale[0] <= scale[1] < math.inf:
            raise ValueError(
                f"scale={tuple(scale)} must be two positive numbers, the smaller one first, e.g. (0.5, 2.0)"
            )
        if not 0 < max_class_ratio <= 1:
            raise ValueError(f"max_class_ratio={max_class_ratio} is outside (0, 1]; use 1 for no limit")
        steps: list[A.BasicTransform] = [RandomScaleCrop(crop_size, base_size, scale, max_class_ratio)]
        steps += _flips(horizontal_flip, vertical_flip)
        if color_jitter:
            steps.append(_jitter(color_jitter))  # before the padding, whose colour stays
        steps.append(A.PadIfNeeded(crop_size, crop_size, position="top_left", fill=_MEAN_COLOUR, fill_mask=_IGNORED))
        self._pipeline = A.Compose(steps)

    def __call__(
        self, image: NDArray[np.uint8], mask: NDArray[np.uint8], seed: int | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Augment one image.

        Args:
            image: RGB, (H, W, 3).
            mask: (H, W), 255 where ignored.
            seed: decides everything random; None draws afresh.

        Returns:
            The image (crop_size, crop_size, 3) and its mask (crop_size, crop_size).
        """
        _set_seed(self._pipeline, seed)
        result = self._pipeline(image=image, mask=mask)
        return result["image"], result["mask"]


class RandomShortSide(A.DualTransform):
    """Resize so that the short side is one drawn of `short_sides`, the long side at most `max_side`.

    torchvision's rule: scale = min(short / min(h, w), max_side / max(h, w)). Bilinear, as torchvision's
    detectors resize in evaluation; masks keep their values (nearest neighbour).

    Args:
        short_sides: in pixels.
        max_side: in pixels.
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES)

    def __init__(self, short_sides: Sequence[int], max_side: int) -> None:
        super().__init__(p=1.0)
        self.short_sides = tuple(short_sides)
        self.max_side = max_side

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Draw the size, once for the image and all that belongs to it."""
        height, width = params["shape"][:2]
        short = self.py_random.choice(self.short_sides)
        scale = min(short / min(height, width), self.max_side / max(height, width))
        return {"size_wh": (max(1, round(width * scale)), max(1, round(height * scale)))}

    def apply(self, img: NDArray[Any], size_wh: tuple[int, int], **_params: Any) -> NDArray[Any]:
        """Resize the image."""
        return cv2.resize(img, size_wh, interpolation=cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: NDArray[Any], size_wh: tuple[int, int], **_params: Any) -> NDArray[Any]:
        """Resize a mask."""
        return cv2.resize(mask, size_wh, interpolation=cv2.INTER_NEAREST)

    def apply_to_bboxes(self, bboxes: NDArray[Any], **_params: Any) -> NDArray[Any]:
        """Boxes are fractions of the image inside albumentations: nothing to do."""
        return bboxes


class RandomScaleCrop(A.DualTransform):
    """Scale at random, then cut out a square of `crop_size`, or what there is of it.

    The piece is cut out first and only then resized, so that the time does not depend on the scale, nor the memory
    on how thin an image is. Bilinear, as models resize in evaluation; masks keep their values (nearest neighbour).

    Args:
        crop_size: in pixels.
        base_size: short side in pixels at scale 1; 0 for the image's own.
        scale: smallest and largest.
        max_class_ratio: of the most frequent class among the pixels not ignored, see `SegmentationAugmentation`.
    """

    _targets = (Targets.IMAGE, Targets.MASK)

    def __init__(self, crop_size: int, base_size: int, scale: tuple[float, float], max_class_ratio: float) -> None:
        super().__init__(p=1.0)
        self.crop_size = crop_size
        self.base_size = base_size
        self.scale = scale
        self.max_class_ratio = max_class_ratio

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the window in the given image and the size it is resized to."""
        height, width = params["shape"][:2]
        scale = self.py_random.uniform(*self.scale)
        if self.base_size:
            scale *= self.base_size / min(height, width)
        window_height, out_height = self._window_side(height, scale)
        window_width, out_width = self._window_side(width, scale)
        for _ in range(_MAX_DRAWS):
            top = self.py_random.randint(0, height - window_height)
            left = self.py_random.randint(0, width - window_width)
            window = (slice(top, top + window_height), slice(left, left + window_width))
            if self.max_class_ratio == 1 or _is_varied(data["mask"][window], self.max_class_ratio):
                break
        return {"window": window, "size_wh": (out_width, out_height)}

    def _window_side(self, side: int, scale: float) -> tuple[int, int]:
        """How many of the image's pixels a side of the crop takes, and how many pixels they become."""
        scaled = max(1, round(side * scale))
        if scaled <= self.crop_size:
            return side, scaled
        return max(1, round(self.crop_size * side / scaled)), self.crop_size

    def apply(
        self, img: NDArray[Any], window: tuple[slice, slice], size_wh: tuple[int, int], **_params: Any
    ) -> NDArray[Any]:
        """Cut and resize the image."""
        return cv2.resize(img[window], size_wh, interpolation=cv2.INTER_LINEAR)

    def apply_to_mask(
        self, mask: NDArray[Any], window: tuple[slice, slice], size_wh: tuple[int, int], **_params: Any
    ) -> NDArray[Any]:
        """Cut and resize a mask."""
        # EXACT samples where bilinear does; INTER_NEAREST would shift the mask by up to half a pixel.
        return cv2.resize(mask[window], size_wh, interpolation=cv2.INTER_NEAREST_EXACT)


def _is_varied(mask: NDArray[np.uint8], max_class_ratio: float) -> bool:
    """Whether no class has more than `max_class_ratio` of the pixels that are not ignored."""
    counts = cv2.calcHist([mask], [0], None, [_IGNORED], [0, _IGNORED])  # of 0..254
    return 0 < float(counts.max()) <= max_class_ratio * float(counts.sum())


def _flips(horizontal: float, vertical: float) -> list[A.BasicTransform]:
    flips = ((A.HorizontalFlip, horizontal), (A.VerticalFlip, vertical))
    return [flip(p=probability) for flip, probability in flips if probability]


def _jitter(strength: float) -> A.BasicTransform:
    factors = (1 - _MAX_FACTOR * strength, 1 + _MAX_FACTOR * strength)
    return A.ColorJitter(factors, factors, factors, (-_MAX_HUE * strength, _MAX_HUE * strength), p=1.0)


def _set_seed(pipeline: A.Compose, seed: int | None) -> None:
    # One generator for all steps. Compose.set_random_seed would give each step its own generator with
    # the same seed, so that an image flipped one way would always be flipped the other way too.
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))


def _check_fractions(horizontal_flip: float, vertical_flip: float, color_jitter: float) -> None:
    for name, value in (
        ("horizontal_flip", horizontal_flip),
        ("vertical_flip", vertical_flip),
        ("color_jitter", color_jitter),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is outside [0, 1]; use 0 for never or none, 1 for the most")
