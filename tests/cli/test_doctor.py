"""`resnest-det doctor`: what it is given, what it prints and writes, and how it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnest_det.cli import main
from resnest_det.data.sample import ensure_sample_dataset
from tests.tiny_configs import write_detection_config, write_segmentation_config


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_sample_dataset(tmp_path_factory.mktemp("data") / "sample", num_train=12, num_val=6, seed=0)


def examined(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """The exit status, and what is printed."""
    status = main(["doctor", *map(str, words), "--workers", "0"])
    return status, capsys.readouterr().out


def broken(sample: Path, folder: Path) -> Path:
    """A copy of the training annotations in which a box has a negative width."""
    document: dict[str, Any] = json.loads((sample / "annotations" / "instances_train.json").read_text())
    document["annotations"][0]["bbox"][2] = -5
    path = folder / "broken.json"
    path.write_text(json.dumps(document))
    return path


def test_a_sound_folder(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = examined(capsys, sample, "--output", tmp_path / "out", "--json", tmp_path / "found.json")
    assert status == 0
    assert "train: " in printed
    assert "12 images, " in printed
    assert "0 errors, 0 warnings, " in printed
    content = json.loads((tmp_path / "found.json").read_text())
    assert content == json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert content["has_errors"] is False
    assert content["splits"]["val"]["images"] == 6
    with Image.open(tmp_path / "out" / "doctor.png") as picture:
        assert picture.width > 1000
    assert printed.endswith(f"findings and pictures: {tmp_path / 'out'}\n")


def test_what_is_examined_is_not_written_over(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "coco"
    shutil.copytree(sample, folder)
    config = write_detection_config(tmp_path / "tiny.toml", sample=folder, run=tmp_path / "run")
    annotations, image = folder / "annotations" / "instances_train.json", folder / "train" / "000001.jpg"
    masks = folder / "ade20k"
    (tmp_path / "link.json").symlink_to(image)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "doctor.json").symlink_to(annotations)
    label = next((masks / "annotations").rglob("*.png"))
    cases = [
        (folder, "--json", annotations),
        (folder, "--json", image),
        (folder, "--json", tmp_path / "link.json"),
        (folder, "--output", tmp_path / "out"),
        (annotations, "--json", annotations),
        (config, "--json", config),
        (config, "--json", annotations),
        (masks, "--json", masks / "classes.txt"),
        (masks, "--json", label),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for data, flag, target in cases:
        assert main(["doctor", str(data), flag, str(target), "--workers", "0"]) == 2
        message = capsys.readouterr().err
        assert f"{flag} would overwrite {target}" in message
        assert "which is examined; name another place" in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for _ in range(2):  # its own files of an earlier call are written anew, in the folder of images too
        status, printed = examined(capsys, folder, "--output", folder / "train", "--json", folder / "found.json")
        assert status == 0, printed


def test_files_are_written_whole_and_first(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    file.write_text("before")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        assert main(["doctor", str(sample), "--fast", "--json", str(file)]) == 2
    assert (file.read_text(), [*tmp_path.iterdir()]) == ("before", [file])

    def refusing(*_: object, **__: object) -> None:
        raise UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed")

    monkeypatch.setattr("builtins.print", refusing)
    with pytest.raises(UnicodeEncodeError):
        main(["doctor", str(sample), "--fast", "--json", str(file), "--output", str(tmp_path / "out")])
    assert json.loads(file.read_text())["has_errors"] is False
    assert (tmp_path / "out" / "doctor.png").is_file()


def test_errors_are_an_exit_status(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = broken(sample, tmp_path)
    status, printed = examined(capsys, file, "--images", sample / "train", "--fast")
    assert status == 1
    assert "error    box-negative" in printed
    assert "bbox has a negative width or height" in printed


def test_the_images_of_a_file_are_found(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = examined(capsys, sample / "annotations" / "instances_train.json")
    assert status == 0
    assert printed.startswith("train: ")


def test_a_detection_configuration(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_detection_config(tmp_path / "tiny.toml", sample=sample, run=tmp_path / "run")
    status, printed = examined(capsys, config)
    assert status == 0
    assert "sizes [8, 16, 32, 64, 128], aspect ratios [0.5, 1.0, 2.0]: best IoU below 0.5 for " in printed
    _, printed = examined(capsys, config, "model.detector=retinanet", "model.anchor_sizes=[8, 9, 10, 11, 12]")
    assert "sizes [8, 9, 10, 11, 12]" in printed
    assert "  as suggested: best IoU below 0.5 for " in printed
    assert "  try: 'model.anchor_sizes=[" in printed
    _, printed = examined(capsys, config, "model.detector=fcos")
    assert "aspect ratios" not in printed
    file = broken(sample, tmp_path)
    status, _ = examined(capsys, config, f"data.train.annotations={file}")
    assert status == 1


def test_a_segmentation_configuration(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_segmentation_config(tmp_path / "tiny.toml", sample=sample / "ade20k", run=tmp_path / "run")
    status, printed = examined(capsys, config)
    assert status == 0
    assert "12 images with masks, 10 classes" in printed


@pytest.mark.parametrize("name", ["det/sample", "seg/sample"])
def test_shipped_configurations_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RESNEST_DET_CACHE", str(tmp_path))
    status, printed = examined(capsys, name, "data.sample.num_train=12", "data.sample.num_val=4")
    assert status == 0
    assert "12 images" in printed


def write_masks(folder: Path) -> None:
    """Two classes, saved as 0 and 1, and a pixel that is neither."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    values = np.zeros((20, 30), np.uint8)
    values[:5], values[10, 10] = 1, 2
    Image.fromarray(values).save(folder / "masks" / "1.png")
    Image.new("RGB", (30, 20)).save(folder / "images" / "1.jpg")


def test_a_folder_of_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_masks(tmp_path)
    assert main(["doctor", str(tmp_path)]) == 2
    assert "holds no list of classes, such as classes.txt; name one with --classes" in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("ground\nobject\n")
    status, printed = examined(capsys, tmp_path)
    assert status == 1
    assert "1.png: the values 2 in 0.2% of the pixels; classes are 0 to 1, 255 is ignored" in printed
    (tmp_path / "more.txt").write_text("ground\nobject\nedge\n")
    assert examined(capsys, tmp_path, "--classes", tmp_path / "more.txt")[0] == 0
    assert examined(capsys, tmp_path, "--ignore-value", "2")[0] == 0
    status, printed = examined(capsys, tmp_path, "--first-class-value", "1", "--ignore-value", "-1")
    assert "classes are 1 to 2, nothing is ignored" in printed
    assert "try: data.ignore_value=0" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["nowhere"],
            "there is no folder or file nowhere, and nowhere is not one of the 31 shipped experiments",
        ),
        (["sample"], "sample is in det and in seg; name det/sample or seg/sample"),
        (["lost.toml"], "there is no config file lost.toml"),
        (["det/sample", "model.ancor_sizes=[1]"], "did you mean model.anchor_sizes?"),
        (["det/sample", "--images", "x"], "--images goes with a folder or an annotation file"),
        (["det/sample", "--first-class-value", "1"], "--first-class-value goes with a folder"),
        (["{folder}", "data.root=x"], "data.root=x overrides a configuration's setting, and {folder} is none"),
        (["{folder}", "--images", "x"], "--images goes with an annotation file, and {folder} is a folder"),
        (["{folder}"], "{folder} holds no data set that is known"),
        (["{folder}", "--workers", "-1"], "--workers is -1, expected at least 0"),
        (["{folder}", "--pictures", "0"], "--pictures is 0, expected at least 1"),
        (["{folder}", "--json", "{folder}/no/a.json"], "there is no folder {folder}/no for a.json"),
        (["{folder}/either.toml"], "either.toml may be for detection or for segmentation"),
    ],
)
def test_mistakes(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "either.toml").write_text('[data]\nroot = "x"\n')
    assert main(["doctor", *(word.format(folder=folder) for word in words)]) == 2
    assert message.format(folder=folder) in capsys.readouterr().err
