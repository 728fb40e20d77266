"""DetectionAugmentation and SegmentationAugmentation: seeded, boxes and masks with the image."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np
import pytest
import torch

from resnest_det.data import DetectionAugmentation, SegmentationAugmentation
from resnest_det.data.augment import RandomShortSide

HEIGHT, WIDTH = 48, 64
BOXES = np.array([[10.3, 20.1, 30.7, 40.9], [0, 0, WIDTH, HEIGHT], [3, 4, 5, 6.7]], np.float32)
NO_BOXES = np.zeros((0, 4), np.float32)
MASKS = (np.random.default_rng(3).random((len(BOXES), HEIGHT, WIDTH)) < 0.5).astype(np.uint8)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)


def test_nothing_geometric_returns_boxes_bit_for_bit(picture: np.ndarray) -> None:
    corners = np.sort(np.random.default_rng(1).random((2, 1000, 2)), axis=0) * (WIDTH, HEIGHT)
    boxes = np.concatenate(corners, axis=1).astype(np.float32)
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)]
    augment = DetectionAugmentation(horizontal_flip=0, color_jitter=1)
    image, found, masks, kept = augment(picture, boxes, seed=0)
    assert (found == boxes).all()
    assert found.dtype == np.float32
    assert kept.tolist() == list(range(len(boxes)))
    assert masks is None
    assert image.dtype == np.uint8
    assert (image != picture).any()


def test_no_steps_change_nothing(picture: np.ndarray) -> None:
    image, boxes, *_ = DetectionAugmentation(horizontal_flip=0)(picture, BOXES, seed=0)
    assert (image == picture).all()
    assert (boxes == BOXES).all()


def test_flips_move_image_and_boxes(picture: np.ndarray) -> None:
    augment = DetectionAugmentation(horizontal_flip=1, vertical_flip=1)
    image, boxes, *_ = augment(picture, BOXES, seed=0)
    assert (image == picture[::-1, ::-1]).all()
    x1, y1, x2, y2 = BOXES.T
    expected = np.stack((WIDTH - x2, HEIGHT - y2, WIDTH - x1, HEIGHT - y1), axis=1)
    np.testing.assert_allclose(boxes, expected, rtol=0, atol=1e-5)


def test_the_two_flips_are_drawn_independently() -> None:
    """The seed must not be given to each step by itself: they would then all draw the same number."""
    corner = np.zeros((2, 2, 3), np.uint8)
    corner[0, 0] = 255
    augment = DetectionAugmentation(horizontal_flip=0.5, vertical_flip=0.5)
    places: Counter[int] = Counter()
    for seed in range(400):
        places[int(augment(corner, NO_BOXES, seed=seed)[0][..., 0].argmax())] += 1
    # Each of the four corners has probability 1/4; 60 is more than 4.5 standard deviations below 100.
    assert sorted(places) == [0, 1, 2, 3]
    assert min(places.values()) > 60


@pytest.mark.parametrize("wide", [True, False])
def test_short_side_follows_torchvisions_rule(wide: bool) -> None:
    picture = np.zeros((100, 200, 3) if wide else (200, 100, 3), np.uint8)
    box = np.array([[10, 20, 50, 100]], np.float32)
    sizes = set()
    for seed in range(20):
        image, boxes, *_ = DetectionAugmentation((50, 150, 300), 350, horizontal_flip=0)(picture, box, seed=seed)
        scale = min(image.shape[:2]) / 100
        np.testing.assert_allclose(boxes, box * scale, rtol=1e-6)
        sizes.add(image.shape[:2] if wide else image.shape[1::-1])
    # 300 x 600 is cut to a long side of 350.
    assert sizes == {(50, 100), (150, 300), (175, 350)}


@pytest.mark.parametrize(
    "size", [{"short_sides": (40, 80), "max_side": 200}, {"scale_jitter": (0.5, 2), "crop_size": 64}]
)
def test_output_depends_on_the_seed_alone(picture: np.ndarray, size: dict[str, Any]) -> None:
    def make() -> DetectionAugmentation:
        return DetectionAugmentation(**size, vertical_flip=0.5, color_jitter=0.8)

    one, other = make(), make()
    in_order = [one(picture, BOXES, MASKS, seed) for seed in range(8)]
    np.random.seed(5)
    torch.manual_seed(5)
    backwards = [other(picture, BOXES, MASKS, seed) for seed in reversed(range(8))][::-1]
    for first, second in zip(in_order, backwards, strict=True):
        assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert len({image.tobytes() for image, *_ in in_order}) == 8


def test_without_seed_it_draws_afresh(picture: np.ndarray) -> None:
    augment = DetectionAugmentation(color_jitter=1)
    assert len({augment(picture, BOXES)[0].tobytes() for _ in range(5)}) == 5


def test_input_is_left_alone(picture: np.ndarray) -> None:
    inputs = picture, BOXES, MASKS
    before = [array.copy() for array in inputs]
    for size in ({"short_sides": (30,)}, {"scale_jitter": (0.5, 2), "crop_size": 40}):
        DetectionAugmentation(**size, horizontal_flip=1, vertical_flip=1, color_jitter=1)(*inputs, 0)
    assert all((array == kept).all() for array, kept in zip(inputs, before, strict=True))


@pytest.mark.parametrize("boxes", [NO_BOXES, np.array([[-20, -20, -10, -10]], np.float32)])
def test_no_boxes_left(picture: np.ndarray, boxes: np.ndarray) -> None:
    masks = np.ones((len(boxes), HEIGHT, WIDTH), np.uint8)
    image, found, found_masks, kept = DetectionAugmentation((30,), 100)(picture, boxes, masks, 0)
    assert (found.shape, found.dtype) == ((0, 4), np.float32)
    assert found_masks is not None
    assert (found_masks.shape, found_masks.dtype) == ((0, *image.shape[:2]), np.uint8)
    assert (kept.shape, kept.dtype) == ((0,), np.int64)


def test_boxes_are_clipped_and_what_vanishes_is_dropped(picture: np.ndarray) -> None:
    boxes = np.array([[-5, 10, 20, 20], [70, 0, 80, 10], [10, 10, 12, 20], [10, 10, 11, 20]], np.float32)
    augment = DetectionAugmentation((HEIGHT // 2,), 100, horizontal_flip=0)
    _, found, _, kept = augment(picture, boxes, seed=0)  # half the size: the last box is half a pixel wide, and stays
    assert kept.tolist() == [0, 2, 3]
    assert found.tolist() == [[0, 5, 10, 10], [5, 5, 6, 10], [5, 5, 5.5, 10]]


def test_one_pixel() -> None:
    image, boxes, *_ = DetectionAugmentation((7,), 100)(
        np.full((1, 1, 3), 9, np.uint8), np.array([[0, 0, 1, 1]], np.float32), seed=0
    )
    assert image.shape == (7, 7, 3)
    assert boxes.tolist() == [[0, 0, 7, 7]]


def test_long_thin_image_keeps_a_pixel() -> None:
    image, *_ = DetectionAugmentation((50,), 100)(np.zeros((1, 1000, 3), np.uint8), NO_BOXES, seed=0)
    assert image.shape == (1, 100, 3)


def test_masks_are_resized_with_the_image_and_keep_their_values(picture: np.ndarray) -> None:
    mask = np.random.default_rng(2).choice(np.array([0, 7, 255], np.uint8), (HEIGHT, WIDTH))
    pipeline = A.Compose([RandomShortSide((30, 70, 90), 200)])
    for _ in range(4):
        result = pipeline(image=picture, mask=mask)
        assert result["mask"].shape == result["image"].shape[:2]
        assert set(np.unique(result["mask"])) == {0, 7, 255}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizontal_flip": 1.5}, "horizontal_flip=1.5 is outside [0, 1]"),
        ({"vertical_flip": -0.1}, "vertical_flip=-0.1 is outside [0, 1]"),
        ({"color_jitter": 2}, "color_jitter=2 is outside [0, 1]"),
        ({"short_sides": (480, 0)}, "short_sides=(480, 0), max_side=1333: sizes are pixels"),
        ({"max_side": -1}, "max_side=-1: sizes are pixels"),
        ({"short_sides": (800, 900), "max_side": 640}, "short_sides=(800, 900) are all above max_side=640"),
        (
            {"short_sides": (480,), "scale_jitter": (0.1, 2), "crop_size": 512},
            "short_sides=(480,) and scale_jitter=(0.1, 2) both decide the size; leave short_sides empty",
        ),
        ({"scale_jitter": (0.1, 2)}, "crop_size=0 with scale_jitter=(0.1, 2): the square"),
        ({"scale_jitter": (0.1, 2), "crop_size": -5}, "crop_size=-5 with scale_jitter=(0.1, 2)"),
        ({"crop_size": 512}, "crop_size=512 has no effect without scale_jitter; give scale_jitter"),
        ({"scale_jitter": (2, 0.1), "crop_size": 9}, "scale_jitter=(2, 0.1) must be two positive numbers"),
        ({"scale_jitter": (0, 1), "crop_size": 9}, "scale_jitter=(0, 1) must be two positive numbers"),
        ({"scale_jitter": (1,), "crop_size": 9}, "scale_jitter=(1,) must be two positive numbers"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DetectionAugmentation(**arguments)


@pytest.mark.parametrize("shape", [(2, HEIGHT, WIDTH), (3, WIDTH, HEIGHT), (HEIGHT, WIDTH)])
def test_masks_must_fit_boxes_and_image(picture: np.ndarray, shape: tuple[int, ...]) -> None:
    message = f"masks of shape {shape} do not fit 3 boxes on an image of {WIDTH} x {HEIGHT} pixels"
    with pytest.raises(ValueError, match=re.escape(message)):
        DetectionAugmentation()(picture, BOXES, np.ones(shape, np.uint8), 0)


def test_albumentations_does_not_ask_the_network() -> None:
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"]


# --- masks and large-scale jitter


class Scene(NamedTuple):
    """Rectangles of one colour each on black: in every result, colour, box and mask must still say the same."""

    image: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    colours: np.ndarray


@pytest.fixture(params=[(90, 160), (160, 90)])
def scene(request: pytest.FixtureRequest) -> Scene:
    height, width = request.param
    image = np.zeros((height, width, 3), np.uint8)
    colours = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [0, 250, 250]], np.uint8)
    boxes = []
    for place, colour in enumerate(colours):
        left, top = (8 + 28 * place, 20) if width > height else (20, 8 + 28 * place)
        boxes.append((left, top, left + 20, top + 16))
        image[top : top + 16, left : left + 20] = colour
    masks = np.stack([(image == colour).all(axis=2) for colour in colours]).astype(np.uint8)
    return Scene(image, np.array(boxes, np.float32), masks, colours)


def assert_agree(scene: Scene, result: tuple[Any, ...], pixels: float) -> None:
    """Each box's colour fills its mask, and its box is the mask's to `pixels`."""
    image, boxes, masks, kept = result
    assert masks.shape == (len(boxes), *image.shape[:2])
    assert masks.dtype == np.uint8
    assert boxes.dtype == np.float32
    for box, mask, colour in zip(boxes, masks, scene.colours[kept], strict=True):
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        if len(rows):  # of a box barely wider than a pixel, nearest neighbour may have met none
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(box, found, rtol=0, atol=pixels)
        else:
            assert (box[2:] - box[:2]).min() < pixels
        # Bilinear mixes colours beside an edge, where the nearest pixel has half of either axis's weight or more.
        inside = cv2.erode(np.pad(mask, 1), np.ones((5, 5), np.uint8))[1:-1, 1:-1].astype(bool)
        assert (image[inside] == colour).all()
        assert (np.abs(image.astype(int) - colour).max(axis=2)[mask == 1] <= 0.75 * 250 + 2).all()


def test_flips_move_masks(scene: Scene) -> None:
    result = DetectionAugmentation(horizontal_flip=1, vertical_flip=1)(*scene[:3], 0)
    assert_agree(scene, result, 1e-4)
    assert (result[2] == scene.masks[:, ::-1, ::-1]).all()


def test_short_side_resizes_masks(scene: Scene) -> None:
    for seed in range(6):
        assert_agree(scene, DetectionAugmentation((45, 100, 231))(*scene[:3], seed), 1.0)


def test_masks_of_dropped_boxes_are_dropped(picture: np.ndarray) -> None:
    boxes = np.array([[0, 0, 8, 8], [-9, 3, 0, 9], [70, 0, 80, 10], [10, 10, 20, 20]], np.float32)
    masks = np.arange(4, dtype=np.uint8)[:, None, None].repeat(HEIGHT, 1).repeat(WIDTH, 2)
    _, found, found_masks, kept = DetectionAugmentation(horizontal_flip=0)(picture, boxes, masks, 0)
    assert kept.tolist() == [0, 3]
    assert found.tolist() == boxes[[0, 3]].tolist()
    assert found_masks is not None
    assert found_masks[:, 0, 0].tolist() == [0, 3]


def large_scale_jitter(factor: float | tuple[float, float], crop_size: int) -> DetectionAugmentation:
    scale_jitter = factor if isinstance(factor, tuple) else (factor, factor)
    return DetectionAugmentation(horizontal_flip=0, scale_jitter=scale_jitter, crop_size=crop_size)


def test_jittered_boxes_stay_on_their_objects(scene: Scene) -> None:
    num_cut = 0
    for seed in range(60):
        augment = DetectionAugmentation(vertical_flip=0.5, scale_jitter=(0.3, 3), crop_size=128)
        result = augment(*scene[:3], seed)
        height, width = result[0].shape[:2]
        assert max(height, width) <= 128
        # The window begins and ends at the image's own pixels; a mask's edge is at most half a pixel off.
        assert_agree(scene, result, 1.0)
        assert (result[1] >= 0).all()
        assert (result[1] <= (width, height, width, height)).all()
        num_cut += len(result[3]) < 5
    assert num_cut > 10


@pytest.mark.parametrize(
    ("factor", "size"),
    [(0.1, (5, 10)), (0.5, (25, 50)), (1, (50, 100)), (1.5, (75, 100)), (2, (100, 100)), (4, (100, 100))],
)
@pytest.mark.parametrize("wide", [True, False])
def test_crop_of_an_image_scaled_into_a_square(factor: float, size: tuple[int, int], wide: bool) -> None:
    """200 x 100 fits a square of 100 as 100 x 50."""
    picture = np.zeros((100, 200, 3) if wide else (200, 100, 3), np.uint8)
    image, *_ = large_scale_jitter(factor, 100)(picture, NO_BOXES, seed=0)
    assert image.shape[:2] == (size if wide else size[::-1])


def test_jittered_image_is_the_resized_one() -> None:
    y, x = np.mgrid[:100, :200].astype(np.uint8)
    image, *_ = large_scale_jitter(2.5, 200)(np.stack((x, y, x), axis=2), NO_BOXES, seed=1)
    assert image.shape == (200, 200, 3)
    assert int(image[100, 190, 0]) - int(image[100, 10, 0]) == pytest.approx(180 / 2.5, abs=1)
    assert int(image[190, 100, 1]) - int(image[10, 100, 1]) == pytest.approx(180 / 2.5, abs=1)


def test_factors_are_drawn_evenly_from_their_range() -> None:
    augment = large_scale_jitter((0.5, 1.0), 200)
    longest = [max(augment(np.zeros((20, 40, 3), np.uint8), NO_BOXES, seed=seed)[0].shape) for seed in range(300)]
    assert 100 <= min(longest) < 105
    assert 195 < max(longest) <= 200
    assert np.mean(longest) == pytest.approx(150, abs=8)  # standard error 1.7


def test_jittered_crops_come_from_everywhere() -> None:
    y, x = np.mgrid[:40, :60].astype(np.uint8)
    augment = large_scale_jitter(3, 20)  # of the scaled 40 x 60, a third each way
    corners = {augment(np.stack((x, y, x), axis=2), NO_BOXES, seed=seed)[0][0, 0].tobytes() for seed in range(2000)}
    assert {corner[0] for corner in corners} == set(range(41))
    assert {corner[1] for corner in corners} == set(range(21))


def test_what_the_crop_cuts_is_clipped_and_slivers_are_dropped() -> None:
    """The crop of 20 x 20 at scale 1 may begin at any column of 40; each box's fate follows from it."""
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[..., 0] = np.arange(60)
    boxes = np.array(
        [[0, 0, 20.5, 20], [19, 5, 22, 8], [30, 3, 31, 4], [30, 3, 30.9, 4], [59.5, 0, 60, 20]], np.float32
    )
    seen = set()
    for seed in range(300):
        image, found, _, kept = large_scale_jitter(3, 20)(picture, boxes, seed=seed)
        left = int(image[0, 0, 0])
        seen.add(left)
        clipped = (boxes - (left, 0, left, 0)).clip(0, 20)
        expected = [i for i, (x1, _, x2, _) in enumerate(clipped) if x2 - x1 >= 0.9999]
        assert kept.tolist() == expected
        np.testing.assert_allclose(found, clipped[expected], atol=1e-4)
    assert seen == set(range(41))


@pytest.mark.parametrize(("width", "kept"), [(10, [0]), (9.9, [])])
def test_boxes_that_jitter_makes_smaller_than_a_pixel_are_dropped(width: float, kept: list[int]) -> None:
    box = np.array([[20, 20, 20 + width, 80]], np.float32)
    result = large_scale_jitter(0.1, 100)(np.zeros((100, 100, 3), np.uint8), box, np.ones((1, 100, 100), np.uint8), 0)
    assert result[3].tolist() == kept
    assert result[2].shape == (len(kept), 10, 10)


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1)])
def test_jitter_of_one_pixel_and_thin_images(shape: tuple[int, int]) -> None:
    box = np.array([[0, 0, shape[1], shape[0]]], np.float32)
    for seed in range(10):
        image, boxes, masks, _ = large_scale_jitter((0.1, 2), 64)(
            np.full((*shape, 3), 9, np.uint8), box, np.ones((1, *shape), np.uint8), seed
        )
        height, width = image.shape[:2]
        assert boxes.tolist() == [[0, 0, width, height]]
        assert masks is not None
        assert masks.all()
        assert (image == 9).all()


# --- SegmentationAugmentation

MEAN_COLOUR = [124, 116, 104]


def unscaled(crop_size: int, **arguments: Any) -> SegmentationAugmentation:
    """Crops alone, unless `arguments` say otherwise."""
    return SegmentationAugmentation(crop_size, **({"scale": (1, 1), "horizontal_flip": 0} | arguments))


@pytest.fixture(params=["columns", "rows"])
def striped(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Stripes of two classes, 12 pixels wide; the image's red is 200 where the class is 1."""
    mask = (np.arange(192, dtype=np.uint8) // 12 % 2)[None].repeat(150, axis=0)
    mask = mask if request.param == "columns" else np.ascontiguousarray(mask.T)
    return np.stack((mask * 200, np.zeros_like(mask), np.zeros_like(mask)), axis=2), mask


@pytest.mark.parametrize("base_size", [0, 100, 400])
def test_mask_stays_on_its_image(striped: tuple[np.ndarray, np.ndarray], base_size: int) -> None:
    augment = SegmentationAugmentation(128, base_size=base_size, vertical_flip=0.5)
    for seed in range(20):
        crop, crop_mask = augment(*striped, seed)
        assert (crop.shape, crop.dtype) == ((128, 128, 3), np.uint8)
        assert (crop_mask.shape, crop_mask.dtype) == ((128, 128), np.uint8)
        inside = crop_mask != 255
        assert (crop[~inside] == MEAN_COLOUR).all()
        assert np.unique(crop_mask[inside]).tolist() == [0, 1]
        # Where bilinear mixes two stripes, the nearest one has the larger share.
        mixed = np.abs(crop[..., 0].astype(int) - crop_mask.astype(int) * 200)[inside]
        assert mixed.max() <= 101


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.3, 2.0])
def test_scale(scale: float) -> None:
    y, x = np.mgrid[:120, :200].astype(np.uint8)
    augment = unscaled(50, scale=(scale, scale))
    for seed in range(5):
        crop, _ = augment(np.stack((x, y, x), axis=2), x, seed)
        assert int(crop[25, 49, 0]) - int(crop[25, 0, 0]) == pytest.approx(49 / scale, abs=2)
        assert int(crop[49, 25, 1]) - int(crop[0, 25, 1]) == pytest.approx(49 / scale, abs=2)


def test_scales_are_drawn_from_the_range_of_the_base_size() -> None:
    image, mask = np.full((20, 30, 3), 9, np.uint8), np.full((20, 30), 3, np.uint8)
    augment = SegmentationAugmentation(300, base_size=100, scale=(0.5, 2.0))
    heights = [int((augment(image, mask, seed)[1] == 3).any(axis=1).sum()) for seed in range(200)]
    assert 50 <= min(heights) < 60
    assert 190 < max(heights) <= 200
    assert np.mean(heights) == pytest.approx(125, abs=10)  # evenly: standard error 3


def test_crops_come_from_everywhere() -> None:
    y, x = np.mgrid[:40, :60].astype(np.uint8)
    augment = unscaled(20)
    corners = {augment(np.stack((x, y, x), axis=2), x, seed)[0][0, 0].tobytes() for seed in range(2000)}
    xs, ys = ({corner[place] for corner in corners} for place in (0, 1))
    assert ys == set(range(21))
    assert xs == set(range(41))


def test_small_image_is_padded_right_and_below() -> None:
    image, mask = np.full((3, 5, 3), 9, np.uint8), np.full((3, 5), 7, np.uint8)
    crop, crop_mask = unscaled(8, color_jitter=1)(image, mask, 0)
    assert (crop_mask[:3, :5] == 7).all()
    assert (crop_mask == 255).sum() == 64 - 15
    assert (crop[crop_mask == 255] == MEAN_COLOUR).all()  # jitter does not colour the padding


def test_flips_move_image_and_mask() -> None:
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4)
    image = np.stack((mask, mask, mask), axis=2)
    crop, crop_mask = unscaled(4, horizontal_flip=1, vertical_flip=1, max_class_ratio=1)(image, mask, 0)
    assert (crop == image[::-1, ::-1]).all()
    assert (crop_mask == mask[::-1, ::-1]).all()


def test_crops_with_one_class_are_drawn_again() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 70:80] = 1
    image = np.zeros((100, 100, 3), np.uint8)

    def num_varied(max_class_ratio: float) -> int:
        augment = unscaled(20, max_class_ratio=max_class_ratio)
        shares = [np.bincount(augment(image, mask, seed)[1].ravel()).max() / 400 for seed in range(200)]
        return sum(share <= 0.75 for share in shares)

    # Class 1 fills a quarter of the crop, 5 columns, at 21 of the 81 places from left to right.
    assert num_varied(1.0) < 80
    assert num_varied(0.75) > 180  # expected: 1 - (60 / 81)^10, 95 % of 200


def test_ignored_pixels_do_not_count_as_a_class() -> None:
    mask = np.full((40, 40), 255, np.uint8)
    mask[::8], mask[4::8] = 0, 1
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    for seed in range(10):  # the first crop is taken, as without a limit
        limited, free = (unscaled(16, max_class_ratio=ratio)(image, mask, seed) for ratio in (0.6, 1.0))
        assert (limited[0] == free[0]).all()


@pytest.mark.parametrize("value", [0, 3, 255])
def test_mask_of_one_value_still_gives_a_crop(value: int) -> None:
    """Of a class, or ignored altogether: no draw can be varied."""
    crop_mask = SegmentationAugmentation(16)(np.zeros((40, 50, 3), np.uint8), np.full((40, 50), value, np.uint8), 0)[1]
    assert np.unique(crop_mask).tolist() == [value]


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (2, 3)])
@pytest.mark.parametrize("base_size", [0, 512])
def test_one_pixel_and_thin_images(shape: tuple[int, int], base_size: int) -> None:
    image, mask = np.full((*shape, 3), 9, np.uint8), np.full(shape, 5, np.uint8)
    for seed in range(10):
        crop, crop_mask = SegmentationAugmentation(32, base_size=base_size)(image, mask, seed)
        assert crop.shape == (32, 32, 3)
        assert crop_mask[0, 0] == 5
        assert (crop[crop_mask == 5] == 9).all()


def test_segmentation_depends_on_the_seed_alone(striped: tuple[np.ndarray, np.ndarray]) -> None:
    def make() -> SegmentationAugmentation:
        return SegmentationAugmentation(64, vertical_flip=0.5, color_jitter=0.8)

    one, other = make(), make()
    in_order = [one(*striped, seed) for seed in range(8)]
    np.random.seed(5)
    torch.manual_seed(5)
    backwards = [other(*striped, seed) for seed in reversed(range(8))][::-1]
    for first, second in zip(in_order, backwards, strict=True):
        assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert len({image.tobytes() for image, _ in in_order}) == 8
    assert len({one(*striped)[0].tobytes() for _ in range(5)}) == 5  # without a seed, drawn afresh


def test_segmentation_leaves_its_input_alone(striped: tuple[np.ndarray, np.ndarray]) -> None:
    image, mask = (array.copy() for array in striped)
    SegmentationAugmentation(64, horizontal_flip=1, vertical_flip=1, color_jitter=1)(image, mask, 0)
    assert (image == striped[0]).all()
    assert (mask == striped[1]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 0}, "crop_size=0, base_size=0: sizes are pixels"),
        ({"base_size": -1}, "crop_size=64, base_size=-1: sizes are pixels"),
        ({"scale": (0, 1)}, "scale=(0, 1) must be two positive numbers, the smaller one first"),
        ({"scale": (2, 0.5)}, "scale=(2, 0.5) must be two positive numbers"),
        ({"scale": (1, float("inf"))}, "scale=(1, inf) must be two positive numbers"),
        ({"max_class_ratio": 0}, "max_class_ratio=0 is outside (0, 1]; use 1 for no limit"),
        ({"max_class_ratio": 1.1}, "max_class_ratio=1.1 is outside (0, 1]"),
        ({"horizontal_flip": 1.5}, "horizontal_flip=1.5 is outside [0, 1]"),
        ({"vertical_flip": -1}, "vertical_flip=-1 is outside [0, 1]"),
        ({"color_jitter": 2}, "color_jitter=2 is outside [0, 1]"),
    ],
)
def test_segmentation_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SegmentationAugmentation(**({"crop_size": 64} | arguments))
