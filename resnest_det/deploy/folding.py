"""BatchNorm folded into the convolution before it.

In evaluation, BatchNorm is a scale and a shift of each channel, and so is part of a convolution's weights and bias. An
attention's scale is not: it depends on the image.
"""

from __future__ import annotations

from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops import FrozenBatchNorm2d

from resnest_det.deploy.tracing import only_child, own_graph, shared_modules
from resnest_det.layers import SyncBatchNorm
from resnest_det.layers.fused import has_hooks

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, FrozenBatchNorm2d)


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode in which convolutions do what the BatchNorms behind them did.

    A norm is folded where its input is the output of a Conv2d that nothing else reads: in our networks and heads all
    of them, in others those that a trace of the module they stand in finds. It leaves an Identity in its place. The
    outputs are the model's in evaluation mode, up to rounding. A copy in training mode would train without norms.

    Args:
        model: any module, such as a classifier, a stage extractor, a detector or a segmentation model. It is not
            changed.

    Returns:
        The copy. Norms that have no running statistics, stand elsewhere, or are of other kinds, such as GroupNorm,
        stay.
    """
    folded = deepcopy(model).eval()
    shared = shared_modules(folded)
    for parent in list(folded.modules()):
        if any(isinstance(child, _NORMS) for child in parent.children()):
            _fold_children(parent, shared)
    return folded


def _fold_children(parent: nn.Module, shared: set[nn.Module]) -> None:
    graph = own_graph(parent)
    for node in graph.nodes if graph else ():
        if node.op != "call_module":
            continue
        norm = parent.get_submodule(node.target)
        if type(norm) not in _NORMS or norm.running_var is None or norm in shared or has_hooks(norm):
            continue
        calls = [other for other in node.graph.nodes if other.op == "call_module" and other.target == node.target]
        conv = only_child(parent, node.args[0], (nn.Conv2d,))
        if len(calls) == 1 and conv is not None and conv not in shared and not is_parametrized(conv):
            _fold(cast(nn.Conv2d, conv), norm)
            parent.set_submodule(node.target, nn.Identity())


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Put a norm's scale and shift into the convolution, computed in float64."""
    scale = cast(Tensor, norm.running_var).double().add(cast(float, norm.eps)).rsqrt()
    shift = -cast(Tensor, norm.running_mean).double() * scale
    if norm.weight is not None:
        gain, offset = cast(Tensor, norm.weight).double(), cast(Tensor, norm.bias).double()
        scale, shift = scale * gain, shift * gain + offset
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    # New parameters, since another convolution may have the same ones.
    trained = conv.weight.requires_grad
    conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=trained)
    conv.weight = nn.Parameter(weight.to(conv.weight), requires_grad=trained)
