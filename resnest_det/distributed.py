"""The processes and devices of a run: which device, which rank, and what goes from one to the other.

Everything here also works in a plain single process, where the rank is 0 and gathering returns one item.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """This process's number among the run's processes, 0 in a single-process run."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of the run, 1 in a single-process run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
