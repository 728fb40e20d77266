"""Split attention: the convolution of ResNeSt.

Paper: Zhang et al., "ResNeSt: Split-Attention Networks", arXiv 2004.08955.
Reference implementation: zhanghang1989/ResNeSt, `SplAtConv2d` in its radix-major form. Children have the
released names, so released weights load by name.

What differs from the reference:
- the splits are pooled before they are summed: the pool of a sum is the sum of the pools, and no full-size
  sum has to be written;
- with two splits, softmax(a, b) is (s, 1 - s) with s = sigmoid(a - b), and the weighted sum is one
  interpolation;
- a width of the attention that `groups` does not divide is rounded up to a multiple of `groups`, where the
  reference fails. No published network needs it.
"""

from __future__ import annotations

from torch import Tensor, nn

from resnest_det.layers.norm import NormLayer, check_pooled_batch, uses_batch_statistics
from resnest_det.layers.selection import select_softly


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
    """

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
        x = self.relu(self.bn0(self.conv(x)))  # (N, radix * channels, H', W')
        splits = x.chunk(self.radix, dim=1)
        pooled = x.mean((2, 3), keepdim=True)  # (N, radix * channels, 1, 1)
        logits = self.attention_logits(pooled)  # (N, radix, channels)
        if self.radix == 1:
            return splits[0] * logits.sigmoid().flatten(1)[:, :, None, None]
        return select_softly(splits, logits)

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
