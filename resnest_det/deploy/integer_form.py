"""The form of a model that ONNX Runtime's integer kernels run fastest: the same function, written otherwise.

Its fast integer convolution is that of one group; a grouped one first copies what each of its points sees. And what
lies between convolutions costs more beside them than it does in float32. So each split of a split attention is a
convolution of its own, and reads what a part of the 1x1 before it gives: that one has as many parts as there are
splits, and no map is ever cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from torch import Tensor, nn
from torch.nn import functional as F

from resnest_det.backbones import Bottleneck
from resnest_det.deploy.folding import fold_batch_norms
from resnest_det.deploy.onnx_form import onnx_form
from resnest_det.layers import SplitAttentionConv2d


def integer_form(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode to be exported and quantised: BatchNorm folded, splits as the module says.

    Args:
        model: any model. What is not a ResNeSt block with BatchNorm gets onnx_form's form.

    Returns:
        The copy. Its outputs are those of the model to within the rounding of float32.
    """
    copy = fold_batch_norms(model)
    for parent in list(copy.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Bottleneck) and _can_be_cut(child):
                setattr(parent, name, _SplitBlock(child))
    return onnx_form(copy)


def _can_be_cut(block: Bottleneck) -> bool:
    """Whether the block is ResNeSt's as published, with its norms folded: one of another kind may see all splits."""
    layer = block.conv2
    return (
        isinstance(layer, SplitAttentionConv2d)
        and type(block.relu) is type(layer.relu) is nn.ReLU
        and all(
            isinstance(norm, nn.Identity) and conv.bias is not None
            for conv, norm in ((block.conv1, block.bn1), (layer.conv, layer.bn0))
        )
    )


class _SplitBlock(nn.Module):
    """A ResNeSt bottleneck whose splits are branches, each of a 1x1 and a 3x3 convolution."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        layer = block.conv2
        assert isinstance(layer, SplitAttentionConv2d)
        before = [] if block.avd_before is None else [block.avd_before]
        firsts = _cut(block.conv1, layer.radix)
        seconds = _cut(layer.conv, layer.radix)
        self.splits = nn.ModuleList(
            nn.Sequential(first, nn.ReLU(), *before, second, nn.ReLU())
            for first, second in zip(firsts, seconds, strict=True)
        )
        self.radix, self.groups, self.channels = layer.radix, layer.groups, layer.conv.out_channels // layer.radix
        self.attention = nn.Sequential(layer.fc1, layer.bn1, nn.ReLU(), layer.fc2)
        self.end = nn.Sequential(block.avd_after or nn.Identity(), block.conv3, block.bn3, block.gate or nn.Identity())
        self.shortcut = block.downsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        maps = [split(x) for split in self.splits]
        logits = self.attention(_sum([F.adaptive_avg_pool2d(features, 1) for features in maps]))
        # fc2's groups are the outer axis of its output.
        if self.groups > 1:
            logits = logits.reshape(-1, self.groups, self.radix, self.channels // self.groups).transpose(1, 2)
        logits = logits.reshape(-1, self.radix, self.channels, 1, 1)
        weights = logits.sigmoid() if self.radix == 1 else logits.softmax(dim=1)
        total = _sum([features * own for features, own in zip(maps, weights.unbind(1), strict=True)])
        return (self.end(total) + self.shortcut(x)).relu()


def _cut(conv: nn.Conv2d, parts: int) -> list[nn.Conv2d]:
    """Convolutions that each give a part of the output channels.

    Args:
        conv: has one group, and all parts read all of its input; or groups that `parts` divides, and each part reads
            the input of its own.
        parts: divides the output channels.
    """
    share = parts if conv.groups % parts == 0 else 1
    assert conv.bias is not None  # of the norm that was folded into it
    cut = []
    for weight, bias in zip(conv.weight.chunk(parts), conv.bias.chunk(parts), strict=True):
        part = deepcopy(conv)
        part.in_channels, part.out_channels, part.groups = conv.in_channels // share, len(weight), conv.groups // share
        part.weight, part.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
        cut.append(part)
    return cut


def _sum(maps: Sequence[Tensor]) -> Tensor:
    total = maps[0]
    for features in maps[1:]:
        total = total + features
    return total
