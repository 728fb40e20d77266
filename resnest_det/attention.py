"""What a network attends to: the weights of its attention layers as it runs, and Grad-CAM.

`record_attention` reads, for as long as its context lasts, what every attention layer of `resnest_det.layers` weighs
channels, splits and positions with. `grad_cam` shows where in an image the evidence for a score is.

Paper of the latter: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", arXiv 1610.02391; for segmentation, Vinogradova et al., "Towards Interpretable Semantic Segmentation via
Gradient-weighted Class Activation Mapping", arXiv 2002.11434, whose score is the sum over a region's logits.

What differs from the papers: a detection's score is taken behind its softmax or sigmoid, which is what a detector
returns; of detections and segments the gradient is not averaged over the image, as in Draelos and Carin's HiResCAM,
arXiv 2011.08891; and the maps of several stages are added, see `grad_cam`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from resnest_det.layers import (
    ChannelAttention,
    EfficientChannelAttention,
    SelectiveKernelConv2d,
    SpatialAttention,
    SplitAttentionConv2d,
    SqueezeExcitation,
)

Kind = Literal["split", "branch", "channel", "spatial"]
Score = Callable[[Any], Tensor]  # what a model returned for one image -> a number

_LAYERS = (
    SplitAttentionConv2d,
    SelectiveKernelConv2d,
    SqueezeExcitation,
    EfficientChannelAttention,
    ChannelAttention,
    SpatialAttention,
)


@dataclass(slots=True)
class LayerAttention:
    """What one attention layer gave its splits, branches, channels or positions.

    All values are in [0, 1], float32, on the CPU and without gradients.

    Attributes:
        kind: "split", the share of each split in each channel, (N, radix, channels), which sum to 1 over the splits;
            of one split (radix 1) the sigmoid that scales it. "branch", the same of selective kernels' branches.
            "channel", the factor of each channel, (N, channels). "spatial", that of each position, (N, H, W).
        calls: one tensor for each time the layer ran, in their order.
    """

    kind: Kind
    calls: list[Tensor] = field(default_factory=list)

    @property
    def weights(self) -> Tensor:
        """The values of all images that went through the layer: those of its calls, one behind the other.

        Raises:
            ValueError: the layer has not run, or its calls were of different sizes.
        """
        if not self.calls:
            raise ValueError("calls is empty: the layer has not run; call the network within record_attention")
        sizes = [tuple(call.shape[1:]) for call in self.calls]
        if len(set(sizes)) > 1:
            raise ValueError(f"the {len(sizes)} calls have the sizes {sizes}, which make no one tensor; take `calls`")
        return torch.cat(self.calls)


def attention_layers(net: nn.Module) -> dict[str, Kind]:
    """The layers of a network that `record_attention` records: their kinds by their names, in the order they stand."""
    return {name: source.kind for name, _, source in _sources(net)}


@contextmanager
def record_attention(net: nn.Module) -> Iterator[dict[str, LayerAttention]]:
    """Record what every attention layer of a network gives, for as long as the context lasts.

    Forward hooks read the layers' logits; they are removed at the end, also after an exception, and nothing else of
    the network is touched. Whatever was compiled by torch.compile runs uncompiled within the context, as compiled code
    does not call hooks. A forward pass that activation checkpointing repeats for the backward pass is not recorded
    again.

    Args:
        net: any module with layers of `resnest_det.layers` in it: a classifier, a detector, a segmentation model.

    Yields:
        For each attention layer by its name in `net`, in the order they stand, what it gave. A CBAM is two layers,
        `gate.channel` and `gate.spatial`. What is recorded stays readable after the context.

    Raises:
        ValueError: there is no such layer in `net`.

    Example:
        >>> net = create_backbone("resnest50").eval()
        >>> with record_attention(net) as record, torch.no_grad():
        ...     net(torch.rand(2, 3, 224, 224))
        >>> record["layer1.0.conv2"].weights.shape
        torch.Size([2, 2, 64])
    """
    sources = list(_sources(net))
    if not sources:
        raise ValueError(
            f"{type(net).__name__} has no attention to record; recorded are "
            f"{', '.join(layer.__name__ for layer in _LAYERS)}, as in resnest*, sk_*, se_*, eca_* and cbam_*"
        )
    record = {name: LayerAttention(source.kind) for name, _, source in sources}
    with ExitStack() as hooks:
        hooks.enter_context(_uncompiled())
        for name, layer, source in sources:
            _record_layer(layer, source, record[name].calls, hooks)
        yield record


class _Source(NamedTuple):
    """Where a layer's weights come from."""

    kind: Kind
    module: nn.Module  # whose outputs, within one forward pass of the layer, are the logits
    weights: Callable[[list[Tensor]], Tensor]  # of these outputs


def _sources(net: nn.Module) -> Iterator[tuple[str, nn.Module, _Source]]:
    for name, layer in net.named_modules():
        if isinstance(layer, SplitAttentionConv2d):
            yield name, layer, _Source("split", layer.fc2, partial(_split_shares, layer.groups, layer.radix))
        elif isinstance(layer, SelectiveKernelConv2d):
            # One group: a kernel's branches are the outer axis of fc2's output, as splits are.
            yield name, layer, _Source("branch", layer.fc2, partial(_split_shares, 1, len(layer.branches)))
        elif isinstance(layer, SqueezeExcitation):
            gate = F.hardsigmoid if layer.gate == "hard_sigmoid" else torch.sigmoid
            yield name, layer, _Source("channel", layer.fc2, partial(_channel_weights, gate))
        elif isinstance(layer, EfficientChannelAttention):
            yield name, layer, _Source("channel", layer.conv, partial(_channel_weights, torch.sigmoid))
        elif isinstance(layer, ChannelAttention):  # whose fc2 runs twice, on the mean and on the maximum
            yield name, layer, _Source("channel", layer.fc2, partial(_channel_weights, torch.sigmoid))
        elif isinstance(layer, SpatialAttention):
            yield name, layer, _Source("spatial", layer.bn, _spatial_weights)


def _split_shares(groups: int, radix: int, outputs: list[Tensor]) -> Tensor:
    """(N, groups * radix * channels / groups, 1, 1), in this order of axes, to shares (N, radix, channels)."""
    logits = outputs[0].flatten(1).unflatten(1, (groups, radix, -1)).transpose(1, 2).flatten(2)
    return logits.sigmoid() if radix == 1 else logits.softmax(dim=1)


def _channel_weights(gate: Callable[[Tensor], Tensor], outputs: list[Tensor]) -> Tensor:
    """Logits (N, channels, 1, 1) or (N, 1, channels), to be added where there are several, to (N, channels)."""
    return gate(torch.stack(outputs).sum(0)).flatten(1)


def _spatial_weights(outputs: list[Tensor]) -> Tensor:
    """Logits (N, 1, H, W) to (N, H, W)."""
    return outputs[0].sigmoid().squeeze(1)


def _record_layer(layer: nn.Module, source: _Source, calls: list[Tensor], hooks: ExitStack) -> None:
    """Append to `calls` whenever the layer runs, until `hooks` is closed."""
    outputs: list[Tensor] = []

    def begin(*_: Any) -> None:
        outputs.clear()  # of a forward pass that an exception ended

    def collect(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs.append(output.detach().float())

    def end(*_: Any) -> None:
        # Within a backward pass, activation checkpointing repeats a forward pass that was recorded.
        if torch._C._current_graph_task_id() == -1:
            calls.append(source.weights(outputs).cpu())
        outputs.clear()

    for handle in (
        layer.register_forward_pre_hook(begin),
        source.module.register_forward_hook(collect),
        layer.register_forward_hook(end),
    ):
        hooks.callback(handle.remove)


def _uncompiled() -> AbstractContextManager[Any]:
    """Within it, what torch.compile has compiled runs as it was written, and so calls its hooks."""
    # The compiler takes seconds to import, and without it nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def class_score(index: int) -> Score:
    """The score of a classifier's class: its logit, before any softmax.

    Args:
        index: of the network's outputs, from 0.
    """

    def score(output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise ValueError(f"class_score is of logits (1, classes), and the model returned {_described(output)}")
        _check_index("class", index, output.shape[1], "classes")
        return output[0, index]

    return score


def detection_score(index: int = 0) -> Score:
    """The score of one of a detector's detections, in [0, 1].

    Args:
        index: of the detections of the image, 0 for the best.
    """

    def score(output: Any) -> Tensor:
        if not (isinstance(output, list) and output and isinstance(output[0], Mapping) and "scores" in output[0]):
            raise ValueError(f"detection_score is of a list of detections, and the model returned {_described(output)}")
        scores: Tensor = output[0]["scores"]
        _check_index("detection", index, len(scores), "detections")
        return scores[index]

    return score


def segment_score(label: int, region: Tensor | None = None) -> Score:
    """The score of a class in a segmentation: the sum of its logits over a region.

    Args:
        label: of the model's classes, from 0.
        region: (H, W) booleans, where the image has the segment asked for; None: wherever the class is the likeliest.
    """

    def score(output: Any) -> Tensor:
        if not isinstance(output, Mapping) or "out" not in output:
            raise ValueError(
                f"segment_score is of a dict with logits 'out', and the model returned {_described(output)}"
            )
        logits: Tensor = output["out"][0]  # (classes, H, W)
        _check_index("label", label, len(logits), "classes")
        labels = logits.argmax(dim=0)
        inside = labels == label if region is None else region.to(logits.device, torch.bool)
        if inside.shape != labels.shape:
            raise ValueError(f"region has shape {tuple(inside.shape)}, expected the image's {tuple(labels.shape)}")
        if not inside.any():
            found = ", ".join(map(str, labels.unique().tolist()))
            raise ValueError(
                f"label {label} is nowhere the likeliest, only {found}; ask for one of these, or give a region"
                if region is None
                else "region is False everywhere; give at least one pixel"
            )
        return logits[label][inside].sum()

    return score


def grad_cam(
    model: nn.Module, image: Tensor, score: Score, *, layer: str | None = None, pooled: bool | None = None
) -> Tensor:
    """Where in an image the evidence for a score is: Grad-CAM.

    The features of a layer are added up, each channel weighed by the gradient of the score, and what is negative
    becomes 0. The sum is resized bilinearly to the image and divided by its maximum.

    As published, a channel's weight is its mean gradient over all positions (`pooled`). That fits the class of a whole
    image. The gradient of a detection or a segment is around one object, and its mean tells neither where that is, nor
    it from another object: there, the gradient of each position weighs its own features.

    Args:
        model: in evaluation mode; its parameters need no gradients, and get none.
        image: (3, H, W), as the model takes it: a classifier normalised, a detector or segmentation model in [0, 1].
        score: `class_score`, `detection_score` or `segment_score`; or a function of your own from what
            `model(image[None])` returns to a number.
        layer: a module's name, such as "layer3"; its output is (1, C, h, w), a map of all that the model sees. None is
            what the model's head stands on: layer4; or, where the head takes the features of several stages, as with
            a feature pyramid, all of these, whose maps are added.
        pooled: whether gradients are averaged over positions; None: where the model returns a tensor of logits, as
            classifiers do.

    Returns:
        (H, W), float32 in [0, 1], on the image's device. Where nothing speaks for the score it is 0 everywhere.

    Raises:
        ValueError: the model is in training mode, the image has another shape, the layer does not exist, gives no
            feature maps or runs several times, or the score does not depend on it.
    """
    if model.training:
        raise ValueError("the model is in training mode, where an image's score depends on chance; call model.eval()")
    if image.ndim != 3 or not image.is_floating_point():
        raise ValueError(f"image is {_described(image)}, expected one image (3, H, W) of floating point")
    names = _default_layers(model) if layer is None else [layer]
    features: dict[str, list[Tensor]] = {name: [] for name in names}
    resized: list[tuple[tuple[int, int], tuple[int, int]]] = []  # by a detector: its input, and the image within that

    def keep(name: str, _module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise ValueError(f"layer {name!r} gives {_described(output)}, expected feature maps (1, C, h, w)")
        # Cut off from what is before: of several stages, each has the gradient that comes from the head itself.
        features[name].append(output.detach().requires_grad_())
        return features[name][-1].clone()  # what follows may change it in place

    def note_size(_module: nn.Module, _inputs: Any, output: Any) -> None:
        height, width = output[0].tensors.shape[-2:]
        resized.append(((height, width), output[0].image_sizes[0]))

    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), _uncompiled(), _RootsWithGradients()):
            stack.enter_context(context)
        for name in names:
            stack.callback(find_layer(model, name).register_forward_hook(partial(keep, name)).remove)
        transform = getattr(model, "transform", None)
        if isinstance(transform, GeneralizedRCNNTransform):
            stack.callback(transform.register_forward_hook(note_size).remove)
        # Autograd refuses what torch.inference_mode() made, but not its copy.
        output = model((image.clone() if image.is_inference() else image)[None])
        value = score(output)
        leaves = [_only(name, outputs) for name, outputs in features.items()]
        gradients = (
            torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(names)
        )

    seen, (height, width) = resized[0] if resized else (image.shape[-2:], image.shape[-2:])
    sums = []
    for maps, weights in zip(leaves, gradients, strict=True):
        if weights is None or not weights.any():
            continue
        weights = weights.float()
        if isinstance(output, Tensor) if pooled is None else pooled:
            weights = weights.mean((2, 3), keepdim=True)
        stage = (weights * maps.detach().float()).sum(1, keepdim=True).relu()  # (1, 1, h, w)
        sums.append(F.interpolate(stage, seen, mode="bilinear", align_corners=False))
    if not sums:
        raise ValueError(
            f"the score {value.item():.6g} has no gradient at {', '.join(names)}: the layer has no part in it, or it "
            f"is saturated, a probability so close to 0 or 1 that nothing changes it; choose another layer or score"
        )
    heat = torch.stack(sums).sum(0)[..., :height, :width]
    heat = F.interpolate(heat, image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    return heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)


class _RootsWithGradients(TorchFunctionMode):
    """Within it, a square root of 0 passes no gradient on, where torch has 0 / 0 for what nothing depends on.

    FCOS takes the root of all scores, of which those of the background are 0.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.sqrt and not kwargs:
            positive = args[0] > 0
            return args[0].where(positive, 1).sqrt().where(positive, 0)
        return function(*args, **(kwargs or {}))


def _default_layers(model: nn.Module) -> list[str]:
    """The names of the stages whose features a head takes; of a model that has no extractor of stages, of layer4."""
    for name, module in model.named_modules():
        if isinstance(module, IntermediateLayerGetter):
            return [f"{name}.{stage}" if name else stage for stage in module.return_layers]
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "layer4"]
    if len(found) != 1:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"{type(model).__name__} has {len(found)} modules named layer4, so that layer must be given; it has the "
            f"children {children}"
        )
    return found


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of a model by its name.

    Raises:
        ValueError: there is none; the message says which name is nearest.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        nearest = difflib.get_close_matches(name, modules, n=1, cutoff=0)[0]
        raise ValueError(f"{type(model).__name__} has no layer {name!r}; did you mean {nearest!r}?")
    return modules[name]


def _only(name: str, maps: list[Tensor]) -> Tensor:
    if len(maps) != 1:
        raise ValueError(f"layer {name!r} ran {len(maps)} times for one image; choose one that runs once")
    return maps[0]


def _check_index(what: str, index: int, number: int, things: str) -> None:
    if not 0 <= index < number:
        raise ValueError(f"{what} {index} is not among the model's {number} {things}, which count from 0")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, value))}"
    if value == []:
        return "an empty list"
    return f"a {type(value).__name__}"
