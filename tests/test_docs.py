"""README and docs: their code runs, their links lead somewhere, and their tables are those of the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from resnest_det import list_backbones
from tests import backbone_table

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where an example writes its files
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks or page.name != "README.md"
    for block in blocks:
        example = ModuleType("example")  # a module that is found by its name, so that classes of a page can be pickled
        monkeypatch.setitem(sys.modules, example.__name__, example)
        exec(compile(block, str(page), "exec"), vars(example))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_tables_of_the_backbones_are_current() -> None:
    page = backbone_table.PAGE.read_text()
    assert page == backbone_table.renewed(page), "python -m tests.backbone_table renews them"
    rows = re.findall(r"^\| (\w+) \| [\d,]+ \|", page, re.MULTILINE)
    assert rows == list_backbones()


@pytest.mark.parametrize("count", backbone_table.PUBLISHED_COUNTS, ids=lambda count: f"{count.network}-{count.source}")
def test_counts_beside_the_published(count: backbone_table.PublishedCount) -> None:
    parameters = backbone_table.num_parameters(count.network) / count.parameter_unit
    macs = backbone_table.num_macs(count.network, count.size) / count.mac_unit
    if count.source in (backbone_table.TORCHVISION, backbone_table.RELEASED_CODE):  # they count as we do
        assert backbone_table.same_digits(count.parameters, parameters) == count.parameters
        assert backbone_table.same_digits(count.macs, macs) == count.macs
    else:  # by other rules, which docs/backbones.md describes with these bounds
        assert -0.005 <= float(count.parameters) / parameters - 1 < 0.005
        bound = 0.014 if count.source == backbone_table.ECANET else 0.01
        assert 0 <= float(count.macs) / macs - 1 < bound


def test_readme_names_every_network() -> None:
    text = (REPOSITORY / "README.md").read_text()
    names = set(re.findall(r"\b(?:se_|sk_|cbam_|eca_)?(?:resnet|resnext|resnest)\d\w*", text))
    names |= {f"resnest50_fast{tail}" for tail in re.findall(r"(?<=\s)_\ds\dx\d\dd", text)}
    assert set(list_backbones()) <= names


def test_targets_of_the_makefile_that_the_readme_names() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"make ([a-z][a-z-]*)", page.read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
