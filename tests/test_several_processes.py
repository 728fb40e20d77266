"""The scripts under torchrun, on CPUs: the same losses and the same metrics as one process has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train_det
import train_seg
from resnest_det.data.sample import write_sample_dataset
from resnest_det.engine import load_checkpoint, read_metrics
from tests.tiny_configs import finish, write_detection_config, write_segmentation_config


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sample"
    write_sample_dataset(folder, num_train=16, num_val=7)
    return folder


def test_the_losses_of_one_process_and_of_two_are_the_same(sample: Path, tmp_path: Path) -> None:
    """Twenty steps of the same images, some without a labelled pixel; nothing is drawn at random within the model.

    Higher learning rates and smaller images make rounding grow: one process with another number of threads then
    differs from itself as much.
    """
    arguments = ["model.norm=sync_bn", "model.head_norm=sync_bn", "model.drop_path=0", "model.dropout=0"]
    arguments += ["model.dice_weight=0", "optim.lr=0.001", "optim.head_lr_factor=1", "data.crop_size=128"]
    arguments += ["optim.epochs=5", "eval.every=5", "data.scale=[1, 1]", "data.max_class_ratio=1"]
    curves = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        config = write_segmentation_config(tmp_path / f"{processes}.toml", sample=sample / "ade20k", run=run)
        finish("train_seg.py", config, *arguments, f"data.batch_size={4 // processes}", processes=processes)
        curves.append([record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_evaluation_is_the_same_to_the_last_digit(processes: int, sample: Path, tmp_path: Path) -> None:
    """Seven images in batches of two: the parts of the processes differ in length."""
    detection = write_detection_config(tmp_path / "det.toml", sample=sample, run=tmp_path / "det")
    segmentation = write_segmentation_config(tmp_path / "seg.toml", sample=sample / "ade20k", run=tmp_path / "seg")
    assert train_det.main([str(detection), "optim.epochs=1", "data.eval_batch_size=2"]) == 0
    assert train_seg.main([str(segmentation), "optim.epochs=1"]) == 0
    for script, name in (("train_det.py", "det"), ("train_seg.py", "seg")):
        folder = tmp_path / f"again_{name}"
        finish(script, "--eval-only", tmp_path / name / "best.pt", f"run.dir={folder}", processes=processes)
        (written,) = folder.glob("results_*.json")
        assert json.loads(written.read_text()) == json.loads((tmp_path / name / "results.json").read_text())


def test_a_run_of_two_processes(sample: Path, tmp_path: Path) -> None:
    """Everything at once: split attention, live norms, an average, accumulation, precise statistics, workers."""
    config = write_detection_config(tmp_path / "det.toml", sample=sample, run=tmp_path / "run")
    arguments = ["model.backbone=resnest14", "data.batch_size=2", "data.num_workers=1", "optim.accumulate=2"]
    arguments += ["optim.ema_decay=0.9", "eval.precise_bn=2", "optim.lr_rule=linear", "optim.epochs=2"]
    printed = finish("train_det.py", config, *arguments, processes=2)
    assert "2 processes, the first on cpu" in printed
    assert printed.count("epoch 2/2") == 1
    assert printed.count("report: ") == 1
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (last["step"], last["processes"], len(last["random"])) == (4, 2, 2)
    files = {"best.pt", "config.toml", "last-1.pt", "last.pt", "metrics.jsonl"}
    files |= {"curves.png", "predictions.png", "errors.png", "precision_recall.png", "confusion_matrix.png"}
    files |= {"results.json", "detections.json", "errors.json", "confusion_matrix.json", "precision_recall.json"}
    files |= {"examples", "examples.json", "provenance.json", "report.html"}
    assert {file.name for file in (tmp_path / "run").iterdir()} == files


@pytest.mark.slow
def test_a_run_that_is_sharded(sample: Path, tmp_path: Path) -> None:
    """Steps of two batches, an average, clipped gradients, frozen stages, and an evaluation of unequal parts."""
    run = tmp_path / "run"
    config = write_segmentation_config(tmp_path / "seg.toml", sample=sample / "ade20k", run=run)
    arguments = ["run.parallel=fsdp", "run.channels_last=false", "model.trainable_stages=4", "data.batch_size=2"]
    arguments += ["optim.accumulate=2", "optim.ema_decay=0.9", "optim.clip_norm=1.0", "eval.precise_bn=2"]
    finish("train_seg.py", config, *arguments, processes=2)
    last = load_checkpoint(run / "last.pt")
    assert last["step"] == 6
    weights, averages = (state["classifier.weight"] for state in (last["model"], last["ema"]["model"]))
    assert not torch.equal(weights, averages)
    folder = tmp_path / "again"
    assert train_seg.main(["--eval-only", str(run / "best.pt"), f"run.dir={folder}"]) == 0
    (written,) = folder.glob("results_*.json")
    assert json.loads(written.read_text()) == json.loads((run / "results.json").read_text())
