"""Attention as pictures: shares of splits and channel weights layer by layer, maps over the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from resnest_det.visualize.pictures import DISTINCT_COLOURS, Array, Picture, as_array, as_picture, rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.float64]

_DPI = 110
_NUM_BINS = 25  # of a histogram over [0, 1]
_PANEL = (1.75, 1.15)  # inches, of one layer among many
_PANEL_GAP = (0.14, 0.32)  # inches, between panels side by side, and between rows of them for their headings
_HEAT_COLOURS = "inferno"
_SHARE_COLOURS = "PRGn"
_EVEN = (0.6, 0.6)  # an opacity that lets a map be read by its bar of colours
_LONG_SIDE = 420  # pixels of an image in a sheet of many


def draw_shares(shares: Mapping[str, Array], *, part: str = "split", title: str = "") -> Picture:
    """How the channels of each layer are divided among its splits, or among the branches of selective kernels.

    On the left the mean share of each split, layer by layer. On the right a panel for each layer: its channels side by
    side, each a column of height 1 divided among the splits, sorted by the first of two splits' share; of more splits,
    first by which of them has the most. A dashed line stands where equal shares would meet.

    Args:
        shares: for each layer, by what it is called in the picture, (splits, channels), which sum to 1 over the splits;
            all layers have the same number of splits, two or more.
        part: what a split is called, such as "branch".
        title: what stands above.

    Returns:
        The picture (H, W, 3), uint8.

    Raises:
        ValueError: no layers, another shape, or shares that do not sum to 1.
    """
    from matplotlib.patches import Patch

    layers = {name: _in_unit_range(values, f"shares[{name!r}]", 2) for name, values in _some(shares, "shares").items()}
    numbers = {len(layer) for layer in layers.values()}
    if len(numbers) > 1 or min(numbers) < 2:
        raise ValueError(
            f"the layers have {sorted(numbers)} splits, expected the same number in each, 2 or more: draw layers of "
            f"one kind, and those of one split by draw_channel_weights"
        )
    for name, layer in layers.items():
        if np.abs(layer.sum(axis=0) - 1).max() > 1e-3:
            raise ValueError(f"shares[{name!r}] sums to {layer.sum(axis=0).min():.4g} in a channel, expected 1")
    (number,) = numbers
    parts = [f"{part} {index + 1}" for index in range(number)]
    colours = [DISTINCT_COLOURS[index % len(DISTINCT_COLOURS)] for index in range(number)]

    figure, table, panels = _sheet(list(layers), title, table_width=0.5 + 0.5 * number)
    means = np.stack([layer.mean(axis=1) for layer in layers.values()])
    reach = max(0.05, float(np.abs(means - 1 / number).max()))  # so that nearly equal shares look nearly equal
    table.imshow(means, cmap=_SHARE_COLOURS, vmin=1 / number - reach, vmax=1 / number + reach, aspect="auto")
    for (row, column), mean in np.ndenumerate(means):
        dark = abs(mean - 1 / number) > 0.6 * reach
        colour = "white" if dark else "black"
        table.text(column, row, f"{mean:.2f}", fontsize=8, color=colour, ha="center", va="center")
    table.set_xticks(range(number), parts, fontsize=8, rotation=0 if number < 3 else 90)
    table.xaxis.tick_top()
    table.set_title("mean share", fontsize=9)
    for axes, (name, layer) in zip(panels, layers.items(), strict=True):
        edges = np.vstack([np.zeros(layer.shape[1]), layer[:, _order(layer)].cumsum(axis=0)])
        places = np.arange(layer.shape[1] + 1)
        for index, colour in enumerate(colours):
            low, high = (np.append(edge, edge[-1]) for edge in edges[index : index + 2])
            axes.fill_between(places, low, high, step="post", color=colour, linewidth=0)
        for index in range(1, number):
            axes.axhline(index / number, color="white", linewidth=0.8, linestyle="--")
        _finish_panel(axes, name, layer.shape[1])
    handles = [Patch(color=colour) for colour in colours]
    figure.legend(handles, parts, loc="lower center", ncols=number, frameon=False, fontsize=9)
    return rendered(figure)


def draw_channel_weights(weights: Mapping[str, Array], *, title: str = "") -> Picture:
    """By what each layer's channels are multiplied.

    On the left how the weights are distributed, layer by layer. On the right a panel for each layer: its weights,
    sorted from the largest.

    Args:
        weights: for each layer, by what it is called in the picture, (channels,) in [0, 1].
        title: what stands above.

    Returns:
        The picture (H, W, 3), uint8.

    Raises:
        ValueError: no layers, another shape, or values outside [0, 1].
    """
    layers = {
        name: _in_unit_range(values, f"weights[{name!r}]", 1) for name, values in _some(weights, "weights").items()
    }
    figure, table, panels = _sheet(list(layers), title, table_width=2.6)
    counts = [np.histogram(layer, bins=_NUM_BINS, range=(0, 1))[0] / len(layer) for layer in layers.values()]
    # The colour follows the square root, so that a few channels among many can be seen.
    table.imshow(
        np.sqrt(np.stack(counts)), cmap="Blues", vmin=0, vmax=1, aspect="auto", extent=(0, 1, len(layers) - 0.5, -0.5)
    )
    table.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=8)
    table.set_xlabel("weight", fontsize=8)
    table.set_title("distribution of the weights", fontsize=9)
    for axes, (name, layer) in zip(panels, layers.items(), strict=True):
        places = np.arange(len(layer) + 1)
        falling = np.sort(layer)[::-1]
        heights = np.append(falling, falling[-1])
        axes.fill_between(places, heights, step="post", color=DISTINCT_COLOURS[0], alpha=0.3, linewidth=0)
        axes.step(places, heights, where="post", color=DISTINCT_COLOURS[0], linewidth=1.3)
        axes.axhline(0.5, color="#888888", linewidth=0.6, linestyle="--")
        _finish_panel(axes, name, len(layer))
    return rendered(figure)


def draw_spatial_maps(image: Array, maps: Mapping[str, Array], *, title: str = "") -> Picture:
    """By what each layer multiplies the positions of its features, over the image.

    All maps have one scale of colours, from the smallest to the largest of their values.

    Args:
        image: uint8 RGB, a tensor (3, H, W) or an array (H, W, 3), all of which the maps cover.
        maps: for each layer, by what it is called in the picture, (h, w) in [0, 1].
        title: what stands above.

    Returns:
        The picture (H', W', 3), uint8.

    Raises:
        ValueError: no layers, another shape, or values outside [0, 1].
    """
    pixels = _reduced(as_picture(image))
    layers = {name: _in_unit_range(values, f"maps[{name!r}]", 2) for name, values in _some(maps, "maps").items()}
    low = min(layer.min() for layer in layers.values())
    high = max(low + 1e-3, *(layer.max() for layer in layers.values()))
    height, width = pixels.shape[:2]
    columns = _num_columns(len(layers) + 1)
    rows = math.ceil((len(layers) + 1) / columns)
    side = 1.9 if columns > 3 else 2.6  # inches
    tall = side * height / width
    figure, top = _new_figure(
        columns * (side + _PANEL_GAP[0]) + 1.1, rows * (tall + _PANEL_GAP[1]) + 0.1, title, heading=False
    )
    shown = {"image": pixels} | {
        f"{name}  {layer.shape[0]} x {layer.shape[1]}": overlay_heat(
            pixels, (layer - low) / (high - low), opacity=_EVEN
        )
        for name, layer in layers.items()
    }
    for index, (name, panel) in enumerate(shown.items()):
        row, column = divmod(index, columns)
        left = 0.1 + column * (side + _PANEL_GAP[0])
        axes = _add_axes(figure, left, top + _PANEL_GAP[1] + row * (tall + _PANEL_GAP[1]), side, tall)
        axes.imshow(panel)
        axes.set_axis_off()
        _heading(axes, name)
    _colour_bar(figure, top + _PANEL_GAP[1], min(tall * rows, 5.0), low, high, "weight of a position")
    return rendered(figure)


def draw_grad_cam(
    image: Array, heat: Array, *, title: str = "", box_xyxy: Sequence[float] | Array | None = None
) -> Picture:
    """An image beside where in it the evidence for a score is.

    Args:
        image: uint8 RGB, a tensor (3, H, W) or an array (H, W, 3).
        heat: (H, W) in [0, 1].
        title: what stands above, such as whose score it is.
        box_xyxy: the box of the detection asked for, in pixels of `image`; None for none.

    Returns:
        The picture (H', W', 3), uint8.

    Raises:
        ValueError: another shape, or values outside [0, 1].
    """
    pixels = as_picture(image)
    values = _in_unit_range(heat, "heat", 2)
    if values.shape != pixels.shape[:2]:
        raise ValueError(f"heat has shape {values.shape}, expected {pixels.shape[:2]}, the height and width of image")
    height, width = pixels.shape[:2]
    wide = 4.2 * min(1.0, 1.2 * width / height)  # inches; a tall image makes no taller a picture
    tall = wide * height / width
    figure, top = _new_figure(2 * (wide + _PANEL_GAP[0]) + 1.1, tall + 0.25, title, heading=False)
    for place, shown in enumerate((pixels, overlay_heat(pixels, values))):
        axes = _add_axes(figure, 0.1 + place * (wide + _PANEL_GAP[0]), top + 0.1, wide, tall)
        axes.imshow(shown)
        axes.set_axis_off()
        if box_xyxy is not None:
            left, upper, right, lower = as_array(box_xyxy).tolist()  # type: ignore[arg-type]
            corners = [left, right, right, left, left], [upper, upper, lower, lower, upper]
            axes.plot(*corners, color="black", linewidth=3.2, scalex=False, scaley=False)
            axes.plot(*corners, color="white", linewidth=1.6, scalex=False, scaley=False)
    _colour_bar(figure, top + 0.1, tall, 0, 1, "Grad-CAM, of its maximum")
    return rendered(figure)


def overlay_heat(image: Array, heat: Array, *, opacity: tuple[float, float] = (0.15, 0.75)) -> Picture:
    """The image in grey, and over it a map from dark to bright.

    Args:
        image: uint8 RGB, a tensor (3, H, W) or an array (H, W, 3).
        heat: (h, w) in [0, 1], resized bilinearly to the image.
        opacity: the map's part in the picture where heat is 0, and where it is 1.

    Returns:
        The picture (H, W, 3), uint8.

    Raises:
        ValueError: another shape, or values outside [0, 1].
    """
    from matplotlib import colormaps

    pixels = as_picture(image)
    values = _in_unit_range(heat, "heat", 2).astype(np.float32)
    resized = Image.fromarray(values).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)
    values = np.clip(np.asarray(resized), 0, 1)
    colours = colormaps[_HEAT_COLOURS](values)[..., :3] * 255
    grey = pixels.mean(axis=-1, keepdims=True)
    part = opacity[0] + (opacity[1] - opacity[0]) * values[..., None]
    painted: Picture = ((1 - part) * grey + part * colours).round().astype(np.uint8)
    return painted


def _some(layers: Mapping[str, Array], name: str) -> Mapping[str, Array]:
    if not layers:
        raise ValueError(f"{name} is empty, expected at least one layer")
    return layers


def _in_unit_range(values: Array, name: str, num_dimensions: int) -> FloatArray:
    """The values as an array, found to have so many dimensions and to be in [0, 1]."""
    array = as_array(values).astype(np.float64)
    if array.ndim != num_dimensions or array.size == 0:
        expected = "one value a channel" if num_dimensions == 1 else "two dimensions"
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}; give the values of one image")
    if not (array.min() >= -1e-6 and array.max() <= 1 + 1e-6):  # so written that NaN is refused
        raise ValueError(f"{name} has values from {array.min():.4g} to {array.max():.4g}, expected [0, 1]")
    return np.clip(array, 0, 1)


def _order(shares: FloatArray) -> npt.NDArray[np.intp]:
    """Channels in the order of their panel, of shares (splits, channels)."""
    if len(shares) == 2:
        return np.argsort(-shares[0], kind="stable")
    return np.lexsort((-shares.max(axis=0), shares.argmax(axis=0)))


def _num_columns(number: int) -> int:
    """Of so many panels: about as many rows as columns, and no more columns than a page holds."""
    return min(8, max(2, math.ceil(math.sqrt(number))))


def _sheet(names: Sequence[str], title: str, *, table_width: float) -> tuple[Figure, Axes, list[Axes]]:
    """A figure with a row for each layer on the left, and a panel for each on the right.

    Places are given and not found by matplotlib, which takes half a minute for a hundred layers.
    """
    columns = _num_columns(len(names))
    rows = math.ceil(len(names) / columns)
    (width, height), (gap, row_gap) = _PANEL, _PANEL_GAP
    labels = 0.2 + 0.068 * max(map(len, names))  # inches, of the longest name
    panels_left = labels + table_width + 0.65
    tall = max(rows * (height + row_gap) - row_gap, 0.17 * len(names))
    figure, top = _new_figure(panels_left + columns * (width + gap), tall + 0.6, title, heading=True)
    table = _add_axes(figure, labels, top, table_width, tall)
    table.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    table.tick_params(length=0)
    panels = []
    for index in range(len(names)):
        row, column = divmod(index, columns)
        left = panels_left + column * (width + gap)
        panels.append(_add_axes(figure, left, top + row * (height + row_gap), width, height))
        panels[-1].tick_params(labelleft=column == 0)
    return figure, table, panels


def _finish_panel(axes: Axes, name: str, channels: int) -> None:
    axes.set_xlim(0, channels)
    axes.set_ylim(0, 1)
    axes.set_xticks([])
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.tick_params(labelsize=7.5, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    _heading(axes, f"{name}: {channels} channels")


def _heading(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=8.5, pad=3, parse_math=False)


def _colour_bar(figure: Figure, top: float, height: float, low: float, high: float, label: str) -> None:
    """A bar of colours at the right, in the inch that is left there; lengths in inches."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = _add_axes(figure, figure.get_figwidth() - 0.95, top, 0.16, height)
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), cmap=_HEAT_COLOURS), cax=axes)
    bar.set_label(label, fontsize=9)
    axes.tick_params(labelsize=8)


def _reduced(pixels: Picture) -> Picture:
    """The image, a large one smaller: a sheet of many needs no more."""
    image = Image.fromarray(pixels)
    image.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _new_figure(width: float, height: float, title: str, *, heading: bool) -> tuple[Figure, float]:
    """A figure for content of so many inches, on white, under its title; and the inches above the content.

    With `heading`, the content has a line above it.
    """
    from matplotlib.figure import Figure  # takes half a second, which no other picture needs

    top = 0.4 * bool(title) + 0.5 * heading + 0.05
    figure = Figure(figsize=(width, height + top), dpi=_DPI)
    if title:
        figure.suptitle(title, fontsize=11, y=1 - 0.2 / (height + top), va="center", parse_math=False)
    return figure, top


def _add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at so many inches from the upper left."""
    all_width, all_height = figure.get_size_inches()
    place = left / all_width, 1 - (top + height) / all_height, width / all_width, height / all_height
    return figure.add_axes(place)
