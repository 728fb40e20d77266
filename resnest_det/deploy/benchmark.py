"""Models side by side: latency, throughput, training steps and memory, in interleaved rounds.

A machine has fast and slow spells. What is compared therefore runs in turn, round after round, so that a slow spell
meets all of it, and a time is a median with the lowest and the highest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.ssd import SSD

from resnest_det.deploy.profiling import allocated_memory, count_operations, current_device
from resnest_det.deploy.roofline import Machine, least_seconds
from resnest_det.models.deeplabv3plus import DeepLabV3Plus

Layout = Literal["NCHW", "channels_last"]
Task = Literal["classification", "detection", "segmentation"]
Images: TypeAlias = Tensor | list[Tensor]

MEMORY_FORMATS: dict[Layout, torch.memory_format] = {
    "NCHW": torch.contiguous_format,
    "channels_last": torch.channels_last,
}

_DETECTORS = (GeneralizedRCNN, RetinaNet, FCOS, SSD)
_BOXES_PER_IMAGE = 8
_MANY = 256


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 2,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Time several functions in turn, round after round, every second round in the opposite order.

    Args:
        runs: what is timed, by name.
        rounds: times that each is measured, 1 or more.
        warm_up: rounds before them that are not measured.
        device: where the work is done. On CUDA the time is that between two events on the current stream.

    Returns:
        The seconds of each round, by name.

    Raises:
        ValueError: there is nothing to run, or `rounds` or `warm_up` is out of range.
    """
    if not runs:
        raise ValueError("runs is empty, expected at least one function to time")
    if rounds < 1 or warm_up < 0:
        raise ValueError(f"rounds={rounds} must be 1 or more, and warm_up={warm_up} 0 or more")
    seconds_of = _TIMERS.get(torch.device(device).type, _seconds_on_cpu)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with current_device(device):
        for number in range(-warm_up, rounds):
            for name in list(runs) if number % 2 == 0 else reversed(list(runs)):
                elapsed = seconds_of(runs[name])
                if number >= 0:
                    seconds[name].append(elapsed)
    return seconds


def _seconds_on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = run()
    end = time.perf_counter()
    del result  # freed outside of the time
    return end - start


def _seconds_on_cuda(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _seconds_on_mps(run: Callable[[], object]) -> float:
    def finished() -> None:
        run()
        torch.mps.synchronize()

    torch.mps.synchronize()
    return _seconds_on_cpu(finished)


_TIMERS = {"cuda": _seconds_on_cuda, "mps": _seconds_on_mps}


def spread(seconds: Sequence[float], *, digits: int = 0) -> str:
    """Times as text: the median (lowest-highest), in milliseconds.

    Args:
        seconds: one time or more.
        digits: after the point.
    """
    low, middle, high = (f"{1e3 * f(seconds):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def task_of(model: nn.Module) -> Task:
    """What a model is called with.

    Returns:
        "detection" of torchvision's detectors and ours: a list of images (3, H, W), and in training targets.
        "segmentation" of our DeepLabV3Plus: images (N, 3, H, W), and in training masks.
        "classification" of anything else: images (N, 3, H, W) to logits (N, classes) or (N, classes, H, W), also as
        "out" in a dict.
    """
    if isinstance(model, _DETECTORS):
        return "detection"
    return "segmentation" if isinstance(model, DeepLabV3Plus) else "classification"


def example_images(task: Task, num_images: int, size: int, layout: Layout, device: str | torch.device) -> Images:
    """Random square images in [0, 1], the same at every call, as models of the task take them.

    Args:
        task: see task_of.
        num_images: 1 or more.
        size: their side, in pixels.
        layout: of a batch in memory; a list has none.
        device: where they are wanted.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(num_images, 3, size, size, generator=generator)
    images = images.to(device, memory_format=MEMORY_FORMATS[layout])
    return list(images.contiguous()) if task == "detection" else images


def training_step(model: nn.Module, task: Task, images: Images, dtype: torch.dtype = torch.float32) -> None:
    """A forward pass, its loss and the backward pass, from empty gradients.

    A detector gets 8 boxes an image, and what gives logits is trained by cross-entropy towards class 0.

    Args:
        model: in training mode, eager or compiled.
        task: see task_of.
        images: see example_images.
        dtype: float32, or the 16-bit type of autocast.
    """
    model.zero_grad(set_to_none=True)
    first = images[0]
    with torch.autocast(first.device.type, dtype, enabled=dtype != torch.float32):
        if task == "detection":
            losses = model(images, [_boxes(image) for image in images])
            loss = torch.stack(list(losses.values())).sum()
        elif task == "segmentation":
            masks = torch.zeros(len(images), *first.shape[-2:], dtype=torch.uint8, device=first.device)
            loss = torch.stack(list(model(images, masks).values())).sum()
        else:
            out = model(images)
            logits = (out["out"] if isinstance(out, dict) else out).float()
            labels = torch.zeros(len(logits), *logits.shape[2:], dtype=torch.int64, device=logits.device)
            loss = F.cross_entropy(logits, labels)
    loss.backward()


def _boxes(image: Tensor) -> dict[str, Tensor]:
    """Objects of the first class along the diagonal of an image (3, H, W)."""
    height, width = image.shape[-2:]
    corners = torch.arange(_BOXES_PER_IMAGE, device=image.device)[:, None] / (2 * _BOXES_PER_IMAGE)
    sides = torch.tensor([width, height], device=image.device)
    boxes = torch.cat([corners * sides, (corners + 0.5) * sides], dim=1)
    targets = {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64, device=image.device)}
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8, device=image.device)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return targets | {"masks": masks}


@dataclass(frozen=True)
class Candidate:
    """A model in one form and one layout, which is measured beside others.

    Attributes:
        name: of the model and the form.
        layout: of its weights and of its images.
        task: see task_of.
        inference: called with images, in evaluation and without gradients.
        model: the eager model, in which parameters and operations are counted; None of what is no module, such as a
            file that another engine runs.
        training: the module of training steps; None for what does not train.
    """

    name: str
    layout: Layout
    task: Task
    inference: Callable[[Any], Any]
    model: nn.Module | None
    training: nn.Module | None


@dataclass(frozen=True)
class Measurement:
    """What was measured of a candidate.

    Attributes:
        name: the candidate's.
        layout: the candidate's.
        batch_size: images of a batch and of a training step.
        latency: seconds for one image, of each round.
        batch: seconds for a batch, of each round.
        training_step: seconds for forward pass, loss and backward pass of a batch, of each round; empty where that was
            not measured.
        parameters: their number; None where the candidate is no module, as of the following.
        gigamacs: multiplications of one image's forward pass, in thousands of millions: half of the FLOPs that torch
            counts, of convolutions and matrix products.
        inference_memory: bytes of the weights and of the most that is allocated beside them for a batch; None on
            devices whose allocator does not say, which are all but the CPU and CUDA.
        training_memory: the same of a training step; None also where that was not measured.
        least_seconds: what the roofline bounds the latency by, see roofline.least_seconds; None without a machine.
    """

    name: str
    layout: Layout
    batch_size: int
    latency: list[float]
    batch: list[float]
    training_step: list[float]
    parameters: int | None
    gigamacs: float | None
    inference_memory: int | None
    training_memory: int | None
    least_seconds: float | None

    @property
    def images_per_second(self) -> float:
        """Throughput: images of a batch by the median of its seconds."""
        return self.batch_size / statistics.median(self.batch)


def measure(
    candidates: Sequence[Candidate],
    *,
    size: int,
    batch_size: int,
    rounds: int,
    train: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    machine: Machine | None = None,
) -> list[Measurement]:
    """Measure models side by side: all of them for one image, then for a batch, then in a training step.

    Args:
        candidates: what is measured, on the device. Their modules are left in the mode that was measured last.
        size: side of the square images, in pixels.
        batch_size: images of a batch and of a training step.
        rounds: times that each is measured, after two that are not.
        train: whether training steps are measured.
        device: where the candidates are.
        dtype: float32, or the 16-bit type of autocast.
        machine: its rates, for the roofline; None to leave that out.

    Returns:
        One for each candidate, in their order.

    Raises:
        ValueError: an argument is out of range, or two candidates have the same name and layout.
    """
    by_key = {f"{candidate.name}, {candidate.layout}": candidate for candidate in candidates}
    if len(by_key) < len(candidates):
        keys = [f"{candidate.name}, {candidate.layout}" for candidate in candidates]
        raise ValueError(f"two models are called {max(keys, key=keys.count)!r}; name each of them once")
    if size < 1 or batch_size < 1:
        raise ValueError(f"size={size} and batch_size={batch_size} must both be 1 or more")
    device = torch.device(device)
    for own in candidates:
        for module in (own.model, own.inference):
            if isinstance(module, nn.Module):
                module.eval()

    def forward(run: Callable[[Any], Any], own: Candidate, num_images: int) -> Callable[[], object]:
        return partial(run_inference, run, example_images(own.task, num_images, size, own.layout, device), dtype)

    batches = {key: forward(own.inference, own, batch_size) for key, own in by_key.items()}
    latency = interleaved(
        {key: forward(own.inference, own, 1) for key, own in by_key.items()}, rounds=rounds, device=device
    )
    batch = interleaved(batches, rounds=rounds, device=device)
    modules = {key: own.model for key, own in by_key.items() if own.model is not None}
    weights = {key: _weight_bytes(model) for key, model in modules.items()}
    has_allocator = device.type in ("cpu", "cuda")  # that is, one which says what it gives out
    memory = {key: weights[key] + allocated_memory(batches[key], device).peak for key in modules if has_allocator}
    operations = {key: count_operations(forward(model, by_key[key], 1)) for key, model in modules.items()}
    training_time: dict[str, list[float]] = {}
    training_memory: dict[str, int] = {}
    if train:
        steps = {
            key: partial(
                training_step,
                own.training.train(),
                own.task,
                example_images(own.task, batch_size, size, own.layout, device),
                dtype,
            )
            for key, own in by_key.items()
            if own.training is not None
        }
        training_time = interleaved(steps, rounds=rounds, device=device) if steps else {}
        for key, step in steps.items():
            step.args[0].zero_grad(set_to_none=True)
            if has_allocator:
                training_memory[key] = weights[key] + allocated_memory(step, device).peak
            step.args[0].zero_grad(set_to_none=True)
    return [
        Measurement(
            name=own.name,
            layout=own.layout,
            batch_size=batch_size,
            latency=latency[key],
            batch=batch[key],
            training_step=training_time.get(key, []),
            parameters=sum(parameter.numel() for parameter in own.model.parameters()) if own.model else None,
            gigamacs=sum(operation.macs for operation in operations[key]) / 1e9 if own.model else None,
            inference_memory=memory.get(key),
            training_memory=training_memory.get(key),
            least_seconds=least_seconds(operations[key], machine) if own.model and machine else None,
        )
        for key, own in by_key.items()
    ]


@torch.inference_mode()
def run_inference(run: Callable[[Any], Any], images: Images, dtype: torch.dtype = torch.float32) -> Any:
    """What a model gives for images, without gradients.

    Args:
        run: the model.
        images: see example_images.
        dtype: float32, or the 16-bit type of autocast.
    """
    with torch.autocast(images[0].device.type, dtype, enabled=dtype != torch.float32):
        return run(images)


def _weight_bytes(model: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def many_compilations() -> AbstractContextManager[None]:
    """Within it, torch compiles a class's forward for many models and sizes; else it runs the ninth eagerly."""
    return torch._dynamo.config.patch(recompile_limit=_MANY)


def compile_frozen(model: nn.Module, examples: Sequence[Images], dtype: torch.dtype = torch.float32) -> nn.Module:
    """torch.compile for inference, with the weights frozen into the code.

    Args:
        model: in evaluation mode.
        examples: images of each shape that it will be called with; for others the weights are not frozen.
        dtype: float32, or the 16-bit type of autocast.

    Returns:
        What run_inference takes; it shares the model's weights, which must not change any more.
    """
    import torch._inductor.config as inductor

    compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    with inductor.patch(freezing=True), many_compilations():
        for images in examples:
            run_inference(compiled, images, dtype)
    return compiled
