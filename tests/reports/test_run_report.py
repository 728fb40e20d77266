"""A run's report: it says what the folder's files say, needs nothing but itself, and shows what is broken."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnest_det.cli import main
from resnest_det.reports import (
    detection_examples,
    note_end,
    note_start,
    read_run,
    segmentation_examples,
    write_examples,
    write_run_report,
)
from resnest_det.reports.examples import extremes
from resnest_det.reports.page import MINUS, NOTHING, difference, duration, number
from tests.browser import open_page
from tests.reports.pages import PageParser, read_page
from tests.reports.run_folders import (
    CPU,
    NAMES,
    SEGMENT_NAMES,
    SIDE,
    detection_metric,
    detection_set,
    mask_set,
    write_detection_run,
    write_segmentation_run,
)


@pytest.fixture(scope="module")
def detection_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a name that would be markup, if it were not escaped."""
    folder = tmp_path_factory.mktemp("runs") / "a <b>&run"
    write_detection_run(folder, tmp_path_factory.mktemp("data"))
    write_run_report(folder)
    return folder


@pytest.fixture(scope="module")
def segmentation_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "seg"
    write_segmentation_run(folder, tmp_path_factory.mktemp("data"))
    write_run_report(folder)
    return folder


@pytest.fixture
def copied(detection_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(detection_run, tmp_path / "run"))


def test_results_and_classes_are_those_of_the_files(detection_run: Path) -> None:
    page = read_page(detection_run / "report.html")
    written = json.loads((detection_run / "results.json").read_text())
    names, values = page.tables["All classes"]
    assert names == list(written["results"])
    assert values == [number(value) for value in written["results"].values()]
    heads, *rows = page.tables["Results of each class"]
    assert heads == ["class", "AP", "AP50", "APs", "APm", "APl", "AR", "objects"]
    assert [row[0] for row in rows] == list(NAMES.values())
    assert [row[1] for row in rows] == [number(row["AP"]) for row in written["classes"]]
    assert [row[-1] for row in rows] == [str(row["num_boxes"]) for row in written["classes"]] == ["2", "2"]


def test_what_is_drawn_and_counted_is_what_the_files_have(detection_run: Path) -> None:
    page = read_page(detection_run / "report.html")
    errors = json.loads((detection_run / "errors.json").read_text())
    _, *rows = page.tables["Kinds of errors"]
    expected = {**errors["main"], **errors["special"]}
    assert [row[:3] for row in rows] == [
        [name, number(effect["delta_ap"]), str(effect["count"])] for name, effect in expected.items()
    ]
    counts = np.array(json.loads((detection_run / "confusion_matrix.json").read_text())["counts"])
    heads, *rows = page.tables["Confusion matrix"]
    assert heads[1:] == [*NAMES.values(), "background"]
    assert rows[0][1:] == ["100", "", ""]
    assert rows[1][1:] == ["50", "", "50"] == [f"{100 * share:.0f}" if share else "" for share in counts[1] / 2]
    assert "Of 4 objects 2 were found, 1 found as another class and 1 missed" in page.text
    assert "Detections where no object is: 1." in page.text
    assert "Boxes at IoU 0.5: each class" in page.text
    assert page.tables["Most confused classes"][1] == ['a <b>&"bold"', "disc", "1", "50.0%"]
    for epoch_text in ("AP: best 0.300 after epoch 2", "AP50: best 0.300 after epoch 2"):
        assert epoch_text in page.text


def test_names_are_text_and_never_markup(detection_run: Path) -> None:
    content = (detection_run / "report.html").read_text()
    page = PageParser(content)
    assert "<b>&run" not in content
    assert "<u>warning" not in content
    assert "a <u>warning</u>" in page.text
    assert 'a <b>&"bold"' in page.text
    assert "1 image could not be read and was skipped: broken.png" in page.text


def test_settings_and_environment(detection_run: Path) -> None:
    page = read_page(detection_run / "report.html")
    _, *rows = page.tables["Settings that differ from their defaults"]
    changed = {key: (value, default) for key, value, default in rows}
    assert changed["optim.epochs"] == ("2", "12")
    assert changed["data.batch_size"] == ("4", "2")
    assert changed["model.backbone"] == ('"resnet18"', '"resnest50"')
    assert "run.seed" not in changed
    assert (detection_run / "config.toml").read_text().strip() in page.text
    (start,) = json.loads((detection_run / "provenance.json").read_text())
    assert f"torch {torch.__version__}" in page.text
    assert start["command"] in page.text
    assert start["seconds"] >= 0
    assert (start["skipped"], start["warnings"]) == (["broken.png"], ["a <u>warning</u>"])


def test_worst_and_best_images_of_a_detection(detection_run: Path, tmp_path: Path) -> None:
    content = json.loads((detection_run / "examples.json").read_text())
    assert content["images"] == {"one.png": 1.0, "two.png": 0.5, "none.png": 0.0, "last.png": 0.0}
    assert [(example["name"], example["score"]) for example in content["best"]] == [("one.png", 1.0)]
    assert [example["name"] for example in content["worst"]] == ["none.png", "last.png", "two.png"]
    notes = {example["name"]: example["note"] for example in content["worst"]}
    assert notes["two.png"] == "1 found, 1 missed, 1 wrong"
    page = read_page(detection_run / "report.html")
    assert page.alternatives.count("two.png: prediction") == 1
    assert len(page.alternatives) == 8
    assert "the mean is 0.375 and the median 0.250" in page.text
    # What is not certain is neither counted nor drawn.
    dataset = detection_set(tmp_path)
    unsure = detection_examples(detection_metric(dataset, score=0.4), dataset, 3)
    assert unsure.scores == {"one.png": 0.0, "two.png": 0.0, "none.png": 1.0, "last.png": 0.0}
    assert [example.name for example in unsure.best] == ["none.png"]
    assert [example.name for example in unsure.worst] == ["two.png", "one.png"]  # that with more to find first
    blank = unsure.best[0].pictures
    assert np.array_equal(blank["ground truth"], blank["prediction"])


def test_worst_and_best_images_of_a_segmentation(segmentation_run: Path, tmp_path: Path) -> None:
    content = json.loads((segmentation_run / "examples.json").read_text())
    assert content["images"] == {"all.png": 1.0, "half.png": 0.25}  # in the third nothing is labelled
    assert [example["name"] for example in content["worst"]] == ["half.png", "all.png"]
    assert content["worst"][0]["note"] == "50.0% of the pixels wrong"
    assert list(content["legend"]) == ["ground", "<i>thing"]
    page = read_page(segmentation_run / "report.html")
    assert page.alternatives[:3] == ["half.png: image", "half.png: ground truth", "half.png: prediction"]
    dataset = mask_set(tmp_path)
    scores = {"all.png": 0.2, "half.png": 0.9, "unlabelled.png": 0.1}
    empty = segmentation_examples(scores, dataset, lambda image: torch.zeros(SIDE, SIDE), 0)
    assert (empty.worst, empty.best, empty.scores) == ([], [], scores)
    write_examples(tmp_path, segmentation_examples(scores, dataset, lambda _: torch.zeros(SIDE, SIDE), 3), suffix="_x")
    with Image.open(tmp_path / "examples_x" / "best_1_prediction.webp") as picture:
        assert picture.size == (SIDE, SIDE)
    assert json.loads((tmp_path / "examples_x.json").read_text())["best"][0]["name"] == "half.png"


def test_a_segmentation_run(segmentation_run: Path) -> None:
    page = read_page(segmentation_run / "report.html")
    written = json.loads((segmentation_run / "results.json").read_text())
    assert page.tables["All classes"][0] == ["mIoU", "mAcc", "aAcc", "fwIoU"]
    assert page.tables["All classes"][1] == [number(value) for value in written["results"].values()]
    assert page.tables["Results of each class"][0] == ["class", "IoU", "accuracy", "pixels"]
    assert page.tables["Results of each class"][2] == ["<i>thing", "0.000", "0.000", "25.00%"]
    assert "Kinds of errors" not in page.tables


def test_extremes() -> None:
    scores = {"a": 0.5, "b": 0.5, "c": 0.1, "d": 1.0, "e": 1.0}
    assert extremes(scores, 3) == (["c", "a"], ["d"])
    assert extremes(scores, 3, weights={"a": 1, "b": 2, "c": 1, "d": 1, "e": 2}) == (["c", "b"], ["e"])
    assert extremes(scores, 99) == (["c", "a", "b", "d"], ["e"])
    assert extremes({}, 6) == ([], [])


# --- folders that do not hold everything ---


def test_a_run_that_crashed(copied: Path) -> None:
    for name in ("results", "errors", "confusion_matrix", "precision_recall", "examples"):
        (copied / f"{name}.json").unlink()
    for name in ("precision_recall.png",):
        (copied / name).unlink()
    note_start(copied, CPU)
    (copied / "error.txt").write_text("Traceback\n  ...\nValueError: the disk is <full>\n")
    lines = (copied / "metrics.jsonl").read_text()
    (copied / "metrics.jsonl").write_text(lines + '{"kind": "tra')
    assert main(["report", str(copied)]) == 0
    page = read_page(copied / "report.html")
    assert "ValueError: the disk is <full>" in page.text
    assert page.tables["All classes"] == [["AP", "AP50"], ["0.300", "0.300"]]
    assert "Of the best evaluation during training" in page.text
    assert "not known: the run did not end" in page.text
    assert "results.json: the results of the best checkpoint" in page.text
    assert read_run(copied).measured_epoch == 2


def test_what_is_missing_is_said(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "provenance.json").unlink()
    (copied / "config.toml").unlink()
    (copied / "errors.json").write_text("{")
    assert main(["report", str(copied)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(copied / "report.html")
    assert printed[1:] == [
        "  missing: config.toml: no settings",
        "  missing: errors.json cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)): kinds of errors of boxes",
        "  missing: provenance.json: command, versions, device and times",
    ]
    page = read_page(copied / "report.html")
    assert "provenance.json: command, versions" in page.text
    assert "Kinds of errors" not in page.tables
    assert "Settings that differ from their defaults" not in page.tables


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3", '{"a": 1}', "[1]", "[{}]", "null"])
def test_damaged_files_count_as_missing(content: str, copied: Path) -> None:
    names = ["results", "errors", "confusion_matrix", "precision_recall", "examples", "provenance"]
    for name in names:
        (copied / f"{name}.json").write_text(content)
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('3\n{"kind": "train"}\n')
    (copied / "error.txt").write_text("")
    write_run_report(copied)
    run = read_run(copied)
    for name in names:
        allowed = name == "provenance" and content == "[]"
        assert allowed or any(sentence.startswith(f"{name}.json") for sentence in run.missing)
    assert "metrics.jsonl: 2 of its lines are no records" in run.missing
    assert (run.starts, run.examples, run.results) == ([], None, {"AP": 0.3, "AP50": 0.3})
    note_end(copied, skipped=[], warnings=["late"])
    assert read_run(copied).starts == [] if content == "[{}]" else read_run(copied).starts[-1]["warnings"] == ["late"]


@pytest.mark.parametrize(
    ("name", "keys", "value", "mistake"),
    [
        ("provenance", [0, "packages"], None, "start 1 cannot be read (packages: Field required)"),
        ("examples", ["worst", 0, "pictures"], None, "cannot be read (worst.0.pictures: Field required)"),
        ("results", ["classes", 1, "num_boxes"], None, "cannot be read (a class has "),
        ("results", ["classes", 0, "AP"], "high", "cannot be read (a number of the class disc is a string)"),
        ("confusion_matrix", ["counts", 1], [1], "cannot be read (counts is no table of 3 rows of 3 numbers)"),
        ("precision_recall", ["recalls"], [0.5], "cannot be read (precisions is no table of 2 rows of 1 numbers)"),
        ("errors", ["main", "missed"], 3, "cannot be read (main.missed: "),
    ],
)
def test_files_of_another_shape_count_as_missing(
    name: str, keys: list[str | int], value: object, mistake: str, copied: Path
) -> None:
    content = json.loads((copied / f"{name}.json").read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    (copied / f"{name}.json").write_text(json.dumps(content))
    write_run_report(copied)
    (sentence,) = read_run(copied).missing
    assert sentence.startswith(f"{name}.json")
    assert mistake in sentence


def test_pictures_that_are_none_are_left_out(copied: Path) -> None:
    (copied / "precision_recall.json").unlink()
    for name in ("examples/worst_1_prediction.webp", "precision_recall.png"):
        (copied / name).write_bytes(b"no picture")
    write_run_report(copied)
    page = read_page(copied / "report.html")
    assert "none.png: ground truth" in page.alternatives
    assert "none.png: prediction" not in page.alternatives
    assert "examples/worst_1_prediction.webp, or a picture in it" in read_run(copied).missing


def test_a_write_that_fails_leaves_what_was_there(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (copied / "provenance.json").read_text()

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        note_start(copied, CPU)
    assert (copied / "provenance.json").read_text() == before
    assert not list(copied.glob(".*.tmp"))


def test_an_older_run_has_its_curves_as_a_picture(copied: Path) -> None:
    (copied / "precision_recall.json").unlink()
    write_run_report(copied)
    page = read_page(copied / "report.html")
    assert "Curves of precision by recall of each class, and their mean" in page.alternatives
    assert not any("precision_recall" in sentence for sentence in read_run(copied).missing)


def test_settings_of_another_version(copied: Path) -> None:
    text = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(text.replace("[run]\n", "[run]\nold_setting = 3\n"))
    run = read_run(copied)
    assert run.changes is None
    assert run.settings["run.old_setting"] == "3"
    assert "config.toml is of another version: its defaults are not known" in run.missing
    write_run_report(copied)
    assert "old_setting = 3" in read_page(copied / "report.html").text


def test_an_evaluation_by_itself(copied: Path) -> None:
    for name in ("results", "errors", "examples"):
        shutil.copy(copied / f"{name}.json", copied / f"{name}_best_other.json")
    content = json.loads((copied / "results_best_other.json").read_text())
    content["results"]["AP"] = 0.875
    (copied / "results_best_other.json").write_text(json.dumps(content))
    assert main(["report", str(copied)]) == 0
    page = read_page(copied / "report_best_other.html")
    assert "best_other" in page.text
    assert page.tables["All classes"][1][0] == "0.875"
    assert read_page(copied / "report.html").tables["All classes"][1][0] != "0.875"


def test_a_second_measurement_is_the_runs_own(copied: Path) -> None:
    content = json.loads((copied / "results.json").read_text())
    content["results"]["AP"] = 0.875
    (copied / "results-2.json").write_text(json.dumps(content))
    (copied / "error.txt").write_text("ValueError: full")
    note = "Of the best checkpoint, on the validation set. The run was measured again: this is measurement 2, of "
    assert main(["report", str(copied)]) == 0
    for name in ("report.html", "report-2.html"):  # the run's page is of the newest measurement
        page = read_page(copied / name)
        assert page.tables["All classes"][1][0] == "0.875"
        assert note + "results-2.json" in page.text
        assert "The run failed" in page.text
    run = read_run(copied)
    assert (run.suffix, run.measurement, run.measured_epoch) == ("-2", 2, 2)
    (copied / "results_best_other.json").write_text(json.dumps(content))
    assert read_run(copied, suffix="_best_other").measurement is None


def test_errors_of_every_process(copied: Path) -> None:
    (copied / "error.txt").write_bytes(b"RuntimeError: connection \xff closed\n")
    (copied / "error-1.txt").write_text("Traceback\nValueError: the true cause\n")
    (copied / "error-10.txt").write_text(" \n")
    write_run_report(copied)
    text = read_page(copied / "report.html").text
    assert "RuntimeError: connection \N{REPLACEMENT CHARACTER} closed" in text
    assert "error-1.txt: ValueError: the true cause" in text
    assert list(read_run(copied).errors) == ["error.txt", "error-1.txt", "error-10.txt"]


def test_classes_without_objects_are_named_below_the_table(copied: Path) -> None:
    content = json.loads((copied / "results.json").read_text())
    content["classes"][1] |= {"AP": -1.0, "num_boxes": 0}
    (copied / "results.json").write_text(json.dumps(content))
    write_run_report(copied)
    page = read_page(copied / "report.html")
    assert [row[0] for row in page.tables["Results of each class"][1:]] == ["disc"]
    assert 'Not in the data, and in no mean: a <b>&"bold".' in page.text


def test_many_classes_have_their_matrix_as_a_picture(copied: Path) -> None:
    names = [f"class {number}" for number in range(30)]
    counts = np.eye(31, dtype=int)
    counts[3, 5] = 7
    content = {"class_names": [*names, "background"], "counts": counts.tolist()}
    (copied / "confusion_matrix.json").write_text(json.dumps(content))
    write_run_report(copied)
    page = read_page(copied / "report.html")
    assert "Matrix of how often objects of each class were found as each other class" in page.alternatives
    assert page.tables["Most confused classes"][1] == ["class 3", "class 5", "7", "87.5%"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "nothing does not exist; name the folder that a run was written to"),
        (lambda folder: folder.write_text("x"), "nothing is a file, not a run folder"),
        (lambda folder: folder.mkdir(), "nothing is no run folder: it has neither config.toml nor metrics.jsonl"),
    ],
)
def test_no_run_folder(
    make: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "nothing")
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert message in capsys.readouterr().err


def test_an_evaluation_that_is_not_there(copied: Path) -> None:
    message = 'has no results_other.json; give the suffix of an evaluation that is there: "" (the run itself)'
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        write_run_report(copied, suffix="_other")


# --- numbers as text ---


def test_numbers_as_text() -> None:
    assert [number(value) for value in (0.12345, -0.5, 0, -1.0, None)] == [
        "0.123",
        f"{MINUS}0.500",
        "0.000",
        NOTHING,
        NOTHING,
    ]
    assert [difference(value) for value in (0.0123, -0.0123, -0.0001, None)] == [
        "+0.012",
        f"{MINUS}0.012",
        "0.000",
        NOTHING,
    ]
    seconds = (5.4, 65, 3599, 3600 + 5 * 60, 90000)
    assert [duration(value) for value in seconds] == ["5 s", "1 min 05 s", "59 min 59 s", "1 h 05 min", "1 d 01 h"]


# --- as it is seen ---


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_in_a_browser(width: int, task: str, detection_run: Path, segmentation_run: Path) -> None:
    run = detection_run if task == "detection" else segmentation_run
    with open_page(run / "report.html", width=width) as page:
        assert page.console_errors == []
        assert not page.overflows
        assert page.broken_pictures == []
        assert page.num_pictures == (8 if task == "detection" else 6)
        assert "Worst and best images" in page.text
        # A click on a head sorts the classes by it; without scripts the table is as it is.
        first = "return document.querySelector('table.sortable tbody th').textContent"
        click = "document.querySelectorAll('table.sortable th button')[1].click()"
        page.driver.execute_script(click)
        best = page.driver.execute_script(first)
        page.driver.execute_script(click)
        assert {best, page.driver.execute_script(first)} == set(
            NAMES.values() if task == "detection" else SEGMENT_NAMES
        )
