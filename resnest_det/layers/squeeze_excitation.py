"""Squeeze and excitation.

Paper: Hu et al., "Squeeze-and-Excitation Networks", arXiv 1709.01507.
Reference implementation: hujie-frank/SENet; in PyTorch timm's `SEModule` and torchvision's `SqueezeExcitation`,
whose fc1 and fc2 are 1x1 convolutions too, so that their weights load by name.

What differs:
- the hidden width is `channels // reduction`, as in the paper; timm rounds it to a multiple of 8, which a rule
  passed as `hidden_channels` reproduces;
- grouped 1x1 convolutions, the start at zero, the residual form and features that are not images are additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the mean of every channel.

    s = gate(fc2(relu(fc1(mean of x)))), one number a sample and channel; the output is x * s. Because s depends
    on the input, no constant weight stands for it: the layer cannot be folded into a convolution, as a BatchNorm
    can.

    MobileNetV3's form is `reduction=4, gate="hard_sigmoid"`.

    Args:
        channels: channels of the input and of the output.
        reduction: the hidden width is `channels // reduction`, at least 1.
        hidden_channels: the hidden width, or a rule from `channels` to it; `reduction` is not used then.
        gate: "sigmoid"; or "hard_sigmoid", relu6(x + 3) / 6, which suits quantised networks.
        groups: groups of both 1x1 convolutions. Divides `channels` and the hidden width.
        zero_init: fc2 starts at zero, weight and bias, so that s starts at 0.5 everywhere.
        residual: the output is x + x * s.
        channel_dim: 1 for features, -1 for tokens.

    Shape:
        The output has the shape and the memory format of the input: (N, channels) or (N, channels, ...) with any
        number of further dimensions where `channel_dim` is 1, (N, ..., channels) where it is -1.

    Raises:
        ValueError: an argument is out of range; in the forward pass, x has another number of channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: float = 16,
        hidden_channels: int | Callable[[int], int] | None = None,
        gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid",
        groups: int = 1,
        zero_init: bool = False,
        residual: bool = False,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        if channels < 1 or groups < 1:
            raise ValueError(f"channels={channels} and groups={groups} must both be 1 or more")
        if reduction <= 0:
            raise ValueError(f"reduction={reduction} must be above 0")
        if gate not in ("sigmoid", "hard_sigmoid"):
            raise ValueError(f"gate={gate!r} is unknown; choose 'sigmoid' or 'hard_sigmoid'")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim={channel_dim} must be 1, as in (N, C, H, W), or -1, as in (N, L, C)")
        if hidden_channels is None:
            hidden = max(int(channels // reduction), 1)
        elif callable(hidden_channels):
            hidden = hidden_channels(channels)
        else:
            hidden = hidden_channels
        if not isinstance(hidden, int) or hidden < 1:
            raise ValueError(
                f"hidden_channels gives {hidden} for channels={channels}; it must be an integer of 1 or more"
            )
        if channels % groups or hidden % groups:
            raise ValueError(
                f"groups={groups} must divide channels={channels} and the hidden width {hidden}, "
                "which hidden_channels sets"
            )
        self.channels = channels
        self.gate = gate
        self.residual = residual
        self.channel_dim = channel_dim
        self.fc1 = nn.Conv2d(channels, hidden, 1, groups=groups)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, channels, 1, groups=groups)
        if zero_init:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels: any shape of the class's docstring to the same shape."""
        if x.dim() < 2 or x.shape[self.channel_dim] != self.channels:
            raise ValueError(
                f"x of shape {tuple(x.shape)} must have channels={self.channels} in dimension {self.channel_dim} "
                "behind a batch dimension; channel_dim=1 takes (N, C, ...), channel_dim=-1 takes (N, ..., C)"
            )
        first = 2 if self.channel_dim == 1 else 1
        positions = tuple(range(first, first + x.dim() - 2))
        pooled = x.mean(positions, keepdim=True) if positions else x
        hidden = self.relu(self.fc1(pooled.reshape(-1, self.channels, 1, 1)))
        logits = self.fc2(hidden).reshape(pooled.shape)
        scale = F.hardsigmoid(logits) if self.gate == "hard_sigmoid" else logits.sigmoid()
        return x + x * scale if self.residual else x * scale
