"""DetectionAugmentation: seeded, boxes with the image, masks of the resizing."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch

from resnest_det.data import DetectionAugmentation
from resnest_det.data.augment import RandomShortSide

HEIGHT, WIDTH = 48, 64
BOXES = np.array([[10.3, 20.1, 30.7, 40.9], [0, 0, WIDTH, HEIGHT], [3, 4, 5, 6.7]], np.float32)
NO_BOXES = np.zeros((0, 4), np.float32)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)


def test_nothing_geometric_returns_boxes_bit_for_bit(picture: np.ndarray) -> None:
    corners = np.sort(np.random.default_rng(1).random((2, 1000, 2)), axis=0) * (WIDTH, HEIGHT)
    boxes = np.concatenate(corners, axis=1).astype(np.float32)
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)]
    augment = DetectionAugmentation(horizontal_flip=0, color_jitter=1)
    image, found, kept = augment(picture, boxes, 0)
    assert (found == boxes).all()
    assert found.dtype == np.float32
    assert kept.tolist() == list(range(len(boxes)))
    assert image.dtype == np.uint8
    assert (image != picture).any()


def test_no_steps_change_nothing(picture: np.ndarray) -> None:
    image, boxes, _ = DetectionAugmentation(horizontal_flip=0)(picture, BOXES, 0)
    assert (image == picture).all()
    assert (boxes == BOXES).all()


def test_flips_move_image_and_boxes(picture: np.ndarray) -> None:
    augment = DetectionAugmentation(horizontal_flip=1, vertical_flip=1)
    image, boxes, _ = augment(picture, BOXES, 0)
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
        places[int(augment(corner, NO_BOXES, seed)[0][..., 0].argmax())] += 1
    # Each of the four corners has probability 1/4; 60 is more than 4.5 standard deviations below 100.
    assert sorted(places) == [0, 1, 2, 3]
    assert min(places.values()) > 60


@pytest.mark.parametrize("wide", [True, False])
def test_short_side_follows_torchvisions_rule(wide: bool) -> None:
    picture = np.zeros((100, 200, 3) if wide else (200, 100, 3), np.uint8)
    box = np.array([[10, 20, 50, 100]], np.float32)
    sizes = set()
    for seed in range(20):
        image, boxes, _ = DetectionAugmentation((50, 150, 300), 350, horizontal_flip=0)(picture, box, seed)
        scale = min(image.shape[:2]) / 100
        np.testing.assert_allclose(boxes, box * scale, rtol=1e-6)
        sizes.add(image.shape[:2] if wide else image.shape[1::-1])
    # 300 x 600 is cut to a long side of 350.
    assert sizes == {(50, 100), (150, 300), (175, 350)}


def test_output_depends_on_the_seed_alone(picture: np.ndarray) -> None:
    def make() -> DetectionAugmentation:
        return DetectionAugmentation((40, 80), 200, vertical_flip=0.5, color_jitter=0.8)

    one, other = make(), make()
    in_order = [one(picture, BOXES, seed) for seed in range(8)]
    np.random.seed(5)
    torch.manual_seed(5)
    backwards = [other(picture, BOXES, seed) for seed in reversed(range(8))][::-1]
    for first, second in zip(in_order, backwards, strict=True):
        assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert len({image.tobytes() for image, _, _ in in_order}) == 8


def test_without_seed_it_draws_afresh(picture: np.ndarray) -> None:
    augment = DetectionAugmentation(color_jitter=1)
    assert len({augment(picture, BOXES)[0].tobytes() for _ in range(5)}) == 5


def test_input_is_left_alone(picture: np.ndarray) -> None:
    before, boxes = picture.copy(), BOXES.copy()
    DetectionAugmentation((30,), 100, horizontal_flip=1, vertical_flip=1, color_jitter=1)(picture, boxes, 0)
    assert (picture == before).all()
    assert (boxes == BOXES).all()


@pytest.mark.parametrize("boxes", [NO_BOXES, np.array([[-20, -20, -10, -10]], np.float32)])
def test_no_boxes_left(picture: np.ndarray, boxes: np.ndarray) -> None:
    _, found, kept = DetectionAugmentation((30,), 100)(picture, boxes, 0)
    assert (found.shape, found.dtype) == ((0, 4), np.float32)
    assert (kept.shape, kept.dtype) == ((0,), np.int64)


def test_boxes_are_clipped_and_what_vanishes_is_dropped(picture: np.ndarray) -> None:
    boxes = np.array([[-5, 10, 20, 20], [70, 0, 80, 10], [10, 10, 12, 20], [10, 10, 11, 20]], np.float32)
    augment = DetectionAugmentation((HEIGHT // 2,), 100, horizontal_flip=0)
    _, found, kept = augment(picture, boxes, 0)  # half the size: the last box is half a pixel wide, and stays
    assert kept.tolist() == [0, 2, 3]
    assert found.tolist() == [[0, 5, 10, 10], [5, 5, 6, 10], [5, 5, 5.5, 10]]


def test_one_pixel() -> None:
    image, boxes, _ = DetectionAugmentation((7,), 100)(
        np.full((1, 1, 3), 9, np.uint8), np.array([[0, 0, 1, 1]], np.float32), 0
    )
    assert image.shape == (7, 7, 3)
    assert boxes.tolist() == [[0, 0, 7, 7]]


def test_long_thin_image_keeps_a_pixel() -> None:
    image, _, _ = DetectionAugmentation((50,), 100)(np.zeros((1, 1000, 3), np.uint8), NO_BOXES, 0)
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
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DetectionAugmentation(**arguments)


def test_albumentations_does_not_ask_the_network() -> None:
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"]
