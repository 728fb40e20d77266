"""BatchNorm whose statistics are taken over all processes of a run, on GPUs and on CPUs.

Paper: Peng et al., "MegDet: A Large Mini-Batch Object Detector", arXiv 1711.07240 ("cross-GPU batch normalization").
Reference implementation: torch's nn.SyncBatchNorm, whose function runs here where the tensors are not on the CPU.

What differs from nn.SyncBatchNorm: it works on the CPU as well, and it is no subclass of it: DistributedDataParallel
refuses models on the CPU that hold one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm as TorchFunction


def num_processes() -> int:
    """The number of processes of the run, 1 in a single-process run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that in training normalises by the mean and variance over the batches of all processes together.

    The batches may differ in size, and may be empty on some. Every process must run the layer equally often and in the
    same order, forward and backward. The gradients of weight and bias are those of the process's own batch, to be
    combined as every other parameter's. In one process, and in evaluation, it is BatchNorm2d.

    The arguments, and the names in the state dict, are those of BatchNorm2d.

    Shape:
        (N, num_features, H, W) to the same. The statistics of float16 and bfloat16 are taken in float32.

    Raises:
        ValueError: all processes together have fewer than two values a channel.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise: (N, num_features, H, W) to the same."""
        if self.training and num_processes() > 1:
            return self._normalise_together(input)
        return super().forward(input)

    # A compiled graph breaks at the messages between processes anyway, after a warning.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _normalise_together(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        momentum = self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the running statistics are the plain mean over the batches
                momentum = 1 / self.num_batches_tracked.item()
        function = _OnCPU if input.device.type == "cpu" else TorchFunction
        return function.apply(
            input,
            self.weight,
            self.bias,
            self.running_mean if self.track_running_stats else None,
            self.running_var if self.track_running_stats else None,
            self.eps,
            0.0 if momentum is None else momentum,
            dist.group.WORLD,
            num_processes(),
        )


class _OnCPU(torch.autograd.Function):
    """The normalisation for tensors on the CPU; called as torch's function for GPUs is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
        group: dist.ProcessGroup,
        group_size: int,
    ) -> Tensor:
        wide = _wide(x)
        count, mean, var = _joint_statistics(wide, group, group_size)
        if count == 1:
            raise ValueError(
                f"SyncBatchNorm got 1 value a channel on its {group_size} processes together, and needs 2 or more to "
                "train: use more or larger images a step and process, or norm='frozen_bn' or 'gn'"
            )
        if count == 0:  # a mask head's, where no process has an object: nothing goes through, and nothing is learnt
            mean, var = torch.zeros_like(mean), torch.ones_like(var)
        elif running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
        mean, var = mean.to(wide.dtype), var.to(wide.dtype)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count, ctx.group = eps, count, group
        weight, bias = (None if affine is None else affine.to(wide.dtype) for affine in (weight, bias))
        return F.batch_norm(wide, mean, var, weight, bias, training=False, eps=eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        wide_gradient = _wide(gradient)
        scale = (var + ctx.eps).rsqrt()
        normalised = (_wide(x) - _by_channel(mean)).mul_(_by_channel(scale))
        weight_gradient = (wide_gradient * normalised).sum((0, 2, 3))
        bias_gradient = wide_gradient.sum((0, 2, 3))
        input_gradient = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([weight_gradient, bias_gradient]).double()
            dist.all_reduce(sums, group=ctx.group)
            from_var, from_mean = (sums / ctx.count).to(mean.dtype).chunk(2)
            input_gradient = wide_gradient - normalised.mul_(_by_channel(from_var)) - _by_channel(from_mean)
            input_gradient.mul_(_by_channel(scale if weight is None else scale * weight))
            input_gradient = input_gradient.to(x.dtype)
        own = [
            sum_over_batch.to(weight.dtype) if needed else None
            for sum_over_batch, needed in zip((weight_gradient, bias_gradient), ctx.needs_input_grad[1:3], strict=True)
        ]
        return input_gradient, *own, None, None, None, None, None, None


def _joint_statistics(x: Tensor, group: dist.ProcessGroup, group_size: int) -> tuple[int, Tensor, Tensor]:
    """The values a channel of all processes' (N, C, H, W), their mean and biased variance (C,), in float64."""
    count = x.numel() // x.shape[1]
    if count:
        mean = x.mean((0, 2, 3))
        var = (x - _by_channel(mean)).square_().mean((0, 2, 3))
    else:
        mean = var = x.new_zeros(x.shape[1])
    own = torch.cat([x.new_tensor([count], dtype=torch.float64), mean.double(), var.double()])
    of_each = [torch.empty_like(own) for _ in range(group_size)]
    dist.all_gather(of_each, own, group=group)
    counts, means, variances = torch.stack(of_each).split([1, x.shape[1], x.shape[1]], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return int(total), mean, var


def _wide(x: Tensor) -> Tensor:
    """float64 as it is, all else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def _by_channel(values: Tensor) -> Tensor:
    """(C,) to (C, 1, 1), which goes with (N, C, H, W)."""
    return values[:, None, None]
