"""The diagrams of docs/attention.md: `python -m tests.attention_diagrams` draws them anew."""

# ruff: noqa: RUF001 (the multiplication sign is meant)

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parents[1] / "docs" / "images"

FEATURES, CONVOLUTION, POOL, DENSE, WEIGHTS = "#D7E8F5", "#A9CCE6", "#E7E7E7", "#F6DDB8", "#F2B27A"
GROUPS = (("#8FC1E3", "#C7E0F2"), ("#8CC7A1", "#CBE6D4"))  # by cardinality, then by radix
INK = "#222222"
DPI = 150
SIZE = 10  # points: read at a page's width, which is about that of the drawings


class Drawing:
    """Boxes and arrows on white; all lengths are inches, from the lower left."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(0, height)
        self.axes.set_axis_off()

    def box(
        self, x: float, y: float, text: str, colour: str = FEATURES, *, width: float = 1.15, height: float = 0.62
    ) -> None:
        """A box around its middle (x, y)."""
        self.axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.07",
                facecolor=colour,
                edgecolor=INK,
                linewidth=0.9,
            )
        )
        self.text(x, y, text)

    def text(self, x: float, y: float, text: str, *, size: float = SIZE, bold: bool = False) -> None:
        self.axes.text(
            x, y, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.25,
            fontweight="bold" if bold else "normal",
        )  # fmt: skip

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a head at its end."""
        for start, end in itertools.pairwise(points[:-1]):
            self.axes.plot(*zip(start, end, strict=True), color=INK, linewidth=1.1, solid_capstyle="projecting")
        style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 10}
        self.axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)

    def operation(self, x: float, y: float, sign: str) -> None:
        self.axes.add_patch(Circle((x, y), 0.17, facecolor="white", edgecolor=INK, linewidth=1.1))
        self.text(x, y, sign, size=13)

    def strip(self, x: float, y: float, values: Sequence[float], *, cell: float) -> None:
        """A vector of values in [0, 1], the darker the larger, around its middle."""
        for index, value in enumerate(values):
            corner = x + (index - len(values) / 2) * cell, y - cell * 0.8
            shade = 1 - np.array([0.04, 0.38, 0.64]) * value
            self.axes.add_patch(Rectangle(corner, cell, cell * 1.6, facecolor=shade, edgecolor=INK, linewidth=0.5))

    def save(self, path: Path) -> None:
        FigureCanvasAgg(self.figure)
        self.figure.savefig(path, dpi=DPI)


def places() -> Drawing:
    """The two slots of a block."""
    drawing = Drawing(8.6, 2.1)
    y = 1.25
    steps = [
        (0.4, "x", FEATURES, 0.5),
        (1.45, "1×1, norm,\nReLU", CONVOLUTION, 1.05),
        (3.1, "3×3, norm, ReLU;\nor split attention,\nselective kernels", CONVOLUTION, 1.65),
        (4.85, "1×1, norm", CONVOLUTION, 1.05),
        (6.3, "nothing; or\nSE, ECA, CBAM", WEIGHTS, 1.35),
    ]
    for (x, _, _, width), (next_x, _, _, next_width) in itertools.pairwise(steps):
        drawing.arrow((x + width / 2, y), (next_x - next_width / 2, y))
    for x, text, colour, width in steps:
        drawing.box(x, y, text, colour, width=width, height=0.8)
    drawing.operation(7.35, y, "+")
    drawing.arrow((6.98, y), (7.18, y))
    drawing.box(8.1, y, "ReLU", FEATURES, width=0.7, height=0.8)
    drawing.arrow((7.52, y), (7.75, y))
    drawing.arrow((0.4, y - 0.4), (0.4, 0.4), (7.35, 0.4), (7.35, y - 0.17))
    drawing.text(3.9, 0.22, "shortcut")
    drawing.text(3.1, 1.87, "spatial_conv", bold=True)
    drawing.text(6.3, 1.87, "gate", bold=True)
    return drawing


def _selection(drawing: Drawing, maps: str, hidden: str, logits: str, softmax: str) -> None:
    """Two feature maps, an attention over them, and their weighted sum, from the height of 4.1 inches downwards."""
    middle, top, shares, low = 3.9, 4.1, 1.75, 0.95
    sides = ((1.0, -1, 1, (0.9, 0.3, 0.6, 0.1)), (6.8, 1, 2, (0.1, 0.7, 0.4, 0.9)))
    steps = [
        (top, "sum, mean over the image", POOL),
        (3.3, hidden, DENSE),
        (2.52, logits, DENSE),
        (shares, softmax, WEIGHTS),
    ]
    for (y, _, _), (next_y, _, _) in itertools.pairwise(steps):
        drawing.arrow((middle, y - 0.26), (middle, next_y + 0.26))
    for y, text, colour in steps:
        drawing.box(middle, y, text, colour, width=2.3, height=0.52)
    for x, side, number, share in sides:
        drawing.box(x, top, f"{maps} {number}\nC channels", FEATURES, width=1.3)
        drawing.arrow((x - 0.65 * side, top), (middle + 1.15 * side, top))
        drawing.arrow((x, top - 0.31), (x, shares + 0.17))
        drawing.operation(x, shares, "×")
        drawing.arrow((middle + 1.15 * side, shares), (x - 0.17 * side, shares))
        drawing.strip((x + middle + 1.15 * side) / 2, shares + 0.28, share, cell=0.13)
        drawing.text((x + middle + 1.15 * side) / 2, shares - 0.18, f"shares of {maps} {number}", size=9)
        drawing.arrow((x, shares - 0.17), (x, low), (middle + 0.17 * side, low))
    drawing.operation(middle, low, "+")
    drawing.arrow((middle, low - 0.17), (middle, 0.52))
    drawing.box(middle, 0.28, "output, C channels", FEATURES, width=2.0, height=0.44)


def split_attention() -> Drawing:
    """Split attention with two splits."""
    drawing = Drawing(7.8, 6.1)
    drawing.box(3.9, 5.8, "x", FEATURES, width=0.8, height=0.4)
    drawing.arrow((3.9, 5.6), (3.9, 5.36))
    drawing.box(3.9, 5.1, "3×3 convolution in K·R groups, bn0, ReLU", CONVOLUTION, width=3.6, height=0.52)
    for x in (1.0, 6.8):
        drawing.arrow((3.9 + np.sign(x - 3.9) * 1.8, 5.1), (x, 5.1), (x, 4.41))
    _selection(drawing, "split", "fc1 in K groups, bn1, ReLU", "fc2 in K groups: R·C logits", "softmax over the splits")
    return drawing


def selective_kernel() -> Drawing:
    """Selective kernels with two branches."""
    drawing = Drawing(7.8, 6.1)
    drawing.box(3.9, 5.8, "x", FEATURES, width=0.8, height=0.4)
    for x, dilation in ((1.0, 1), (6.8, 2)):
        drawing.arrow((3.9 + np.sign(x - 3.9) * 0.4, 5.8), (x, 5.8), (x, 5.41))
        drawing.box(x, 5.1, f"3×3, dilation {dilation},\nnorm, ReLU", CONVOLUTION, width=1.5)
        drawing.arrow((x, 4.79), (x, 4.41))
    _selection(
        drawing, "branch", "fc1: max(C/16, 32), bn1, ReLU", "fc2: 2·C logits", "softmax over the branches"
    )  # fmt: skip
    return drawing


def forms() -> Drawing:
    """The cardinality-major and the radix-major form, for two of each."""
    drawing = Drawing(8.8, 4.75)
    left, right = 2.2, 6.75
    drawing.text(left, 4.55, "cardinality-major, as the paper draws it", bold=True)
    drawing.text(right, 4.55, "radix-major, as it is computed", bold=True)
    for x in (left, right):
        drawing.box(x, 4.2, "x", FEATURES, width=0.6, height=0.26)
        _cells(drawing, x, 0.35, [(0, 0), (1, 0)], ["group 1", "group 2"])
    for group in (0, 1):
        middle = left - 1.1 + 2.2 * group
        drawing.axes.add_patch(
            FancyBboxPatch(
                (middle - 1.02, 0.98), 2.04, 2.6, boxstyle="round,pad=0,rounding_size=0.1", facecolor="#FAFAFA",
                edgecolor="#999999", linewidth=0.8, linestyle="--",
            )
        )  # fmt: skip
        for split in (0, 1):
            x = middle - 0.48 + 0.96 * split
            drawing.arrow((left, 4.07), (left, 3.8), (x, 3.8), (x, 3.39))
            drawing.box(x, 3.08, f"3×3:\nsplit {split + 1}", GROUPS[group][split], width=0.84)
            drawing.arrow((x, 2.77), (x, 2.48))
        drawing.box(middle, 2.17, "attention over the\nsplits, their sum", WEIGHTS, width=1.8)
        drawing.arrow((middle, 1.86), (middle, 1.64))
        drawing.box(middle, 1.46, f"group {group + 1}", GROUPS[group][0], width=1.0, height=0.34)
        drawing.text(middle, 1.13, f"cardinal group {group + 1}", size=9)
        drawing.arrow((middle, 0.98), (middle, 0.78), (left, 0.78), (left, 0.55))

    drawing.arrow((right, 4.07), (right, 3.78))
    drawing.box(right, 3.55, "one 3×3 convolution in K·R groups", CONVOLUTION, width=3.0, height=0.46)
    drawing.arrow((right, 3.32), (right, 3.08))
    order = [(group, split) for split in (0, 1) for group in (0, 1)]
    _cells(drawing, right, 2.88, order, ["group 1", "group 2", "group 1", "group 2"])
    for split in (0, 1):
        x = right - 0.9 + 1.8 * split
        drawing.text(x - 0.45, 2.52, f"split {split + 1}", size=9)
        drawing.arrow((x, 2.68), (x, 2.16))
    drawing.box(
        right,
        1.77,
        "attention over the splits, their sum:\nfc1 and fc2 are 1×1 convolutions\nin K groups",
        WEIGHTS,
        width=3.0,
        height=0.78,
    )
    drawing.arrow((right, 1.38), (right, 0.55))
    return drawing


def _cells(drawing: Drawing, x: float, y: float, groups: Sequence[tuple[int, int]], names: Sequence[str]) -> None:
    """Channels side by side, coloured by group and split."""
    width = 0.9
    for index, ((group, split), name) in enumerate(zip(groups, names, strict=True)):
        left = x + (index - len(groups) / 2) * width
        drawing.axes.add_patch(
            Rectangle((left, y - 0.19), width, 0.38, facecolor=GROUPS[group][split], edgecolor=INK, linewidth=0.9)
        )
        drawing.text(left + width / 2, y, name)


def _channel_gate(steps: Sequence[tuple[str, str, float]], values: Sequence[float]) -> Drawing:
    """Features, below them the way to a weight for each channel, and their product."""
    drawing = Drawing(8.0, 2.2)
    top, low = 1.7, 0.7
    drawing.box(0.65, top, "x\nC channels", FEATURES, width=1.05)
    edge = 1.0
    drawing.arrow((0.65, top - 0.31), (0.65, low), (edge, low))
    for index, (text, colour, width) in enumerate(steps):
        if index:
            drawing.arrow((edge - 0.2, low), (edge, low))
        drawing.box(edge + width / 2, low, text, colour, width=width, height=0.78 if "\n" in text else 0.5)
        edge += width + 0.2
    drawing.arrow((edge - 0.2, low), (6.02, low))
    drawing.strip(6.5, low, values, cell=0.15)
    drawing.text(6.5, low - 0.34, "C weights", size=9)
    drawing.arrow((6.5, low + 0.13), (6.5, top - 0.17))
    drawing.operation(6.5, top, "×")
    drawing.arrow((1.18, top), (6.33, top))
    drawing.box(7.4, top, "output", FEATURES, width=0.9)
    drawing.arrow((6.67, top), (6.95, top))
    return drawing


def squeeze_excitation() -> Drawing:
    """SE."""
    steps = [
        ("mean over\nthe image", POOL, 1.05),
        ("fc1: C → C/16,\nReLU", DENSE, 1.3),
        ("fc2:\nC/16 → C", DENSE, 0.95),
        ("sigmoid", WEIGHTS, 0.8),
    ]
    return _channel_gate(steps, (0.9, 0.2, 0.55, 0.1, 0.75, 0.4))


def efficient_channel_attention() -> Drawing:
    """ECA."""
    steps = [
        ("mean over\nthe image", POOL, 1.05),
        ("1-d convolution over\nk neighbouring channels", DENSE, 1.95),
        ("sigmoid", WEIGHTS, 0.85),
    ]
    return _channel_gate(steps, (0.7, 0.6, 0.35, 0.2, 0.55, 0.8))


def cbam() -> Drawing:
    """CBAM: channels in the upper half, then positions."""
    drawing = Drawing(8.0, 5.0)
    shared, spatial = "fc1, ReLU, fc2,\nfor both the same:\nC → C/16 → C", "7×7 convolution\nof the two,\nnorm"
    halves = [
        (2.65, "mean over the image", "max over the image", shared, DENSE, "sum,\nsigmoid"),
        (0.25, "max over channels", "mean over channels", spatial, CONVOLUTION, "sigmoid"),
    ]
    for base, first, second, step, colour, last in halves:
        top, low = base + 1.9, base + 0.65
        start = 0.31 if top > 4 else 0  # the upper half begins at a box
        for y, text in ((base + 1.0, first), (base + 0.3, second)):
            drawing.box(2.0, y, text, POOL, width=1.65, height=0.46)
            drawing.arrow((0.6, top - start), (0.6, y), (1.18, y))
            drawing.arrow((2.83, y), (3.08, y))
        drawing.box(3.85, low, step, colour, width=1.5, height=1.16)
        drawing.arrow((4.6, low), (4.8, low))
        drawing.box(5.22, low, last, WEIGHTS, width=0.84)
        drawing.arrow((5.64, low), (6.02, low))
        drawing.operation(6.5, top, "×")
        drawing.arrow((0.6 + start, top), (6.33, top))
    drawing.strip(6.5, 3.3, (0.9, 0.2, 0.55, 0.1, 0.75, 0.4), cell=0.15)
    drawing.text(6.5, 2.96, "C weights", size=9)
    drawing.arrow((6.5, 3.43), (6.5, 4.38))
    for row, values in enumerate(((0.1, 0.3, 0.1, 0.1), (0.3, 0.9, 0.6, 0.1), (0.2, 0.7, 0.5, 0.1))):
        drawing.strip(6.5, 1.16 - 0.24 * row, values, cell=0.15)
    drawing.text(6.5, 0.38, "H × W weights", size=9)
    drawing.arrow((6.5, 1.3), (6.5, 1.98))
    drawing.box(0.6, 4.55, "x", FEATURES, width=0.62)
    drawing.box(7.4, 2.15, "output", FEATURES, width=0.9)
    drawing.arrow((6.67, 2.15), (6.95, 2.15))
    drawing.arrow((6.67, 4.55), (7.5, 4.55), (7.5, 2.6), (0.6, 2.6), (0.6, 2.15))
    return drawing


DIAGRAMS: dict[str, Callable[[], Drawing]] = {
    "attention_places": places,
    "attention_split": split_attention,
    "attention_forms": forms,
    "attention_selective_kernel": selective_kernel,
    "attention_se": squeeze_excitation,
    "attention_eca": efficient_channel_attention,
    "attention_cbam": cbam,
}


def draw(folder: Path) -> None:
    """Write every diagram into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, diagram in DIAGRAMS.items():
        diagram().save(folder / f"{name}.png")


if __name__ == "__main__":
    draw(FOLDER)
