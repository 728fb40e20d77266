"""How well a detector's anchors fit the objects of a data set, and which would fit better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_NUM_TRIED = 3000  # objects that candidates are compared on
_GROWTHS = (1.4, 1.6, 1.8, 2.0, 2.2)  # of the sizes from level to level
_LEAST_SIZES = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96)  # of the finest level, in pixels
_LEAST_SPREAD = 1.25  # from an aspect ratio to the next; nearer ones would be one anchor twice
_LEAST_GAIN = 0.05  # of all objects, that a suggestion must fit better


@dataclass(frozen=True)
class Anchors:
    """The anchors of a detector on a pyramid, and the resizing of the images that they stand on.

    Args:
        sizes: side in pixels of the square anchors, one a level, finest level first.
        aspect_ratios: height over width, at each level.
        min_size: short side in pixels that images are resized to.
        max_size: bound of the long side, in pixels.
        strides: pixels from an anchor to the next, one a level.
        octaves: sizes a level: 3 in RetinaNet, each a third of an octave above the one before.

    Raises:
        ValueError: sizes and strides are not one a level, or a number is not positive.
    """

    sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    min_size: int = 800
    max_size: int = 1333
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    octaves: int = 1

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.strides):
            raise ValueError(f"sizes has {len(self.sizes)} levels and strides {len(self.strides)}; give one a level")
        numbers = (*self.sizes, *self.aspect_ratios, *self.strides, self.min_size, self.max_size, self.octaves)
        if not self.sizes or not self.aspect_ratios or min(numbers) <= 0:
            raise ValueError(f"{self} has a number that is not positive, or none where some are needed")

    def shapes(self) -> FloatArray:
        """Width, height and stride of each anchor around a place, in pixels as torchvision rounds them, (M, 3)."""
        shapes = []
        for size, stride in zip(self.sizes, self.strides, strict=True):
            for octave in range(self.octaves):
                side = int(size * 2 ** (octave / 3))
                for ratio in self.aspect_ratios:
                    height_factor = math.sqrt(ratio)
                    half = np.round(np.array([side / height_factor, side * height_factor]) / 2)
                    shapes.append((*(2 * half), stride))
        return np.array(shapes, np.float64)

    def resized(self, objects_wh: FloatArray, images_wh: NDArray[np.int64]) -> FloatArray:
        """Widths and heights of objects, (N, 2), after their images, of sizes (N, 2), are resized."""
        scale = np.minimum(self.min_size / images_wh.min(axis=1), self.max_size / images_wh.max(axis=1))
        return objects_wh * scale[:, None]

    def best_ious(self, objects_wh: FloatArray) -> FloatArray:
        """The IoU of each object with the anchor that fits it best.

        Anchors stand on a grid, so that the nearest one's middle is on average a quarter of its stride beside the
        object's, in x and in y. IoU is taken there.

        Args:
            objects_wh: widths and heights after resizing, (N, 2).
        """
        best = np.zeros(len(objects_wh))
        area = objects_wh.prod(axis=1)
        for width, height, stride in self.shapes().tolist():
            overlap = np.ones(len(objects_wh))
            for axis, side in enumerate((width, height)):
                half = objects_wh[:, axis] / 2
                low, high = stride / 4 - side / 2, stride / 4 + side / 2
                overlap *= np.clip(np.minimum(half, high) - np.maximum(-half, low), 0, None)
            np.maximum(best, overlap / (area + width * height - overlap), out=best)
        return best

    def overrides(self, current: Anchors) -> str:
        """The settings that make these anchors of `current`, to paste behind a command."""
        changed = {
            "anchor_sizes": (self.sizes, current.sizes),
            "aspect_ratios": (self.aspect_ratios, current.aspect_ratios),
        }
        return " ".join(
            f"'model.{key}=[{', '.join(map(str, ours))}]'" for key, (ours, theirs) in changed.items() if ours != theirs
        )


def better_anchors(objects_wh: FloatArray, anchors: Anchors) -> Anchors | None:
    """Anchors that leave fewer objects below an IoU of 0.5, as many of them and on the same pyramid.

    Geometric series of sizes and the quantiles of the objects' own are tried with three sets of aspect ratios, on at
    most 3000 of the objects; the best is held against `anchors` on all of them.

    Args:
        objects_wh: widths and heights after resizing, (N, 2), positive.
        anchors: the present ones.

    Returns:
        Those found, or None where they would not fit at least 5 in 100 objects more, or leave more below 0.3.
    """
    if not len(objects_wh):
        return None
    tried = objects_wh[np.linspace(0, len(objects_wh) - 1, min(_NUM_TRIED, len(objects_wh))).round().astype(int)]
    candidates = [
        replace(anchors, sizes=sizes, aspect_ratios=ratios)
        for sizes, ratios in itertools.product(_candidate_sizes(tried, anchors), _candidate_ratios(tried, anchors))
    ]
    best = max(candidates, key=lambda candidate: _quality(candidate.best_ious(tried)))
    ours, theirs = best.best_ious(objects_wh), anchors.best_ious(objects_wh)
    gain = (theirs < 0.5).mean() - (ours < 0.5).mean()
    return best if gain >= _LEAST_GAIN and (ours < 0.3).mean() <= (theirs < 0.3).mean() else None


def _quality(ious: FloatArray) -> tuple[float, float]:
    return float((ious >= 0.5).mean()), float(ious.mean())


def _candidate_sizes(objects_wh: FloatArray, anchors: Anchors) -> list[tuple[int, ...]]:
    levels = range(len(anchors.sizes))
    candidates = [
        tuple(round(least * growth**level) for level in levels) for least in _LEAST_SIZES for growth in _GROWTHS
    ]
    sides = np.sqrt(objects_wh.prod(axis=1))
    quantiles = np.quantile(sides, [(2 * level + 1) / (2 * len(levels)) for level in levels])
    candidates.append(tuple(max(1, round(side)) for side in quantiles.tolist()))
    candidates.append(anchors.sizes)
    return candidates


def _candidate_ratios(objects_wh: FloatArray, anchors: Anchors) -> Sequence[tuple[float, ...]]:
    """The present ones, torchvision's, and quantiles of the objects' own: as many as there are."""
    number = len(anchors.aspect_ratios)
    logarithms = np.log(objects_wh[:, 1] / objects_wh[:, 0])
    own = np.exp(np.quantile(logarithms, [(2 * place + 1) / (2 * number) for place in range(number)])).round(2)
    candidates = [anchors.aspect_ratios]
    if number == 3:
        candidates.append((0.5, 1.0, 2.0))
    if own.min() > 0 and (own[1:] >= _LEAST_SPREAD * own[:-1]).all():
        candidates.append(tuple(own.tolist()))
    return candidates
