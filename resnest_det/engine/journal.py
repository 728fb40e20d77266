"""The journal of a run: its folder, what it prints, metrics.jsonl, and the hooks that are told the same.

metrics.jsonl has one JSON object a line: {"kind": "train", "epoch", "step", "lr", "loss", ... each loss,
"data_seconds", "step_seconds", "memory_mib"} and {"kind": "eval", "epoch", "step", "seconds", ... each metric}.
"epoch" counts epochs done (a fraction within one) and "step" optimiser steps done. docs/journal.md explains each.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.profiler import ProfilerActivity
from tqdm import tqdm

T = TypeVar("T")
Hook = Callable[[dict[str, Any]], None]

_LINE_INTERVAL = 60.0  # seconds between lines of progress where there is no terminal
_BAR_INTERVAL = 0.2  # seconds between changes of the bar's text
_NOTABLE_SHARE = 0.1  # of an epoch's time: waiting for the loader is mentioned from here
_BOTTLENECK_SHARE = 0.2  # and the hint is given from here
_NOTABLE_SECONDS = 1.0  # less is never mentioned
_IDLE_STEPS, _WARMUP_STEPS, _TRACED_STEPS = 3, 2, 5  # of the profile
_TABLE_ROWS = 10


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


@dataclass
class _Totals:
    """Sums over steps: those since the last train line, or those of the epoch."""

    losses: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0  # seconds of these for the loader's batches
    starting: float = 0.0  # seconds of the waiting for the first batch, while workers start

    def means(self) -> dict[str, float]:
        return {name: value / max(self.steps, 1) for name, value in self.losses.items()}


class Journal:
    """Prints a run's progress, appends it to metrics.jsonl, and hands each record to the hooks.

    Args:
        folder: the run folder; it exists.
        log_every: steps between train lines in metrics.jsonl, and one more at an epoch's end where steps remain;
            each has the means over the steps since the last.
        active: False for a journal that prints and writes nothing, on every process but the first.
        hooks: each is called with every record of metrics.jsonl, and with every picture as {"kind": "picture",
            "name", "step", "image"}. A hook that raises is warned of and not called again. Where a hook has
            `resume(step)`, it is told that what it was given after that step comes again; where it has `close()`, that
            is called at the end.
        profile: whether to write a trace of the steps 6 to 10, counted from the start or the resume, to trace.json
            (Chrome's format), and to print the costliest operations.
    """

    def __init__(
        self,
        folder: Path,
        *,
        log_every: int = 20,
        active: bool = True,
        hooks: Sequence[Hook] = (),
        profile: bool = False,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.log_every = log_every
        self.active = active
        self._hooks = list(hooks)
        self._profile = _StepProfile(folder / "trace.json") if profile and active else None
        self._num_records = 0
        self._line, self._epoch = _Totals(), _Totals()
        self._last_step: dict[str, float] = {}  # its "epoch", "step" and "lr"
        self._clock = 0.0  # until when the totals' seconds are counted
        self._start: tuple[float, float] | None = None  # the time at this process's first batch, and the epochs done
        self._epochs = 0
        self._bar: tqdm[Any] | None = None
        self._last_report = 0.0
        self._hinted = False

    def resume(self, *, steps: int, evaluated: bool, state: dict[str, Any]) -> None:
        """Go on with a run's journal: lines after the checkpoint are dropped, for the run writes them again.

        Args:
            steps: optimiser steps done; 0 begins anew.
            evaluated: whether the evaluation after that step is done, and its line to be kept.
            state: what `state_dict` gave when the checkpoint was made; {} where it is not known.
        """
        if not self.active:
            return
        state = copy.deepcopy(state)
        # Lines of the very step may be from before the checkpoint or after it: their number tells.
        kept = [
            record
            for record in read_metrics(self.path)[: state.get("num_records")]
            if record["step"] < steps or (record["step"] == steps > 0 and (evaluated or record["kind"] != "eval"))
        ]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(self.path)
        self._num_records = len(kept)
        self._line, self._epoch = _Totals(**state.get("line", {})), _Totals(**state.get("epoch", {}))
        self._last_step = state.get("last_step", {})
        for hook in list(self._hooks):
            if hasattr(hook, "resume"):
                self._tell(hook, hook.resume, steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint: what the next train line's means and the epoch's line are made of."""
        return {
            "num_records": self._num_records,
            "line": asdict(self._line),
            "epoch": asdict(self._epoch),
            "last_step": dict(self._last_step),
        }

    def batches(
        self, loader: Iterable[T], num_batches: int, *, epoch: int, epochs: int, first_batch: int = 0
    ) -> Iterator[T]:
        """The batches of one epoch, under a progress bar where stderr is a terminal.

        Args:
            loader: yields the batches that are left of the epoch.
            num_batches: batches of the whole epoch.
            epoch: epochs done before.
            epochs: epochs of the run.
            first_batch: batches of the epoch that were done before a break.
        """
        if not self.active:
            yield from loader
            return
        self._clock = time.monotonic()
        self._epochs = epochs
        if self._start is None:
            self._start = (self._clock, epoch + first_batch / num_batches)
            self._last_report = self._clock
        self._bar = bar = tqdm(
            total=num_batches,
            initial=first_batch,
            desc=f"epoch {epoch + 1}/{epochs}",
            unit="batch",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {rate_fmt}{postfix}",
            disable=not sys.stderr.isatty(),
            leave=False,
            dynamic_ncols=True,
        )
        try:
            first = True
            for batch in loader:
                waited = self._count_time()
                for totals in (self._line, self._epoch):
                    totals.waiting += waited
                    totals.starting += waited if first else 0.0
                first = False
                if self._profile is not None:
                    self._profile.before_batch()
                yield batch
                self._count_time()
                bar.update()
        finally:
            bar.close()

    def step(self, *, step: int, epoch: float, lr: float, num_images: int, losses: dict[str, float]) -> None:
        """Note one training step.

        Args:
            step: steps done, with this one.
            epoch: epochs done, as a fraction.
            lr: learning rate of the step.
            num_images: images of the step, over all processes.
            losses: each loss, and their sum under "loss".
        """
        if not self.active:
            return
        self._count_time()
        for totals in (self._line, self._epoch):
            for name, value in losses.items():
                totals.losses[name] = totals.losses.get(name, 0.0) + value
            totals.steps += 1
            totals.images += num_images
        self._last_step = {"epoch": epoch, "step": step, "lr": lr}
        if step % self.log_every == 0:
            self._write_line()
        if self._profile is not None:
            self._profile.step()
        self._report(losses["loss"])

    def end_epoch(self, *, epoch: int, epochs: int, lr: float) -> None:
        """Print the means of an epoch on one line; a hint follows, once a run, where loading holds it up.

        Args:
            epoch: epochs done, with this one.
            epochs: epochs of the run.
            lr: learning rate of the next step.
        """
        if not self.active:
            return
        self._count_time()
        if self._line.steps:
            self._write_line()
        if self._profile is not None:
            self._profile.end_epoch()
        total = self._epoch
        self._line, self._epoch = _Totals(), _Totals()
        parts = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in total.means().items())
        seconds = max(total.seconds, 1e-9)
        line = f"epoch {epoch}/{epochs}  {parts}  lr {lr:.2g}  {seconds:.0f} s  {total.images / seconds:.1f} images/s"
        if total.waiting >= max(_NOTABLE_SECONDS, _NOTABLE_SHARE * seconds):
            line += f"  {total.waiting / seconds:.0%} of the time waiting for data"
        print(line, flush=True)
        # More workers do not shorten the wait for the first batch, so that it is left out of what asks for them.
        waiting, seconds = total.waiting - total.starting, seconds - total.starting
        if not self._hinted and waiting >= max(_NOTABLE_SECONDS, _BOTTLENECK_SHARE * seconds):
            self._hinted = True
            print(
                f"  hint: after the first batch, {waiting:.0f} of {seconds:.0f} s ({waiting / seconds:.0%}) went by "
                f"waiting for data; from {_BOTTLENECK_SHARE:.0%} on, loading is the bottleneck: raise data.num_workers "
                f"while cores are idle, else make the images smaller or augment them less",
                flush=True,
            )

    def evaluation(self, results: dict[str, float], *, epoch: int, step: int, seconds: float, best: bool) -> None:
        """Note an evaluation's results and print the first of them on one line.

        Args:
            results: numbers by name.
            epoch: epochs done.
            step: steps done.
            seconds: the time that the evaluation took.
            best: whether it is the best so far.
        """
        if not self.active:
            return
        self._write({"kind": "eval", "epoch": epoch, "step": step, "seconds": round(seconds, 2), **results})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in list(results.items())[:3])
        print(f"  evaluation: {shown}{'  (best so far)' if best else ''}  {seconds:.0f} s", flush=True)

    @property
    def wants_pictures(self) -> bool:
        """Whether anyone looks at pictures."""
        return self.active and bool(self._hooks)

    def picture(self, name: str, image: npt.NDArray[np.uint8]) -> None:
        """Hand a picture, made after the last step, to the hooks; metrics.jsonl does not have it.

        Args:
            name: what it shows, such as "predictions".
            image: (H, W, 3) RGB.
        """
        if self.active:
            self._tell_all({"kind": "picture", "name": name, "step": self._last_step.get("step", 0), "image": image})

    def close(self) -> None:
        """End the bar, the profile and the hooks; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        if self._profile is not None:
            self._profile.close()
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            if hasattr(hook, "close"):
                self._tell(hook, hook.close)

    def _count_time(self) -> float:
        """Add the time since the last call to the totals, and return it in seconds."""
        now = time.monotonic()
        passed, self._clock = now - self._clock, now
        self._line.seconds += passed
        self._epoch.seconds += passed
        return passed

    def _write_line(self) -> None:
        """Write the train line of the steps since the last one."""
        line, self._line = self._line, _Totals()
        self._write(
            {
                "kind": "train",
                **self._last_step,
                **line.means(),
                "data_seconds": round(line.waiting / line.steps, 5),
                "step_seconds": round((line.seconds - line.waiting) / line.steps, 5),
                "memory_mib": round(_peak_memory_mib(), 1),
            }
        )

    def _write(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl, and tell the hooks.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        try:
            with self.path.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(
                f"cannot write to {self.path}: {error.strerror}; make room or mend the folder, then resume the run"
            ) from error
        self._num_records += 1
        self._tell_all(record)

    def _tell_all(self, record: dict[str, Any]) -> None:
        for hook in list(self._hooks):
            self._tell(hook, hook, dict(record))

    def _tell(self, hook: Hook, call: Callable[..., object], *arguments: object) -> None:
        """Call a hook or a method of it; where that raises, it is warned of and left out from now on."""
        try:
            call(*arguments)
        except Exception as error:
            if hook in self._hooks:
                self._hooks.remove(hook)
            warnings.warn(
                f"the hook {getattr(hook, '__name__', type(hook).__name__)} failed and is left out from now on; the "
                f"run goes on, and metrics.jsonl has everything: {type(error).__name__}: {error}",
                stacklevel=3,
            )

    def _report(self, loss: float) -> None:
        """Show loss, rate, memory and the time left on the bar; without a terminal, on a line a minute."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if now - self._last_report < (_BAR_INTERVAL if terminal else _LINE_INTERVAL):
            return
        self._last_report = now
        text = f"loss {loss:.4f}  lr {self._last_step['lr']:.3g}  {_memory_text()}  ETA {self._time_left(now)}"
        if terminal and self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        elif not terminal:
            print(f"  step {self._last_step['step']}  epoch {self._last_step['epoch']:.2f}  {text}", flush=True)

    def _time_left(self, now: float) -> str:
        """Time until the run's end, at the pace of this process so far, evaluations and checkpoints included."""
        if self._start is None:
            return "?"
        start, epochs_before = self._start
        epochs_left = self._epochs - self._last_step["epoch"]
        seconds = (now - start) * epochs_left / (self._last_step["epoch"] - epochs_before)
        return tqdm.format_interval(round(seconds))


class _StepProfile:
    """A trace of a few steps by torch.profiler, and a table of what cost the most."""

    def __init__(self, path: Path) -> None:
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.path = path
        self._profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *gpu])
        self._steps = 0
        self._phase: Literal["idle", "ready", "tracing", "done"] = "idle"

    def before_batch(self) -> None:
        """Begin the trace when it is time. Here, since after a step it may be an evaluation that comes next."""
        if self._phase == "idle" and self._steps >= _IDLE_STEPS:
            self._profiler.prepare_trace()  # the first steps under a profiler are slow, and not traced
            self._phase = "ready"
        if self._phase == "ready" and self._steps >= _IDLE_STEPS + _WARMUP_STEPS:
            self._profiler.start_trace()
            self._phase = "tracing"

    def step(self) -> None:
        if self._phase != "done":
            self._steps += 1
        if self._steps == _IDLE_STEPS + _WARMUP_STEPS + _TRACED_STEPS:
            self.end_epoch()

    def end_epoch(self) -> None:
        """End a trace that has begun, and write it."""
        if self._phase == "tracing":
            self._phase = "done"
            self._profiler.stop_trace()
            self._profiler.export_chrome_trace(str(self.path))
            first = _IDLE_STEPS + _WARMUP_STEPS + 1
            print(
                f"profile of the steps {first} to {self._steps}: {self.path}\n{_costliest_operations(self._profiler)}"
            )

    def close(self) -> None:
        self.end_epoch()
        if self._phase == "ready":  # a prepared trace is left by way of a started one
            self._profiler.start_trace()
            self._profiler.stop_trace()
        if self._phase != "done":
            self._phase = "done"
            print(
                f"profile: no trace, for there were {self._steps} steps, and tracing begins after "
                f"{_IDLE_STEPS + _WARMUP_STEPS}; train for longer"
            )


def _costliest_operations(profiler: torch.profiler.profile) -> str:
    """A table of the operations that took the most time, without that of operations they called."""
    rows = list(profiler.key_averages())
    on_gpu = any(row.self_device_time_total for row in rows)
    times = [row.self_device_time_total if on_gpu else row.self_cpu_time_total for row in rows]
    total = sum(times) or 1
    lines = [f"  {'operation':40} {'calls':>7} {'GPU ms' if on_gpu else 'CPU ms':>9}  share"]
    for spent, row in sorted(zip(times, rows, strict=True), key=lambda pair: -pair[0])[:_TABLE_ROWS]:
        lines.append(f"  {row.key[:40]:40} {row.count:>7} {spent / 1000:>9.1f}  {spent / total:>5.1%}")
    return "\n".join(lines)


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


def load_hook(name: str, run_folder: Path) -> Hook:
    """A hook that a function of the user's makes.

    Args:
        name: "package.module:function". The function is called with the run folder and returns the hook, see Journal.
            The module is found as by `import`, so that its folder must be installed or on PYTHONPATH.
        run_folder: the folder of the run; a resumed run has the one that it began with.

    Raises:
        ValueError: the name has another form, leads to no function, or that function fails or returns no function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name.isidentifier():
        raise ValueError(f"the hook is named {name!r}, expected package.module:function, such as tracking:wandb_hook")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"the hook {name!r} cannot be had: importing {module_name} gave {type(error).__name__}: {error}; put the "
            f"folder of the module on PYTHONPATH and install what it imports"
        ) from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        there = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(
            f"the hook {name!r} cannot be had: {module_name} has no function {function_name}, but {there or 'none'}"
        )
    try:
        hook = factory(run_folder)
    except Exception as error:
        raise ValueError(
            f"the hook {name!r} cannot be had: the function, called with the run folder {run_folder}, gave "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(hook):
        raise ValueError(
            f"{name!r} returned {hook!r}, expected a hook: a function that takes a record, which the function named "
            f"makes and returns"
        )
    return hook


def _peak_memory_mib() -> float:
    """The most memory held so far: allocated by torch on a GPU, else resident in this process."""
    if torch.cuda.is_initialized():
        allocated = max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        if allocated:
            return allocated / 2**20
    if sys.platform == "win32":  # has no getrusage
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def _memory_text() -> str:
    mib = _peak_memory_mib()
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"
