"""`resnest-det benchmark`: models side by side: their time, memory and arithmetic, as tables and a picture."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from resnest_det import __version__
from resnest_det.deploy.benchmark import (
    MEMORY_FORMATS,
    Candidate,
    Images,
    Layout,
    Measurement,
    compile_frozen,
    example_images,
    many_compilations,
    measure,
    run_inference,
    spread,
    task_of,
)
from resnest_det.deploy.inference import optimize_for_inference
from resnest_det.deploy.named_models import build_named, is_named, is_ours
from resnest_det.deploy.onnx_model import OnnxModel
from resnest_det.deploy.profiling import ModuleTime, module_times
from resnest_det.deploy.roofline import Machine, measure_machine
from resnest_det.distributed import select_device
from resnest_det.predictor import Predictor
from resnest_det.reports.provenance import describe_environment
from resnest_det.visualize.benchmark import draw_times
from resnest_det.visualize.pictures import Picture

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers

_WEIGHT_SUFFIXES = (".pt", ".pth", ".safetensors")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "benchmark",
        help="time models side by side, with their memory and arithmetic",
        description="Time models side by side, in interleaved rounds: one image, a batch and, with --train, a training "
        "step; with their memory and arithmetic, and what the machine's own rates bound the time by.",
        epilog="MODEL is a network's name (resnest50); a detector or deeplabv3plus on one (faster_rcnn:resnest50); a "
        "run folder or its .pt; a file of ONNX Runtime's (model.onnx); or another package's: timm:resnest50d, "
        "torchvision:resnet50, released:resnest50, smp:tu-resnest50d. Weights are random but for a run's. See "
        "docs/speed.md.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="what is measured; times are held against the first's"
    )
    parser.add_argument("--size", type=int, default=224, metavar="N", help="side of the images (%(default)s)")
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="images of a batch and of a training step (%(default)s)"
    )
    parser.add_argument("--layout", choices=(*MEMORY_FORMATS, "both"), help="of weights and images (both)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="16-bit types by autocast (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="times that each is measured (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (as many as torch takes)")
    parser.add_argument("--train", action="store_true", help="training steps as well")
    parser.add_argument("--compile", action="store_true", help="each model also by torch.compile")
    parser.add_argument("--optimize", action="store_true", help="each of ours also by optimize_for_inference")
    parser.add_argument(
        "--layers", type=int, default=0, metavar="N", help="the N modules of each model that take longest themselves"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where benchmark.md, benchmark.json and benchmark.png go"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    output: Path | None = arguments.output
    if output and output.exists() and not output.is_dir():
        raise ValueError(f"the output {output} is a file; name a folder")
    for option, least in (("size", 1), ("batch", 1), ("rounds", 1), ("threads", 1), ("layers", 0)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise ValueError(f"--{option} is {value}, expected {least} or more")
    _check_effects(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or threads)
    try:
        with many_compilations():
            _measure(arguments)
    finally:
        torch.set_num_threads(threads)


def _check_effects(arguments: argparse.Namespace) -> None:
    """Refuse options that none of the models has a use for."""
    files = [name for name in arguments.models if _is_onnx(name)]
    if files and arguments.dtype != "float32":
        raise ValueError(
            f"--dtype is {arguments.dtype}, and {files[0]} computes in the types that it was written with; leave one "
            f"of them out"
        )
    of_torch = {name: getattr(arguments, name) for name in ("layout", "train", "compile", "optimize", "layers")}
    for option, value in of_torch.items():
        if value and len(files) == len(arguments.models):
            raise ValueError(f"--{option} is for models of torch, and {files[0]} is an ONNX file; leave it out")
    if arguments.optimize and not any(is_ours(name) and not _is_onnx(name) for name in arguments.models):
        raise ValueError(f"--optimize is for models of resnest_det, which {arguments.models[0]} is not; leave it out")


def _is_onnx(name: str) -> bool:
    return Path(name).suffix == ".onnx"


def _is_run(name: str) -> bool:
    """Whether a run or checkpoint is meant: never by a network's name, whatever folder is called so too."""
    path = Path(name)
    is_path = path.exists() or bool({"/", os.sep}.intersection(name)) or path.suffix in _WEIGHT_SUFFIXES
    return is_path and not is_named(name)


def _measure(arguments: argparse.Namespace) -> None:
    output: Path | None = arguments.output
    device, dtype = select_device(arguments.device), _DTYPES[arguments.dtype]
    if arguments.optimize and device.type == "cpu" and dtype != torch.float32:
        raise ValueError(
            f"--dtype is {arguments.dtype}, and on the CPU --optimize computes in float32 whatever autocast says; "
            f"leave one of them out"
        )
    candidates = [own for name in arguments.models for own in _candidates(name, arguments, device, dtype)]
    machine = measure_machine(device, dtype) if device.type != "mps" else None
    measurements = measure(
        candidates,
        size=arguments.size,
        batch_size=arguments.batch,
        rounds=arguments.rounds,
        train=arguments.train,
        device=device,
        dtype=dtype,
        machine=machine,
    )
    layers = _module_times(candidates, arguments, device, dtype) if arguments.layers else {}
    environment = describe_environment(device)
    parts = [_head(arguments, environment), _time_table(measurements, arguments), _size_table(measurements, machine)]
    parts += [_layer_table(name, times, arguments.layers) for name, times in layers.items()]
    text = "\n".join(parts)
    print(text, end="")
    if not output:
        return
    record = {
        **environment,
        "size": arguments.size,
        "dtype": arguments.dtype,
        "machine": machine and asdict(machine),
        "models": [asdict(own) for own in measurements],
        "modules": {name: [asdict(time) for time in times] for name, times in layers.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "benchmark.md").write_text(text, encoding="utf-8")
    (output / "benchmark.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    Image.fromarray(_draw(measurements)).save(output / "benchmark.png")
    print(f"written to {output}: benchmark.md, benchmark.json, benchmark.png", file=sys.stderr)


def _candidates(name: str, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    """A model in each of the forms and layouts asked for."""
    path = Path(name)
    if _is_onnx(name):
        runs = _onnx_model(path, device)
        for number in (1, arguments.batch):
            run_inference(runs, example_images("classification", number, arguments.size, "NCHW", device))
        return [Candidate(name, "NCHW", "classification", runs, None, None)]
    is_run = _is_run(name)
    model = Predictor.from_checkpoint(path, device="cpu").model if is_run else build_named(name, size=arguments.size)
    task = task_of(model)
    model.to(device)
    _check_runs(name, model, example_images(task, 1, arguments.size, "NCHW", device), dtype)

    def compiled(own: nn.Module, layout: Layout) -> nn.Module:
        batches = {1, arguments.batch}
        examples = [example_images(task, number, arguments.size, layout, device) for number in sorted(batches)]
        return compile_frozen(own, examples, dtype)

    found = []
    for layout in MEMORY_FORMATS if arguments.layout in (None, "both") else (arguments.layout,):
        eager = deepcopy(model).to(memory_format=MEMORY_FORMATS[layout])
        found.append(Candidate(name, layout, task, eager, eager, eager))
        if arguments.compile:
            trained: Any = torch.compile(deepcopy(eager)) if arguments.train else None
            forward = compiled(deepcopy(eager), layout)
            found.append(Candidate(f"{name}, compiled", layout, task, forward, eager, trained))
    if arguments.optimize and (is_run or is_ours(name)):
        # Its weights are channels_last whatever is asked for.
        optimized = optimize_for_inference(model)
        found.append(Candidate(f"{name}, optimized", "channels_last", task, optimized, model, None))
        if arguments.compile:
            forward = optimize_for_inference(model, compile=True)
            found.append(Candidate(f"{name}, optimized and compiled", "channels_last", task, forward, model, None))
    return found


def _check_runs(name: str, model: nn.Module, images: Images, dtype: torch.dtype) -> None:
    try:
        run_inference(model, images, dtype)
    except (RuntimeError, AssertionError, ValueError) as error:  # other packages refuse sizes in their own ways
        size = images[0].shape[-1]
        raise ValueError(f"{name} does not run on an image of {size} x {size}, give another --size: {error}") from error


def _onnx_model(path: Path, device: torch.device) -> OnnxModel:
    if device.type != "cpu":
        raise ValueError(f"{path} is run by ONNX Runtime on the CPU, and the device is {device}; add --device cpu")
    return OnnxModel(path)


def _module_times(
    candidates: Sequence[Candidate], arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, list[ModuleTime]]:
    """The modules of each candidate whose modules run one by one, those first that take longest themselves."""
    found = {}
    for own in candidates:
        net = own.inference
        if own.model is not None and isinstance(net, nn.Module) and not own.name.endswith("compiled"):
            images = example_images(own.task, 1, arguments.size, own.layout, device)
            times = module_times(net.eval(), partial(run_inference, net, images, dtype), device=device)
            found[f"{own.name}, {own.layout}"] = sorted(times, key=lambda time: -time.own_seconds)
    return found


def _head(arguments: argparse.Namespace, environment: Mapping[str, Any]) -> str:
    return (
        f"resnest-det {__version__}, torch {torch.__version__}, {environment['device']}, {arguments.dtype}, images of "
        f"{arguments.size} x {arguments.size}; medians of {arguments.rounds} interleaved rounds (lowest-highest)\n"
    )


def _time_table(measurements: Sequence[Measurement], arguments: argparse.Namespace) -> str:
    header = ["model", "layout", "one image, ms", "of the first", f"{arguments.batch} images, ms", "of the first"]
    header += ["images/s", *(["training step, ms", "of the first"] if arguments.train else [])]
    first, rows = measurements[0], []
    for own in measurements:
        row = [own.name, own.layout]
        for seconds, firsts in ((own.latency, first.latency), (own.batch, first.batch)):
            row += [spread(seconds, digits=1), _ratio(seconds, firsts)]
        row.append(f"{own.images_per_second:.1f}")
        if arguments.train:
            step = own.training_step
            row += [spread(step, digits=1) if step else "-", _ratio(step, first.training_step)]
        rows.append(row)
    return _table(header, rows)


def _size_table(measurements: Sequence[Measurement], machine: Machine | None) -> str:
    """Parameters, arithmetic and memory, and with the machine's rates the least time for one image."""
    trained = any(own.training_memory for own in measurements)
    header = ["model", "layout", "parameters, M", "GMACs", "MB in inference"]
    header += [*(["MB in training"] if trained else []), *(["least, ms", "reached"] if machine else [])]
    rows = []
    for own in measurements:
        row = [own.name, own.layout, _number(own.parameters, 1e6, 2), _number(own.gigamacs, 1, 2)]
        row.append(_number(own.inference_memory, 1e6, 0))
        if trained:
            row.append(_number(own.training_memory, 1e6, 0))
        if machine:
            least = own.least_seconds
            share = f"{least / statistics.median(own.latency):.0%}" if least else "-"
            row += [_number(least, 1e-3, 1), share]
        rows.append(row)
    text = f"{_table(header, rows)}\nMB: the weights, and the most allocated beside them for all images of a batch.\n"
    if machine:
        text += (
            f"least: one image's convolutions and matrix products at the best rates of this machine, "
            f"{machine.convolution / 1e9:.0f} GFLOP/s by convolution, {machine.matmul / 1e9:.0f} by matrix product, "
            f"{machine.copy / 1e9:.0f} GB/s copied; reached: its share of the time measured.\n"
        )
    return text


def _layer_table(name: str, times: Sequence[ModuleTime], number: int) -> str:
    """The modules that take longest themselves."""
    whole = next(time.seconds for time in times if not time.name)
    rows = [
        [
            *(time.name or "(the model)", time.kind, str(time.calls)),
            *(f"{1e3 * time.own_seconds:.2f}", f"{time.own_seconds / whole:.1%}", f"{1e3 * time.seconds:.2f}"),
        ]
        for time in times[:number]
    ]
    return f"{name}:\n\n{_table(['module', 'kind', 'calls', 'ms', 'share', 'ms with those within'], rows)}"


def _draw(measurements: Sequence[Measurement]) -> Picture:
    """The times as bars, each with the least that the machine allows."""
    names = [f"{own.name}, {own.layout}" for own in measurements]
    title = "one image, ms; marked: the least that the machine allows"
    panels = {title: {name: 1e3 * np.array(own.latency) for name, own in zip(names, measurements, strict=True)}}
    panels[f"{measurements[0].batch_size} images, ms"] = {
        name: 1e3 * np.array(own.batch) for name, own in zip(names, measurements, strict=True)
    }
    steps = {name: own.training_step for name, own in zip(names, measurements, strict=True) if own.training_step}
    if steps:
        panels["training step, ms"] = {name: 1e3 * np.array(seconds) for name, seconds in steps.items()}
    least = {name: 1e3 * own.least_seconds for name, own in zip(names, measurements, strict=True) if own.least_seconds}
    return draw_times(panels, bounds={title: least})


def _ratio(seconds: Sequence[float], first: Sequence[float]) -> str:
    return f"{statistics.median(seconds) / statistics.median(first):.2f}" if seconds and first else "-"


def _number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, also to be read as it stands; what follows two columns of text is aligned right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    sides = [str.ljust, str.ljust, *[str.rjust] * (len(header) - 2)]
    lines = [
        "| " + " | ".join(f(cell, width) for f, cell, width in zip(sides, row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = [
        "-" * width if side is str.ljust else "-" * (width - 1) + ":" for side, width in zip(sides, widths, strict=True)
    ]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines) + "\n"
