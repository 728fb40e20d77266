"""`resnest-det export`: a checkpoint, or a backbone with its weights -> a file that runs without this package."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from resnest_det.backbones import STAGES, create_backbone, stage_extractor
from resnest_det.build import build_coco_set, build_mask_set
from resnest_det.classify import load_classifier, read_class_names
from resnest_det.config import DetectionSettings
from resnest_det.data.files import IncompleteDataError, channels_first, read_rgb
from resnest_det.data.image_search import find_images
from resnest_det.data.sample import write_sample_dataset
from resnest_det.deploy.export import (
    Export,
    Images,
    NormalisedNetwork,
    export_onnx,
    export_program,
    of_other_sizes,
)
from resnest_det.deploy.folding import fold_batch_norms
from resnest_det.deploy.onnx_form import onnx_form
from resnest_det.experiment import find_checkpoint
from resnest_det.predictor import Predictor, Settings

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers

_SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
_OPSET = 17  # where --opset names none
_NUM_IMAGES = 4  # that a file is checked on
_CLASSIFIER_SIZES = ((224, 224), (256, 321))  # of the images that a backbone's file is checked on
_LONGEST_SIDE = 640  # of those that a segmentation model's is


@dataclass(frozen=True, slots=True)
class _Source:
    """What is exported, and what its file says of it."""

    model: nn.Module
    task: Literal["detection", "segmentation", "classification", "features"]
    metadata: dict[str, str]
    settings: Settings | None


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "export",
        help="write a model as a file that runs without this package: ONNX, or torch.export's",
        description="Write the model of a run or checkpoint, or a backbone by its name, as a file that runs without "
        "this package. It takes RGB images in [0, 1] and normalises them by itself; a detector's resizes them and "
        "suppresses duplicates too. What is written has been run on images, at several sizes, and gives what the model "
        "gives; else nothing is written.",
        epilog="A backbone's file gives logits, or with --features the features of its stages.",
    )
    parser.add_argument(
        "checkpoint", nargs="?", metavar="RUN_OR_CHECKPOINT", help="a run folder, or a checkpoint's file"
    )
    parser.add_argument("--backbone", metavar="NAME", help="export this network, such as resnest50, and no checkpoint")
    parser.add_argument(
        "--weights", metavar="W", help="of --backbone: imagenet, or another published file's name; a file's path; a URL"
    )
    parser.add_argument(
        "--features", nargs="+", choices=STAGES, metavar="STAGE", help="of --backbone: its stages, layer1 to layer4"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="ends in .onnx or .pt2")
    parser.add_argument(
        "--format", choices=tuple(_SUFFIXES), help="onnx, or torch_export, which takes no detectors (the output's)"
    )
    parser.add_argument("--opset", type=int, metavar="N", help=f"of ONNX, 16 to 20 ({_OPSET})")
    parser.add_argument("--uint8", action="store_true", help="the file takes bytes, and scales them by itself")
    parser.add_argument(
        "--fixed-size", type=int, nargs=2, metavar=("H", "W"), help="the file takes one image of this size, no other"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="IMAGE",
        help=f"what the file is checked on: the first {_NUM_IMAGES} of these files and folders (the run's validation "
        "set where it is there, else generated scenes)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="T",
        help="largest difference from the model, as a share of the largest output; of boxes, of the image's longer "
        "side (%(default)s)",
    )
    parser.add_argument(
        "--score-threshold", type=float, metavar="S", help="score below which a detector's file leaves detections out"
    )
    parser.add_argument("--config", metavar="C", help="settings of a checkpoint that has none, as for predict")
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line, of a checkpoint that has none")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    form = _format(output, arguments.format)
    _check(arguments, form)
    source = _load_checkpoint(arguments) if arguments.backbone is None else _load_backbone(arguments)
    if source.task == "detection" and form == "torch_export":
        raise ValueError(
            f"{arguments.checkpoint} is a detector, which torch.export does not take: how many boxes are left depends "
            f"on the image; use --format onnx"
        )
    images, origin = _find_check_images(arguments.images, source.settings)
    checks = _checks(images, source.task, arguments.fixed_size, as_bytes=arguments.uint8)
    print(f"{_describe(source)}; checked on {origin}", file=sys.stderr)
    if form == "onnx":
        done = export_onnx(
            onnx_form(source.model),
            output,
            checks[0],
            opset=_OPSET if arguments.opset is None else arguments.opset,
            dynamic=arguments.fixed_size is None,
            checks=checks,
            reference=source.model,
            tolerance=arguments.tolerance,
            metadata=source.metadata,
        )
    else:
        assert isinstance(checks[0], Tensor)
        done = export_program(
            fold_batch_norms(source.model),
            output,
            checks[0],
            dynamic=arguments.fixed_size is None,
            checks=checks,
            reference=source.model,
            tolerance=arguments.tolerance,
            metadata=source.metadata,
        )
    print(_report(done))


def _format(output: Path, given: str | None) -> str:
    """What the file is to be, by what was asked for or by its name."""
    by_suffix = {suffix: name for name, suffix in _SUFFIXES.items()}
    if given is None and output.suffix not in by_suffix:
        raise ValueError(f"--output {output} ends in neither .onnx nor .pt2; name the file so, or give --format")
    form = given or by_suffix[output.suffix]
    if output.suffix != _SUFFIXES[form]:
        raise ValueError(f"--output {output} must end in {_SUFFIXES[form]} for --format {form}")
    return form


def _check(arguments: argparse.Namespace, form: str) -> None:
    """Refuse what does not go together, and what would have no effect, before the long work."""
    checkpoint, backbone = arguments.checkpoint, arguments.backbone
    if checkpoint is None and backbone is None:
        raise ValueError("there is nothing to export; name a run folder or checkpoint, or --backbone and --weights")
    if checkpoint is not None and backbone is not None:
        raise ValueError(f"both {checkpoint} and --backbone {backbone} are named; export one of them")
    if backbone is not None and arguments.weights is None:
        raise ValueError(f"--backbone {backbone} needs --weights, such as imagenet or a file's path")
    without_effect = {
        "--opset": (form != "onnx", f"is ONNX's, and {arguments.output} is a program of torch.export"),
        "--weights": (backbone is None, "is for --backbone, and a checkpoint has its weights"),
        "--features": (backbone is None, "is for --backbone, and a checkpoint's model is exported as it is"),
        "--score-threshold": (backbone is not None, f"is for a checkpoint, and --backbone {backbone} is none"),
        "--config": (backbone is not None, f"is for a checkpoint, and --backbone {backbone} is none"),
        "--classes": (arguments.features is not None, "names a classifier's outputs, and --features has none"),
    }
    for option, (has_none, reason) in without_effect.items():
        if has_none and getattr(arguments, option[2:].replace("-", "_")) is not None:
            raise ValueError(f"{option} {reason}; leave it out")
    size = arguments.fixed_size
    if size is not None and min(size) < 1:
        raise ValueError(f"--fixed-size is {size[0]} {size[1]}, expected two numbers of pixels")


# --- what is exported


def _load_checkpoint(arguments: argparse.Namespace) -> _Source:
    predictor = Predictor.from_checkpoint(
        arguments.checkpoint,
        config=arguments.config,
        class_names=read_class_names(arguments.classes) if arguments.classes else None,
        device="cpu",
        score_threshold=arguments.score_threshold,
    )
    model: Any = predictor.model
    settings = predictor.settings
    if isinstance(settings, DetectionSettings):
        kind: str = settings.model.detector
        mean, std = model.transform.image_mean, model.transform.image_std
        if arguments.score_threshold is not None:
            _set_score_threshold(model, arguments.score_threshold)
    else:
        kind = settings.model.segmenter
        mean, std = (values.flatten().tolist() for values in (model.image_mean, model.image_std))
    file = find_checkpoint(Path(arguments.checkpoint))
    metadata = {
        "model": f"{kind} on {settings.model.backbone}",
        "checkpoint": file.name,
        "checkpoint_sha256": _sha256(file),
        **_facts(predictor.task, predictor.class_names, mean, std),
    }
    return _Source(model, predictor.task, metadata, settings)


def _load_backbone(arguments: argparse.Namespace) -> _Source:
    name, weights = arguments.backbone, arguments.weights
    if arguments.features:
        net: nn.Module = create_backbone(name, weights, new_classifier=True)
        model = NormalisedNetwork(stage_extractor(net, [stage for stage in STAGES if stage in arguments.features]))
        task: Literal["features", "classification"] = "features"
        class_names: dict[int, str] = {}
    else:
        classifier = load_classifier(
            name,
            weights,
            class_names=read_class_names(arguments.classes) if arguments.classes else None,
            device="cpu",
        )
        model = NormalisedNetwork(classifier.net)
        task = "classification"
        class_names = dict(enumerate(classifier.class_names))
    mean, std = (values.flatten().tolist() for values in (model.image_mean, model.image_std))
    metadata = {"model": name, "weights": weights, **_facts(task, class_names, mean, std)}
    if Path(weights).is_file():
        metadata |= {"weights": Path(weights).name, "weights_sha256": _sha256(Path(weights))}
    return _Source(model.eval(), task, metadata, None)


def _facts(task: str, class_names: dict[int, str], mean: Sequence[float], std: Sequence[float]) -> dict[str, str]:
    """What whoever runs the file wants to know."""
    facts = {
        "task": task,
        "image_mean": json.dumps([round(value, 6) for value in mean]),
        "image_std": json.dumps([round(value, 6) for value in std]),
    }
    return facts | ({"class_names": json.dumps(class_names, ensure_ascii=False)} if class_names else {})


def _set_score_threshold(model: Any, score_threshold: float) -> None:
    """Detections of a lower score are left out by the model itself, as a file has no predictor around it."""
    owner = model.roi_heads if hasattr(model, "roi_heads") else model
    owner.score_thresh = score_threshold


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- what it is checked on


def _find_check_images(named: Sequence[str] | None, settings: Settings | None) -> tuple[list[Tensor], str]:
    """Some images, uint8 (3, H, W), and what they are."""
    if named:
        files = find_images(named)[:_NUM_IMAGES]
        return [channels_first(read_rgb(file, 0, 0)) for file in files], f"{len(files)} images of {', '.join(named)}"
    missing = ""
    if settings is not None:
        is_detection = isinstance(settings, DetectionSettings)
        try:
            dataset: Any = (build_coco_set if is_detection else build_mask_set)(settings.data, "val")  # type: ignore[arg-type]
            chosen = range(0, len(dataset), max(1, len(dataset) // _NUM_IMAGES))[:_NUM_IMAGES]
            return [dataset[index][0] for index in chosen], f"{len(chosen)} images of the run's validation set"
        except (OSError, ValueError) as error:
            if not isinstance(error, FileNotFoundError) or isinstance(error, IncompleteDataError):
                raise ValueError(
                    f"the run's validation set, on which the file would be checked, is broken: {error}. Mend it, or "
                    f"name other images by --images"
                ) from error
            missing = f", as the run's validation set is not here: {error}"
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder) / "sample"
        write_sample_dataset(sample, num_train=1, num_val=_NUM_IMAGES)
        files = sorted((sample / "val").iterdir())
        return [channels_first(read_rgb(file, 0, 0)) for file in files], f"generated scenes{missing}"


def _checks(images: Sequence[Tensor], task: str, fixed_size: Sequence[int] | None, *, as_bytes: bool) -> list[Images]:
    """The inputs that the file is tried on, of which the first is the example that it is made with.

    A detector gets one image after the other, and the first one turned by 90 degrees and once more stretched: other
    sizes, even where all images are square. Other models get a batch of one and a batch of all, at two sizes.
    """
    if fixed_size is not None:
        sized = [F.resize(image, list(fixed_size), antialias=True) for image in images]
    else:
        sized = [*images, images[0].rot90(1, (1, 2))]
    if not as_bytes:
        sized = [image.float() / 255 for image in sized]
    if task == "detection":
        listed: list[Images] = [[image] for image in sized]
        return listed if fixed_size is not None else [*listed, of_other_sizes(listed[0])]
    if fixed_size is not None:
        return [image[None] for image in sized]
    sizes = _CLASSIFIER_SIZES if task != "segmentation" else _bounded_sizes(sized[0])
    first, rest = (torch.stack([F.resize(image, list(size), antialias=True) for image in sized]) for size in sizes)
    return [first[:1], rest]


def _bounded_sizes(image: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """The image's size, or that of the same form whose longer side is in bounds; and a smaller one, of odd sides."""
    height, width = image.shape[1:]
    factor = min(1.0, _LONGEST_SIDE / max(height, width))
    height, width = max(1, round(height * factor)), max(1, round(width * factor))
    return (height, width), (height * 3 // 8 * 2 + 1, width * 3 // 8 * 2 + 1)


# --- what is said of it


def _describe(source: _Source) -> str:
    names = json.loads(source.metadata.get("class_names", "{}"))
    return f"{source.metadata['model']}, {f'{len(names)} classes' if names else source.task}"


def _report(done: Export) -> str:
    """The checks, a line each, then the file."""
    lines = []
    for check in done.checks:
        found = "" if check.num_detections is None else f"{check.num_detections} detections; "
        parts = ", ".join(f"{name} {value:.1e}" for name, value in check.differences.items())
        lines.append(f"{check.images}: {found}{f'largest differences: {parts}' if parts else 'none to compare'}")
    size = done.path.stat().st_size / 2**20
    return "\n".join([*lines, f"{done.path}, {size:.1f} MiB, input {done.metadata['input']}"])
