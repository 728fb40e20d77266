"""Optimisers, which parameters decay, and the learning rate over layers and over a run."""

from __future__ import annotations

import importlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from resnest_det.backbones.other_networks import is_timm_network
from resnest_det.backbones.stages import StageExtractor

OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["multistep", "poly", "cosine", "one_cycle", "constant"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    norm_weight_decay: float,
    head_lr_factor: float = 1.0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """The trainable parameters in groups of one learning rate and one weight decay.

    There are two groups for each learning rate, weights first. The order of the rates is: `lr` itself, so that the
    first group states the run's learning rate; the head's, where it has one of its own; and with layer-wise decay the
    backbone's, from its last layer to its stem. A group that would be empty is there nevertheless, so that a
    checkpoint's groups keep their places whatever is frozen.

    Layer-wise decay as BEiT fine-tunes (Bao et al., arXiv 2106.08254): of a network of n layers, see layer_depths,
    layer d learns at lr * layer_decay ** (n - d), and what comes after it, such as a pyramid in `backbone`, at lr.

    Args:
        model: frozen parameters (requires_grad False) are left out.
        lr: learning rate.
        weight_decay: of the weights. A network's tokens and position tables count as such if they have two dimensions
            or more, as has LayerScale in torchvision's ConvNeXt.
        norm_weight_decay: of norms and biases, and of all else with at most one dimension, such as LayerScale in
            timm's ConvNeXt: regularising pulls them towards no useful value.
        head_lr_factor: factor on the learning rate of what is not in `backbone`.
        layer_decay: factor on the learning rate from each layer of the network in `backbone` to the one before it,
            in (0, 1]; 1 is none.

    Raises:
        ValueError: layer_decay is out of range; the model has no trainable parameter, or lacks the `backbone` that an
            argument needs; the layers of its network are not known.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(
            f"layer_decay={layer_decay} must be above 0 and at most 1: 1 trains every layer at the full learning rate, "
            f"0.9 each at nine tenths of the next"
        )
    for name, value in (("head_lr_factor", head_lr_factor), ("layer_decay", layer_decay)):
        if value != 1 and not hasattr(model, "backbone"):
            raise ValueError(
                f"{name}={value} needs a model with a child `backbone`, beside which all else is the head; "
                f"{type(model).__name__} has {', '.join(child for child, _ in model.named_children())}"
            )
    rates = {0: lr}  # by place: 0 is no layer of its own, -1 the head, and layers count from the network's end
    places: dict[nn.Parameter, int] = {}
    if head_lr_factor != 1:
        rates[-1] = lr * head_lr_factor
        places = dict.fromkeys(set(model.parameters()) - set(model.get_submodule("backbone").parameters()), -1)
    if layer_decay != 1:
        depths = layer_depths(model.get_submodule("backbone"))
        num_layers = 1 + max(depths.values())
        rates |= {distance: lr * layer_decay**distance for distance in range(1, num_layers + 1)}
        places |= {parameter: num_layers - depth for parameter, depth in depths.items()}
    parts: dict[tuple[int, bool], list[nn.Parameter]] = {
        (place, small): [] for place in rates for small in (False, True)
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                small = isinstance(module, _NORMS) or name == "bias" or parameter.ndim <= 1
                parts[places.get(parameter, 0), small].append(parameter)
    if not any(parts.values()):
        raise ValueError("the model has no trainable parameter: every one is frozen")
    return [
        {
            "params": parameters,
            "lr": rates[place],
            "weight_decay": norm_weight_decay if small else weight_decay,
        }
        for (place, small), parameters in parts.items()
    ]


def layer_depths(backbone: nn.Module) -> dict[nn.Parameter, int]:
    """The layer of each parameter of the network in a backbone: 0 is the stem, and every block is a layer of its own.

    In a network with stages as children (one of create_backbone, one of torchvision behind stage_extractor, or one's
    own) the stem is what comes before layer1, or before the first stage that was asked for. What downsamples between
    two stages belongs to the block after it; a last convolution or norm with no block after it is a layer. In timm's
    networks the layers are those of timm's own layer decay (`group_matcher`), which are the same for ResNet, ResNeSt,
    ConvNeXt and Swin. ConvNeXt's released code differs: three blocks in a row are one layer.

    Args:
        backbone: a network, or what holds one, as a pyramid does. What it holds beside the network is left out.

    Raises:
        ValueError: there is no such network in it.
    """
    for network in backbone.modules():
        if is_timm_network(network):
            return _timm_depths(network)
    for network in backbone.modules():
        names = [name for name, _ in network.named_children()]
        if "layer1" in names:
            first = "layer1"
        elif isinstance(network, StageExtractor):
            first = next(iter(network.channels))
        else:
            continue
        stages = [network.get_submodule(name) for name in names[names.index(first) :]]
        blocks = [block for stage in stages for block in _blocks(stage) if block]
        depths = dict.fromkeys(network.parameters(), 0)
        for depth, block in enumerate(blocks, start=1):
            depths |= dict.fromkeys(block, depth)
        return depths
    raise ValueError(
        f"layer_decay needs a network whose layers are known, and {type(backbone).__name__} has no child layer1: take "
        f"the network's features by stage_extractor or fpn_backbone, or use layer_decay=1"
    )


def _timm_depths(network: nn.Module) -> dict[nn.Parameter, int]:
    """layer_depths of one of timm's networks."""
    group_matcher: Callable[..., Any] | None = getattr(network, "group_matcher", None)
    if group_matcher is None:
        raise ValueError(f"timm does not say what the layers of its {type(network).__name__} are: use layer_decay=1")
    group_parameters = importlib.import_module("timm.models").group_parameters
    depths: dict[str, int] = group_parameters(network, group_matcher(coarse=False), reverse=True)
    return {parameter: depths[name] for name, parameter in network.named_parameters()}


def _blocks(stage: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each block of a stage, in order; a module that is no list of modules is one block."""
    if not _is_list(stage):
        return [list(stage.parameters())]
    children = list(stage.children())
    has_lists = any(_is_list(child) for child in children)
    blocks: list[list[nn.Parameter]] = []
    before: list[nn.Parameter] = []  # parameters that the next block takes up
    for child in children:
        if has_lists and not _is_list(child):
            before += child.parameters()
            continue
        found = _blocks(child)
        found[0] = before + found[0]
        before = []
        blocks += found
    return [*blocks, before]


def _is_list(module: nn.Module) -> bool:
    """Whether a module lists blocks; a convolution and its norm in a Sequential are none."""
    return isinstance(module, _LISTS) and any(True for child in module.children() for _ in child.children())


def describe_trainable(model: nn.Module) -> str:
    """What of a model trains and what is frozen, in one sentence.

    Returns:
        Such as "trained: 41.1 M of 41.3 M parameters, in 212 tensors; frozen: backbone.body.conv1,
        backbone.body.layer1 (225.3 k)". What is frozen is named by the largest modules that are frozen whole, or by
        the parameter where its module is not; of more than 8 names the rest is counted. Modules without parameters,
        as FrozenBatchNorm2d, are in no name of their own.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    num_all, num_trained = (sum(parameter.numel() for parameter in some) for some in (parameters, trained))
    text = f"trained: {_count(num_trained)} of {_count(num_all)} parameters, in {len(trained)} tensors; frozen: "
    if len(trained) == len(parameters):
        return f"{text}nothing"
    names = list(_frozen_names(model))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{text}{', '.join(names[:8])}{more} ({_count(num_all - num_trained)})"


def _frozen_names(module: nn.Module, name: str = "") -> Iterator[str]:
    """The names of the largest modules that are frozen whole, and of frozen parameters beside trained ones."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield name or "everything"
        return
    prefix = f"{name}." if name else ""
    for own, parameter in module.named_parameters(recurse=False):
        if not parameter.requires_grad:
            yield prefix + own
    for own, child in module.named_children():
        yield from _frozen_names(child, prefix + own)


def _count(number: int) -> str:
    """A number in three or four digits and its unit: 41.3 M, 225.3 k, 64."""
    for size, unit in ((1_000_000, " M"), (1_000, " k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def scaled_learning_rate(lr: float, *, batch_size: int, base_batch_size: int, rule: Literal["linear", "sqrt"]) -> float:
    """The learning rate for another batch size than the one that it was found with.

    Args:
        lr: learning rate found with base_batch_size.
        batch_size: images of one optimiser step, over all processes and accumulated batches.
        base_batch_size: images of one step of the run whose learning rate is lr.
        rule: "linear" multiplies by batch_size / base_batch_size (Goyal et al., arXiv 1706.02677, for SGD, with a
            warm-up); "sqrt" by its square root, which keeps the variance of a step (Krizhevsky, arXiv 1404.5997) and
            suits Adam (Malladi et al., arXiv 2205.10287).

    Raises:
        ValueError: the rule is unknown, or a batch size is not positive.
    """
    for name, size in (("batch_size", batch_size), ("base_batch_size", base_batch_size)):
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1: it is the number of images of one optimiser step")
    if rule == "linear":
        return lr * batch_size / base_batch_size
    if rule == "sqrt":
        return lr * math.sqrt(batch_size / base_batch_size)
    raise ValueError(f"the rule {rule!r} for the learning rate is unknown; choose 'linear' or 'sqrt'")


def create_optimizer(
    model: nn.Module,
    name: OptimizerName,
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 1e-4,
    norm_weight_decay: float = 0.0,
    head_lr_factor: float = 1.0,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """Build the optimiser of a model's trainable parameters.

    Args:
        model: what is trained.
        name: "sgd" or "adamw".
        lr: the highest learning rate of the run.
        momentum: of SGD, in [0, 1).
        nesterov: whether SGD's momentum is Nesterov's.
        weight_decay: of weights.
        norm_weight_decay: of norms, biases and other parameters of at most one dimension.
        head_lr_factor: factor on the learning rate of what is not in the model's `backbone`.
        layer_decay: factor on the learning rate from each layer of the backbone to the one before it, in (0, 1]; see
            parameter_groups.

    Raises:
        ValueError: the name is unknown, nothing is trainable, layer_decay is out of range, or the model has not the
            `backbone` that head_lr_factor or layer_decay needs.
    """
    groups = parameter_groups(
        model,
        lr=lr,
        weight_decay=weight_decay,
        norm_weight_decay=norm_weight_decay,
        head_lr_factor=head_lr_factor,
        layer_decay=layer_decay,
    )
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    raise ValueError(f"optimizer {name!r} is unknown; choose 'sgd' or 'adamw'")


def learning_rate_factor(
    step: int,
    *,
    total_steps: int,
    schedule: ScheduleName,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    power: float = 0.9,
    final_factor: float = 0.0,
    rise: float = 0.3,
    initial_factor: float = 0.04,
) -> float:
    """What the learning rate is multiplied by at a step: a pure function, so that a resumed run is on the same curve.

    Args:
        step: optimiser steps done, from 0.
        total_steps: steps of the whole run.
        schedule: "multistep"; "poly" (a power of what remains of the run, down to final_factor); "cosine" (half a
            cosine from the end of the warm-up to final_factor); "one_cycle" (Smith & Topin, arXiv 1708.07120: from the
            end of the warm-up half a cosine from initial_factor up to 1, then one down to final_factor); or
            "constant". One cycle leaves the momentum as it is, where the paper lowers it while the rate is high.
        warmup_steps: steps over which the factor rises linearly from warmup_factor to that of the schedule.
        warmup_factor: factor at step 0, in (0, 1].
        milestones: for multistep, increasing fractions of the run at which the factor is multiplied by gamma.
        gamma: see milestones.
        power: for poly, the exponent; 1 is a straight line.
        final_factor: for poly, cosine and one_cycle, the factor at the end.
        rise: for one_cycle, the fraction of the steps after the warm-up over which the factor rises, in (0, 1).
        initial_factor: for one_cycle, the factor where the rise begins, in (0, 1]. As in torch's OneCycleLR, 1 /
            div_factor; torch's run ends at the last step, ours as the other schedules do after it.
    """
    done = min(max(step - warmup_steps, 0) / max(total_steps - warmup_steps, 1), 1.0)
    if schedule == "multistep":
        factor = gamma ** bisect_right([fraction * total_steps for fraction in milestones], step)
    elif schedule == "cosine":
        factor = _half_cosine(1.0, final_factor, done)
    elif schedule == "one_cycle":
        factor = (
            _half_cosine(initial_factor, 1.0, done / rise)
            if done < rise
            else _half_cosine(1.0, final_factor, (done - rise) / (1 - rise))
        )
    elif schedule == "poly":
        factor = final_factor + (1 - final_factor) * (1 - min(step / total_steps, 1.0)) ** power
    elif schedule == "constant":
        factor = 1.0
    else:
        raise ValueError(
            f"schedule {schedule!r} is unknown; choose 'multistep', 'poly', 'cosine', 'one_cycle' or 'constant'"
        )
    if step < warmup_steps:
        factor *= warmup_factor + (1 - warmup_factor) * step / warmup_steps
    return factor


def _half_cosine(start: float, end: float, done: float) -> float:
    """From start to end as half a cosine, of which the fraction `done` is over."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def create_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    schedule: ScheduleName,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    power: float = 0.9,
    final_factor: float = 0.0,
    rise: float = 0.3,
    initial_factor: float = 0.04,
) -> LambdaLR:
    """The schedule of an optimiser; `step()` it after each optimiser step. Arguments: see learning_rate_factor.

    Raises:
        ValueError: the schedule is unknown, the warm-up would take the whole run, or an argument of multistep or
            one_cycle is out of range.
    """
    if warmup_steps >= total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must be fewer than the run's {total_steps} steps: shorten the warm-up or "
            f"train longer"
        )
    bounds = [0.0, *milestones, 1.0]
    if any(later <= earlier for earlier, later in pairwise(bounds)):
        raise ValueError(
            f"milestones={tuple(milestones)} must be increasing fractions of the run, between 0 and 1: step 60000 of "
            f"90000 is 0.667"
        )
    if not 0 < rise < 1:
        raise ValueError(f"rise={rise} must be between 0 and 1: it is the fraction of the run spent rising")
    if not 0 < initial_factor <= 1:
        raise ValueError(
            f"initial_factor={initial_factor} must be above 0 and at most 1: it is a fraction of the learning rate"
        )

    def factor(step: int) -> float:
        return learning_rate_factor(
            step,
            total_steps=total_steps,
            schedule=schedule,
            warmup_steps=warmup_steps,
            warmup_factor=warmup_factor,
            milestones=milestones,
            gamma=gamma,
            power=power,
            final_factor=final_factor,
            rise=rise,
            initial_factor=initial_factor,
        )

    return LambdaLR(optimizer, factor)
