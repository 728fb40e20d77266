"""`resnest-det train-det` and `train-seg`: the two training scripts, wherever the package is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resnest_det.shipped import shipped_file

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers

SCRIPTS = {"train-det": "train_det.py", "train-seg": "train_seg.py"}  # by the command's name


def add(commands: SubParsers) -> None:
    """Add the commands to the list of them; `run` runs them, as the scripts read their words themselves."""
    commands.add_parser("train-det", help="train a detector, evaluate it, and draw what it finds: train_det.py")
    commands.add_parser("train-seg", help="train a segmentation model, evaluate it, and draw: train_seg.py")


def run(command: str, words: Sequence[str]) -> int:
    """Run a training script.

    Args:
        command: the command's name, a key of SCRIPTS.
        words: what stands behind it on the command line.

    Returns:
        The script's exit status.
    """
    script = shipped_file(SCRIPTS[command])
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    status: int = module.main(words, prog=f"resnest-det {command}")
    return status
