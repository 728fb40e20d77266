"""Operations, memory and times of a pass, beside what they are by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnest_det.deploy.profiling import allocated_memory, count_operations, module_times

FLOAT = 4  # bytes


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_operations(mode: Any) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    images = torch.rand(2, 4, 6, 6)
    with mode():
        convolution, product = count_operations(lambda: net.eval()(images))
    assert convolution.macs == 2 * 4 * 4 * 6 * 2 * 3 * 3
    assert convolution.moved == FLOAT * (2 * 4 * 36 + 6 * 2 * 9 + 6 + 2 * 6 * 16)
    assert product.macs == 2 * 96 * 5
    assert product.moved == FLOAT * (2 * 96 + 96 * 5 + 5 + 2 * 5)


def test_memory_by_hand() -> None:
    def run() -> Tensor:
        kept = torch.empty(1000)
        passing = torch.empty(5000)
        del passing
        return torch.cat([kept, torch.empty(500)])

    memory = allocated_memory(run)
    assert memory.peak == FLOAT * 6000
    assert memory.held == FLOAT * 1500


class _Hiding(torch.autograd.Function):
    """Keeps a tensor for the backward pass that saved_tensors_hooks does not see."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.hidden = x * 2
        return x.sum()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return context.hidden * gradient


def test_memory_that_hooks_do_not_see() -> None:
    x = torch.rand(1000, requires_grad=True)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda own: seen.append(own) or own, lambda own: own):
        memory = allocated_memory(lambda: _Hiding.apply(x))
    assert not seen
    assert memory.held == FLOAT * 1001


class _Sleeping(nn.Module):
    """Waits, runs what is in it, and waits again."""

    def __init__(self, seconds: float, *inner: nn.Module) -> None:
        super().__init__()
        self.seconds = seconds
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        for module in self.inner:
            x = module(x)
        return x


def test_times_of_modules() -> None:
    twice = _Sleeping(0.01)
    model = _Sleeping(0.02, twice, twice)
    found = {own.name: own for own in module_times(model, lambda: model(torch.zeros(1)), rounds=3)}
    assert list(found) == ["inner.0", ""]
    assert [(own.kind, own.calls) for own in found.values()] == [("_Sleeping", 2), ("_Sleeping", 1)]
    assert 0.02 <= found["inner.0"].seconds < 0.04
    assert found["inner.0"].own_seconds == found["inner.0"].seconds
    assert 0.04 <= found[""].seconds < 0.08
    assert 0.02 <= found[""].own_seconds < found[""].seconds - 0.019


def test_hooks_are_gone_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        module_times(model, lambda: model(torch.zeros(1, 3)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
