"""Split attention: the convolution of ResNeSt.

Paper: Zhang et al., "ResNeSt: Split-Attention Networks", arXiv 2004.08955.
Reference implementation: zhanghang1989/ResNeSt, `SplAtConv2d` in its radix-major form. Children have the
released names, so released weights load by name.

What differs from the reference:
- the splits are pooled before they are summed: the pool of a sum is the sum of the pools, and no full-size
  sum has to be written;
- with two splits, whose shares sum to one, the weighted sum is one interpolation;
- a width of the attention that `groups` does not divide is rounded up to a multiple of `groups`, where the
  reference fails. No published network needs it;
- in training, where `fused.trains_fused` says so, the backward pass is written by hand: of the full-size maps it keeps
  bn0's input alone, where autograd keeps bn0's input and output, and a sum or product for each split;
- on CUDA, after `use_triton`, what follows the convolution runs in kernels of our own.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from resnest_det.layers.fused import (
    conv_norm_relu,
    convolution_shape,
    is_known_norm,
    may_fuse,
    norm_relu_backward,
    norm_statistics,
    normalise,
    normalise_again,
    trains_fused,
)
from resnest_det.layers.norm import NormLayer, check_pooled_batch, uses_batch_statistics
from resnest_det.layers.selection import select_softly, selection_shares, weighted_sum


class SplitAttentionConv2d(nn.Module):
    """A grouped convolution into `radix` splits, and an attention over the splits for each channel.

    conv -> bn0 -> ReLU gives `radix` feature maps of `channels` channels. Their sum, averaged over the image,
    goes through fc1 -> bn1 -> ReLU -> fc2 to one logit a channel and split; softmax over the splits (a sigmoid
    where radix is 1) weighs the maps, and their weighted sum is the output. No norm or ReLU follows.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        kernel_size: side of the square kernel.
        stride: stride of the convolution.
        padding: zero padding on each side; `dilation * (kernel_size // 2)` keeps the size at stride 1.
        dilation: spacing of the kernel's points.
        groups: cardinality: number of groups within each split. Divides `in_channels / radix` and `channels`.
        radix: number of splits, 1 or more.
        reduction: the attention's hidden width is `max(in_channels * radix // reduction, 32)`.
        norm_layer: builds bn0 from its number of channels.
        pooled_norm_layer: builds bn1, which sees features of size 1x1; `norm_layer` where None. GroupNorm
            needs another form here than elsewhere: `layers.norm.pooled_group_norm`.

    Shape:
        (N, in_channels, H, W) to (N, channels, H', W'), with H' and W' as of a Conv2d. The memory format of
        the input (NCHW or channels_last) is the memory format of the output.

    Raises:
        ValueError: radix or groups out of range, channels that do not divide; or, in the forward pass, one
            image while bn1 trains as BatchNorm: over one value there are no statistics.

    Attributes:
        triton: whether Triton kernels are wanted on CUDA, see `use_triton`.
    """

    triton = False

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        dilation: int = 1,
        groups: int = 1,
        radix: int = 2,
        reduction: int = 4,
        norm_layer: NormLayer = nn.BatchNorm2d,
        pooled_norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if radix < 1 or groups < 1:
            raise ValueError(f"radix={radix} and groups={groups} must both be 1 or more")
        if in_channels % (groups * radix) or channels % groups:
            raise ValueError(
                f"in_channels={in_channels} must be divisible by groups * radix = {groups * radix}, "
                f"and channels={channels} by groups = {groups}"
            )
        hidden = max(in_channels * radix // reduction, 32)
        hidden += -hidden % groups
        self.radix = radix
        self.groups = groups
        self.conv = nn.Conv2d(
            in_channels,
            channels * radix,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=groups * radix,
            bias=False,
        )
        self.bn0 = norm_layer(channels * radix)
        self.relu = nn.ReLU(inplace=True)
        self.fc1 = nn.Conv2d(channels, hidden, 1, groups=groups)
        self.bn1 = (pooled_norm_layer or norm_layer)(hidden)
        self.fc2 = nn.Conv2d(hidden, channels * radix, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and attend: (N, in_channels, H, W) to (N, channels, H', W')."""
        if self.trains_fused(x):
            return self.attend(self.conv(x))
        if self.triton and self._kernels_take(x):
            return self._attend_in_kernels(self.conv(x))
        maps = conv_norm_relu(x, self.conv, self.bn0, self.relu)  # (N, radix * channels, H', W')
        logits = self.attention_logits(maps.mean((2, 3), keepdim=True))
        return select_softly(self.splits(maps), logits)

    def trains_fused(self, x: Tensor) -> bool:
        """Whether gradients are wanted whose backward pass is written here."""
        return trains_fused(x, (self.conv,), (self.bn0,), self.relu) and not self._has_gradient_hooks()

    def _has_gradient_hooks(self) -> bool:
        """Whether hooks would run twice: within the attention's own backward pass, and after it."""
        return any(parameter._backward_hooks for parameter in self._attention_parameters())

    def _kernels_take(self, x: Tensor) -> bool:
        return (
            may_fuse(x, self.bn0, self.relu, device="cuda")
            and is_known_norm(self.bn0)
            and type(self.relu) is nn.ReLU
            and not self._has_gradient_hooks()
            and x.numel() > 0
            # Offsets within an image are 32 bits wide.
            and convolution_shape(x, self.conv)[1:].numel() < 2**31
        )

    def splits(self, maps: Tensor) -> list[Tensor]:
        """The splits of (N, radix * channels, H, W), as views."""
        chunks = maps.chunk(self.radix, dim=1)
        return [chunks[index] for index in range(self.radix)]

    def attend(self, x: Tensor) -> Tensor:
        """What follows the convolution, from its output (N, radix * channels, H', W'); where `trains_fused`."""
        return _Attend.apply(x, self.bn0.weight, self.bn0.bias, self, *self._attention_parameters())

    def _attend_in_kernels(self, x: Tensor) -> Tensor:
        """The same where `_kernels_take` the convolution's input."""
        if torch.is_grad_enabled():
            return _AttendInKernels.apply(x, self.bn0.weight, self.bn0.bias, self, *self._attention_parameters())
        from resnest_det.layers.attention_kernels import channel_norm, pool_maps, sum_splits

        mean, inverse_std, _ = norm_statistics(x, self.bn0)
        weight, bias = cast("Tensor | None", self.bn0.weight), cast("Tensor | None", self.bn0.bias)
        norm = channel_norm(mean, inverse_std, weight, bias)
        logits = self.attention_logits(pool_maps(x, norm).to(x.dtype))
        return sum_splits(x, norm, selection_shares(logits, self.radix))

    def _attention_parameters(self) -> list[nn.Parameter]:
        return [*self.fc1.parameters(), *self.bn1.parameters(), *self.fc2.parameters()]

    def needs_several_images(self) -> bool:
        """Whether bn1 takes its statistics from the images of this process's batch, so that one is too few."""
        return uses_batch_statistics(self.bn1)

    def attention_logits(self, pooled: Tensor) -> Tensor:
        """The logits of the attention from the pooled splits: (N, radix * channels, 1, 1) to (N, radix, channels)."""
        check_pooled_batch(self.bn1, pooled.shape[0], "split attention")
        total = pooled.unflatten(1, (self.radix, -1)).sum(1)  # (N, channels, 1, 1)
        logits = self.fc2(self.relu(self.bn1(self.fc1(total))))
        # fc2's groups are the outer axis of its output: (groups, radix, channels / groups) to radix-major.
        return logits.flatten(1).unflatten(1, (self.groups, self.radix, -1)).transpose(1, 2).flatten(2)


class _Attend(Function):
    """bn0 -> ReLU -> pool -> attention -> weighted sum of the splits, of which bn0's input is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        layer: SplitAttentionConv2d,
        *parameters: Tensor,
    ) -> Tensor:
        maps, mean, inverse_std, ctx.of_batch = normalise(x, layer.bn0)
        ctx.attention = _RecordedAttention(layer, maps.relu_().mean((2, 3), keepdim=True))
        ctx.save_for_backward(x, weight, bias, mean, inverse_std, *parameters)
        return weighted_sum(layer.splits(maps), ctx.attention.shares.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_std, *parameters = ctx.saved_tensors
        maps = normalise_again(x, weight, bias, mean, inverse_std)
        shares = ctx.attention.shares.detach()
        splits = maps.chunk(shares.shape[1], dim=1)
        buffer = torch.empty_like(grad)
        grad_shares = torch.stack([torch.mul(grad, split, out=buffer).sum((2, 3)) for split in splits], dim=1)
        grad_pooled, grad_parameters = ctx.attention.backward(grad_shares, parameters)

        # A split's gradient is the output's by its share, and what its average over the image is given.
        grad_mean = (grad_pooled / maps.shape[2:].numel()).chunk(len(splits), dim=1)
        grad_maps = torch.empty_like(maps)
        for index, target in enumerate(grad_maps.chunk(len(splits), dim=1)):
            share = shares[:, index, :, None, None].to(grad.dtype)
            torch.addcmul(grad_mean[index], grad, share, out=target)
        grads = norm_relu_backward(
            grad_maps,
            maps,
            x,
            weight,
            mean,
            inverse_std,
            of_batch=ctx.of_batch,
            wanted=ctx.needs_input_grad[:3],
        )
        return *grads, None, *grad_parameters


class _AttendInKernels(Function):
    """The same, in the kernels for CUDA."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        layer: SplitAttentionConv2d,
        *parameters: Tensor,
    ) -> Tensor:
        from resnest_det.layers.attention_kernels import channel_norm, pool_maps, sum_splits

        mean, inverse_std, ctx.of_batch = norm_statistics(x, layer.bn0)
        norm = channel_norm(mean, inverse_std, weight, bias)
        ctx.attention = _RecordedAttention(layer, pool_maps(x, norm).to(x.dtype))
        ctx.save_for_backward(x, weight, bias, mean, inverse_std, *parameters)
        return sum_splits(x, norm, ctx.attention.shares.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from resnest_det.layers.attention_kernels import channel_norm, input_gradient, sum_gradients

        x, weight, bias, mean, inverse_std, *parameters = ctx.saved_tensors
        norm = channel_norm(mean, inverse_std, weight, bias)
        shares = ctx.attention.shares.detach().to(mean.dtype)
        sums = sum_gradients(x, norm, grad)
        grad_shares = (sums.grad_by_input * norm.weight + sums.grad * norm.bias).view_as(shares)
        grad_pooled, grad_parameters = ctx.attention.backward(grad_shares, parameters)

        # What a split is given: the output's gradient by its share, and a part of its average's, the same everywhere.
        pixels = x.shape[2:].numel()
        share, grad_mean = shares.flatten(1), grad_pooled.flatten(1).to(mean.dtype) / pixels
        grad_bias = (share * sums.grad + grad_mean * sums.ones).sum(0)
        grad_weight = (share * sums.grad_by_input + grad_mean * sums.input).sum(0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            values = len(x) * pixels if ctx.of_batch else torch.inf
            grad_x = input_gradient(x, norm, grad, shares, grad_mean, (grad_bias / values, grad_weight / values))
        of_norm = [
            found.to(parameter.dtype) if parameter is not None and wanted else None
            for found, parameter, wanted in zip(
                (grad_weight, grad_bias), (weight, bias), ctx.needs_input_grad[1:3], strict=True
            )
        ]
        return grad_x, *of_norm, None, *grad_parameters


class _RecordedAttention:
    """The shares that pooled maps get, and the way back from them.

    The attention itself is small: autograd records it within the forward pass, and goes back through it within the
    backward pass, so that it may be of any norm.

    Attributes:
        shares: (N, radix, channels).
    """

    def __init__(self, layer: SplitAttentionConv2d, pooled: Tensor) -> None:
        # Kept as they are: activation checkpointing would compute the block again for this small graph alone.
        as_they_are = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach)
        with torch.enable_grad(), as_they_are:
            self._pooled = pooled.requires_grad_()
            self.shares = selection_shares(layer.attention_logits(pooled), layer.radix)

    def backward(self, grad_shares: Tensor, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of the pooled maps, and of those parameters that are trained."""
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        grad_pooled, *found = torch.autograd.grad(
            self.shares,
            [self._pooled, *wanted],
            grad_shares.to(self.shares.dtype),
            retain_graph=True,
            allow_unused=True,
        )
        of_wanted = iter(found)
        return grad_pooled, [next(of_wanted) if parameter.requires_grad else None for parameter in parameters]


def use_triton(model: nn.Module, enabled: bool = True) -> None:
    """Have the split attention of a model run by Triton kernels on CUDA, or by torch's operators again.

    On other devices, compiled, exported, and where a norm or ReLU is not torch's own (synchronised statistics) or has
    hooks, a layer runs as before. The kernels read the convolution's output twice in the forward pass, besides bn0's
    statistics, and twice in the backward pass, for which they keep nothing else of its size. They are checked against
    torch's operators in Triton's interpreter, and have been timed on no GPU: that is why they have to be asked for.

    Args:
        model: any model; its layers are changed in place.
        enabled: whether they are to.

    Raises:
        ValueError: the package triton is not installed, or the model has no split attention.
    """
    layers = [module for module in model.modules() if isinstance(module, SplitAttentionConv2d)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no split attention that kernels could run: pass a ResNeSt")
    if enabled and find_spec("triton") is None:
        raise ValueError("the kernels need the package triton, which is not installed: install triton")
    for layer in layers:
        layer.triton = enabled
