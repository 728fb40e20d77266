"""An evaluated detector's numbers as pictures: precision by recall, which classes are confused, what errors cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ParamSpec

import numpy as np
import numpy.typing as npt

from resnest_det.visualize.pictures import DISTINCT_COLOURS, Array, Picture, as_array, rendered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")

_BEHIND = "#9A9A9A"
_MEAN = "#000000"
_DPI = 110
_LONGEST_NAME = 22  # characters of a class name
_BACKGROUND = "background"


def _as_written(draw: Callable[P, Picture]) -> Callable[P, Picture]:
    """The drawing function, to which a dollar sign in a name is no formula."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Picture:
        from matplotlib import rc_context

        with rc_context({"text.parse_math": False}):
            return draw(*args, **kwargs)

    return drawn


@_as_written
def draw_precision_recall(
    recalls: Array, precisions: Array, class_names: Sequence[str], *, title: str = "precision by recall"
) -> Picture:
    """A curve of precision over recall for each class, and their mean.

    Up to six classes have a colour and a name each; of more, all are drawn thin and grey behind the mean. The legend
    says the area under each curve, which is its average precision.

    Args:
        recalls: (R,), rising, in [0, 1].
        precisions: (classes, R), in [0, 1]; -1 throughout for a class without objects, which is left out.
        class_names: the name of each class.
        title: what stands above, such as the IoU threshold.

    Returns:
        The picture (H, W, 3), uint8.

    Raises:
        ValueError: the shapes do not fit each other, or no class has objects.
    """
    recalls, precisions = as_array(recalls), as_array(precisions)
    if recalls.ndim != 1 or precisions.shape != (len(class_names), len(recalls)):
        raise ValueError(
            f"recalls has shape {recalls.shape} and precisions {precisions.shape}, expected (R,) and "
            f"({len(class_names)}, R) for {len(class_names)} class_names; give the precisions of one IoU threshold"
        )
    present = np.all(precisions >= 0, axis=1)
    if not present.any():
        raise ValueError(
            f"none of the {len(class_names)} classes has a precision of 0 or more, so that there is nothing to draw; "
            f"evaluate images with objects"
        )
    curves = precisions[present]
    names = [_shortened(class_names[index]) for index in np.flatnonzero(present).tolist()]

    figure = _new_figure(9.0, 5.6)
    axes = figure.add_subplot()
    few = len(curves) <= len(DISTINCT_COLOURS)
    for index, (name, curve) in enumerate(zip(names, curves, strict=True)):
        if few:
            axes.plot(recalls, curve, color=DISTINCT_COLOURS[index], linewidth=1.6, label=f"{name}  {curve.mean():.3f}")
        else:
            label = f"each of {len(curves)} classes" if index == 0 else None
            axes.plot(recalls, curve, color=_BEHIND, linewidth=0.7, alpha=0.6, label=label)
    if len(curves) > 1:
        mean = curves.mean(axis=0)
        axes.plot(recalls, mean, color=_MEAN, linewidth=3.0, label=f"mean  {mean.mean():.3f}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.set_title(title)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, title="average precision", alignment="left")
    return rendered(figure)


@_as_written
def draw_confusion_matrix(
    counts: Array, class_names: Sequence[str], *, title: str = "", max_classes: int = 100
) -> Picture:
    """Which class was found where an object of which class is, in percent of the row.

    A row is what became of the objects of a class, the last one the detections where no object is. The colour follows
    the square root, so that a few percent can be seen. Matrices of up to ten classes show the counts too.

    Args:
        counts: (classes + 1, classes + 1), whole numbers: rows the objects' classes, columns the detections', last the
            background.
        class_names: the name of each class, without the background.
        title: what stands above, such as the thresholds.
        max_classes: of more classes those with the most mistakes are shown, and the others as one.

    Returns:
        The picture (H, W, 3), uint8; of 80 classes about 2000 pixels wide.

    Raises:
        ValueError: `counts` has another shape or negative values, or `max_classes` is below 1.
    """
    matrix = as_array(counts).astype(np.int64)
    if matrix.shape != (len(class_names) + 1, len(class_names) + 1):
        raise ValueError(
            f"counts has shape {matrix.shape} for {len(class_names)} class_names, expected one row and column a class "
            f"and one of the background: {(len(class_names) + 1, len(class_names) + 1)}"
        )
    if (matrix < 0).any():
        raise ValueError(f"counts holds {matrix.min()}, expected whole numbers from 0")
    if max_classes < 1:
        raise ValueError(f"max_classes is {max_classes}, expected a whole number from 1")
    names = [_shortened(name) for name in class_names]
    if len(names) > max_classes:
        matrix, names = _most_mistaken(matrix, names, max_classes)
    names = [*names, _BACKGROUND]
    size = len(names)
    percent = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)

    cell = min(0.72, max(0.19, 7.0 / size))  # inches
    font = min(10.0, 42 * cell)  # points, of which 72 are an inch
    names_above = size > 30  # and below: far from either they could not be followed
    figure = _new_figure(size * cell + 3.4, size * cell + (4.0 if names_above else 2.6))
    axes = figure.add_subplot()
    image = axes.imshow(np.sqrt(percent), cmap="Blues", vmin=0, vmax=10, interpolation="nearest")
    for row, column in np.argwhere(percent >= 0.5):
        axes.text(
            column,
            row,
            f"{percent[row, column]:.0f}%\n{matrix[row, column]}" if size <= 11 else f"{percent[row, column]:.0f}",
            ha="center",
            va="center",
            color="white" if percent[row, column] > 50 else "black",
            fontsize=min(10.0, 31 * cell),
            in_layout=False,  # to measure thousands of them takes many seconds
        )
    axes.set_xticks(range(size), names, rotation=90, fontsize=font)
    axes.set_yticks(range(size), names, fontsize=font)
    axes.tick_params(length=0, labeltop=names_above)
    borders = np.arange(size + 1) - 0.5
    axes.set_xticks(borders, minor=True)
    axes.set_yticks(borders, minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color="#E4E4E4", linewidth=0.5)
    axes.axhline(borders[-2], color="#555555", linewidth=1.0)
    axes.axvline(borders[-2], color="#555555", linewidth=1.0)
    axes.fill_between(borders[-2:], borders[-2], borders[-1], color="#C8C8C8")  # nothing found where nothing is
    axes.set_xlabel("found as")
    axes.set_ylabel("object")
    axes.set_title(title)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
    ticks = (0, 1, 5, 10, 25, 50, 100)
    bar.set_ticks([math.sqrt(tick) for tick in ticks], labels=[str(tick) for tick in ticks])
    bar.set_label("percent of the row")
    return rendered(figure)


def draw_error_breakdown(
    main: Mapping[str, float], special: Mapping[str, float], *, average_precision: float, title: str = ""
) -> Picture:
    """Bars of how much average precision each kind of error costs.

    Args:
        main: by kind of error, how much AP rises without it, in [0, 1]; drawn in this order.
        special: the same for all false positives and all false negatives, in a panel with its own scale.
        average_precision: the AP with all errors, in [0, 1].
        title: what stands above, such as the thresholds.

    Returns:
        The picture (H, W, 3), uint8.

    Raises:
        ValueError: `main` or `special` is empty, or a value is not finite.
    """
    for argument, values in (("main", main), ("special", special)):
        if not values:
            raise ValueError(f"{argument} is empty, expected at least one kind of error with its cost in AP")
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"{argument} has {value} for {name!r}, expected a finite number")
    figure = _new_figure(8.0, 0.42 * (len(main) + len(special)) + 2.1)
    panels = figure.subplots(2, 1, gridspec_kw={"height_ratios": [len(main), len(special)]})
    for axes, values, colour in zip(panels, (main, special), (DISTINCT_COLOURS[0], DISTINCT_COLOURS[1]), strict=True):
        numbers = list(values.values())
        bars = axes.barh(range(len(values)), numbers, color=colour, height=0.7)
        axes.set_yticks(range(len(values)), [_shortened(name) for name in values])
        axes.bar_label(bars, labels=[f"{number:.3f}" for number in numbers], padding=4)
        axes.invert_yaxis()  # the first on top
        axes.set_xlim(min(0.0, 1.15 * min(numbers)), 1.15 * max(*numbers, 0.001))
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(f"{title}\n" * bool(title) + f"AP {average_precision:.3f}, and what each kind of error costs")
    panels[1].set_xlabel("rise in AP without the error")
    return rendered(figure)


def _most_mistaken(
    matrix: npt.NDArray[np.int64], names: Sequence[str], limit: int
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """The classes with the most mistakes, in their order, and all others as one, before the background."""
    mistakes = (matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal())[:-1]
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:limit])
    place = np.full(len(matrix), limit)
    place[shown] = np.arange(limit)
    place[-1] = limit + 1
    pooled = np.zeros((limit + 2, limit + 2), dtype=np.int64)
    np.add.at(pooled, (place[:, None], place[None, :]), matrix)
    return pooled, [*(names[index] for index in shown), f"{len(names) - limit} other classes"]


def _shortened(name: str) -> str:
    if name.startswith("_"):  # which a legend would leave out
        name = f"\N{ZERO WIDTH SPACE}{name}"
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    from matplotlib.figure import Figure  # takes half a second, which no other picture needs
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
