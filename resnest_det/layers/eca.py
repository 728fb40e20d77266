"""Efficient channel attention.

Paper: Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", arXiv 1910.03151.
Reference implementation: BangguWu/ECANet, `eca_layer`. Its child `conv` has the same name here.

What differs: a kernel by formula is at least 3, as in timm's `EcaModule`; the paper's gives 1 below 8 channels. The
released networks do not use the formula: their kernels are given stage by stage.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


def eca_kernel_size(channels: int, gamma: float = 2, beta: float = 1) -> int:
    """The paper's kernel for that many channels: |log2(channels) / gamma + beta / gamma|, cut and made odd.

    Args:
        channels: channels of the features, 1 or more.
        gamma: the paper's gamma, above 0.
        beta: the paper's b.

    Returns:
        An odd number, 3 or more. Cutting 1.9 gives 1, and an even number goes up by one.
    """
    size = int(abs((math.log2(channels) + beta) / gamma))
    return max(size if size % 2 else size + 1, 3)


class EfficientChannelAttention(nn.Module):
    """Scales each channel by a gate computed from the means of the channels next to it.

    The means go, as one sequence of `channels` values, through a 1-d convolution (zero padding, no bias) and a
    sigmoid: one number a sample and channel, with `kernel_size` parameters in all.

    Args:
        channels: channels of the input and of the output.
        kernel_size: neighbouring channels that make a gate, odd; None computes it by the paper's formula.
        gamma: the formula's gamma, see `eca_kernel_size`.
        beta: the formula's b.

    Shape:
        (N, channels) or (N, channels, ...), with any number of further dimensions. The output has the shape and
        the memory format of the input.

    Raises:
        ValueError: an argument is out of range; in the forward pass, x has another number of channels.
    """

    def __init__(self, channels: int, *, kernel_size: int | None = None, gamma: float = 2, beta: float = 1) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels} must be 1 or more")
        if gamma <= 0:
            raise ValueError(f"gamma={gamma} must be above 0")
        if kernel_size is None:
            kernel_size = eca_kernel_size(channels, gamma, beta)
        elif kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and 1 or more")
        self.channels = channels
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels: (N, channels, ...) to the same shape."""
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"x of shape {tuple(x.shape)} must be (N, {self.channels}, ...): channels={self.channels}")
        positions = tuple(range(2, x.dim()))
        pooled = x.mean(positions, keepdim=True) if positions else x
        logits = self.conv(pooled.reshape(-1, 1, self.channels))  # the channels are the sequence
        return x * logits.sigmoid().reshape(pooled.shape)
