"""Checkpoints: everything a run needs to go on, written so that a crash leaves the previous one intact.

A checkpoint is plain data (tensors, numbers, strings, lists and dicts), so that it is read without running code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from resnest_det.backbones.weights import read_plain

_FORMAT = 1


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint beside `path`, force it to disk, then rename it into place.

    Args:
        path: the file; what stood there before stays until the new one is complete.
        content: plain data.

    Raises:
        OSError: the file could not be written; `path` is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            torch.save({"format": _FORMAT, **content}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of save_checkpoint, onto the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged or something else.
    """
    content = _read(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version (format {_FORMAT}): write it anew by training")
    return content


def check_class_names(path: Path, class_names: dict[int, str]) -> None:
    """Refuse a checkpoint whose classes are not `class_names`; one that does not name its classes passes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the checkpoint has other classes, or the same in another order, or it is damaged.
    """
    content = _read(path)
    trained = content.get("class_names") if isinstance(content, dict) else None
    if trained is not None and trained != class_names:
        labels = [label for label in {**trained, **class_names} if trained.get(label) != class_names.get(label)]
        first = ", ".join(f"{label} is {trained.get(label)!r} and {class_names.get(label)!r}" for label in labels[:3])
        raise ValueError(
            f"{path} was trained on other classes than the data set's: {len(trained)} and {len(class_names)} classes, "
            f"{len(labels)} labels differ ({first}{', ...' if len(labels) > 3 else ''}); labels would be taken for one "
            f"another. Use data with the checkpoint's list of classes, or train anew"
        )


def training_state(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> dict[str, Any]:
    """The state of a run's objects and of torch's random numbers, for save_checkpoint."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_training_state(
    content: dict[str, Any], model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler
) -> None:
    """Put a run's objects and torch's random numbers into the state that a checkpoint holds.

    Raises:
        ValueError: the checkpoint is of another model or optimiser.
    """
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scheduler.load_state_dict(content["scheduler"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"the checkpoint is of another model or optimiser: {error}") from error
    torch.set_rng_state(content["rng"])
    if torch.cuda.is_available() and len(content["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(content["cuda_rng"])


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: a run writes its first one after its first epoch")
    return read_plain(path)
