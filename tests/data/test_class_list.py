"""read_class_list: one name a line or ADE20K's table, and what is neither."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from resnest_det.data import read_class_list


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "classes.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "wall\nbuilding, edifice\nciel étoilé",
        "wall\r\nbuilding, edifice\r\n ciel étoilé \r\n\r\n",
        "\ufeffwall\nbuilding, edifice\nciel étoilé\n",
        "Idx\tRatio\tTrain\tVal\tName\n1\t0\t0\t0\twall\n2\t0\t0\t0\tbuilding, edifice\n3\t0\t0\t0\tciel étoilé\n",
        "\ufeffIdx\tStuff\tName\n1\t1\twall\n2\t1\tbuilding, edifice\n3\t1\tciel étoilé\n",
        "Name\tIdx\nwall\t1\nbuilding, edifice\t2\nciel étoilé\t3",
    ],
)
def test_names_in_their_order(tmp_path: Path, content: str) -> None:
    assert read_class_list(write(tmp_path, content)) == ["wall", "building, edifice", "ciel étoilé"]


def test_254_names_are_the_most(tmp_path: Path) -> None:
    assert len(read_class_list(str(write(tmp_path, "\n".join(map(str, range(254))))))) == 254


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "classes.txt names no class"),
        ("\n \n", "classes.txt names no class"),
        ("Idx\tName\n", "classes.txt names no class"),
        ("\n".join(map(str, range(255))), "classes.txt names 255 classes; a mask of 8 bits holds at most 254"),
        ("a\n\nb", "classes.txt, line 2 is empty"),
        ("a\nb\nc\nb", "classes.txt, line 4 repeats 'b' of line 2"),
        ("Idx\tName\n1\ta\n2\ta", "classes.txt, line 3 repeats 'a' of line 2"),
        ("Idx\tName\n1\ta\n2\t", "classes.txt, line 3 has 1 columns, but the first line has 2"),
        ("Idx\tName\tVal\n1\ta\t0\n2\t\t0", "classes.txt, line 3 is empty"),
        ("Idx\tName\n0\ta\n1\tb", "classes.txt, line 2 has Idx '0' where 1 is expected"),
        ("Idx\tName\n1\ta\n3\tb", "classes.txt, line 3 has Idx '3' where 2 is expected"),
        ("Idx\tName\n1\ta\nb", "classes.txt, line 3 has 1 columns, but the first line has 2"),
        ("1\twall\n2\tsky", "classes.txt, line 1 has columns separated by tabs"),
        (b"caf\xe9\n", "classes.txt is not UTF-8 text"),
    ],
)
def test_wrong_class_list(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_class_list(write(tmp_path, content))


def test_missing_class_list(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the class list .*none\.txt does not exist"):
        read_class_list(tmp_path / "none.txt")
