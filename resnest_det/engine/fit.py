"""The training loop: one for every model that returns a dict of losses."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from resnest_det.distributed import (
    any_process,
    barrier,
    broadcast_buffers,
    gather_objects,
    images_to_device,
    mean_over_processes,
    rank,
    to_device,
    world_size,
)
from resnest_det.engine.checkpoint import save_checkpoint, save_last
from resnest_det.engine.interruption import Interrupted, StopSignals
from resnest_det.engine.journal import Journal
from resnest_det.engine.model_average import ModelAverage
from resnest_det.engine.parallel import (
    data_parallel,
    load_whole_state,
    unsharded,
    whole_state,
    whole_tensor,
    without_gradient_exchange,
)
from resnest_det.engine.precision import PrecisionName, autocast, gradient_scaler
from resnest_det.engine.random_numbers import random_states, restore_random_states
from resnest_det.layers.norm import uses_batch_statistics

Batch: TypeAlias = tuple[Any, Any, list[str]]  # images, targets, file names

_SMALLEST_SCALE = 1.0  # of fp16's losses; that gradients overflow without any scaling is no matter of the scale


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: epochs done.
        batch: batches of the present epoch done, by each process.
        step: optimiser steps done.
        best: the best result so far.
        results: of the last evaluation.
        evaluated: whether the evaluation that is due at this place is done.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -math.inf
    results: dict[str, float] = field(default_factory=dict)
    evaluated: bool = True


def fit(
    model: nn.Module,
    loader: DataLoader[Any],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    epochs: int,
    device: torch.device,
    run_folder: Path,
    journal: Journal,
    evaluate: Callable[[nn.Module], dict[str, float]],
    best_metric: str,
    evaluate_every: int = 1,
    average: ModelAverage | None = None,
    precision: PrecisionName = "fp32",
    accumulate: int = 1,
    clip_norm: float = 0.0,
    checkpoint_steps: int = 0,
    checkpoint_minutes: float = 0.0,
    keep_last: int = 2,
    resume_from: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Train a model, evaluate it, and keep its last and best state in the run folder.

    `last.pt` is written after each epoch, before the evaluation and again after it, and within an epoch as often as
    asked for; `best.pt` is written where `best_metric` is the highest so far. SIGINT and SIGTERM let the step end,
    write `last.pt` and raise Interrupted.

    In a run of several processes (torchrun) all of them call this with their own part of the data; gradients are
    averaged over them, losses too, and the first one writes.

    Args:
        model: on `device`, sharded or not. In training `model(images, targets)` returns a dict of losses, which are
            summed.
        loader: yields (images, targets, names): uint8 images, targets of tensors, file names for error messages.
            Its batch_sampler has set_epoch(epoch, first_batch).
        optimizer: of the model's parameters.
        scheduler: stepped after each optimiser step.
        epochs: epochs of the whole run, with those done before a resume.
        device: where the model is.
        run_folder: where files are written; it exists.
        journal: is told of every step; its file is in the run folder.
        evaluate: measures a model; its results are numbers by name, the same on every process.
        best_metric: the result that the best checkpoint is chosen by, higher is better.
        evaluate_every: epochs between evaluations; the last epoch is evaluated in any case.
        average: of the model, which follows it step by step and is evaluated in its place.
        precision: see autocast; fp16's losses are scaled.
        accumulate: batches whose gradients are averaged for one optimiser step; at an epoch's end there may be fewer.
        clip_norm: bound of the gradients' norm over all parameters; 0 for none.
        checkpoint_steps: optimiser steps between checkpoints within an epoch; 0 for none.
        checkpoint_minutes: time between checkpoints within an epoch; 0 for none.
        keep_last: checkpoints kept besides the best, the last one included.
        resume_from: the checkpoint to go on from, see load_last; None begins anew. The run then ends as it would have
            without a break.
        extra: plain data kept in each checkpoint, such as the class names.

    Returns:
        The results of the last evaluation.

    Raises:
        ChildProcessError: a process of the loader died.
        FloatingPointError: a loss or gradient is NaN or infinite; the message names the images of the step. The
            checkpoints are from before it.
        Interrupted: a signal asked to stop; the run can be resumed.
        OSError: a checkpoint could not be written; the one before it is intact.
        ValueError: the checkpoint is of another model, data set or number of processes.
    """
    scaler = gradient_scaler(precision, device)
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
        "journal": journal,
    }
    if average is not None:
        state["ema"] = average
    shape = {"steps_per_epoch": math.ceil(len(loader) / accumulate), "processes": world_size()}
    progress = Progress()
    if resume_from is not None:
        progress = _restore(resume_from, state, shape)
        _announce(progress, epochs, best_metric)
    saved_step, saved_at = progress.step if resume_from else -1, time.monotonic()
    measured = model if average is None else average.model
    model.train()
    # Where norms keep statistics of their own process, all go on from those of the first, which are the ones saved.
    own_statistics = any(uses_batch_statistics(module) for module in model.modules())
    trained = data_parallel(model, device, sync_buffers=own_statistics)

    def checkpoint(*, best: bool = False) -> None:
        nonlocal saved_step, saved_at
        content: dict[str, Any] = {name: whole_state(item.state_dict()) for name, item in state.items()}
        content |= {"random": random_states(), **asdict(progress), **shape, **(extra or {})}
        if rank() == 0:
            if best:
                save_checkpoint(run_folder / "best.pt", content)
            save_last(run_folder, content, keep=keep_last, replace=progress.step == saved_step)
        barrier()  # nobody goes on before there is a file
        saved_step, saved_at = progress.step, time.monotonic()

    def evaluate_and_save() -> None:
        start = time.monotonic()
        broadcast_buffers(measured)
        with stop.at_once(), unsharded(measured), autocast(precision, device):
            progress.results = evaluate(measured)
            barrier()  # a signal ends the block on every process or on none
        progress.evaluated = True
        best = progress.results[best_metric] > progress.best or not (run_folder / "best.pt").exists()
        progress.best = max(progress.best, progress.results[best_metric])
        seconds = time.monotonic() - start
        journal.evaluation(progress.results, epoch=progress.epoch, step=progress.step, seconds=seconds, best=best)
        checkpoint(best=best)

    with StopSignals() as stop, _dead_workers_named():
        if not progress.evaluated:
            evaluate_and_save()
        while progress.epoch < epochs:
            loader.batch_sampler.set_epoch(progress.epoch, progress.batch)  # type: ignore[union-attr]
            model.train()
            batches = journal.batches(
                loader, len(loader), epoch=progress.epoch, epochs=epochs, first_batch=progress.batch
            )
            for group in _groups(batches, accumulate):
                lr = float(scheduler.get_last_lr()[0])
                losses = training_step(trained, optimizer, scaler, group, device, precision, clip_norm)
                scheduler.step()
                if average is not None:
                    average.update(model)
                progress.step += 1
                progress.batch += len(group)
                journal.step(
                    step=progress.step,
                    epoch=progress.epoch + progress.batch / len(loader),
                    lr=lr,
                    num_images=world_size() * sum(len(images) for images, _, _ in group),
                    losses=losses,
                )
                overdue = 0 < checkpoint_minutes * 60 <= time.monotonic() - saved_at
                stopping, due = any_process(stop.requested is not None, overdue)
                if stopping or due or (checkpoint_steps and progress.step % checkpoint_steps == 0):
                    checkpoint()
                if stopping:
                    raise Interrupted(f"{stop.requested or 'a signal to another process'} after step {progress.step}")
            progress.epoch, progress.batch = progress.epoch + 1, 0
            journal.end_epoch(epoch=progress.epoch, epochs=epochs, lr=float(scheduler.get_last_lr()[0]))
            progress.evaluated = progress.epoch % evaluate_every != 0 and progress.epoch != epochs
            checkpoint()
            if not progress.evaluated:
                evaluate_and_save()
    return progress.results


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    batches: list[Batch],
    device: torch.device,
    precision: PrecisionName,
    clip_norm: float,
) -> dict[str, float]:
    """One optimiser step: losses and gradients of the batches, averaged over them and the processes, and the update.

    Returns:
        Each loss as a number, and their sum under "loss".

    Raises:
        FloatingPointError: a loss or the gradients' norm is not finite; nothing was updated. Gradients of fp16 may
            overflow, which only leaves out the step, until no scaling is left to blame.
    """
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    zero = torch.zeros((), device=device)
    for number, (images, targets, _) in enumerate(batches, start=1):
        with without_gradient_exchange(model) if number < len(batches) else nullcontext():
            with autocast(precision, device):
                losses = model(images_to_device(images, device), to_device(targets, device))
                total = sum(losses.values()) / len(batches)
            scaler.scale(total).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, zero) + loss.detach() / len(batches)
    loss_sum = sum(sums.values(), zero)
    means = mean_over_processes([loss_sum, *sums.values()])
    values = dict(zip(["loss", *sums], means, strict=True))
    if not math.isfinite(values["loss"]):
        parts = ", ".join(f"{name}={value:g}" for name, value in values.items())
        own = not torch.isfinite(loss_sum)
        raise FloatingPointError(
            f"the loss is not finite ({parts}) on the images {_names(batches, own)}: look at their annotations, lower "
            f"the learning rate, lengthen the warm-up or clip gradients"
        )
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    value = whole_tensor(norm)
    if not scaler.is_enabled() and not torch.isfinite(value):
        raise FloatingPointError(
            f"the gradients are not finite (norm {value.item()}) on the images {_names(batches, True)}: lower the "
            f"learning rate, lengthen the warm-up or look at their annotations"
        )
    if clip_norm > 0:
        clip_grads_with_norm_(parameters, clip_norm, norm)
    scaler.step(optimizer)
    scaler.update()
    if scaler.is_enabled() and scaler.get_scale() < _SMALLEST_SCALE:
        raise FloatingPointError(
            f"the gradients of fp16 overflow at every scale, at last on the images {_names(batches, True)}: use "
            f"bf16 or fp32, lower the learning rate or lengthen the warm-up"
        )
    return values


def _restore(content: dict[str, Any], state: dict[str, Any], shape: dict[str, int]) -> Progress:
    """Put everything into the state that a checkpoint holds."""
    for name, what, fix in (
        ("processes", "processes", "start as many"),
        ("steps_per_epoch", "steps an epoch", "resume with the data set that it was started with"),
    ):
        if content[name] != shape[name]:
            raise ValueError(
                f"the run had {content[name]} {what} and there are {shape[name]} now: {fix}, or start a new run"
            )
    progress = Progress(**{name: content[name] for name in asdict(Progress())})
    try:
        for name, item in state.items():
            if name != "journal":
                load_whole_state(item, content[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"the checkpoint is of another model or optimiser: {error}") from error
    restore_random_states(content["random"])
    state["journal"].resume(steps=progress.step, evaluated=progress.evaluated, state=content["journal"])
    return progress


def _announce(progress: Progress, epochs: int, best_metric: str) -> None:
    """Say where a resumed run goes on."""
    if progress.epoch >= epochs and progress.evaluated:
        text = f"the run is finished: {epochs} of {epochs} epochs, best {best_metric} {progress.best:.3f}"
    elif progress.batch:
        text = f"resumed after step {progress.step}, in epoch {progress.epoch + 1} of {epochs}"
    else:
        text = f"resumed after epoch {progress.epoch} of {epochs}"
    print(text, flush=True)


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Batches by the step they belong to."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


@contextmanager
def _dead_workers_named() -> Iterator[None]:
    """A block in which the death of a process of the loader is an error that says so.

    torch raises RuntimeError for it wherever the main thread happens to be, and again whenever a child ends.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise ChildProcessError(
            f"a process that loads images died ({str(error).splitlines()[0].strip()}) for want of memory, or killed "
            f"from outside: use fewer data.num_workers or smaller images, then resume the run"
        ) from error


def _names(batches: list[Batch], listed: bool | Tensor) -> str:
    """The files of a step's images, of those processes that list theirs; every process calls this."""
    own = [name for _, _, names in batches for name in names] if listed else []
    return ", ".join(itertools.chain.from_iterable(gather_objects(own)))
