"""The built wheel, unpacked away from the source tree: it trains, and finds what it ships."""

from __future__ import annotations

import email
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnest_det.data.sample import write_sample_dataset
from tests.tiny_configs import REPOSITORY, write_detection_config


def run(site: Path, cwd: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """`resnest-det` with the words, of the unpacked wheel, from a folder that is not the source tree."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "resnest_det", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_contents(site: Path) -> None:
    shipped = site / "resnest_det" / "shipped"
    for file in ("train_det.py", "train_seg.py", *(f"configs/{name}" for name in configs(REPOSITORY / "configs"))):
        assert (shipped / file).read_text() == (REPOSITORY / file).read_text()
    assert configs(shipped / "configs") == configs(REPOSITORY / "configs")
    assert (site / "resnest_det" / "py.typed").exists()
    assert sorted(path.name for path in site.iterdir() if path.suffix != ".dist-info") == ["resnest_det"]
    (information,) = site.glob("*.dist-info")
    metadata = email.message_from_string((information / "METADATA").read_text())
    assert {"tensorboard", "hotcoco"} <= set(metadata.get_all("Provides-Extra", []))
    assert "resnest-det = resnest_det.cli:main" in (information / "entry_points.txt").read_text()


def configs(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.toml")}


def test_configurations_by_name(site: Path, tmp_path: Path) -> None:
    shown = run(site, tmp_path, "configs", "faster_rcnn_resnest50_1x")
    assert shown.stdout.startswith(f"# {site}")
    settings = run(site, tmp_path, "train-det", "faster_rcnn_resnest50_1x", "data.root=coco", "--print-config")
    assert 'backbone = "resnest50"' in settings.stdout
    assert 'dir = "runs/faster_rcnn_resnest50_1x"' in settings.stdout


def test_training(site: Path, tmp_path: Path) -> None:
    sample = tmp_path / "sample"
    write_sample_dataset(sample, num_train=8, num_val=4)
    detection = write_detection_config(tmp_path / "det.toml", sample=sample, run=tmp_path / "det")
    done = run(site, tmp_path, "train-det", detection, "optim.epochs=1", "optim.warmup_steps=1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "det" / "best.pt").exists()
    mistaken = run(site, tmp_path, "train-seg", "sample", "optim.epoch=1")
    assert mistaken.returncode == 2
    assert "did you mean optim.epochs?" in mistaken.stderr


@pytest.mark.slow
def test_a_fresh_environment(site: Path, tmp_path: Path) -> None:
    """What the package depends on is what it declares: nothing of the tests' own environment is there."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    programs = tmp_path / "venv" / "bin"
    (wheel,) = site.parent.glob("*.whl")
    install = [programs / "python", "-m", "pip", "install", "--quiet", "--constraint", REPOSITORY / "constraints.txt"]
    subprocess.run([*install, wheel], check=True)
    sample = tmp_path / "sample"
    write_sample_dataset(sample, num_train=8, num_val=4)
    config = write_detection_config(tmp_path / "det.toml", sample=sample, run=tmp_path / "run")
    photo = sample / "val" / "000009.jpg"
    assert photo.exists(), sorted((sample / "val").iterdir())
    for words in (
        ["train-det", config, "optim.epochs=1", "optim.warmup_steps=1"],
        ["report", tmp_path / "run"],
        ["train-det", config, "optim.epochs=1", "optim.warmup_steps=1", "run.seed=1", f"run.dir={tmp_path / 'other'}"],
        ["compare", tmp_path / "run", tmp_path / "other"],
        ["predict", tmp_path / "run", photo, "--output", tmp_path / "found"],
        ["attention", photo, "--checkpoint", tmp_path / "run", "--output", tmp_path / "looked"],
        ["doctor", sample],
    ):
        done = subprocess.run([programs / "resnest-det", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
