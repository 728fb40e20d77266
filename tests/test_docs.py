"""README and docs: their code runs, their links lead somewhere, and their tables are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from resnest_det import list_backbones

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where an example writes its files
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks or page.name != "README.md"
    for block in blocks:
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_readme_names_every_network() -> None:
    text = (REPOSITORY / "README.md").read_text()
    names = set(re.findall(r"\b(?:resnet|resnext|resnest)\d\w*", text))
    names |= {f"resnest50_fast{tail}" for tail in re.findall(r"(?<=\s)_\ds\dx\d\dd", text)}
    assert set(list_backbones()) <= names


def test_targets_of_the_makefile_that_the_readme_names() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"make ([a-z][a-z-]*)", page.read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
