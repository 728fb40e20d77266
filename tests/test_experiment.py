"""What the scripts share: the report comes last, and costs nothing but itself where it fails."""

from __future__ import annotations

import json
import re
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from resnest_det import create_backbone, experiment
from resnest_det.config import DetectionSettings, load_settings
from resnest_det.experiment import place_model, run_report, run_script
from resnest_det.reports import note_start, write_examples
from tests.reports.pages import read_page
from tests.reports.run_folders import CPU, write_detection_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose report is yet to be written."""
    write_detection_run(tmp_path / "run", tmp_path / "data")
    note_start(tmp_path / "run", CPU)
    return tmp_path / "run"


def test_a_report_is_written_at_the_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_report(run, ["broken.jpg"]):
        assert not (run / "report.html").exists()
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert "broken.jpg" in read_page(run / "report.html").text
    last = json.loads((run / "provenance.json").read_text())[-1]
    assert last["skipped"] == ["broken.jpg"]
    assert last["seconds"] >= 0


def test_the_report_is_of_the_newest_measurement(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "results-2.json").write_text((run / "results.json").read_text())
    with run_report(run, [], suffix="-2"):
        pass
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert "this is measurement 2, of results-2.json" in read_page(run / "report.html").text


def test_a_resumed_run_forgets_the_errors_of_all_processes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnest_det.config import Command, DetectionSettings

    for name in ("error.txt", "error-1.txt", "error-x.txt"):
        (run / name).write_text("ValueError: once")
    monkeypatch.setattr(experiment, "load_last", lambda folder: {})
    monkeypatch.setattr(experiment, "check_class_names", lambda *arguments: None)
    settings = DetectionSettings.model_validate(tomllib.loads((run / "config.toml").read_text()))
    command = Command(settings=settings, config_path=run / "config.toml", resume=run, eval_only=None)
    with experiment.run_folder(command, {}):
        assert [file.name for file in run.glob("error*.txt")] == ["error-x.txt"]


def test_pictures_that_fail_leave_the_rest_of_the_report(run: Path) -> None:
    before = (run / "results.json").read_text()
    (run / "examples.json").unlink()
    sentence = r"best and the worst images could not be written; the results are \(RuntimeError: no memory\)"
    with pytest.warns(UserWarning, match=sentence), run_report(run, []):
        raise RuntimeError("no memory")
    page = read_page(run / "report.html")
    assert page.alternatives == []
    assert "All classes" in page.tables
    assert (run / "results.json").read_text() == before


def test_a_report_that_fails_is_warned_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, *, suffix: str = "") -> Path:
        raise OSError(28, "No space left on device", str(folder / "report.html"))

    monkeypatch.setattr(experiment, "write_run_report", fail)
    sentence = "the report could not be written; the results are .*No space left"
    with pytest.warns(UserWarning, match=sentence), run_report(run, []):
        pass
    assert not (run / "report.html").exists()


def test_an_interruption_is_no_failed_report(run: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_report(run, []):
        raise KeyboardInterrupt


def test_an_evaluation_has_a_provenance_of_its_own(run: Path) -> None:
    (run / "results_best_other.json").write_text((run / "results.json").read_text())
    before = (run / "provenance.json").read_text()
    with run_report(run, [], suffix="_best_other", evaluated_on=torch.device("cpu")):
        pass
    assert (run / "provenance.json").read_text() == before
    (start,) = json.loads((run / "provenance_best_other.json").read_text())
    assert start["device"].startswith("cpu")
    assert "Command" in read_page(run / "report_best_other.html").text


def test_warnings_of_the_script_are_in_the_report(run: Path, tmp_path: Path) -> None:
    """Those from before there was a run folder too, and each once."""
    from resnest_det.config import Command, DetectionSettings

    config = tmp_path / "config.toml"
    config.write_text((run / "config.toml").read_text().replace("poly_power = 0.9", "poly_power = 0.5"))

    def train(command: Command[DetectionSettings], device: torch.device) -> None:
        for _ in range(2):
            warnings.warn("the norms of <few> images", stacklevel=1)
        with run_report(run, []):
            pass

    with pytest.warns(UserWarning, match="optim.poly_power has no effect"):
        status = run_script(
            DetectionSettings,
            [str(config)],
            prog="train_det.py",
            description="",
            default_config=config,
            train=train,
            evaluate_only=lambda *_: None,
        )
    assert status == 0
    noted = json.loads((run / "provenance.json").read_text())[-1]["warnings"]
    assert noted == ["optim.poly_power has no effect with optim.schedule=multistep", "the norms of <few> images"]
    text = read_page(run / "report.html").text
    assert text.count("the norms of <few> images") == 1
    assert warnings.showwarning.__name__ != "note"


def test_examples_are_replaced_when_a_run_is_measured_again(run: Path) -> None:
    from resnest_det.reports import Examples

    write_examples(run, Examples("F1", {"a.png": 0.5}, [], []))
    with run_report(run, []):
        pass
    assert "Of 1 images the mean is 0.500" in read_page(run / "report.html").text


@pytest.mark.parametrize(
    ("override", "device", "message"),
    [
        ("model.norm='bn'", "cpu", "the device is cpu: use run.device=cuda"),
        ("run.compile=true", "cuda", "run.compile=true, which makes kernels itself"),
        ("model.norm='gn'", "cuda", "model.norm=gn, which they do not compute: use model.norm=bn or frozen_bn"),
        ("model.backbone='resnet18'", "cuda", "no split attention"),
    ],
)
def test_triton_where_nothing_would_take_it(override: str, device: str, message: str) -> None:
    settings = load_settings(DetectionSettings, Path("configs/det/sample.toml"), ["run.triton=true", override])
    model = nn.ModuleDict({"backbone": create_backbone(settings.model.backbone)})
    with pytest.raises(ValueError, match=re.escape(message)):
        place_model(model, settings, torch.device(device))
