"""A page of annotated pictures, each below its own caption."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from resnest_det.visualize.pictures import BLACK, SHEET_GAP, WHITE, Array, Font, Picture, as_picture, text_font

_CAPTION_SIZE = 16  # pixels
_CAPTION_LINE = 21  # pixels from one line to the next


def captioned_grid(
    pictures: Sequence[Array], captions: Sequence[str], *, num_columns: int = 3, cell_width: int = 560
) -> Picture:
    """Pictures in rows on white, each reduced to its column and below its caption.

    Args:
        pictures: uint8 RGB of any sizes, tensors (3, H, W) or arrays (H, W, 3).
        captions: what stands above each; lines are broken where the column ends.
        num_columns: pictures a row.
        cell_width: pixels for each; wider pictures are reduced to it.

    Returns:
        The page (H, W, 3), uint8.

    Raises:
        ValueError: no pictures, not one caption each, or no column.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions, expected as many of each, at least 1")
    if num_columns < 1:
        raise ValueError(f"num_columns is {num_columns}, expected at least 1")
    num_columns = min(num_columns, len(pictures))
    cells = []
    for picture, caption in zip(pictures, captions, strict=True):
        font = text_font([caption], _CAPTION_SIZE)
        pixels = as_picture(picture)
        factor = min(1.0, cell_width / pixels.shape[1])
        size = (max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor)))
        cells.append(
            (Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS), _lines(caption, font, cell_width), font)
        )

    rows = [cells[start : start + num_columns] for start in range(0, len(cells), num_columns)]
    caption_heights = [max(len(lines) for _, lines, _ in row) * _CAPTION_LINE for row in rows]
    row_heights = [
        caption + max(image.height for image, *_ in row) for caption, row in zip(caption_heights, rows, strict=True)
    ]
    width = num_columns * (cell_width + SHEET_GAP) + SHEET_GAP
    page = Image.new("RGB", (width, sum(row_heights) + 2 * SHEET_GAP * len(rows)), WHITE)
    draw = ImageDraw.Draw(page)
    top = SHEET_GAP
    for row, caption_height, row_height in zip(rows, caption_heights, row_heights, strict=True):
        for column, (image, lines, font) in enumerate(row):
            left = SHEET_GAP + column * (cell_width + SHEET_GAP)
            for number, line in enumerate(lines):
                draw.text((left, top + number * _CAPTION_LINE), line, fill=BLACK, font=font)
            page.paste(image, (left, top + caption_height))
        top += row_height + 2 * SHEET_GAP
    return np.asarray(page).copy()


def _lines(caption: str, font: Font, width: int) -> list[str]:
    """The caption broken between words; a word that is too long is cut into pieces."""
    lines = [""]
    for word in caption.split():
        pieces = math.ceil(font.getlength(word) / width)
        length = math.ceil(len(word) / pieces)
        for start in range(0, len(word), length):
            piece = word[start : start + length]
            longer = f"{lines[-1]} {piece}".strip()
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    return lines
