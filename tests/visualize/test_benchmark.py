"""Bars of times: what is drawn, found again in the picture by its colour."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from resnest_det.visualize.benchmark import draw_times

BLUE, ORANGE, GREY = (0, 114, 178), (213, 94, 0), (154, 154, 154)


def area(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """How many pixels are of a colour."""
    return int((np.abs(picture.astype(np.int64) - colour).max(axis=-1) <= 4).sum())


def test_bars_are_as_long_as_their_medians() -> None:
    picture = draw_times({"a": {"one": [3.0, 4.0, 8.0], "two": [1.0, 2.0]}})
    lengths = (np.abs(picture.astype(np.int64) - BLUE).max(axis=-1) <= 4).sum(axis=1)  # of each row of pixels
    clear = [int(np.median(lengths[rows][lengths[rows] > 100])) for rows in np.array_split(np.arange(len(lengths)), 2)]
    assert clear[1] / clear[0] == pytest.approx(1.5 / 4, abs=0.01)


def test_highlighted_and_bounds() -> None:
    panels = {"a": {"ours": [2.0, 3.0, 2.5], "theirs": torch.tensor([4.0])}, "b": {"ours, fast": np.array([1.0])}}
    plain, marked = draw_times(panels), draw_times(panels, bounds={"a": {"theirs": 3.0}}, highlighted="ours")
    assert area(plain, BLUE) == pytest.approx(area(marked, BLUE) + area(marked, GREY), rel=0.02)
    assert area(marked, GREY) > 1000 > 100 > area(plain, GREY)  # of which letters' edges have some
    assert area(plain, ORANGE) == 0
    assert area(marked, ORANGE) > 20
    for border in (marked[0], marked[-1], marked[:, 0], marked[:, -1]):
        assert (border == 255).all()


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ({}, "panels is empty"),
        ({"a": {}}, "the panel 'a' has no bars"),
        ({"a": {"x": []}}, r"the bar 'x' of the panel 'a' has 0 values that are not finite and the shape \(0,\)"),
        ({"a": {"x": [1.0, np.nan]}}, "the bar 'x' of the panel 'a' has 1 values that are not finite"),
        ({"a": {"x": [[1.0]]}}, r"the shape \(1, 1\)"),
    ],
)
def test_what_cannot_be_drawn(panels: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_times(panels)
