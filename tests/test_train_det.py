"""train_det.py end to end, as a user runs it: on a tiny generated set, and with each mistake it must explain."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_det
from resnest_det import cli
from resnest_det.config import DetectionSettings, load_settings
from resnest_det.data.sample import SHAPES, write_sample_dataset
from resnest_det.engine import load_checkpoint, read_metrics
from tests.reports.pages import read_page
from tests.tiny_configs import REPOSITORY, write_detection_config

TWELVE = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sample"
    write_sample_dataset(folder, num_train=12, num_val=4)
    return folder


@pytest.fixture
def config(sample: Path, tmp_path: Path) -> Path:
    """A configuration of a few seconds."""
    return write_detection_config(tmp_path / "tiny.toml", sample=sample, run=tmp_path / "run")


def explained(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the script prints about a mistake, having exited with 2."""
    assert train_det.main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


def test_trains_evaluates_draws_and_measures_again(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train_det.main([str(config)]) == 0
    printed = capsys.readouterr().out
    assert "epoch 3/3" in printed
    assert re.search(r"1 disc +[-0-9.]+", printed)
    assert sorted(file.name for file in run.iterdir()) == [
        "best.pt",
        "config.toml",
        "confusion_matrix.json",
        "confusion_matrix.png",
        "curves.png",
        "detections.json",
        "errors.json",
        "errors.png",
        "examples",
        "examples.json",
        "last-1.pt",
        "last.pt",
        "metrics.jsonl",
        "precision_recall.json",
        "precision_recall.png",
        "predictions.png",
        "provenance.json",
        "report.html",
        "results.json",
    ]
    with Image.open(run / "predictions.png") as picture:
        assert picture.width > 200
    evaluations = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "eval"]
    assert [record["epoch"] for record in evaluations] == [1, 2, 3]
    assert all(name in evaluations[0] for name in TWELVE)
    assert load_settings(DetectionSettings, run / "config.toml").model.backbone == "resnet18"
    assert load_checkpoint(run / "best.pt")["class_names"][1] == "disc"

    table = printed[printed.index("      AP") : printed.index("pictures:")]
    assert train_det.main(["--eval-only", str(run)]) == 0
    assert table in capsys.readouterr().out
    for name in ("predictions", "errors", "precision_recall", "confusion_matrix"):
        assert (run / f"{name}_best_instances_val.png").exists()
    page = read_page(run / "report.html")
    assert page.tables["All classes"][0] == TWELVE
    assert len(page.alternatives) == 4  # two images, each with its ground truth and its prediction
    again = read_page(run / "report_best_instances_val.html")
    assert again.tables == page.tables
    assert (run / "detections_best_instances_val.json").read_text() == (run / "detections.json").read_text()
    measured = json.loads((run / "results_best_instances_val.json").read_text())
    assert measured["results"] == load_checkpoint(run / "best.pt")["results"]
    assert measured == json.loads((run / "results.json").read_text())
    assert [row["name"] for row in measured["classes"]] == [shape.name for shape in SHAPES]
    # A second run never touches the first.
    assert train_det.main([str(config), "optim.epochs=1", "optim.warmup_steps=1"]) == 0
    assert (tmp_path / "run-2" / "best.pt").exists()
    assert load_settings(DetectionSettings, tmp_path / "run-2" / "config.toml").run.dir == str(tmp_path / "run-2")


@pytest.mark.parametrize(
    "detector",
    [
        pytest.param("mask_rcnn", marks=pytest.mark.slow),
        pytest.param("cascade_rcnn", marks=pytest.mark.slow),
        pytest.param("cascade_mask_rcnn", marks=pytest.mark.slow),
        "retinanet",
        "fcos",
    ],
)
def test_every_detector(detector: str, sample: Path, config: Path, tmp_path: Path) -> None:
    """What it was measured with is what its file of detections gives."""
    arguments = [f"model.detector={detector}", "model.fpn_channels=64", "eval.flip=true"]
    arguments += ["optim.epochs=1", "optim.lr=0.001"]
    assert train_det.main([str(config), *arguments]) == 0
    run = tmp_path / "run"
    written = json.loads((run / "results.json").read_text())
    masks = "mask" in detector
    assert list(written["results"]) == TWELVE + ([f"mask_{name}" for name in TWELVE] if masks else [])
    assert ("mask_classes" in written) == (run / "errors_masks.png").exists() == masks
    command = ["evaluate", "--annotations", str(sample / "annotations" / "instances_val.json")]
    command += ["--results", str(run / "detections.json"), "--output", str(tmp_path / "again")]
    assert cli.main([*command, *(["--masks"] if masks else [])]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["results"] == pytest.approx(written["results"], abs=1e-9)


@pytest.mark.slow
def test_fine_tuning(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a run folder, a detector with a part more, and as many other classes: what fits is taken, and said."""
    assert train_det.main([str(config), "optim.epochs=1"]) == 0
    other = tmp_path / "other"
    write_sample_dataset(other, num_train=8, num_val=4)
    for split in ("train", "val"):
        file = other / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["categories"] = [item | {"name": f"new {item['name']}"} for item in content["categories"]]
        file.write_text(json.dumps(content))
    capsys.readouterr()
    arguments = [f"data.root={other}", "model.detector=mask_rcnn", "optim.epochs=1", "optim.lr=1e-9"]
    arguments += ["optim.warmup_steps=0"]
    arguments += ["--init", str(tmp_path / "run"), f"run.dir={tmp_path / 'tuned'}"]
    assert train_det.main([str(config), *arguments]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"best.pt\nreused: backbone.body \(\d+ tensors\), backbone.fpn", printed)
    assert "new, for other classes: roi_heads.box_predictor (4 tensors)" in printed
    assert "new, not in the file: roi_heads.mask_head" in printed
    before, after = (load_checkpoint(tmp_path / run / "best.pt")["model"] for run in ("run", "tuned"))
    torch.testing.assert_close(after["rpn.head.cls_logits.weight"], before["rpn.head.cls_logits.weight"])
    assert load_settings(DetectionSettings, tmp_path / "tuned" / "config.toml").model.init == str(tmp_path / "run")
    # What --resume goes on from is the run's own checkpoint.
    (tmp_path / "run" / "best.pt").unlink()
    assert train_det.main(["--resume", str(tmp_path / "tuned")]) == 0
    assert "the run is finished" in capsys.readouterr().out


def test_a_resumed_run_equals_an_unbroken_one(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_det.main([str(config), "data.num_workers=2"]) == 0
    whole = load_checkpoint(tmp_path / "run" / "last.pt")

    real_evaluate = train_det.evaluate
    calls = []

    def evaluate_then_die(*arguments: object, **options: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real_evaluate(*arguments, **options)

    monkeypatch.setattr(train_det, "evaluate", evaluate_then_die)
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train_det.main([str(config), f"run.dir={broken}"])
    monkeypatch.setattr(train_det, "evaluate", real_evaluate)
    assert load_checkpoint(broken / "last.pt")["epoch"] == 2
    capsys.readouterr()
    assert train_det.main(["--resume", str(broken)]) == 0
    assert "resumed after epoch 2 of 3" in capsys.readouterr().out
    resumed = load_checkpoint(broken / "last.pt")
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    assert whole["results"] == resumed["results"]


def test_resume_with_other_settings(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_det.main([str(config), "optim.epochs=1", "optim.warmup_steps=1"]) == 0
    message = explained(capsys, "--resume", tmp_path / "run", "optim.lr=0.5")
    assert "optim.lr: the run has 0.01, given is 0.5" in message


def test_wrong_number_of_classes_for_a_checkpoint(
    config: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_det.main([str(config), "optim.epochs=1", "optim.warmup_steps=1"]) == 0
    content = json.loads((sample / "annotations" / "instances_val.json").read_text())
    content["categories"].append({"id": 50, "name": "moon", "supercategory": "shape"})
    other = tmp_path / "val.json"
    other.write_text(json.dumps(content))
    message = explained(capsys, "--eval-only", tmp_path / "run", f"data.val.annotations={other}")
    assert "was trained on other classes than the data set's: 6 and 7 classes, 1 labels differ" in message
    assert "(7 is None and 'moon')" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone=resnst50", "backbone 'resnst50' is unknown; did you mean 'resnest50'"),
        ("data.root=/nowhere", "/nowhere"),
        ("optim.learning_rate=1", "did you mean optim.lr?"),
        ("optim.warmup_steps=1000", "warmup_steps=1000 must be fewer than the run's 9 steps"),
        ("run.device=cuda:99", "device 'cuda:99' is not on this machine"),
        ("run.device=gpu", "device 'gpu' is not a device; use auto, cpu, cuda"),
        ("model.weights=none.pth", "weights='none.pth' is neither 'imagenet' nor the path of a file"),
    ],
)
def test_mistakes_are_explained_before_training(
    override: str, message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in explained(capsys, config, override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
def test_steps_of_one_image_are_refused_where_attention_needs_several(
    norm: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = explained(capsys, config, "model.backbone=resnest14", f"model.norm={norm}", "data.batch_size=1")
    assert "use data.batch_size=2 or more, or model.norm=frozen_bn or gn" in message
    assert not (tmp_path / "run").exists()


def test_resume_on_data_of_another_size(
    config: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_det.main([str(config), "optim.epochs=1", "optim.warmup_steps=1"]) == 0
    data = copied(sample, tmp_path / "smaller")
    path = data / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    gone = {image["id"] for image in content["images"][:4]}
    content["images"] = content["images"][4:]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in gone]
    path.write_text(json.dumps(content))
    message = explained(capsys, "--resume", tmp_path / "run", f"data.root={data}")
    assert "the run had 3 steps an epoch and there are 2 now" in message
    assert load_settings(DetectionSettings, tmp_path / "run" / "config.toml").data.root == str(sample)
    assert train_det.main(["--resume", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "error.txt").exists()


def test_a_run_without_evaluation_has_no_best_checkpoint(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_det.main([str(config), "optim.epochs=1", "optim.warmup_steps=1"]) == 0
    (tmp_path / "run" / "best.pt").unlink()
    assert "has no best.pt: the run was not evaluated yet" in explained(capsys, "--eval-only", tmp_path / "run")
    for file in (tmp_path / "run").glob("*.pt"):
        file.unlink()
    message = explained(capsys, "--eval-only", tmp_path / "run")
    assert f"{tmp_path / 'run'} has no checkpoint: the run ended before it wrote one; begin it anew" in message


def test_weights_from_elsewhere_are_measured_in_a_folder_of_their_own(config: Path, tmp_path: Path) -> None:
    assert train_det.main([str(config), "optim.epochs=1", "optim.warmup_steps=1"]) == 0
    weights = tmp_path / "weights.pth"
    torch.save(load_checkpoint(tmp_path / "run" / "best.pt")["model"], weights)
    before = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert train_det.main([str(config), "--eval-only", str(weights)]) == 0
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == before
    assert (tmp_path / "run-2" / "results_weights_instances_val.json").exists()


def test_other_categories_in_the_validation_set(
    config: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((sample / "annotations" / "instances_val.json").read_text())
    content["categories"][0]["name"] = "moon"
    other = tmp_path / "val.json"
    other.write_text(json.dumps(content))
    assert "have other categories" in explained(capsys, config, f"data.val.annotations={other}")


def copied(sample: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(sample, folder))


def test_a_truncated_image_is_named_or_skipped(
    config: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = copied(sample, tmp_path / "damaged")
    image, val_image = (min((data / split).iterdir()) for split in ("train", "val"))
    image.write_bytes(image.read_bytes()[:500])
    # Split attention and batches of 2: a batch that shrank to 1 could not train.
    short = ["optim.epochs=1", "optim.warmup_steps=1", f"data.root={data}"]
    short += ["model.backbone=resnest14", "data.batch_size=2"]
    message = explained(capsys, config, *short, "data.num_workers=1")
    assert image.name in message
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()
    val_image.write_bytes(val_image.read_bytes()[:500])
    with pytest.warns(UserWarning, match=f"skipped: .*{image.name}"):
        assert train_det.main([str(config), *short, "data.on_unreadable=skip", f"run.dir={tmp_path / 'skip'}"]) == 0
    printed = capsys.readouterr().out
    assert f"1 of 12 images were unreadable and skipped: {image.name}" in printed
    assert f"1 of 4 images were unreadable and skipped: {val_image.name}" in printed


def test_settings_without_effect_are_named(config: Path) -> None:
    with pytest.warns(UserWarning, match="optim.final_lr_factor has no effect with optim.schedule=multistep"):
        train_det.main([str(config), "optim.epochs=1", "optim.warmup_steps=1", "optim.final_lr_factor=0.1"])


@pytest.mark.slow
def test_as_a_program(config: Path, tmp_path: Path) -> None:
    """Exit status and streams, with the shell's view of them."""
    script = [sys.executable, str(REPOSITORY / "train_det.py")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    bad = subprocess.run([*script, "nothing.toml"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: there is no config file nothing.toml")
    shown = subprocess.run(
        [*script, str(config), "--print-config"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert shown.returncode == 0
    assert 'backbone = "resnet18"' in shown.stdout


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_sixteen_bits_with_a_tracker_and_everything_else(precision: str, config: Path, tmp_path: Path) -> None:
    arguments = [f"run.precision={precision}", "run.tensorboard=true", "optim.ema_decay=0.9", "optim.accumulate=2"]
    arguments += ["eval.precise_bn=2", "optim.layer_decay=0.8", "optim.schedule=one_cycle", "optim.epochs=2"]
    arguments += ["data.mosaic=0.5", "data.copy_paste=0.5", "data.scale_jitter=[0.5, 2]", "data.crop_size=96"]
    arguments += ["data.repeat_threshold=0.5", "model.checkpoint_activations=true"]
    assert train_det.main([str(config), *arguments, "--deterministic", "--profile"]) == 0
    files = {file.name.split(".")[0] for file in (tmp_path / "run").iterdir()}
    assert {"events", "curves", "predictions", "results"} <= files
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "eval"] == [2, 4]
    assert not torch.are_deterministic_algorithms_enabled()


def test_compiled_and_recomputed_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = explained(capsys, config, "run.compile=true", "model.checkpoint_activations=true")
    assert "run.compile=true and model.checkpoint_activations=true do not go together" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiled_backbone(config: Path, tmp_path: Path) -> None:
    assert train_det.main([str(config), "run.compile=true", "optim.epochs=1", "optim.ema_decay=0.9"]) == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["model"].keys() == (
        load_checkpoint(tmp_path / "run" / "best.pt")["ema"]["model"].keys()
    )


# --- real data, where it is at hand


@pytest.mark.slow
def test_coco_tiny(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    """Crowds, run-length masks, grey images and all 80 categories: two epochs of resnest50 at 320 pixels."""
    arguments = [
        str(REPOSITORY / "configs" / "det" / "faster_rcnn_resnest50_1x.toml"),
        f"data.root={real_data('coco_tiny')}",
        f"run.dir={tmp_path / 'run'}",
        *("model.weights=", "model.trainable_stages=5", "data.batch_size=2", "data.short_sides=[320]"),
        *("data.max_side=480", "model.min_size=320", "model.max_size=480", "optim.epochs=2"),
        *("optim.warmup_steps=20", "data.num_workers=2", "eval.precise_bn=5"),
    ]
    assert train_det.main(arguments) == 0
    evaluations = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval"]
    assert len(evaluations) == 2
    assert all(0 <= evaluations[1][name] <= 1 for name in TWELVE)
