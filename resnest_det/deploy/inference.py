"""A model as it runs fastest in torch: norms folded, channels last, convolutions with their ReLU.

On the CPU, a convolution's weights are laid out once as oneDNN's kernels read them, where torch does it in every call,
and the ReLU behind it is computed in the same pass, as torch.compile has it. Many 3x3 convolutions are Winograd's.
Linear layers and RoIAlign are those of this package's own detectors.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
import torch._dynamo.config
from torch import Tensor, fx, nn
from torchvision.ops import MultiScaleRoIAlign

from resnest_det.deploy.folding import fold_batch_norms
from resnest_det.deploy.tracing import only_child, own_graph, shared_modules
from resnest_det.deploy.winograd import WinogradConv2d, suits_winograd, winograd_products
from resnest_det.layers.fused import (
    convolution_shape,
    has_fused_convolution,
    has_hooks,
    is_plain_conv,
    onednn_convolution,
)
from resnest_det.layers.linear import OneDNNLinear
from resnest_det.models import RowRoIAlign

_MANY_SIZES = 256  # torch stops compiling after 8, and runs the ninth as it is written


def optimize_for_inference(model: nn.Module, *, compile: bool = False) -> nn.Module:
    """A copy of a model for inference alone: faster, with outputs that are equal up to rounding.

    BatchNorm is folded (see `fold_batch_norms`), and channels are last in memory: give it images in that layout,
    `images.contiguous(memory_format=torch.channels_last)`. On the CPU in float32, convolutions are packed for oneDNN
    at their first call, and wide 3x3 ones computed by Winograd's filtering, for which their weights are held in four
    times the size besides. Such a copy is for running: it is not trained, exported, saved or moved to another device.

    Args:
        model: a classifier, stage extractor, detector or segmentation model. It is not changed.
        compile: leave the packing to torch.compile, which takes minutes at the first call, and again for other sizes,
            and is faster still. Of a detector it compiles the backbone: what follows depends on what is found.

    Returns:
        The copy, in evaluation mode, whose outputs have no gradients.
    """
    fast = fold_batch_norms(model).requires_grad_(False).to(memory_format=torch.channels_last)
    on_cpu = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in fast.parameters())
    has_onednn = on_cpu and has_fused_convolution()
    if compile:
        if has_onednn:
            _use_winograd(fast, set(), {})
        return _compiled(fast)
    if has_onednn:
        shared = shared_modules(fast)
        joined: set[nn.Module] = set()
        for name, parent in list(fast.named_modules()):
            if any(isinstance(child, nn.Conv2d) for child in parent.children()) or isinstance(parent, nn.Sequential):
                rewritten = _with_joined_relus(parent, shared, joined)
                if rewritten is not parent and name:
                    fast.set_submodule(name, rewritten)
                elif rewritten is not parent:
                    fast = rewritten
        _use_winograd(fast, joined, {})
        _pack(fast, joined, {})
    return fast


class PackedConv2d(nn.Module):
    """A convolution, and a ReLU where `relu` is True, its weights as oneDNN reads them. For inference.

    Args:
        conv: the convolution, float32 on the CPU.
        relu: whether a ReLU follows.

    Shape:
        As of the convolution; the output has channels last.
    """

    def __init__(self, conv: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        self.conv: nn.Conv2d | None = conv
        self.bias = conv.bias
        self.relu = relu
        self.out_channels, self.kernel_size, self.groups = conv.out_channels, conv.kernel_size, conv.groups
        self.padding, self.stride, self.dilation = conv.padding, conv.stride, conv.dilation
        self.packed: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor, term: Any = None) -> Tensor:
        """Convolve (N, in_channels, H, W), and add a term, such as a shortcut, before the ReLU."""
        x = x.contiguous(memory_format=torch.channels_last)
        conv = self.conv
        shape = convolution_shape(x, self)
        if len(x) == 0:
            return x.new_empty(shape)
        if conv is not None and x.shape[2:].numel() == 1:  # of pooled features, where packing costs more than it saves
            return self._finish(conv(x), term)
        packed = self._packed_for(x)
        if term is None:
            return onednn_convolution(x, packed, self.bias, self, relu=self.relu)
        if not isinstance(term, Tensor) or term.shape != shape or term.dtype != x.dtype:
            return self._finish(onednn_convolution(x, packed, self.bias, self, relu=False), term)
        term = term.contiguous(memory_format=torch.channels_last)
        return onednn_convolution(x, packed, self.bias, self, relu=self.relu, term=term)

    def _packed_for(self, x: Tensor) -> Tensor:
        """The weights in the layout for images of this size.

        oneDNN has several layouts for a 1x1 convolution, chosen by the number of pixels, and takes up to a hundred
        times as long with one that it did not choose. Sizes that share a layout share the weights.
        """
        size = tuple(x.shape) if self.kernel_size == (1, 1) else ()
        conv, packed = self.conv, self.packed
        if size not in packed:
            weight = next(iter(packed.values())).to_dense() if conv is None else conv.weight
            weight = weight.contiguous(memory_format=torch.channels_last).to_mkldnn()
            reordered = torch.ops.aten.mkldnn_reorder_conv2d_weight(
                weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape)
            )
            known = {_layout(other): other for other in set(packed.values())}
            packed = self.packed = {**packed, size: known.get(_layout(reordered), reordered)}
            self.conv = None  # last, so that another thread finds one of the two
        return packed[size]

    def _finish(self, out: Tensor, term: Any) -> Tensor:
        if term is not None:
            out = out + term
        return out.relu_() if self.relu else out


def _layout(packed: Tensor) -> bytes:
    """oneDNN's description of how weights lie in memory."""
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy())


def _compiled(model: nn.Module) -> nn.Module:
    """The model, or a detector's backbone, compiled with its weights as constants."""
    import torch._inductor.config as inductor  # slow to import

    backbone = getattr(model, "backbone", None)
    is_detector = isinstance(backbone, nn.Module) and hasattr(model, "transform")
    target = cast(nn.Module, backbone) if is_detector else model
    compiled = torch.compile(target.forward, dynamic=False)

    def forward(*arguments: Any) -> Any:
        # The weights become constants only where this is set while a size is compiled, which is at its first call.
        with inductor.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=_MANY_SIZES), torch.no_grad():
            return compiled(*arguments)

    target.forward = forward
    return model


def _with_joined_relus(parent: nn.Module, shared: set[nn.Module], joined: set[nn.Module]) -> nn.Module:
    """The module without the ReLUs behind convolutions, which are put into `joined`, nor the additions in between.

    It is the same object, or another that runs its graph; where nothing can be joined it is as it was.
    """
    graph = own_graph(parent)
    if graph is None or has_hooks(parent):
        return parent
    for node in list(graph.nodes):
        if node.op == "call_module" and type(parent.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)

    def convolution(node: Any) -> nn.Module | None:
        conv = only_child(parent, node, (nn.Conv2d,))
        return conv if conv is not None and conv not in shared and is_plain_conv(conv) else None

    relus: list[tuple[fx.Node, nn.Module]] = []
    additions: list[tuple[fx.Node, nn.Module, fx.Node]] = []
    for node in graph.nodes:
        if node.op != "call_module" or type(parent.get_submodule(node.target)) is not nn.ReLU:
            continue
        if has_hooks(parent.get_submodule(node.target)):
            continue
        before = node.args[0]
        conv = convolution(before)
        if conv is not None:
            relus.append((node, conv))
        elif before.op == "call_function" and before.target is operator.add and len(before.users) == 1:
            if before.args[0] is before.args[1]:
                continue
            for term in before.args:
                conv = convolution(term)
                if conv is not None and conv is parent.get_submodule(term.target):
                    additions.append((node, conv, term))
                    break
    joined.update(conv for _, conv in relus)
    targets = [node.target for node in graph.nodes if node.op == "call_module"]
    alone = [
        targets.count(node.target) == 1 and parent.get_submodule(str(node.target)) not in shared for node, _ in relus
    ]
    if not additions and all(alone):
        for node, _ in relus:
            parent.set_submodule(str(node.target), nn.Identity())
        return parent
    for node, _ in relus:
        node.replace_all_uses_with(cast(fx.Node, node.args[0]))
        graph.erase_node(node)
    for node, conv, term in additions:
        addition = cast(fx.Node, node.args[0])
        (other,) = (argument for argument in addition.args if argument is not term)
        with graph.inserting_before(addition):
            joint = graph.call_module(str(term.target), (*term.args, other))
        joined.add(conv)
        node.replace_all_uses_with(joint)
        for gone in (node, addition, term):
            graph.erase_node(gone)
    return fx.GraphModule(parent, graph)


def _use_winograd(model: nn.Module, joined: set[nn.Module], replaced: dict[nn.Module, nn.Module]) -> None:
    """Replace the convolutions that are computed with fewer multiplications; one at several places by one."""
    for name, child in list(model.named_children()):
        if child not in replaced:
            if is_plain_conv(child) and suits_winograd(cast(nn.Conv2d, child)):
                products = winograd_products(cast(nn.Conv2d, child))
                replaced[child] = WinogradConv2d(child, products, relu=child in joined)
            else:
                _use_winograd(child, joined, replaced)
                replaced[child] = child
        setattr(model, name, replaced[child])


def _pack(model: nn.Module, joined: set[nn.Module], packed: dict[nn.Module, nn.Module]) -> None:
    """Replace the convolutions and linear layers; one that stands at several places by one."""
    for name, child in list(model.named_children()):
        if child not in packed:
            if is_plain_conv(child):
                packed[child] = PackedConv2d(cast(nn.Conv2d, child), relu=child in joined)
            elif type(child) is nn.Linear:
                packed[child] = OneDNNLinear.like(child)
            elif type(child) is MultiScaleRoIAlign and cast(int, child.sampling_ratio) > 0:
                packed[child] = RowRoIAlign(
                    child.featmap_names,
                    child.output_size,
                    child.sampling_ratio,
                    canonical_scale=child.canonical_scale,
                    canonical_level=child.canonical_level,
                )
            else:
                _pack(child, joined, packed)
                packed[child] = child
        setattr(model, name, packed[child])
