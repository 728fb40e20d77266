"""Learning curves: what is drawn, found again in the picture by its colour."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import matplotlib
import numpy as np
import pytest

from resnest_det.visualize import draw_curves, loss_curves, rate_curve, result_curves

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)  # of a panel's first and second curve


def train_record(step: int, **losses: float) -> dict[str, Any]:
    return {"kind": "train", "epoch": step / 100, "step": step, "lr": 0.02, "loss": sum(losses.values()), **losses}


def eval_record(epoch: int, **results: float) -> dict[str, Any]:
    return {"kind": "eval", "epoch": epoch, "step": 100 * epoch, "seconds": 9.0, **results}


def pixels(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of a colour, (N, 2), left of the legend, to where the x axis ends."""
    dark = picture.max(axis=-1) < 100
    axis = dark[dark.sum(axis=1).argmax()]
    panel = picture[:, : np.flatnonzero(axis)[-1] + 1].astype(np.int64)
    return np.argwhere(np.abs(panel - colour).max(axis=-1) <= 30)


def test_every_curve_goes_where_its_values_go() -> None:
    steps = range(20, 401, 20)
    picture = draw_curves([train_record(step, loss_a=1.5 * 50 / step, loss_b=0.2 * step / 400) for step in steps])
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    for colour, falls in ((BLUE, True), (ORANGE, True), ((0, 158, 115), False)):  # the sum, a, b
        places = pixels(picture, colour)
        first, last = places[places[:, 1].argmin(), 0], places[places[:, 1].argmax(), 0]
        assert (last > first) == falls  # rows count from the top


def test_panels_are_those_of_the_records() -> None:
    trains, evals = [train_record(20, loss_a=1.0)], [eval_record(1, AP=0.3)]
    heights = [draw_curves(records).shape[0] for records in (evals, trains, trains + evals)]
    assert heights == [396, 561, 891]


@pytest.mark.parametrize("num_points", [1, 2, 10_000])
def test_few_and_many_points(num_points: int) -> None:
    random.seed(0)
    records = [
        train_record(20 * i, loss_a=random.random(), loss_b=2 * random.random()) for i in range(1, num_points + 1)
    ]
    picture = draw_curves(records)
    assert picture.shape[1] == 1100
    for colour in (BLUE, ORANGE):
        places = pixels(picture, colour)
        assert len(places) >= 5
        # Noise spreads over the panel's height of 300 pixels; the curve that is drawn of it does not.
        assert num_points < 10_000 or np.ptp(places[:, 0]) < 150


def test_a_spike_does_not_flatten_the_curve() -> None:
    records = [train_record(20 * i, loss_a=1 + 1 / i, loss_b=1.0) for i in range(1, 1001)]
    calm = pixels(draw_curves(records), ORANGE)
    records[500] |= {"loss_a": 1e6, "loss": 1e6}
    spiky = pixels(draw_curves(records), ORANGE)
    np.testing.assert_allclose(np.quantile(calm[:, 0], [0, 0.5, 1]), np.quantile(spiky[:, 0], [0, 0.5, 1]), atol=2)


def test_a_single_loss_is_drawn_once() -> None:
    picture = draw_curves([train_record(20, loss_seg=2.0), train_record(40, loss_seg=1.0)])
    assert len(pixels(picture, BLUE)) > 0
    assert len(pixels(picture, ORANGE)) == 0


@pytest.mark.parametrize("best", [1, 2, 5])
def test_best_is_marked_where_it_is(best: int) -> None:
    """By a star, which is taller than the dots of a curve that is all but level."""
    picture = draw_curves([eval_record(epoch, AP=0.5 + 1e-6 * (epoch == best)) for epoch in range(1, 6)])
    places = pixels(picture, BLUE)
    heights = np.bincount(places[:, 1])
    assert heights.max() > 2 * np.median(heights[heights > 0])
    left, right = np.flatnonzero(heights)[[0, -1]]
    assert np.abs(heights.argmax() - (left + (right - left) * (best - 1) / 4)) < 8


def test_legend_says_the_best_value(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    labels: list[Any] = []
    plot = Axes.plot

    def spy(self: Axes, *arguments: Any, **options: Any) -> Any:
        labels.append(options.get("label"))
        return plot(self, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    draw_curves(
        [
            eval_record(2, AP=0.25, AP50=math.nan, APs=-1.0, APl=-1.0),
            eval_record(4, AP=0.375, AP50=math.nan, APs=-1.0, APl=0.5),
            eval_record(6, AP=0.375, AP50=math.nan, APs=-1.0, APl=0.25),
            train_record(600, loss_a=1.0, loss_b=1.0),
        ]
    )
    said = [label for label in labels if label]
    assert said == ["sum of losses", "a", "b", "AP  0.375 at 4", "AP50", "APl  0.500 at 4"]


def test_order_of_the_records_does_not_matter() -> None:
    records = [train_record(20 * i, loss_a=1 / i) for i in range(1, 20)] + [eval_record(i, AP=i / 9) for i in (1, 2, 3)]
    shuffled = random.Random(0).sample(records, len(records))
    np.testing.assert_array_equal(draw_curves(records), draw_curves(shuffled))


def test_more_curves_than_colours() -> None:
    """And a legend that is as tall as the panel, which has to remain."""
    results = {f"result{i}": i / 40 for i in range(30)}
    places = pixels(draw_curves([eval_record(1, **results), eval_record(2, **results)]), BLUE)
    assert np.ptp(places[:, 0]) > 200
    assert np.ptp(places[:, 1]) > 300


def test_matplotlib_stays_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    pyplot = sys.modules.get("matplotlib.pyplot")
    draw_curves([train_record(20, loss_a=1.0)])
    assert dict(matplotlib.rcParams) == before
    assert sys.modules.get("matplotlib.pyplot") is pyplot
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], r'0 records \(kinds: none\), expected at least one of the kind "train" or "eval"'),
        ([{"kind": "picture", "step": 3}], r"1 records \(kinds: picture\), expected .* metrics.jsonl"),
    ],
)
def test_nothing_to_draw(records: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_curves(records)


def test_the_curves_themselves() -> None:
    trains = [train_record(step, loss_a=1.0 / step, loss_b=2.0) for step in (40, 20)]
    evals = [eval_record(2, AP=0.5, APl=-1.0), eval_record(1, AP=0.25, APl=-1.0)]
    losses, results = loss_curves(trains + evals), result_curves(trains + evals)
    assert list(losses) == ["loss", "loss_a", "loss_b"]
    np.testing.assert_allclose(losses["loss_a"], [[0.2, 0.4], [1 / 20, 1 / 40]])
    assert list(results) == ["AP"]  # there was never a large object to find
    np.testing.assert_array_equal(results["AP"], [[1, 2], [0.25, 0.5]])
    np.testing.assert_array_equal(rate_curve(trains + evals), [[0.2, 0.4], [0.02, 0.02]])
    assert list(loss_curves([train_record(20, loss_a=1.0)])) == ["loss"]
    many = loss_curves([train_record(step, loss_a=1.0, loss_b=1.0) for step in range(1, 10_000)])
    assert len(many["loss"][0]) == 500
