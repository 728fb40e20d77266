"""The training loop: one for every model that returns a dict of losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from resnest_det.distributed import images_to_device, to_device
from resnest_det.engine.checkpoint import load_checkpoint, restore_training_state, save_checkpoint, training_state
from resnest_det.engine.journal import Journal


def fit(
    model: nn.Module,
    loader: DataLoader[Any],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    epochs: int,
    device: torch.device,
    run_folder: Path,
    evaluate: Callable[[], dict[str, float]],
    best_metric: str,
    evaluate_every: int = 1,
    clip_norm: float = 0.0,
    resume: bool = False,
    extra: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Train a model, evaluate it, and keep its last and best state in the run folder.

    After each epoch `last.pt` is written, before the evaluation and again after it; `best.pt` is written where
    `best_metric` is the highest so far. `metrics.jsonl` grows on the way.

    Args:
        model: on `device`. In training `model(images, targets)` returns a dict of losses, which are summed.
        loader: yields (images, targets, names): uint8 images, targets of tensors, file names for error messages.
            Its batch_sampler has set_epoch.
        optimizer: of the model's parameters.
        scheduler: stepped after each optimiser step.
        epochs: epochs of the whole run, with those done before a resume.
        device: where the model is.
        run_folder: where files are written; it exists.
        evaluate: measures the model; its results are numbers by name.
        best_metric: the result that the best checkpoint is chosen by, higher is better.
        evaluate_every: epochs between evaluations; the last epoch is evaluated in any case.
        clip_norm: bound of the gradients' norm over all parameters; 0 for none.
        resume: go on from `last.pt` of the run folder. The run then ends as it would have without a break.
        extra: plain data kept in each checkpoint, such as the class names.

    Returns:
        The results of the last evaluation.

    Raises:
        FloatingPointError: a loss or gradient is NaN or infinite; the message names the images of the batch. The
            checkpoints are of the epoch before.
        FileNotFoundError: there is no checkpoint to resume from.
        ValueError: the checkpoint is damaged, or of another model or data set.
    """
    first_epoch, step, best, results, evaluated = 0, 0, -math.inf, {}, True
    if resume:
        state = load_checkpoint(run_folder / "last.pt")
        if state["steps_per_epoch"] != len(loader):
            raise ValueError(
                f"the run had {state['steps_per_epoch']} steps an epoch and the data now make {len(loader)}: the data "
                f"set is not the one that it was started with; resume with that, or start a new run"
            )
        restore_training_state(state, model, optimizer, scheduler)
        first_epoch, step, best = state["epoch"], state["step"], state["best"]
        results, evaluated = state["results"], state["evaluated"]
        print(f"resumed after epoch {first_epoch} of {epochs}", flush=True)
    journal = Journal(run_folder, keep_steps=step, keep_evaluation=evaluated)

    def save(path: Path, *, epoch: int, evaluated: bool) -> None:
        content = training_state(model, optimizer, scheduler)
        progress = {"epoch": epoch, "step": step, "best": best, "results": results, "evaluated": evaluated}
        progress["steps_per_epoch"] = len(loader)
        save_checkpoint(path, {**content, **progress, **(extra or {})})

    def evaluate_and_save(epoch: int) -> None:
        nonlocal best, results
        start = time.monotonic()
        results = evaluate()
        is_best = results[best_metric] > best
        best = max(best, results[best_metric])
        journal.evaluation(results, epoch=epoch, step=step, seconds=time.monotonic() - start, best=is_best)
        if is_best:
            save(run_folder / "best.pt", epoch=epoch, evaluated=True)
        save(run_folder / "last.pt", epoch=epoch, evaluated=True)

    if not evaluated:
        evaluate_and_save(first_epoch)
    for epoch in range(first_epoch, epochs):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        model.train()
        for index, batch in enumerate(journal.batches(loader, len(loader), epoch=epoch, epochs=epochs)):
            images, targets, names = batch
            if len(images) == 0:  # every image of the batch was unreadable, and skipped
                continue
            lr = float(scheduler.get_last_lr()[0])
            losses = training_step(
                model, optimizer, images_to_device(images, device), to_device(targets, device), names, clip_norm
            )
            scheduler.step()
            step += 1
            journal.step(
                step=step, epoch=epoch + (index + 1) / len(loader), lr=lr, num_images=len(images), losses=losses
            )
        journal.end_epoch(epoch=epoch + 1, epochs=epochs, lr=float(scheduler.get_last_lr()[0]))
        due = (epoch + 1) % evaluate_every == 0 or epoch + 1 == epochs
        save(run_folder / "last.pt", epoch=epoch + 1, evaluated=not due)
        if due:
            evaluate_and_save(epoch + 1)
    return results


def training_step(
    model: nn.Module, optimizer: Optimizer, images: Any, targets: Any, names: list[str], clip_norm: float
) -> dict[str, float]:
    """One step: losses, gradients, update.

    Returns:
        Each loss as a number, and their sum under "loss".

    Raises:
        FloatingPointError: the loss, or the gradients' norm where it is clipped, is not finite; nothing was updated.
    """
    losses = model(images, targets)
    total = sum(losses.values())
    values = {"loss": total.item(), **{name: loss.item() for name, loss in losses.items()}}
    if not math.isfinite(values["loss"]):
        parts = ", ".join(f"{name}={value:g}" for name, value in values.items())
        raise FloatingPointError(
            f"the loss is not finite ({parts}) on the images {', '.join(names)}: look at their annotations, lower "
            f"the learning rate, lengthen the warm-up or clip gradients"
        )
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    if clip_norm > 0:
        norm = clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradients are not finite (norm {norm.item()}) on the images {', '.join(names)}: lower the "
                f"learning rate or lengthen the warm-up"
            )
    optimizer.step()
    return values
