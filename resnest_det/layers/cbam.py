"""The convolutional block attention module: a gate over channels, then one over positions.

Paper: Woo et al., "CBAM: Convolutional Block Attention Module", arXiv 1807.06521.
Reference implementation: Jongchan/attention-module. As there, the shared layers of the channel gate have biases,
and the planes of the spatial gate are (max, mean); timm's `CbamModule` has no biases and (mean, max), so that
weights made for one do not work in the other.

What differs:
- the shared layers are 1x1 convolutions, fc1 and fc2, in place of linear layers;
- where several values are the maximum, they share its gradient; the released max pooling gives it to one of them;
- a spatial norm without trainable weight starts at 1, see SpatialAttention.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from resnest_det.layers.norm import NormLayer


class ChannelAttention(nn.Module):
    """Scales each channel by a gate computed from the mean and the maximum of every channel.

    s = sigmoid(mlp(mean) + mlp(max)) with one mlp = fc2(relu(fc1(...))) for both, whose biases start at 0.

    Args:
        channels: channels of the input and of the output.
        reduction: the hidden width is `channels // reduction`, at least 1.

    Shape:
        (N, channels, H, W) to the same shape and memory format.

    Raises:
        ValueError: an argument is out of range; in the forward pass, x has another shape.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(f"channels={channels} and reduction={reduction} must both be 1 or more")
        hidden = max(channels // reduction, 1)
        self.channels = channels
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        for layer in (self.fc1, self.fc2):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of x, (N, channels, H, W)."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x of shape {tuple(x.shape)} must be (N, {self.channels}, H, W)")
        mean = x.mean((2, 3), keepdim=True)  # (N, channels, 1, 1)
        maximum = x.amax((2, 3), keepdim=True)
        logits = self.fc2(self.relu(self.fc1(mean))) + self.fc2(self.relu(self.fc1(maximum)))
        return x * logits.sigmoid()


class SpatialAttention(nn.Module):
    """Scales each position by a gate computed from the maximum and the mean over the channels around it.

    s = sigmoid(norm(conv(maximum and mean over channels, in this order))), one number a sample and position.

    The norm's weight starts at 0, as in the released code: the gate is 0.5 everywhere until that weight has
    learned. A norm whose weight is not trained (FrozenBatchNorm2d) keeps its 1, for at 0 the gate would be 0.5
    for ever. Where the norm has a momentum it is 0.01, as released.

    Args:
        kernel_size: side of the convolution's square kernel, odd.
        norm_layer: builds the norm from its number of channels, which is 1.

    Shape:
        (N, C, H, W), with any C, to the same shape and memory format.

    Raises:
        ValueError: kernel_size is even or below 1; in the forward pass, x has another number of dimensions.
    """

    def __init__(self, *, kernel_size: int = 7, norm_layer: NormLayer = nn.BatchNorm2d) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and 1 or more")
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn = norm_layer(1)
        if hasattr(self.bn, "momentum"):
            self.bn.momentum = 0.01  # type: ignore[assignment]
        weight = getattr(self.bn, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.requires_grad:
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the positions of x, (N, C, H, W)."""
        _check_maps(x)
        planes = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)  # (N, 2, H, W)
        return x * self.bn(self.conv(planes)).sigmoid()


@fx.wrap  # a trace keeps the check as one step
def _check_maps(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x of shape {tuple(x.shape)} must be (N, C, H, W)")


class CBAM(nn.Module):
    """ChannelAttention, then SpatialAttention on its result.

    Args:
        channels: channels of the input and of the output.
        reduction: the channel gate's hidden width is `channels // reduction`, at least 1.
        kernel_size: side of the spatial gate's square kernel, odd.
        norm_layer: builds the spatial gate's norm from its number of channels, which is 1.

    Shape:
        (N, channels, H, W) to the same shape and memory format.

    Raises:
        ValueError: as ChannelAttention and SpatialAttention.
    """

    def __init__(
        self, channels: int, *, reduction: int = 16, kernel_size: int = 7, norm_layer: NormLayer = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels, reduction=reduction)
        self.spatial = SpatialAttention(kernel_size=kernel_size, norm_layer=norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Scale channels, then positions, of x, (N, channels, H, W)."""
        return self.spatial(self.channel(x))
