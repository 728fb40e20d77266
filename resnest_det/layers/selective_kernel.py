"""Selective kernel convolution.

Paper: Li et al., "Selective Kernel Networks", arXiv 1903.06586.
Reference implementations: implus/SKNet; in PyTorch timm's `SelectiveKernel` with `split_input=False` and
`keep_3x3=True`, which computes the same.

What differs from timm's:
- the branches are pooled before they are added: the pool of a sum is the sum of the pools, and neither the sum
  nor a stack of the branches has to be written;
- with two branches, softmax(a, b) is (s, 1 - s) with s = sigmoid(a - b), and the weighted sum is one
  interpolation;
- the hidden width is the paper's max(channels / reduction, 32), where timm rounds to a multiple. Its
  skresnext50_32x4d has the same widths by both rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resnest_det.layers.norm import NormLayer, check_pooled_batch, uses_batch_statistics
from resnest_det.layers.selection import select_softly


class SelectiveKernelConv2d(nn.Module):
    """Convolutions of several dilations, and an attention over them for each channel.

    Each branch is a grouped convolution -> norm -> ReLU. Their sum, averaged over the image, goes through fc1 ->
    bn1 -> ReLU -> fc2 (no biases) to one logit a branch and channel; softmax over the branches weighs them, and
    their weighted sum is the output. No norm or ReLU follows.

    Args:
        in_channels: channels of the input.
        channels: channels of the output and of each branch.
        kernel_size: side of each branch's square kernel, odd.
        stride: stride of the convolutions.
        dilation: spacing of the kernel's points, multiplied by each of `branch_dilations`.
        groups: groups of the convolutions. Divides `in_channels` and `channels`.
        branch_dilations: one number a branch, two branches or more. A 3x3 kernel with dilation 2 stands for the
            paper's 5x5.
        reduction: the attention's hidden width is `max(channels // reduction, 32)`.
        norm_layer: builds the branches' norms from their number of channels.
        pooled_norm_layer: builds bn1, which sees features of size 1x1; `norm_layer` where None. GroupNorm
            needs another form here than elsewhere: `layers.norm.pooled_group_norm`.

    Shape:
        (N, in_channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride)). The memory format of the input
        (NCHW or channels_last) is the memory format of the output.

    Raises:
        ValueError: an argument is out of range; or, in the forward pass, one image while bn1 trains as BatchNorm:
            over one value there are no statistics.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        branch_dilations: Sequence[int] = (1, 2),
        reduction: int = 16,
        norm_layer: NormLayer = nn.BatchNorm2d,
        pooled_norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if min(in_channels, channels, stride, dilation, groups, reduction) < 1:
            raise ValueError(
                f"in_channels={in_channels}, channels={channels}, stride={stride}, dilation={dilation}, "
                f"groups={groups} and reduction={reduction} must all be 1 or more"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and 1 or more")
        if len(branch_dilations) < 2 or min(branch_dilations) < 1:
            raise ValueError(
                f"branch_dilations={tuple(branch_dilations)} must be two or more numbers, each 1 or more: "
                "an attention over one branch has nothing to select"
            )
        if in_channels % groups or channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and channels={channels}")
        hidden = max(channels // reduction, 32)
        self.branches = nn.ModuleList()
        for branch_dilation in branch_dilations:
            spacing = dilation * branch_dilation
            conv = nn.Conv2d(
                in_channels,
                channels,
                kernel_size,
                stride,
                padding=spacing * (kernel_size // 2),
                dilation=spacing,
                groups=groups,
                bias=False,
            )
            self.branches.append(nn.Sequential(conv, norm_layer(channels), nn.ReLU(inplace=True)))
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn1 = (pooled_norm_layer or norm_layer)(hidden)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, len(branch_dilations) * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and select: (N, in_channels, H, W) to (N, channels, H', W')."""
        maps = [branch(x) for branch in self.branches]  # each (N, channels, H', W')
        pooled = torch.stack([features.mean((2, 3), keepdim=True) for features in maps]).sum(0)
        logits = self.attention_logits(pooled)  # (N, branches, channels)
        return select_softly(maps, logits)

    def needs_several_images(self) -> bool:
        """Whether bn1 takes its statistics from the images of this process's batch, so that one is too few."""
        return uses_batch_statistics(self.bn1)

    def attention_logits(self, pooled: Tensor) -> Tensor:
        """The logits of the attention from the branches' pooled sum: (N, channels, 1, 1) to (N, branches, channels)."""
        check_pooled_batch(self.bn1, pooled.shape[0], "selective kernel attention")
        logits = self.fc2(self.relu(self.bn1(self.fc1(pooled))))
        return logits.flatten(1).unflatten(1, (len(self.branches), -1))
