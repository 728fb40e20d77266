"""Whether two runs are the same: their checkpoints, and what they wrote into metrics.jsonl."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnest_det.engine import load_checkpoint, read_metrics


def check_same_run(one: Path, other: Path) -> None:
    """Two run folders agree to the last bit."""
    for name in ("last.pt", "best.pt"):
        check_same_state(load_checkpoint(one / name), load_checkpoint(other / name), name)
    assert read_lines(one) == read_lines(other)


def check_same_state(one: Any, other: Any, path: str = "") -> None:
    """Two checkpoints are equal to the last bit, but for the times that the journal keeps and the folder of the run."""
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - {"journal", "dir"}:
            check_same_state(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, (item, another) in enumerate(zip(one, other, strict=True)):
            check_same_state(item, another, f"{path}.{number}")
    else:
        assert one == other, path


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, without times and memory, which differ from run to run."""
    return [
        {key: value for key, value in record.items() if not re.search("seconds$|_per_second$|memory", key)}
        for record in read_metrics(folder / "metrics.jsonl")
    ]
