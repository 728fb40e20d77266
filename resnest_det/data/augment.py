"""The training augmentation of detection: colour jitter, flips and multi-scale resizing, on albumentations.

There is no pipeline for evaluation: the detector itself resizes there. Nothing here normalises; images stay
uint8, since the model normalises.
"""

from __future__ import annotations

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
        for name, value in (
            ("horizontal_flip", horizontal_flip),
            ("vertical_flip", vertical_flip),
            ("color_jitter", color_jitter),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is outside [0, 1]; use 0 for never or none, 1 for the most")
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
            factors = (1 - _MAX_FACTOR * color_jitter, 1 + _MAX_FACTOR * color_jitter)
            hue = (-_MAX_HUE * color_jitter, _MAX_HUE * color_jitter)
            # First, while the image is small.
            steps.append(A.ColorJitter(factors, factors, factors, hue, p=1.0))
        if horizontal_flip:
            steps.append(A.HorizontalFlip(p=horizontal_flip))
        if vertical_flip:
            steps.append(A.VerticalFlip(p=vertical_flip))
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
        # One generator for all steps. Compose.set_random_seed would give each step its own generator with
        # the same seed, so that an image flipped one way would always be flipped the other way too.
        self._pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
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
