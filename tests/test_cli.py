from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from resnest_det.cli import main
from resnest_det.data.sample import read_sample_summary


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"resnest-det {version('resnest-det')}\n"


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_sample_writes_and_says_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", str(tmp_path / "sample"), "--train", "3", "--val", "2", "--seed", "4"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    summary = read_sample_summary(tmp_path / "sample")
    assert (summary.num_train, summary.num_val, summary.seed) == (3, 2, 4)
    assert str(tmp_path / "sample") in printed
    assert "images: 3 training, 2 validation (seed 4)" in printed
    assert f"objects: {summary.num_objects}, crowds: {summary.num_crowds}," in printed

    assert main(arguments) == 0  # the very set is there already
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "0"], "error: num_train is 0, expected at least 1"),
        (["--seed", "-5"], "error: seed is -5, expected at least 0"),
    ],
)
def test_value_error_is_printed_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(tmp_path / "sample"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_os_error_is_printed_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["sample", str(tmp_path / "file" / "sample"), "--train", "1", "--val", "1"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert str(tmp_path / "file") in printed
