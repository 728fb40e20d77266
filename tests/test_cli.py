from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from resnest_det import create_backbone
from resnest_det.cli import main
from resnest_det.data.sample import read_sample_summary
from tests.tiny_configs import REPOSITORY

CONFIGS = REPOSITORY / "configs"


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


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "four.pth"
    torch.manual_seed(0)
    torch.save(create_backbone("resnet18", num_classes=4).state_dict(), path)
    return str(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two folders, with a picture each and one file that is none."""
    folder = tmp_path / "pictures"
    for name, colour in (("ants/1.png", "brown"), ("bees/2.png", "yellow")):
        (folder / name).parent.mkdir(parents=True)
        Image.new("RGB", (60, 50), colour).save(folder / name)
    (folder / "bees" / "broken.png").write_text("not a picture")
    return folder


SMALL = ["--resize", "40", "--crop", "32"]


def test_classify_a_file(weights: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(pictures / "ants" / "1.png")
    assert main(["classify", file, "--backbone", "resnet18", "--weights", weights, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    first, *classes = printed.out.splitlines()
    assert first == file
    assert sorted(line.split()[-1] for line in classes) == ["0", "1", "2", "3"]  # "class 0" to "class 3"
    assert sum(float(line.split()[0]) for line in classes) == pytest.approx(1, abs=0.002)
    header = f"resnet18, weights {weights}, 4 classes; short side 256 (bilinear), centre 224 x 224; cpu\n"
    assert printed.err == header


def test_classify_a_folder(weights: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    command = ["classify", str(pictures), "--backbone", "resnet18", "--weights", weights, "--device", "cpu", *SMALL]
    command += ["--classes", str(tmp_path / "names.txt"), "--interpolation", "bicubic", "--top-k", "2"]
    assert main(command) == 0
    printed = capsys.readouterr()
    title, *lines = printed.out.splitlines()
    assert title.split() == ["image", "class", "name", "probability", "others"]
    assert [line.split()[0] for line in lines] == [str(pictures / "ants" / "1.png"), str(pictures / "bees" / "2.png")]
    header, skipped, summary = printed.err.splitlines()
    assert header.endswith("4 classes; short side 40 (bicubic), centre 32 x 32; cpu")
    assert skipped.startswith(f"skipped: cannot read the image {pictures / 'bees' / 'broken.png'} (Unidentified")

    assert main([*command, "--output", str(tmp_path / "out.csv")]) == 0
    assert capsys.readouterr().out == ""
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["rank"]) for row in rows] == [(line.split()[0], rank) for line in lines for rank in "12"]
    best = [row for row in rows if row["rank"] == "1"]
    assert [line.split()[1:4] for line in lines] == [
        [row["class_index"], row["class_name"], f"{float(row['probability']):.3f}"] for row in best
    ]
    mean = sum(float(row["probability"]) for row in best) / 2
    num_classes = len({row["class_index"] for row in best})
    assert summary == f"2 images: mean top-1 probability {mean:.3f}; different top-1 classes: {num_classes}"


def test_classify_form_that_is_asked_for(weights: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["classify", str(pictures), "--backbone", "resnet18", "--weights", weights, *SMALL]
    for form, first in (("list", str(pictures)), ("csv", "image,rank,class_index,class_name,probability")):
        assert main([*command, "--format", form]) == 0
        assert capsys.readouterr().out.startswith(first)


@pytest.mark.parametrize("missing", ["--backbone", "--weights"])
def test_classify_needs_a_network_and_weights(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = {"--backbone": "resnet18", "--weights": "imagenet"}
    del command[missing]
    with pytest.raises(SystemExit) as stop:
        main(["classify", "x.png", *(word for pair in command.items() for word in pair)])
    assert stop.value.code == 2
    assert f"the following arguments are required: {missing}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "resnet19"], "backbone 'resnet19' is unknown; did you mean"),
        (["--weights", "imagenet_v9"], "weights='imagenet_v9' is neither"),
        (["--backbone", "resnet34"], "four.pth are not those of this ResNet"),
        (["--top-k", "0"], "top_k is 0, expected 1 to 4"),
        (["--top-k", "5"], "top_k is 5, expected 1 to 4"),
        (["--crop", "0"], "crop is 0 and resize is 256"),
        (["--resize", "200"], "crop is 224 and resize is 200"),
        (["--batch-size", "0"], "batch_size is 0, expected at least 1"),
        (["--device", "tpu"], "device 'tpu' is not a device"),
        (["--classes", "/no such folder/names.txt"], "/no such folder/names.txt do not exist"),
        (["--output", "/no such folder/out.csv"], "there is no folder /no such folder for the output out.csv"),
        (["--output", "/"], "the output / is a folder"),
        (["/no such folder/x.jpg"], "no image or folder /no such folder/x.jpg"),
    ],
)
def test_classify_mistakes_are_messages(
    arguments: list[str], message: str, weights: str, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["classify", str(pictures / "ants"), "--backbone", "resnet18", "--weights", weights, "--device", "cpu"]
    if not arguments[0].startswith("-"):
        command[1] = arguments.pop()
    assert main([*command, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    error = printed.err[printed.err.index("error: ") :]  # the line before it may say what was loaded
    assert message in error


def test_classify_only_broken_pictures(weights: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = str(pictures / "bees" / "broken.png")
    assert main(["classify", broken, "--backbone", "resnet18", "--weights", weights]) == 2
    assert f"error: none of 1 images can be read; the first: cannot read the image {broken}" in capsys.readouterr().err


def test_classify_opens_the_output_before_the_work(
    weights: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    output.symlink_to(tmp_path / "no such folder" / "out.csv")
    monkeypatch.setattr("resnest_det.cli.classify.classify_files", lambda *args, **kwargs: pytest.fail("too early"))
    command = ["classify", str(pictures), "--backbone", "resnet18", "--weights", weights]
    assert main([*command, "--output", str(output)]) == 2
    assert f"No such file or directory: '{output}'" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
def test_classify_a_file_whose_name_is_no_text(
    weights: str, pictures: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(pictures / "ants" / "1.png", name)
    command = ["classify", os.fsdecode(name), "--backbone", "resnet18", "--weights", weights, *SMALL]
    assert main(command) == 0
    assert capsysbinary.readouterr().out.startswith(name + b"\n")
    assert main([*command, "--output", str(tmp_path / "out.txt")]) == 0
    assert (tmp_path / "out.txt").read_bytes().startswith(name + b"\n")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
def test_every_command_writes_a_name_that_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    def say(arguments: Namespace) -> None:
        for stream in (sys.stdout, sys.stderr):
            print(os.fsdecode(b"caf\xe9"), file=stream)

    monkeypatch.setattr("resnest_det.cli.sample._run", say)
    assert main(["sample", str(tmp_path)]) == 0
    assert capsysbinary.readouterr() == (b"caf\xe9\n", b"caf\xe9\n")


@pytest.fixture
def annotations(tmp_path: Path) -> str:
    """A file of two images and three squares, in the categories 4 and 7."""
    images = [{"id": id_, "file_name": f"{id_}.png", "width": 80, "height": 60} for id_ in (1, 2)]
    objects = [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20]},
        {"id": 2, "image_id": 1, "category_id": 4, "bbox": [40, 10, 40, 40]},
        {"id": 3, "image_id": 2, "category_id": 7, "bbox": [10, 30, 20, 20]},
    ]
    for one in objects:
        left, top, width, height = one["bbox"]
        right, bottom = left + width, top + height
        one |= {"segmentation": [[left, top, right, top, right, bottom, left, bottom]], "area": width * height}
    content = {"images": images, "annotations": objects}
    content["categories"] = [{"id": 4, "name": "cat"}, {"id": 7, "name": "dog"}]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def detections(tmp_path: Path) -> str:
    """Both dogs, the second with half of its mask; the cat is found as a dog."""
    found = []
    for image_id, box, rows, score in (
        (1, [10, 10, 20, 20], 20, 0.9),
        (2, [10, 30, 20, 20], 10, 0.8),
        (1, [40, 10, 40, 40], 40, 0.7),
    ):
        mask = np.zeros((60, 80), np.uint8, order="F")
        mask[box[1] : box[1] + rows, box[0] : box[0] + box[2]] = 1
        counts = coco_mask.encode(mask)["counts"].decode()
        segmentation = {"size": [60, 80], "counts": counts}
        found.append(
            {"image_id": image_id, "category_id": 7, "bbox": box, "segmentation": segmentation, "score": score}
        )
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found))
    return str(path)


def test_evaluate_prints_the_table_and_the_errors(
    annotations: str, detections: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--annotations", annotations, "--results", detections]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("boxes, by pycocotools\n      AP    AP50")
    assert "    1 cat    0.000  0.000      -  0.000      -  0.000      1\n" in printed
    assert "    2 dog    1.000  1.000  1.000      -      -  1.000      2\n" in printed
    assert "masks" not in printed
    assert "AP of boxes at IoU 0.5: 0.5000" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("classification"))
    assert line.split()[:3] == ["classification", "0.5000", "1"]


def test_evaluate_writes_numbers_and_pictures(
    annotations: str, detections: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "folder"
    command = ["evaluate", "--annotations", annotations, "--results", detections, "--masks", "--output", str(output)]
    assert main([*command, "--max-detections", "1", "5"]) == 0
    printed = capsys.readouterr().out
    assert "masks, by pycocotools" in printed
    assert printed.index("AP of boxes at IoU 0.5") < printed.index("AP of masks at IoU 0.5")
    assert printed.endswith(f"results and pictures: {output}\n")
    written = json.loads((output / "results.json").read_text())
    settings = {"annotations": annotations, "detections": detections, "backend": "pycocotools"}
    assert written["settings"] == settings | {"max_detections": [1, 5], "area_ranges": [1024, 9216]}
    results = written["results"]
    assert [results[name] for name in ("AP", "mask_AP50", "AR5", "mask_AR5")] == pytest.approx([0.5, 0.5, 0.5, 0.275])
    assert [row["name"] for row in written["mask_classes"]] == ["cat", "dog"]
    assert [row["AP"] for row in written["classes"]] == pytest.approx([0, 1])
    assert json.loads((output / "errors_masks.json").read_text())["main"]["localisation"]["count"] == 0
    pictures = {path.name for path in output.glob("*.png")}
    names = ("precision_recall", "confusion_matrix", "errors")
    assert pictures == {f"{name}{suffix}.png" for name in names for suffix in ("", "_masks")}


def test_evaluate_spares_the_folder_of_a_run(
    annotations: str, detections: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").touch()
    command = ["evaluate", "--annotations", annotations, "--results", detections, "--output", str(tmp_path)]
    assert main(command) == 2
    assert "is the folder of a run, which has a results.json; name another folder" in capsys.readouterr().err


def test_evaluate_with_other_areas(annotations: str, detections: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--annotations", annotations, "--results", detections]
    assert main([*command, "--area-ranges", "1", "1e9"]) == 0
    header, row = capsys.readouterr().out.splitlines()[1:3]
    assert dict(zip(header.split(), row.split(), strict=True))["APl"] == "-"


def test_evaluate_needs_objects(annotations: str, detections: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(Path(annotations).read_text()) | {"annotations": []}
    Path(annotations).write_text(json.dumps(content))
    assert main(["evaluate", "--annotations", annotations, "--results", detections]) == 2
    printed = capsys.readouterr()
    assert (
        printed.err == f"error: {annotations} has no object to find; give annotations with other than crowd regions\n"
    )
    assert printed.out == ""


def test_evaluate_needs_no_images(annotations: str, detections: str, tmp_path: Path) -> None:
    assert not list(tmp_path.glob("**/*.png"))
    assert main(["evaluate", "--annotations", annotations, "--results", detections]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "coco"], "backend='coco' is unknown; use one of 'pycocotools', 'hotcoco'"),
        (["--max-detections", "10", "1"], "max_detections is [10, 1]"),
        (["--annotations", "/no such folder/a.json"], "the annotation file /no such folder/a.json does not exist"),
        (["--results", "/no such folder/b.json"], "the file of results /no such folder/b.json does not exist"),
    ],
)
def test_evaluate_mistakes_are_messages(
    arguments: list[str], message: str, annotations: str, detections: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--annotations", annotations, "--results", detections, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {message}")


@pytest.mark.parametrize("name", ["results.json", "errors_masks.json"])
@pytest.mark.parametrize("given", [0, 1])
def test_evaluate_never_replaces_what_it_reads(
    given: int, name: str, annotations: str, detections: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [annotations, detections]
    files[given] = str(shutil.move(files[given], tmp_path / name))
    before = Path(files[given]).read_bytes()
    assert main(["evaluate", "--annotations", files[0], "--results", files[1], "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --output {tmp_path} would replace {files[given]}; name another folder\n"
    assert Path(files[given]).read_bytes() == before


def test_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^det/bccd +Blood cells", listed, re.MULTILINE)
    assert len(listed.splitlines()) == len(list(CONFIGS.glob("*/*.toml")))
    for name in ("bccd", "det/bccd"):
        assert main(["configs", name]) == 0
        assert (CONFIGS / "det" / "bccd.toml").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bcd", "bcd is not one of the 31 shipped experiments; did you mean bccd?"),
        ("yolo", "yolo is not one of the 31 shipped experiments; resnest-det configs lists them"),
        ("sample", "sample is in det and in seg; name det/sample"),
    ],
)
def test_mistaken_name_of_a_configuration(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", name]) == 2
    assert message in capsys.readouterr().err


def test_training_commands_are_the_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train-det", "bccd", "data.root=cells", "--print-config"])
    printed = capsys.readouterr().out
    assert 'root = "cells"' in printed
    assert 'dir = "runs/bccd"' in printed
    assert main(["train-seg", "deeplabv3plus_resnest5"]) == 2
    assert "did you mean deeplabv3plus_resnest50?" in capsys.readouterr().err
    assert main(["train-det", "deeplabv3plus_resnest50"]) == 2
    assert "deeplabv3plus_resnest50 is an experiment of train_seg.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train-det", "-h"])
    assert "usage: resnest-det train-det" in capsys.readouterr().out


def test_a_reader_that_has_enough() -> None:
    """As in `resnest-det configs | head -1`."""
    command = [sys.executable, "-m", "resnest_det", "configs"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 0
