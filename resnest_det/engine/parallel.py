"""A model on several processes: whole on each (DistributedDataParallel), or each with its shards of it (FSDP2).

A model that is sharded stays the module it was, with parameters of which each process holds a part. What is saved of
it is whole, in the form that a model which was never sharded has, so that either loads the other's checkpoints.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, device, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from resnest_det.distributed import broadcast_buffers, rank, world_size


def data_parallel(model: nn.Module, device: device, *, sync_buffers: bool) -> nn.Module:
    """The model as each process trains it: its gradients are averaged over the processes while they are computed.

    In a single process it is the model itself. Every trainable parameter must take part in each step's losses.

    Args:
        model: on `device`, the same on every process, or sharded over them.
        device: of this process.
        sync_buffers: whether every step begins with the first process's buffers.
    """
    if world_size() == 1:
        return model
    if isinstance(model, FSDPModule):
        return _ShardedDataParallel(model, sync_buffers)
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{name: sync_buffers},  # type: ignore[arg-type]
    )


def without_gradient_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """A block in which a model of data_parallel only adds up its own gradients, to be exchanged after it."""
    return model.no_sync() if isinstance(model, DistributedDataParallel | _ShardedDataParallel) else nullcontext()


class _ShardedDataParallel(nn.Module):
    """What DistributedDataParallel does besides exchanging gradients, for a model that is sharded."""

    def __init__(self, model: nn.Module, sync_buffers: bool) -> None:
        super().__init__()
        self.module: Any = model
        self._sync_buffers, self._exchanges, self._begins_step = sync_buffers, True, True

    def forward(self, *inputs: Any) -> Any:
        if self._sync_buffers and self._begins_step:
            broadcast_buffers(self.module)
        self._begins_step = self._exchanges
        return self.module(*inputs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._exchanges = False
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._exchanges = True
            self.module.set_requires_gradient_sync(True)


def shard(model: nn.Module, units: Iterable[nn.Module], device: device) -> None:
    """Split a model's parameters over the processes, in place: each keeps its shards, of gradients and momenta too.

    Paper: Zhao et al., "PyTorch FSDP", arXiv 2304.11277; it is torch's fully_shard ("FSDP2"). The parameters of a unit
    are whole only while it runs, forward and backward; the others from the beginning of a step to its end. All start
    from the first process's weights. An optimiser is made afterwards, as the parameters are other ones then.

    Args:
        model: on `device`; its parameters are contiguous (those of channels_last are not) and have a dimension or more.
        units: modules of the model, each called as a module in its forward pass.
        device: of this process.

    Raises:
        ValueError: there is one process only, or a parameter that cannot be split.
    """
    if world_size() == 1:
        raise ValueError(
            "run.parallel=fsdp splits the model over processes, and there is 1: start 2 or more by torchrun "
            "--nproc-per-node=N, or use run.parallel=ddp"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_contiguous() or parameter.ndim == 0:
            raise ValueError(
                f"run.parallel=fsdp splits contiguous parameters along their first dimension, and {name} has the shape "
                f"{list(parameter.shape)} and strides {list(parameter.stride())}: use run.parallel=ddp"
            )
        dist.broadcast(parameter.detach(), src=0)
    broadcast_buffers(model)
    mesh = init_device_mesh(device.type, (world_size(),))
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """A block in which a model of `shard` is whole on every process, as any other model is anyway.

    Each may run it without gradients as often as it likes. Its weights must not be changed, nor loaded.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with torch.inference_mode(False):  # or training could not use the memory that is taken here
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor that the processes hold the shards of; any other as it is. Every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, in the same memory; all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any) -> Any:
    """A state dict in which no tensor is sharded, for the first process; others get empty tensors in their place.

    They are gathered one by one onto the CPU, so that no GPU need hold the whole. Without shards, the state as it is.
    Every process must ask for it.
    """
    if isinstance(state, DTensor):
        tensor = whole_tensor(state)
        return tensor.cpu() if rank() == 0 else tensor.new_empty(0)
    if isinstance(state, dict):
        whole = copy(state)  # which keeps what a module's state dict says of its version
        whole.update((key, whole_state(value)) for key, value in state.items())
        return whole
    return state


def load_whole_state(item: Any, state: dict[str, Any]) -> None:
    """`item.load_state_dict(state)`, where the state is of whole_state and a model or optimiser may be sharded.

    Every process gives the same state.
    """
    if isinstance(item, nn.Module):
        own = item.state_dict()
        state = {name: _shard_as(tensor, own.get(name)) for name, tensor in state.items()}
    elif isinstance(item, Optimizer):
        parameters = [parameter for group in item.param_groups for parameter in group["params"]]
        momenta = {
            number: {
                name: _shard_as(value, parameters[number]) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
            for number, values in state["state"].items()
            if number < len(parameters)  # of another model, which the optimiser refuses
        }
        state = state | {"state": momenta}
    item.load_state_dict(state)


def _shard_as(tensor: Tensor, like: Any) -> Tensor:
    """This process's shard of a whole tensor, where `like` is sharded and of its shape; otherwise the tensor."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor
