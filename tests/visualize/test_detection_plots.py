"""Plots of a detector's evaluation: what is drawn, found again in the picture by its colour."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

from resnest_det.visualize import draw_confusion_matrix, draw_error_breakdown, draw_precision_recall

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)  # of the first and second curve, and of the two panels of bars
DARKEST = (8, 48, 107)  # of a cell with all of its row
RECALLS = np.linspace(0, 1, 101)
LONG_NAME = "a class with a name that is far too long for its place"

Drawing = Callable[[], np.ndarray]


def pixels(picture: np.ndarray, colour: tuple[int, int, int], tolerance: int = 8) -> np.ndarray:
    """Rows and columns of the pixels of a colour, (N, 2)."""
    return np.argwhere(np.abs(picture.astype(np.int64) - colour).max(axis=-1) <= tolerance)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What matplotlib is told to draw, by kind."""
    from matplotlib.axes import Axes

    told: dict[str, list[Any]] = {"plot": [], "imshow": [], "text": [], "set_xticks": [], "bar_label": []}

    def spy_on(name: str) -> None:
        method = getattr(Axes, name)

        def spy(self: Axes, *arguments: Any, **options: Any) -> Any:
            told[name].append((arguments, options))
            return method(self, *arguments, **options)

        monkeypatch.setattr(Axes, name, spy)

    for name in told:
        spy_on(name)
    return told


def assert_nothing_is_cut(picture: np.ndarray) -> None:
    for border in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (border == 255).all()


def labels_of(told: dict[str, list[Any]]) -> list[str]:
    return [options["label"] for _, options in told["plot"] if options["label"]]


def curve(height: float) -> np.ndarray:
    return np.full(101, height)


# --- precision by recall ---


def test_curves_go_where_their_values_go() -> None:
    picture = draw_precision_recall(RECALLS, np.stack([1 - RECALLS, 0.2 * RECALLS]), ["cat", "dog"])
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    panel = picture[:, : int(0.75 * picture.shape[1])]  # left of the legend
    for colour, falls in ((BLUE, True), (ORANGE, False)):
        places = pixels(panel, colour, 30)
        first, last = places[places[:, 1].argmin(), 0], places[places[:, 1].argmax(), 0]
        assert (last > first) == falls  # rows count from the top


def test_legend_says_each_area_and_the_mean(drawn: dict[str, list[Any]]) -> None:
    draw_precision_recall(RECALLS, np.stack([curve(0.5), curve(-1), curve(0.25)]), ["cat", "unseen", LONG_NAME])
    assert labels_of(drawn) == ["cat  0.500", "a class with a name t…  0.250", "mean  0.375"]
    np.testing.assert_array_equal(drawn["plot"][-1][0][1], curve(0.375))


def test_a_single_class_is_its_own_mean(drawn: dict[str, list[Any]]) -> None:
    draw_precision_recall(RECALLS, curve(0.5)[None], ["cat"])
    assert labels_of(drawn) == ["cat  0.500"]


def test_many_classes_stand_behind_their_mean(drawn: dict[str, list[Any]]) -> None:
    heights = np.linspace(0, 1, 80)
    picture = draw_precision_recall(RECALLS, heights[:, None] * np.ones(101), [f"class {k}" for k in range(80)])
    assert len(pixels(picture, BLUE)) == 0
    assert labels_of(drawn) == ["each of 80 classes", "mean  0.500"]
    assert len(drawn["plot"]) == 81
    rows = np.bincount(pixels(picture, (0, 0, 0), 0)[:, 0])
    assert rows.max() > 0.5 * picture.shape[1]  # the mean is a level line


def test_precisions_as_tensors() -> None:
    values = np.stack([1 - RECALLS, RECALLS]).astype(np.float32)
    recalls = RECALLS.astype(np.float32)
    arrays = draw_precision_recall(recalls, values, ["cat", "dog"])
    tensors = draw_precision_recall(torch.from_numpy(recalls), torch.from_numpy(values), ["cat", "dog"])
    np.testing.assert_array_equal(arrays, tensors)


# --- confusion matrix ---


def middle_of_the_dark_cell(row: int, column: int) -> np.ndarray:
    counts = np.zeros((4, 4))
    counts[row, column] = 7
    return np.median(pixels(draw_confusion_matrix(counts, ["a", "b", "c"]), DARKEST), axis=0)


def test_cells_stand_where_they_belong() -> None:
    first, last = middle_of_the_dark_cell(0, 0), middle_of_the_dark_cell(2, 2)
    cell = (last - first) / 2
    assert cell[0] == pytest.approx(cell[1], abs=1)
    assert (cell > 40).all()
    for row, column in ((0, 3), (2, 1), (3, 0)):
        np.testing.assert_allclose(middle_of_the_dark_cell(row, column), first + cell * (row, column), atol=2)


def test_cells_are_percent_of_their_row(drawn: dict[str, list[Any]]) -> None:
    draw_confusion_matrix(np.array([[30, 10, 0], [0, 0, 0], [1, 399, 0]]), ["cat", "dog"])
    np.testing.assert_allclose(drawn["imshow"][0][0][0] ** 2, [[75, 25, 0], [0, 0, 0], [0.25, 99.75, 0]])
    assert [arguments[2] for arguments, _ in drawn["text"]] == ["75%\n30", "25%\n10", "100%\n399"]


def test_eighty_classes_have_their_names(drawn: dict[str, list[Any]]) -> None:
    counts = np.diag(np.arange(81))
    names = [f"number {k} of all the classes" for k in range(80)]
    picture = draw_confusion_matrix(counts, names)
    assert max(picture.shape) < 2400
    assert_nothing_is_cut(picture)
    assert drawn["set_xticks"][0][0][1] == [*(f"number {k} of all the cla"[:21] + "…" for k in range(80)), "background"]
    assert drawn["set_xticks"][0][1]["fontsize"] > 7


def test_of_many_classes_those_with_most_mistakes_are_shown(drawn: dict[str, list[Any]]) -> None:
    counts = np.diag([50, 50, 50, 50, 0])
    counts[1, 2] = counts[3, 4] = 25
    counts[0, 3] = 5  # with the two of the background, the most mistakes
    draw_confusion_matrix(counts, ["a", "b", "c", "d"], max_classes=2)
    assert drawn["set_xticks"][0][0][1] == ["b", "d", "2 other classes", "background"]
    expected = np.array([[50, 0, 25, 0], [0, 50, 0, 25], [0, 5, 100, 0], [0, 0, 0, 0]])
    percent = 100 * expected / np.array([75, 75, 105, 1])[:, None]
    np.testing.assert_allclose(drawn["imshow"][0][0][0] ** 2, percent)


# --- kinds of error ---


def test_bars_are_as_long_as_the_errors_are_costly(drawn: dict[str, list[Any]]) -> None:
    main = {"one": 0.1, "two": 0.2, "none": 0.0}
    picture = draw_error_breakdown(main, {"all": 0.3}, average_precision=0.5)
    places = pixels(picture, BLUE, 0)
    lengths = np.bincount(places[:, 0])
    one, two = (np.median(lengths[rows]) for rows in np.array_split(np.flatnonzero(lengths > 20), 2))
    assert two == pytest.approx(2 * one, rel=0.02)
    assert places[:, 0].max() < pixels(picture, ORANGE, 0)[:, 0].min()  # the special ones stand below
    assert [options["labels"] for _, options in drawn["bar_label"]] == [["0.100", "0.200", "0.000"], ["0.300"]]


def test_errors_that_cost_nothing_or_less() -> None:
    picture = draw_error_breakdown({"one": 0.0}, {"all": -0.1}, average_precision=1.0)
    assert len(pixels(picture, BLUE, 0)) < 20
    assert len(pixels(picture, ORANGE, 0)) > 1000


# --- all of them ---


def many_curves() -> np.ndarray:
    return draw_precision_recall(RECALLS, np.ones((6, 101)), [LONG_NAME] * 6, title="precision by recall at IoU 0.5")


def small_matrix() -> np.ndarray:
    return draw_confusion_matrix(np.eye(2), [LONG_NAME], title="scores from 0.3, IoU from 0.5")


def breakdown() -> np.ndarray:
    return draw_error_breakdown({LONG_NAME: 0.9}, {LONG_NAME + "r": 0.9}, average_precision=0.1, title="IoU 0.5")


@pytest.mark.parametrize("draw", [many_curves, small_matrix, breakdown])
def test_nothing_is_cut_at_the_borders(draw: Drawing) -> None:
    assert_nothing_is_cut(draw())


def test_matplotlib_stays_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    pyplot = sys.modules.get("matplotlib.pyplot")
    many_curves(), small_matrix(), breakdown()
    assert dict(matplotlib.rcParams) == before
    assert sys.modules.get("matplotlib.pyplot") is pyplot
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda: draw_precision_recall(RECALLS, np.ones((2, 101)), ["cat"]),
            r"precisions \(2, 101\), expected \(R,\) and \(1, R\) for 1 class_names",
        ),
        (
            lambda: draw_precision_recall(RECALLS[:50], np.ones((1, 101)), ["cat"]),
            r"recalls has shape \(50,\) and precisions \(1, 101\)",
        ),
        (
            lambda: draw_precision_recall(RECALLS, -np.ones((2, 101)), ["cat", "dog"]),
            "none of the 2 classes has a precision of 0 or more",
        ),
        (
            lambda: draw_confusion_matrix(np.ones((2, 2)), ["cat", "dog"]),
            r"counts has shape \(2, 2\) for 2 class_names, expected .* \(3, 3\)",
        ),
        (lambda: draw_confusion_matrix(-np.ones((2, 2)), ["cat"]), "counts holds -1, expected whole numbers from 0"),
        (lambda: draw_confusion_matrix(np.ones((2, 2)), ["cat"], max_classes=0), "max_classes is 0"),
        (lambda: draw_error_breakdown({}, {"all": 0.1}, average_precision=0.5), "main is empty"),
        (lambda: draw_error_breakdown({"one": 0.1}, {}, average_precision=0.5), "special is empty"),
        (
            lambda: draw_error_breakdown({"one": float("nan")}, {"all": 0.1}, average_precision=0.5),
            "main has nan for 'one'",
        ),
    ],
)
def test_wrong_arguments(draw: Drawing, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


@pytest.mark.parametrize("name", ["$x_$", "a$b$c", r"$\\foo$", "_hidden"])
def test_names_are_drawn_as_they_are(name: str) -> None:
    """A formula's dollar sign, and an underscore at the beginning, which legends leave out."""
    recalls, precisions = np.linspace(0, 1, 101), np.full((1, 101), 0.5)
    plain = draw_precision_recall(recalls, precisions, ["a"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_precision_recall(recalls, precisions, [name]).shape[1] >= plain.shape[1]
        assert draw_confusion_matrix(np.eye(2, dtype=np.int64), [name]).ndim == 3
