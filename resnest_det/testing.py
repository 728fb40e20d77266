"""The conformance kit: whether a network keeps the contract of a backbone (docs/architecture.md, contract 3).

What is checked is structure, not quality. All of it runs on copies of the network, on the CPU, whose norms are set as
those of a trained network (see `_prepare`), so that a network fresh from its constructor and one with weights are
judged alike, and differences between two ways of computing the same mean something.
"""

from __future__ import annotations

import copy
import io
import pickle
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnest_det.backbones import STAGES, freeze_stages

CHILDREN = ("conv1", "bn1", "relu", "maxpool", *STAGES, "avgpool", "fc")

# The largest difference between two float32 computations of the same logits, as a part of the largest logit. Ten times
# what the networks of the table show at 64x64, of which the deepest has 269 layers; a mistake shows at 1e-2 and more.
FLOAT32_TOLERANCE = 5e-5

# A pass in half precision rounds parameters and features; rounding the parameters alone, in a float32 pass, shows how
# much of such errors the network passes on. Over the networks of the table the whole is at most 1.9 of that part.
HALF_PRECISION_FACTOR = 4


@dataclass(frozen=True)
class _Subject:
    """What the checks are given, none of which they change: they copy the network before they do anything to it."""

    net: nn.Module  # in eval mode
    images: Tensor  # (2, 3, H, W)
    logits: Tensor  # (2, classes), of the images in eval mode
    sizes: Sequence[tuple[int, int]]


_Check = Callable[[_Subject], Iterator[str]]  # yields a sentence for each fault: what was found; the rule


def check_backbone(
    net: nn.Module,
    *,
    sizes: Sequence[tuple[int, int]] = ((64, 64), (65, 97)),
    compile: bool = True,
    export: bool = True,
) -> None:
    """Check that a network is a backbone, in every respect that this package and torchvision's detectors rely on.

    - names: the children are conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool fc, in this order; each stage
      states integers `channels` and `stride`; `inplanes` is layer4's channels.
    - call order: a forward pass runs each child once, in that order, and the children run by hand, flattened before
      fc, give its logits.
    - shapes: at each size, a stage gives its stated channels and ceil(size / stride) rows and columns; the logits are
      (N, classes) and finite.
    - gradients: a training step on two images gives every trainable parameter, if any, a finite gradient that is not
      zero.
    - freezing: freeze_stages, for each number of stages, keeps the logits; what is frozen has no gradient and keeps
      its buffers in a training step; the rest has its gradients.
    - channels_last: the same logits, and features that are channels_last themselves.
    - single images: in eval mode, a batch gives the logits of its images one by one.
    - state dict: through a file and torch.load(weights_only=True) into a network of other values: equal to the bit.
    - half precision: bfloat16 and float16 logits are finite and near float32's; a training step under autocast to
      bfloat16 has finite gradients.
    - copies: copy.deepcopy and pickle give networks of the same logits, to the bit.
    - compile: torch.compile takes the network as one graph, of the same logits. In eval mode, by the backend
      "aot_eager": capture and functionalisation as for the real backends, without their code generation.
    - export: torch.export.export takes it with the batch left open, and with rows and columns in steps of the largest
      stride; the same logits at another batch and size.

    Same logits means: to FLOAT32_TOLERANCE of the largest. Near float32's means: the root mean square of the
    difference is at most HALF_PRECISION_FACTOR times what it is when only parameters and images are rounded.

    The network itself is left as it is, and so are torch's random numbers. The compile check empties torch.compile's
    caches (torch.compiler.reset), so what was compiled before compiles again at its next call.

    Args:
        net: a classifier of (N, 3, H, W) images, on any device; one of create_backbone, one with slots of your own, or
            any module of the same children.
        sizes: rows and columns of the images: the check of shapes takes all of them, the others the first.
        compile: whether to run the compile check, the longest for a small network.
        export: whether to run the export check, the longest for a deep one.

    Raises:
        AssertionError: the network fails; the message lists every fault. What the checks raised themselves is the
            error's cause, with tracebacks.
        ValueError: a size is not two numbers of 1 or more, or there is none.
    """
    if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(f"sizes={sizes!r} must be one or more pairs (rows, columns) of 1 or more, such as (64, 64)")
    checks: dict[str, _Check] = {
        "names": _names,
        "call order": _call_order,
        "shapes": _shapes,
        "gradients": _gradients,
        "freezing": _freezing,
        "channels_last": _channels_last,
        "single images": _single_images,
        "state dict": _state_dict,
        "half precision": _half_precision,
        "copies": _copies,
    }
    if compile:
        checks["compile"] = _compile
    if export:
        checks["export"] = _export

    faults: list[str] = []
    errors: list[Exception] = []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            subject = _prepare(net, sizes)
        except Exception as error:
            size = "x".join(map(str, sizes[0]))
            raise AssertionError(
                f"{type(net).__name__} cannot be checked: a copy of it (copy.deepcopy) must classify {size} images in "
                f"eval mode, which raised {_described(error)}"
            ) from error
        for name, check in checks.items():
            torch.manual_seed(0)
            try:
                faults.extend(f"{name}: {fault}" for fault in check(subject))
            except Exception as error:
                faults.append(f"{name}: raised {_described(error)}")
                errors.append(error)
    if faults:
        lines = "".join(f"\n- {fault}" for fault in faults)
        cause = ExceptionGroup("raised by the checks", errors) if errors else None
        raise AssertionError(f"{type(net).__name__} is no conforming backbone:{lines}") from cause


def _prepare(net: nn.Module, sizes: Sequence[tuple[int, int]]) -> _Subject:
    """A copy in which nothing is zero by design and features stay of the order of 1, and its logits of two images.

    Layers that start at zero hide their branch, so they get small random values. Norms get statistics from the
    features that reach them: without, features double with every block, gates saturate and float16 overflows. The mean
    is drawn and small, because subtracting a large one, as it is on random images, magnifies rounding errors. The last
    norm of a block, in the order of its children, is small: hundreds of undamped blocks magnify them too.
    """
    torch.manual_seed(0)
    net = copy.deepcopy(net).cpu().float().eval()
    net.zero_grad()
    blocks = [block for name, stage in net.named_children() if name in STAGES for block in stage.children()]
    damped = {norms[-1] for block in blocks if (norms := [child for child in block.children() if _is_norm(child)])}

    def set_norm(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        if _has_statistics(norm):
            x = inputs[0]
            mean_square = x.square().mean([axis for axis in range(x.ndim) if axis != 1])
            norm.running_mean.copy_(0.1 * mean_square.sqrt() * torch.randn_like(mean_square))
            norm.running_var.copy_(mean_square * (0.5 + torch.rand_like(mean_square)))
        scale = 0.1 if norm in damped else 1.0
        if norm.weight is not None:
            norm.weight.copy_(scale * (0.5 + torch.rand_like(norm.weight)))
        if norm.bias is not None:
            norm.bias.copy_(scale * 0.1 * torch.randn_like(norm.bias))

    images = _images(2, *sizes[0])
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        hooks = [module.register_forward_pre_hook(set_norm) for module in net.modules() if _is_norm(module)]
        net(images)
        for hook in hooks:
            hook.remove()
        return _Subject(net, images, net(images), sizes)


def _names(subject: _Subject) -> Iterator[str]:
    children = dict(subject.net.named_children())
    if tuple(children) != CHILDREN:
        yield f"the children are {' '.join(children)}; they must be {' '.join(CHILDREN)}, in this order"
    for name in STAGES:
        for attribute in ("channels", "stride"):
            value = getattr(children.get(name), attribute, None)
            if not isinstance(value, int):
                yield f"{name}.{attribute} is {value!r}; a stage must state it as an integer"
    inplanes, channels = (
        getattr(subject.net, "inplanes", None),
        getattr(children.get("layer4"), "channels", None),
    )
    if inplanes is None or inplanes != channels:
        yield f"inplanes is {inplanes!r} and layer4.channels {channels!r}; they must be the same number"


def _call_order(subject: _Subject) -> Iterator[str]:
    net = copy.deepcopy(subject.net)
    called: list[str] = []
    for name, child in net.named_children():
        child.register_forward_pre_hook(lambda module, inputs, name=name: called.append(name))  # noqa: ARG005
    with torch.no_grad():
        net(subject.images)
        if called != [name for name, _ in net.named_children()]:
            yield f"a forward pass called {' '.join(called)}; it must call each child once, in the children's order"
        x = subject.images
        for name, child in net.named_children():
            x = child(x.flatten(1) if name == "fc" else x)
    if fault := _different(x, subject.logits):
        yield (
            f"the children run by hand give other logits: {fault}; forward must do nothing but run them and flatten "
            f"before fc, as IntermediateLayerGetter takes them one by one"
        )


def _shapes(subject: _Subject) -> Iterator[str]:
    for rows, columns in subject.sizes:
        logits, features = _run(subject.net, _images(2, rows, columns))
        for name, feature in features.items():
            stage: Any = subject.net.get_submodule(name)
            stated = (2, stage.channels, -(-rows // stage.stride), -(-columns // stage.stride))
            if feature.shape != stated:
                yield (
                    f"{name} gives {tuple(feature.shape)} for images of {rows}x{columns}; by its channels and stride "
                    f"it must be {stated}"
                )
        classes = getattr(subject.net.get_submodule("fc"), "out_features", subject.logits.shape[-1])
        if logits.shape != (2, classes):
            yield f"logits of {rows}x{columns} images are {tuple(logits.shape)}; they must be (2, {classes})"
        if not logits.isfinite().all():
            yield f"logits of {rows}x{columns} images have NaN or infinite values; they must be finite"


def _gradients(subject: _Subject) -> Iterator[str]:
    gradients = _gradients_of(copy.deepcopy(subject.net).train(), subject.images)
    yield from _not_finite(gradients)
    still = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    if still:
        # In eval mode no branch is dropped, and BatchNorm does not take out what is equal in all of a batch.
        gradients = _gradients_of(copy.deepcopy(subject.net), subject.images)
    for name in still:
        gradient = gradients[name]
        if gradient is None:
            yield f"{name} takes no part in the forward pass; every parameter must"
        elif not gradient.any():
            yield f"{name} has a gradient of zeros; it must have an effect on the logits"


def _freezing(subject: _Subject) -> Iterator[str]:
    parts = (("conv1", "bn1"), *((stage,) for stage in STAGES))
    reached: list[str] = []  # the parameters that have a gradient where nothing is frozen
    for trainable in (5, 4, 3, 2, 1, 0):
        net = copy.deepcopy(subject.net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # weights are random: here they are meant to be
            freeze_stages(net, trainable)
        case = f"with trainable_stages={trainable},"
        with torch.no_grad():
            if fault := _different(net(subject.images), subject.logits):
                yield f"{case} logits changed: {fault}; freezing must leave the function as it is"
        frozen = tuple(f"{name}." for part in parts[: 5 - trainable] for name in part)
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers() if name.startswith(frozen)}
        gradients = _gradients_of(net.train(), subject.images)
        if trainable == 5:
            reached = [name for name, gradient in gradients.items() if gradient is not None]
        for name, buffer in buffers.items():
            if not torch.equal(net.get_buffer(name), buffer):
                yield f"{case} the buffer {name} changed in a training step; what is frozen must not"
        for name in gradients:
            if name.startswith(frozen):
                yield f"{case} {name} still requires a gradient; what is frozen must not"
        for name in reached:
            if not name.startswith(frozen) and gradients.get(name) is None:
                yield f"{case} {name} has no gradient; what is not frozen must have one"


def _channels_last(subject: _Subject) -> Iterator[str]:
    net = copy.deepcopy(subject.net).to(memory_format=torch.channels_last)
    logits, features = _run(net, subject.images.to(memory_format=torch.channels_last))
    if fault := _different(logits, subject.logits):
        yield f"channels_last gives other logits: {fault}; the memory format must not matter"
    for name, feature in features.items():
        if not feature.is_contiguous(memory_format=torch.channels_last):
            yield f"{name} of channels_last images has strides {feature.stride()}; it must be channels_last as well"


def _single_images(subject: _Subject) -> Iterator[str]:
    with torch.no_grad():
        logits = torch.cat([subject.net(image) for image in subject.images.split(1)])
    if fault := _different(logits, subject.logits):
        yield f"images one by one give other logits than as a batch: {fault}; in eval mode they must not see each other"


def _state_dict(subject: _Subject) -> Iterator[str]:
    trained = copy.deepcopy(subject.net).train()
    with torch.no_grad():
        trained(subject.images)  # statistics move, and must be in the file
        trained.eval()
        file = io.BytesIO()
        torch.save(trained.state_dict(), file)
        file.seek(0)
        fresh = copy.deepcopy(subject.net)
        for value in fresh.state_dict().values():
            if value.is_floating_point():
                value.uniform_()
            else:
                value.zero_()
        fresh.load_state_dict(torch.load(file, weights_only=True))
        if not torch.equal(fresh(subject.images), trained(subject.images)):
            yield (
                "a network loaded from the file gives other logits than the one that was saved; whatever changes in "
                "training must be a parameter or a persistent buffer"
            )


def _half_precision(subject: _Subject) -> Iterator[str]:
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        net, images = copy.deepcopy(subject.net).to(dtype), subject.images.to(dtype)
        with torch.no_grad():
            logits = net(images)
            rounded = copy.deepcopy(net).float()(images.float())
        if not logits.isfinite().all():
            yield f"{name} logits have NaN or infinite values; they must be finite"
            continue
        error, bound = _distance(logits, subject.logits), HALF_PRECISION_FACTOR * _distance(rounded, subject.logits)
        if error > bound:
            yield f"{name} logits are off by {error:.2g} of float32's; by the network's roundings at most {bound:.2g}"

    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = _gradients_of(copy.deepcopy(subject.net).train(), subject.images)
    for fault in _not_finite(gradients):
        yield f"under autocast to bfloat16, {fault}"


def _copies(subject: _Subject) -> Iterator[str]:
    copies = {"copy.deepcopy": copy.deepcopy(subject.net), "pickle": pickle.loads(pickle.dumps(subject.net))}
    for name, net in copies.items():
        with torch.no_grad():
            if not torch.equal(net(subject.images), subject.logits):
                yield f"{name} gives a network of other logits; a copy must compute the same"


def _compile(subject: _Subject) -> Iterator[str]:
    # Its caches are those of the code, not of the network: after eight networks of one class it gives up.
    torch.compiler.reset()
    with torch.no_grad():
        logits = torch.compile(copy.deepcopy(subject.net), fullgraph=True, backend="aot_eager")(subject.images)
    torch.compiler.reset()
    if fault := _different(logits, subject.logits):
        yield f"the compiled network gives other logits: {fault}; it must give the same"


def _export(subject: _Subject) -> Iterator[str]:
    # Any number of rows would need one formula for both parities of a pooled shortcut (ResNet-D), which there is not.
    stages: list[Any] = [subject.net.get_submodule(name) for name in STAGES]
    step = max(stage.stride for stage in stages)
    batch = torch.export.Dim("batch")
    rows, columns = (step * torch.export.Dim(name, min=2) for name in ("rows", "columns"))
    with torch.no_grad():
        program = torch.export.export(
            copy.deepcopy(subject.net),
            (_images(2, 2 * step, 2 * step),),
            dynamic_shapes=({0: batch, 2: rows, 3: columns},),
        )
        images = _images(3, 2 * step, 3 * step)
        if fault := _different(program.module()(images), subject.net(images)):
            yield f"the exported network gives other logits: {fault}; it must give the same at every batch and size"


def _is_norm(module: nn.Module) -> bool:
    return _has_statistics(module) or isinstance(module, nn.GroupNorm)


def _has_statistics(module: nn.Module) -> bool:
    """Whether it is a norm of fixed statistics in eval mode: BatchNorm, FrozenBatchNorm2d and their likes."""
    return all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))


def _images(batch: int, rows: int, columns: int) -> Tensor:
    """Normalised images (batch, 3, rows, columns), the same at every call."""
    return torch.randn(batch, 3, rows, columns, generator=torch.Generator().manual_seed(0))


def _run(net: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A forward pass without gradients: the logits, and what each stage gave."""
    features: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: features.update({name: output})  # noqa: ARG005
        )
        for name in STAGES
    ]
    with torch.no_grad():
        logits = net(images)
    for hook in hooks:
        hook.remove()
    return logits, features


def _gradients_of(net: nn.Module, images: Tensor) -> dict[str, Tensor | None]:
    """The gradients of the trainable parameters, None where a parameter takes no part: of the logits' mean square."""
    loss = net(images).float().square().mean()
    if loss.requires_grad:
        loss.backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.requires_grad}


def _not_finite(gradients: dict[str, Tensor | None]) -> Iterator[str]:
    for name, gradient in gradients.items():
        if gradient is not None and not gradient.isfinite().all():
            yield f"{name} has a gradient with NaN or infinite values; it must be finite"


def _different(logits: Tensor, expected: Tensor) -> str:
    """How two results that must be the same differ, in words; "" where they do not."""
    if logits.shape != expected.shape:
        return f"their shape is {tuple(logits.shape)} and not {tuple(expected.shape)}"
    difference = (logits - expected).abs().max() / expected.abs().max()
    if difference <= FLOAT32_TOLERANCE:
        return ""
    return f"they differ by {difference:.2g} of the largest, which must be at most {FLOAT32_TOLERANCE:g}"


def _distance(logits: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, as a part of the expected logits' own."""
    return float((logits.float() - expected).norm() / expected.norm())


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 400, placeholder=' ...')}"
