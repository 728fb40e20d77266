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
ScheduleName = Literal["multistep", "poly", "cosine", "constant"]

_BODY = "backbone."  # what pretrained weights go into; the rest of a model is its head
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, norm_weight_decay: float, head_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """The trainable parameters in groups: weights, and the parameters of norms with all biases.

    Where the head has a learning rate of its own, these two of the model's child `backbone` are followed by the two of
    everything else. A group that would be empty is there nevertheless, so that a checkpoint's groups keep their places.

    Args:
        model: frozen parameters (requires_grad False) are left out.
        lr: learning rate.
        weight_decay: of the weights.
        norm_weight_decay: of norms and biases, which regularising pulls towards no useful value.
        head_lr_factor: factor on the learning rate of what is not in `backbone`.

    Raises:
        ValueError: the model has no trainable parameter, or no `backbone` beside which there is a head.
    """
    parts: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (head, small): [] for head in (False, True) for small in (False, True)
    }
    for path, module in model.named_modules():
        head = head_lr_factor != 1 and not f"{path}.".startswith(_BODY)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                parts[head, isinstance(module, _NORMS) or name == "bias"].append(parameter)
    if not any(parts.values()):
        raise ValueError("the model has no trainable parameter: every one is frozen")
    if head_lr_factor != 1 and not hasattr(model, "backbone"):
        raise ValueError(
            f"head_lr_factor={head_lr_factor} needs a model with a child `backbone`, beside which all else is the "
            f"head; {type(model).__name__} has {', '.join(name for name, _ in model.named_children())}"
        )
    return [
        {
            "params": parameters,
            "lr": lr * head_lr_factor if head else lr,
            "weight_decay": norm_weight_decay if small else weight_decay,
        }
        for (head, small), parameters in parts.items()
        if not head or head_lr_factor != 1
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
    head_lr_factor: float = 1.0,
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
        head_lr_factor: factor on the learning rate of what is not in the model's `backbone`.

    Raises:
        ValueError: the name is unknown, nothing is trainable, or a head is asked for where there is no `backbone`.
    """
    groups = parameter_groups(
        model,
        lr=lr,
        weight_decay=weight_decay,
        norm_weight_decay=norm_weight_decay,
        head_lr_factor=head_lr_factor,
    )
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
    power: float = 0.9,
    final_factor: float = 0.0,
) -> float:
    """What the learning rate is multiplied by at a step: a pure function, so that a resumed run is on the same curve.

    Args:
        step: optimiser steps done, from 0.
        total_steps: steps of the whole run.
        schedule: "multistep"; "poly" (a power of what remains of the run, down to final_factor); "cosine" (half a
            cosine from the end of the warm-up to final_factor); or "constant".
        warmup_steps: steps over which the factor rises linearly from warmup_factor to that of the schedule.
        warmup_factor: factor at step 0, in (0, 1].
        milestones: for multistep, increasing fractions of the run at which the factor is multiplied by gamma.
        gamma: see milestones.
        power: for poly, the exponent; 1 is a straight line.
        final_factor: for poly and cosine, the factor at the end.
    """
    if schedule == "multistep":
        factor = gamma ** bisect_right([fraction * total_steps for fraction in milestones], step)
    elif schedule == "cosine":
        done = min(max(step - warmup_steps, 0) / max(total_steps - warmup_steps, 1), 1.0)
        factor = final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * done))
    elif schedule == "poly":
        factor = final_factor + (1 - final_factor) * (1 - min(step / total_steps, 1.0)) ** power
    elif schedule == "constant":
        factor = 1.0
    else:
        raise ValueError(f"schedule {schedule!r} is unknown; choose 'multistep', 'poly', 'cosine' or 'constant'")
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
    power: float = 0.9,
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
            power=power,
            final_factor=final_factor,
        )

    return LambdaLR(optimizer, factor)
