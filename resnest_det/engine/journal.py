"""The journal of a run: its folder, what it prints, and metrics.jsonl.

metrics.jsonl has one JSON object a line: {"kind": "train", "epoch", "step", "lr", "loss", ... each loss} and
{"kind": "eval", "epoch", "step", ... each metric}. "epoch" counts epochs done (a fraction within one) and "step"
optimiser steps done.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def new_run_folder(path: Path) -> Path:
    """Create a folder for a run: `path`, or `path` with -2, -3, ... where that holds a run already.

    Raises:
        FileExistsError: `path` is a file.
    """
    folder = path
    number = 1
    while folder.is_dir() and any(folder.iterdir()):
        number += 1
        folder = path.with_name(f"{path.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Journal:
    """Prints a run's progress and appends it to metrics.jsonl.

    Args:
        folder: the run folder.
        log_every: steps between train lines in metrics.jsonl, and one more at an epoch's end; each has the means
            over the steps since the last.
        keep_steps: lines beyond this step are dropped first: a resumed run writes them again. 0 starts anew.
        keep_evaluation: whether the evaluation after that step is done, and its line to be kept.
    """

    def __init__(self, folder: Path, *, log_every: int = 20, keep_steps: int = 0, keep_evaluation: bool = True) -> None:
        self.path = folder / "metrics.jsonl"
        self.log_every = log_every
        kept = [
            record
            for record in read_metrics(self.path)
            if record["step"] < keep_steps
            or (record["step"] == keep_steps > 0 and (keep_evaluation or record["kind"] != "eval"))
        ]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._sums: dict[str, float] = {}
        self._count = 0
        self._epoch_sums: dict[str, float] = {}
        self._epoch_count = 0
        self._epoch_images = 0
        self._epoch_start = 0.0
        self._bar: tqdm[Any] | None = None
        self._last_print = 0.0

    def batches(self, loader: Iterable[T], num_batches: int, *, epoch: int, epochs: int) -> Iterator[T]:
        """The batches of one epoch, under a progress bar where stderr is a terminal."""
        self._epoch_sums, self._epoch_count, self._epoch_images = {}, 0, 0
        self._epoch_start = self._last_print = time.monotonic()
        self._bar = tqdm(
            loader,
            total=num_batches,
            desc=f"epoch {epoch + 1}/{epochs}",
            disable=not sys.stderr.isatty(),
            leave=False,
            dynamic_ncols=True,
        )
        yield from self._bar

    def step(self, *, step: int, epoch: float, lr: float, num_images: int, losses: dict[str, float]) -> None:
        """Note one training step.

        Args:
            step: steps done, with this one.
            epoch: epochs done, as a fraction.
            lr: learning rate of the step.
            num_images: images of the step.
            losses: each loss, and their sum under "loss".
        """
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._epoch_sums[name] = self._epoch_sums.get(name, 0.0) + value
        self._count += 1
        self._epoch_count += 1
        self._epoch_images += num_images
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{losses['loss']:.3f}", lr=f"{lr:.2g}", refresh=False)
        if step % self.log_every == 0 or epoch.is_integer():
            means = {name: value / self._count for name, value in self._sums.items()}
            self.write({"kind": "train", "epoch": epoch, "step": step, "lr": lr, **means})
            self._sums, self._count = {}, 0
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self._last_print > 60:
            self._last_print = now
            print(f"  step {step}  epoch {epoch:.2f}  loss {losses['loss']:.4f}  lr {lr:.3g}", flush=True)

    def end_epoch(self, *, epoch: int, epochs: int, lr: float) -> None:
        """Print the means of an epoch on one line."""
        seconds = time.monotonic() - self._epoch_start
        means = {name: value / max(self._epoch_count, 1) for name, value in self._epoch_sums.items()}
        speed = self._epoch_images / seconds
        parts = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in means.items())
        print(f"epoch {epoch}/{epochs}  {parts}  lr {lr:.2g}  {seconds:.0f} s  {speed:.1f} images/s", flush=True)

    def evaluation(self, results: dict[str, float], *, epoch: int, step: int, seconds: float, best: bool) -> None:
        """Note an evaluation's results and print them on one line."""
        self.write({"kind": "eval", "epoch": epoch, "step": step, "seconds": round(seconds, 2), **results})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in list(results.items())[:3])
        print(f"  evaluation: {shown}{'  (best so far)' if best else ''}  {seconds:.0f} s", flush=True)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a crash cut short is left out. No file: no records."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
