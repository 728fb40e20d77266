from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from resnest_det.visualize import class_colour, compare_detections, detections, draw_boxes
from resnest_det.visualize.detections import _draw_link, place_tags

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


def test_masks_have_an_edge() -> None:
    """Opaque, and within the mask, so that those of one class are told apart; at the image's border too."""
    masks = np.zeros((2, 60, 80), bool)
    masks[0, 20:60, :40] = masks[1, 20:60, 40:] = True
    nowhere = np.zeros((2, 4))
    picture = draw_boxes(GREY, nowhere, np.array([1, 1]), NAMES, masks=masks, scale=1)
    coloured = has_colour(picture, 1)
    assert coloured[20, 45:].all()  # clear of the names
    assert coloured[59].all()
    assert coloured[20:, [0, 39, 40, 79]].all()
    assert not coloured[48:58, 2:38].any()


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


# --- where names go


def overlaps(places: list[tuple[float, float, float, float]]) -> int:
    """The number of pairs of places that have a pixel in common."""
    x1, y1, x2, y2 = np.array(places).T
    in_x = (x1[:, None] < x2) & (x1 < x2[:, None])
    in_y = (y1[:, None] < y2) & (y1 < y2[:, None])
    return (np.count_nonzero(in_x & in_y) - len(places)) // 2


def nearest_free_place(
    wanted: tuple[int, int],
    size: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
    picture_size: tuple[int, int],
) -> float | None:
    """By trying every pixel: the distance from the wanted corner to the nearest free one, None where none is free."""
    is_free = np.ones((picture_size[0] - size[0] + 1, picture_size[1] - size[1] + 1), dtype=bool)
    x, y = np.indices(is_free.shape)
    for x1, y1, x2, y2 in taken:
        is_free &= (x + size[0] <= x1) | (x >= x2) | (y + size[1] <= y1) | (y >= y2)
    if not is_free.any():
        return None
    return float(np.hypot(x - wanted[0], y - wanted[1])[is_free].min())


@pytest.mark.parametrize("seed", range(6))
def test_names_go_to_the_nearest_free_place(seed: int) -> None:
    """Until the picture is full, in which case, and in no other, names cover each other."""
    rng = np.random.default_rng(seed)
    picture_size = 120, 90
    corners = rng.integers(0, (120, 90), (60, 2, 2))
    boxes = [tuple(map(float, (*pair.min(axis=0), *pair.max(axis=0)))) for pair in corners]
    sizes = [(int(rng.integers(8, 36)), 9) for _ in boxes]
    places = place_tags(boxes, sizes, picture_size)
    num_searched = num_full = 0
    for number, (place, (x1, y1, x2, y2), size) in enumerate(zip(places, boxes, sizes, strict=True)):
        assert (place[2] - place[0], place[3] - place[1]) == size
        assert place[0] >= 0
        assert place[1] >= 0
        assert place[2] <= picture_size[0]
        assert place[3] <= picture_size[1]
        corners_of_box = [(x1, y1 - 9), (x1, y2), (x2 - size[0], y1 - 9), (x2 - size[0], y2), (x1, y1)]
        at_corners = [
            (min(max(0, left), picture_size[0] - size[0]), min(max(0, top), picture_size[1] - size[1]))
            for left, top in corners_of_box
        ]
        before = places[:number]
        free = [corner for corner in at_corners if nearest_free_place(corner, size, before, picture_size) == 0]
        nearest = nearest_free_place(at_corners[0], size, before, picture_size)
        covered = number > 0 and overlaps([*before, place]) > overlaps(before or [place])
        if free:
            assert place[:2] == free[0]
        elif nearest is not None:
            num_searched += 1
            assert np.hypot(place[0] - at_corners[0][0], place[1] - at_corners[0][1]) == pytest.approx(nearest)
        else:
            num_full += 1
        assert covered == (nearest is None)
    assert num_searched > 3
    assert num_full > 0


def crowd(num_boxes: int, width: int, height: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes in one part of a picture, many over each other, with labels and scores."""
    rng = np.random.default_rng(seed)
    sides = rng.uniform(0.03, 0.15, (num_boxes, 2))
    corners = 0.3 + rng.normal(0, 0.08, (num_boxes, 2))
    boxes = np.concatenate([corners, corners + sides], axis=1) * (width, height, width, height)
    return boxes, np.arange(1, num_boxes + 1), rng.uniform(0.3, 1, num_boxes)


@pytest.mark.parametrize(("width", "height"), [(1333, 800), (640, 480), (500, 700)])
def test_no_two_names_of_a_crowd_overlap(width: int, height: int) -> None:
    boxes, _, _ = crowd(60, width, height)
    sizes = [(70, 16)] * 60
    places = place_tags([tuple(box) for box in boxes], sizes, (width, height))
    assert overlaps(places) == 0


def test_every_name_of_a_crowd_can_be_read() -> None:
    boxes, labels, scores = crowd(60, 900, 600)
    names = {label: f"class {label}" for label in labels.tolist()}
    picture = draw_boxes(np.full((600, 900, 3), 128, np.uint8), boxes, labels, names, scores)
    for label in labels.tolist():
        tag = has_colour(picture, label)
        rows = np.flatnonzero(tag.sum(axis=1) > 25)  # of a name, between and above its letters
        assert len(rows) >= 12, f"the name of box {label} is not seen"
        assert np.count_nonzero(tag[rows]) > 700


def test_names_get_smaller_in_a_crowd_only() -> None:
    """Letters are a 36th of the picture's long side, and down to an 80th."""

    def height_of_best_name(num_boxes: int) -> int:
        boxes, labels, scores = crowd(num_boxes, 1333, 800)
        boxes[scores.argmax()] = 700, 300, 1300, 700  # by itself
        picture = draw_boxes(
            np.full((800, 1333, 3), 128, np.uint8), boxes, labels, dict.fromkeys(labels.tolist(), "disc"), scores
        )
        return np.count_nonzero(has_colour(picture, int(labels[scores.argmax()]))[:300, 705])

    assert 1333 / 36 < height_of_best_name(2) < 1333 / 36 + 14  # with margins above and below
    assert 1333 / 80 < height_of_best_name(80) < 1333 / 80 + 14


def test_of_very_many_boxes_all_are_drawn_and_the_best_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[int] = []

    def counted(boxes: Any, sizes: Any, picture_size: Any) -> Any:
        placed.append(len(boxes))
        return place_tags(boxes, sizes, picture_size)

    monkeypatch.setattr(detections, "place_tags", counted)
    corners = np.stack(np.meshgrid(np.arange(25) * 40, np.arange(20) * 40), axis=-1).reshape(-1, 2) + 5.0
    boxes = np.concatenate([corners, corners + 30], axis=1)
    labels, scores = np.ones(500, np.int64), np.linspace(0, 1, 500)
    picture = draw_boxes(np.full((805, 1005, 3), 128, np.uint8), boxes, labels, {1: "a"}, scores, scale=1)
    assert max(placed) == 200
    coloured = has_colour(picture, 1)
    assert all(coloured[y : y + 30, x].sum() > 20 for x, y in corners.astype(int))
    named = (picture == 255).all(axis=-1) | (picture == 16).all(axis=-1)
    assert named[-320:].any()
    assert not named[:400].any()  # of low scores


def test_long_names_are_shortened_to_the_picture() -> None:
    names = {1: "a name of a class that is very much too long for any picture " * 3, 2: "x"}
    picture = draw_boxes(np.full((480, 480, 3), 128, np.uint8), BOX * 5, np.array([1]), names, np.array([0.25]))
    short = draw_boxes(np.full((480, 480, 3), 128, np.uint8), BOX * 5, np.array([2]), names, np.array([0.25]))
    tag = has_colour(picture, 1)
    columns = np.flatnonzero(tag[: BOX[0, 1].astype(int) * 5 - 3].any(axis=0))
    assert columns.min() < 10
    assert columns.max() > 470
    score = short[has_colour(short, 2).any(axis=1)]  # what is written behind is the same
    assert num_text_pixels(picture) > num_text_pixels(short) > 0
    assert score.size


@pytest.mark.parametrize(
    ("box", "line"),
    [
        ((100, 100, 150, 150), [(50, 20), (75, 60), (100, 100)]),
        ((20, 60, 40, 80), [(30, 20), (30, 40), (30, 60)]),  # below it
        ((80, 0, 90, 90), [(50, 15), (65, 15), (80, 15)]),  # beside it
        ((2, 60, 5, 80), [(10, 20), (8, 40), (5, 60)]),
        ((10, 20, 90, 90), []),  # touching it
        ((40, 15, 90, 90), []),
    ],
)
def test_name_away_from_its_box_has_a_line_to_it(box: tuple[int, ...], line: list[tuple[int, int]]) -> None:
    picture = Image.new("RGB", (160, 160))
    _draw_link(ImageDraw.Draw(picture), (10, 10, 50, 20), box, (255, 0, 0), 2)  # type: ignore[arg-type]
    red = np.asarray(picture)[..., 0] == 255
    assert red.any() == bool(line)
    for x, y in line:
        assert red[y - 2 : y + 3, x - 2 : x + 3].any()
    assert red.sum() < 300
