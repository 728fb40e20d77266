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

from resnest_det.data.mixing import MIN_BOX_SIDE

# Jitter of strength 1: factors in 1 ± 0.4 for brightness, contrast and saturation, hue turned by up to ± 0.1
# of the circle.
_MAX_FACTOR, _MAX_HUE = 0.4, 0.1

_MAX_DRAWS = 10  # of a crop with more than one class in it
_MEAN_COLOUR = (124, 116, 104)  # ImageNet's
_IGNORED = 255


class DetectionAugmentation:
    """Random colours, flips and size of an image, its boxes and masks following.

    The size is one of a few short sides (multi-scale training), or it is large-scale jitter (Ghiasi et al., 2021,
    arXiv 2012.07177; detectron2's ResizeScale and FixedSizeCrop): the image is scaled so that it would just fit a
    square of crop_size times a drawn factor, and a crop of at most crop_size x crop_size is taken from anywhere in
    it. What is smaller stays smaller: unlike detectron2's, the crop is not padded, since torchvision's detectors pad
    the batch. A box that the crop cuts is clipped, also where its mask would allow a smaller one.

    What becomes of an image depends on `seed` alone: neither on the worker nor on what came before.

    Args:
        short_sides: short sides in pixels, one drawn for each image; empty leaves sizes as they are.
        max_side: limit of the long side in pixels, which wins over the short side (torchvision's rule); of
            short_sides only.
        horizontal_flip: probability in [0, 1].
        vertical_flip: probability in [0, 1].
        color_jitter: strength in [0, 1]; 0 for none, 1 for factors in 1 ± 0.4 of brightness, contrast and
            saturation and a hue turned by up to ± 0.1 of the circle.
        scale_jitter: smallest and largest factor of large-scale jitter, drawn evenly, (0.1, 2.0) in the paper; None
            for none. Excludes short_sides.
        crop_size: side in pixels of the square that factor 1 fits the image into and that crops are limited to,
            1024 in the paper; of scale_jitter only.

    Raises:
        ValueError: a probability or strength outside [0, 1], a size or factor that is not positive, short_sides
            together with scale_jitter, or one of scale_jitter and crop_size without the other.
    """

    def __init__(
        self,
        short_sides: Sequence[int] = (),
        max_side: int = 1333,
        *,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        color_jitter: float = 0.0,
        scale_jitter: tuple[float, float] | None = None,
        crop_size: int = 0,
    ) -> None:
        _check_fractions(horizontal_flip, vertical_flip, color_jitter)
        _check_scale_jitter(scale_jitter, crop_size, short_sides)
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
        self._min_box_side = 0.0  # resizing alone drops nothing
        if scale_jitter is not None:
            steps.append(LargeScaleJitter(crop_size, scale_jitter))
            self._min_box_side = MIN_BOX_SIDE
        # Without bbox_params: they cost ten times the steps themselves, and round boxes in all formats but one.
        self._pipeline = A.Compose(steps)

    def __call__(
        self,
        image: NDArray[np.uint8],
        boxes_xyxy: NDArray[np.float32],
        masks: NDArray[np.uint8] | None = None,
        seed: int | None = None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8] | None, NDArray[np.int64]]:
        """Augment one image.

        Args:
            image: RGB, (H, W, 3).
            boxes_xyxy: (N, 4) in pixels; N may be 0.
            masks: the boxes' masks of 0 and 1, (N, H, W), or None.
            seed: decides everything random; None draws afresh.

        Returns:
            The image (H', W', 3), its boxes (M, 4) in its own pixels and clipped to it, their masks (M, H', W') or
            None, and which of the N boxes these are (M,), rising. Boxes outside the image are dropped; with
            large-scale jitter, so are those less than 1 px wide or high in what is returned, which is
            `CocoDetection`'s rule. A box stays though its mask has no pixel left. Where neither flip nor resizing
            happens, boxes inside the image come back bit for bit.

        Raises:
            ValueError: the masks are not one for each box, of the image's size.
        """
        height, width = image.shape[:2]
        num_boxes = len(boxes_xyxy)
        # Steps take and return boxes as fractions of the image.
        fractions = boxes_xyxy / np.array([width, height, width, height], np.float64)
        inputs = {"image": image, "bboxes": fractions}
        if masks is not None:
            if masks.shape != (num_boxes, height, width):
                raise ValueError(
                    f"masks of shape {masks.shape} do not fit {num_boxes} boxes on an image of {width} x {height} "
                    f"pixels; give one mask for each box, {(num_boxes, height, width)}"
                )
            if num_boxes:  # albumentations takes no stack of no masks
                inputs["masks"] = masks
        _set_seed(self._pipeline, seed)
        result = self._pipeline(**inputs)

        image = result["image"]
        height, width = image.shape[:2]
        pixels = result["bboxes"].clip(0, 1) * (width, height, width, height)
        sides = pixels[:, 2:] - pixels[:, :2]
        # Rounded, since 1.8 + 1 - 1.8 is a little less than 1.
        kept = np.flatnonzero(((sides > 0) & (np.round(sides, 6) >= self._min_box_side)).all(axis=1))
        if masks is not None:
            masks = result["masks"][kept] if num_boxes else np.empty((0, height, width), np.uint8)
        return image, pixels[kept].astype(np.float32), masks, kept


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
        _check_range("scale", scale, "(0.5, 2.0)")
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


class CutAndResize(A.DualTransform):
    """Cut a window out of an image and of what belongs to it, and resize it.

    A subclass draws the two: a window of rows and columns in the image, and the size (width, height) that it takes.
    The image is cut first and only then resized, so that the time does not depend on the scale, nor the memory on
    how thin an image is. Bilinear, as models resize in evaluation; masks keep their values (nearest neighbour).
    """

    _targets: tuple[Targets, ...] = (Targets.IMAGE, Targets.MASK)

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


class RandomShortSide(CutAndResize):
    """Resize so that the short side is one drawn of `short_sides`, the long side at most `max_side`.

    torchvision's rule: scale = min(short / min(h, w), max_side / max(h, w)).

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
        size_wh = max(1, round(width * scale)), max(1, round(height * scale))
        return {"window": (slice(height), slice(width)), "size_wh": size_wh}

    def apply_to_bboxes(self, bboxes: NDArray[Any], **_params: Any) -> NDArray[Any]:
        """Boxes are fractions of the image inside the pipeline: nothing to do."""
        return bboxes


class LargeScaleJitter(CutAndResize):
    """Scale to fit a square of `crop_size` times a drawn factor, and take a random crop of at most `crop_size`.

    Args:
        crop_size: in pixels.
        scale_jitter: smallest and largest factor.
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES)

    def __init__(self, crop_size: int, scale_jitter: tuple[float, float]) -> None:
        super().__init__(p=1.0)
        self.crop_size = crop_size
        self.scale_jitter = scale_jitter

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Draw the window in the given image and the size it is resized to."""
        height, width = params["shape"][:2]
        scale = self.py_random.uniform(*self.scale_jitter) * self.crop_size / max(height, width)
        window_hw, size_wh = _crop_sizes(height, width, scale, self.crop_size)
        return {"window": _random_window(self.py_random, height, width, window_hw), "size_wh": size_wh}

    def apply_to_bboxes(
        self, bboxes: NDArray[Any], window: tuple[slice, slice], shape: tuple[int, ...], **_params: Any
    ) -> NDArray[Any]:
        """From fractions of the image to fractions of the window, still beyond it where they are."""
        rows, columns = window
        offset = np.array([columns.start, rows.start] * 2)
        size = np.array([columns.stop - columns.start, rows.stop - rows.start] * 2)
        return (bboxes * (shape[1], shape[0], shape[1], shape[0]) - offset) / size


class RandomScaleCrop(CutAndResize):
    """Scale at random, then take a random square of `crop_size`, or what there is of it.

    Args:
        crop_size: in pixels.
        base_size: short side in pixels at scale 1; 0 for the image's own.
        scale: smallest and largest.
        max_class_ratio: of the most frequent class among the pixels not ignored, see `SegmentationAugmentation`.
    """

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
        window_hw, size_wh = _crop_sizes(height, width, scale, self.crop_size)
        for _ in range(_MAX_DRAWS):
            window = _random_window(self.py_random, height, width, window_hw)
            if self.max_class_ratio == 1 or _is_varied(data["mask"][window], self.max_class_ratio):
                break
        return {"window": window, "size_wh": size_wh}


def _crop_sizes(height: int, width: int, scale: float, crop_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many of the image's rows and columns a crop takes, and the width and height that they are resized to."""
    sizes = []
    for side in (height, width):
        scaled = max(1, round(side * scale))
        if scaled <= crop_size:
            sizes.append((side, scaled))
        else:
            sizes.append((max(1, round(crop_size * side / scaled)), crop_size))
    (window_height, out_height), (window_width, out_width) = sizes
    return (window_height, window_width), (out_width, out_height)


def _random_window(
    generator: random.Random, height: int, width: int, window_hw: tuple[int, int]
) -> tuple[slice, slice]:
    """Rows and columns of a window of this size, anywhere in the image."""
    top = generator.randint(0, height - window_hw[0])
    left = generator.randint(0, width - window_hw[1])
    return slice(top, top + window_hw[0]), slice(left, left + window_hw[1])


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


def _check_scale_jitter(scale_jitter: tuple[float, float] | None, crop_size: int, short_sides: Sequence[int]) -> None:
    if scale_jitter is None:
        if crop_size:
            raise ValueError(
                f"crop_size={crop_size} has no effect without scale_jitter; give scale_jitter, e.g. (0.1, 2.0), or "
                f"leave crop_size out"
            )
        return
    _check_range("scale_jitter", scale_jitter, "(0.1, 2.0)")
    if short_sides:
        raise ValueError(
            f"short_sides={tuple(short_sides)} and scale_jitter={tuple(scale_jitter)} both decide the size; leave "
            f"short_sides empty for large-scale jitter, or leave scale_jitter out for multi-scale training"
        )
    if crop_size < 1:
        raise ValueError(
            f"crop_size={crop_size} with scale_jitter={tuple(scale_jitter)}: the square that the image is scaled to "
            f"and cut to needs a positive side in pixels, e.g. crop_size=1024"
        )


def _check_range(name: str, value: tuple[float, float], example: str) -> None:
    if len(value) != 2 or not 0 < value[0] <= value[1] < math.inf:
        raise ValueError(f"{name}={tuple(value)} must be two positive numbers, the smaller one first, e.g. {example}")
