"""README and docs: their code runs, their links lead somewhere, and their tables are those of the code."""

from __future__ import annotations

import re
import sys
from collections.abc import Container, Iterable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from resnest.torch import ablation as released_fast
from resnest.torch import resnest as released

from resnest_det import list_backbones
from tests import backbone_table
from tests.backbone_table import ECANET, PUBLISHED_COUNTS, RELEASED_CODE, TORCHVISION, PublishedCount
from tests.markdown_tables import line

REPOSITORY = Path(__file__).parents[1]
QUICK = {  # networks of every form, in about a quarter of a second each
    "resnet18", "resnet50", "resnest14", "resnest50", "resnest50_fast_1s1x64d", "resnest50_fast_4s2x40d", "se_resnet18",
    "sk_resnet50", "cbam_resnet18", "eca_resnet18",
}  # fmt: skip
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


def slow_but(quick: Container[str], names: Iterable[str]) -> list[object]:
    """The names as parameters of a test, of which only the quick ones run by default."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def counts_of(name: str) -> list[PublishedCount]:
    return [count for count in PUBLISHED_COUNTS if count.network == name]


@pytest.mark.parametrize("name", slow_but(QUICK, list_backbones()))
def test_tables_of_the_backbones_are_current(name: str) -> None:
    lines = backbone_table.PAGE.read_text().splitlines()
    rows = [backbone_table.network_row(name), *map(backbone_table.count_row, counts_of(name))]
    for row in rows:
        assert line(row) in lines, "python -m tests.backbone_table renews them"


def test_tables_of_the_backbones_have_every_line() -> None:
    page = backbone_table.PAGE.read_text()
    assert re.findall(r"^\| (\w+) \| [\d,]+ \|", page, re.MULTILINE) == list_backbones()
    lines = re.findall(r"^\| (\w+) \| (\D+) \| \d{3} \|", page, re.MULTILINE)
    assert lines == [(count.network, count.source) for count in PUBLISHED_COUNTS]


@pytest.mark.slow
def test_tables_of_the_backbones_are_as_written() -> None:
    page = backbone_table.PAGE.read_text()
    assert backbone_table.renewed(page) == page


@pytest.mark.parametrize("name", slow_but(QUICK, dict.fromkeys(count.network for count in PUBLISHED_COUNTS)))
def test_counts_beside_the_published(name: str) -> None:
    for count in counts_of(name):
        parameters = backbone_table.num_parameters(name) / count.parameter_unit
        macs = backbone_table.num_macs(name, count.size) / count.mac_unit
        if count.source in (TORCHVISION, RELEASED_CODE):  # they count as we do
            assert backbone_table.same_digits(count.parameters, parameters) == count.parameters
            assert backbone_table.same_digits(count.macs, macs) == count.macs
        else:  # by other rules, which docs/backbones.md describes with these bounds
            assert -0.005 <= float(count.parameters) / parameters - 1 < 0.005
            low, high = (0.005, 0.014) if count.source == ECANET else (0, 0.01)
            assert low <= float(count.macs) / macs - 1 < high


@pytest.mark.parametrize("name", slow_but(QUICK, list_backbones("resnest")))
def test_counts_equal_those_of_the_released_resnest(name: str) -> None:
    with torch.device("meta"):
        if name in ("resnest14", "resnest26"):  # released for Gluon only
            blocks = [1 if name == "resnest14" else 2] * 4
            arguments = {"radix": 2, "bottleneck_width": 64, "stem_width": 32, "avg_down": True, "avd": True}
            theirs = released.ResNet(released.Bottleneck, blocks, deep_stem=True, **arguments)
        else:
            theirs = getattr(released_fast if "fast" in name else released, name)()
    size = next(count.size for count in counts_of(name))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == backbone_table.num_parameters(name)
    assert backbone_table.count_macs(theirs.eval(), size) == backbone_table.num_macs(name, size)


def test_readme_names_every_network() -> None:
    text = (REPOSITORY / "README.md").read_text()
    names = set(re.findall(r"\b(?:se_|sk_|cbam_|eca_)?(?:resnet|resnext|resnest)\d\w*", text))
    names |= {f"resnest50_fast{tail}" for tail in re.findall(r"(?<=\s)_\ds\dx\d\dd", text)}
    assert set(list_backbones()) <= names


def test_targets_of_the_makefile_that_the_readme_names() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
