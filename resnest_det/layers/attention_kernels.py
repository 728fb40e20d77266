"""Split attention's passes over full-size maps on CUDA, written in Triton.

Each takes bn0's input and computes norm and ReLU on the way, so that neither's output is ever in memory: a forward pass
reads the convolution's output once to pool and once to sum the splits, a backward pass reads it and the gradient
twice. Arithmetic is in float32, of float64 in float64, whatever 16 bits the maps are kept in; sums are made of parts in
a fixed order, so that two runs are equal.

Importing this module needs the package triton, which torch brings along on Linux.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that one kernel is cut into at least, so that a large GPU has several for each of its multiprocessors.
_PROGRAMS = 2048


class ChannelNorm(NamedTuple):
    """A norm of constants: `(x - mean) * inverse_std * weight + bias`, each of shape (channels,)."""

    mean: Tensor
    inverse_std: Tensor
    weight: Tensor
    bias: Tensor


def channel_norm(mean: Tensor, inverse_std: Tensor, weight: Tensor | None, bias: Tensor | None) -> ChannelNorm:
    """A norm of statistics and of a norm's parameters, of the statistics' type."""
    return ChannelNorm(
        mean,
        inverse_std,
        torch.ones_like(mean) if weight is None else weight.detach().to(mean.dtype),
        torch.zeros_like(mean) if bias is None else bias.detach().to(mean.dtype),
    )


def pool_maps(x: Tensor, norm: ChannelNorm) -> Tensor:
    """The average of `relu(norm(x))` over the image: (N, channels, H, W) to (N, channels, 1, 1), of the norm's type."""
    grid = _Grid(x, x.shape[1])
    x = grid.laid_out(x)
    parts = torch.empty(grid.parts, *x.shape[:2], dtype=norm.mean.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _pool[(grid.programs_of_parts,)](
            x, *norm, parts, len(x), *grid.sizes, grid.span, *grid.strides, block_c=grid.block_c, block_p=grid.block_p
        )
    return (parts.sum(0) / grid.pixels)[:, :, None, None]


def sum_splits(x: Tensor, norm: ChannelNorm, shares: Tensor) -> Tensor:
    """The sum of the splits of `relu(norm(x))`, each channel by its share.

    Args:
        x: (N, radix * channels, H, W).
        norm: of radix * channels.
        shares: (N, radix, channels).

    Returns:
        (N, channels, H, W), of the type and in the memory format of x.
    """
    radix, channels = shares.shape[1:]
    grid = _Grid(x, channels)
    x = grid.laid_out(x)
    out = torch.empty((len(x), channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=grid.layout)
    with torch.cuda.device_of(x):
        _sum_splits[(grid.programs_of_blocks,)](
            x,
            *norm,
            shares.to(norm.mean.dtype).contiguous(),
            out,
            *grid.sizes,
            *grid.strides,
            *grid.split_strides,
            radix=radix,
            block_c=grid.block_c,
            block_p=grid.block_p,
        )
    return out


class GradientSums(NamedTuple):
    """Sums over the image, where the ReLU passes something on: each (N, radix * channels).

    Of the gradient of the weighted sum, of one, and of both by the normalised input, which has neither weight nor bias.
    """

    grad: Tensor
    ones: Tensor
    grad_by_input: Tensor
    input: Tensor


def sum_gradients(x: Tensor, norm: ChannelNorm, grad: Tensor) -> GradientSums:
    """What the gradients of the shares and of the norm are made of.

    Args:
        x: (N, radix * channels, H, W).
        norm: of radix * channels.
        grad: of the output of `sum_splits`.
    """
    channels = grad.shape[1]
    grid = _Grid(x, channels, splits_apart=True)
    x, grad = grid.laid_out(x), grid.laid_out(grad)
    parts = torch.empty(4, grid.parts, *x.shape[:2], dtype=norm.mean.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _sum_gradients[(grid.programs_of_parts,)](
            x,
            *norm,
            grad,
            parts,
            len(x),
            *grid.sizes,
            grid.span,
            *grid.strides,
            *grid.split_strides,
            radix=grid.radix,
            block_c=grid.block_c,
            block_p=grid.block_p,
        )
    return GradientSums(*parts.sum(1))


def input_gradient(
    x: Tensor, norm: ChannelNorm, grad: Tensor, shares: Tensor, grad_pooled: Tensor, of_batch: tuple[Tensor, Tensor]
) -> Tensor:
    """The gradient of x, of its type and in its memory format.

    Args:
        x: (N, radix * channels, H, W).
        norm: of radix * channels.
        grad: of the output of `sum_splits`.
        shares: (N, radix, channels).
        grad_pooled: what each value of `relu(norm(x))` is given through its average: (N, radix * channels).
        of_batch: what statistics that depend on x take off the gradient of the normalised input, for each channel: a
            constant, and a multiple of the normalised input; zeros of constant statistics.
    """
    channels = grad.shape[1]
    grid = _Grid(x, channels, splits_apart=True)
    x, grad = grid.laid_out(x), grid.laid_out(grad)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _input_gradient[(grid.programs_of_blocks,)](
            x,
            *norm,
            grad,
            shares.contiguous(),
            grad_pooled.contiguous(),
            *of_batch,
            out,
            *grid.sizes,
            *grid.strides,
            *grid.split_strides,
            radix=grid.radix,
            block_c=grid.block_c,
            block_p=grid.block_p,
        )
    return out


class _Grid:
    """How maps are cut into blocks of channels and pixels, and what each kernel must know of it."""

    def __init__(self, x: Tensor, channels: int, *, splits_apart: bool = False) -> None:
        images, all_channels, height, width = x.shape
        self.pixels = height * width
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self.layout = torch.channels_last if last else torch.contiguous_format
        # Neighbours in memory go to neighbouring threads: a block is long where the memory is.
        if last:
            self.block_c = min(64, triton.next_power_of_2(channels))
            self.block_p = 2048 // self.block_c
        else:
            self.block_p = min(512, triton.next_power_of_2(self.pixels))
            self.block_c = min(2048 // self.block_p, triton.next_power_of_2(channels))
        self.radix = all_channels // channels
        blocks = images * triton.cdiv(channels, self.block_c) * (self.radix if splits_apart else 1)
        steps = triton.cdiv(self.pixels, self.block_p)
        self.programs_of_blocks = blocks * steps
        self.span = triton.cdiv(steps, min(steps, triton.cdiv(_PROGRAMS, blocks))) * self.block_p
        self.parts = triton.cdiv(self.pixels, self.span)
        self.programs_of_parts = blocks * self.parts
        self.sizes = channels, self.pixels
        self.strides = (1, all_channels) if last else (self.pixels, 1)
        self.split_strides = (1, channels) if last else (self.pixels, 1)

    def laid_out(self, maps: Tensor) -> Tensor:
        return maps.contiguous(memory_format=self.layout)


# What the kernels share: `channels` are those of a split, `span` the pixels of a part; xc and xp are the strides of a
# channel and a pixel in x, oc and op those in what has the channels of one split.


@triton.jit
def _normalised(x, norm_mean, norm_inverse_std, offsets, channel, inside_c, inside):
    """The normalised input, without weight and bias."""
    mean = tl.load(norm_mean + channel, mask=inside_c, other=0.0)
    inverse_std = tl.load(norm_inverse_std + channel, mask=inside_c, other=0.0)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(mean.dtype)
    return (values - mean[:, None]) * inverse_std[:, None]


@triton.jit
def _rectified(normalised, norm_weight, norm_bias, channel, inside_c):
    """After weight, bias and ReLU, which passes NaN on as torch's does."""
    weight = tl.load(norm_weight + channel, mask=inside_c, other=0.0)
    bias = tl.load(norm_bias + channel, mask=inside_c, other=0.0)
    values = normalised * weight[:, None] + bias[:, None]
    return tl.where(values <= 0.0, 0.0, values)


@triton.jit
def _pool(
    x, norm_mean, norm_inverse_std, norm_weight, norm_bias, sums,
    images, channels, pixels, span, xc, xp,
    block_c: tl.constexpr, block_p: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, block_c)
    parts = tl.cdiv(pixels, span)
    program = tl.program_id(0)
    part = program % parts
    image = (program // parts // blocks).to(tl.int64)
    channel = program // parts % blocks * block_c + tl.arange(0, block_c)
    inside_c = channel < channels
    total = tl.zeros([block_c, block_p], norm_mean.dtype.element_ty)
    for start in range(part * span, tl.minimum(pixels, (part + 1) * span), block_p):
        pixel = start + tl.arange(0, block_p)
        inside = inside_c[:, None] & (pixel < pixels)[None, :]
        offsets = image * channels * pixels + channel[:, None] * xc + pixel[None, :] * xp
        normalised = _normalised(x, norm_mean, norm_inverse_std, offsets, channel, inside_c, inside)
        total += tl.where(inside, _rectified(normalised, norm_weight, norm_bias, channel, inside_c), 0.0)
    tl.store(sums + (part * images + image) * channels + channel, tl.sum(total, 1), mask=inside_c)


@triton.jit
def _sum_splits(
    x, norm_mean, norm_inverse_std, norm_weight, norm_bias, shares, out,
    channels, pixels, xc, xp, oc, op,
    radix: tl.constexpr, block_c: tl.constexpr, block_p: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, block_c)
    steps = tl.cdiv(pixels, block_p)
    program = tl.program_id(0)
    image = (program // steps // blocks).to(tl.int64)
    channel = program // steps % blocks * block_c + tl.arange(0, block_c)
    pixel = program % steps * block_p + tl.arange(0, block_p)
    inside_c = channel < channels
    inside = inside_c[:, None] & (pixel < pixels)[None, :]
    total = tl.zeros([block_c, block_p], norm_mean.dtype.element_ty)
    for split in tl.static_range(radix):
        of_all = split * channels + channel
        offsets = image * radix * channels * pixels + of_all[:, None] * xc + pixel[None, :] * xp
        normalised = _normalised(x, norm_mean, norm_inverse_std, offsets, of_all, inside_c, inside)
        share = tl.load(shares + image * radix * channels + of_all, mask=inside_c, other=0.0)
        total += share[:, None] * _rectified(normalised, norm_weight, norm_bias, of_all, inside_c)
    offsets = image * channels * pixels + channel[:, None] * oc + pixel[None, :] * op
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_gradients(
    x, norm_mean, norm_inverse_std, norm_weight, norm_bias, grad, sums,
    images, channels, pixels, span, xc, xp, oc, op,
    radix: tl.constexpr, block_c: tl.constexpr, block_p: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, block_c)
    parts = tl.cdiv(pixels, span)
    program = tl.program_id(0)
    # Splits follow each other, so that the gradient, which they share, is still in the cache.
    split = program % radix
    part = program // radix % parts
    image = (program // radix // parts // blocks).to(tl.int64)
    channel = program // radix // parts % blocks * block_c + tl.arange(0, block_c)
    inside_c = channel < channels
    of_all = split * channels + channel
    grads = tl.zeros([block_c, block_p], norm_mean.dtype.element_ty)
    ones = tl.zeros([block_c, block_p], norm_mean.dtype.element_ty)
    grads_by_input = tl.zeros([block_c, block_p], norm_mean.dtype.element_ty)
    inputs = tl.zeros([block_c, block_p], norm_mean.dtype.element_ty)
    for start in range(part * span, tl.minimum(pixels, (part + 1) * span), block_p):
        pixel = start + tl.arange(0, block_p)
        inside = inside_c[:, None] & (pixel < pixels)[None, :]
        offsets = image * radix * channels * pixels + of_all[:, None] * xc + pixel[None, :] * xp
        normalised = _normalised(x, norm_mean, norm_inverse_std, offsets, of_all, inside_c, inside)
        passed = inside & (_rectified(normalised, norm_weight, norm_bias, of_all, inside_c) != 0.0)
        offsets = image * channels * pixels + channel[:, None] * oc + pixel[None, :] * op
        given = tl.where(passed, tl.load(grad + offsets, mask=inside, other=0.0).to(grads.dtype), 0.0)
        grads += given
        ones += tl.where(passed, 1.0, 0.0)
        grads_by_input += given * normalised
        inputs += tl.where(passed, normalised, 0.0)
    # (4, parts, images, radix * channels)
    of_one = tl.cast(parts, tl.int64) * images * radix * channels
    target = sums + (part * images + image) * radix * channels + of_all
    tl.store(target, tl.sum(grads, 1), mask=inside_c)
    tl.store(target + of_one, tl.sum(ones, 1), mask=inside_c)
    tl.store(target + 2 * of_one, tl.sum(grads_by_input, 1), mask=inside_c)
    tl.store(target + 3 * of_one, tl.sum(inputs, 1), mask=inside_c)


@triton.jit
def _input_gradient(
    x, norm_mean, norm_inverse_std, norm_weight, norm_bias, grad, shares, grad_pooled, off, off_by_input, out,
    channels, pixels, xc, xp, oc, op,
    radix: tl.constexpr, block_c: tl.constexpr, block_p: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, block_c)
    steps = tl.cdiv(pixels, block_p)
    program = tl.program_id(0)
    split = program % radix
    image = (program // radix // steps // blocks).to(tl.int64)
    channel = program // radix // steps % blocks * block_c + tl.arange(0, block_c)
    pixel = program // radix % steps * block_p + tl.arange(0, block_p)
    inside_c = channel < channels
    inside = inside_c[:, None] & (pixel < pixels)[None, :]
    of_all = split * channels + channel
    offsets = image * radix * channels * pixels + of_all[:, None] * xc + pixel[None, :] * xp
    normalised = _normalised(x, norm_mean, norm_inverse_std, offsets, of_all, inside_c, inside)
    passed = _rectified(normalised, norm_weight, norm_bias, of_all, inside_c) != 0.0
    given = tl.load(
        grad + image * channels * pixels + channel[:, None] * oc + pixel[None, :] * op, mask=inside, other=0.0
    ).to(normalised.dtype)
    small = image * radix * channels + of_all
    share = tl.load(shares + small, mask=inside_c, other=0.0)
    pooled = tl.load(grad_pooled + small, mask=inside_c, other=0.0)
    constant = tl.load(off + of_all, mask=inside_c, other=0.0)
    multiple = tl.load(off_by_input + of_all, mask=inside_c, other=0.0)
    scale = tl.load(norm_weight + of_all, mask=inside_c, other=0.0) * tl.load(
        norm_inverse_std + of_all, mask=inside_c, other=0.0
    )
    behind = tl.where(passed, given * share[:, None] + pooled[:, None], 0.0)
    found = (behind - constant[:, None] - multiple[:, None] * normalised) * scale[:, None]
    tl.store(out + offsets, found.to(out.dtype.element_ty), mask=inside)
