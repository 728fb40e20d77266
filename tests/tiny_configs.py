"""Configurations of a few seconds, on a tiny generated data set, and the scripts as programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def write_detection_config(path: Path, *, sample: Path, run: Path) -> Path:
    """For train_det.py; `sample` is a folder of write_sample_dataset."""
    path.write_text(
        f"""
        [run]
        dir = "{run}"
        num_pictures = 2
        [data]
        root = "{sample}"
        train = {{ images = "train", annotations = "annotations/instances_train.json" }}
        val = {{ images = "val", annotations = "annotations/instances_val.json" }}
        batch_size = 4
        num_workers = 0
        short_sides = [64]
        max_side = 96
        [model]
        backbone = "resnet18"
        drop_path = 0.2
        fpn_channels = 16
        box_head_channels = 16
        anchor_sizes = [8, 16, 32, 64, 128]
        min_size = 64
        max_size = 96
        rpn_proposals_train = 50
        rpn_proposals_eval = 20
        roi_batch_size = 16
        score_threshold = 0.0
        [optim]
        lr = 0.01
        warmup_steps = 2
        epochs = 3
        """
    )
    return path


def write_segmentation_config(path: Path, *, sample: Path, run: Path) -> Path:
    """For train_seg.py; `sample` is the ade20k folder of write_sample_dataset."""
    path.write_text(
        f"""
        [run]
        dir = "{run}"
        channels_last = true
        num_pictures = 2
        [data]
        root = "{sample}"
        classes = "classes.txt"
        batch_size = 4
        eval_batch_size = 2
        num_workers = 0
        base_size = 0
        crop_size = 64
        [model]
        backbone = "resnet18"
        drop_path = 0.2
        head_channels = 16
        aux_weight = 0.4
        dice_weight = 0.5
        [optim]
        lr = 0.01
        warmup_steps = 2
        epochs = 3
        [eval]
        short_side = 64
        """
    )
    return path


def start(script: str, *arguments: object, processes: int = 1) -> subprocess.Popen[str]:
    """Start a script of the repository, by torchrun where it is to be several processes, in a process group of its own.

    Everything printed goes to one pipe.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(REPOSITORY / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def finish(script: str, *arguments: object, processes: int = 1) -> str:
    """Run a script to its end, which must be a good one; what it printed."""
    process = start(script, *arguments, processes=processes)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed
