"""BatchNorm's statistics taken anew over many batches, for the weights as they are.

Paper: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3 ("PreciseBN").
Reference implementation: fvcore, `nn/precise_bn.py`.

What differs from the reference: every value counts alike, whichever batch, process or call of the norm it came in (the
reference averages over batches); and nothing but the running statistics changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnest_det.distributed import world_size


@torch.no_grad()
def recompute_batch_norms(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], object]) -> None:
    """Replace each live BatchNorm's running mean and variance by those of all its inputs over `batches`.

    The running averages of training trail behind the weights, and weigh the last few batches most. Their replacement is
    exact for the weights as they are: over a channel's values in all batches and processes, the mean, and the mean of
    the batches' variances plus the variance of their means.

    The model runs in training mode, where its norms normalise by the batch. Live are the norms that `model.train()`
    puts into training and that keep running statistics; without any, nothing is run. One that no batch reaches keeps
    its statistics. Parameters, other buffers, training modes and torch's random numbers are afterwards as they were;
    after an error, the statistics too.

    Args:
        model: not in DistributedDataParallel: its `module`. A compiled model runs uncompiled.
        batches: passed to `forward` one by one. In a run of several processes each has its own; where the model has
            SyncBatchNorm, equally many.
        forward: runs the model on a batch; what it returns is dropped.

    Raises:
        ValueError: there is no batch on any process, or none reaches a live norm.
    """
    with _left_as_it_was(model):
        model.train()
        moments = {norm: _Moments(norm.get_buffer("running_mean")) for norm in model.modules() if _is_live(norm)}
        if not moments:
            return
        num_batches = 0
        with ExitStack() as block:
            for norm, of_norm in moments.items():
                block.callback(norm.register_forward_pre_hook(of_norm.add_input).remove)
            block.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code knows nothing of the hooks
            for batch in batches:
                forward(batch)
                num_batches += 1
        for of_norm in moments.values():
            of_norm.sum_over_processes()
        if not any(of_norm.count for of_norm in moments.values()):
            raise ValueError(
                f"none of the model's {len(moments)} live BatchNorms saw a value in {num_batches} batches; give one "
                "batch or more, and a forward that runs this model"
            )
    for norm, of_norm in moments.items():
        if of_norm.count:
            mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
            mean.copy_(of_norm.mean.to(mean.dtype))
            var.copy_((of_norm.squares / of_norm.count).to(var.dtype))


class _Moments:
    """Of the values a channel that a norm was given: their number, mean, and sum of squared distances from it.

    They are merged input by input in float64 (Chan, Golub and LeVeque, 1979), so that no large numbers are subtracted.
    """

    def __init__(self, running_mean: Tensor) -> None:
        device = "cpu" if running_mean.device.type == "mps" else running_mean.device  # Apple's GPUs have no float64
        self.count = 0
        self.mean = torch.zeros(len(running_mean), dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)

    def add_input(self, norm: nn.Module, inputs: tuple[Tensor]) -> None:  # noqa: ARG002  # as a hook is called
        """Take in the values of (N, C, ...)."""
        (x,) = inputs
        count = x.numel() // x.shape[1]
        if count == 0:
            return
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = (
            moment.to(self.mean.device).double()
            for moment in torch.var_mean(wide, [axis for axis in range(x.ndim) if axis != 1], correction=0)
        )
        total = self.count + count
        shift = mean - self.mean
        self.mean += shift * (count / total)
        self.squares += count * var + shift.square() * (self.count * count / total)
        self.count = total

    def sum_over_processes(self) -> None:
        """Take in the values of the other processes."""
        if world_size() == 1:
            return
        sums = torch.cat([self.mean.new_tensor([self.count]), self.count * self.mean])
        dist.all_reduce(sums)
        joint_count = int(sums[0])
        joint_mean = sums[1:] / max(joint_count, 1)
        self.squares += self.count * (self.mean - joint_mean).square()
        dist.all_reduce(self.squares)
        self.count, self.mean = joint_count, joint_mean


def _is_live(norm: nn.Module) -> bool:
    return isinstance(norm, _BatchNorm) and norm.training and norm.running_mean is not None


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Within it, the model has copies of its buffers; after it, its own again, its modes and torch's random numbers."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(module, name, buffer) for module in modes for name, buffer in module.named_buffers(recurse=False)]
    tensors = chain(model.parameters(), model.buffers())
    gpus = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    for module, name, buffer in buffers:
        setattr(module, name, buffer.clone())
    try:
        with torch.random.fork_rng(sorted(gpus)):
            yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
        for module, training in modes.items():
            module.training = training
