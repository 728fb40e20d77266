"""The generated data set: seeded scenes of simple shapes, written as COCO and as ADE20K.

It lets training, evaluation and every example run in minutes without a download, and it holds on purpose what
real data sets hold: overlapping and truncated objects in COCO's three sizes, crowds, images without objects,
landscape and portrait images, category ids with holes.

What shows a class, so that a small network can learn it from random weights in minutes on a CPU: an object's
outline and, as in photographs, the pattern of its surface, never its colour; a ground's pattern and its colour.

What is annotated:

- Instances are annotated by their visible extent. An object may be covered by those drawn after it, or cut by
  the picture's edge, as long as `MIN_VISIBLE` of it remains in one piece without a hole; so none is heavily
  hidden and each is one polygon.
- `bbox` is the polygon's bounds. `area` is the number of pixels of the polygon's mask as pycocotools draws it,
  which is how COCO measures it.
- A crowd is a tight cluster of tiny objects of one class: one annotation with `iscrowd` 1, whose segmentation
  is the run-length code of their pixels and whose `bbox` is those pixels' bounds.
- The ADE20K masks hold 1..6 for the shapes (crowds too), then the ground textures as "stuff" classes, and 0
  (other) for plain ground.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

SAMPLE_VERSION = 2  # raise it whenever the same seed would give other files
MIN_VISIBLE = 0.7  # of an object's full area
MARKER_NAME = "sample.json"

_SUPERSAMPLING = 4  # shapes are drawn this many times larger, for smooth edges and exact polygons
_SUBPIXEL_BITS = 4  # fractional bits of the coordinates given to OpenCV
_PLACEMENT_ATTEMPTS = 60
_JPEG_QUALITY = 92
_PACE = 2 * math.pi / 11  # radians a pixel of the surfaces' waves


# ---------------------------------------------------------------------------------------------------- classes


class ShapeClass(NamedTuple):
    """A class of objects: its COCO category, and what is drawn for it.

    `outline` is closed and of any scale. `surface` is the pattern in [-1, 1] at distances x and y, in pixels, from the
    object's middle.
    """

    category_id: int
    name: str
    supercategory: str
    outline: Callable[[], FloatArray]
    surface: Callable[[FloatArray, FloatArray], FloatArray]


def _ring_of_points(num_points: int, radii: tuple[float, ...]) -> FloatArray:
    """Points at even angles around the origin, their distances cycling through `radii`."""
    angles = 2 * np.pi * np.arange(num_points) / num_points
    distances = np.resize(np.array(radii), num_points)
    return np.stack([distances * np.sin(angles), -distances * np.cos(angles)], axis=1).astype(np.float32)


def _disc() -> FloatArray:
    return _ring_of_points(72, (1.0,))


def _square() -> FloatArray:
    return _ring_of_points(4, (1.0,))


def _triangle() -> FloatArray:
    return _ring_of_points(3, (1.0,))


def _star() -> FloatArray:
    return _ring_of_points(10, (1.0, 0.44))


def _crescent() -> FloatArray:
    """The unit disc without a disc of radius 0.8 around (0.5, 0)."""
    bite, offset = 0.8, 0.5
    tip = math.acos((1 + offset**2 - bite**2) / (2 * offset))  # where the two circles meet
    bite_tip = math.atan2(math.sin(tip), math.cos(tip) - offset)
    outer = np.linspace(tip, 2 * np.pi - tip, 48)
    inner = np.linspace(2 * np.pi - bite_tip, bite_tip, 32)[1:-1]
    x = np.concatenate([np.cos(outer), offset + bite * np.cos(inner)])
    y = np.concatenate([np.sin(outer), bite * np.sin(inner)])
    return np.stack([x, y], axis=1).astype(np.float32)


def _cross() -> FloatArray:
    arm = 0.36  # half an arm's width, where an arm reaches 1
    corner = [(-arm, -1), (arm, -1), (arm, -arm)]
    points = [(x, y) for x, y in corner]
    for _ in range(3):
        corner = [(-y, x) for x, y in corner]  # a quarter turn
        points += corner
    return np.array(points, dtype=np.float32)


def _smooth(x: FloatArray, _y: FloatArray) -> FloatArray:
    return np.zeros_like(x)


def _checks(x: FloatArray, y: FloatArray) -> FloatArray:
    return _two_toned(2 * np.sin(_PACE * x) * np.sin(_PACE * y))


def _bars(_x: FloatArray, y: FloatArray) -> FloatArray:
    return _two_toned(np.sin(_PACE * y))


def _pales(x: FloatArray, _y: FloatArray) -> FloatArray:
    return _two_toned(np.sin(_PACE * x))


def _spots(x: FloatArray, y: FloatArray) -> FloatArray:
    return _two_toned(2 * np.sin(_PACE * x) * np.sin(_PACE * y) - 1)


def _diagonals(x: FloatArray, y: FloatArray) -> FloatArray:
    return _two_toned(np.sin(_PACE * (x + y) / math.sqrt(2)))


def _two_toned(wave: FloatArray) -> FloatArray:
    """A wave with broad crests and troughs and steep sides."""
    return np.tanh(2.5 * wave).astype(np.float32)


SHAPES = (
    ShapeClass(1, "disc", "round", _disc, _smooth),
    ShapeClass(2, "square", "straight", _square, _checks),
    ShapeClass(4, "triangle", "straight", _triangle, _bars),
    ShapeClass(5, "star", "pointed", _star, _pales),
    ShapeClass(7, "crescent", "round", _crescent, _spots),
    ShapeClass(9, "cross", "pointed", _cross, _diagonals),
)
TEXTURES = ("plain", "clouds", "stripes", "dots", "ripples")  # "plain" is ADE20K's 0, other
ADE_CLASS_NAMES = tuple(shape.name for shape in SHAPES) + TEXTURES[1:]  # of the values 1, 2, ...


# ----------------------------------------------------------------------------------------------------- scenes


class _Recipe(NamedTuple):
    num_large: int
    num_medium: int
    num_small: int
    has_crowd: bool = False


# Image i of a split follows recipe i modulo their number: twelve images hold everything the data set promises.
_RECIPES = (
    _Recipe(1, 2, 2),
    _Recipe(0, 4, 2),
    _Recipe(0, 3, 1, has_crowd=True),
    _Recipe(1, 3, 1),
    _Recipe(0, 3, 3),
    _Recipe(0, 4, 3),
    _Recipe(0, 0, 0),
    _Recipe(1, 2, 1),
    _Recipe(0, 4, 1),
    _Recipe(0, 2, 2, has_crowd=True),
    _Recipe(1, 3, 0),
    _Recipe(0, 5, 2),
)
# Square root of an object's full area in pixels: well inside COCO's limits, small < 32 < medium < 96 < large.
_LARGE = (102.0, 112.0)
_MEDIUM = (38.0, 72.0)
_SMALL = (20.0, 29.0)
_CROWD_MEMBER = (7.0, 8.5)
_TILT = math.radians(20)  # objects stand upright, a little tilted, as most things in photographs do

_OBJECT_COLOURS = (
    (222, 84, 60),  # vermilion
    (240, 172, 38),  # amber
    (38, 150, 136),  # teal
    (52, 112, 188),  # blue
    (118, 78, 160),  # violet
    (198, 62, 116),  # raspberry
    (92, 148, 62),  # leaf
)
# The colour of each texture by day and by night. All are pale or dark, so that the objects stand out.
_GROUND_COLOURS = (
    ((232, 230, 226), (46, 48, 54)),  # plain: chalk, slate
    ((204, 222, 240), (30, 44, 70)),  # clouds: sky, night
    ((240, 222, 196), (66, 50, 40)),  # stripes: sand, wood
    ((212, 232, 206), (34, 58, 44)),  # dots: meadow, forest
    ((226, 212, 236), (52, 40, 66)),  # ripples: lilac, dusk
)
_GROUND_VARIATION = 8.0  # of each channel, either way
_MIN_COLOUR_DISTANCE = 85.0  # Euclidean in RGB, between an object and the grounds


class _Patch(NamedTuple):
    """One filled outline: its points in pixels (N, 2), its size (square root of its area), RGB colour and shape."""

    points: FloatArray
    size: float
    colour: FloatArray
    shape_index: int


@dataclass
class _Object:
    """One annotation's worth of patches: a single one, or a crowd's many."""

    shape_index: int
    patches: list[_Patch]
    is_crowd: bool = False


class _Scene(NamedTuple):
    image: ByteArray  # (H, W, 3) RGB
    objects: list[_Object]
    # Who is seen where, `_SUPERSAMPLING` times the image's size: 0 is ground, n is objects[n - 1].
    owners: ByteArray
    textures: ByteArray  # (H, W) indices into TEXTURES


def _draw_scene(index: int, rng: np.random.Generator) -> _Scene:
    """Scene number `index` of a split; everything random in it comes from `rng`."""
    width, height = int(rng.integers(240, 289)), int(rng.integers(184, 217))
    if rng.random() < 0.35:
        width, height = height, width
    image, textures, grounds = _draw_ground(height, width, rng)
    objects, owners = _place_objects(index, height, width, grounds, rng)
    for placed in objects:
        for patch in placed.patches:
            _paint(image, patch)
    image += rng.normal(0.0, 1.5, image.shape).astype(np.float32)  # a camera's grain
    return _Scene(image.clip(0, 255).round().astype(np.uint8), objects, owners, textures)


def _draw_ground(height: int, width: int, rng: np.random.Generator) -> tuple[FloatArray, ByteArray, list[FloatArray]]:
    """One or two textured grounds: the image, the texture of each pixel, and the grounds' mean colours."""
    first, second = rng.choice(len(TEXTURES), size=2, replace=False)
    if rng.random() < 0.35:
        second = first
    is_night = int(rng.random() < 0.25)
    colours = [
        np.array(_GROUND_COLOURS[texture][is_night] + rng.uniform(-_GROUND_VARIATION, _GROUND_VARIATION, 3), np.float32)
        for texture in (first, second)
    ]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * (x - width * rng.uniform(0.35, 0.65)) + np.sin(angle) * (
        y - height * rng.uniform(0.35, 0.65)
    )
    across = -np.sin(angle) * x + np.cos(angle) * y
    along += rng.uniform(4, 14) * np.sin(across / rng.uniform(14, 30) + rng.uniform(0, 2 * np.pi))

    share = (along + 0.5).clip(0, 1)[..., None]  # of the first ground; fractions only on the border line
    image = share * _texture(int(first), colours[0], height, width, rng)
    image += (1 - share) * _texture(int(second), colours[1], height, width, rng)
    textures = np.where(along > 0, first, second).astype(np.uint8)
    return image, textures, colours


def _texture(kind: int, colour: FloatArray, height: int, width: int, rng: np.random.Generator) -> FloatArray:
    """A ground of about `colour` (H, W, 3), the texture being TEXTURES[kind]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(11, 22), rng.uniform(0, 2 * np.pi)
    u = (np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period)
    v = (-np.sin(angle) * x + np.cos(angle) * y) * (2 * np.pi / period)
    name = TEXTURES[kind]
    if name == "plain":
        tone = np.zeros((height, width), dtype=np.float32)
    elif name == "clouds":
        tone = 1.5 * _noise(height, width, rng)
    elif name == "stripes":
        tone = 0.55 * np.tanh(3 * np.sin(u + phase))
    elif name == "dots":
        tone = 0.8 * np.tanh(4 * (np.sin(u) * np.sin(v) - 0.45))
    else:
        centre_x, centre_y = rng.uniform(-0.3, 1.3) * width, rng.uniform(-0.3, 1.3) * height
        tone = 0.6 * np.sin(np.hypot(x - centre_x, y - centre_y) * (2 * np.pi / period) + phase)
    # Light falls off to one side, and no surface is quite even.
    light = np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5)
    tone = 13 * tone + 10 * light + 4 * _noise(height, width, rng)
    tint = np.array(rng.uniform(0.75, 1.1, 3), dtype=np.float32)
    return np.asarray(colour + tone[..., None] * tint, dtype=np.float32)


def _noise(height: int, width: int, rng: np.random.Generator) -> FloatArray:
    """Smooth noise (H, W) in five octaves, about in [-1, 1]."""
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(5):
        cells = 3 * 2**octave
        grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        total += 0.55**octave * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return total


def _place_objects(
    index: int, height: int, width: int, grounds: list[FloatArray], rng: np.random.Generator
) -> tuple[list[_Object], ByteArray]:
    """The objects of recipe `index`, in the order they are drawn, and the map of who is seen where.

    Large objects come first, so that small ones lie on top. One that finds no place is left out.
    """
    recipe = _RECIPES[index % len(_RECIPES)]
    owners = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), dtype=np.uint8)
    objects: list[_Object] = []
    # The first object's class goes around with the images, so that even a small split has them all.
    # There is one class more than sizes: a crowd, where there is one, takes the first.
    shapes = [(index + index // len(_RECIPES)) % len(SHAPES)]
    ranges = [_LARGE] * recipe.num_large + [_MEDIUM] * recipe.num_medium + [_SMALL] * recipe.num_small
    shapes += [int(shape) for shape in rng.integers(len(SHAPES), size=len(ranges))]
    colours = [
        np.array(colour, dtype=np.float32)
        for colour in _OBJECT_COLOURS
        if min(float(np.linalg.norm(colour - ground)) for ground in grounds) >= _MIN_COLOUR_DISTANCE
    ]

    if recipe.has_crowd:
        objects.append(_gather_crowd(shapes.pop(), height, width, colours, rng))
        for patch in objects[0].patches:
            owners[_fill(patch.points, owners.shape, _SUPERSAMPLING)] = 1
    for (smallest, largest), shape_index in zip(ranges, shapes, strict=False):
        for _ in range(_PLACEMENT_ATTEMPTS):
            size = float(rng.uniform(smallest, largest))
            margin = min(0.6 * size, 0.45 * min(height, width))
            centre = (rng.uniform(margin, width - margin), rng.uniform(margin, height - margin))
            patch = _make_patch(shape_index, centre, size, colours, rng)
            covered = owners.copy()
            covered[_fill(patch.points, owners.shape, _SUPERSAMPLING)] = len(objects) + 1
            candidates = [*objects, _Object(shape_index, [patch])]
            if _all_seen_well(owners, covered, candidates):
                objects, owners = candidates, covered
                break
    return objects, owners


def _gather_crowd(
    shape_index: int, height: int, width: int, colours: list[FloatArray], rng: np.random.Generator
) -> _Object:
    """A tight cluster of tiny objects of one class, wholly inside the picture."""
    radius_x, radius_y = rng.uniform(24, 34), rng.uniform(18, 26)
    margin = max(radius_x, radius_y) + _CROWD_MEMBER[1]
    centre_x, centre_y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
    patches = []
    num_members = int(rng.integers(18, 27))
    for member in range(num_members):
        # A sunflower's spiral fills the ellipse evenly; the jitter hides its order.
        angle = member * math.pi * (3 - math.sqrt(5)) + rng.uniform(-0.2, 0.2)
        distance = math.sqrt((member + 0.5) / num_members)
        centre = (
            centre_x + radius_x * distance * math.cos(angle) + rng.uniform(-1, 1),
            centre_y + radius_y * distance * math.sin(angle) + rng.uniform(-1, 1),
        )
        patches.append(_make_patch(shape_index, centre, float(rng.uniform(*_CROWD_MEMBER)), colours, rng))
    return _Object(shape_index, patches, is_crowd=True)


def _make_patch(
    shape_index: int,
    centre: tuple[float, float],
    size: float,
    colours: list[FloatArray],
    rng: np.random.Generator,
) -> _Patch:
    """The shape at `centre` (x, y), of area `size`² pixels, tilted and coloured at random."""
    points = SHAPES[shape_index].outline()
    points -= (points.min(axis=0) + points.max(axis=0)) / 2
    points *= size / math.sqrt(cv2.contourArea(points))
    angle = rng.uniform(-_TILT, _TILT)
    cosine, sine = math.cos(angle), math.sin(angle)
    turned = points @ np.array([[cosine, sine], [-sine, cosine]], dtype=np.float32)
    return _Patch(turned + np.array(centre, dtype=np.float32), size, colours[rng.integers(len(colours))], shape_index)


def _all_seen_well(before: ByteArray, after: ByteArray, objects: list[_Object]) -> bool:
    """Whether the last of `objects`, which turns the owners `before` into `after`, leaves all of them visible."""
    changed = np.unique(before[after == len(objects)])
    for number in {len(objects), *(int(number) for number in changed if number)}:
        if objects[number - 1].is_crowd:
            return False
        visible = after == number
        enough = MIN_VISIBLE * (objects[number - 1].patches[0].size * _SUPERSAMPLING) ** 2
        if np.count_nonzero(visible) < enough or len(_contours(visible)) != 1:
            return False
    return True


def _contours(mask: BoolArray) -> list[npt.NDArray[np.int32]]:
    """All borders in a mask (H, W), outer ones and holes', each (N, 1, 2)."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    return [np.asarray(contour, dtype=np.int32) for contour in contours]


def _fill(points: FloatArray, shape: tuple[int, ...], scale: int) -> BoolArray:
    """The mask, of this (H, W), of an outline whose points are in pixels 1 / `scale` as fine."""
    mask = np.zeros(shape, dtype=np.uint8)
    cv2.fillPoly(mask, [_fixed_point(points, scale)], 1, shift=_SUBPIXEL_BITS)
    return mask.astype(bool)


def _fixed_point(points: FloatArray, scale: int) -> npt.NDArray[np.int32]:
    # To OpenCV an integer is a pixel's centre; here, as in COCO, it is a pixel's corner.
    return ((points * scale - 0.5) * 2**_SUBPIXEL_BITS).round().astype(np.int32)


def _paint(image: FloatArray, patch: _Patch) -> None:
    """Paint a patch and its shadow into `image` (H, W, 3), lit from the upper left."""
    height, width = image.shape[:2]
    drop = 1.0 + 0.035 * patch.size  # how far the shadow falls, in pixels
    reach = 4 * drop
    left, top = np.maximum(np.floor(patch.points.min(axis=0) - reach), 0).astype(int)
    right, bottom = np.minimum(np.ceil(patch.points.max(axis=0) + reach), (width, height)).astype(int)
    window = image[top:bottom, left:right]
    points = patch.points - np.array([left, top], dtype=np.float32)

    shadow = cv2.GaussianBlur(_coverage(points + np.float32(drop), window.shape[:2], 0), (0, 0), drop)
    window *= 1 - 0.38 * shadow[..., None]

    y, x = np.mgrid[: window.shape[0], : window.shape[1]].astype(np.float32)
    centre_x, centre_y = points.mean(axis=0)
    light = ((centre_x - x) + (centre_y - y)) / (2 * patch.size)
    shade = 1 + 0.2 * light.clip(-1, 1) + 0.22 * SHAPES[patch.shape_index].surface(x - centre_x, y - centre_y)
    face = patch.colour * shade[..., None]
    rim = _coverage(points, window.shape[:2], 0.9 + 0.02 * patch.size)[..., None]
    face = face * (1 - 0.42 * rim)
    inside = _coverage(points, window.shape[:2], 0)[..., None]
    window += inside * (face - window)


def _coverage(points: FloatArray, shape: tuple[int, ...], line_width: float) -> FloatArray:
    """How much of each pixel (H, W) lies inside the outline, or on its line where `line_width` (px) is not 0."""
    fine = np.zeros((shape[0] * _SUPERSAMPLING, shape[1] * _SUPERSAMPLING), dtype=np.float32)
    fixed = _fixed_point(points, _SUPERSAMPLING)
    if line_width:
        # Half of the line lies outside the outline, where nothing is painted.
        thickness = max(1, round(2 * line_width * _SUPERSAMPLING))
        cv2.polylines(fine, [fixed], True, 1.0, thickness, shift=_SUBPIXEL_BITS)
    else:
        cv2.fillPoly(fine, [fixed], 1.0, shift=_SUBPIXEL_BITS)
    return np.asarray(cv2.resize(fine, (shape[1], shape[0]), interpolation=cv2.INTER_AREA))


# ------------------------------------------------------------------------------------------------ annotations


def _annotate(scene: _Scene) -> list[dict[str, Any]]:
    """The scene's annotations as COCO writes them, without `id` and `image_id`."""
    height, width = scene.image.shape[:2]
    annotations: list[dict[str, Any]] = []
    for number, placed in enumerate(scene.objects, start=1):
        segmentation: Any
        if placed.is_crowd:
            mask = _shrink(scene.owners) == number
            segmentation = {"size": [height, width], "counts": _run_lengths(mask)}
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            bounds = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            area = np.count_nonzero(mask)
        else:
            (contour,) = _contours(scene.owners == number)
            # A quarter of a pixel is the finest that the map of owners knows.
            corners = cv2.approxPolyDP(contour, 1.0, closed=True).reshape(-1, 2)
            polygon = ((corners + 0.5) / _SUPERSAMPLING).round(2)
            segmentation = [polygon.ravel().tolist()]
            bounds = [*polygon.min(axis=0), *polygon.max(axis=0)]
            area = coco_mask.area(coco_mask.frPyObjects(segmentation, height, width))[0]
        x1, y1, x2, y2 = (float(bound) for bound in bounds)
        annotations.append(
            {
                "category_id": SHAPES[placed.shape_index].category_id,
                "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                "area": float(area),
                "iscrowd": int(placed.is_crowd),
                "segmentation": segmentation,
            }
        )
    return annotations


def _run_lengths(mask: BoolArray) -> list[int]:
    """COCO's uncompressed run-length code: lengths of 0s, 1s, 0s ... down the columns."""
    values = mask.ravel(order="F")
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    lengths = np.diff([0, *changes, values.size]).tolist()
    return [0, *lengths] if values[0] else lengths


def _class_mask(scene: _Scene) -> ByteArray:
    """The scene's ADE20K mask (H, W): 0 for other, else an index into ADE_CLASS_NAMES plus 1."""
    stuff = np.where(scene.textures > 0, scene.textures + len(SHAPES), 0)
    shape_of_owner = np.array([0] + [placed.shape_index + 1 for placed in scene.objects])
    owners = _shrink(scene.owners)
    return np.where(owners > 0, shape_of_owner[owners], stuff).astype(np.uint8)


def _shrink(owners: ByteArray) -> ByteArray:
    """The owners at the image's own size: those at the middle of each pixel."""
    middle = _SUPERSAMPLING // 2
    return owners[middle::_SUPERSAMPLING, middle::_SUPERSAMPLING]


# ---------------------------------------------------------------------------------------------- the data set


@dataclass(frozen=True)
class SampleSummary:
    """What a generated data set holds; also the content of its marker file, `sample.json`.

    Attributes:
        version: the generator's version.
        seed: the seed it was generated with.
        num_train: training images.
        num_val: validation images.
        num_objects: annotated objects of both splits, crowds not counted.
        num_crowds: crowd annotations of both splits.
        num_empty: images of both splits without any annotation.
    """

    version: int
    seed: int
    num_train: int
    num_val: int
    num_objects: int
    num_crowds: int
    num_empty: int


def write_sample_dataset(
    folder: str | Path, *, num_train: int = 400, num_val: int = 60, seed: int = 0
) -> SampleSummary:
    """Generate the sample data set into `folder`.

    The folder appears complete or not at all: files are written beside it and moved there at the end. From 12
    images on, a split holds every class, COCO's three sizes, a crowd and an image without objects. Image i
    of a split does not depend on how many follow, and nothing depends on global random state: the same
    arguments give the same bytes (with the same versions of NumPy, OpenCV and Pillow).

    Written are::

        train/*.jpg  val/*.jpg
        annotations/instances_train.json  annotations/instances_val.json
        ade20k/images/{training,validation}/*.jpg
        ade20k/annotations/{training,validation}/*.png    8 bit: 0 other, 1.. as in classes.txt
        ade20k/classes.txt                                the columns of ADE20K's objectInfo150.txt
        sample.json

    Args:
        folder: a path where nothing is yet, or an empty folder. Missing parents are made.
        num_train: training images, at least 1.
        num_val: validation images, at least 1.
        seed: any integer from 0.

    Returns:
        What was written.

    Raises:
        ValueError: a number is out of range, or there is something at `folder` already.
    """
    _check_numbers(num_train, num_val, seed)
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} is not empty, and the sample data set replaces nothing; give a new or an empty folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.partial-") as scratch:
        staged = Path(scratch) / folder.name
        train = _write_split(staged, "train", "training", num_train, first_image_id=1, seed=seed)
        val = _write_split(staged, "val", "validation", num_val, first_image_id=num_train + 1, seed=seed)
        _write_class_list(staged / "ade20k" / "classes.txt", train, val)
        summary = SampleSummary(
            SAMPLE_VERSION,
            seed,
            num_train,
            num_val,
            train.num_objects + val.num_objects,
            train.num_crowds + val.num_crowds,
            train.num_empty + val.num_empty,
        )
        (staged / MARKER_NAME).write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
        staged.rename(folder)
    return summary


def ensure_sample_dataset(folder: str | Path, *, num_train: int = 400, num_val: int = 60, seed: int = 0) -> Path:
    """The folder of the sample data set, generated if it is not there yet. Never deletes anything.

    Several processes may ask for the same folder at once: one's work is kept.

    Args:
        folder: where the data set is or shall be.
        num_train: training images, at least 1.
        num_val: validation images, at least 1.
        seed: any integer from 0.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: a number is out of range, or `folder` holds something else: other files, or a sample data
            set of another seed, size or version.
    """
    _check_numbers(num_train, num_val, seed)
    folder = Path(folder).expanduser().resolve()
    wanted = {"version": SAMPLE_VERSION, "seed": seed, "num_train": num_train, "num_val": num_val}
    if not (folder / MARKER_NAME).is_file():
        try:
            write_sample_dataset(folder, num_train=num_train, num_val=num_val, seed=seed)
        except (OSError, ValueError):
            # Another process may have finished first; what it wrote is checked below.
            if not (folder / MARKER_NAME).is_file():
                raise
    held = asdict(read_sample_summary(folder))
    differing = [f"{name} {held[name]} (asked for: {value})" for name, value in wanted.items() if held[name] != value]
    if differing:
        raise ValueError(
            f"{folder} holds another sample data set, with {', '.join(differing)}; "
            f"give another folder, or delete this one"
        )
    return folder


def read_sample_summary(folder: str | Path) -> SampleSummary:
    """What the sample data set in `folder` holds, from its marker file.

    Raises:
        FileNotFoundError: `folder` has no marker file, so it is no sample data set.
        ValueError: the marker file is not one that this package wrote.
    """
    marker = Path(folder) / MARKER_NAME
    if not marker.is_file():
        raise FileNotFoundError(f"{marker} does not exist, so {folder} is no sample data set; write one there")
    try:
        return SampleSummary(**json.loads(marker.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{marker} is not a sample data set's marker ({error}); give another folder") from error


def default_cache_folder() -> Path:
    """Where generated and downloaded files are kept.

    Returns:
        $RESNEST_DET_CACHE where it is set, else $XDG_CACHE_HOME/resnest_det, else ~/.cache/resnest_det. The
        folder need not exist.
    """
    own = os.environ.get("RESNEST_DET_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "resnest_det"


def _check_numbers(num_train: int, num_val: int, seed: int) -> None:
    for name, value, least in (("num_train", num_train, 1), ("num_val", num_val, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}; give a larger number")


class _SplitSummary(NamedTuple):
    num_objects: int
    num_crowds: int
    num_empty: int
    pixels: npt.NDArray[np.int64]  # of each ADE20K value, over all masks
    images: npt.NDArray[np.int64]  # that hold each ADE20K value


def _write_split(
    root: Path, split: str, ade_split: str, num_images: int, *, first_image_id: int, seed: int
) -> _SplitSummary:
    """Write one split in both layouts under `root`; `ade_split` is ADE20K's name of it."""
    coco_images = root / split
    ade_images = root / "ade20k" / "images" / ade_split
    ade_masks = root / "ade20k" / "annotations" / ade_split
    for folder in (coco_images, ade_images, ade_masks, root / "annotations"):
        folder.mkdir(parents=True, exist_ok=True)

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    class_pixels = np.zeros((num_images, len(ADE_CLASS_NAMES) + 1), dtype=np.int64)
    for index in range(num_images):
        scene = _draw_scene(index, np.random.default_rng([seed, int(split == "val"), index]))
        image_id = first_image_id + index
        stem = f"{image_id:06d}"
        height, width = scene.image.shape[:2]
        # Full colour resolution: halving it would smear the edges of small shapes.
        Image.fromarray(scene.image).save(coco_images / f"{stem}.jpg", quality=_JPEG_QUALITY, subsampling=0)
        (ade_images / f"{stem}.jpg").write_bytes((coco_images / f"{stem}.jpg").read_bytes())
        class_mask = _class_mask(scene)
        Image.fromarray(class_mask).save(ade_masks / f"{stem}.png")
        class_pixels[index] = np.bincount(class_mask.ravel(), minlength=class_pixels.shape[1])
        images.append({"id": image_id, "width": width, "height": height, "file_name": f"{stem}.jpg", "license": 1})
        annotations += [
            {"id": image_id * 100 + number, "image_id": image_id, **annotation}
            for number, annotation in enumerate(_annotate(scene))
        ]
    instances = {
        "info": {
            "description": f"resnest_det sample data set, {split} split",
            "version": str(SAMPLE_VERSION),
            "contributor": "generated by resnest_det",
        },
        "licenses": [{"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": shape.category_id, "name": shape.name, "supercategory": shape.supercategory} for shape in SHAPES
        ],
    }
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(instances), encoding="utf-8")
    num_crowds = sum(annotation["iscrowd"] for annotation in annotations)
    annotated = {annotation["image_id"] for annotation in annotations}
    return _SplitSummary(
        len(annotations) - num_crowds,
        num_crowds,
        num_images - len(annotated),
        class_pixels.sum(axis=0),
        (class_pixels > 0).sum(axis=0),
    )


def _write_class_list(path: Path, train: _SplitSummary, val: _SplitSummary) -> None:
    """The classes with the columns of ADE20K's objectInfo150.txt: share of pixels, images, whether stuff."""
    pixels = train.pixels + val.pixels
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    for value, name in enumerate(ADE_CLASS_NAMES, start=1):
        ratio = pixels[value] / pixels[1:].sum()
        is_stuff = int(name in TEXTURES)
        lines.append(f"{value}\t{ratio:.4f}\t{train.images[value]}\t{val.images[value]}\t{is_stuff}\t{name}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
