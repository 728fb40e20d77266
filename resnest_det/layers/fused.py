"""Convolution, norm, ReLU and addition in fewer passes over memory, with less kept for the backward pass.

Each function here stands for a few modules in a row. Calling them one after the other is its definition and its oracle;
up to rounding, it computes the same in another way:

- In training, what stands behind norm and ReLU keeps the norm's input alone: the ReLU's output, which its gradient
  needs, is computed from it again. After Rota Bulo et al., "In-Place Activated BatchNorm for Memory-Optimized Training
  of DNNs", arXiv 1712.02616; there the norm keeps its output and inverts it.
- In inference, a BatchNorm goes into the weights of the convolution before it: anew in every call, so that the weights
  may change at any time, and where they are fewer than the values that the norm would pass over.
- In training, a 1x1 convolution of fewer pixels than channels is a matrix product: oneDNN's convolution lays its
  weights out anew in every call, and their gradient too, which then costs up to half of the time.

The other way is taken on the CPU, where it was measured, and for modules of torch's own whose computation is known.
On other devices, under torch.compile, torch.export and other tracing, while something watches the operators (a count of
FLOPs) and within `plain_layers`, the modules are called; also where one of them has hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torchvision.ops import FrozenBatchNorm2d

from resnest_det.layers.sync_batch_norm import SyncBatchNorm

_aten = torch.ops.aten
_plain: ContextVar[bool] = ContextVar("plain_layers", default=False)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Within it, layers and blocks call their modules one after the other and leave the gradients to autograd.

    It is for second derivatives, which the layers' own backward passes do not have, and for comparisons.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def conv_norm_relu(x: Tensor, conv: nn.Module, norm: nn.Module, relu: nn.Module | None) -> Tensor:
    """`relu(norm(conv(x)))`, or `norm(conv(x))` where `relu` is None: in one pass where no gradient is wanted."""
    if may_fuse(x, conv, norm, relu) and _folds(x, conv, norm) and (relu is None or type(relu) is nn.ReLU):
        return _folded_convolution(x, cast(nn.Conv2d, conv), norm, relu is not None)
    out = norm(convolve(x, conv))
    return out if relu is None else relu(out)


def conv_norm_add_relu(x: Tensor, conv: nn.Module, norm: nn.Module, shortcut: Tensor, relu: nn.Module) -> Tensor:
    """`relu(norm(conv(x)) + shortcut)`, in one pass where no gradient is wanted and channels are last."""
    if (
        may_fuse(x, conv, norm, relu)
        and _folds(x, conv, norm)
        and type(relu) is nn.ReLU
        and has_fused_convolution()
        and type(shortcut) is Tensor
        and shortcut.dtype == x.dtype
        and shortcut.shape == convolution_shape(x, conv)
        and all(maps.is_contiguous(memory_format=torch.channels_last) for maps in (x, shortcut))
    ):
        weight, bias = _folded_weights(cast(nn.Conv2d, conv), norm)
        return onednn_convolution(x, weight, bias, conv, relu=True, term=shortcut)
    out = conv_norm_relu(x, conv, norm, None)
    out += shortcut
    return relu(out)


def convolution_shape(x: Tensor, conv: Any) -> torch.Size:
    """The shape of what a convolution, with a Conv2d's attributes and padded by numbers, makes of (N, C, H, W)."""
    directions = zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, padding, dilation, kernel, stride in directions
    ]
    return torch.Size((len(x), conv.out_channels, *sizes))


def trains_fused(x: Tensor, convs: tuple[nn.Module, ...], norms: tuple[nn.Module, ...], *relus: nn.Module) -> bool:
    """Whether `norm_relu_conv` and `norm_add_relu` take these modules, and gradients are wanted.

    Args:
        x: what goes into the first of them.
        convs: the convolutions.
        norms: the norms.
        relus: what stands between them.
    """
    return (
        torch.is_grad_enabled()
        and may_fuse(x, *convs, *norms, *relus)
        and x.numel() > 0
        and all(type(relu) is nn.ReLU for relu in relus)
        and all(is_plain_conv(conv) and conv.bias is None for conv in convs)
        and all(map(is_known_norm, norms))
    )


def convolve(x: Tensor, conv: nn.Module) -> Tensor:
    """`conv(x)`, as a matrix product where gradients are wanted and that is faster."""
    if trains_fused(x, (conv,), ()) and not torch.is_autocast_enabled("cpu"):
        arguments = _conv_arguments(cast(nn.Conv2d, conv))
        if _is_matrix_product(x, cast(Tensor, conv.weight), arguments):
            return _Convolution.apply(x, conv.weight, arguments)
    return conv(x)


def norm_relu_conv(x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
    """`conv(relu(norm(x)))`, of which `x` is kept for the backward pass; where `trains_fused`."""
    return _NormReluConv.apply(x, norm.weight, norm.bias, conv.weight, norm, conv)


def norm_add_relu(x: Tensor, norm: nn.Module, shortcut: Tensor) -> Tensor:
    """`relu(norm(x) + shortcut)`, of which `x` and the output are kept for the backward pass; where `trains_fused`.

    Args:
        x: (N, channels, H, W).
        norm: the norm.
        shortcut: of the shape of `x`.
    """
    return _NormAddRelu.apply(x, norm.weight, norm.bias, shortcut, norm)


def average_pool(x: Tensor, pool: nn.Module) -> Tensor:
    """`pool(x)`; of an AvgPool2d nothing is kept for the backward pass, where torch keeps `x`; where `trains_fused`."""
    return _AveragePool.apply(x, pool) if type(pool) is nn.AvgPool2d and not has_hooks(pool) else pool(x)


# Of a convolution: stride, padding, dilation and groups.
ConvArguments = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


def _conv_arguments(conv: nn.Conv2d) -> ConvArguments:
    return cast(ConvArguments, (conv.stride, conv.padding, conv.dilation, conv.groups))


def _convolution(x: Tensor, kernel: Tensor, arguments: ConvArguments) -> Tensor:
    """A convolution without bias."""
    if not _is_matrix_product(x, kernel, arguments):
        return F.conv2d(x, kernel, None, *arguments)
    return _pixels_to_maps(onednn_product(_maps_to_pixels(x), kernel.flatten(1)), x)


def _convolution_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, arguments: ConvArguments, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and kernel behind `_convolution`, each where it is wanted."""
    if not _is_matrix_product(x, kernel, arguments):
        stride, padding, dilation, groups = arguments
        return _aten.convolution_backward(
            grad, x, kernel, None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False]
        )[:2]
    rows = _maps_to_pixels(grad.contiguous(memory_format=torch.channels_last))
    grad_x = _pixels_to_maps(onednn_product(rows, kernel.flatten(1).t()), x) if wanted[0] else None
    if not wanted[1]:
        return grad_x, None
    # The strides of axes of length 1 matter to DistributedDataParallel.
    return grad_x, onednn_product(rows.t(), _maps_to_pixels(x).t()).as_strided(kernel.shape, kernel.stride())


def _is_matrix_product(x: Tensor, kernel: Tensor, arguments: ConvArguments) -> bool:
    """Whether a convolution is a matrix product of the pixels as they are in memory, and faster as one."""
    return (
        x.ndim == 4
        and kernel.shape[2:] == (1, 1)
        and kernel.stride()[:2] == (kernel.shape[1], 1)
        and kernel.shape[1] == x.shape[1] > len(x) * x.shape[2:].numel()
        and arguments == ((1, 1), (0, 0), (1, 1), 1)
        and x.dtype == kernel.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and has_onednn_product()
    )


def _maps_to_pixels(maps: Tensor) -> Tensor:
    """(N, channels, H, W), channels last in memory, as (N * H * W, channels)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _pixels_to_maps(pixels: Tensor, like: Tensor) -> Tensor:
    """(N * H * W, channels) as (N, channels, H, W), with N, H and W as of `like`."""
    return pixels.unflatten(0, (len(like), *like.shape[2:])).permute(0, 3, 1, 2)


class NormedMaps(NamedTuple):
    """What a norm makes of its input, and what a backward pass needs to make it again.

    The statistics are those that normalised: of the batch, or the running ones.
    """

    maps: Tensor
    mean: Tensor
    inverse_std: Tensor
    of_batch: bool


def normalise(x: Tensor, norm: nn.Module) -> NormedMaps:
    """Run a BatchNorm2d, which counts the batch into its running statistics in training, or a FrozenBatchNorm2d.

    Raises:
        ValueError: the statistics of a batch would be of one value a channel.
    """
    mean, var, of_batch, momentum = _count_batch(norm, x)
    eps = cast(float, norm.eps)
    maps, batch_mean, inverse_std = torch.native_batch_norm(
        x, cast(Tensor, norm.weight), cast(Tensor, norm.bias), mean, var, of_batch, momentum, eps
    )
    if of_batch:
        return NormedMaps(maps, batch_mean, inverse_std, True)
    assert mean is not None
    assert var is not None
    return NormedMaps(maps, mean.clone(), (var + eps).rsqrt(), False)


def norm_statistics(x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor, bool]:
    """The statistics that `normalise` would return, without the maps; it counts the batch in the same way.

    Returns:
        Mean and inverse standard deviation of each channel, and whether they are the batch's.

    Raises:
        ValueError: the statistics of a batch would be of one value a channel.
    """
    mean, var, of_batch, momentum = _count_batch(norm, x)
    if of_batch:
        mean, var = torch.batch_norm_update_stats(x, mean, var, momentum)
    assert mean is not None
    assert var is not None
    return mean if of_batch else mean.clone(), (var + cast(float, norm.eps)).rsqrt(), of_batch


def _count_batch(norm: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """Count a batch that a norm is about to see.

    Returns:
        The running mean and variance to be moved or used, whether the batch's statistics normalise, and the momentum.
    """
    mean, var = cast("Tensor | None", norm.running_mean), cast("Tensor | None", norm.running_var)
    if not isinstance(norm, nn.BatchNorm2d):
        return mean, var, False, 0.0
    of_batch = norm.training or mean is None
    if of_batch and x.numel() == x.shape[1]:
        raise ValueError(
            f"the input of a BatchNorm2d has the shape {tuple(x.shape)}, one value a channel, of which there are "
            f"no statistics: train on more or larger images, or with norm='frozen_bn' or 'gn'"
        )
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and not norm.track_running_stats:
        mean = var = None
    elif norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    return mean, var, of_batch, momentum


def normalise_again(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse_std: Tensor) -> Tensor:
    """`relu(norm(x))` from the statistics that `normalise` returned, which no running statistics enter again."""
    variance = inverse_std.square().reciprocal_()
    return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, 0.0)[0].relu_()


def norm_relu_backward(
    grad: Tensor,
    maps: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    *,
    of_batch: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias behind `relu(norm(x))`.

    Args:
        grad: the gradient of the ReLU's output, (N, channels, H, W); it is overwritten.
        maps: the ReLU's output.
        x: the norm's input.
        weight: the norm's.
        mean: the statistics that normalised.
        inverse_std: the statistics that normalised.
        of_batch: whether they are the batch's, and so depend on x.
        wanted: which of the three are.
    """
    grad = _aten.threshold_backward.grad_input(grad, maps, 0, grad_input=grad)
    return norm_backward(grad, x, weight, mean, inverse_std, of_batch=of_batch, wanted=wanted)


def norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    *,
    of_batch: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias behind `norm(x)`; see `norm_relu_backward`."""
    if not any(wanted):
        return None, None, None
    variance = inverse_std.square().reciprocal_()
    return _aten.native_batch_norm_backward(
        grad, x, weight, mean, variance, mean, inverse_std, of_batch, 0.0, list(wanted)
    )


class _Convolution(Function):
    """A convolution without bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, arguments: ConvArguments) -> Tensor:
        ctx.arguments = arguments
        ctx.save_for_backward(x, kernel)
        return _convolution(x, kernel, arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        return *_convolution_backward(grad, x, kernel, ctx.arguments, ctx.needs_input_grad[:2]), None


class _NormReluConv(Function):
    """`conv(relu(norm(x)))`; its gradients are those of the three, with the ReLU's output computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        kernel: Tensor,
        norm: nn.Module,
        conv: nn.Conv2d,
    ) -> Tensor:
        maps, mean, inverse_std, ctx.of_batch = normalise(x, norm)
        maps.relu_()
        device = x.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else maps.dtype
        ctx.arguments = _conv_arguments(conv)
        ctx.save_for_backward(x, weight, bias, kernel, mean, inverse_std)
        with torch.autocast(device, enabled=False):
            return _convolution(maps.to(ctx.dtype), kernel.to(ctx.dtype), ctx.arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, kernel, mean, inverse_std = ctx.saved_tensors
        maps = normalise_again(x, weight, bias, mean, inverse_std)
        below = any(ctx.needs_input_grad[:3])
        grad_maps, grad_kernel = _convolution_backward(
            grad, maps.to(ctx.dtype), kernel.to(ctx.dtype), ctx.arguments, (below, ctx.needs_input_grad[3])
        )
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if grad_maps is not None:
            grads = norm_relu_backward(
                grad_maps.to(maps.dtype),
                maps,
                x,
                weight,
                mean,
                inverse_std,
                of_batch=ctx.of_batch,
                wanted=ctx.needs_input_grad[:3],
            )
        return *grads, None if grad_kernel is None else grad_kernel.to(kernel.dtype), None, None


class _NormAddRelu(Function):
    """`relu(norm(x) + shortcut)`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,  # noqa: ARG004 for its gradient
        shortcut: Tensor,
        norm: nn.Module,
    ) -> Tensor:
        maps, mean, inverse_std, ctx.of_batch = normalise(x, norm)
        maps.add_(shortcut).relu_()
        ctx.shortcut_dtype = shortcut.dtype
        ctx.save_for_backward(x, weight, mean, inverse_std, maps)
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, maps = ctx.saved_tensors
        grad = _aten.threshold_backward(grad, maps, 0)
        wanted = ctx.needs_input_grad[:3]
        grads = norm_backward(grad, x, weight, mean, inverse_std, of_batch=ctx.of_batch, wanted=wanted)
        return *grads, grad.to(ctx.shortcut_dtype) if ctx.needs_input_grad[3] else None, None


class _AveragePool(Function):
    """An AvgPool2d, whose gradient is no function of its input but for the shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: nn.AvgPool2d) -> Tensor:
        def pair(value: Any) -> Any:
            return (value, value) if isinstance(value, int) else value

        ctx.arguments = (
            pair(pool.kernel_size),
            pair(pool.stride),
            pair(pool.padding),
            pool.ceil_mode,
            pool.count_include_pad,
            pool.divisor_override,
        )
        is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        ctx.layout = torch.channels_last if is_last else torch.contiguous_format
        ctx.shape = x.shape
        return F.avg_pool2d(x, *ctx.arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        like_input = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout)
        return _aten.avg_pool2d_backward(grad, like_input, *ctx.arguments), None


def may_fuse(x: Tensor, *modules: nn.Module | None, device: str = "cpu") -> bool:
    """Whether modules need not be called: `x` is an ordinary tensor on the device, and nothing traces or watches."""
    return (
        type(x) is Tensor
        and x.device.type == device
        and not _plain.get()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not nn_module._has_any_global_hook()
        and not any(map(has_hooks, modules))
    )


def has_hooks(module: nn.Module | None) -> bool:
    """Whether somebody wants the module to be called: it has hooks, or its forward pass was replaced in place."""
    return module is not None and bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain_conv(module: nn.Module) -> bool:
    """Whether it is torch's own Conv2d, not parametrized, padded with zeros by a number."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def is_known_norm(norm: nn.Module) -> bool:
    """Whether a norm is torch's own, with tensors that hold statistics well enough to compute from them again."""
    if type(norm) not in (nn.BatchNorm2d, FrozenBatchNorm2d):
        return False
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(tensor is None or tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)


def _folds(x: Tensor, conv: nn.Module, norm: nn.Module) -> bool:
    """Whether no gradient is wanted, and the norm is a constant that is cheaper to put into the weights."""
    if not is_plain_conv(conv) or type(norm) not in (nn.BatchNorm2d, SyncBatchNorm, FrozenBatchNorm2d):
        return False
    if (norm.training and isinstance(norm, nn.BatchNorm2d)) or norm.running_mean is None:
        return False
    tensors = [*conv.parameters(), *norm.parameters(), *norm.buffers(), x]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if torch.is_autocast_enabled("cpu") or any(tensor.dtype != torch.float32 for tensor in (*conv.parameters(), x)):
        return False
    weight, stride = cast(Tensor, conv.weight), cast(tuple[int, int], conv.stride)
    pixels = x.shape[0] * x.shape[2:].numel() // (stride[0] * stride[1])
    return x.ndim == 4 and x.shape[1] == conv.in_channels and weight[0].numel() <= 2 * pixels


def _folded_convolution(x: Tensor, conv: nn.Conv2d, norm: nn.Module, relu: bool) -> Tensor:
    """A convolution with a constant norm in its weights, and a ReLU behind it."""
    weight, bias = _folded_weights(conv, norm)
    if not has_fused_convolution():
        out = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return out.relu_() if relu else out
    return onednn_convolution(x, weight, bias, conv, relu=relu)


def _folded_weights(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight and bias of a convolution with a constant norm in them."""
    scale = (cast(Tensor, norm.running_var) + cast(float, norm.eps)).rsqrt()
    if norm.weight is not None:
        scale *= cast(Tensor, norm.weight)
    mean = cast(Tensor, norm.running_mean)
    bias = (mean if conv.bias is None else mean - conv.bias) * -scale
    if norm.bias is not None:
        bias += cast(Tensor, norm.bias)
    return conv.weight * scale[:, None, None, None], bias


def onednn_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: Any, *, relu: bool, term: Tensor | None = None
) -> Tensor:
    """oneDNN's convolution, and in the same pass an addition and a ReLU, by torch.compile's operators on the CPU.

    Args:
        x: (N, in_channels, H, W).
        weight: the weight, as it is or packed.
        bias: the bias.
        conv: what has a Conv2d's attributes: stride, padding, dilation and groups are read.
        relu: whether a ReLU ends it.
        term: what is added before the ReLU, of the output's shape, type and layout.
    """
    operator = torch.ops.mkldnn._convolution_pointwise
    arguments = (weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    if term is None:
        return operator(x, *arguments, "relu" if relu else "none", [], "")
    return operator.binary(x, term, *arguments, "add", 1.0, "relu" if relu else None, [], "")


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of oneDNN: on AMD's CPUs twice as fast as torch's, which is MKL's."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def has_onednn_product() -> bool:
    """Whether this torch has that operator, as in `has_fused_convolution`."""
    x, weight = torch.linspace(-1, 1, 6).reshape(2, 3), torch.linspace(-1, 1, 12).reshape(4, 3)
    try:
        out = onednn_product(x, weight)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
    return torch.allclose(out, x @ weight.t(), atol=1e-5)


@cache
def has_fused_convolution() -> bool:
    """Whether this torch has that operator: it is not public, so a small convolution is computed in both ways."""
    with torch.device("meta"):  # without random numbers, which would change those of a run
        conv = nn.Conv2d(2, 3, 3)
    x = torch.linspace(-1, 1, 50).reshape(1, 2, 5, 5)
    weight = torch.linspace(-1, 1, 54).reshape(3, 2, 3, 3)
    bias = torch.zeros(3)
    try:
        out = onednn_convolution(x, weight, bias, conv, relu=True)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
    return torch.allclose(out, F.conv2d(x, weight, bias).relu(), atol=1e-5)
