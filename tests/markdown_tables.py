"""Tables in Markdown that a program writes into a page, between the comments <!-- name --> and <!-- /name -->."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are aligned left or right, by the letters "l" and "r"."""
    rule = ["---:" if side == "r" else "---" for side in alignment]
    return "\n".join(line(cells) for cells in (header, rule, *rows))


def line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def between_markers(page: str, name: str, content: str) -> str:
    """The page with this content between the comments of this name, which must stand in it once."""
    before, after = re.split(rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- /{name} -->)", page, flags=re.DOTALL)
    return before + content + after
