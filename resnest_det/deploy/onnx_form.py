"""The form of a model that ONNX Runtime's CPU runs fastest: the same function, written otherwise.

ONNX Runtime keeps features in blocks of channels, the layout of its convolutions, through convolutions, pools and
equal-shaped additions; whatever else touches them has them copied out and back. And it sums over an axis of five
dimensions about ten times as slowly as it adds two tensors. So split attention is written here with as few other
operations as there can be, and those on the smallest features there are:

- the splits are slices of four dimensions, pooled by GlobalAveragePool before anything is added;
- the average pool that carries a block's stride comes before the weighted sum instead of after it. Both are linear, and
  the weights are one number a channel: the pool of the sum is the sum of the pools, at a quarter of the size.

docs/export.md has what it gains, and what was tried besides.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from resnest_det.backbones import Bottleneck
from resnest_det.deploy.folding import fold_batch_norms
from resnest_det.layers import SelectiveKernelConv2d, SplitAttentionConv2d


def onnx_form(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode to be exported, for inference only: BatchNorm folded, attention as the module says.

    Args:
        model: any model; what has no split attention and no selective kernels is only folded.

    Returns:
        The copy. Its outputs are those of the model to within the rounding of float32.
    """
    return _rewritten(fold_batch_norms(model)).eval()


def _rewritten(module: nn.Module) -> nn.Module:
    """The module with its attention layers replaced, or what replaces it where it is one."""
    if isinstance(module, SplitAttentionConv2d):
        return _SplitAttention(module)
    if isinstance(module, SelectiveKernelConv2d):
        return _SelectiveKernel(module)
    if isinstance(module, (_SplitAttention, _SelectiveKernel)):
        return module
    for name, child in module.named_children():
        setattr(module, name, _rewritten(child))
    if isinstance(module, Bottleneck) and isinstance(module.conv2, _SplitAttention) and module.avd_after is not None:
        module.conv2.pool, module.avd_after = module.avd_after, None
    return module


class _SplitAttention(nn.Module):
    """A split-attention convolution, with the average pool that follows it where there is one."""

    pool: nn.Module | None

    def __init__(self, layer: SplitAttentionConv2d) -> None:
        super().__init__()
        self.layer = layer
        self.pool = None
        self.channels = layer.conv.out_channels // layer.radix

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        x = layer.relu(layer.bn0(layer.conv(x)))  # (N, radix * channels, H, W)
        pooled = F.adaptive_avg_pool2d(x, 1).split(self.channels, dim=1)
        hidden = layer.relu(layer.bn1(layer.fc1(_sum(pooled))))
        logits = layer.fc2(hidden)  # (N, groups * radix * channels / groups, 1, 1)
        if layer.groups > 1:
            logits = logits.reshape(-1, layer.groups, layer.radix, self.channels // layer.groups).transpose(1, 2)
        logits = logits.reshape(-1, layer.radix, self.channels, 1, 1)
        weights = logits.sigmoid() if layer.radix == 1 else logits.softmax(dim=1)
        if self.pool is not None:
            x = self.pool(x)
        return _weighted_sum(x.split(self.channels, dim=1), weights)


class _SelectiveKernel(nn.Module):
    """A selective kernel convolution."""

    def __init__(self, layer: SelectiveKernelConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        maps = [branch(x) for branch in layer.branches]
        pooled = _sum([F.adaptive_avg_pool2d(features, 1) for features in maps])
        logits = layer.fc2(layer.relu(layer.bn1(layer.fc1(pooled))))
        weights = logits.reshape(-1, len(maps), layer.fc1.in_channels, 1, 1).softmax(dim=1)
        return _weighted_sum(maps, weights)


def _weighted_sum(maps: list[Tensor] | tuple[Tensor, ...], weights: Tensor) -> Tensor:
    """The sum of maps (N, C, H, W), each times its weights (N, maps, C, 1, 1)."""
    return _sum([features * own for features, own in zip(maps, weights.unbind(1), strict=True)])


def _sum(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Additions of two: ONNX Runtime is slow to sum over an axis."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
