"""`resnest-det quantize`, from a run or a classifier to the table of what 8 bits cost."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image

from resnest_det.backbones import create_backbone
from resnest_det.build import build_coco_set, build_detector, build_mask_set, build_segmenter
from resnest_det.cli import main, quantize
from resnest_det.cli.quantize import _with_objects
from resnest_det.config import settings_as_data
from resnest_det.data.sample import write_sample_dataset
from resnest_det.engine import save_checkpoint
from tests.random_norms import randomise_norms
from tests.test_predictor import pixels, settings_of


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_sample_dataset(folder, num_train=4, num_val=2)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.fromarray(pixels(60, 80, number)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def write_run(folder: Path, task: str, sample: Path, *overrides: str) -> Path:
    """A run folder with random weights, whose data are the sample's."""
    folder.mkdir()
    torch.manual_seed(1)
    root = sample if task == "det" else sample / "ade20k"
    settings = settings_of(folder, task, f"data.root={root}", *overrides)
    if task == "det":
        coco = build_coco_set(settings.data, "val")
        names, model = coco.class_names, build_detector(settings.model, coco.num_classes)
    else:
        masks = build_mask_set(settings.data, "val")
        names, model = masks.class_names, build_segmenter(settings.model, masks.num_classes)
    content = {"model": randomise_norms(model).state_dict(), "epoch": 1, "class_names": names}
    save_checkpoint(folder / "best.pt", content | {"settings": settings_as_data(settings)})
    return folder


def run(*arguments: object) -> int:
    return main(["quantize", *map(str, arguments)])


def integer_layers(path: Path) -> int:
    """Convolutions and fully connected layers whose weights are int8."""
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    dequantised = {
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }
    return sum(node.op_type in ("Conv", "Gemm") and node.input[1] in dequantised for node in graph.node)


def numbers(line: str) -> list[float]:
    return [float(text) for text in re.findall(r"-?\d+\.\d+", line)]


@pytest.mark.slow  # docs/quantization.md has a quick one
@pytest.mark.parametrize(
    ("detector", "num_integer", "num_last"),
    # ResNet-18, the pyramid, and the heads, on five levels, but for what gives scores and boxes
    [("faster_rcnn", 20 + 8 + 5 + 2, 2 * 5 + 2), ("retinanet", 20 + 8 + 8 * 5, 2 * 5)],
)
def test_detectors(
    detector: str, num_integer: int, num_last: int, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", "det", sample, f"model.detector={detector}")
    output = tmp_path / "int8.onnx"
    assert run(folder, "--output", output) == 0
    printed = capsys.readouterr()
    assert f"{detector} on resnet18: {num_integer} integer layers; in float32 {num_last} last ones" in printed.err
    assert "; 4 calibration images, minmax" in printed.err
    assert integer_layers(output) == num_integer
    lines = {line.split()[0]: line for line in printed.out.splitlines()}
    assert {"AP", "AP50", "size,", "an", "cosine"} <= lines.keys()
    before, after, change = numbers(lines["AP"])
    assert after - before == pytest.approx(change, abs=1.01e-4)
    assert numbers(lines["cosine"])[1] > 0.98
    assert printed.out.splitlines()[-1] == str(output)


def test_a_detector_is_checked_on_images_with_objects() -> None:
    class Lamp(torch.nn.Module):
        num_seen = 0

        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            self.num_seen += len(images)
            return [{"boxes": torch.zeros(int(image.max()), 4)} for image in images]

    dark, bright = torch.zeros(3, 8, 8), [torch.full((3, 8, 8), float(number)) for number in range(1, 7)]
    lamp = Lamp()
    assert _with_objects(lamp, [dark, bright[0], dark, *bright[1:]]) == bright[:4]
    assert lamp.num_seen == 6  # and no further
    assert _with_objects(lamp, bright[:2]) == bright[:2]
    assert _with_objects(lamp, [dark, dark.clone()]) == [dark]


def test_the_float32_file_is_checked_on_several_images(
    sample: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def refuse(*_: object, checks: list[torch.Tensor], **_more: object) -> None:
        seen.extend(tuple(images.shape) for images in checks)
        raise ValueError("seen")

    monkeypatch.setattr(quantize, "export_onnx", refuse)
    folder = write_run(tmp_path / "run", "seg", sample)
    assert run(folder, "--output", tmp_path / "int8.onnx", "--calibration", photos, "--no-evaluation") == 2
    assert [shape[0] for shape in seen] == [1, 1, 1, 2]
    assert seen[3][2:] != seen[0][2:]


def test_a_segmentation_model(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = shutil.copytree(sample, tmp_path / "then")
    folder = write_run(tmp_path / "run", "seg", moved)
    root = moved.rename(tmp_path / "now") / "ade20k"
    output = tmp_path / "int8.onnx"
    assert run(folder, "--output", output, "--data", root, "--num-images", 3, "--method", "percentile") == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("deeplabv3plus on resnet18: ")
    assert "1 last ones and 1 over pooled features; 3 calibration images, percentile" in printed.err
    assert integer_layers(output) > 25
    lines = {line.split()[0]: line for line in printed.out.splitlines()}
    before, after, change = numbers(lines["mIoU"])
    assert after - before == pytest.approx(change, abs=1.01e-4)
    assert numbers(lines["cosine"])[1] > 0.98
    properties = {entry.key: entry.value for entry in onnx.load(output).metadata_props}
    assert properties["model"] == "deeplabv3plus on resnet18"
    assert properties["weights"] == "best.pt"
    assert json.loads(properties["class_names"])["0"] == "disc"
    assert properties["quantization"] == "int8, percentile over 3 images"
    assert "checks" not in properties


def test_without_the_runs_data(sample: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(sample, moved)
    folder = write_run(tmp_path / "run", "seg", moved)
    moved.rename(tmp_path / "elsewhere")
    output = tmp_path / "int8.onnx"
    assert run(folder, "--output", output) == 2
    assert f"error: the class list {moved}/ade20k/classes.txt does not exist" in capsys.readouterr().err
    assert run(folder, "--output", output, "--calibration", photos, "--no-evaluation") == 0
    printed = capsys.readouterr()
    assert "3 calibration images" in printed.err
    assert "mIoU" not in printed.out


def test_a_classifier(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(randomise_norms(create_backbone("resnest14", num_classes=7)).state_dict(), weights)
    output = tmp_path / "int8.onnx"
    words = ("--backbone", "resnest14", "--weights", weights, "--calibration", photos, "--output", output)
    assert run(*words, "--size", 64) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("resnest14: 27 integer layers; in float32 1 last ones and 8 over pooled features; 3 ")
    assert numbers(printed.out.splitlines()[-2])[1] > 0.999
    assert integer_layers(output) == 27  # the stem's 3, 4 blocks of 2 + 2 + 1, 4 shortcuts
    groups = [
        attribute.i
        for node in onnx.load(output).graph.node
        for attribute in node.attribute
        if attribute.name == "group"
    ]
    assert set(groups) == {1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a run or checkpoint, or --backbone and --weights for a classifier: one of the two"),
        (["RUN", "--backbone", "resnest14"], "give a run or checkpoint, or --backbone and --weights"),
        (["RUN", "--num-images", "0"], "--num-images is 0, expected at least 1"),
        (["RUN", "--output", "model.pt"], "the file model.pt must end in .onnx"),
        (["RUN", "--output", "nowhere/model.onnx"], "there is no folder nowhere for the file model.onnx; create it"),
        (["--backbone", "resnest14", "--weights", "W"], "--backbone needs --weights, and images to calibrate by"),
        (["RUN", "--size", "64"], "--size is for --backbone; leave it out"),
        (
            ["--backbone", "resnest14", "--weights", "W", "--calibration", "C", "--data", "D"],
            "--data is for a run or checkpoint; leave it out",
        ),
        (["RUN", "--size", "0"], "--size is 0, expected at least 1"),
        (
            ["RUN", "--data", "D", "--calibration", "C", "--no-evaluation"],
            "--data is D, and with --calibration and --no-evaluation none of the run's data are read; leave one of",
        ),
        (["SAMPLE_RUN", "--data", "D"], "--data is D, and the run's data are the generated ones, which are made"),
        (["nowhere"], "there is no run folder or checkpoint nowhere"),
        (["RUN", "--calibration", "nowhere"], "there is no image or folder nowhere"),
    ],
)
def test_mistakes(
    words: list[str],
    message: str,
    sample: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "RUN" in words:
        write_run(tmp_path / "RUN", "seg", sample)
    if "SAMPLE_RUN" in words:
        write_run(tmp_path / "SAMPLE_RUN", "seg", sample, "data.sample.num_train=4", "data.sample.num_val=2")
    assert run("--output", "int8.onnx", *words) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "int8.onnx").exists()


def test_a_run_that_is_evaluated_otherwise(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", "det", sample, "eval.flip=true")
    assert run(folder, "--output", tmp_path / "int8.onnx") == 2
    assert "error: the run is evaluated at several sizes, mirrored or in tiles" in capsys.readouterr().err
