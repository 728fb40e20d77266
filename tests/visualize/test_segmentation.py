from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnest_det.visualize import (
    class_colour,
    class_legend,
    compare_segmentations,
    draw_segmentation,
    paint_segmentation,
)

NAMES = {0: "wall", 1: "sky", 2: "bus, autobus, coach, charabanc, double-decker, jitney, omnibus"}
GREY = np.full((60, 80, 3), 128, dtype=np.uint8)
BROWN = (150, 100, 50)  # of brightness 100; no letter's edge is of it
HALVES = np.zeros((60, 80), dtype=np.uint8)
HALVES[:, 40:] = 1
WHITE = (255, 255, 255)


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == colour).all(axis=-1)


def num_swatches(legend: np.ndarray, colour: tuple[int, int, int]) -> float:
    return np.count_nonzero(has_colour(legend, colour)) / (32 * 20)


def text_pixels(legend: np.ndarray) -> np.ndarray:
    return (legend < 100).all(axis=-1)


def hatched_pixels(picture: np.ndarray) -> np.ndarray:
    """The dark lines where a picture of the image GREY is not labelled."""
    return has_colour(picture, (156, 156, 156))


def test_each_pixel_has_its_class_colour() -> None:
    picture = paint_segmentation(GREY, HALVES, opacity=1)
    assert picture.shape == (60, 80, 3)
    assert picture.dtype == np.uint8
    assert has_colour(picture[:, :40], class_colour(0)).all()
    assert has_colour(picture[:, 40], WHITE).all()  # the line between them
    assert has_colour(picture[:, 41:], class_colour(1)).all()


def test_given_colours_replace_those_of_the_labels() -> None:
    official = np.array([[120, 120, 120], [6, 230, 230]], dtype=np.uint8)  # rows of an array are colours too
    picture = paint_segmentation(GREY, HALVES, dict(enumerate(official)), opacity=1)
    assert has_colour(picture[:, :40], (120, 120, 120)).all()
    assert has_colour(picture[:, 41:], (6, 230, 230)).all()


def test_paint_is_mixed_with_the_grey_image() -> None:
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    image[0] = (90, 0, 60)  # of brightness 50
    mask = np.zeros((2, 2), dtype=np.int64)
    picture = paint_segmentation(image, mask, {0: (200, 100, 0)}, opacity=0.6)
    np.testing.assert_array_equal(picture[0, 0], (140, 80, 20))
    np.testing.assert_array_equal(picture[1, 0], (120, 60, 0))
    np.testing.assert_array_equal(paint_segmentation(image, mask, opacity=0)[:, 0, 0], (50, 0))


@pytest.mark.parametrize(("ignore_index", "dtype"), [(255, np.uint8), (0, np.uint8), (-100, np.int64)])
def test_pixels_without_a_label_are_pale_and_hatched(ignore_index: int, dtype: type) -> None:
    mask = np.full((60, 80), ignore_index, dtype=dtype)
    mask[:, 40:] = 1
    picture = paint_segmentation(GREY, mask, {1: (200, 0, 0)}, ignore_index=ignore_index)
    unlabelled = picture[:, :40]
    assert (unlabelled == unlabelled[..., :1]).all()
    assert set(np.unique(unlabelled)) == {204 - 48, 204}
    assert 0.2 < hatched_pixels(unlabelled).mean() < 0.3
    assert not hatched_pixels(picture[:, 40:]).any()


def test_image_without_any_label() -> None:
    nothing = np.full((60, 80), 255, dtype=np.uint8)
    assert set(np.unique(paint_segmentation(GREY, nothing))) == {204 - 48, 204}
    assert compare_segmentations([GREY], [nothing], [nothing], NAMES).shape[2] == 3


def test_one_pixel() -> None:
    picture = paint_segmentation(GREY[:1, :1], np.array([[1]]), opacity=1)
    np.testing.assert_array_equal(picture, [[class_colour(1)]])
    sheet = compare_segmentations([GREY[:1, :1]], [np.array([[0]])], [np.array([[1]])], NAMES)
    assert sheet.shape[1] > 3 * 480


def test_tensors_and_arrays_give_the_same_picture_and_stay_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    before = image.copy(), HALVES.copy()
    arrays = paint_segmentation(image, HALVES)
    tensors = paint_segmentation(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(HALVES).long())
    np.testing.assert_array_equal(arrays, tensors)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(HALVES, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": GREY.astype(np.float32)}, r"image is of float32, expected uint8"),
        ({"image": GREY[..., 0]}, r"shape \(60, 80\), expected \(H, W, 3\) for an array"),
        ({"mask": HALVES.T}, r"mask has shape \(80, 60\), expected \(60, 80\), the height and width of its image"),
        ({"mask": HALVES.astype(np.float32)}, r"mask is of float32, expected integers; .*not its scores"),
        ({"mask": HALVES == 1}, r"mask is of bool, expected integers"),
        ({"mask": GREY}, r"mask has shape \(60, 80, 3\), expected \(H, W\)"),
        ({"mask": HALVES.astype(np.int64) - 3}, r"mask holds the label -3, .*ignore_index 255; .*ignore_index=-3"),
        ({"colours": {0: WHITE}}, r"label 1 has no colour in colours, which has 1; add it"),
        (
            {"colours": {0: WHITE, 1: (0.5, 0.2, 1.0)}},
            r"label 1 has the colour \(0.5, 0.2, 1.0\), expected three integ",
        ),
        ({"colours": {0: WHITE, 1: (0, 0, 256)}}, r"label 1 has the colour \(0, 0, 256\), expected three integers 0"),
        ({"colours": {0: WHITE, 1: (0, 0, 0, 0)}}, r"label 1 has the colour \(0, 0, 0, 0\), expected three integers"),
        ({"opacity": 1.5}, r"opacity is 1.5, expected 0 to 1"),
        ({"opacity": float("nan")}, r"opacity is nan, expected 0 to 1"),
    ],
)
def test_wrong_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paint_segmentation(**({"image": GREY, "mask": HALVES} | change))


def test_legend_has_one_swatch_and_name_for_each_label() -> None:
    legend = class_legend([1, 0, 255], NAMES, {0: (200, 0, 0), 1: (0, 0, 200)}, width=600)
    assert legend.shape[1:] == (600, 3)
    assert legend.dtype == np.uint8
    assert num_swatches(legend, (200, 0, 0)) == 1
    assert num_swatches(legend, (0, 0, 200)) == 1
    assert hatched_pixels(legend).sum() > 100
    wall, sky = (np.argwhere(has_colour(legend, colour))[0] for colour in ((200, 0, 0), (0, 0, 200)))
    assert sky[1] < wall[1]  # the order of the labels
    assert has_colour(legend[[0, -1]], WHITE).all()


def test_legend_is_read_downwards() -> None:
    legend = class_legend(range(9), dict.fromkeys(range(9), "tree"), width=320)
    places = [np.argwhere(has_colour(legend, class_colour(label)))[0] for label in range(9)]
    tops, lefts = np.array(places).T
    assert len(set(lefts)) == 3
    assert (np.sort(lefts) == lefts).all()
    np.testing.assert_array_equal(tops, np.tile(tops[:3], 3))
    assert (np.diff(tops[:3]) == 32).all()


@pytest.mark.parametrize("width", [120, 300, 1968])
def test_no_name_of_a_legend_is_cut_off(width: int) -> None:
    names = {label: "name of a class " * (label % 7) + "unbreakable" * (label % 5) + "!" for label in range(70)}
    colours = dict.fromkeys(names, (200, 0, 0))
    together = class_legend(names, names, colours, width=width)
    for margin in (together[:8], together[-8:], together[:, :8], together[:, -8:]):
        assert has_colour(margin, WHITE).all()
    singly = [class_legend([label], names, colours, width=width) for label in names]
    assert num_swatches(together, (200, 0, 0)) == 70
    assert np.count_nonzero(text_pixels(together)) == sum(np.count_nonzero(text_pixels(legend)) for legend in singly)


def test_long_name_goes_on_in_the_next_line() -> None:
    def lines_and_ink(width: int) -> tuple[int, int]:
        text = text_pixels(class_legend([2], NAMES, {2: (200, 0, 0)}, width=width))
        middles = text[12 + 12 :: 24].any(axis=1)  # a line is 24 pixels high and the margin 12
        return int(middles.sum()), np.count_nonzero(text)

    (one, whole), (two, in_two), (three, in_three) = (lines_and_ink(width) for width in (2000, 250, 140))
    assert one < two < three
    assert whole == pytest.approx(in_two, rel=0.02)
    assert whole == pytest.approx(in_three, rel=0.02)


def test_legend_refuses() -> None:
    with pytest.raises(ValueError, match=r"label 7 has no name in class_names, which begins: 0 wall, 1 sky"):
        class_legend([0, 7], NAMES, width=500)
    with pytest.raises(ValueError, match=r"label 1 has no colour in colours, which has 1"):
        class_legend([0, 1], NAMES, {0: WHITE}, width=500)
    with pytest.raises(ValueError, match=r"width is 119, expected at least 120 pixels"):
        class_legend([0], NAMES, width=119)
    with pytest.raises(ValueError, match=r"labels is empty, expected at least one"):
        class_legend([], NAMES, width=500)


def test_comparison_shows_image_truth_and_prediction() -> None:
    image = torch.tensor(BROWN, dtype=torch.uint8).view(3, 1, 1).expand(3, 60, 80)
    truth = torch.from_numpy(HALVES.copy())
    truth[:30, :40] = 255
    prediction = torch.full((60, 80), 2)
    colours = {0: (200, 0, 0), 1: (0, 200, 0), 2: (0, 0, 200)}
    sheet = compare_segmentations([image], [truth], [prediction], NAMES, colours=colours, names=["grey.jpg"])
    painted = {label: tuple(round(0.6 * part + 0.4 * 100) for part in colour) for label, colour in colours.items()}

    left, middle, right = np.split(sheet[:, : sheet.shape[1] // 3 * 3], 3, axis=1)
    area = 480 * 360  # of each picture: small images are enlarged
    assert np.count_nonzero(has_colour(left, BROWN)) == area
    assert np.count_nonzero(has_colour(middle, painted[1])) == pytest.approx(area / 2, rel=0.01)
    assert np.count_nonzero(has_colour(middle, painted[0])) == pytest.approx(area / 4, rel=0.01)
    pale, line = (193, 193, 193), (145, 145, 145)
    assert np.count_nonzero(has_colour(middle, pale)) == pytest.approx(area / 4 * 6 / 8, rel=0.02)
    assert np.count_nonzero(has_colour(middle, line)) == pytest.approx(area / 4 * 2 / 8, rel=0.02)
    assert np.count_nonzero(has_colour(right, painted[2])) == area
    assert not has_colour(middle, painted[2]).any()
    for colour in colours.values():
        assert num_swatches(sheet, colour) == 1
    assert np.count_nonzero(hatched_pixels(sheet)) > 100  # "not labelled"


def test_legend_below_a_comparison_is_of_the_classes_seen() -> None:
    zeros, ones = np.zeros((60, 80), np.uint8), np.ones((60, 80), np.uint8)
    sheet = compare_segmentations([GREY, GREY], [zeros, zeros], [zeros, ones], NAMES)
    assert num_swatches(sheet, class_colour(0)) == 1
    assert num_swatches(sheet, class_colour(1)) == 1
    assert num_swatches(sheet, class_colour(2)) == 0
    assert np.count_nonzero(hatched_pixels(sheet)) < 30  # a few at the edges of letters


def test_not_labelled_stands_last_in_the_legend() -> None:
    blue = (0, 0, 200)
    sheet = compare_segmentations([GREY], [HALVES], [HALVES], NAMES, colours={1: blue}, ignore_index=0)
    below = sheet[-40:]
    hatched = np.argwhere(has_colour(below, (204, 204, 204)))
    assert len(hatched) > 300
    assert hatched[:, 1].min() > np.argwhere(has_colour(below, blue))[:, 1].max()


def test_large_images_are_reduced_in_a_comparison() -> None:
    image = np.full((900, 1280, 3), BROWN, np.uint8)
    mask = np.zeros((900, 1280), np.int64)
    mask[:450] = 1
    sheet = compare_segmentations([image], [mask], [mask], NAMES, colours={0: (0, 0, 200), 1: (200, 0, 0)})
    assert np.count_nonzero(has_colour(sheet, BROWN)) == 640 * 450
    assert np.count_nonzero(has_colour(sheet, (160, 40, 40))) == 2 * 640 * 225


def test_comparison_refuses() -> None:
    with pytest.raises(ValueError, match=r"2 images, 1 masks and 0 predictions, expected as many"):
        compare_segmentations([GREY, GREY], [HALVES], [], NAMES)
    with pytest.raises(ValueError, match=r"rows is empty"):
        compare_segmentations([], [], [], NAMES)
    with pytest.raises(ValueError, match=r"masks\[1\] has shape \(60, 79\), expected \(60, 80\)"):
        compare_segmentations([GREY] * 2, [HALVES, HALVES[:, 1:]], [HALVES] * 2, NAMES)
    logits = torch.zeros(3, 60, 80)
    with pytest.raises(ValueError, match=r"predictions\[0\] is of float32, expected integers; .*not its scores"):
        compare_segmentations([GREY], [HALVES], [logits], NAMES)
    with pytest.raises(ValueError, match=r"label 9 has no name in class_names"):
        compare_segmentations([GREY], [HALVES], [np.full_like(HALVES, 9)], NAMES)
    with pytest.raises(ValueError, match=r"row_titles has 2 titles for 1 rows"):
        compare_segmentations([GREY], [HALVES], [HALVES], NAMES, names=["one", "two"])


def test_real_scenes(real_data: Callable[[str], Path]) -> None:
    root = real_data("ade20k_samples") / "ADEChallengeData2016"
    paths = sorted((root / "images" / "validation").glob("*.jpg"))
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    values = [np.asarray(Image.open(root / "annotations" / "validation" / f"{path.stem}.png")) for path in paths]
    masks = [value - np.uint8(1) for value in values]  # 0 becomes 255
    names = {label: f"class {label}" for label in range(150)}
    sheet = compare_segmentations(images, masks, masks, names, names=[path.name for path in paths])
    for label in set(np.unique(masks[0]).tolist()) - {255}:
        assert num_swatches(sheet, class_colour(label)) >= 1


def test_drawn_segmentation_has_its_legend_below() -> None:
    image = np.full((600, 800, 3), 128, np.uint8)
    mask = np.zeros((600, 800), np.int64)
    mask[:, 500:] = 1
    colours = {0: (200, 0, 0), 1: (0, 0, 200)}
    picture = draw_segmentation(image, mask, NAMES, colours)
    np.testing.assert_array_equal(picture[:600], paint_segmentation(image, mask, colours))
    np.testing.assert_array_equal(picture[600:], class_legend([0, 1], NAMES, colours, width=800))
    mask[:, 300:] = 1  # the largest class first
    legend = draw_segmentation(image, mask, NAMES, colours)[600:]
    np.testing.assert_array_equal(legend, class_legend([1, 0], NAMES, colours, width=800))


def test_drawn_segmentation_of_a_small_image_is_enlarged() -> None:
    picture = draw_segmentation(GREY, HALVES, NAMES, {0: (200, 0, 0), 1: (0, 0, 200)})
    painted = {label: tuple(round(0.6 * part + 0.4 * 128) for part in (200, 0, 0)) for label in (0,)}
    assert picture.shape[1] == 480
    assert np.count_nonzero(has_colour(picture[:360], painted[0])) == 240 * 360
    narrow = draw_segmentation(GREY[:, :4], HALVES[:, :4], NAMES)
    assert narrow.shape[1] == 120  # as wide as its legend
    assert has_colour(narrow[:480, 40:], WHITE).all()


def test_legend_of_a_large_image_is_large() -> None:
    image, mask = np.zeros((1500, 3000, 3), np.uint8), np.zeros((1500, 3000), np.int64)
    legend = draw_segmentation(image, mask, NAMES, {0: (200, 0, 0)})[1500:]
    assert np.count_nonzero(has_colour(legend, (200, 0, 0))) == 9 * 32 * 20
    np.testing.assert_array_equal(legend, class_legend([0], NAMES, {0: (200, 0, 0)}, width=3000, scale=3))
    with pytest.raises(ValueError, match=r"width is 200, expected at least 240 pixels"):
        class_legend([0], NAMES, width=200, scale=2)
