"""How fast our networks are beside other implementations of them: `python -m tests.benchmarks.speed`.

Every section times what it compares in one process, interleaved, so that a slow spell of the machine meets all of it:
medians with (lowest-highest). A peer has our weights, and each side runs in NCHW and in channels_last and is taken in
the better one. A section whose packages are missing says so and is left out; `--only` chooses among them. Prints the
tables in Markdown, the last of which holds what is reached against what is wanted.

A difference is the largest of the outputs', relative to the largest value of timm's; in training, of the gradients'.
Memory for the backward pass is what is held between the forward and the backward pass, parameters apart: what autograd
saves, by its hooks, each storage once; and what torch's allocator has given out and not got back, which also counts
what a function of our own keeps out of the sight of these hooks. The second decides.

Weights are random, with norms as of a trained network: a detector finds nothing above its threshold, so that the time
of its post-processing is that of the proposals.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import statistics
import sys
import tempfile
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet50 as torchvision_resnet50
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from resnest_det import create_backbone
from resnest_det.deploy.benchmark import MEMORY_FORMATS, compile_frozen, interleaved, spread
from resnest_det.deploy.onnx_model import OnnxModel
from resnest_det.deploy.profiling import allocated_memory, count_operations
from resnest_det.deploy.roofline import least_seconds, measure_machine
from resnest_det.layers import use_triton
from resnest_det.models import RowRoIAlign, deeplabv3plus, faster_rcnn
from resnest_det.visualize.benchmark import draw_times
from tests.benchmarks.activation_checkpointing import SavedBytes
from tests.markdown_tables import table
from tests.random_norms import randomise_norms

OURS, TIMM, RELEASED, TORCHVISION = "resnest_det", "timm", "resnest (released)", "torchvision resnet50"
SMP = "segmentation-models-pytorch"
TIMM_NAMES = {"resnest14": "resnest14d", "resnest26": "resnest26d", "resnest50": "resnest50d"}
PACKAGES = ("torch", "torchvision", "timm", "resnest", "segmentation-models-pytorch", "onnxruntime")
NUM_CLASSES, NUM_DETECTED = 150, 91
MEBIBYTE = 2**20

Run = Callable[[], Any]


class MissingError(Exception):
    """What a section needs is not there."""


@dataclass(frozen=True)
class Options:
    """The command's.

    Attributes:
        backbone: one of ours that timm has.
        size: side of the image in inference.
        train_size: side of the images of a training step.
        rounds: measurements of each in inference.
        train_rounds: the same of training steps.
    """

    backbone: str
    size: int
    train_size: int
    rounds: int
    train_rounds: int


@dataclass
class Way:
    """One way of doing a section's work.

    Attributes:
        name: who, and in which form.
        layout: of the input and the weights; "" where that is not chosen.
        values: the seconds of each round; of memory, the bytes, once.
        difference: see the module; None where nothing is compared.
        cells: what a section's table has besides.
    """

    name: str
    layout: str
    values: list[float]
    difference: float | None = None
    cells: tuple[str, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def full_name(self) -> str:
        return f"{self.name}, {self.layout}" if self.layout else self.name


@dataclass(frozen=True)
class Goal:
    """A line of the last table.

    Attributes:
        work: what is done.
        ours: the names of our ways, of which the best counts.
        peers: the names of theirs.
        wanted: a ratio of times, theirs to ours, that is wanted at least; or of bytes, ours to theirs, at most.
    """

    work: str
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    wanted: float


@dataclass
class Section:
    """What a section measured.

    Attributes:
        title: with the sizes.
        ways: the rows of its table.
        goals: the lines that it gives to the last table.
        header: of the ways' `cells`.
        unit: "ms", or "MiB" of memory.
    """

    title: str
    ways: list[Way]
    goals: list[Goal] = field(default_factory=list)
    header: tuple[str, ...] = ()
    unit: str = "ms"


def need(package: str) -> Any:
    """A package that is not one of ours; MissingError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingError(f"{package} cannot be imported ({error})") from error


def our_net(options: Options, *, checkpoint: bool = False) -> nn.Module:
    """Our network, always of the same random weights."""
    torch.manual_seed(0)
    return randomise_norms(create_backbone(options.backbone, checkpoint=checkpoint)).eval()


def timm_net(options: Options) -> nn.Module:
    """timm's network with our weights."""
    net = need("timm").create_model(TIMM_NAMES[options.backbone])
    net.load_state_dict(our_net(options).state_dict())
    return net.eval()


def released_net(options: Options) -> nn.Module:
    """The network of the authors' package with our weights."""
    package = need("resnest.torch")
    if not hasattr(package, options.backbone):
        raise MissingError(f"the released package has no {options.backbone}")
    net = getattr(package, options.backbone)(pretrained=False)
    net.load_state_dict(our_net(options).state_dict())
    return net.eval()


def example(num_images: int, size: int, layout: str = "NCHW", device: str = "cpu") -> Tensor:
    """Images (N, 3, size, size) of colours that change slowly, normalised."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(num_images, 3, 8, 8, generator=generator)
    images = F.interpolate(coarse, size=(size, size), mode="bicubic") + 0.1 * torch.randn(
        num_images, 3, size, size, generator=generator
    )
    return images.to(device, memory_format=MEMORY_FORMATS[layout])


def in_layouts(name: str, net: nn.Module, images: Tensor) -> dict[tuple[str, str], Run]:
    """Forward passes of copies of a network in both layouts, by name and layout."""
    return {
        (name, layout): partial(deepcopy(net).to(memory_format=form), images.to(memory_format=form))
        for layout, form in MEMORY_FORMATS.items()
    }


def compiled_in_layouts(name: str, net: nn.Module, images: Tensor) -> dict[tuple[str, str], Run]:
    """The same, compiled and with frozen weights."""
    runs = {}
    for layout, form in MEMORY_FORMATS.items():
        own = images.to(memory_format=form)
        runs[name, layout] = partial(compile_frozen(deepcopy(net).to(memory_format=form), [own]), own)
    return runs


def optimized(name: str, net: nn.Module, images: Tensor, *, compiled: bool = False) -> dict[tuple[str, str], Run]:
    """The forward pass of a network after optimize_for_inference."""
    optimize = need("resnest_det.deploy.inference").optimize_for_inference
    net = optimize(net, compile=compiled)
    return {(name, "channels_last"): partial(net, images.to(memory_format=torch.channels_last))}


def optional(make: Callable[[], dict[tuple[str, str], Run]]) -> dict[tuple[str, str], Run]:
    """What `make` gives, or nothing where it needs what is missing: a row that no goal depends on."""
    try:
        return make()
    except MissingError as error:
        say(f"  left out: {error}")
        return {}


def largest_difference(found: Any, expected: Any) -> float:
    """The largest difference of two outputs, relative to the largest value expected."""
    pairs = list(zip(arrays_in(found), arrays_in(expected), strict=True))
    return float(max(abs(own - other).max() for own, other in pairs) / max(abs(other).max() for _, other in pairs))


def arrays_in(output: Any) -> list[np.ndarray]:
    """The arrays of a network's output, or of a file's."""
    if isinstance(output, Mapping):
        output = list(output.values())
    return [np.asarray(own) for own in (output if isinstance(output, list) else [output])]


@torch.inference_mode()
def timed_inference(
    runs: Mapping[tuple[str, str], Run], rounds: int, reference: str | None, *, alike: Iterable[str] = ()
) -> list[Way]:
    """Time forward passes.

    Args:
        runs: by name and layout.
        rounds: measurements of each.
        reference: the name of the way whose output the others are compared with; None to compare nothing.
        alike: beginnings of the names of those that compute the same.
    """
    expected = next((run() for (name, _), run in runs.items() if name == reference), None)
    differences = {
        key: largest_difference(run(), expected)
        for key, run in runs.items()
        if expected is not None and key[0].startswith(tuple(alike))
    }
    seconds = interleaved({"|".join(key): run for key, run in runs.items()}, rounds=rounds)
    return [Way(*key, seconds["|".join(key)], differences.get(key)) for key in runs]


def eager(options: Options) -> Section:
    """The forward pass as the networks come."""
    images = example(1, options.size)
    runs = in_layouts(OURS, our_net(options), images) | in_layouts(TIMM, timm_net(options), images)
    runs |= optional(lambda: in_layouts(RELEASED, released_net(options), images))
    runs |= in_layouts(TORCHVISION, torchvision_resnet50().eval(), images)
    ways = timed_inference(runs, options.rounds, TIMM, alike=(OURS, TIMM, RELEASED))
    title = f"{options.backbone} forward, eager, {options.size} x {options.size}, batch 1"
    return Section(title, ways, [Goal(title, (OURS,), (TIMM,), 1.3)])


def optimize(options: Options) -> Section:
    """The forward pass after optimize_for_inference, eager."""
    images = example(1, options.size)
    name = f"{OURS}, optimized"
    runs = optimized(name, our_net(options), images)
    runs |= in_layouts(OURS, our_net(options), images) | in_layouts(TIMM, timm_net(options), images)
    ways = timed_inference(runs, options.rounds, TIMM, alike=(OURS, TIMM))
    title = f"{options.backbone} after optimize_for_inference, eager"
    return Section(title, ways, [Goal(title, (name,), (TIMM,), 1.6)])


def compiled(options: Options) -> Section:
    """The forward pass compiled."""
    images = example(1, options.size)
    names = f"{OURS}, compiled", f"{OURS}, optimized and compiled"
    runs = compiled_in_layouts(names[0], our_net(options), images)
    runs |= optional(lambda: optimized(names[1], our_net(options), images, compiled=True))
    peer = f"{TIMM}, compiled"
    runs |= compiled_in_layouts(peer, timm_net(options), images) | in_layouts(TIMM, timm_net(options), images)
    ways = timed_inference(runs, options.rounds, TIMM, alike=(OURS, TIMM))
    title = f"{options.backbone} forward, compiled"
    goals = [Goal(f"{title}, beside timm compiled", names, (peer,), 1.2)]
    return Section(title, ways, [*goals, Goal(f"{title}, beside timm eager", names, (TIMM,), 2.2)])


def exported(nets: Mapping[str, nn.Module], images: Tensor, folder: Path) -> dict[str, Path]:
    """The files of networks, all written by our exporter."""
    export = need("resnest_det.deploy.export").export_onnx
    paths = {}
    for number, (name, net) in enumerate(nets.items()):
        paths[name] = folder / f"{number}.onnx"
        export(net, paths[name], images)
    return paths


def onnx(options: Options) -> Section:
    """The forward pass in ONNX Runtime."""
    need("onnxruntime")
    form = need("resnest_det.deploy.onnx_form").onnx_form
    images = example(1, options.size)
    ours = f"{OURS}, onnx_form"
    nets = {ours: form(our_net(options)), OURS: our_net(options), TIMM: timm_net(options)}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            (name, ""): partial(OnnxModel(path), images) for name, path in exported(nets, images, Path(folder)).items()
        }
        ways = timed_inference(runs, options.rounds, TIMM, alike=(OURS, TIMM))
    title = f"{options.backbone} forward, ONNX Runtime"
    return Section(title, ways, [Goal(title, (ours,), (TIMM,), 1.1)])


def int8(options: Options) -> Section:
    """The forward pass in ONNX Runtime, in 8 bits, calibrated with four images and compared on four others."""
    need("onnxruntime")
    onnx_form = need("resnest_det.deploy.onnx_form").onnx_form
    integer_form = need("resnest_det.deploy.integer_form").integer_form
    quantize = need("resnest_det.deploy.quantization").quantize_onnx
    images = example(8, options.size)
    calibration, unseen = [[own[None] for own in part] for part in images.split(4)]
    floats, integers = f"{OURS}, onnx_form", f"{OURS}, integer_form, INT8"
    nets = {floats: onnx_form(our_net(options)), integers: integer_form(our_net(options))}
    with tempfile.TemporaryDirectory() as folder:
        paths = exported(nets, images[:1], Path(folder))
        quantize(paths[integers], Path(folder) / "int8.onnx", [own.numpy() for own in calibration])
        paths[integers] = Path(folder) / "int8.onnx"
        models = {name: OnnxModel(path) for name, path in paths.items()}
        whole, rounded = (torch.cat([models[name](own)["logits"] for own in unseen]) for name in nets)
        runs = {(name, ""): partial(model, images[:1]) for name, model in models.items()}
        ways = timed_inference(runs, options.rounds, floats, alike=(OURS,))
    cosine = F.cosine_similarity(whole, rounded).min().item()
    for way, value in zip(ways, ("", f"{cosine:.5f}"), strict=True):
        way.cells = (value,)
    title = f"{options.backbone} forward, ONNX Runtime, INT8"
    return Section(title, ways, [Goal(title, (integers,), (floats,), 1.5)], header=("lowest cosine similarity",))


def loss_of(net: nn.Module, images: Tensor) -> Tensor:
    """Cross-entropy of the logits, towards a class an image."""
    logits = net(images).float()
    return F.cross_entropy(logits, torch.arange(len(images), device=images.device))


def step(net: nn.Module, images: Tensor) -> None:
    net.zero_grad(set_to_none=True)
    loss_of(net, images).backward()


def gradients(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The gradients of a step, which leaves the network as it was."""
    copy = deepcopy(net)
    step(copy, images)
    return {name: parameter.grad for name, parameter in copy.named_parameters()}


def training(options: Options) -> Section:
    """A training step: forward pass, loss and backward pass."""
    images = example(2, options.train_size)
    trained = {OURS: our_net(options), TIMM: timm_net(options)}
    try:
        trained[RELEASED] = released_net(options)
    except MissingError as error:
        say(f"  left out: {error}")
    nets = {
        (name, layout): deepcopy(net).train().to(memory_format=form)
        for name, net in trained.items()
        for layout, form in MEMORY_FORMATS.items()
    }
    nets[TORCHVISION, "channels_last"] = torchvision_resnet50().train().to(memory_format=torch.channels_last)
    # Of two images, BatchNorm on pooled features is a sign, and what is rounded before it makes all the difference.
    compared = example(8, options.train_size // 2)
    expected = gradients(nets[TIMM, "NCHW"], compared)
    differences = {
        key: largest_difference(gradients(net, compared.to(memory_format=MEMORY_FORMATS[key[1]])), expected)
        for key, net in nets.items()
        if key[0] != TORCHVISION
    }
    steps = {
        "|".join(key): partial(step, net, images.to(memory_format=MEMORY_FORMATS[key[1]])) for key, net in nets.items()
    }
    seconds = interleaved(steps, rounds=options.train_rounds)
    ways = [Way(*key, seconds["|".join(key)], differences.get(key)) for key in nets]
    title = f"{options.backbone} training step, batch 2, {options.train_size} x {options.train_size}"
    return Section(title, ways, [Goal(title, (OURS,), (TIMM,), 1.25)])


def memory(options: Options) -> Section:
    """What is held for the backward pass."""
    names = OURS, f"{OURS}, checkpoint=True", TIMM, f"{TIMM}, set_grad_checkpointing()"
    nets = {names[0]: our_net(options), names[1]: our_net(options, checkpoint=True), names[2]: timm_net(options)}
    nets[names[3]] = timm_net(options)
    nets[names[3]].set_grad_checkpointing()
    ways = []
    for name, net in nets.items():
        for layout, form in MEMORY_FORMATS.items():
            own = deepcopy(net).train().to(memory_format=form)
            images = example(2, options.train_size, layout)
            step(own, images)
            own.zero_grad(set_to_none=True)
            saved = SavedBytes(own)
            with saved:
                loss = loss_of(own, images)
            by_hooks = saved.now
            del loss
            held = allocated_memory(partial(loss_of, own, images)).held
            peak = allocated_memory(partial(step, own, images)).peak
            cells = f"{by_hooks / MEBIBYTE:.0f}", f"{peak / MEBIBYTE:.0f}"
            ways.append(Way(name, layout, [float(held)], cells=cells))
    title = f"{options.backbone} memory for backward, batch 2, {options.train_size} x {options.train_size}"
    goals = [Goal(title, names[:1], names[2:3], 0.85), Goal(f"{title}, checkpointed", names[1:2], names[2:3], 0.4)]
    header = "saved by autograd, MiB", "peak of a step, MiB"
    return Section(title, ways, goals, header=header, unit="MiB")


class TimmPyramid(nn.Module):
    """torchvision's feature pyramid on timm's features, as torchvision's FasterRCNN takes it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = need("timm").create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
        channels = self.body.feature_info.channels()
        self.out_channels = 256
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(level), feature) for level, feature in enumerate(self.body(images))))


def detector(options: Options) -> Section:
    """Faster R-CNN in inference."""
    size = options.size
    torch.manual_seed(0)
    ours = faster_rcnn(our_net(options), NUM_DETECTED, min_size=size, max_size=size).eval()
    theirs = FasterRCNN(TimmPyramid(TIMM_NAMES[options.backbone]), NUM_DETECTED, min_size=size, max_size=size).eval()
    theirs.load_state_dict(ours.state_dict())
    images = example(1, size)
    picture = [images[0].sigmoid()]
    peer = f"{TIMM} features in torchvision's FPN"
    models = {
        (name, layout): deepcopy(model).to(memory_format=form)
        for name, model in ((OURS, ours), (peer, theirs))
        for layout, form in MEMORY_FORMATS.items()
    }
    name = f"{OURS}, optimized"
    try:
        models[name, "channels_last"] = need("resnest_det.deploy.inference").optimize_for_inference(ours)
    except MissingError as error:
        say(f"  left out: {error}")
    ways = timed_inference({key: partial(model, picture) for key, model in models.items()}, options.rounds, None)
    with torch.inference_mode():
        expected = models[peer, "NCHW"].backbone(images)
        for way, model in zip(ways, models.values(), strict=True):
            own = model.backbone(images.to(memory_format=MEMORY_FORMATS[way.layout]))
            way.difference = largest_difference(own, expected)
    title = f"Faster R-CNN on {options.backbone}, {size} x {size}"
    goals = [Goal(title, (OURS,), (peer,), 1.3), Goal(f"{title}, after optimize_for_inference", (name,), (peer,), 1.3)]
    return Section(title, ways, goals)


def regions(options: Options) -> Section:
    """RoIAlign, alone and with its gradients: no aim, but what detectors on the CPU spent most time in."""
    torch.manual_seed(0)
    size = options.size
    corners = torch.rand(1000, 2) * size * 0.8
    boxes = [torch.cat([corners, corners + 10 + torch.rand(1000, 2) * size * 0.4], 1).clamp(max=size)]
    names = ["0", "1", "2", "3"]
    pools = {OURS: RowRoIAlign(names, 7, 2), "torchvision": MultiScaleRoIAlign(names, 7, 2)}
    levels = [torch.randn(1, 256, size >> shift, size >> shift) for shift in (2, 3, 4, 5)]

    @torch.inference_mode(False)
    def gradients(pool: MultiScaleRoIAlign, form: torch.memory_format) -> Tensor:
        features = [level.contiguous(memory_format=form).requires_grad_() for level in levels]
        loss = pool(dict(zip(names, features, strict=True)), boxes, [(size, size)]).square().mean()
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, features)])

    forward, backward = {}, {}
    for name, pool in pools.items():
        for layout, form in MEMORY_FORMATS.items():
            features = {name: level.contiguous(memory_format=form) for name, level in zip(names, levels, strict=True)}
            forward[name, layout] = partial(pool, features, boxes, [(size, size)])
            backward[f"{name}, with gradients", layout] = partial(gradients, pool, form)
    ways = timed_inference(forward, options.rounds, "torchvision", alike=pools)
    ways += timed_inference(
        backward, options.train_rounds, "torchvision, with gradients", alike=[f"{name}, with" for name in pools]
    )
    return Section(f"RoIAlign of 1000 regions, a pyramid of {size} x {size}", ways)


def segmenter(options: Options) -> Section:
    """DeepLabV3+ in inference; the heads differ, as tests/benchmarks/deeplabv3plus.py says, so no outputs are equal."""
    smp = need("segmentation_models_pytorch")
    torch.manual_seed(0)
    net = randomise_norms(create_backbone(options.backbone, output_stride=16))
    ours = deeplabv3plus(net, NUM_CLASSES).eval()
    theirs = smp.DeepLabV3Plus(
        f"tu-{TIMM_NAMES[options.backbone]}", encoder_weights=None, encoder_output_stride=16, classes=NUM_CLASSES
    ).eval()
    images = example(1, options.size).sigmoid()
    name = f"{OURS}, optimized"
    runs = in_layouts(OURS, ours, images) | in_layouts(SMP, theirs, images)
    runs |= optional(lambda: optimized(name, ours, images))
    ways = timed_inference(runs, options.rounds, None)
    title = f"DeepLabV3+ on {options.backbone}, {options.size} x {options.size}"
    goals = [Goal(title, (OURS,), (SMP,), 1.3), Goal(f"{title}, after optimize_for_inference", (name,), (SMP,), 1.3)]
    return Section(title, ways, goals)


def gpu(options: Options) -> Section:
    """A training step on a GPU: bf16 autocast, 32 images of 512 x 512."""
    if not torch.cuda.is_available():
        raise MissingError("there is no CUDA device")
    nets = {OURS: our_net(options), f"{OURS}, Triton": our_net(options), TIMM: timm_net(options)}
    use_triton(nets[f"{OURS}, Triton"])
    runs = {}
    for name, net in nets.items():
        for layout, form in MEMORY_FORMATS.items():
            images = example(32, 512, layout, "cuda")
            own = deepcopy(net).train().to("cuda", memory_format=form)
            runs[name, layout] = partial(autocast_step, own, images)
            if "Triton" not in name:
                runs[f"{name}, compiled", layout] = partial(autocast_step, torch.compile(deepcopy(own)), images)
    seconds = interleaved({"|".join(key): run for key, run in runs.items()}, rounds=options.rounds, device="cuda")
    ways = [Way(*key, seconds["|".join(key)]) for key in runs]
    title = f"{options.backbone} training step, {torch.cuda.get_device_name()}, bf16 autocast, batch 32, 512 x 512"
    ours = OURS, f"{OURS}, Triton", f"{OURS}, compiled"
    goals = [Goal(f"{title}, beside timm eager", ours, (TIMM,), 1.5)]
    goals.append(Goal(f"{title}, beside timm compiled", ours, (f"{TIMM}, compiled",), 1.15))
    return Section(title, ways, goals)


def autocast_step(net: nn.Module, images: Tensor) -> None:
    net.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss = loss_of(net, images)
    loss.backward()


SECTIONS: dict[str, Callable[[Options], Section]] = {
    "eager": eager,
    "optimized": optimize,
    "compiled": compiled,
    "onnx": onnx,
    "int8": int8,
    "training": training,
    "memory": memory,
    "detector": detector,
    "regions": regions,
    "segmenter": segmenter,
    "gpu": gpu,
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def best(section: Section, names: Sequence[str]) -> Way:
    return min((way for way in section.ways if way.name in names), key=lambda way: way.median)


def milliseconds(way: Way) -> str:
    """Median (lowest-highest), with a digit after the point where it is short."""
    return spread(way.values, digits=0 if way.median >= 0.1 else 1)


def section_table(section: Section) -> str:
    """What a section measured, in Markdown."""
    in_time = section.unit == "ms"
    held = "time, ms" if in_time else "held after the forward pass, MiB"
    rows = [
        [
            way.name,
            way.layout,
            milliseconds(way) if in_time else f"{way.median / MEBIBYTE:.0f}",
            *way.cells,
            *(["" if way.difference is None else f"{way.difference:.1e}"] if in_time else []),
        ]
        for way in section.ways
    ]
    header = ["way", "layout", held, *section.header, *(["largest difference"] if in_time else [])]
    return f"### {section.title}\n\n{table(header, 'll' + 'r' * (len(header) - 2), rows)}\n"


def goal_rows(section: Section) -> list[list[str]]:
    """The lines that a section gives to the last table."""
    rows = []
    measured = {way.name for way in section.ways}
    for goal in (goal for goal in section.goals if measured & {*goal.ours}):
        ours, peer = best(section, goal.ours), best(section, goal.peers)
        if section.unit == "ms":
            ratio, wanted = peer.median / ours.median, f"at least {goal.wanted:g}"
            values = [milliseconds(way) for way in (ours, peer)]
        else:
            ratio, wanted = ours.median / peer.median, f"at most {goal.wanted:g}"
            values = [f"{way.median / MEBIBYTE:.0f} MiB" for way in (ours, peer)]
        difference = "" if ours.difference is None else f"{ours.difference:.1e}"
        cells = [goal.work, f"{ours.full_name}: {values[0]}", f"{peer.full_name}: {values[1]}"]
        rows.append([*cells, f"**{ratio:.2f}**", wanted, difference])
    return rows


def describe_roofline(options: Options) -> str:
    """The machine's rates, and the time that they bound the network's forward pass by."""
    machine = measure_machine()
    net, images = our_net(options), example(1, options.size)
    with torch.inference_mode():
        operations = count_operations(partial(net, images))
    gigamacs = sum(operation.macs for operation in operations) / 1e9
    return (
        f"Roofline: matrix product {machine.matmul / 1e9:.0f} GFLOP/s, best convolution "
        f"{machine.convolution / 1e9:.0f} GFLOP/s, copy {machine.copy / 1e9:.0f} GB/s read and written; "
        f"{options.backbone}'s {gigamacs:.1f} GMACs take {1e3 * least_seconds(operations, machine):.0f} ms at least.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument(
        "--skip", nargs="+", choices=SECTIONS, default=[], metavar="SECTION", help="sections to leave out"
    )
    parser.add_argument("--backbone", choices=TIMM_NAMES, default="resnest50")
    parser.add_argument("--size", type=int, default=512, help="side of the image in inference (%(default)s)")
    parser.add_argument("--train-size", type=int, default=320, help="side of the images in training (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each in inference (%(default)s)")
    parser.add_argument("--train-rounds", type=int, default=7, help="measurements of each in training (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the times")
    arguments = parser.parse_args()
    options = Options(
        arguments.backbone, arguments.size, arguments.train_size, arguments.rounds, arguments.train_rounds
    )
    installed = {own.name.replace("_", "-"): own.version for own in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    print(f"{torch.get_num_threads()} threads, {versions}; medians (lowest-highest)\n")
    print(describe_roofline(options), flush=True)
    sections: list[Section] = []
    failed: list[str] = []
    for name in (name for name in arguments.only if name not in arguments.skip):
        say(f"{name} ...")
        try:
            sections.append(SECTIONS[name](options))
        except MissingError as error:
            print(f"{name}: skipped, {error}\n", flush=True)
        except Exception:  # hours of other sections shall not be lost with it
            failed.append(name)
            print(f"{name}: failed\n", flush=True)
            traceback.print_exc()
        else:
            print(section_table(sections[-1]), flush=True)
        gc.collect()
        torch.compiler.reset()
    header = ["work", "ours", "peer", "ratio", "wanted", "largest difference"]
    print(table(header, "lllrrr", [row for section in sections for row in goal_rows(section)]))
    panels = {
        f"{section.title}, ms": {way.full_name: 1e3 * np.array(way.values) for way in section.ways}
        for section in sections
        if section.unit == "ms"
    }
    if arguments.plot and panels:
        Image.fromarray(draw_times(panels, highlighted=OURS)).save(arguments.plot)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
