"""What a pass through a model consists of: its operations, the memory it takes, and the time of each module."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def current_device(device: str | torch.device) -> AbstractContextManager[Any]:
    """A context in which a GPU is the current one, whose stream events are recorded on; of others, nothing."""
    device = torch.device(device)
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Operation:
    """A convolution or matrix product of a pass.

    Attributes:
        macs: multiplications, each with its addition: half of the FLOPs that torch counts.
        moved: bytes of its inputs, weights and output, each once.
    """

    macs: int
    moved: int


class _OperationCounter(TorchDispatchMode):
    """Within it, notes the operations that torch.utils.flop_counter knows the FLOPs of."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in flop_registry:
            with self:  # in inference mode a composite operation comes whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.operations.append(Operation(flops // 2, sum(tensor.nbytes for tensor in tensors)))
        return out


def count_operations(run: Callable[[], object]) -> list[Operation]:
    """The convolutions and matrix products of what is run, in their order.

    Args:
        run: a pass of an eager model; operations that a compiler or a library fused are not seen.
    """
    with _OperationCounter() as counter:
        run()
    return counter.operations


@dataclass(frozen=True)
class AllocatedMemory:
    """Bytes that torch's allocator gave out beyond what was held before.

    Attributes:
        peak: the most at a time.
        held: what is still held at the end, with the result.
    """

    peak: int
    held: int


def allocated_memory(run: Callable[[], object], device: str | torch.device = "cpu") -> AllocatedMemory:
    """The memory that something takes, by torch's allocator.

    Nothing that torch holds is missed, whoever keeps it: what autograd saves, and what an operation of one's own keeps.
    A process takes more: what C's malloc has got back and not given up is not in it.

    Args:
        run: what is measured; run it once before, so that what is allocated once and kept is not counted.
        device: "cpu" or a CUDA device, whose memory is counted.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        peak, held = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        del result
        return AllocatedMemory(peak - before, held - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes of its starts and ends to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return AllocatedMemory(peak, held)


@dataclass(frozen=True)
class ModuleTime:
    """A module's share of a forward pass.

    Attributes:
        name: its place in the model; "" is the model itself.
        kind: its class.
        calls: how often it runs in a pass.
        seconds: with the modules within it, the median over the passes.
        own_seconds: without them: what the module computes itself.
    """

    name: str
    kind: str
    calls: int
    seconds: float
    own_seconds: float


class _Stopwatch:
    """Times of the modules of one pass after the other, on the CPU's clock or by a GPU's events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[tuple[str, Any]] = []
        self._closed: list[tuple[str, str | None, Any, Any]] = []  # module, the module around it, start, end

    def start(self, name: str, *_: Any) -> None:
        """A module begins; what a hook is called with does not matter."""
        self._open.append((name, self._now()))

    def stop(self, *_: Any) -> None:
        """The module that began last ends."""
        name, start = self._open.pop()
        self._closed.append((name, self._open[-1][0] if self._open else None, start, self._now()))

    def lap(self) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
        """The pass's seconds of each module, those without the modules within it, and how often each ran."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = {}
        own: dict[str, float] = {}
        calls: dict[str, int] = {}
        for name, around, start, end in self._closed:
            elapsed = start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
            seconds[name] = seconds.get(name, 0.0) + elapsed
            own[name] = own.get(name, 0.0) + elapsed
            calls[name] = calls.get(name, 0) + 1
            if around is not None:
                own[around] = own.get(around, 0.0) - elapsed
        self._closed.clear()
        return seconds, own, calls

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def module_times(
    model: nn.Module, run: Callable[[], object], *, rounds: int = 5, device: str | torch.device = "cpu"
) -> list[ModuleTime]:
    """The time of each module in a forward pass, by hooks, which are gone afterwards.

    Args:
        model: an eager model: in a compiled one, modules do not run one by one.
        run: a pass of the model.
        rounds: passes that are measured, after one that is not.
        device: where the model is.

    Returns:
        The modules that ran, in the order they end, the model last.
    """
    watch = _Stopwatch(torch.device(device))
    laps = []
    with current_device(device), _hooked(model, watch):
        for _ in range(rounds + 1):
            run()
            laps.append(watch.lap())
    return [
        ModuleTime(
            name=name,
            kind=type(model.get_submodule(name)).__name__,
            calls=calls,
            seconds=statistics.median(seconds[name] for seconds, _, _ in laps[1:]),
            own_seconds=statistics.median(own[name] for _, own, _ in laps[1:]),
        )
        for name, calls in laps[-1][2].items()
    ]


@contextmanager
def _hooked(model: nn.Module, watch: _Stopwatch) -> Iterator[None]:
    """Within it, the stopwatch is told of every module that begins and ends."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(watch.start, name)))
        handles.append(module.register_forward_hook(watch.stop, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
