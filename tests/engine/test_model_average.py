from __future__ import annotations

import pytest
import torch
from torch import nn

from resnest_det.engine import ModelAverage


def test_follows_the_formula() -> None:
    """Against the recursion written out, with its rising rate, over weights, buffers and counters."""
    model = nn.BatchNorm1d(3)
    average = ModelAverage(model, 0.5)
    expected: torch.Tensor | None = None
    for update in range(8):
        with torch.no_grad():
            model.weight.copy_(torch.randn(3))
            model.running_mean.copy_(model.weight + 1)  # type: ignore[union-attr]
        average.update(model)
        rate = min(0.5, (1 + update) / (10 + update))
        expected = model.weight.clone() if expected is None else rate * expected + (1 - rate) * model.weight
        assert torch.allclose(average.model.weight, expected, atol=1e-6)
        assert torch.allclose(average.model.running_mean, expected + 1, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert model.weight.requires_grad


def test_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    whole, broken = ModelAverage(model, 0.9), ModelAverage(model, 0.9)
    for step in range(6):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 2))
        whole.update(model)
        broken.update(model)
        if step == 2:
            state = broken.state_dict()
            broken = ModelAverage(nn.Linear(2, 2), 0.9)
            broken.load_state_dict(state)
    assert torch.equal(whole.model.weight, broken.model.weight)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"ema_decay={decay} is outside \(0, 1\)"):
        ModelAverage(nn.Linear(1, 1), decay)
