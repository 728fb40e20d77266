"""The page of annotated pictures: where they stand, at what size, and below which words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resnest_det.visualize.annotations import captioned_grid

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def extent(page: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of what is of that colour."""
    rows, columns = np.nonzero((page == colour).all(axis=-1))
    return columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1


def test_pictures_stand_in_rows_at_their_own_size_or_reduced() -> None:
    page = captioned_grid(
        [plain(50, 80, RED), plain(300, 200, BLUE), plain(10, 10, (0, 255, 0))],
        ["one", "two", "three"],
        num_columns=2,
        cell_width=100,
    )
    assert page.shape[1] == 2 * 100 + 3 * 12
    left, top, width, height = extent(page, RED)
    assert (left, width, height) == (12, 80, 50)
    second_left, second_top, second_width, second_height = extent(page, BLUE)
    assert (second_left, second_top) == (12 + 100 + 12, top)
    assert (second_width, second_height) == (100, 150)
    third_left, third_top, *_ = extent(page, (0, 255, 0))
    assert third_left == 12
    assert third_top > second_top + 150


def test_captions_stand_above_and_are_broken_where_the_cell_ends() -> None:
    pictures = [plain(20, 100, RED)]
    short = captioned_grid(pictures, ["a"], cell_width=100)
    words = captioned_grid(pictures, ["some words that are wider than a cell"], cell_width=100)
    name = captioned_grid(pictures, ["x" * 60], cell_width=100)
    tops = [extent(page, RED)[1] for page in (short, words, name)]
    assert tops[0] < tops[1] < tops[2] + 21
    for page, top in zip((short, words, name), tops, strict=True):
        caption = page[:top]
        ink = np.nonzero((caption < 128).any(axis=(0, 2)))[0]
        assert len(ink)
        assert ink.max() < 12 + 100


def test_captions_of_other_letters_have_a_font_and_any_name_is_written() -> None:
    pictures = [plain(20, 100, RED)]
    greek, lacking = (captioned_grid(pictures, [text]) for text in ("αβγ", "\U0010fffd" * 3))
    assert not np.array_equal(greek, lacking)
    letters = {captioned_grid(pictures, [letter]).tobytes() for letter in "жшщ"}
    assert len(letters) == 3  # and not the box of what a font lacks
    captioned_grid(pictures, ["no UTF-8: \udcff.jpg"])


def test_tensors_are_pictures_too() -> None:
    tensor = torch.zeros(3, 20, 30, dtype=torch.uint8)
    tensor[0] = 255
    assert extent(captioned_grid([tensor], [""]), RED)[2:] == (30, 20)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="0 pictures and 0 captions"):
        captioned_grid([], [])
    with pytest.raises(ValueError, match="1 pictures and 2 captions"):
        captioned_grid([plain(5, 5, RED)], ["a", "b"])
    with pytest.raises(ValueError, match="num_columns is 0"):
        captioned_grid([plain(5, 5, RED)], ["a"], num_columns=0)
