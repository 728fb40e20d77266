"""Line charts as SVG, to stand in a page: sharp at every size, and in the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

import numpy as np

from resnest_det.visualize.pictures import DISTINCT_COLOURS, Array, as_array

Limits = tuple[float | None, float | None] | None

# Stand-ins, which the page's colours replace.
_TEXT, _GRID = "#010203", "#040506"
_MARKED_UP_TO = 30  # points; each has a dot on a line of so many
_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # once all colours are taken


def line_chart(
    lines: Mapping[str, tuple[Array, Array]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_limits: Limits = None,
    y_limits: Limits = None,
) -> str:
    """A chart of lines as an SVG element for an HTML page.

    Text and axes have the colour of the text around them. Line number i, from 0, has the page's CSS variable
    `--series-{i % 6}`, and a colour of its own where there is none; from the seventh on, lines are dashed. There is no
    legend: the page has that.

    Args:
        lines: by name, the coordinates of each line's points, (N,) and (N,), finite or NaN for a gap.
        title: what the chart is, for those who cannot see it; must differ from chart to chart of a page.
        x_label: what stands at the horizontal axis.
        y_label: what stands at the vertical axis.
        x_limits: where the horizontal axis begins and ends; None, also for one of the two, for what the lines need.
        y_limits: the same of the vertical axis.

    Returns:
        The element, without width and height, so that it takes the room that it is given.

    Raises:
        ValueError: no lines, or a line with coordinates of different lengths.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not lines:
        raise ValueError("lines is empty, expected at least one line to draw")
    # The salt makes identifiers within the element; equal ones in two elements of a page would be taken for each other.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": 10}):
        figure = Figure(figsize=(4.2, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for index, (name, points) in enumerate(lines.items()):
            x, y = (as_array(values).astype(np.float64) for values in points)
            if x.shape != y.shape or x.ndim != 1:
                raise ValueError(
                    f"the line {name!r} has coordinates of shape {x.shape} and {y.shape}, expected equal (N,)"
                )
            axes.plot(
                x,
                y,
                color=DISTINCT_COLOURS[index % len(DISTINCT_COLOURS)],
                linestyle=_STYLES[index // len(DISTINCT_COLOURS) % len(_STYLES)],
                linewidth=1.8 if index == 0 else 1.3,
                marker="o" if len(x) <= _MARKED_UP_TO else "",
                markersize=3,
            )
        axes.set_xlabel(x_label, color=_TEXT)
        axes.set_ylabel(y_label, color=_TEXT)
        axes.tick_params(colors=_TEXT, length=0)
        axes.grid(color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        if x_limits is not None:
            axes.set_xlim(*x_limits)
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _element(stream.getvalue(), title)


def _element(document: str, title: str) -> str:
    """The <svg> element of matplotlib's document, with the page's colours in place of its own."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every chart
    head, _, body = svg.partition(">")
    (view_box,) = re.findall(r'viewBox="[^"]*"', head)
    for index, colour in enumerate(DISTINCT_COLOURS):
        body = re.sub(colour, f"var(--series-{index}, {colour})", body, flags=re.IGNORECASE)
    body = body.replace(_TEXT, "currentColor").replace(_GRID, "var(--grid, #dddddd)")
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} {view_box} role="img" aria-label="{label}">{body}'
