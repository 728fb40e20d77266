"""Memory and gradients of a whole ResNeSt-101, in small: `tests.benchmarks.activation_checkpointing` has it at 512."""

from __future__ import annotations

import torch
from torch import nn

from resnest_det import create_backbone
from tests.benchmarks.activation_checkpointing import SavedBytes, assert_same_step, step_checkpointed, step_plain


def test_resnest101_keeps_less_than_45_percent_and_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    plain = create_backbone("resnest101", num_classes=3)
    checkpointed = create_backbone("resnest101", num_classes=3, checkpoint=True)
    checkpointed.load_state_dict(plain.state_dict())
    plain_bytes, bytes_of_blocks = step_plain(plain, images)
    assert step_checkpointed(checkpointed, images, bytes_of_blocks) < 0.45 * plain_bytes
    assert_same_step(plain, checkpointed)


def test_saved_bytes_are_counted_once_and_let_go() -> None:
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    x = torch.randn(4, 10)
    saved = SavedBytes(net)
    with saved:
        loss = net(x).exp().sum()
    assert saved.now == 4 * (4 * 10 + 4 * 20 + 4 * 5)  # the input, what ReLU gives (twice), what exp gives
    loss.backward()
    assert saved.now == 0
