"""A model that is sharded over processes: the steps, averages and checkpoints of one that is whole on each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from resnest_det.engine import load_whole_state, shard, unsharded
from tests.tiny_configs import finish


def test_two_processes(tmp_path: Path) -> None:
    printed = finish("tests/engine/parallel_checks.py", tmp_path, processes=2)
    assert "all is well" in printed


def test_one_process_has_nobody_to_share_a_model_with() -> None:
    with pytest.raises(ValueError, match="run.parallel=fsdp splits the model over processes, and there is 1: start 2"):
        shard(nn.Linear(1, 1), [], torch.device("cpu"))


def test_a_model_that_is_not_sharded_is_whole_anyway() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with unsharded(model):
        load_whole_state(other, model.state_dict())
    assert torch.equal(model.weight, other.weight)
