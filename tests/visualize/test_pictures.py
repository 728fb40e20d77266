from __future__ import annotations

import numpy as np
import pytest

from resnest_det.visualize import class_colour, contact_sheet

GREY = np.full((60, 80, 3), 128, dtype=np.uint8)


def test_colours_are_stable_and_all_different() -> None:
    colours = [class_colour(label) for label in range(200)]
    assert colours == [class_colour(label) for label in range(200)]
    assert len(set(colours)) == 200
    neighbours = np.abs(np.diff(np.array(colours), axis=0)).sum(axis=1)
    assert neighbours.min() > 120


def test_contact_sheet_holds_every_picture() -> None:
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]]
    sizes = [[(30, 40), (30, 40)], [(60, 20), (10, 20)]]
    rows = [
        [np.broadcast_to(np.uint8(colour), (*size, 3)) for colour, size in zip(*row, strict=True)]
        for row in zip(colours, sizes, strict=True)
    ]
    sheet = contact_sheet(rows, column_titles=("left", "right"))
    for row_colours, row_sizes in zip(colours, sizes, strict=True):
        for colour, (height, width) in zip(row_colours, row_sizes, strict=True):
            assert np.count_nonzero((sheet == colour).all(axis=-1)) == height * width
    assert (sheet[0] == 255).all()
    assert (sheet[:, 0] == 255).all()

    captioned = contact_sheet(rows, column_titles=("left", "right"), row_titles=("one", "two"))
    assert captioned.shape[0] > sheet.shape[0]


def test_contact_sheet_refuses() -> None:
    with pytest.raises(ValueError, match=r"rows is empty"):
        contact_sheet([], column_titles=("left",))
    with pytest.raises(ValueError, match=r"row 1 has 1 pictures, expected 2.*\['left', 'right'\]"):
        contact_sheet([[GREY, GREY], [GREY]], column_titles=("left", "right"))
    with pytest.raises(ValueError, match=r"row_titles has 2 titles for 1 rows"):
        contact_sheet([[GREY]], column_titles=("left",), row_titles=("one", "two"))


def test_no_title_of_a_contact_sheet_is_cut_off() -> None:
    def num_dark_pixels(picture: np.ndarray) -> tuple[int, int]:
        """Above and below the column's title."""
        dark = (contact_sheet([[picture]], column_titles=["a long title"], row_titles=["a_file_name_" * 5]) < 64).all(
            -1
        )
        assert not dark[:, :8].any()
        assert not dark[:, -8:].any()
        return np.count_nonzero(dark[:36]), np.count_nonzero(dark[36:])

    narrow, wide = np.full((90, 4, 3), 128, np.uint8), np.full((90, 900, 3), 128, np.uint8)
    assert min(num_dark_pixels(wide)) > 100
    assert num_dark_pixels(narrow)[1] == num_dark_pixels(wide)[1]
    assert num_dark_pixels(narrow)[0] > 100
