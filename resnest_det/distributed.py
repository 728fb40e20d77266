"""The processes and devices of a run: which device, which rank, and what goes from one to the other.

Everything here also works in a plain single process, where the rank is 0 and gathering returns one item. Several
processes are started by torchrun, whose environment variables say which of them this is.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@contextmanager
def distributed_session(device_name: str = "auto") -> Iterator[torch.device]:
    """The run's processes, joined for the length of the block, and the device of this one.

    Outside of torchrun there is one process and nothing to join. Within, each process of a machine takes the GPU of its
    local rank, and only the first process prints: the standard output and the warnings of the others are dropped,
    their errors are not. Tensors on GPUs travel by NCCL, others by Gloo.

    Args:
        device_name: as select_device takes it; of several processes with GPUs, without a number.

    Raises:
        ValueError: no such device, a numbered GPU for several processes, or more processes than GPUs.
    """
    if _environment("WORLD_SIZE", 1) == 1:
        yield select_device(device_name)
        return
    device = _device_of_local_rank(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        if rank() == 0:
            yield device
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():  # noqa: PTH123
                warnings.simplefilter("ignore")
                yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among the run's processes, 0 in a single-process run."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of the run, 1 in a single-process run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number among the run's processes on this machine, as torchrun counts them."""
    return _environment("LOCAL_RANK", 0) if world_size() > 1 else 0


def local_world_size() -> int:
    """The number of the run's processes on this machine, as torchrun counts them."""
    return _environment("LOCAL_WORLD_SIZE", world_size()) if world_size() > 1 else 1


def describe_processes(device: torch.device) -> str:
    """The device, and how many processes have one each, such as "4 processes, the first on cuda:0"."""
    return str(device) if world_size() == 1 else f"{world_size()} processes, the first on {device}"


def gather_objects(item: T) -> list[T]:
    """Every process's `item`, in rank order, on every process.

    Args:
        item: anything that pickles. Tensors should be on the CPU.
    """
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # a barrier of NCCL's would want a device


def any_process(*flags: bool, device: torch.device | str = "cpu") -> tuple[bool, ...]:
    """For each flag, whether it is true on at least one process; all of them get the same answer.

    Args:
        flags: this process's.
        device: what the message is sent from; a group of NCCL's alone, as others make it, wants a GPU.
    """
    if world_size() == 1:
        return flags
    counts = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(counts)
    return tuple(bool(count) for count in counts)


def mean_over_processes(values: Sequence[Tensor]) -> list[float]:
    """Each value's mean over the processes, as numbers: one wait for the device and one message in all.

    Args:
        values: tensors of one element, of one device; every process gives as many.
    """
    stacked = torch.stack([value.detach().float().reshape(()) for value in values])
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    return stacked.tolist()


def mean_tensor_over_processes(value: Tensor) -> Tensor:
    """The mean of the processes' tensors, on every process and without a gradient; all give one of the same shape."""
    if world_size() == 1:
        return value
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return mean / world_size()


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, such as the running statistics of norms."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def select_device(name: str = "auto") -> torch.device:
    """The device of that name, checked to exist.

    Args:
        name: "auto" (a CUDA GPU where there is one, else the CPU), "cpu", "cuda", "cuda:1", "mps".

    Raises:
        ValueError: the name is no device, or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d*))?|mps", name):
        raise ValueError(f"device {name!r} is not a device; use auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not on this machine, which has {torch.cuda.device_count()} CUDA GPUs; "
            f"use device=auto or device=cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not on this machine; use device=auto or device=cpu")
    return device


def _device_of_local_rank(name: str) -> torch.device:
    """The device of one of several processes of a machine."""
    device = select_device(name)
    if device.type != "cuda":
        return device
    processes, number = _environment("LOCAL_WORLD_SIZE", 1), _environment("LOCAL_RANK", 0)
    if ":" in name:
        raise ValueError(
            f"device {name!r} is one GPU, and there are {processes} processes on this machine: use device=cuda, and "
            f"choose among the GPUs by CUDA_VISIBLE_DEVICES"
        )
    if processes > torch.cuda.device_count():
        raise ValueError(
            f"there are {processes} processes on this machine and {torch.cuda.device_count()} CUDA GPUs: start "
            f"torchrun with --nproc-per-node={torch.cuda.device_count()}, or use device=cpu"
        )
    return torch.device("cuda", number)


def _environment(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`; lists, tuples and dicts are walked, the rest is kept."""
    if isinstance(value, Tensor):
        if device.type == "mps" and value.dtype == torch.float64:  # which Apple's GPUs do not have
            value = value.float()
        return value.to(device, non_blocking=device.type != "cpu")  # to the CPU it would not wait for the copy
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def images_to_device(images: Any, device: torch.device) -> Any:
    """uint8 images of a loader, moved to `device` and then scaled to float32 in [0, 1].

    Args:
        images: a tensor (N, 3, H, W) or a list of tensors (3, H, W), uint8. They travel as bytes, a quarter
            of the traffic of floats.
    """
    if isinstance(images, list | tuple):
        return [images_to_device(image, device) for image in images]
    moved = images.to(device, non_blocking=True)
    return moved.float().div_(255) if moved.dtype == torch.uint8 else moved
