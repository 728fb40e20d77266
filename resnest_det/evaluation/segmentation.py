"""How a segmentation model is run on images of any size: whole or in windows, once or at several scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOWS_AT_ONCE = 8  # windows in one call of the model, which bounds its memory
CLASSES_AT_ONCE = 16  # classes whose logits exist at an image's own size, where one pass is all
ROWS_AT_ONCE = 64  # rows of an image whose probabilities exist beside the sum they are added to


class SegmentationInference:
    """Labels of images, each at its own size: the `predict` of `evaluate`, and usable by itself.

    Without arguments the model sees every image once, whole, and at its own size. Each argument adds to
    that, and all go together: the image is resized, seen at every scale, as it is and mirrored, and in
    windows where it is larger than one.

    Resizing is bilinear and does not smooth, also when it shrinks: that is how training resizes.

    Args:
        short_side: pixels that the image's shorter side is resized to; 0 keeps its size.
        max_side: pixels that the longer side may have at most, which wins over `short_side`; 0 sets no limit.
        scales: factors on that size. The probabilities at all of them are averaged.
        flip: average with the mirror image too.
        window: side in pixels of the square windows that larger images are cut into; 0 runs images whole.
        stride: pixels from one window to the next, at most `window`; 0 takes two thirds of it. The last
            window is shifted to end at the border. Where windows overlap their logits are averaged, with
            weights that fall towards each window's border, so that no seams show.

    Raises:
        ValueError: an argument is out of its range, or `stride` is given without `window`.

    Example:
        >>> predict = SegmentationInference(scales=(0.75, 1.0, 1.25), flip=True)
        >>> evaluate(model, loader, MeanIoU(class_names), predict=predict)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        short_side: int = 0,
        max_side: int = 0,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: int = 0,
        stride: int = 0,
    ) -> None:
        sizes = {"short_side": short_side, "max_side": max_side, "window": window, "stride": stride}
        for name, size in sizes.items():
            if size < 0:
                raise ValueError(f"{name}={size} is negative; give a number of pixels, or 0 to leave it out")
        if 0 < max_side < short_side:
            raise ValueError(
                f"short_side={short_side} is above max_side={max_side}, and no image can have both; lower "
                f"short_side, or raise max_side or set it to 0"
            )
        if not scales:
            raise ValueError("scales is empty; give at least one factor, such as (1.0,)")
        for scale in scales:
            if not (scale > 0 and math.isfinite(scale)):
                raise ValueError(f"scales has {scale}; a scale is a finite factor above 0, where 1.0 keeps the size")
        if stride and not window:
            raise ValueError(f"stride={stride} has no effect without window; give the window's side too")
        if stride > window:
            raise ValueError(
                f"stride={stride} is above window={window} and would leave pixels between windows unseen; give at "
                f"most {window}"
            )
        self.short_side = short_side
        self.max_side = max_side
        self.scales = tuple(scales)
        self.flip = flip
        self.window = window
        self.stride = stride or max(1, window * 2 // 3)

    @torch.no_grad()
    def __call__(self, model: nn.Module, images: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """The most probable class of every pixel.

        Args:
            model: in evaluation mode, returns a dict with the logits "out" (N, K, H, W) of images
                (N, 3, H, W). What it returns is resized to the image where it is smaller.
            images: float in [0, 1], on the model's device: a list of (3, H, W), or (N, 3, H, W). Those of
                the same size are run as one batch.

        Returns:
            For each image an int64 label map (H, W) of its own size, on its device.

        Raises:
            ValueError: an image has another shape or type; the model is in training mode, returns something
                else, or its logits hold NaN.
        """
        label_maps: dict[int, Tensor] = {}
        for positions in _of_equal_size(images):
            batch = torch.stack([images[position] for position in positions])  # (N, 3, H, W)
            # Of one pass the softmax would change nothing: the largest logit is the largest probability.
            if len(self.scales) == 1 and not self.flip:
                scores = self._logits(model, batch, self.scales[0], mirrored=False)
            else:
                scores = self._probabilities(model, batch)
            best, labels = _best_class(scores, batch.shape[-2:])
            if best.isnan().any():
                raise ValueError("the model's logits hold NaN; every logit must be a number: did the training diverge?")
            label_maps.update(zip(positions, labels, strict=True))
        return [label_maps[position] for position in range(len(images))]

    @torch.no_grad()
    def scores(self, model: nn.Module, image: Tensor) -> Tensor:
        """The probability of every class at every pixel.

        Args:
            model: as in a call.
            image: float (3, H, W) in [0, 1], on the model's device.

        Returns:
            float32 (K, H, W) of the image's own size, summing to 1 over the classes.

        Raises:
            ValueError: as in a call, NaN excepted, which is returned.
        """
        _of_equal_size([image])
        return self._probabilities(model, image[None])[0]

    def _probabilities(self, model: nn.Module, images: Tensor) -> Tensor:
        """The mean over all passes: (N, K, H, W)."""
        total: Tensor | None = None
        for scale in self.scales:
            for mirrored in (False, True) if self.flip else (False,):
                logits = _resized(self._logits(model, images, scale, mirrored=mirrored), images.shape[-2:])
                if total is None:
                    total = torch.zeros_like(logits)
                for sums, rows in zip(total.split(ROWS_AT_ONCE, dim=2), logits.split(ROWS_AT_ONCE, dim=2), strict=True):
                    sums += rows.softmax(dim=1)
        assert total is not None
        return total.div_(len(self.scales) * (2 if self.flip else 1))

    def _logits(self, model: nn.Module, images: Tensor, scale: float, *, mirrored: bool) -> Tensor:
        """One pass, in the images' own orientation and at the size that the model answered in: (N, K, H', W')."""
        height, width = images.shape[-2:]
        resized = _resized(images, self._size(height, width, scale))
        logits = self._windowed(model, resized.flip(-1) if mirrored else resized)
        return logits.flip(-1) if mirrored else logits

    def _size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        factor = self.short_side / min(height, width) if self.short_side else 1.0
        if self.max_side:
            factor = min(factor, self.max_side / max(height, width))
        return max(1, round(height * factor * scale)), max(1, round(width * factor * scale))

    def _windowed(self, model: nn.Module, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.window == 0 or max(height, width) <= self.window:
            return _out(model, images)
        size = min(self.window, height), min(self.window, width)
        weight = _pyramid(*size, device=images.device)
        weights = torch.zeros(height, width, device=images.device)
        total: Tensor | None = None
        corners = [(top, left) for top in self._starts(height) for left in self._starts(width)]
        at_once = max(1, WINDOWS_AT_ONCE // len(images))
        for first in range(0, len(corners), at_once):
            areas = [
                (..., slice(top, top + size[0]), slice(left, left + size[1]))
                for top, left in corners[first : first + at_once]
            ]
            logits = _resized(_out(model, torch.cat([images[area] for area in areas])), size)
            if total is None:
                total = logits.new_zeros(len(images), logits.shape[1], height, width)
            for area, part in zip(areas, logits.split(len(images)), strict=True):
                total[area].addcmul_(part, weight)
                weights[area] += weight
        assert total is not None
        return total.div_(weights)

    def _starts(self, length: int) -> list[int]:
        """Where windows start along a side of `length` pixels."""
        last = max(0, length - self.window)
        return [*range(0, last, self.stride), last]


def _of_equal_size(images: Sequence[Tensor] | Tensor) -> list[list[int]]:
    """The positions of the images, checked, by their size."""
    positions: dict[tuple[int, ...], list[int]] = {}
    for position, image in enumerate(images):
        if image.ndim != 3 or not image.is_floating_point() or image.numel() == 0:
            raise ValueError(
                f"image {position} is {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}; an image is "
                f"float (3, H, W) in [0, 1] with at least one pixel: bytes are to be divided by 255"
            )
        positions.setdefault(tuple(image.shape), []).append(position)
    return list(positions.values())


def _out(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits in float32, as 16 bits are too coarse to resize and to sum."""
    if model.training:
        raise ValueError(
            "the model is in training mode, where BatchNorm would learn from what it is shown; call eval()"
        )
    answer: Any = model(images)
    logits = answer.get("out") if isinstance(answer, Mapping) else None
    if not isinstance(logits, Tensor) or logits.ndim != 4 or len(logits) != len(images):
        raise ValueError(
            f"the model returned {_described(answer)}; a segmentation model returns a dict with the logits 'out' "
            f"(N, K, H, W), here with N = {len(images)}"
        )
    return logits.float()


def _described(answer: Any) -> str:
    if isinstance(answer, Mapping):
        items = (f"{key!r}: {_described(value)}" for key, value in answer.items())
        return f"{{{', '.join(items)}}}"
    shape = f" {tuple(answer.shape)}" if isinstance(answer, Tensor) else ""
    return f"{type(answer).__name__}{shape}"


def _best_class(scores: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The highest score of each pixel at that size, NaN where one is, and its class: both (N, H, W).

    A few classes at a time: all the classes of a large photograph would take gigabytes.
    """
    best, labels = _resized(scores[:, :CLASSES_AT_ONCE], size).max(dim=1)
    for first in range(CLASSES_AT_ONCE, scores.shape[1], CLASSES_AT_ONCE):
        value, label = _resized(scores[:, first : first + CLASSES_AT_ONCE], size).max(dim=1)
        labels = torch.where(value > best, label + first, labels)
        best = torch.maximum(best, value)
    return best, labels


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
    if images.shape[-2:] == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False)


def _pyramid(height: int, width: int, *, device: torch.device) -> Tensor:
    """Weights (height, width) of a window's pixels: their distance to its border, never 0."""
    rows, columns = (
        torch.minimum(steps, steps.flip(0))
        for steps in (torch.arange(1.0, n + 1, device=device) for n in (height, width))
    )
    return torch.minimum(rows[:, None], columns[None, :])
