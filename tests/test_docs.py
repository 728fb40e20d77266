"""README and docs: their blocks run, their links lead somewhere, and their tables are those of the code."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Container, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from resnest.torch import ablation as released_fast
from resnest.torch import resnest as released

from resnest_det import list_backbones
from resnest_det.config import DetectionSettings, SegmentationSettings, SettingsError, load_settings
from resnest_det.data.coco import read_coco_targets
from resnest_det.engine import Journal
from resnest_det.engine import journal as journal_module
from tests import backbone_table, recipes_table
from tests.backbone_table import ECANET, PUBLISHED_COUNTS, RELEASED_CODE, TORCHVISION, PublishedCount
from tests.documentation import (
    Block,
    Sandbox,
    StandIns,
    in_process,
    line_pattern,
    read_blocks,
    read_commands,
    read_console,
    shapes,
)
from tests.engine import test_journal
from tests.markdown_tables import line

REPOSITORY = Path(__file__).parents[1]
QUICK = {  # networks of every form, in about a quarter of a second each
    "resnet18", "resnet50", "resnest14", "resnest50", "resnest50_fast_1s1x64d", "resnest50_fast_4s2x40d", "se_resnet18",
    "sk_resnet50", "cbam_resnet18", "eca_resnet18",
}  # fmt: skip
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FOR_INSTALLED = ("start", "train_detection", "train_segmentation", "predict", "attention", "doctor", "report")
TRACKERS = ("wandb", "mlflow")  # which docs/journal.md says how to use; they are not installed here


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    return StandIns(tmp_path_factory.mktemp("stand_ins")).make()


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new user's folder, in which everything is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESNEST_DET_CACHE", str(tmp_path / ".cache"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_blocks_run(page: Path, user: Path, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text()
    assert read_blocks(text) or page.name != "README.md"
    printed_besides: dict[Path, Callable[[], str]] = {
        DOCS / "config.md": printed_of_mistakes,
        DOCS / "journal.md": partial(printed_by_the_journal, monkeypatch),
    }
    sandbox = Sandbox(user, stand_ins, resumes="--resume" in text)
    run_page(text, sandbox, monkeypatch, printed_besides.get(page, str))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```sh\nresnest-det configs nothing\n```", "line 1: resnest-det configs nothing ends with 2"),
        ("```sh\nmake coffee\n```", "the Makefile has no target coffee"),
        ("```sh\npip install numpy\n```", "numpy is neither this package nor its wheel"),
        ("```sh\npip install '.[coffee]'\n```", "coffee"),
        ("```sh\ncurl example.org\n```", "how to run curl is not known"),
        ("```console\n$ resnest-det configs sample\nerror: there are two\n```", "not printed: error: there are two"),
        ("```console\n$ resnest-det configs\nerror: none\n```", "line 1: resnest-det configs"),
        ("```sh\nresnest-det configs\n```\n\n```text\ndet/nothing  A b\n```", "line 5: not printed: det/nothing"),
        ("```python\nassert 1 + 1 == 3, 'out of date'\n```", "out of date"),
        ("```toml\n[optim]\nlearning_rate = 1\n```", "did you mean optim.lr"),
        ('```json\n{"images": [], "annotations": [], "categories": []}\n```', "lists no images"),
        ("```rust\nfn main() {}\n```", "nothing is known of blocks of the kind 'rust'"),
        ("```sh\nmake test\n", "a fence is not closed"),
    ],
)
def test_a_page_that_is_wrong(
    page: str, message: str, user: Path, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((AssertionError, ValueError), match=re.escape(message)):
        run_page(page, Sandbox(user, stand_ins), monkeypatch)


def run_page(
    text: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, printed_besides: Callable[[], str] = str
) -> None:
    """Run a page's blocks in their order, then look for what it shows in what they printed.

    Args:
        printed_besides: gives what is printed where a page speaks of what its blocks do not do.
    """
    blocks = read_blocks(text)
    printed = "".join(run(block, sandbox, monkeypatch) for block in blocks) + printed_besides()
    for block in blocks:
        if block.kind == "text":
            check_shown(block.text.splitlines(), printed, sandbox, f"line {block.line}")


def run(block: Block, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> str:
    """Do what a block is for, by its kind; what its commands or its code print."""
    where = f"line {block.line}"
    if block.kind == "sh":
        printed = ""
        for command in read_commands(block.text):
            done = sandbox.run(command)
            assert done.status == 0, f"{where}: {command} ends with {done.status}:\n{done.printed}"
            printed += done.printed
        return printed
    if block.kind == "console":
        for command, shown in read_console(block.text):
            mistaken = any(text.startswith("error:") for text in shown)
            done = sandbox.run(command, mistaken=mistaken)
            assert done.status == (2 if mistaken else 0), f"{where}: {command}\n{done.printed}"
            check_shown(shown, done.printed, sandbox, f"{where}: {command}")
    elif block.kind == "python":

        def example() -> int:
            run_python(sandbox.rewritten(block.text), monkeypatch)
            return 0

        return in_process(example).printed
    elif block.kind == "toml":
        check_settings(sandbox.rewritten(block.text), sandbox.folder)
    elif block.kind == "json":
        check_json(block.text, sandbox.folder)
    else:
        assert block.kind == "text", f"{where}: nothing is known of blocks of the kind {block.kind!r}"
    return ""


def run_python(text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Run an example; what it defines."""
    for tracker in TRACKERS:
        if f"import {tracker}" in text:
            monkeypatch.setitem(sys.modules, tracker, MagicMock())
    example = ModuleType("example")  # a module that is found by its name, so that classes of a page can be pickled
    monkeypatch.setitem(sys.modules, example.__name__, example)
    exec(compile(text, "example", "exec"), vars(example))
    return example


def check_settings(text: str, folder: Path) -> None:
    """An experiment is one of either task. It stays under the name that its first line says, for what comes after."""
    named = re.match(r"# (\S+\.toml)\n", text)
    file = folder / (named[1] if named else "unnamed.toml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    mistakes = []
    for cls in (DetectionSettings, SegmentationSettings):
        try:
            load_settings(cls, file, [] if "root =" in text else ["data.root=x"])
        except SettingsError as error:
            mistakes.append(str(error))
    assert len(mistakes) < 2, "\n".join(mistakes)


def check_json(text: str, folder: Path) -> None:
    """JSON is JSON; and what has the keys of a COCO file is one, masks and all."""
    content = json.loads(text)
    if isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys():
        (folder / "shown.json").write_text(text)
        read_coco_targets(folder / "shown.json", masks=True)


def check_shown(shown: Iterable[str], printed: str, sandbox: Sandbox, where: str) -> None:
    """Each line that a page shows was printed, but for its numbers, or begins with a file that is there."""
    lines = shapes(printed)
    for text in filter(str.strip, shown):
        if not sandbox.has(text.split()[0]):
            pattern = line_pattern(text)
            assert any(map(pattern.fullmatch, lines)), f"{where}: not printed: {text}\nPrinted:\n{printed}"


def printed_of_mistakes() -> str:
    """What docs/config.md's overrides print, of its first experiment with a mistake of its own."""
    experiment = Path("configs/det/example.toml")
    experiment.write_text(experiment.read_text().replace("epochs = 24", "epochs = 0"))
    with pytest.raises(SettingsError) as caught:
        load_settings(DetectionSettings, experiment, ["optim.learning_rate=0.1", "data.keep_empty=yes"])
    return str(caught.value)


def printed_by_the_journal(monkeypatch: pytest.MonkeyPatch) -> str:
    """What docs/journal.md shows of long runs: the line of a minute, the hint on loading, and a profile."""
    clock = test_journal.Clock()
    monkeypatch.setattr(journal_module, "time", clock)
    monkeypatch.setattr(journal_module, "_TABLE_ROWS", 1000)
    monkeypatch.setattr(journal_module, "_peak_memory_mib", lambda: 812.0)
    pixels, weight = torch.rand(2, 4, 8, 8, requires_grad=True), torch.rand(4, 4, 3, 3, requires_grad=True)

    def step(number: int) -> None:
        clock.now += 7
        maps = torch.conv2d(pixels, weight, padding=1)
        torch.nn.functional.batch_norm(maps, None, None, training=True).square().sum().backward()

    folder = Path("runs/sample")
    folder.mkdir(parents=True, exist_ok=True)

    def train() -> int:
        test_journal.train(Journal(folder, profile=True), num_batches=20, wait=clock.passes(5), work=step)
        return 0

    return in_process(train).printed


@pytest.mark.parametrize("tracker", TRACKERS)
def test_trackers_of_the_journal(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks of docs/journal.md, with a stand-in for the tracker that keeps what it is given."""
    blocks = [block.text for block in read_blocks((DOCS / "journal.md").read_text()) if block.kind == "python"]
    (text,) = [text for text in blocks if f"import {tracker}" in text]
    example = run_python(text, monkeypatch)
    stand_in = sys.modules[tracker]
    stand_in.start_run.return_value.info.run_id = "7"
    journal = Journal(tmp_path, hooks=[getattr(example, f"{tracker}_hook")(tmp_path)])
    journal.evaluation({"AP": 0.5}, epoch=1, step=3, seconds=0.25, best=True)
    journal.picture("predictions", np.zeros((2, 2, 3), np.uint8))
    numbers = {"eval/epoch": 1, "eval/seconds": 0.25, "eval/AP": 0.5}
    if tracker == "wandb":
        first, second = stand_in.init.return_value.log.call_args_list
        assert first.args == ({"step": 3} | numbers,)
        assert second.args[0].keys() == {"predictions", "step"}
    else:
        stand_in.log_metrics.assert_called_once_with(numbers, step=3)
        assert stand_in.log_image.call_args.kwargs["key"] == "predictions"
        assert (tmp_path / "mlflow_run").read_text() == "7"


@pytest.mark.slow
@pytest.mark.parametrize("name", FOR_INSTALLED)
def test_commands_run_where_the_package_is_installed(name: str, site: Path, user: Path, stand_ins: StandIns) -> None:
    """Without a clone: `resnest-det` of the wheel, away from the source tree."""
    text = (DOCS / f"{name}.md").read_text()
    sandbox = Sandbox(user, stand_ins, resumes="--resume" in text, site=site)
    num_commands = 0
    for block in read_blocks(text):
        if block.kind == "toml":
            check_settings(sandbox.rewritten(block.text), user)
        for command in read_commands(block.text) if block.kind == "sh" else []:
            if "resnest-det" in command.split()[0]:
                num_commands += 1
                done = sandbox.run(command)
                assert done.status == 0, f"line {block.line}: {command}\n{done.printed}"
    assert num_commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        if not target.startswith("http"):
            there = page.parent / target if target else page
            assert there.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
                assert anchor in map(anchor_of, headings), f"{target}#{anchor}"


def anchor_of(heading: str) -> str:
    """What a heading is linked by."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_tests_that_pages_name_are_there(page: Path) -> None:
    for file, name in re.findall(r"\b(test_\w+\.py)(?:::(test_\w+))?", page.read_text()):
        found = [path.read_text() for path in (REPOSITORY / "tests").rglob(file)]
        assert any(f"def {name}(" in text if name else text for text in found), f"{file}::{name}"


def test_recipes_are_those_of_the_configurations() -> None:
    page = recipes_table.PAGE.read_text()
    assert recipes_table.renewed(page) == page, "python -m tests.recipes_table renews them"


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
