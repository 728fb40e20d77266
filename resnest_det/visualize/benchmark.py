"""What was timed side by side, as bars."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from resnest_det.visualize.pictures import DISTINCT_COLOURS, Array, Picture, as_array, rendered

_BAR, _OTHER, _BOUND = DISTINCT_COLOURS[0], "#9A9A9A", DISTINCT_COLOURS[1]
_BAR_HEIGHT = 0.3  # inches


def draw_times(
    panels: Mapping[str, Mapping[str, Array]],
    *,
    bounds: Mapping[str, Mapping[str, float]] | None = None,
    highlighted: str = "",
) -> Picture:
    """Bars of medians, each with a line from the lowest to the highest, in panels one below the other.

    Args:
        panels: by title, the values of each bar by its name, (N,) with N of 1 or more; a title says the unit.
        bounds: by title and name, where a bar has a mark that it cannot go below; None for no marks.
        highlighted: bars whose names begin so have a colour of their own; all of them where it is empty.

    Returns:
        The picture (H, W, 3), uint8.

    Raises:
        ValueError: there is no panel, or one without bars, or a bar without values or with ones that are not finite.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("panels is empty, expected at least one to draw")
    values: dict[str, dict[str, np.ndarray]] = {}
    for title, bars in panels.items():
        if not bars:
            raise ValueError(f"the panel {title!r} has no bars, expected at least one")
        values[title] = {name: as_array(own).astype(np.float64) for name, own in bars.items()}
        for name, own in values[title].items():
            if own.ndim != 1 or not len(own) or not np.isfinite(own).all():
                raise ValueError(
                    f"the bar {name!r} of the panel {title!r} has {own.size - np.isfinite(own).sum()} values that are "
                    f"not finite and the shape {own.shape}; expected finite ones (N,), at least one"
                )
    heights = [_BAR_HEIGHT * len(bars) + 0.7 for bars in values.values()]
    with rc_context({"text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(9, sum(heights)), dpi=110, layout="constrained")
        grid = figure.subplots(len(values), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, (title, bars) in zip(grid, values.items(), strict=True):
            names = list(bars)
            medians = np.array([np.median(own) for own in bars.values()])
            low, high = (np.array([f(own) for own in bars.values()]) for f in (np.min, np.max))
            places = np.arange(len(names))
            axes.barh(
                places, medians, height=0.7, color=[_BAR if name.startswith(highlighted) else _OTHER for name in names]
            )
            axes.errorbar(
                medians, places, xerr=(medians - low, high - medians), fmt="none", ecolor="#333333", capsize=2
            )
            for place, median, end in zip(places, medians, high, strict=True):
                axes.annotate(f"{median:.4g}", (end, place), (4, 0), textcoords="offset points", va="center")
            for name, bound in (bounds or {}).get(title, {}).items():
                middle = names.index(name)
                axes.plot([bound, bound], [middle - 0.35, middle + 0.35], color=_BOUND, linewidth=2)
            axes.set_yticks(places, names)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.12 * high.max())
            axes.set_title(title, loc="left", fontsize=10)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
            axes.set_axisbelow(True)
        return rendered(figure)
