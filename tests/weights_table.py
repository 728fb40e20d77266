"""Writes the table of docs/weights.md from resnest_det/backbones/published.py: python -m tests.weights_table."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from resnest_det.backbones.published import PUBLISHED, PublishedWeights, list_weights

PAGE = Path(__file__).parents[1] / "docs" / "weights.md"
BEGIN = "<!-- begin: written by python -m tests.weights_table -->"
END = "<!-- end -->"


def row(entry: PublishedWeights) -> str:
    test = entry.preprocessing
    page = urlsplit(entry.page)
    publisher = "/".join(page.path.split("/")[1:3]) if page.hostname == "github.com" else page.hostname
    addresses = {0: "by hand", 1: "1 address"}.get(len(entry.urls), f"{len(entry.urls)} addresses")
    cells = (
        f"`{entry.network}/{entry.name}`",
        entry.data,
        f"{entry.metric} {round(entry.value, 2):g}",
        f"{test.crop} of {test.resize}, {test.interpolation}" if test else "",
        f"`{entry.sha256}`" if entry.sha256 else "",
        entry.licence,
        f"[{publisher}]({entry.page}), {addresses}",
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The table in Markdown, a network's files together, networks in the order of PUBLISHED."""
    networks = dict.fromkeys(entry.network for entry in PUBLISHED)
    rows = [row(entry) for network in networks for entry in list_weights(network)]
    head = "| weights | trained on | published result | tested at | SHA-256 | licence | published at |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def with_table(text: str) -> str:
    """The page's text with the table between its markers written anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
