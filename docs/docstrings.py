"""The docstrings as the API pages show them: what plain text leaves to the reader's eye, said in Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(
    r"""
    \((?=[^()]*\b[A-Z]\b)[\w'*/+ -]+(,\ [\w'*/+. -]+)+\) | \([A-Z],\)  # a shape: of its dimensions one is a capital
    | __\w+__  # what Markdown would make bold
    | (?=\S*[<*])[\w.<>*-]+(/[\w.<>*-]*[\w>*])+  # the pattern of a path
    """,
    re.VERBOSE,
)
COMMENT = re.compile(r"(?:^|  )# (.+)$")
ITEM = re.compile(r" *(?:-|\d+\.) ")
MARKED = re.compile(r"(`[^`]*`)")


class Docstrings(griffe.Extension):
    """Sets shapes, patterns and names such as __init__ as code, lists as lists, and examples as Python.

    A type or constant of a room, which has no docstring, gets the comment beside it, or the one line above it.
    """

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Make the attribute's comment its docstring."""
        if attr.parent is None or not attr.parent.is_module or attr.path.count(".") < 3 or attr.docstring is not None:
            return
        assert attr.lineno is not None
        assert attr.endlineno is not None
        lines = attr.lines_collection[attr.filepath]
        comment = COMMENT.search(lines[attr.endlineno - 1]) or COMMENT.match(lines[attr.lineno - 2])
        if comment:
            attr.docstring = griffe.Docstring(in_markdown(comment[1]), parent=attr)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = in_markdown(obj.docstring.value)


def in_markdown(docstring: str) -> str:
    """The docstring with backticks around code, an empty line before each list, and "Examples" above its example."""
    lines: list[str] = []
    in_list = False
    for line in docstring.splitlines():
        if ITEM.match(line):
            if lines and lines[-1] and not in_list:
                lines.append("")
            in_list = True
        elif not line:
            in_list = False
        lines.append("Examples:" if line == "Example:" else _with_code(line))
    return "\n".join(lines)


def _with_code(line: str) -> str:
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = MARKED.split(line)  # every second one is code already
    parts[::2] = [CODE.sub(r"`\g<0>`", part) for part in parts[::2]]
    return "".join(parts)
