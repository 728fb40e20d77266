"""Segmentations painted over images, and ground truth beside prediction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from resnest_det.visualize.pictures import (
    BLACK,
    SHEET_GAP,
    SHEET_TITLE_SIZE,
    WHITE,
    Array,
    Colour,
    Font,
    Picture,
    as_array,
    as_picture,
    class_colour,
    class_name,
    contact_sheet,
    readable_scale,
    text_font,
)

_LARGEST_SIDE = 640  # pixels; a larger image is reduced in a comparison, where three stand side by side
_LEGEND_SIDE = 1000  # pixels; below an image twice as large, the legend is twice as large
_HATCH_PERIOD = 8  # pixels, along a row
_LEGEND_LINE = 24  # pixels from one line of a name to the next
_LEGEND_ENTRY_GAP = 8  # pixels between a class and the one below
_LEGEND_NAME_WIDTH = 280  # pixels; a longer name goes on in the next line
_LEAST_LEGEND_WIDTH = 120  # pixels
_SWATCH_WIDTH, _SWATCH_HEIGHT = 32, 20  # pixels
_NOT_LABELLED = "not labelled"


def paint_segmentation(
    image: Array,
    mask: Array,
    colours: Mapping[int, Colour] | None = None,
    *,
    opacity: float = 0.6,
    ignore_index: int = 255,
) -> Picture:
    """The image in grey with every pixel painted in the colour of its class.

    In grey, so that a class has one colour on whatever it is painted. White lines part the classes; where
    nothing is labelled, the image is pale and hatched.

    Args:
        image: uint8, RGB, either a tensor (3, H, W) or an array (H, W, 3).
        mask: (H, W) integers, each pixel's label from 0, or `ignore_index`.
        colours: the RGB colour, 0..255, of each label; None for `class_colour`.
        opacity: of the paint, from 0, which shows the grey image alone, to 1, which hides it.
        ignore_index: what the mask holds where nothing is labelled.

    Returns:
        The picture (H, W, 3), a new array.

    Raises:
        ValueError: a wrong shape, size or kind, a label below 0 or without a colour, or a wrong colour.
    """
    pixels = as_picture(image)
    labels = _as_mask(mask, "mask", pixels, ignore_index)
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity is {opacity}, expected 0 to 1; give the paint's share, such as 0.6")

    seen = np.unique(labels)
    palette = [WHITE if label == ignore_index else _colour(label, colours) for label in seen.tolist()]
    paint = opacity * np.array(palette, dtype=np.float32)
    painted = paint[np.searchsorted(seen, labels)]  # (H, W, 3)
    painted += (1 - opacity) * _grey(pixels)
    unlabelled = labels == ignore_index
    if unlabelled.any():
        painted[unlabelled] = _hatched(pixels)[unlabelled]
    painted[_borders(labels)] = WHITE
    return painted.round(out=painted).astype(np.uint8)


def draw_segmentation(
    image: Array,
    mask: Array,
    class_names: Mapping[int, str],
    colours: Mapping[int, Colour] | None = None,
    *,
    ignore_index: int = 255,
) -> Picture:
    """The image painted as `paint_segmentation` does, and below it what its colours mean, the largest classes first.

    A small image is enlarged, and the names below a large one are, so that they can be read.

    Args:
        image: uint8, RGB, either a tensor (3, H, W) or an array (H, W, 3).
        mask: (H, W) integers, each pixel's label from 0, or `ignore_index`.
        class_names: the name of each label.
        colours: the RGB colour, 0..255, of each label; None for `class_colour`.
        ignore_index: what the mask holds where nothing is labelled.

    Returns:
        The picture (H', W', 3), a new array.

    Raises:
        ValueError: as `paint_segmentation` and `class_legend`.
    """
    pixels = as_picture(image)
    labels = _as_mask(mask, "mask", pixels, ignore_index)
    seen, areas = np.unique(labels, return_counts=True)
    scale = readable_scale(*pixels.shape[:2])
    if scale > 1:
        size = pixels.shape[1] * scale, pixels.shape[0] * scale
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        labels = labels.repeat(scale, axis=0).repeat(scale, axis=1)
    painted = paint_segmentation(pixels, labels, colours, ignore_index=ignore_index)
    height, width = painted.shape[:2]
    legend = class_legend(
        seen[np.argsort(-areas, kind="stable")].tolist(),
        class_names,
        colours,
        width=max(width, _LEAST_LEGEND_WIDTH),
        scale=max(1, min(round(max(height, width) / _LEGEND_SIDE), width // _LEAST_LEGEND_WIDTH)),
        ignore_index=ignore_index,
    )
    narrower = legend.shape[1] - width
    return np.concatenate([np.pad(painted, ((0, 0), (0, narrower), (0, 0)), constant_values=255), legend])


def class_legend(
    labels: Iterable[int],
    class_names: Mapping[int, str],
    colours: Mapping[int, Colour] | None = None,
    *,
    width: int,
    scale: int = 1,
    ignore_index: int = 255,
) -> Picture:
    """What each colour means: a swatch and a name for each label, in columns read downwards.

    Args:
        labels: in the order in which they stand; `ignore_index` among them is "not labelled".
        class_names: the name of each label; long ones are wrapped.
        colours: the RGB colour, 0..255, of each label; None for `class_colour`.
        width: of the legend in pixels, at least 120 times the scale.
        scale: whole factor by which names, swatches and gaps are enlarged.
        ignore_index: what a mask holds where nothing is labelled.

    Returns:
        The legend (H, width, 3), uint8, black on white.

    Raises:
        ValueError: no labels, a label without a name or a colour, a wrong colour, or too small a width.
    """
    if width < _LEAST_LEGEND_WIDTH * scale:
        raise ValueError(
            f"width is {width}, expected at least {_LEAST_LEGEND_WIDTH * scale} pixels; names need the room"
        )
    labels = [int(label) for label in labels]
    names = [_NOT_LABELLED if label == ignore_index else class_name(label, class_names) for label in labels]
    font = text_font(names, SHEET_TITLE_SIZE * scale)
    gap, line_height = SHEET_GAP * scale, _LEGEND_LINE * scale
    swatch_width, swatch_height = _SWATCH_WIDTH * scale, _SWATCH_HEIGHT * scale
    longest = min(_LEGEND_NAME_WIDTH * scale, width - swatch_width - 3 * gap)
    entries: list[tuple[Picture, list[str]]] = []  # swatches and the lines of their names
    for label, name in zip(labels, names, strict=True):
        swatch = np.full((swatch_height, swatch_width, 3), 128, dtype=np.uint8)
        if label == ignore_index:
            swatch = _hatched(swatch)
        else:
            swatch[:] = _colour(label, colours)
        entries.append((swatch, _wrap(name, font, longest)))
    if not entries:
        raise ValueError("labels is empty, expected at least one; give those that the masks hold")

    name_width = max(math.ceil(font.getlength(line)) for _, lines in entries for line in lines)
    column_width = swatch_width + gap + name_width
    num_columns = max(1, width // (column_width + 2 * gap))
    heights = [len(lines) * line_height + _LEGEND_ENTRY_GAP * scale for _, lines in entries]
    places, height = _columns(heights, num_columns)
    legend = Image.new("RGB", (width, height + 2 * gap), WHITE)
    draw = ImageDraw.Draw(legend)
    for (swatch, lines), (column, above) in zip(entries, places, strict=True):
        left, top = gap + column * (column_width + 2 * gap), gap + above
        legend.paste(Image.fromarray(swatch), (left, top + (line_height - swatch_height) // 2))
        for number, line in enumerate(lines):
            middle = top + number * line_height + line_height // 2
            draw.text((left + swatch_width + gap, middle), line, fill=BLACK, font=font, anchor="lm")
    return np.asarray(legend).copy()


def compare_segmentations(
    images: Sequence[Array],
    masks: Sequence[Array],
    predictions: Sequence[Array],
    class_names: Mapping[int, str],
    *,
    colours: Mapping[int, Colour] | None = None,
    names: Sequence[str] | None = None,
    ignore_index: int = 255,
) -> Picture:
    """Image, ground truth and prediction side by side, one image a row, and below them what the colours mean.

    Small images are enlarged and large ones reduced, so that the sheet can be read as a whole.

    Args:
        images: uint8 RGB images as `paint_segmentation` takes them.
        masks: for each image the true labels (H, W), integers, or `ignore_index`.
        predictions: for each image the predicted labels (H, W), integers.
        class_names: the name of each label.
        colours: the RGB colour, 0..255, of each label; None for `class_colour`.
        names: what stands above each row, such as file names; None for nothing.
        ignore_index: what a mask holds where nothing is labelled.

    Returns:
        The sheet (H, W, 3), uint8.

    Raises:
        ValueError: the lists differ in length or are empty, or as in `paint_segmentation` and `class_legend`.
    """
    if not len(images) == len(masks) == len(predictions):
        raise ValueError(
            f"{len(images)} images, {len(masks)} masks and {len(predictions)} predictions, "
            f"expected as many of each; give one mask and one prediction an image"
        )
    rows = []
    seen: set[int] = set()
    for number, (image, mask, prediction) in enumerate(zip(images, masks, predictions, strict=True)):
        pixels = as_picture(image)
        truth = _as_mask(mask, f"masks[{number}]", pixels, ignore_index)
        predicted = _as_mask(prediction, f"predictions[{number}]", pixels, ignore_index)
        seen.update(np.unique(truth).tolist(), np.unique(predicted).tolist())
        height, width = _drawn_size(*pixels.shape[:2])
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
        row = [pixels]
        for labels in (truth, predicted):
            resized = labels[np.ix_(_nearest(len(labels), height), _nearest(labels.shape[1], width))]
            row.append(paint_segmentation(pixels, resized, colours, ignore_index=ignore_index))
        rows.append(row)
    sheet = contact_sheet(rows, column_titles=("image", "ground truth", "prediction"), row_titles=names)
    shown = sorted(seen, key=lambda label: (label == ignore_index, label))
    legend = class_legend(shown, class_names, colours, width=sheet.shape[1], ignore_index=ignore_index)
    return np.concatenate([sheet, legend])


def _as_mask(mask: Array, name: str, pixels: Picture, ignore_index: int) -> npt.NDArray[Any]:
    """The mask as an array (H, W) of labels, found to fit its image."""
    labels = as_array(mask)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name} is of {labels.dtype}, expected integers; give each pixel's label, not its scores")
    if labels.ndim != 2:
        raise ValueError(f"{name} has shape {labels.shape}, expected (H, W); give one label a pixel")
    if labels.shape != pixels.shape[:2]:
        raise ValueError(
            f"{name} has shape {labels.shape}, expected {pixels.shape[:2]}, the height and width of its image; "
            f"resize it to the image"
        )
    lowest = int(labels.min(initial=0, where=labels != ignore_index))
    if lowest < 0:
        raise ValueError(
            f"{name} holds the label {lowest}, expected labels from 0 or ignore_index {ignore_index}; "
            f"if it stands for pixels without a label, give ignore_index={lowest}"
        )
    few = np.iinfo(np.int16)
    if few.min <= labels.min(initial=0) and labels.max(initial=0) <= few.max:
        return labels.astype(np.int16)  # which is compared and sorted in a fraction of the time
    return labels


def _colour(label: int, colours: Mapping[int, Colour] | None) -> Colour:
    if colours is None:
        return class_colour(label)
    if label not in colours:
        raise ValueError(f"label {label} has no colour in colours, which has {len(colours)}; add it")
    colour = colours[label]
    if len(colour) != 3 or not all(isinstance(value, Integral) and 0 <= value <= 255 for value in colour):
        raise ValueError(
            f"label {label} has the colour {colour}, expected three integers 0..255; give red, green, blue"
        )
    return colour


def _grey(pixels: Picture) -> npt.NDArray[np.float32]:
    """The brightness (H, W, 1), 0..255."""
    return pixels.mean(axis=-1, keepdims=True, dtype=np.float32)


def _hatched(pixels: Picture) -> Picture:
    """The image pale under slanting lines, as what is not labelled looks."""
    pale = 0.4 * _grey(pixels) + 0.6 * 255
    y, x = np.indices(pixels.shape[:2])
    pale[(x + y) % _HATCH_PERIOD < 2] -= 48
    return np.repeat(pale.round().astype(np.uint8), 3, axis=-1)


def _borders(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which pixels differ from their neighbour at the left or above: lines of one pixel."""
    borders = np.zeros(labels.shape, dtype=bool)
    borders[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    borders[1:] |= labels[1:] != labels[:-1]
    return borders


def _drawn_size(height: int, width: int) -> tuple[int, int]:
    """The height and width at which an image is shown in a comparison."""
    scale = min(readable_scale(height, width), _LARGEST_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _nearest(length: int, drawn: int) -> npt.NDArray[np.int64]:
    """For each of `drawn` pixels the nearest of `length`."""
    return (np.arange(drawn) * 2 + 1) * length // (2 * drawn)


def _columns(heights: Sequence[int], num_columns: int) -> tuple[list[tuple[int, int]], int]:
    """Where things of these heights go in columns read downwards, and the least height that needs.

    Returns:
        For each its column and the pixels above it; the columns' height.
    """
    limit = max(*heights, math.ceil(sum(heights) / num_columns))
    while True:
        places = []
        column = top = 0
        for height in heights:
            if top + height > limit:
                column, top = column + 1, 0
            places.append((column, top))
            top += height
        if column < num_columns:
            return places, limit
        limit += 1


def _wrap(name: str, font: Font, width: int) -> list[str]:
    """The name in lines that are at most `width` pixels wide: broken between words, or within one too long."""
    lines = [""]
    for word in name.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
