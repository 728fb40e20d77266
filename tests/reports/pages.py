"""What is in a page, read by the standard library's parser, and what every page must keep to."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

_VOID = {"meta", "img", "br", "link", "input", "hr"}


class PageParser(HTMLParser):
    """Collects a page's elements, pictures, tables and text.

    Attributes:
        references: every address in the page, of whatever attribute.
        alternatives: the alternative text of each picture.
        headings: their levels, in order.
        identifiers: every id.
        tables: by the label of the box that a table stands in, its rows of cells.
        text: all that is shown.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.alternatives: list[str] = []
        self.headings: list[int] = []
        self.identifiers: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._label = ""
        self.feed(page)
        self.close()
        assert self._open == [], "elements that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.references += [values[name] for name in ("src", "href", "xlink:href", "action", "data") if name in values]
        self.references += re.findall(r"url\(([^)]*)\)", values.get("style", "") + values.get("clip-path", ""))
        if "id" in values:
            self.identifiers.append(values["id"])
        if tag == "img":
            self.alternatives.append(values.get("alt", ""))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if values.get("role") == "region":
            self._label = values["aria-label"]
        if tag == "table":
            self.tables[self._label] = []
        if tag == "tr":
            self.tables[self._label].append([])
        if tag in ("td", "th"):
            self.tables[self._label][-1].append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} is closed where it is not open"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            assert "http" not in data
            return
        self.text += data
        if any(tag in self._open for tag in ("td", "th")):
            self.tables[self._label][-1][-1] += data


def read_page(path: Path) -> PageParser:
    """A page, found to need nothing but itself, and to be readable by all."""
    content = path.read_text(encoding="utf-8")
    page = PageParser(content)
    assert content.startswith("<!doctype html>\n<html lang=")
    assert len(content) < 5e6
    for reference in page.references:
        if reference.startswith("data:"):
            kind, _, data = reference.partition(";base64,")
            assert kind in ("data:image/webp", "data:image/jpeg")
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                picture.load()
        else:
            assert reference.startswith("#"), reference
            assert reference[1:] in page.identifiers
    assert all(page.alternatives), "a picture without alternative text"
    assert len(set(page.identifiers)) == len(page.identifiers)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in zip(page.headings, page.headings[1:], strict=False))
    return page
