"""Charts as SVG: well formed, without identifiers or colours of their own that a page could not bear."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from resnest_det.visualize import DISTINCT_COLOURS, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def drawn(num_lines: int = 2, *, title: str = "a chart", num_points: int = 4) -> str:
    x = np.arange(num_points)
    lines = {f"line {index}": (x, x * index) for index in range(num_lines)}
    return line_chart(lines, title=title, x_label="$epoch$", y_label="<loss> & more")


def test_an_element_that_takes_the_room_it_is_given() -> None:
    svg = drawn()
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & root.attrib.keys()
    assert root.attrib["aria-label"] == "a chart"
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "$epoch$" in texts  # as written: dollar signs are no formula
    assert "<loss> & more" in texts


def test_the_colours_are_the_pages() -> None:
    svg = drawn(8)
    for index, colour in enumerate(DISTINCT_COLOURS):
        assert f"var(--series-{index}, {colour})" in svg
        assert len(re.findall(colour, svg, re.IGNORECASE)) == svg.count(f"var(--series-{index}, {colour})")
    assert "currentColor" in svg
    assert not re.search("#010203|#040506", svg)
    # The seventh line has the first one's colour, and is dashed.
    strokes = re.findall(r"stroke-dasharray: ([^;]*);[^\"]*var\(--series-0,", svg)
    strokes += re.findall(r"var\(--series-0,[^\"]*stroke-dasharray: ([^;\"]*)", svg)
    assert strokes


def test_two_charts_of_a_page_share_no_identifier() -> None:
    one, other = (set(re.findall(r'id="([^"]*)"', drawn(title=title))) for title in ("one", "other"))
    assert one
    assert not one & other
    assert drawn() == drawn()


def test_nothing_is_loaded() -> None:
    svg = drawn(title='<a title="x">')
    addresses = re.findall(r'href="([^"]*)"|url\(([^)]*)\)', svg)
    assert addresses
    assert all((one or other).startswith("#") for one, other in addresses)
    assert "metadata" not in svg
    assert ElementTree.fromstring(svg).attrib["aria-label"] == '<a title="x">'


def test_one_point_and_gaps() -> None:
    lines = {"one": (np.array([1.0]), np.array([0.5])), "gap": (np.arange(3), np.array([0.1, np.nan, 0.3]))}
    svg = line_chart(lines, title="t", x_label="x", y_label="y", x_limits=(0, None), y_limits=(0, 1))
    assert "nan" not in svg.lower()


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="lines is empty, expected at least one line"):
        line_chart({}, title="t", x_label="x", y_label="y")
    with pytest.raises(ValueError, match=r"the line 'a' has coordinates of shape \(3,\) and \(2,\)"):
        line_chart({"a": (np.arange(3), np.arange(2))}, title="t", x_label="x", y_label="y")
