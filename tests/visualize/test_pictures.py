from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.font_manager import FontEntry
from PIL import Image, ImageDraw, ImageFont

from resnest_det.visualize import class_colour, contact_sheet, pictures
from resnest_det.visualize.pictures import text_colour, text_font

GREY = np.full((60, 80, 3), 128, dtype=np.uint8)


def test_colours_are_stable_and_all_different() -> None:
    colours = [class_colour(label) for label in range(200)]
    assert colours == [class_colour(label) for label in range(200)]
    assert len(set(colours)) == 200
    neighbours = np.abs(np.diff(np.array(colours), axis=0)).sum(axis=1)
    assert neighbours.min() > 120


def test_contact_sheet_holds_every_picture() -> None:
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]]
    sizes = [[(30, 40), (30, 40)], [(60, 20), (10, 20)]]
    rows = [
        [np.broadcast_to(np.uint8(colour), (*size, 3)) for colour, size in zip(*row, strict=True)]
        for row in zip(colours, sizes, strict=True)
    ]
    sheet = contact_sheet(rows, column_titles=("left", "right"))
    for row_colours, row_sizes in zip(colours, sizes, strict=True):
        for colour, (height, width) in zip(row_colours, row_sizes, strict=True):
            assert np.count_nonzero((sheet == colour).all(axis=-1)) == height * width
    assert (sheet[0] == 255).all()
    assert (sheet[:, 0] == 255).all()

    captioned = contact_sheet(rows, column_titles=("left", "right"), row_titles=("one", "two"))
    assert captioned.shape[0] > sheet.shape[0]


def test_contact_sheet_refuses() -> None:
    with pytest.raises(ValueError, match=r"rows is empty"):
        contact_sheet([], column_titles=("left",))
    with pytest.raises(ValueError, match=r"row 1 has 1 pictures, expected 2.*\['left', 'right'\]"):
        contact_sheet([[GREY, GREY], [GREY]], column_titles=("left", "right"))
    with pytest.raises(ValueError, match=r"row_titles has 2 titles for 1 rows"):
        contact_sheet([[GREY]], column_titles=("left",), row_titles=("one", "two"))


def test_no_title_of_a_contact_sheet_is_cut_off() -> None:
    def num_dark_pixels(picture: np.ndarray) -> tuple[int, int]:
        """Above and below the column's title."""
        dark = (contact_sheet([[picture]], column_titles=["a long title"], row_titles=["a_file_name_" * 5]) < 64).all(
            -1
        )
        assert not dark[:, :8].any()
        assert not dark[:, -8:].any()
        return np.count_nonzero(dark[:36]), np.count_nonzero(dark[36:])

    narrow, wide = np.full((90, 4, 3), 128, np.uint8), np.full((90, 900, 3), 128, np.uint8)
    assert min(num_dark_pixels(wide)) > 100
    assert num_dark_pixels(narrow)[1] == num_dark_pixels(wide)[1]
    assert num_dark_pixels(narrow)[0] > 100


def contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """WCAG 2.1's, from 1 to 21."""

    def luminance(colour: tuple[int, int, int]) -> float:
        parts = np.array(colour) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_every_colour() -> None:
    colours = [class_colour(label) for label in range(300)]
    colours += [tuple(colour) for colour in np.random.default_rng(0).integers(0, 256, (300, 3)).tolist()]
    for colour in colours:
        chosen = text_colour(colour)
        assert contrast(chosen, colour) > 4.3
        assert contrast(chosen, colour) == max(contrast(pictures.BLACK, colour), contrast(pictures.WHITE, colour))


def glyph(text: str, font: object) -> bytes:
    image = Image.new("L", (40, 40))
    ImageDraw.Draw(image).text((5, 5), text, fill=255, font=font)  # type: ignore[arg-type]
    return image.tobytes()


def test_letters_that_pillows_font_lacks_are_found_in_another() -> None:
    own = ImageFont.load_default(20)
    for letter in "ЖωŁ":  # which DejaVu Sans has, matplotlib's own font
        missing = glyph("\uffff", own)
        assert glyph(letter, text_font([f"a {letter}"], 20)) != missing
    assert glyph("Ж", text_font(["Ж"], 20)) != glyph("Ж", own)
    assert glyph("a", text_font(["a", "b 0.50"], 20)) == glyph("a", own)


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[FontEntry], list[str]], None]]:
    """A function that says which fonts matplotlib has listed, and which there are."""

    def there_are(listed: list[FontEntry], installed: list[str]) -> None:
        monkeypatch.setattr(font_manager.fontManager, "ttflist", listed)
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: installed)
        pictures._font_file.cache_clear()

    yield there_are
    pictures._font_file.cache_clear()


def dejavu(name: str = "DejaVu Sans") -> FontEntry:
    return next(entry for entry in font_manager.fontManager.ttflist if entry.name == name and entry.style == "normal")


def test_letters_that_no_font_has_are_boxes(fonts: Callable[..., None]) -> None:
    fonts([], [])
    assert glyph("Ж", text_font(["Ж"], 20)) == glyph("Ж", ImageFont.load_default(20))


def test_a_font_that_was_removed_is_passed_over(fonts: Callable[..., None]) -> None:
    gone = FontEntry(fname="/nowhere/gone.ttf", name="DejaVu Sans", style="normal", weight=400)
    there = dejavu()
    fonts([gone, there], [])
    assert text_font(["Ж"], 20).path == there.fname  # type: ignore[union-attr]


def test_a_font_that_was_installed_since_matplotlib_looked_is_found(fonts: Callable[..., None]) -> None:
    file = dejavu().fname
    fonts([], [file])
    assert text_font(["Ж"], 20).path == file  # type: ignore[union-attr]


def test_dejavu_comes_first_and_one_font_must_have_all(fonts: Callable[..., None]) -> None:
    sans, mono = dejavu(), dejavu("DejaVu Sans Mono")
    fonts([mono, sans], [])
    assert text_font(["Ж"], 20).path == sans.fname  # type: ignore[union-attr]
    assert glyph("猫", text_font(["Ж", "猫"], 20)) == glyph("猫", ImageFont.load_default(20))


def test_chinese_names_are_written_where_a_font_has_them() -> None:
    font = text_font(["猫"], 20)
    if glyph("猫", font) == glyph("猫", ImageFont.load_default(20)):
        pytest.skip("no font of this machine has Chinese characters")
    assert glyph("猫", font) != glyph("狗", font)  # letters, and not boxes
