"""`resnest-det quantize`: a run, checkpoint or classifier -> an INT8 ONNX file, and what 8 bits cost."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnest_det.backbones.published import Preprocessing
from resnest_det.build import (
    build_coco_metric,
    build_coco_set,
    build_detection_inference,
    build_inference,
    build_mask_set,
)
from resnest_det.classify import find_preprocessing, load_classifier
from resnest_det.config import DetectionSettings, SegmentationSettings
from resnest_det.data import eval_loader
from resnest_det.data.files import channels_first, read_rgb
from resnest_det.data.image_search import find_images
from resnest_det.deploy.benchmark import interleaved, spread
from resnest_det.deploy.export import Images, NormalisedNetwork, checked_output, export_onnx, of_other_sizes
from resnest_det.deploy.integer_form import integer_form
from resnest_det.deploy.onnx_model import OnnxModel
from resnest_det.deploy.quantization import CalibrationMethod, cosine_similarities, quantize_onnx
from resnest_det.distributed import images_to_device
from resnest_det.engine import check_class_names
from resnest_det.evaluation import MeanIoU, SegmentationInference, evaluate
from resnest_det.experiment import find_checkpoint
from resnest_det.predictor import Predictor

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers

_NUM_CHECKS = 4  # calibration images that the float32 file is checked on
_ROUNDS = 10  # of the comparison of times
_CPU = torch.device("cpu")


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "quantize",
        help="write an INT8 ONNX file of a model, and measure what 8 bits cost",
        description="Export a model to ONNX, quantise it to INT8 by images of its training set, and compare the two "
        "files: the metric over the validation set, the outputs, sizes, and times on this CPU.",
        epilog="See docs/quantization.md: what becomes integer, and what was measured.",
    )
    parser.add_argument("checkpoint", nargs="?", metavar="RUN_OR_CHECKPOINT", help="a run folder, or a file of weights")
    parser.add_argument(
        "--backbone", metavar="NAME", help="in its place a classifier, such as resnest50; with --weights"
    )
    parser.add_argument(
        "--weights",
        metavar="W",
        help="imagenet, or another name of the network's published files; a file's path; a URL",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the INT8 file, such as model.onnx")
    parser.add_argument(
        "--calibration",
        nargs="+",
        metavar="IMAGE",
        help="images, folders and patterns to take the ranges of 8 bits from (the run's training set)",
    )
    parser.add_argument(
        "--num-images", type=int, default=32, metavar="N", help="images of these that are taken, evenly (%(default)s)"
    )
    parser.add_argument(
        "--method", choices=get_args(CalibrationMethod), default="minmax", help="of finding the ranges (%(default)s)"
    )
    parser.add_argument(
        "--per-tensor", action="store_true", help="one scale for a layer's weights, not one for each output channel"
    )
    parser.add_argument(
        "--size", type=int, metavar="N", help="side of a classifier's images (as its weights' evaluation)"
    )
    parser.add_argument("--data", metavar="DIR", help="where the run's data are now, in place of its data.root")
    parser.add_argument(
        "--no-evaluation", action="store_true", help="leave out the metric; no validation set is needed"
    )
    parser.set_defaults(run=_run)


@dataclass(frozen=True)
class _Subject:
    """What is quantised, and by what it is measured."""

    name: str
    weights: str
    class_names: dict[int, str]
    model: nn.Module
    checks: list[Images]  # what the float32 file is tried on, and by the first of which it is traced
    inputs: list[Tensor]  # for calibration, as the model takes them: (3, H, W) of a detector, else (1, 3, H, W)
    evaluate: Callable[[OnnxModel], dict[str, float]] | None


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    subject = _trained(arguments) if arguments.backbone is None else _classifier(arguments)
    output: Path = arguments.output
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "float32.onnx"
        export_onnx(
            integer_form(subject.model),
            exported,
            subject.checks[0],
            checks=subject.checks,
            reference=subject.model,
            metadata={
                "model": subject.name,
                "weights": subject.weights,
                "class_names": json.dumps(subject.class_names, ensure_ascii=False),
            },
        )
        model = OnnxModel(exported)
        inputs = [image.numpy() for image in subject.inputs]
        nodes = quantize_onnx(exported, output, inputs, method=arguments.method, per_channel=not arguments.per_tensor)
        print(
            f"{subject.name}: {len(nodes.layers)} integer layers; in float32 {len(nodes.last)} last ones and "
            f"{len(nodes.pooled)} over pooled features; {len(inputs)} calibration images, {arguments.method}",
            file=sys.stderr,
        )
        models = {"float32": model, "INT8": OnnxModel(output)}
        compared = () if isinstance(subject.checks[0], Tensor) else nodes.last_maps
        print(_compare(subject, models, {"float32": exported, "INT8": output}, inputs, compared))
    print(output)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse arguments that do not go together, before the long work."""
    if (arguments.checkpoint is None) == (arguments.backbone is None):
        raise ValueError("give a run or checkpoint, or --backbone and --weights for a classifier: one of the two")
    if arguments.num_images < 1:
        raise ValueError(f"--num-images is {arguments.num_images}, expected at least 1")
    checked_output(arguments.output, ".onnx")
    if arguments.size is not None and arguments.size < 1:
        raise ValueError(f"--size is {arguments.size}, expected at least 1")
    if arguments.backbone is not None:
        if arguments.weights is None or arguments.calibration is None:
            raise ValueError("--backbone needs --weights, and images to calibrate by: --calibration FOLDER")
        given = {"--data": arguments.data, "--no-evaluation": arguments.no_evaluation or None}
    else:
        given = {"--weights": arguments.weights, "--size": arguments.size}
    for option, value in given.items():
        if value is not None:
            kind = "--backbone" if arguments.backbone is None else "a run or checkpoint"
            raise ValueError(f"{option} is for {kind}; leave it out")
    if arguments.data is not None and arguments.calibration and arguments.no_evaluation:
        raise ValueError(
            f"--data is {arguments.data}, and with --calibration and --no-evaluation none of the run's data are read; "
            f"leave one of them out"
        )


# --- what is quantised


def _classifier(arguments: argparse.Namespace) -> _Subject:
    preprocessing = find_preprocessing(arguments.backbone, arguments.weights)
    if arguments.size is not None:
        preprocessing = Preprocessing(arguments.size, arguments.size, preprocessing.interpolation)
    classifier = load_classifier(arguments.backbone, arguments.weights, preprocessing=preprocessing, device="cpu")
    files = _spread(find_images(arguments.calibration), arguments.num_images)
    inputs = [images_to_device(classifier.prepare(file)[None], _CPU) for file in files]
    names = dict(enumerate(classifier.class_names))
    net = NormalisedNetwork(classifier.net).eval()
    return _Subject(arguments.backbone, arguments.weights, names, net, _batches(inputs), inputs, None)


def _trained(arguments: argparse.Namespace) -> _Subject:
    """A detector or segmentation model with its data."""
    predictor = Predictor.from_checkpoint(arguments.checkpoint, device="cpu")
    settings = predictor.settings
    if arguments.data is not None:
        if settings.data.sample is not None:
            raise ValueError(
                f"--data is {arguments.data}, and the run's data are the generated ones, which are made where they are "
                f"missing; leave it out"
            )
        data = settings.data.model_copy(update={"root": arguments.data})
        settings = settings.model_copy(update={"data": data})
    checkpoint = find_checkpoint(Path(arguments.checkpoint))
    measure = None if arguments.no_evaluation else _evaluation(settings, checkpoint)
    if arguments.calibration:
        files = _spread(find_images(arguments.calibration), arguments.num_images)
    else:
        train_set = (
            build_coco_set(settings.data, "train")
            if isinstance(settings, DetectionSettings)
            else build_mask_set(settings.data, "train")
        )
        files = [train_set.image_path(place) for place in _spread(range(len(train_set)), arguments.num_images)]
    images: list[Tensor] = images_to_device([channels_first(read_rgb(file, 0, 0)) for file in files], _CPU)
    if isinstance(settings, DetectionSettings):
        checks: list[Images] = [[image] for image in _with_objects(predictor.model, images)]
        checks.append(of_other_sizes(checks[0]))
        inputs, kind = images, str(settings.model.detector)
    else:
        inputs, kind = _seen(build_inference(settings.eval), images), "deeplabv3plus"
        checks = _batches(inputs)
    name = f"{kind} on {settings.model.backbone}"
    return _Subject(name, checkpoint.name, predictor.class_names, predictor.model, checks, inputs, measure)


def _batches(inputs: Sequence[Tensor]) -> list[Images]:
    """What the file of a model that takes batches is tried on: some of its inputs, and a batch of another size."""
    return [*inputs[:_NUM_CHECKS], of_other_sizes(inputs[0])]


@torch.no_grad()
def _with_objects(detector: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    """The first images that the detector finds something in, as its file is checked by; without one the first."""
    found = (image for image in images if len(detector([image])[0]["boxes"]))
    return list(islice(found, _NUM_CHECKS)) or [images[0]]


def _spread(items: Sequence[Any], number: int) -> list[Any]:
    """So many of the items, or all where there are fewer, at even distances."""
    places = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[place] for place in places]


class _Recorder(nn.Module):
    """A segmentation model that sees nothing, and keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.seen.append(images[:1])
        return {"out": images[:, :1]}


def _seen(inference: SegmentationInference, images: Sequence[Tensor]) -> list[Tensor]:
    """What a segmentation model sees of each image in evaluation: one of its scales and windows."""
    inputs = []
    for image in images:
        recorder = _Recorder()
        inference(recorder, [image])
        inputs.append(recorder.seen[0])
    return inputs


# --- what it costs


def _evaluation(
    settings: DetectionSettings | SegmentationSettings, checkpoint: Path
) -> Callable[[OnnxModel], dict[str, float]]:
    """The metric of the run, over its validation set."""
    metric: Any
    predict: SegmentationInference | None = None
    if isinstance(settings, DetectionSettings):
        if build_detection_inference(settings.eval, detections_per_image=settings.model.detections_per_image):
            raise ValueError(
                "the run is evaluated at several sizes, mirrored or in tiles, and an exported detector resizes by "
                "itself; add --no-evaluation"
            )
        masks = settings.model.has_masks
        val_set: Any = build_coco_set(settings.data, "val", masks=masks)
        metric = build_coco_metric(settings.eval, val_set, masks=masks)
    else:
        val_set = build_mask_set(settings.data, "val")
        metric, predict = MeanIoU(val_set.class_names), build_inference(settings.eval)
    check_class_names(checkpoint, val_set.class_names)
    loader = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)
    return partial(evaluate, loader=loader, metric=metric, predict=predict, device=_CPU)


def _compare(
    subject: _Subject,
    models: dict[str, OnnxModel],
    files: dict[str, Path],
    inputs: Sequence[NDArray[np.float32]],
    compared: Sequence[str],
) -> str:
    """A table of both files: the metric, size and time; and below it, how alike they are."""
    lines = [f"{'':16}{'float32':>18}{'INT8':>18}"]

    def line(name: str, one: str, other: str, change: str) -> None:
        lines.append(f"{name:16}{one:>18}{other:>18}{change:>14}")

    if subject.evaluate is not None:
        results = {kind: subject.evaluate(model) for kind, model in models.items()}
        for name, value in results["float32"].items():
            other = results["INT8"][name]
            line(name, f"{value:.4f}", f"{other:.4f}", f"{other - value:+.4f}")
    sizes = {kind: path.stat().st_size / 2**20 for kind, path in files.items()}
    line("size, MiB", f"{sizes['float32']:.1f}", f"{sizes['INT8']:.1f}", f"{sizes['INT8'] / sizes['float32']:.2f}x")
    image: Any = subject.inputs[0] if isinstance(subject.checks[0], Tensor) else subject.inputs[:1]
    seconds = interleaved({kind: partial(model, image) for kind, model in models.items()}, rounds=_ROUNDS)
    faster = statistics.median(seconds["float32"]) / statistics.median(seconds["INT8"])
    line("an image, ms", spread(seconds["float32"]), spread(seconds["INT8"]), f"{faster:.2f}x faster")
    alike = cosine_similarities(files["float32"], files["INT8"], inputs, nodes=compared)
    lines.append(f"cosine similarity of the outputs: mean {statistics.mean(alike):.5f}, lowest {min(alike):.5f}")
    return "\n".join(lines)
