from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from resnest_det.visualize import class_colour, compare_detections, draw_boxes

NAMES = {1: "disc", 2: "square", 3: "a name that is far too long for its box"}
GREY = np.full((60, 80, 3), 128, dtype=np.uint8)
BOX = np.array([[20.0, 25.0, 60.0, 50.0]])


def has_colour(picture: np.ndarray, label: int) -> np.ndarray:
    return (picture == class_colour(label)).all(axis=-1)


def num_text_pixels(picture: np.ndarray) -> int:
    """On a grey image nothing but the names' letters is white or nearly black."""
    return np.count_nonzero((picture == 255).all(axis=-1) | (picture == 16).all(axis=-1))


def test_box_is_drawn_where_it_is() -> None:
    picture = draw_boxes(GREY, BOX, np.array([1]), NAMES, scale=4)
    assert picture.shape == (240, 320, 3)
    assert picture.dtype == np.uint8
    coloured = has_colour(picture, 1)
    assert coloured[150, 80]  # the left side, x = 4 * 20
    assert coloured[150, 240]
    assert coloured[200, 160]  # the bottom, y = 4 * 50
    assert not coloured[150, 100:220].any()
    assert (picture[150, 160] == 128).all()


def test_small_images_are_enlarged_and_large_ones_are_not() -> None:
    nothing = np.zeros((0, 4)), np.zeros(0, dtype=np.int64)
    assert draw_boxes(GREY, *nothing, NAMES).shape == (360, 480, 3)
    assert draw_boxes(np.zeros((700, 500, 3), np.uint8), *nothing, NAMES).shape == (700, 500, 3)
    assert draw_boxes(np.zeros((1, 1, 3), np.uint8), *nothing, NAMES).shape == (480, 480, 3)


def test_no_boxes_leave_the_image_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(draw_boxes(image, np.zeros((0, 4)), np.zeros(0), NAMES, scale=1), image)
    np.testing.assert_array_equal(draw_boxes(image, torch.zeros(0), torch.zeros(0), NAMES, scale=1), image)


def test_tensor_and_array_give_the_same_picture_and_stay_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    before = image.copy()
    arrays = draw_boxes(image, BOX, np.array([2]), NAMES, np.array([0.5]))
    tensors = draw_boxes(
        torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(BOX), torch.tensor([2]), NAMES, torch.tensor([0.5])
    )
    np.testing.assert_array_equal(arrays, tensors)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    "box",
    [(0, 0, 80, 60), (-30, -30, 20, 20), (70, 50, 200, 90), (200, 200, 300, 300), (79, 59, 80, 60), (40, 30, 40, 30)],
)
def test_name_stays_inside_the_picture(box: tuple[float, ...]) -> None:
    whole = num_text_pixels(draw_boxes(GREY, BOX, np.array([1]), NAMES))
    assert whole > 10
    picture = draw_boxes(GREY, np.array([box], dtype=np.float32), np.array([1]), NAMES)
    assert num_text_pixels(picture) == whole


def test_name_wider_than_the_picture() -> None:
    assert draw_boxes(GREY, BOX, np.array([3]), NAMES, scale=1).shape == GREY.shape


def test_score_is_written() -> None:
    without = draw_boxes(GREY, BOX, np.array([1]), NAMES)
    low = draw_boxes(GREY, BOX, np.array([1]), NAMES, np.array([0.12]))
    high = draw_boxes(GREY, BOX, np.array([1]), NAMES, np.array([0.98]))
    assert not np.array_equal(low, without)
    assert not np.array_equal(low, high)


def test_box_of_high_score_is_drawn_on_top() -> None:
    boxes, labels = np.repeat(BOX, 2, axis=0), np.array([1, 2])
    for scores, top in (([0.9, 0.2], 1), ([0.2, 0.9], 2)):
        picture = draw_boxes(GREY, boxes, labels, NAMES, np.array(scores), scale=4)
        assert has_colour(picture, top)[150, 80]


def test_names_of_equal_boxes_do_not_cover_each_other() -> None:
    singly = sum(num_text_pixels(draw_boxes(GREY, BOX, np.array([label]), NAMES)) for label in (1, 2))
    both = draw_boxes(GREY, np.repeat(BOX, 2, axis=0), np.array([1, 2]), NAMES)
    assert num_text_pixels(both) == singly


def test_masks_are_painted_as_they_come() -> None:
    """Dense, as a detector returns them, or as run lengths: in their class's colour, and nowhere else."""
    image = np.full((200, 300, 3), 100, np.uint8)
    boxes, labels = np.array([[50.0, 40.0, 100.0, 90.0], [150.0, 100.0, 250.0, 180.0]]), np.array([1, 2])
    masks = np.zeros((2, 200, 300), np.uint8)
    masks[0, 40:90, 50:100] = masks[1, 100:180, 150:250] = 1
    plain = draw_boxes(image, boxes, labels, NAMES, scale=1)
    drawn = draw_boxes(image, boxes, labels, NAMES, masks=masks, scale=1)
    for (x, y), label in zip(((75, 65), (200, 140)), labels, strict=True):
        assert drawn[y, x].tolist() == [round(0.55 * 100 + 0.45 * part) for part in class_colour(label)]
    outside = ~masks.any(axis=0)
    assert np.array_equal(drawn[outside], plain[outside])
    encoded = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
    for form in (torch.from_numpy(masks)[:, None] * 0.9, encoded):
        assert np.array_equal(draw_boxes(image, boxes, labels, NAMES, masks=form, scale=1), drawn)
    nothing = np.zeros((0, 4)), np.zeros(0, np.int64)
    assert np.array_equal(draw_boxes(image, *nothing, NAMES, masks=[], scale=1), image)


def test_crowd_is_dashed() -> None:
    def share_of_left_side(crowd: bool) -> float:
        picture = draw_boxes(GREY, BOX, np.array([1]), NAMES, iscrowd=np.array([crowd]), scale=6)
        return has_colour(picture, 1)[155:295, 121].mean()

    assert share_of_left_side(False) == 1
    assert 0.3 < share_of_left_side(True) < 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": GREY.astype(np.float32)}, r"image is of float32, expected uint8"),
        ({"image": GREY[..., :1]}, r"shape \(60, 80, 1\), expected \(H, W, 3\) for an array"),
        ({"image": GREY[..., 0]}, r"shape \(60, 80\), expected \(H, W, 3\) for an array"),
        (
            {"image": torch.zeros(60, 80, 3, dtype=torch.uint8)},
            r"shape \(60, 80, 3\), expected \(3, H, W\) for a tensor",
        ),
        ({"image": GREY[:0]}, r"shape \(0, 80, 3\), .*not empty"),
        ({"boxes_xyxy": BOX[0]}, r"boxes_xyxy has shape \(4,\), expected \(N, 4\)"),
        ({"boxes_xyxy": BOX[:, :3]}, r"boxes_xyxy has shape \(1, 3\), expected \(N, 4\)"),
        ({"boxes_xyxy": np.array([[0, 0, np.nan, np.inf]])}, r"boxes_xyxy holds 2 values that are not finite"),
        ({"labels": np.array([1, 2])}, r"labels has shape \(2,\), expected \(1,\)"),
        ({"labels": np.array([7])}, r"label 7 has no name in class_names, which begins: 1 disc, 2 square"),
        ({"scores": np.zeros((1, 1))}, r"scores has shape \(1, 1\), expected \(1,\)"),
        ({"iscrowd": np.zeros(0)}, r"iscrowd has shape \(0,\), expected \(1,\)"),
        ({"masks": np.zeros((1, 6, 8))}, r"a mask has shape \(6, 8\), expected \(60, 80\), the size"),
        ({"masks": np.zeros((2, 60, 80))}, r"there are 2 masks and 1 boxes; give one mask a box"),
        ({"scale": 0}, r"scale is 0, expected a whole number from 1"),
    ],
)
def test_wrong_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"image": GREY, "boxes_xyxy": BOX, "labels": np.array([1]), "class_names": NAMES}
    with pytest.raises(ValueError, match=message):
        draw_boxes(**(arguments | change))


def test_compare_detections_draws_truth_left_and_prediction_right() -> None:
    image = torch.from_numpy(GREY).permute(2, 0, 1)
    target = {"boxes": torch.from_numpy(BOX), "labels": torch.tensor([1]), "iscrowd": torch.tensor([False])}
    prediction = {
        "boxes": torch.from_numpy(np.repeat(BOX, 2, axis=0)),
        "labels": torch.tensor([2, 3]),
        "scores": torch.tensor([0.8, 0.3], requires_grad=True),
    }
    sheet = compare_detections([image], [target], [prediction], NAMES, names=["grey.jpg"])
    middle = sheet.shape[1] // 2
    assert has_colour(sheet[:, :middle], 1).any()
    assert not has_colour(sheet[:, middle:], 1).any()
    assert has_colour(sheet[:, middle:], 2).any()
    assert not has_colour(sheet, 3).any()  # its score is below one half
    assert has_colour(compare_detections([image], [target], [prediction], NAMES, min_score=0.2), 3).any()


def test_compare_detections_needs_as_many_of_each() -> None:
    with pytest.raises(ValueError, match=r"1 images, 0 targets and 0 predictions"):
        compare_detections([GREY], [], [], NAMES)
