"""Runs side by side: the numbers are those of the runs, and what cannot be compared is said and not compared."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

from resnest_det.cli import main
from resnest_det.reports import Comparison, compare_runs, write_comparison
from resnest_det.reports.page import NOTHING, number
from tests.browser import open_page
from tests.reports.pages import read_page
from tests.reports.run_folders import NAMES, write_detection_run, write_segmentation_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one experiment, and one seed of another with a higher learning rate and 0.1 more of everything."""
    folder, data = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("data")
    write_detection_run(folder / "base0", data)
    write_detection_run(folder / "base1", data, seed=1, shift=0.02)
    write_detection_run(folder / "higher", data, lr=0.05, shift=0.1, aps=(0.2, 0.6, 0.5))
    write_segmentation_run(folder / "seg", tmp_path_factory.mktemp("masks"))
    return folder


def compared(folder: Path, *names: str) -> Comparison:
    return compare_runs([folder / name for name in names])


def measured(folder: Path, name: str) -> dict[str, float]:
    results: dict[str, float] = json.loads((folder / "results.json").read_text())[name]
    return results


def test_differences_are_to_the_first(runs: Path) -> None:
    comparison = compared(runs, "base0", "higher")
    first, second = comparison.experiments
    assert (first.title, second.title) == ("base0", "higher")
    assert {name: spread.mean for name, spread in first.results.items()} == measured(runs / "base0", "results")
    change = comparison.change(second.results["AP"], first.results["AP"])
    assert change == pytest.approx(0.1)
    # Where there was nothing to measure there is no difference.
    assert first.results["APl"].mean == -1
    assert comparison.change(second.results["APl"], first.results["APl"]) is None
    assert comparison.same_data
    assert comparison.notes == []


def test_only_settings_that_differ_are_listed(runs: Path) -> None:
    assert compared(runs, "base0", "higher").settings == {"optim.epochs": ["2", "3"], "optim.lr": ["0.02", "0.05"]}
    assert compared(runs, "base0", "base1").settings == {}


def test_seeds_are_one_experiment_with_mean_and_spread(runs: Path) -> None:
    comparison = compared(runs, "base0", "higher", "base1")
    seeds, other = comparison.experiments
    assert (seeds.title, other.title) == ("base0 (2 seeds)", "higher")
    aps = [measured(runs / name, "results")["AP"] for name in ("base0", "base1")]
    assert seeds.results["AP"].mean == pytest.approx(statistics.mean(aps))
    assert seeds.results["AP"].deviation == pytest.approx(0.02 / 2**0.5)
    assert other.results["AP"].deviation is None
    assert comparison.change(other.results["AP"], seeds.results["AP"]) == pytest.approx(0.09)
    disc = seeds.classes["boxes"]["disc"]
    assert disc.deviation == pytest.approx(0.02 / 2**0.5)
    lines = comparison.table().splitlines()
    assert lines[1].split()[:4] == ["base0", "(2", "seeds)", number(statistics.mean(aps))]
    assert lines[2].split()[:2] == ["deviation", "0.014"]
    assert lines[4].split()[:2] == ["difference", "+0.090"]


def test_the_table_in_a_terminal(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs / "base0"), str(runs / "higher")]) == 0
    printed = capsys.readouterr().out
    ap = measured(runs / "base0", "results")["AP"]
    rows = [line.split()[:2] for line in printed.splitlines()[:4]]
    assert rows == [["all", "classes"], ["base0", number(ap)], ["higher", number(ap + 0.1)], ["difference", "+0.100"]]
    blocks = printed.strip().split("\n\n")
    assert [block.split("  ")[0] for block in blocks] == [
        "all classes",
        "setting",
        "AP of boxes by class",
        "rise in AP without an error, boxes",
    ]
    assert blocks[1].splitlines()[1].split() == ["optim.lr", "0.02", "0.05"]
    (row,) = [line for line in blocks[2].splitlines() if line.startswith("disc")]
    assert row.endswith("(+0.100)")
    costs = json.loads((runs / "base0" / "errors.json").read_text())["main"]["missed"]["delta_ap"]
    (row,) = [line for line in blocks[3].splitlines() if line.startswith("missed")]
    assert row.split() == ["missed", number(costs), number(costs), "(+0.000)"]


def test_the_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "compare.html"
    arguments = ["compare", *(str(runs / name) for name in ("base0", "base1", "higher")), "--output", str(output)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"page: {output}\n")
    page = read_page(output)
    heads, *rows = page.tables["All classes"]
    assert heads == ["", "base0 (2 seeds)", "higher"]
    cells = {row[0]: [" ".join(cell.split()) for cell in row[1:]] for row in rows}
    mean = statistics.mean(measured(runs / name, "results")["AP"] for name in ("base0", "base1"))
    higher = measured(runs / "higher", "results")["AP"]
    assert cells["AP"] == [f"{number(mean)} ± 0.014", f"{number(higher)} +0.090"]
    assert cells["APl"] == [NOTHING, NOTHING]
    assert page.tables["Settings that differ"][1:] == [["optim.lr", "0.02", "0.05"], ["optim.epochs", "2", "3"]]
    assert [row[0] for row in page.tables["AP of each class, boxes"][1:]] == list(NAMES.values())
    assert "AP on the validation set, mean of the seeds" in page.text
    assert page.tables["Kinds of errors, boxes"][1][0] == "classification"


def test_segmentations(runs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(runs / "seg", tmp_path / "other")
    content = json.loads((other / "results.json").read_text())
    content["classes"][1]["IoU"] = 0.25
    (other / "results.json").write_text(json.dumps(content))
    change_setting(other, "seed = 0", "seed = 1")
    comparison = compare_runs([runs / "seg", other])
    (experiment,) = comparison.experiments
    assert experiment.classes["classes"]["<i>thing"].mean == 0.125
    assert "IoU by class" in comparison.table()
    write_comparison(tmp_path / "page.html", comparison)
    assert "<i>thing" in read_page(tmp_path / "page.html").text


# --- which runs are seeds of one experiment ---


def change_setting(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.toml").read_text()
    assert text.count(f"\n{old}\n") == 1
    (folder / "config.toml").write_text(text.replace(f"\n{old}\n", f"\n{new}\n"))


def test_where_seeds_ran_does_not_matter(runs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(runs / "base1", tmp_path / "other")
    for key, value in (("num_workers", "7"), ("device", '"cpu"'), ("keep_last", "5")):
        (line,) = [line for line in (other / "config.toml").read_text().splitlines() if line.startswith(f"{key} =")]
        change_setting(other, line, f"{key} = {value}")
    comparison = compare_runs([runs / "base0", other, runs / "higher"])
    assert [experiment.title for experiment in comparison.experiments] == ["base0 (2 seeds)", "higher"]
    assert set(comparison.settings) == {"optim.epochs", "optim.lr"}
    assert comparison.notes == []
    assert "data.num_workers" in compare_runs([runs / "higher", other]).settings


def test_the_same_seed_again_is_no_further_seed(runs: Path, tmp_path: Path) -> None:
    again = shutil.copytree(runs / "base0", tmp_path / "again")
    comparison = compare_runs([runs / "base0", again, runs / "base1"])
    assert [experiment.title for experiment in comparison.experiments] == ["base0 (2 seeds)", "again"]
    assert comparison.notes == [
        f"{again} is no further seed, and stands apart: its settings and its seed, 0, are those of {runs / 'base0'}"
    ]


def test_seeds_of_other_code_or_other_data_stand_apart(runs: Path, tmp_path: Path) -> None:
    code, data = (shutil.copytree(runs / "base1", tmp_path / name) for name in ("code", "data"))
    for folder, commit in ((runs / "base0", "a" * 40), (code, "b" * 40), (data, None)):
        (start,) = json.loads((folder / "provenance.json").read_text())
        folder = shutil.copytree(folder, tmp_path / "base0") if folder == runs / "base0" else folder
        (folder / "provenance.json").write_text(json.dumps([start | {"commit": commit}]))
    content = json.loads((data / "results.json").read_text())
    content["classes"][0]["num_boxes"] = 9
    (data / "results.json").write_text(json.dumps(content))
    comparison = compare_runs([tmp_path / "base0", code, data])
    assert [len(experiment.runs) for experiment in comparison.experiments] == [1, 1, 1]
    reasons = [note.partition("apart: ")[2] for note in comparison.notes[:2]]
    assert reasons == [
        f"its git commit differs from that of {tmp_path / 'base0'}: {'b' * 40} and {'a' * 40}",
        f"its validation set differs from that of {tmp_path / 'base0'}",
    ]


def test_the_newest_measurement_is_compared(runs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(runs / "higher", tmp_path / "other")
    content = json.loads((other / "results.json").read_text())
    content["results"]["AP"] = 0.875
    (other / "results-2.json").write_text(json.dumps(content))
    comparison = compare_runs([runs / "base0", other])
    assert comparison.experiments[1].results["AP"].mean == 0.875
    assert comparison.notes == [f"{other} was measured again: its numbers are those of results-2.json"]


# --- what cannot be compared ---


def test_runs_of_different_tasks(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs / "base0"), str(runs / "seg")]) == 2
    message = capsys.readouterr().err
    assert "runs of different tasks have no result in common" in message
    assert f"{runs / 'base0'} is of detection" in message
    assert f"{runs / 'seg'} is of segmentation" in message


@pytest.mark.parametrize(
    ("key", "value", "what"), [("num_boxes", 9, "other images than"), ("name", "square", "other classes than")]
)
def test_other_data_gives_no_differences(key: str, value: object, what: str, runs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(runs / "higher", tmp_path / "other")
    content = json.loads((other / "results.json").read_text())
    content["classes"][0][key] = value
    (other / "results.json").write_text(json.dumps(content))
    comparison = compare_runs([runs / "base0", other])
    (note,) = comparison.notes
    assert f"{other} was measured on {what} {runs / 'base0'}" in note
    assert not comparison.same_data
    assert "difference " not in comparison.table()
    write_comparison(tmp_path / "page.html", comparison)
    assert note in read_page(tmp_path / "page.html").text


def test_another_way_of_measuring_is_noted(runs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(runs / "higher", tmp_path / "other")
    content = json.loads((other / "results.json").read_text())
    content["settings"]["flip"] = True
    (other / "results.json").write_text(json.dumps(content))
    (note,) = compare_runs([runs / "base0", other]).notes
    assert note == f"{other} was measured in another way than {runs / 'base0'}: eval.flip"


def test_a_run_that_has_not_ended_is_compared_by_its_best_evaluation(runs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(runs / "higher", tmp_path / "other")
    (other / "results.json").unlink()
    comparison = compare_runs([runs / "base0", other])
    assert comparison.experiments[1].results["AP"].mean == 0.6
    assert comparison.notes == [
        f"{other} has no results.json; its numbers are those of its best evaluation in training"
    ]
    (other / "metrics.jsonl").unlink()
    assert compare_runs([runs / "base0", other]).notes == [f"{other} has no results: it was not evaluated yet"]


def test_a_run_that_has_not_ended_on_other_data_has_no_differences(runs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(runs / "higher", tmp_path / "other")
    (other / "results.json").unlink()
    config = other / "config.toml"
    config.write_text(re.sub(r'(?m)^root = ".*"', 'root = "elsewhere"', config.read_text()))
    comparison = compare_runs([runs / "base0", other])
    assert not comparison.same_data
    assert f"what {other} was measured on is not known: no differences are given" in comparison.notes


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["base0"], [], "1 run is given, expected two or more"),
        (["base0", "base0"], [], "base0 is given twice; a run counts once"),
        (["base0", "nowhere"], [], "nowhere does not exist; name the folder that a run was written to"),
        (["base0", "higher"], ["--output", "page.txt"], "--output page.txt is no page; name a file that ends in .html"),
        (["base0", "higher"], ["--output", "none/page.html"], "there is no folder none for the output page.html"),
    ],
)
def test_mistakes(
    names: list[str], options: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *(str(runs / name) for name in names), *options]) == 2
    assert message in capsys.readouterr().err


def test_folders_of_the_same_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(runs / "higher", tmp_path / "elsewhere" / "base0")
    names = [experiment.name for experiment in compare_runs([runs / "base0", other]).experiments]
    assert names == [f"{runs.name}/base0", "elsewhere/base0"]


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(width: int, runs: Path, tmp_path: Path) -> None:
    path = write_comparison(tmp_path / "page.html", compared(runs, "base0", "base1", "higher"))
    with open_page(path, width=width) as page:
        assert page.console_errors == []
        assert not page.overflows
        assert "Settings that differ" in page.text
