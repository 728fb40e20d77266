"""The table of docs/weights.md. `python -m tests.weights_table` writes it anew."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from resnest_det.backbones.published import PUBLISHED, PublishedWeights, list_weights
from tests.markdown_tables import between_markers, table

PAGE = Path(__file__).parents[1] / "docs" / "weights.md"


def row(entry: PublishedWeights) -> list[str]:
    test = entry.preprocessing
    page = urlsplit(entry.page)
    publisher = "/".join(page.path.split("/")[1:3]) if page.hostname == "github.com" else page.hostname
    addresses = {0: f"by hand: `{entry.file_name}`", 1: "1 address"}
    return [
        f"`{entry.network}/{entry.name}`",
        entry.data,
        f"{entry.metric} {entry.value:.2f}",
        f"{test.crop} of {test.resize}, {test.interpolation}" if test else "",
        f"`{entry.sha256}`" if entry.sha256 else "",
        entry.licence,
        f"[{publisher}]({entry.page}), {addresses.get(len(entry.urls), f'{len(entry.urls)} addresses')}",
    ]


def weights_table() -> str:
    """One line a file: a network's files together, networks in the order of PUBLISHED."""
    networks = dict.fromkeys(entry.network for entry in PUBLISHED)
    rows = [row(entry) for network in networks for entry in list_weights(network)]
    header = ["weights", "trained on", "published result", "tested at", "SHA-256", "licence", "published at"]
    return table(header, "lllllll", rows)


def renewed(text: str) -> str:
    """The page's text with its table written anew."""
    return between_markers(text, "weights", weights_table())


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
