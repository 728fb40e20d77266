"""Detections drawn onto images, boxes and masks, and ground truth beside prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from resnest_det.visualize.pictures import (
    BLACK,
    WHITE,
    Array,
    Colour,
    Picture,
    as_array,
    as_picture,
    class_colour,
    class_name,
    contact_sheet,
    readable_scale,
)

Rectangle = tuple[float, float, float, float]  # xyxy
Masks = Array | Sequence[Any]

_MASK_SHARE = 0.45  # of the colour within a mask, the rest is the image's


def draw_boxes(
    image: Array,
    boxes_xyxy: Array,
    labels: Array,
    class_names: Mapping[int, str],
    scores: Array | None = None,
    *,
    iscrowd: Array | None = None,
    masks: Masks | None = None,
    scale: int | None = None,
) -> Picture:
    """A picture of the image with its boxes, their classes' names, and masks where there are some.

    Names stand above their box, or where they are inside the picture and cover no other name. Boxes of high
    score are drawn over those of low score. The boxes of crowds are dashed.

    Args:
        image: uint8, RGB, either a tensor (3, H, W) or an array (H, W, 3).
        boxes_xyxy: (N, 4) in pixels of `image`; they may reach beyond it.
        labels: (N,) integers, keys of `class_names`.
        class_names: the name of each label.
        scores: (N,) in [0, 1], written behind the names; None for ground truth.
        iscrowd: (N,) booleans; None where nothing is a crowd.
        masks: (N, H, W) or (N, 1, H, W) in [0, 1], an object's where above 0.5; or N of COCO's run lengths, compressed,
            of the image's size. None for none.
        scale: whole factor by which to enlarge the picture; None enlarges small images until labels can be read.

    Returns:
        The picture (H * scale, W * scale, 3), a new array.

    Raises:
        ValueError: a wrong shape, kind or number of values, or a label without a name.
    """
    pixels = as_picture(image)
    boxes = as_array(boxes_xyxy)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes_xyxy has shape {boxes.shape}, expected (N, 4); give one row a box")
    if not np.isfinite(boxes).all():
        raise ValueError(
            f"boxes_xyxy holds {np.count_nonzero(~np.isfinite(boxes))} values that are not finite; "
            f"leave those boxes out"
        )
    num_boxes = len(boxes)
    names = [class_name(int(label), class_names) for label in _one_per_box(labels, "labels", num_boxes)]
    colours = [class_colour(int(label)) for label in as_array(labels)]
    crowds = np.zeros(num_boxes) if iscrowd is None else _one_per_box(iscrowd, "iscrowd", num_boxes)
    order = np.arange(num_boxes)
    if scores is not None:
        certainties = _one_per_box(scores, "scores", num_boxes)
        names = [f"{name} {score:.2f}" for name, score in zip(names, certainties, strict=True)]
        order = np.argsort(certainties, kind="stable")

    height, width = pixels.shape[:2]
    if scale is None:
        scale = readable_scale(height, width)
    elif scale < 1:
        raise ValueError(f"scale is {scale}, expected a whole number from 1; leave it out for a fitting one")
    if masks is not None:
        if len(masks) != num_boxes:
            raise ValueError(f"there are {len(masks)} masks and {num_boxes} boxes; give one mask a box")
        painted = pixels.copy()
        for place in order.tolist():
            _paint_mask(painted, pixels, masks[place], colours[place])
        pixels = painted
    canvas = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    line_width = max(2, round(max(canvas.size) / 180))
    font = ImageFont.load_default(size=max(12, round(max(canvas.size) / 36)))

    for index in order:
        box = _inside(boxes[index] * scale, canvas.size)
        if crowds[index]:
            _draw_dashed(draw, box, colours[index], line_width)
        else:
            draw.rectangle(box, outline=colours[index], width=line_width)
    tags: list[Rectangle] = []
    for index in order[::-1]:  # the names of high score choose their place first
        box = _inside(boxes[index] * scale, canvas.size)
        tag = _place_tag(box, draw.textbbox((0, 0), names[index], font=font), canvas.size, tags)
        tags.append(tag)
        draw.rectangle(tag, fill=colours[index])
        middle = ((tag[0] + tag[2]) // 2, (tag[1] + tag[3]) // 2)
        draw.text(middle, names[index], fill=_text_colour(colours[index]), font=font, anchor="mm")
    return np.asarray(canvas).copy()


def compare_detections(
    images: Sequence[Array],
    targets: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    class_names: Mapping[int, str],
    *,
    min_score: float = 0.5,
    names: Sequence[str] | None = None,
) -> Picture:
    """Ground truth beside prediction, one image a row.

    Args:
        images: uint8 RGB images as `draw_boxes` takes them.
        targets: for each image "boxes" (N, 4) xyxy and "labels" (N,); "iscrowd" (N,) and "masks" where there are some.
        predictions: for each image "boxes" (M, 4) xyxy, "labels" (M,) and "scores" (M,); "masks" where there are some.
        class_names: the name of each label.
        min_score: predictions of a lower score are not drawn, in [0, 1].
        names: what stands above each row, such as file names; None for nothing.

    Returns:
        The sheet (H, W, 3), uint8.

    Raises:
        ValueError: the lists differ in length or are empty, or as in `draw_boxes`.
    """
    if not len(images) == len(targets) == len(predictions):
        raise ValueError(
            f"{len(images)} images, {len(targets)} targets and {len(predictions)} predictions, "
            f"expected as many of each; give one target and one prediction an image"
        )
    rows = []
    for image, target, prediction in zip(images, targets, predictions, strict=True):
        certain = as_array(prediction["scores"]) >= min_score
        boxes, labels, scores = (as_array(prediction[key])[certain] for key in ("boxes", "labels", "scores"))
        masks = None
        if "masks" in prediction:
            masks = [mask for mask, drawn in zip(prediction["masks"], certain, strict=True) if drawn]
        truth = draw_boxes(
            image,
            target["boxes"],
            target["labels"],
            class_names,
            iscrowd=target.get("iscrowd"),
            masks=target.get("masks"),
        )
        rows.append([truth, draw_boxes(image, boxes, labels, class_names, scores, masks=masks)])
    return contact_sheet(rows, column_titles=("ground truth", "prediction"), row_titles=names)


def _one_per_box(values: Array, name: str, num_boxes: int) -> npt.NDArray[Any]:
    array = as_array(values)
    if array.shape != (num_boxes,):
        raise ValueError(f"{name} has shape {array.shape}, expected ({num_boxes},); give one value a box")
    return array


def _paint_mask(painted: Picture, image: Picture, mask: Any, colour: Colour) -> None:
    """Paint a mask in its colour, half transparent, over what was painted before it."""
    dense = coco_mask.decode(mask) if isinstance(mask, Mapping) else as_array(mask)
    if dense.ndim == 3 and len(dense) == 1:
        dense = dense[0]
    if dense.shape != image.shape[:2]:
        raise ValueError(f"a mask has shape {dense.shape}, expected {image.shape[:2]}, the size of the image")
    inside = dense > 0.5
    mixed = (1 - _MASK_SHARE) * image[inside] + _MASK_SHARE * np.array(colour)
    painted[inside] = mixed.round()


def _text_colour(background: Colour) -> Colour:
    """Black or white, whichever is read better (by the luma of ITU-R BT.601)."""
    red, green, blue = background
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else WHITE


def _inside(box: npt.NDArray[Any], size: tuple[int, int]) -> Rectangle:
    """The box cut at the borders of a picture of this (width, height), so that its sides remain in sight."""
    x1, x2 = np.sort(box[[0, 2]]).clip(0, size[0] - 1)
    y1, y2 = np.sort(box[[1, 3]]).clip(0, size[1] - 1)
    return float(x1), float(y1), float(x2), float(y2)


def _draw_dashed(draw: ImageDraw.ImageDraw, box: Rectangle, colour: Colour, line_width: int) -> None:
    x1, y1, x2, y2 = box
    dash = 4 * line_width
    inset = line_width // 2  # a line is drawn around its coordinates, a rectangle within them
    for start in np.arange(x1, x2, 2 * dash):
        for y in (y1 + inset, y2 - inset):
            draw.line((start, y, min(start + dash, x2), y), fill=colour, width=line_width)
    for start in np.arange(y1, y2, 2 * dash):
        for x in (x1 + inset, x2 - inset):
            draw.line((x, start, x, min(start + dash, y2)), fill=colour, width=line_width)


def _place_tag(box: Rectangle, text: Rectangle, size: tuple[int, int], tags: list[Rectangle]) -> Rectangle:
    """Where a box's name goes: inside the picture and, if there is room near the box, clear of other `tags`.

    On whole pixels, so that every name is equally sharp.
    """
    padding = 3
    width, height = math.ceil(text[2]) + 2 * padding, math.ceil(text[3]) + 2 * padding
    x1, y1, x2, y2 = (round(side) for side in box)
    corners = [(x1, y1 - height), (x1, y2), (x2 - width, y1 - height), (x2 - width, y2), (x1, y1)]
    places = []
    for left, top in corners:
        left = max(0, min(left, size[0] - 1 - width))
        top = max(0, min(top, size[1] - 1 - height))
        places.append((left, top, left + width, top + height))
    for place in places:
        if not any(_overlap(place, tag) for tag in tags):
            return place
    return places[0]


def _overlap(first: Rectangle, second: Rectangle) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
