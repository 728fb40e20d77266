"""Optimisers, which parameters decay, and the learning rate over a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["multistep", "cosine", "constant"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(model: nn.Module, weight_decay: float, norm_weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: weights, and the parameters of norms with all biases.

    Args:
        model: frozen parameters (requires_grad False) are left out.
        weight_decay: of the weights.
        norm_weight_decay: of norms and biases, which regularising pulls towards no useful value.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    weights: list[nn.Parameter] = []
    norms_and_biases: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                small = isinstance(module, _NORMS) or name == "bias"
                (norms_and_biases if small else weights).append(parameter)
    if not weights and not norms_and_biases:
        raise ValueError("the model has no trainable parameter: every one is frozen")
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": norms_and_biases, "weight_decay": norm_weight_decay},
    ]


def create_optimizer(
    model: nn.Module,
    name: OptimizerName,
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 1e-4,
    norm_weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Build the optimiser of a model's trainable parameters.

    Args:
        model: what is trained.
        name: "sgd" or "adamw".
        lr: the highest learning rate of the run.
        momentum: of SGD, in [0, 1).
        nesterov: whether SGD's momentum is Nesterov's.
        weight_decay: of weights.
        norm_weight_decay: of norms and biases.

    Raises:
        ValueError: the name is unknown, or nothing is trainable.
    """
    groups = parameter_groups(model, weight_decay, norm_weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    raise ValueError(f"optimizer {name!r} is unknown; choose 'sgd' or 'adamw'")


def learning_rate_factor(
    step: int,
    *,
    total_steps: int,
    schedule: ScheduleName,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    final_factor: float = 0.0,
) -> float:
    """What the learning rate is multiplied by at a step: a pure function, so that a resumed run is on the same curve.

    Args:
        step: optimiser steps done, from 0.
        total_steps: steps of the whole run.
        schedule: "multistep", "cosine" (half a cosine from the end of the warm-up to final_factor) or "constant".
        warmup_steps: steps over which the factor rises linearly from warmup_factor to that of the schedule.
        warmup_factor: factor at step 0, in (0, 1].
        milestones: for multistep, increasing fractions of the run at which the factor is multiplied by gamma.
        gamma: see milestones.
        final_factor: for cosine, the factor at the end.
    """
    if schedule == "multistep":
        factor = gamma ** bisect_right([fraction * total_steps for fraction in milestones], step)
    elif schedule == "cosine":
        done = min(max(step - warmup_steps, 0) / max(total_steps - warmup_steps, 1), 1.0)
        factor = final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * done))
    elif schedule == "constant":
        factor = 1.0
    else:
        raise ValueError(f"schedule {schedule!r} is unknown; choose 'multistep', 'cosine' or 'constant'")
    if step < warmup_steps:
        factor *= warmup_factor + (1 - warmup_factor) * step / warmup_steps
    return factor


def create_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    schedule: ScheduleName,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    final_factor: float = 0.0,
) -> LambdaLR:
    """The schedule of an optimiser; `step()` it after each optimiser step. Arguments: see learning_rate_factor.

    Raises:
        ValueError: the schedule is unknown, or the warm-up would take the whole run.
    """
    if warmup_steps >= total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must be fewer than the run's {total_steps} steps: shorten the warm-up or "
            f"train longer"
        )

    def factor(step: int) -> float:
        return learning_rate_factor(
            step,
            total_steps=total_steps,
            schedule=schedule,
            warmup_steps=warmup_steps,
            warmup_factor=warmup_factor,
            milestones=milestones,
            gamma=gamma,
            final_factor=final_factor,
        )

    return LambdaLR(optimizer, factor)
