"""The graph of one module's own forward pass, its children unopened: where a model is rewritten, this is what is read.

A whole detector cannot be traced, as what it does depends on what it sees. The modules that hold its convolutions can,
one by one, and their graphs say what is wanted: which child feeds which, and whether anything else reads it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx, nn

from resnest_det.backbones.resnet import DeepStem
from resnest_det.layers.fused import has_hooks


class _LeafTracer(fx.Tracer):
    """Traces one module: each of its children is one node of the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True


def own_graph(module: nn.Module) -> fx.Graph | None:
    """The graph of a module's forward pass with a node for each call of a child; None where there is no one such graph.

    That is where it cannot be traced, and where arguments have defaults, on which the way taken may depend.
    """
    try:
        graph = _LeafTracer().trace(module)
    except Exception:  # tracing runs the module's own code with stand-ins for tensors: it may raise anything
        return None
    return None if any(node.op == "placeholder" and node.args for node in graph.nodes) else graph


def only_child(module: nn.Module, node: Any, kinds: tuple[type[nn.Module], ...]) -> nn.Module | None:
    """The child that a node calls, if it is of these kinds, called nowhere else in the graph, and read only once.

    A Sequential stands for the last module in it. A child with hooks is none: they may set its weights, as those of
    pruning do.
    """
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return None
    calls = Counter(other.target for other in node.graph.nodes if other.op == "call_module")
    if calls[node.target] != 1:
        return None
    child = module.get_submodule(str(node.target))
    while isinstance(child, nn.Sequential) and _runs_in_order(child) and len(child):
        if has_hooks(child):
            return None
        child = list(child)[-1]
    return child if type(child) in kinds and not has_hooks(child) else None


def _runs_in_order(module: nn.Sequential) -> bool:
    return type(module) is DeepStem or type(module).forward is nn.Sequential.forward


def shared_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that stand at more than one place in a model."""
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return {module for module, count in places.items() if count > 1}
