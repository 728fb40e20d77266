"""Files that name classes: one name a line, or ADE20K's table."""

from __future__ import annotations

import os
from pathlib import Path

from resnest_det.data.mask_folder import MAX_CLASSES

_INDEX_COLUMN, _NAME_COLUMN = "Idx", "Name"


def read_class_list(path: str | os.PathLike[str]) -> list[str]:
    """The class names of a file, in the order of their values in the masks.

    Args:
        path: UTF-8 text of one name a line; or a table as ADE20K's objectInfo150.txt, whose columns are separated
            by tabs and whose first line holds their titles, Idx (1, 2, ...) and Name among them.

    Returns:
        The names as they stand there, 1 to 254.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no class list; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the class list {path} does not exist; give a text file of one name a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    lines = text.rstrip().splitlines()
    titles = lines[0].split("\t") if lines else []
    is_table = {_INDEX_COLUMN, _NAME_COLUMN} <= set(titles)
    first_line = 2 if is_table else 1
    names = [line.strip() for line in lines]
    if is_table:
        names = _read_table(path, lines, titles)
    elif tabs := [number for number, line in enumerate(lines, start=1) if "\t" in line.strip()]:
        raise ValueError(
            f"{path}, line {tabs[0]} has columns separated by tabs; a table needs a first line with the titles "
            f"{_INDEX_COLUMN} and {_NAME_COLUMN}, a list has one name a line"
        )
    if not names:
        raise ValueError(f"{path} names no class; it should have one name a line")
    if len(names) > MAX_CLASSES:
        raise ValueError(f"{path} names {len(names)} classes; a mask of 8 bits holds at most {MAX_CLASSES}")
    line_of: dict[str, int] = {}
    for number, name in enumerate(names, start=first_line):
        if not name:
            raise ValueError(f"{path}, line {number} is empty; every line names a class, in the order of their values")
        if name in line_of:
            raise ValueError(
                f"{path}, line {number} repeats {name!r} of line {line_of[name]}; every class needs its own name"
            )
        line_of[name] = number
    return names


def _read_table(path: Path, lines: list[str], titles: list[str]) -> list[str]:
    """The column of names, the column of numbers being 1, 2, ..."""
    names = []
    for place, line in enumerate(lines[1:], start=1):
        cells = line.split("\t")
        if len(cells) != len(titles):
            raise ValueError(f"{path}, line {place + 1} has {len(cells)} columns, but the first line has {len(titles)}")
        index = cells[titles.index(_INDEX_COLUMN)].strip()
        if index != str(place):
            raise ValueError(
                f"{path}, line {place + 1} has {_INDEX_COLUMN} {index!r} where {place} is expected; the classes are "
                f"listed in the order of their values, without holes"
            )
        names.append(cells[titles.index(_NAME_COLUMN)].strip())
    return names
