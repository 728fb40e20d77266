"""`resnest-det benchmark`, from its words to its tables and files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnest_det.build import build_detector
from resnest_det.cli import main
from resnest_det.config import DetectionSettings, load_settings, settings_as_data
from resnest_det.deploy import roofline
from resnest_det.engine.checkpoint import save_checkpoint
from tests.tiny_configs import write_detection_config

QUICK = ["--size", "32", "--batch", "2", "--rounds", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def rates_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rates from small matrices: they take most of the time of the shortest benchmark."""
    monkeypatch.setitem(roofline._MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(roofline._COPIED_BYTES, "cpu", 2**16)
    monkeypatch.setattr(roofline, "_CONVOLUTIONS", ((16, 1, 8),))


def rows_of(table: str) -> list[list[str]]:
    """The cells of the rows of a table in Markdown."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def tables_of(text: str) -> list[list[dict[str, str]]]:
    """Every table of a text, as the rows' cells by the name of their column; of equal names the last."""
    blocks = [rows_of(block) for block in text.split("\n\n")]
    return [[dict(zip(rows[0], row, strict=True)) for row in rows[2:]] for rows in blocks if rows]


def test_tables_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["resnest14", "torchvision:resnet18", *QUICK, "--train", "--optimize", "--layers", "3", "--threads", "1"]
    threads = torch.get_num_threads()
    assert main(["benchmark", *words, "--output", str(tmp_path / "out")]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr()
    times, sizes, *layers = tables_of(printed.out)
    rows = [("resnest14", "NCHW"), ("resnest14", "channels_last"), ("resnest14, optimized", "channels_last")]
    rows += [("torchvision:resnet18", "NCHW"), ("torchvision:resnet18", "channels_last")]
    assert [(row["model"], row["layout"]) for row in times] == [(row["model"], row["layout"]) for row in sizes] == rows
    assert times[0]["of the first"] == "1.00"
    assert [row["training step, ms"] == "-" for row in times] == [name.endswith("optimized") for name, _ in rows]
    assert [row["parameters, M"] for row in sizes] == ["10.61", "10.61", "10.61", "11.69", "11.69"]
    assert all(re.fullmatch(r"\d+%", row["reached"]) for row in sizes)
    assert [len(table) for table in layers] == [3] * 5
    assert "torch on 1, float32, images of 32 x 32; medians of 2 interleaved rounds" in printed.out

    assert (tmp_path / "out" / "benchmark.md").read_text() == printed.out
    record = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [(own["name"], own["layout"]) for own in record["models"]] == rows
    assert record["size"] == 32
    for own, row in zip(record["models"], times, strict=True):
        assert len(own["latency"]) == len(own["batch"]) == 2
        assert row["one image, ms"].startswith(f"{1e3 * np.median(own['latency']):.1f} (")
    of_first = np.median(record["models"][4]["batch"]) / np.median(record["models"][0]["batch"])
    assert rows_of(printed.out)[6][5] == f"{of_first:.2f}"
    assert record["machine"]["copy"] > 0
    assert record["modules"]["torchvision:resnet18, NCHW"][0]["kind"] == "Conv2d"
    assert np.asarray(Image.open(tmp_path / "out" / "benchmark.png")).shape[2] == 3


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_detection_config(tmp_path / "config.toml", sample=tmp_path, run=tmp_path)
    settings = load_settings(DetectionSettings, config, [])
    model = build_detector(settings.model, 3)
    content = {"model": model.state_dict(), "class_names": {1: "ant", 2: "bee"}}
    save_checkpoint(tmp_path / "best.pt", content | {"settings": settings_as_data(settings)})
    assert main(["benchmark", str(tmp_path / "best.pt"), *QUICK, "--layout", "NCHW"]) == 0
    times, sizes = tables_of(capsys.readouterr().out)
    assert [row["layout"] for row in times] == ["NCHW"]
    assert sizes[0]["parameters, M"] == f"{sum(own.numel() for own in model.parameters()) / 1e6:.2f}"
    assert "training step, ms" not in times[0]


def test_a_folder_named_as_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("resnet18").mkdir()
    assert main(["benchmark", "resnet18", *QUICK, "--layout", "NCHW"]) == 0
    assert tables_of(capsys.readouterr().out)[1][0]["parameters, M"] == "11.69"
    for name in ("./resnet18", "resnet18/", str(tmp_path / "resnet18")):
        assert main(["benchmark", name, *QUICK]) == 2
        assert "resnet18 is no run folder: it has no config.toml" in capsys.readouterr().err
    Path("resnest51").mkdir()  # no network's name, so that the folder is meant
    assert main(["benchmark", "resnest51", *QUICK]) == 2
    assert "resnest51 is no run folder" in capsys.readouterr().err


def test_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    net, path = torch.nn.Conv2d(3, 4, 1), tmp_path / "net.onnx"
    torch.onnx.export(
        net, (torch.rand(1, 3, 32, 32),), str(path), input_names=["x"], dynamic_axes={"x": {0: "n"}}, dynamo=False
    )
    assert main(["benchmark", "resnet18", str(path), *QUICK, "--layout", "NCHW"]) == 0
    times, sizes = tables_of(capsys.readouterr().out)
    assert times[1]["model"] == str(path)
    assert float(times[1]["of the first"]) > 0
    assert (sizes[1]["parameters, M"], sizes[1]["GMACs"], sizes[1]["reached"]) == ("-", "-", "-")


@pytest.mark.parametrize(
    ("example", "dynamic", "message"),
    [
        (
            torch.rand(1, 3, 32, 32),
            {},
            "takes tensor(float) [1, 3, 32, 32], and does not run on float32 (2, 3, 32, 32)",
        ),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            {0: "n"},
            "takes tensor(uint8) ['n', 3, 32, 32], and does not run on float32 (1, 3, 32, 32)",
        ),
    ],
)
def test_an_onnx_file_of_other_images(
    example: torch.Tensor, dynamic: dict[int, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    net, path = torch.nn.MaxPool2d(1), tmp_path / "net.onnx"
    torch.onnx.export(net, (example,), str(path), input_names=["x"], dynamic_axes={"x": dynamic}, dynamo=False)
    assert main(["benchmark", str(path), *QUICK]) == 2
    assert f"error: {path} {message}; give images that it takes" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["benchmark", "resnet18", *QUICK, "--layout", "NCHW", "--compile", "--optimize", "--train"]
    assert main(words) == 0
    times, _ = tables_of(capsys.readouterr().out)
    assert [row["model"] for row in times] == [
        "resnet18", "resnet18, compiled", "resnet18, optimized", "resnet18, optimized and compiled",
    ]  # fmt: skip
    assert [row["training step, ms"] == "-" for row in times] == [False, False, True, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnest51"], "error: resnest_det has no model 'resnest51'; did you mean 'resnest50'?"),
        (["resnet18", "--size", "0"], "error: --size is 0, expected 1 or more"),
        (["resnet18", "--batch", "-2"], "error: --batch is -2, expected 1 or more"),
        (["resnet18", "--rounds", "0"], "error: --rounds is 0, expected 1 or more"),
        (["resnet18", "--threads", "0"], "error: --threads is 0, expected 1 or more"),
        (["resnet18", "--layers", "-1"], "error: --layers is -1, expected 0 or more"),
        (["resnet18", "--device", "cuda:99"], "error: device 'cuda:99' is not on this machine"),
        (
            ["resnet18", *QUICK, "--optimize", "--dtype", "bfloat16"],
            "error: --dtype is bfloat16, and on the CPU --optimize computes in float32",
        ),
        (
            ["resnet18", "net.onnx", *QUICK, "--dtype", "bfloat16"],
            "error: --dtype is bfloat16, and net.onnx computes in the types that it was written with; leave one",
        ),
        (["net.onnx", "--train"], "error: --train is for models of torch, and net.onnx is an ONNX file; leave it out"),
        (["net.onnx", "--compile"], "error: --compile is for models of torch, and net.onnx is an ONNX file"),
        (["net.onnx", "--optimize"], "error: --optimize is for models of torch, and net.onnx is an ONNX file"),
        (["net.onnx", "other.onnx", "--layers", "3"], "error: --layers is for models of torch, and net.onnx is an"),
        (["net.onnx", "--layout", "both"], "error: --layout is for models of torch, and net.onnx is an ONNX file"),
        (
            ["timm:resnest14d", "net.onnx", "--optimize"],
            "error: --optimize is for models of resnest_det, which timm:resnest14d is not; leave it out",
        ),
        (["none.onnx"], "error: there is no file none.onnx; write it with resnest-det export"),
        (["none.pt"], "error: there is no run folder or checkpoint none.pt"),
        (["./none"], "error: there is no run folder or checkpoint none"),
        (["resnet18", "resnet18", *QUICK], "error: two models are called 'resnet18, NCHW'; name each of them once"),
        (
            ["timm:vit_tiny_patch16_224", *QUICK],
            "error: timm:vit_tiny_patch16_224 does not run on an image of 32 x 32, give another --size: ",
        ),
        (
            ["resnest14", *QUICK, "--train", "--batch", "1"],
            "error: split attention normalises pooled features with BatchNorm, which cannot",
        ),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *words]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert main(["benchmark", "resnet18", "--output", str(tmp_path / "out")]) == 2
    assert f"the output {tmp_path / 'out'} is a file; name a folder" in capsys.readouterr().err
