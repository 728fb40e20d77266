"""Learning curves: losses, results of evaluation and learning rate over a run's epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from resnest_det.visualize.pictures import DISTINCT_COLOURS, Picture, rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]
Numbers = npt.NDArray[np.float64]
Curve = tuple[Numbers, Numbers]  # epochs and values, each (N,)

_NOT_A_RESULT = ("kind", "epoch", "step", "seconds")
_COLOURS = (*DISTINCT_COLOURS, "#000000")  # then the same dashed
_STYLES = ("-", "--", ":")
_SMOOTHED_FROM = 50  # points; a loss of more is drawn as a running median over a fiftieth of them
_SMOOTHED_PLACES = 500
_LEGEND_ROWS = 15
_MARKED_UP_TO = 50  # points; each has a dot on a curve of so many


def draw_curves(records: Records) -> Picture:
    """A run's learning curves in one picture: losses, results and learning rate, each where there are records of it.

    Every loss is a curve; one of many points is drawn as a running median, the sum of the losses with its own points
    behind. Every result is a curve with its highest value marked, and said in the legend with the epoch it belongs to.
    A result that is -1 throughout, which stands for nothing to measure, is left out.

    Args:
        records: the lines of metrics.jsonl in any order; those of a kind other than "train" and "eval" are passed over.

    Returns:
        The picture (H, W, 3), uint8.

    Raises:
        ValueError: there is no record of training or evaluation.
    """
    from matplotlib.figure import Figure  # takes half a second, which pictures without axes do not need
    from matplotlib.ticker import MaxNLocator

    trains, evals = _of_kind(records, "train"), _of_kind(records, "eval")
    if not trains and not evals:
        kinds = ", ".join(sorted({str(record["kind"]) for record in records})) or "none"
        raise ValueError(
            f'{len(records)} records (kinds: {kinds}), expected at least one of the kind "train" or "eval"; '
            f"give those of a run's metrics.jsonl"
        )
    panels: list[tuple[float, Callable[[Axes, Records], None], Records]] = []  # each with its height
    if trains:
        panels.append((3.0, _draw_losses, trains))
    if evals:
        panels.append((3.0, _draw_results, evals))
    if trains:
        panels.append((1.5, _draw_rate, trains))
    heights = [height for height, _, _ in panels]
    figure = Figure(figsize=(10, sum(heights) + 0.6), dpi=110, layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (_, draw, rows) in zip(grid, panels, strict=True):
        draw(axes, rows)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    last = max(float(record["epoch"]) for record in [*trains, *evals])
    grid[-1].set_xlim(0, 1.02 * max(last, 1e-6))
    grid[-1].xaxis.set_major_locator(MaxNLocator(nbins=10, integer=last >= 2))
    grid[-1].set_xlabel("epoch")
    return rendered(figure)


def loss_curves(records: Records) -> dict[str, Curve]:
    """Every loss of a run by name, "loss" being their sum; those of many points as running medians.

    Args:
        records: the lines of metrics.jsonl in any order.
    """
    trains = _of_kind(records, "train")
    return {name: _running_median(*_curve(trains, name)) for name in _loss_names(trains)}


def result_curves(records: Records) -> dict[str, Curve]:
    """Every result of a run's evaluations by name; one that is -1 throughout, with nothing to measure, is left out.

    Args:
        records: the lines of metrics.jsonl in any order.
    """
    evals = _of_kind(records, "eval")
    results = {name: _curve(evals, name) for name in _numbers_in(evals) if name not in _NOT_A_RESULT}
    # -1 says that there was nothing to measure, as in COCO's own evaluation.
    return {name: curve for name, curve in results.items() if not (curve[1] == -1).all()}


def rate_curve(records: Records) -> Curve:
    """The learning rate of a run.

    Args:
        records: the lines of metrics.jsonl in any order.
    """
    return _curve(_of_kind(records, "train"), "lr")


def _draw_losses(axes: Axes, trains: Records) -> None:
    names = _loss_names(trains)
    lowest, highest = 0.0, 0.0
    for index, name in enumerate(names):
        epochs, values = _curve(trains, name)
        colour, style = _look(index)
        if name == "loss" and len(values) > _SMOOTHED_FROM:
            axes.plot(epochs, values, color=colour, alpha=0.25, linewidth=0.8)
        epochs, values = _running_median(epochs, values)
        axes.plot(
            epochs,
            values,
            label="sum of losses" if name == "loss" else name.removeprefix("loss_"),
            color=colour,
            linestyle=style,
            linewidth=2.0 if name == "loss" else 1.2,
            marker="o" if len(values) <= _MARKED_UP_TO else "",
            markersize=3,
        )
        finite = values[np.isfinite(values)]
        lowest, highest = finite.min(initial=lowest), finite.max(initial=highest)
    axes.set_ylim(1.08 * lowest, 1.08 * highest or 1.0)  # a spike of the points behind shall not flatten the curves
    axes.set_ylabel("loss")
    _draw_legend(axes, None)


def _draw_results(axes: Axes, evals: Records) -> None:
    lowest = 0.0
    for index, (name, (epochs, values)) in enumerate(result_curves(evals).items()):
        colour, style = _look(index)
        label = name
        if np.isfinite(values).any():
            lowest = min(lowest, float(np.nanmin(values)))
            best = int(np.nanargmax(values))
            label = f"{name}  {values[best]:.3f} at {epochs[best]:g}"
            axes.plot(
                epochs[best],
                values[best],
                "*",
                color=colour,
                markersize=14,
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=3,
            )
        axes.plot(
            epochs,
            values,
            label=label,
            color=colour,
            linestyle=style,
            linewidth=2.0 if index == 0 else 1.2,
            marker="o" if len(values) <= _MARKED_UP_TO else "",
            markersize=3,
        )
    axes.set_ylim(bottom=1.08 * lowest)
    axes.set_ylabel("evaluation")
    _draw_legend(axes, "\N{BLACK STAR} best, at its epoch")


def _draw_rate(axes: Axes, trains: Records) -> None:
    epochs, values = _curve(trains, "lr")
    marker = "o" if len(values) <= _MARKED_UP_TO else ""
    axes.plot(epochs, values, color="#444444", linewidth=1.2, marker=marker, markersize=3)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_ylabel("learning rate")


def _look(index: int) -> tuple[str, str]:
    """Colour and line style of a panel's curve."""
    return _COLOURS[index % len(_COLOURS)], _STYLES[index // len(_COLOURS) % len(_STYLES)]


def _draw_legend(axes: Axes, title: str | None) -> None:
    """The curves' names, on the right of the panel and no taller than it."""
    curves, names = axes.get_legend_handles_labels()
    axes.legend(
        curves,
        names,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        ncols=math.ceil(len(names) / _LEGEND_ROWS) or 1,
        frameon=False,
        fontsize=8,
        title_fontsize=8,
    )


def _of_kind(records: Records, kind: str) -> list[Mapping[str, Any]]:
    """The records of a kind, in the order of their steps."""
    return sorted((record for record in records if record["kind"] == kind), key=lambda record: record["step"])


def _loss_names(trains: Records) -> list[str]:
    names = [name for name in _numbers_in(trains) if name == "loss" or name.startswith("loss_")]
    return ["loss"] if len(names) == 2 and "loss" in names else names  # the one loss is the sum


def _numbers_in(records: Records) -> list[str]:
    """Names of the numbers that any of the records has, in the order in which they come."""
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if any(isinstance(record.get(name), int | float) for record in records)]


def _curve(records: Records, name: str) -> Curve:
    """Epochs and values of the records that have the name."""
    points = [(record["epoch"], record[name]) for record in records if name in record]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _running_median(epochs: Numbers, values: Numbers) -> Curve:
    """A curve's centred median over a fiftieth of its points, at places spread over it; few points stay as they are."""
    num_points = len(values)
    if num_points <= _SMOOTHED_FROM:
        return epochs, values
    half = math.ceil(num_points / _SMOOTHED_FROM / 2)
    places = np.linspace(0, num_points - 1, min(num_points, _SMOOTHED_PLACES)).round().astype(np.int64)
    medians = [np.median(values[max(place - half, 0) : place + half + 1]) for place in places]
    return epochs[places], np.array(medians)
