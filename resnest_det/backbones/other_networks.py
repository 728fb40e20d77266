"""Networks of torchvision and timm, seen as a stem and four stages.

What a pyramid needs to know of a network that does not state it is measured: the network runs once on a small image.
So there is no table of names and channels, and a network of any width, or one with dilation in place of a stride, is
seen as it is.

Reference implementations: torchvision's `mobilenet_backbone`, which also lets a stage begin where the stride grows and
counts the last 1x1 convolution to the last stage; timm's `features_only=True`. What differs: the network that is given
stays whole, and its modules are shared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import ConvNeXt, DenseNet, EfficientNet, MobileNetV2, MobileNetV3, RegNet, SwinTransformer
from torchvision.ops import Permute

Shape = tuple[int, int]  # channels and stride

# torchvision's networks that run their modules in the order they stand, up to the end of the child named here.
_TRUNKS: dict[type[nn.Module], str] = {
    ConvNeXt: "features",
    DenseNet: "features",
    EfficientNet: "features",
    MobileNetV2: "features",
    MobileNetV3: "features",
    RegNet: "trunk_output",
    SwinTransformer: "features",
}
_IMAGE_SIZE = 64  # pixels of the image that is measured on: two steps of stride 32

ACCEPTED = (
    "networks of create_backbone; torchvision's ResNet (also as ResNeXt and Wide ResNet), "
    f"{', '.join(kind.__name__ for kind in _TRUNKS)}; timm's networks with features at strides 4, 8, 16 and 32, made "
    "without features_only; and a network of your own whose children run in order, the stages among them"
)


class TrunkStage(nn.Sequential):
    """Modules of a network that follow each other, with what a neck needs to know of their output.

    Attributes:
        channels: channels of the output.
        stride: pixels of the network's input for one step of the output.
    """

    def __init__(self, modules: Sequence[nn.Module], *, channels: int, stride: int) -> None:
        super().__init__(*modules)
        self.channels = channels
        self.stride = stride


class StagedTrunk(nn.Module):
    """One of torchvision's networks as a flat one: children stem and layer1 to layer4, up to its pooling.

    A stage begins where the stride grows; the stem is the first module and what else comes before stride 4. Each child
    takes and gives (N, C, H, W), a Swin transformer's too, which works on (N, H, W, C).
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        shapes = _trunk_shapes(net)
        for index, names in enumerate(_trunk_parts(net, shapes)):
            modules = [net.get_submodule(name) for name in names]
            if isinstance(net, SwinTransformer):
                to_channels_last = [] if index == 0 else [Permute([0, 2, 3, 1])]  # the stem does it within
                modules = [*to_channels_last, *modules, Permute([0, 3, 1, 2])]
            channels, stride = shapes[names[-1]]
            name = "stem" if index == 0 else f"layer{index}"
            self.add_module(name, TrunkStage(modules, channels=channels, stride=stride))


class TimmLevels(nn.Module):
    """The features of one of timm's networks at some of its four levels, the first of which has stride 4.

    What the network has beyond the last of these levels is left out, so that every parameter gets a gradient.

    Args:
        net: a network with timm's `feature_info` and `forward_intermediates`.
        levels: levels from 0 to 3, ascending.

    Attributes:
        shapes: channels and stride of each of `levels`.
    """

    def __init__(self, net: nn.Module, levels: Sequence[int]) -> None:
        super().__init__()
        indices, shapes = _timm_levels(net)
        self.shapes = [shapes[level] for level in levels]
        self.indices = [indices[level] for level in levels]
        self.net = net
        self.net = _reduced(net, self._used_parameters())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) to the features of each level, (N, channels, H / stride, W / stride)."""
        return _forward_intermediates(self.net, images, self.indices)

    def _used_parameters(self) -> set[nn.Parameter]:
        """The parameters that the features depend on: those found in their graph of gradients."""
        own = dict(self.named_parameters())
        # Stand-ins, so that frozen parameters are found too and none gets a gradient.
        with torch.inference_mode(False), _small_image(self.net) as image, torch.enable_grad():
            stand_ins = {name: parameter.detach().requires_grad_() for name, parameter in own.items()}
            nodes = [feature.grad_fn for feature in functional_call(self, stand_ins, image)]
        names = {id(stand_in): name for name, stand_in in stand_ins.items()}
        used, seen = set(), set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            if hasattr(node, "variable"):
                used.add(own[names[id(node.variable)]])
        return used


def is_timm_network(net: nn.Module) -> bool:
    """Whether `net` hands out its features the way timm's networks do."""
    return hasattr(net, "feature_info") and hasattr(net, "forward_intermediates")


def flat_network(net: nn.Module) -> nn.Module:
    """`net`, or in its place a flat network of its modules where it is one of torchvision's that are not flat.

    Raises:
        ValueError: it was built with other stages than four from stride 4.
    """
    return StagedTrunk(net) if isinstance(net, tuple(_TRUNKS)) else net


def stage_parts(net: nn.Module) -> list[list[str]]:
    """The names of a network's modules, as five lists: those of the stem and those of each of the four stages.

    Raises:
        ValueError: the network is of no kind that is accepted, or does not hold its stages in modules of their own.
    """
    if isinstance(net, tuple(_TRUNKS)):
        return _trunk_parts(net, _trunk_shapes(net))
    if is_timm_network(net):
        info = cast(Any, net).feature_info
        indices, _ = _timm_levels(net)
        # A level before the four is where the stem ends; TResNet names no module for it.
        stem = [indices[0] - 1] if indices[0] > 0 and info[indices[0] - 1]["module"] else []
        ends = [info[index]["module"] for index in [*stem, *indices]]
    else:
        ends = [f"layer{stage}" for stage in (1, 2, 3, 4)]
    containers = {end[:index] for end in ends for index, letter in enumerate(end) if letter == "."}
    names = list(_module_names(net, containers))
    if [name for name in names if name in ends] != ends:
        raise ValueError(
            f"{type(net).__name__} cannot be frozen by stages: {', '.join(ends)} are no modules of it in this order; "
            f"use trainable_stages=5, and requires_grad_(False) on what shall not train"
        )
    bounds = [names.index(end) + 1 for end in ends]
    if len(ends) == 4:
        bounds.insert(0, names.index(ends[0]))
    return [names[start:end] for start, end in pairwise([0, *bounds])]


def measured_shapes(net: nn.Module, stages: Sequence[str]) -> dict[str, Shape]:
    """Channels and stride of some children of a network whose children run in order, by the child's name.

    Raises:
        ValueError: the network does not run, or a child's output is no (N, C, H, W) of which a stride can be told.
    """
    features = {}
    with _small_image(net) as x:
        for name, module in net.named_children():
            x = module(x)
            if name in stages:
                features[name] = x
            if len(features) == len(stages):
                break
    return {name: _shape(net, name, feature) for name, feature in features.items()}


def _trunk_shapes(net: nn.Module) -> dict[str, Shape]:
    """The shape of each module's output by the module's name, in the order they run."""
    trunk = next(name for kind, name in _TRUNKS.items() if isinstance(net, kind))
    names = list(_module_names(net, {trunk}))
    end = max(index for index, name in enumerate(names) if name.startswith(f"{trunk}."))
    features = {}
    with _small_image(net) as x:
        for name in names[: end + 1]:
            x = features[name] = net.get_submodule(name)(x)
    if isinstance(net, SwinTransformer):
        features = {name: feature.permute(0, 3, 1, 2) for name, feature in features.items()}
    return {name: _shape(net, name, feature) for name, feature in features.items()}


def _trunk_parts(net: nn.Module, shapes: dict[str, Shape]) -> list[list[str]]:
    """The names of `shapes`, those of the stem and of each stage for themselves."""
    parts: list[list[str]] = [[]]
    last_stride = 0
    for name, (_, stride) in shapes.items():
        # The mark of torchvision's MobileNets at a block that begins a stage, though it be dilated and not strided.
        begins = stride > last_stride or getattr(net.get_submodule(name), "_is_cn", False)
        in_stem = not parts[0] or stride < 4
        if not in_stem and (begins or len(parts) == 1):
            parts.append([])
        parts[-1].append(name)
        last_stride = stride
    _check_strides(net, [shapes[names[-1]][1] for names in parts[1:]])
    return parts


def _timm_levels(net: nn.Module) -> tuple[list[int], list[Shape]]:
    """The indices of the four levels, as forward_intermediates counts them, and the levels' shapes."""
    with _small_image(net) as image:
        features = _forward_intermediates(net, image, list(range(len(cast(Any, net).feature_info))))
    shapes = [_shape(net, f"feature {index}", feature) for index, feature in enumerate(features)]
    # Before the four there may be a stem's features: of stride 2, or in TResNet of 4.
    indices = [index for index, (_, stride) in enumerate(shapes) if stride >= 4][-4:]
    _check_strides(net, [shapes[index][1] for index in indices])
    return indices, [shapes[index] for index in indices]


def _forward_intermediates(net: nn.Module, images: Tensor, indices: list[int]) -> list[Tensor]:
    return cast(Any, net).forward_intermediates(
        images, indices=indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )


def _reduced(module: nn.Module, used: set[nn.Parameter]) -> nn.Module:
    """`module` less the parts that have parameters and none that is used.

    It is a copy where it loses a part, so that the original keeps it; the parts that stay are the same modules.
    """
    parameters = set(module.parameters())
    if parameters <= used:
        return module
    if parameters.isdisjoint(used):
        return nn.Identity()
    reduced = copy.copy(module)
    reduced._modules = {
        name: child if child is None else _reduced(child, used) for name, child in module._modules.items()
    }
    return reduced


def _module_names(net: nn.Module, opened: set[str], prefix: str = "") -> Iterator[str]:
    """The names of a network's children in order, with its children in place of a module that is in `opened`."""
    for name, child in net.named_children():
        if prefix + name in opened:
            yield from _module_names(child, opened, f"{prefix}{name}.")
        else:
            yield prefix + name


@contextmanager
def _small_image(net: nn.Module) -> Iterator[Tensor]:
    """A black image (1, 3, 64, 64) that fits the network, which within is in evaluation and without gradients.

    Raises:
        ValueError: what is run within fails.
    """
    flags = [
        (module, flag, getattr(module, flag))
        for module in net.modules()
        for flag in ("training", "grad_checkpointing")  # the second is timm's, and may hide a graph of gradients
        if hasattr(module, flag)
    ]
    like = next(net.parameters(), torch.empty(0))
    for module, flag, _ in flags:
        setattr(module, flag, False)
    try:
        with torch.no_grad():
            yield torch.zeros(1, 3, _IMAGE_SIZE, _IMAGE_SIZE, device=like.device, dtype=like.dtype)
    except Exception as error:
        raise ValueError(
            f"{type(net).__name__} does not run on the {_IMAGE_SIZE}x{_IMAGE_SIZE} image that its stages are measured "
            f"on ({error}): a backbone takes images (N, 3, H, W) of many sizes. Where one of timm's is made for one "
            f"size, try timm.create_model(..., strict_img_size=False) or dynamic_img_size=True"
        ) from error
    finally:
        for module, flag, value in flags:
            setattr(module, flag, value)


def _shape(net: nn.Module, name: str, feature: object) -> Shape:
    """Channels and stride of features of the small image."""
    if not isinstance(feature, Tensor) or feature.ndim != 4 or _IMAGE_SIZE % feature.shape[2]:
        found = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
        raise ValueError(
            f"{name!r} of {type(net).__name__} gives {found} on a {_IMAGE_SIZE}x{_IMAGE_SIZE} image, which tells no "
            f"stride: a stage gives (N, channels, H / stride, W / stride). A stage of your own may state the integer "
            f"attributes `channels` and `stride`"
        )
    return feature.shape[1], _IMAGE_SIZE // feature.shape[2]


def _check_strides(net: nn.Module, strides: list[int]) -> None:
    if (
        len(strides) != 4
        or strides[0] != 4
        or any(after not in (before, 2 * before) for before, after in pairwise(strides))
    ):
        raise ValueError(
            f"{type(net).__name__} has stages at strides {', '.join(map(str, strides)) or 'below 4'}: a backbone has "
            f"four, at strides 4, 8, 16 and 32, or with dilation fewer strides"
        )
