"""Pages of one file: filled in from templates, everything escaped, pictures and charts within."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"  # where there is no number

_WIDEST = 2000  # pixels of a picture in a page
_MIME_TYPES = {".webp": "image/webp", ".jpg": "image/jpeg"}


def write_page(path: Path, template: str, content: Mapping[str, Any]) -> Path:
    """Write the page that a template in `templates/` makes of the content; an interrupted write leaves the old one.

    Raises:
        jinja2.UndefinedError: the template names what the content does not have.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "difference": difference, "percent": percent, "picture": data_uri}
    page = environment.get_template(template).render(content, version=importlib.metadata.version("resnest-det"))
    return write_whole(path, page)


def write_whole(path: Path, text: str) -> Path:
    """Write a file as UTF-8; an interrupted write leaves the old one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")  # a file's name may be no valid UTF-8
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def is_picture(file: Path) -> bool:
    """Whether a file is there, and can be read as a picture to its end."""
    try:
        with Image.open(file) as picture:
            picture.load()
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        return False
    return True


def number(value: float | None, digits: int = 3) -> str:
    """A result with its digits; a dash for None and for -1, which stands for nothing to measure."""
    if value is None or value == -1:
        return NOTHING
    return f"{value:.{digits}f}".replace("-", MINUS)


def difference(value: float | None, digits: int = 3) -> str:
    """A number with its sign."""
    if value is None:
        return NOTHING
    rounded = round(value, digits) + 0.0  # no minus before a zero
    return f"{rounded:+.{digits}f}".replace("-", MINUS) if rounded else f"{0:.{digits}f}"


def percent(value: float, digits: int = 1) -> str:
    """A share in percent."""
    return f"{value:.{digits}%}"


def duration(seconds: float) -> str:
    """A time in its two largest units, such as "2 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def data_uri(file: Path) -> str:
    """A picture's file as a data: URI; as WebP, and no wider than a screen, unless it is small as it is."""
    kind = _MIME_TYPES.get(file.suffix.lower())
    if kind is None:
        with Image.open(file) as picture:
            image = picture.convert("RGB")
        image.thumbnail((_WIDEST, 2 * _WIDEST), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=85)
        kind, content = "image/webp", stream.getvalue()
    else:
        content = file.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def safe(svg: str) -> Markup:
    """An element that is to stand in a page as it is, such as a chart."""
    return Markup(svg)
