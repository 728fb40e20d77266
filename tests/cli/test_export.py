"""The command export: what it writes of runs and backbones, how it says what it checked, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from resnest_det import create_backbone
from resnest_det.cli import main
from resnest_det.cli.export import _checks
from resnest_det.data.sample import write_sample_dataset
from resnest_det.predictor import Predictor
from tests.test_predictor import GROUNDS, NAMES, pixels, write_run


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose validation set is there."""
    folder = tmp_path_factory.mktemp("runs") / "detector"
    write_sample_dataset(folder, num_train=1, num_val=2)
    return write_run(folder, "det")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose validation set is not there."""
    return write_run(tmp_path_factory.mktemp("segmenter"), "seg")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnest14.pth"
    torch.save(create_backbone("resnest14", num_classes=3).state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.fromarray(pixels(60 + number, 80, number)).save(folder / f"{number}.png")
    return folder


def run(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def read_metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_a_detector(detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "det.onnx"
    assert run(detector, "--output", path, "--uint8", "--score-threshold", 0.3) == 0
    printed = capsys.readouterr()
    assert printed.err == "faster_rcnn on resnet18, 3 classes; checked on 2 images of the run's validation set\n"
    lines = printed.out.splitlines()
    assert len(lines) == 5  # the two images, the first one turned and stretched, and the file
    for line in lines[:4]:
        assert re.fullmatch(r"3x\d+x\d+: \d+ detections; largest differences: boxes \S+, scores \S+", line), line
    assert lines[-1].startswith(f"{path}, ")

    metadata = read_metadata(path)
    assert metadata["task"] == "detection"
    assert metadata["model"] == "faster_rcnn on resnet18"
    assert json.loads(metadata["class_names"]) == {str(label): name for label, name in NAMES.items()}
    assert json.loads(metadata["image_mean"]) == [0.485, 0.456, 0.406]
    assert metadata["checkpoint"] == "best.pt"
    assert metadata["checkpoint_sha256"] == hashlib.sha256((detector / "best.pt").read_bytes()).hexdigest()

    image = pixels(75, 90)
    expected = Predictor.from_checkpoint(detector, score_threshold=0.3, device="cpu")(image)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    boxes, labels, scores = session.run(None, {"image": image.transpose(2, 0, 1)})
    assert 0 < len(boxes) < 20
    np.testing.assert_allclose(boxes, expected["boxes"], atol=1e-3)
    np.testing.assert_array_equal(labels, expected["labels"])
    np.testing.assert_allclose(scores, expected["scores"], atol=1e-5)
    assert scores.min() >= 0.3


def test_a_detector_is_checked_at_other_sizes_of_square_images() -> None:
    square = torch.zeros(3, 64, 64, dtype=torch.uint8)
    (image,), *others = _checks([square], "detection", None, as_bytes=False)
    assert image.shape == square.shape
    assert any(other.shape[1] != 64 != other.shape[2] for (other,) in others)


def test_a_segmentation_model(segmenter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "seg.onnx"
    assert run(segmenter / "best.pt", "--output", path, "--opset", 18) == 0
    printed = capsys.readouterr()
    missing = "checked on generated scenes, as the run's validation set is not here: the class list .* does not exist"
    assert re.search(missing, printed.err)
    shapes = re.findall(r"^(\d+)x3x(\d+)x(\d+): largest differences: out \S+$", printed.out, re.MULTILINE)
    assert [shape[0] for shape in shapes] == ["1", "5"]
    assert shapes[0][1:] != shapes[1][1:]
    metadata = read_metadata(path)
    assert metadata["opset"] == "18"
    assert json.loads(metadata["class_names"]) == {str(label): name for label, name in GROUNDS.items()}


def test_images_that_are_named(
    segmenter: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(segmenter, "--output", tmp_path / "seg.onnx", "--images", photos, "--fixed-size", 48, 64) == 0
    printed = capsys.readouterr()
    assert printed.err.endswith(f"checked on 4 images of {photos}\n")
    assert re.findall(r"^\S+:", printed.out, re.MULTILINE) == ["1x3x48x64:"] * 4


@pytest.mark.parametrize("broken", ["annotations", "image", "no image"])
def test_a_broken_validation_set(broken: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sample_dataset(tmp_path / "run", num_train=1, num_val=2)
    folder = write_run(tmp_path / "run", "det")
    if broken == "annotations":
        (folder / "annotations" / "instances_val.json").write_text('{"images": [')
        message = r"is broken: .*instances_val\.json.*JSON"
    else:
        (image, *_) = sorted((folder / "val").iterdir())
        if broken == "image":
            image.write_bytes(image.read_bytes()[:100])
        else:
            image.unlink()
        message = rf"is broken: .*{re.escape(image.name)}"
    output = tmp_path / "det.onnx"
    assert run(folder, "--output", output) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed)
    assert "Mend it, or name other images by --images" in printed
    assert not output.exists()
    assert run(folder, "--output", output, "--images", photos) == 0


def test_a_backbone(weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    assert run("--backbone", "resnest14", "--weights", weights, "--output", path, "--images", photos) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("resnest14, 3 classes; ")
    assert re.findall(r"^(\S+): largest differences: logits", printed.out, re.MULTILINE) == [
        "1x3x224x224",
        "5x3x256x321",
    ]
    metadata = read_metadata(path)
    assert metadata["task"] == "classification"
    assert metadata["weights"] == "resnest14.pth"
    assert metadata["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_features_as_a_program(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stages.pt2"
    words = ["--backbone", "resnest14", "--weights", weights, "--features", "layer4", "layer1"]
    assert run(*words, "--output", path, "--fixed-size", 64, 64) == 0
    assert "1x3x64x64: largest differences: layer1 " in capsys.readouterr().out
    features = torch.export.load(path).module()(torch.rand(1, 3, 64, 64))
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "layer1": (1, 256, 16, 16),
        "layer4": (1, 2048, 2, 2),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--output", "det.pb"], "det.pb ends in neither .onnx nor .pt2"),
        (["RUN", "--output", "det.pt2", "--format", "onnx"], "det.pt2 must end in .onnx for --format onnx"),
        (["RUN", "--output", "det.pt2"], "is a detector, which torch.export does not take"),
        (["RUN", "--output", "nowhere/det.onnx"], "there is no folder nowhere"),
        (["RUN", "--output", "det.onnx", "--weights", "imagenet"], "--weights is for --backbone, and a checkpoint has"),
        (["RUN", "--output", "det.onnx", "--features", "layer4"], "--features is for --backbone, and a checkpoint's"),
        (
            ["RUN", "--output", "det.onnx", "--backbone", "resnet18"],
            "--backbone resnet18 are named; export one of them",
        ),
        (["RUN", "--output", "det.onnx", "--opset", "9"], "opset=9 must be 16 to 20"),
        (["RUN", "--output", "det.onnx", "--fixed-size", "0", "64"], "--fixed-size is 0 64"),
        (["RUN", "--output", "det.onnx", "--images", "none.jpg"], "there is no image or folder none.jpg"),
        (["--output", "det.onnx"], "there is nothing to export"),
        (["--output", "net.onnx", "--backbone", "resnet18"], "--backbone resnet18 needs --weights"),
        (
            ["--output", "net.onnx", "--backbone", "resnet18", "--weights", "W", "--score-threshold", "0.5"],
            "--score-threshold is for a checkpoint, and --backbone resnet18 is none",
        ),
        (
            ["--output", "net.onnx", "--backbone", "resnet18", "--weights", "W", "--config", "C"],
            "--config is for a checkpoint, and --backbone resnet18 is none; leave it out",
        ),
        (
            ["--output", "net.pt2", "--backbone", "resnet18", "--weights", "W", "--opset", "17"],
            "--opset is ONNX's, and net.pt2 is a program of torch.export; leave it out",
        ),
        (
            ["--output=n.onnx", "--backbone", "resnet18", "--weights", "W", "--features", "layer4", "--classes", "C"],
            "--classes names a classifier's outputs, and --features has none; leave it out",
        ),
        (["nowhere", "--output", "det.onnx"], "there is no run folder or checkpoint nowhere"),
    ],
)
def test_mistakes(
    words: list[str],
    message: str,
    detector: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*(detector if word == "RUN" else word for word in words)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_scores_of_a_segmentation_model(segmenter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(segmenter, "--output", tmp_path / "seg.onnx", "--score-threshold", 0.3) == 2
    assert "score_threshold is 0.3, and a segmentation model gives every pixel a class" in capsys.readouterr().err


def test_a_tolerance_that_no_file_reaches(segmenter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(segmenter, "--output", tmp_path / "seg.onnx", "--tolerance", 1e-12, "--fixed-size", 64, 64) == 2
    assert "more than the tolerance of 1e-12; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
