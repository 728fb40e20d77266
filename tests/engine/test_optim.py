from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from resnest_det import create_backbone
from resnest_det.engine import create_optimizer, create_schedule
from resnest_det.engine.optim import learning_rate_factor, parameter_groups


def factors(total: int = 100, **arguments: object) -> list[float]:
    return [learning_rate_factor(step, total_steps=total, **arguments) for step in range(total + 1)]


def groups(net: nn.Module, **arguments: float) -> list[dict[str, Any]]:
    return parameter_groups(net, **{"lr": 0.1, "weight_decay": 1e-4, "norm_weight_decay": 0.0, **arguments})


def test_norms_and_biases_are_apart() -> None:
    net = create_backbone("resnest14")
    weights, rest = groups(net)
    assert (weights["weight_decay"], rest["weight_decay"]) == (1e-4, 0.0)
    assert all(p.ndim > 1 for p in weights["params"])
    assert all(p.ndim == 1 for p in rest["params"])
    both = {id(p) for p in [*weights["params"], *rest["params"]]}
    assert both == {id(p) for p in net.parameters()}
    assert len(both) == len(weights["params"]) + len(rest["params"])


def test_frozen_parameters_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    assert [len(group["params"]) for group in groups(net)] == [1, 1]
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter: every one is frozen"):
        groups(net)


def test_head_has_a_learning_rate_of_its_own() -> None:
    net = nn.Module()
    net.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net.backbone_like = nn.Linear(4, 2)  # a name that only begins as the body's does
    found = groups(net, head_lr_factor=10.0, weight_decay=0.5, norm_weight_decay=0.25)
    assert [group["lr"] for group in found] == [0.1, 0.1, 1.0, 1.0]
    assert [group["weight_decay"] for group in found] == [0.5, 0.25, 0.5, 0.25]
    conv, norm = net.backbone
    expected = [
        [conv.weight],
        [conv.bias, norm.weight, norm.bias],
        [net.backbone_like.weight],
        [net.backbone_like.bias],
    ]
    for group, parameters in zip(found, expected, strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in parameters}
    optimizer = create_optimizer(net, "sgd", lr=0.1, head_lr_factor=10.0)
    schedule = create_schedule(optimizer, total_steps=10, schedule="poly", power=1.0)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.05, 0.05, 0.5, 0.5])


def test_head_factor_needs_a_backbone() -> None:
    with pytest.raises(
        ValueError, match=r"head_lr_factor=10.0 needs a model with a child `backbone`.*Sequential has 0"
    ):
        groups(nn.Sequential(nn.Linear(2, 2)), head_lr_factor=10.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers(name: str) -> None:
    net = nn.Linear(2, 1)
    optimizer = create_optimizer(net, name, lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.01)
    assert type(optimizer).__name__.lower() == name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    if name == "sgd":
        assert optimizer.defaults["momentum"] == 0.5
        assert optimizer.defaults["nesterov"] is True


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="optimizer 'adam' is unknown; choose 'sgd' or 'adamw'"):
        create_optimizer(nn.Linear(1, 1), "adam", lr=0.1)
    with pytest.raises(ValueError, match="schedule 'step' is unknown"):
        learning_rate_factor(0, total_steps=10, schedule="step")


def test_multistep() -> None:
    values = factors(schedule="multistep", milestones=(0.6, 0.9), gamma=0.1)
    assert values[:60] == [1.0] * 60
    assert values[60:90] == pytest.approx([0.1] * 30)
    assert values[90:] == pytest.approx([0.01] * 11)


def test_poly() -> None:
    values = factors(schedule="poly", power=0.9, final_factor=0.01)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.01 + 0.99 * 0.5**0.9)
    assert values[100] == pytest.approx(0.01)
    assert factors(schedule="poly", power=1.0)[25] == pytest.approx(0.75)


def test_cosine() -> None:
    values = factors(schedule="cosine", final_factor=0.2)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.6)
    assert values[100] == pytest.approx(0.2)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "constant"])
def test_warm_up_is_linear_and_ends_on_the_schedule(schedule: str) -> None:
    values = factors(schedule=schedule, warmup_steps=10, warmup_factor=0.1)
    assert values[:11] == pytest.approx([0.1 + 0.09 * step for step in range(11)])


def test_schedule_of_an_optimiser_and_back_from_its_state() -> None:
    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        return optimizer, create_schedule(optimizer, total_steps=20, schedule="cosine", warmup_steps=5)

    optimizer, schedule = build()
    seen = []
    for _ in range(20):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(
        [2 * learning_rate_factor(s, total_steps=20, schedule="cosine", warmup_steps=5) for s in range(20)]
    )
    assert math.isclose(max(seen), 2.0)

    optimizer, schedule = build()
    for _ in range(7):
        optimizer.step()
        schedule.step()
    other_optimizer, other = build()
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(schedule.state_dict())
    other_optimizer.step()
    other.step()
    assert other_optimizer.param_groups[0]["lr"] == pytest.approx(seen[8])


def test_warm_up_longer_than_the_run() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="warmup_steps=100 must be fewer than the run's 100 steps"):
        create_schedule(optimizer, total_steps=100, schedule="constant", warmup_steps=100)
