"""Pictures of attention: what is drawn, found again in the picture by its colour, or as matplotlib was told it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnest_det.visualize.attention import (
    draw_channel_weights,
    draw_grad_cam,
    draw_shares,
    draw_spatial_maps,
    overlay_heat,
)
from tests import attention_diagrams

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)  # of the first and second split
IMAGE = np.full((40, 60, 3), 128, dtype=np.uint8)


def pixels(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of a colour, (N, 2)."""
    return np.argwhere(np.abs(picture.astype(np.int64) - colour).max(axis=-1) <= 8)


def shares_of(first: list[float]) -> np.ndarray:
    return np.stack([first, 1 - np.array(first)])


def assert_nothing_is_cut(picture: np.ndarray) -> None:
    assert picture.dtype == np.uint8
    for border in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (border == 255).all()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What matplotlib is told to draw, by kind."""
    from matplotlib.axes import Axes

    told: dict[str, list[Any]] = {"imshow": [], "step": [], "text": [], "set_title": [], "fill_between": []}

    def spy_on(name: str) -> None:
        method = getattr(Axes, name)

        def spy(self: Axes, *arguments: Any, **options: Any) -> Any:
            told[name].append(arguments)
            return method(self, *arguments, **options)

        monkeypatch.setattr(Axes, name, spy)

    for name in told:
        spy_on(name)
    return told


# --- shares ---


def test_areas_are_as_large_as_the_shares(drawn: dict[str, list[Any]]) -> None:
    picture = draw_shares({"a": shares_of([0.2] * 30 + [0.9] * 10)})
    assert_nothing_is_cut(picture)
    legend = int(0.85 * len(picture))
    first, second = (len(pixels(picture[:legend], colour)) for colour in (BLUE, ORANGE))
    assert first / (first + second) == pytest.approx((0.2 * 30 + 0.9 * 10) / 40, abs=0.03)
    assert [arguments[2] for arguments in drawn["text"]] == ["0.38", "0.62"]  # the mean shares
    assert drawn["set_title"][-1] == ("a: 40 channels",)


def test_channels_are_sorted_by_the_first_split(drawn: dict[str, list[Any]]) -> None:
    draw_shares({"a": shares_of([0.1, 0.9, 0.5])})
    np.testing.assert_allclose(drawn["fill_between"][0][2], [0.9, 0.5, 0.1, 0.1])  # the last one's step has an end


def test_of_more_splits_the_largest_comes_first(drawn: dict[str, list[Any]]) -> None:
    shares = np.array([[0.2, 0.1, 0.8, 0.5], [0.7, 0.1, 0.1, 0.3], [0.1, 0.8, 0.1, 0.2]])
    draw_shares({"a": torch.from_numpy(shares)}, part="branch")
    np.testing.assert_allclose(drawn["fill_between"][0][2][:-1], [0.8, 0.5, 0.2, 0.1])
    np.testing.assert_allclose(drawn["imshow"][0][0], shares.mean(axis=1)[None])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({}, "shares is empty, expected at least one layer"),
        ({"a": np.ones(4)}, r"shares\['a'\] has shape \(4,\), expected two dimensions"),
        ({"a": np.ones((1, 4))}, r"the layers have \[1\] splits, expected the same number in each, 2 or more"),
        ({"a": np.ones((2, 4)) / 2, "b": np.ones((4, 4)) / 4}, r"the layers have \[2, 4\] splits"),
        ({"a": np.full((2, 4), 0.4)}, r"shares\['a'\] sums to 0.8 in a channel, expected 1"),
        ({"a": np.full((2, 4), np.nan)}, r"shares\['a'\] has values from nan to nan, expected \[0, 1\]"),
    ],
)
def test_shares_that_are_none(shares: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_shares(shares)


# --- channel weights ---


def test_weights_are_sorted_and_counted(drawn: dict[str, list[Any]]) -> None:
    picture = draw_channel_weights({"a": np.array([0.1, 0.9, 0.5, 0.5]), "b": np.zeros(8)})
    assert_nothing_is_cut(picture)
    np.testing.assert_allclose(drawn["step"][0][1], [0.9, 0.5, 0.5, 0.1, 0.1])
    counts = drawn["imshow"][0][0] ** 2
    np.testing.assert_allclose(counts.sum(axis=1), 1)
    assert (counts[0, 2], counts[0, 12], counts[0, 22], counts[1, 0]) == pytest.approx((0.25, 0.5, 0.25, 1))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "weights is empty"),
        ({"a": np.ones((2, 3))}, r"weights\['a'\] has shape \(2, 3\), expected one value a channel"),
        ({"a": np.array([0.5, 1.2])}, r"weights\['a'\] has values from 0.5 to 1.2, expected \[0, 1\]"),
    ],
)
def test_weights_that_are_none(weights: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_channel_weights(weights)


@pytest.mark.parametrize("number", [1, 3, 16, pytest.param(100, marks=pytest.mark.slow)])
def test_any_number_of_layers(number: int) -> None:
    generator = np.random.default_rng(0)
    names = [f"layer{1 + k // 30}.{k}" for k in range(number)]
    for picture in (
        draw_channel_weights({name: generator.random(16) for name in names}, title="a $title$ of its own"),
        draw_shares({name: shares_of(generator.random(16).tolist()) for name in names}),
        draw_spatial_maps(IMAGE, {name: generator.random((4, 6)) for name in names}),
    ):
        assert_nothing_is_cut(picture)
        assert max(picture.shape) < 3000


# --- maps over an image ---


def test_maps_have_one_scale(drawn: dict[str, list[Any]]) -> None:
    low, high = np.full((2, 3), 0.2), np.full((4, 6), 0.6)
    assert_nothing_is_cut(draw_spatial_maps(torch.from_numpy(IMAGE).permute(2, 0, 1), {"low": low, "high": high}))
    image, dark, bright = (arguments[0] for arguments in drawn["imshow"][:3])
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(dark, overlay_heat(IMAGE, np.zeros((1, 1)), opacity=(0.6, 0.6)))
    np.testing.assert_array_equal(bright, overlay_heat(IMAGE, np.ones((1, 1)), opacity=(0.6, 0.6)))
    assert [arguments[0] for arguments in drawn["set_title"]] == ["image", "low  2 x 3", "high  4 x 6"]


def test_heat_lies_where_it_is() -> None:
    heat = np.zeros((40, 60))
    heat[5:15, 40:55] = 1
    painted = overlay_heat(IMAGE, heat).astype(int)
    assert painted.shape == IMAGE.shape
    brighter = painted.sum(axis=-1) > painted[0, 0].sum() + 60
    np.testing.assert_array_equal(brighter, heat > 0)
    coarse = overlay_heat(IMAGE, np.array([[0.0, 1.0]])).astype(int).sum(axis=-1)
    assert (np.diff(coarse, axis=1) >= 0).mean() > 0.9  # from left to right


def test_grad_cam_with_its_box() -> None:
    heat = np.zeros((40, 60))
    plain = draw_grad_cam(IMAGE, heat)
    picture = draw_grad_cam(IMAGE, torch.from_numpy(heat), title="cat", box_xyxy=torch.tensor([10.0, 5.0, 50.0, 35.0]))
    assert_nothing_is_cut(picture)
    half = plain.shape[1] // 2
    box = pixels(picture[40:, :half], (0, 0, 0))  # beside its white line, below the title
    assert len(box) > 100
    assert len(pixels(plain[40:, :half], (0, 0, 0))) == 0


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: draw_grad_cam(IMAGE, np.zeros((4, 6))), r"heat has shape \(4, 6\), expected \(40, 60\)"),
        (lambda: draw_grad_cam(IMAGE.astype(float), np.zeros((40, 60))), "image is of float64, expected uint8"),
        (lambda: overlay_heat(IMAGE, np.full((4, 6), 2.0)), r"heat has values from 2 to 2, expected \[0, 1\]"),
        (lambda: draw_spatial_maps(IMAGE, {}), "maps is empty"),
        (lambda: draw_spatial_maps(IMAGE, {"a": np.ones((2, 4, 6))}), r"maps\['a'\] has shape \(2, 4, 6\)"),
    ],
)
def test_maps_that_are_none(draw: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_plots_need_no_window() -> None:
    draw_channel_weights({"a": np.ones(4)})
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


# --- the diagrams of the documentation ---


def test_diagrams_of_the_documentation(tmp_path: Path) -> None:
    attention_diagrams.draw(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        committed = attention_diagrams.FOLDER / path.name
        assert committed.stat().st_size < 150_000
        assert Image.open(committed).size == Image.open(path).size, "python -m tests.attention_diagrams draws it anew"
    page = (attention_diagrams.FOLDER.parent / "attention.md").read_text()
    assert all(f"images/{name}.png" in page for name in attention_diagrams.DIAGRAMS)
