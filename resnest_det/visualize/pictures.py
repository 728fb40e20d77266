"""What every kind of picture is made of: images as arrays, the classes' colours, the sheet of rows and columns."""

from __future__ import annotations

import colorsys
import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = npt.NDArray[np.uint8]  # (H, W, 3) RGB
Array = Tensor | npt.NDArray[Any]
Colour = tuple[int, int, int]
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (16, 16, 16)
SHEET_GAP = 12  # pixels
SHEET_TITLE_SIZE = 20  # pixels

_READABLE_SIDE = 480  # pixels; an image with a shorter long side is enlarged
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

# Of Okabe and Ito, told apart with any colour vision.
DISTINCT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def class_colour(label: int) -> Colour:
    """The RGB colour, 0..255, that a class has in every picture.

    Neighbouring labels differ most: the golden ratio spreads the hues, and three shades alternate.

    Args:
        label: the class's label, from 0.
    """
    saturation, value = ((0.85, 0.92), (0.80, 0.78), (1.00, 0.62))[label % 3]
    red, green, blue = colorsys.hsv_to_rgb((label * _GOLDEN_RATIO) % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever has more contrast to the background: at least 4.3, where WCAG asks for 3 or 4.5."""
    luminance = _luminance(background)
    on_white = (_luminance(WHITE) + 0.05) / (luminance + 0.05)
    on_black = (luminance + 0.05) / (_luminance(BLACK) + 0.05)
    return WHITE if on_white > on_black else BLACK


def _luminance(colour: Colour) -> float:
    """The relative luminance of an sRGB colour in [0, 1], as WCAG 2.1 defines it."""
    shares = (value / 255 for value in colour)
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def text_font(texts: Iterable[str], size: float) -> Font:
    """The font to write all of the texts in: Pillow's own, or one that has the characters which Pillow's lacks.

    Fonts are looked for where matplotlib finds them: its own DejaVu Sans first, then those of the machine. Where none
    has all of the characters it is Pillow's, which draws a box for each that it lacks.

    Args:
        texts: what is to be written.
        size: in pixels.
    """
    characters = frozenset(character for text in texts for character in text if not character.isspace())
    file = None if all(character.isascii() for character in characters) else _font_file(characters)
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


@functools.lru_cache(maxsize=64)
def _font_file(characters: frozenset[str]) -> str | None:
    """The file of a font that has all of the characters; None where Pillow's own has them, or no font has."""
    codes = frozenset(map(ord, characters))
    if codes <= _codes_in(None):
        return None
    for file in _font_files():
        try:
            if codes <= _codes_in(file):
                ImageFont.truetype(file, 12)  # fonts of bitmaps, such as those of emoji, have few sizes
                return file
        except (OSError, RuntimeError):  # the font was removed, or is one that FreeType cannot read
            continue
    return None


def _font_files() -> list[str]:
    """The files of upright fonts, DejaVu Sans first and those of regular weight before others."""
    from matplotlib.font_manager import FontEntry, findSystemFonts, fontManager  # takes long: most names are ASCII

    def order(entry: FontEntry) -> tuple[bool, bool, str, str]:
        return entry.name != "DejaVu Sans", entry.weight not in (400, "normal"), entry.name, entry.fname

    listed = [entry for entry in sorted(fontManager.ttflist, key=order) if entry.style == "normal"]
    # matplotlib keeps its list in a file, which fonts that were installed afterwards are not in.
    new = set(findSystemFonts()) - {entry.fname for entry in fontManager.ttflist}
    files = [entry.fname for entry in listed] + sorted(new, key=lambda file: ("Regular" not in file, file))
    return [file for file in files if "LastResort" not in file]  # which has a box for every character there is


@functools.lru_cache(maxsize=256)
def _codes_in(file: str | None) -> frozenset[int]:
    """The code points that a font has glyphs for; of None, those of Pillow's own."""
    from matplotlib.ft2font import FT2Font

    if file is not None:
        return frozenset(FT2Font(file).get_charmap())
    own = ImageFont.load_default(12)
    if not isinstance(own, ImageFont.FreeTypeFont):  # a Pillow without FreeType, whose font has Latin letters
        return frozenset(range(256))
    return frozenset(FT2Font(io.BytesIO(own.font_bytes)).get_charmap())


def contact_sheet(
    rows: Sequence[Sequence[Picture]],
    *,
    column_titles: Sequence[str],
    row_titles: Sequence[str] | None = None,
) -> Picture:
    """Pictures in rows and columns on white, with headings.

    Args:
        rows: the pictures, uint8 (H, W, 3) of any sizes; every row has one for each column.
        column_titles: what stands above each column.
        row_titles: what stands above each row's pictures, such as a file name; None for nothing.

    Returns:
        The sheet (H, W, 3), uint8, wide enough for the pictures and every title.

    Raises:
        ValueError: no rows, a row of another length than `column_titles`, or not one title a row.
    """
    if not rows:
        raise ValueError("rows is empty, expected at least one row of pictures")
    for number, row in enumerate(rows):
        if len(row) != len(column_titles):
            raise ValueError(
                f"row {number} has {len(row)} pictures, expected {len(column_titles)}, one for each of the "
                f"column_titles {list(column_titles)}"
            )
    if row_titles is not None and len(row_titles) != len(rows):
        raise ValueError(f"row_titles has {len(row_titles)} titles for {len(rows)} rows; give one a row")

    font = text_font(column_titles, SHEET_TITLE_SIZE)
    caption_font = text_font(row_titles or (), round(0.75 * SHEET_TITLE_SIZE))
    pictures = [[as_picture(picture) for picture in row] for row in rows]
    widths = [
        max(math.ceil(font.getlength(title)), *(picture.shape[1] for picture in column))
        for title, column in zip(column_titles, zip(*pictures, strict=True), strict=True)
    ]
    heights = [max(picture.shape[0] for picture in row) for row in pictures]
    captions_width = max((math.ceil(caption_font.getlength(title)) for title in row_titles or ()), default=0)
    title_height = SHEET_TITLE_SIZE + SHEET_GAP
    caption_height = 0 if row_titles is None else title_height
    sheet = Image.new(
        "RGB",
        (
            max(sum(widths) + SHEET_GAP * (len(widths) + 1), captions_width + 2 * SHEET_GAP),
            title_height + sum(heights) + (caption_height + SHEET_GAP) * len(rows) + SHEET_GAP,
        ),
        WHITE,
    )
    draw = ImageDraw.Draw(sheet)

    left = SHEET_GAP
    for title, width in zip(column_titles, widths, strict=True):
        draw.text((left + width / 2, SHEET_GAP), title, fill=BLACK, font=font, anchor="mt")
        left += width + SHEET_GAP
    top = title_height + SHEET_GAP
    for number, row in enumerate(pictures):
        if row_titles is not None:
            draw.text((SHEET_GAP, top + SHEET_GAP), row_titles[number], fill=BLACK, font=caption_font)
            top += caption_height
        left = SHEET_GAP
        for picture, width in zip(row, widths, strict=True):
            # Centred in its cell, for portraits and landscapes share columns.
            cell = (left + (width - picture.shape[1]) // 2, top + (heights[number] - picture.shape[0]) // 2)
            sheet.paste(Image.fromarray(picture), cell)
            left += width + SHEET_GAP
        top += heights[number] + SHEET_GAP
    return np.asarray(sheet).copy()


def readable_scale(height: int, width: int) -> int:
    """The whole factor by which to enlarge an image so that what is drawn on it can be read."""
    return max(1, math.ceil(_READABLE_SIDE / max(height, width)))


def as_array(values: Array) -> npt.NDArray[Any]:
    """The values of a tensor on any device, or of an array."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()  # numpy has no bfloat16


def as_picture(image: Array) -> Picture:
    """A uint8 RGB image, tensor (3, H, W) or array (H, W, 3), as an array (H, W, 3); else a ValueError."""
    pixels = as_array(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"image is of {pixels.dtype}, expected uint8 in 0..255; scale and convert it")
    layout = "(3, H, W) for a tensor" if isinstance(image, Tensor) else "(H, W, 3) for an array"
    if isinstance(image, Tensor) and pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(f"image has shape {tuple(image.shape)}, expected {layout}, not empty")
    return np.ascontiguousarray(pixels)


def class_name(label: int, class_names: Mapping[int, str]) -> str:
    """The label's name; a ValueError where it has none."""
    if label not in class_names:
        known = ", ".join(f"{key} {name}" for key, name in list(class_names.items())[:10])
        raise ValueError(f"label {label} has no name in class_names, which begins: {known}; add it")
    return class_names[label]


def rendered(figure: Figure) -> Picture:
    """matplotlib's figure as a picture (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
