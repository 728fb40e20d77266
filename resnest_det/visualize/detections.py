"""Detections drawn onto images, boxes and masks, and ground truth beside prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from resnest_det.visualize.pictures import (
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
    text_colour,
    text_font,
)

Rectangle = tuple[float, float, float, float]  # xyxy
Masks = Array | Sequence[Any]
Places = npt.NDArray[np.int64]

_MASK_SHARE = 0.45  # of the colour within a mask, the rest is the image's
_TEXT_SHARES = (1 / 36, 1 / 80)  # of the picture's long side: how large names are, and how large in a crowd
_SMALLEST_TEXT = 12  # pixels
_MOST_NAMES = 200  # of a picture; placing more takes long, and none of them can be read
_AWAY_SHARE = 0.1  # of the names; while more are away from their boxes, all get smaller


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

    Names stand above their box, or near it where they are inside the picture and cover no other name; a name that is
    away from its box has a line to it. Many names are written smaller, and of more than 200 boxes only those of the
    highest scores have theirs, or without scores the last. Boxes of high score are drawn over those of low
    score. The boxes of crowds are dashed.

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
    ends = [""] * num_boxes
    order = np.arange(num_boxes)
    if scores is not None:
        certainties = _one_per_box(scores, "scores", num_boxes)
        ends = [f" {score:.2f}" for score in certainties]
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
    drawn = [_inside(box * scale, canvas.size) for box in boxes]
    choosing = order[::-1][:_MOST_NAMES]  # the names of high score choose their place first
    names_of, ends_of, boxes_of = ([values[index] for index in choosing] for values in (names, ends, drawn))
    text_size, texts, tags = _lay_out_names(names_of, ends_of, boxes_of, canvas.size)
    line_width = max(2, round(text_size / 5))

    for index in order:
        if crowds[index]:
            _draw_dashed(draw, drawn[index], colours[index], line_width)
        else:
            draw.rectangle(drawn[index], outline=colours[index], width=line_width)
    font = text_font(texts, text_size)
    placed = list(zip(choosing, texts, tags, strict=True))[::-1]
    for index, _, tag in placed:
        _draw_link(draw, tag, drawn[index], colours[index], max(1, line_width // 2))
    for index, text, (x1, y1, x2, y2) in placed:
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colours[index])
        middle = ((x1 + x2) // 2, (y1 + y2) // 2)
        draw.text(middle, text, fill=text_colour(colours[index]), font=font, anchor="mm")
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
    """Paint a mask in its colour, half transparent and its edge opaque, over what was painted before it."""
    dense = coco_mask.decode(mask) if isinstance(mask, Mapping) else as_array(mask)
    if dense.ndim == 3 and len(dense) == 1:
        dense = dense[0]
    if dense.shape != image.shape[:2]:
        raise ValueError(f"a mask has shape {dense.shape}, expected {image.shape[:2]}, the size of the image")
    inside = dense if dense.dtype == bool else dense > 0.5
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if len(rows):
        area = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # mostly a small part of the image
        within = inside[area]
        mixed = (1 - _MASK_SHARE) * image[area][within] + _MASK_SHARE * np.array(colour)
        painted[area][within] = mixed.round()
        edge_width = max(1, round(max(image.shape) / 600))
        padded = np.pad(within, edge_width).astype(np.uint8)
        eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=edge_width)
        inner = eroded[edge_width:-edge_width, edge_width:-edge_width].astype(bool)
        painted[area][within & ~inner] = colour


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


def place_tags(
    boxes_xyxy: Sequence[Rectangle], sizes: Sequence[tuple[int, int]], picture_size: tuple[int, int]
) -> list[Rectangle]:
    """Where the names of boxes go: inside the picture, and clear of each other wherever there is room.

    The first boxes choose first. A name goes to a corner of its box, above or below it and else inside, or, where other
    names are at all of these, to the free place nearest to the one above. Where no place is free it covers as few names
    as it must.

    Args:
        boxes_xyxy: in pixels of the picture.
        sizes: (width, height) of each box's name in whole pixels, none larger than the picture.
        picture_size: (width, height).

    Returns:
        For each box its name's place on whole pixels, so that every name is equally sharp; xyxy, the pixels at x2 and
        at y2 not included.
    """
    places = np.zeros((len(boxes_xyxy), 4), dtype=np.int64)
    for number, (box, (width, height)) in enumerate(zip(boxes_xyxy, sizes, strict=True)):
        x1, y1, x2, y2 = (round(side) for side in box)
        right, bottom = max(0, picture_size[0] - width), max(0, picture_size[1] - height)
        corners = np.array([(x1, y1 - height), (x1, y2), (x2 - width, y1 - height), (x2 - width, y2), (x1, y1)])
        corners = corners.clip(0, (right, bottom))
        taken = places[:number]
        covers_in_x = (corners[:, :1] < taken[:, 2]) & (taken[:, 0] < corners[:, :1] + width)
        covers_in_y = (corners[:, 1:] < taken[:, 3]) & (taken[:, 1] < corners[:, 1:] + height)
        free = ~(covers_in_x & covers_in_y).any(axis=1)
        corner = (
            corners[free.argmax()] if free.any() else _nearest_free(corners[0], (width, height), taken, picture_size)
        )
        left, top = corner.tolist()
        places[number] = left, top, left + width, top + height
    return [(int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in places]


def _nearest_free(wanted: Places, size: tuple[int, int], taken: Places, picture_size: tuple[int, int]) -> Places:
    """The corner (2,) of the place nearest to the wanted one that is clear of the taken places (N, 4).

    Pushed as far as it goes towards what is wanted, a free place ends, along each axis, there or at the side of a taken
    one; so these are all the places to be tried.
    """
    tried, covers = [], []
    for axis in (0, 1):
        before, behind = taken[:, axis], taken[:, axis + 2]
        starts = np.unique(np.concatenate([[wanted[axis]], before - size[axis], behind]))
        starts = starts[(starts >= 0) & (starts <= max(0, picture_size[axis] - size[axis]))]
        tried.append(starts)
        covers.append((starts[:, None] < behind) & (before < starts[:, None] + size[axis]))
    # (X, N) @ (N, Y): how many of the taken places each of X times Y corners covers.
    num_covered = covers[0].astype(np.float32) @ covers[1].T.astype(np.float32)
    distances = (tried[0] - wanted[0])[:, None] ** 2 + (tried[1] - wanted[1]) ** 2
    fewest = np.where(num_covered == num_covered.min(), distances, np.iinfo(np.int64).max)
    x, y = np.unravel_index(fewest.argmin(), fewest.shape)
    return np.array([tried[0][x], tried[1][y]])


def _lay_out_names(
    names: Sequence[str], ends: Sequence[str], boxes: Sequence[Rectangle], picture_size: tuple[int, int]
) -> tuple[int, list[str], list[Rectangle]]:
    """The letters' size in pixels, the names as they are written, and where: the first boxes choose first.

    The names get smaller while there are too many of them to be at their boxes.

    Args:
        names: of the boxes; one that is wider than the picture is shortened.
        ends: what is written behind each name, and never shortened.
        boxes: xyxy, inside the picture.
        picture_size: (width, height).
    """
    size, smallest = (max(_SMALLEST_TEXT, round(max(picture_size) * share)) for share in _TEXT_SHARES)
    while True:
        font = text_font([*names, *ends], size)
        padding = max(3, size // 8)
        texts = [
            _shortened(name, end, font, picture_size[0] - 2 * padding) for name, end in zip(names, ends, strict=True)
        ]
        height = math.ceil(max(font.getbbox(text)[3] for text in (*texts, "Ag"))) + 2 * padding
        sizes = [
            (min(picture_size[0], math.ceil(font.getbbox(text)[2]) + 2 * padding), min(picture_size[1], height))
            for text in texts
        ]
        places = place_tags(boxes, sizes, picture_size)
        num_away = sum(_are_apart(place, box) for place, box in zip(places, boxes, strict=True))
        if size == smallest or num_away <= _AWAY_SHARE * len(boxes):
            return size, texts, places
        size = max(smallest, round(0.8 * size))


def _shortened(name: str, end: str, font: Font, width: float) -> str:
    """The name and its end in at most `width` pixels; of a name that is too long, as many letters as there is room."""
    text = name + end
    while name and font.getlength(text) > width:
        name = name[:-1]
        text = f"{name}...{end}"
    return text


def _are_apart(first: Rectangle, second: Rectangle) -> bool:
    """Whether there is a pixel or more between two rectangles; places are on whole pixels, and boxes are not."""
    return max(first[0] - second[2], second[0] - first[2], first[1] - second[3], second[1] - first[3]) >= 1


def _draw_link(draw: ImageDraw.ImageDraw, tag: Rectangle, box: Rectangle, colour: Colour, line_width: int) -> None:
    """A line from a name to its box where the two are apart."""
    if _are_apart(tag, box):
        ends = []
        for axis in (0, 1):
            low, high = max(tag[axis], box[axis]), min(tag[axis + 2], box[axis + 2])
            # Where they overlap along the axis, both ends are in the middle of that; else each is at its nearer side.
            middle = (low + high) / 2
            ends.append((middle, middle) if low <= high else (high, low) if tag[axis] < box[axis] else (low, high))
        draw.line([(ends[0][0], ends[1][0]), (ends[0][1], ends[1][1])], fill=colour, width=line_width)
