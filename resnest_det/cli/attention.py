"""`resnest-det attention`: what a network attends to in pictures, as figures and as arrays."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from resnest_det.attention import (
    LayerAttention,
    Score,
    attention_layers,
    class_score,
    detection_score,
    find_layer,
    grad_cam,
    record_attention,
    segment_score,
)
from resnest_det.classify import load_classifier, read_class_names
from resnest_det.data.files import UnreadableImageError, read_rgb
from resnest_det.data.image_search import find_images
from resnest_det.distributed import images_to_device
from resnest_det.predictor import Predictor
from resnest_det.visualize.attention import draw_channel_weights, draw_grad_cam, draw_shares, draw_spatial_maps

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers

_FIGURES = ("shares", "channels", "spatial", "grad_cam")
_CLEAR_SHARE = 0.75  # from which a split has a channel nearly to itself

Task = Literal["classification", "detection", "segmentation"]
Array = npt.NDArray[Any]


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "attention",
        help="show what a network attends to in pictures",
        description="Show what a network attends to in pictures: the shares of its splits or branches, the weights of "
        "its channels and positions, layer by layer, and by Grad-CAM where the evidence for a class, a detection or a "
        "segment is.",
        epilog="For each picture NAME: NAME_shares.png (split attention and selective kernels), NAME_channels.png (SE, "
        "ECA, CBAM), NAME_spatial.png (CBAM), NAME_grad_cam.png, and the arrays of all of them in NAME.npz: "
        "KIND/LAYER, where KIND is split, branch, channel or spatial; grad_cam (H, W); and image, the (H, W, 3) "
        "that the maps lie on. See docs/attention.md.",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, patterns, and folders with their sub-folders"
    )
    parser.add_argument("--backbone", metavar="NAME", help="a classifier's network, such as resnest50; with --weights")
    parser.add_argument(
        "--weights",
        metavar="W",
        help="imagenet, or another name of the network's published files; a file's path; a URL",
    )
    parser.add_argument(
        "--classes", metavar="FILE", help="a classifier's class names, one a line (ImageNet's for 1000)"
    )
    parser.add_argument(
        "--checkpoint", metavar="RUN", help="in place of --backbone: a run folder of train-det or train-seg, or its .pt"
    )
    parser.add_argument(
        "--class",
        dest="wanted",
        metavar="C",
        help="whose evidence Grad-CAM shows: a class by its name or number (a classifier's likeliest; a detector's "
        "best detection; the class with the most pixels)",
    )
    parser.add_argument(
        "--detection", type=int, metavar="N", help="the N-th best detection, of --class where that is given (1)"
    )
    parser.add_argument(
        "--layer",
        metavar="L",
        help="the layer of Grad-CAM (layer4; in a run's model, all stages that its head takes)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("attention"), metavar="DIR", help="where the files go (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    parser.set_defaults(run=_run)


@dataclass
class _Network:
    """A network, and how it is shown a picture."""

    task: Task
    model: nn.Module
    class_names: Mapping[int, str]
    see: Callable[[Path], tuple[Array, Tensor]]  # a file -> what is seen of it, uint8 (H, W, 3), and the model's input


@dataclass
class _Target:
    """What Grad-CAM is asked about."""

    name: str
    score: Score
    box: Tensor | None = None


@dataclass
class _Seen:
    """What is kept of a picture."""

    arrays: dict[str, Array]  # by their names in the .npz
    figures: dict[str, Array]  # RGB, by what stands in their files' names, of _FIGURES
    grad_cam: str  # a line about it
    layers: str  # lines about the attention layers


def _run(arguments: argparse.Namespace) -> int:
    if (arguments.backbone is None) == (arguments.checkpoint is None):
        raise ValueError("give --backbone and --weights for a classifier, or --checkpoint for a run: one of the two")
    files = _find_pictures(arguments.images, arguments.output)
    network = _load_classifier(arguments) if arguments.backbone else _load_run(arguments)
    if arguments.detection is not None and network.task != "detection":
        raise ValueError(f"--detection is for detectors, and this is a model for {network.task}; leave it out")
    if arguments.detection is not None and arguments.detection < 1:
        raise ValueError(f"--detection is {arguments.detection}; the best is 1")
    label = None if arguments.wanted is None else _find_class(arguments.wanted, network.class_names)
    if arguments.layer is not None:
        find_layer(network.model, arguments.layer)  # refused here: it would be missing for every picture
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not attention_layers(network.model):
        print("the network has no attention layers: Grad-CAM is all there is to see")
    skipped = []
    for file, name in zip(files, _names(files, arguments.output), strict=True):
        try:
            seen = _look(network, file, label, arguments)
        except ValueError as error:
            skipped.append(str(error) if isinstance(error, UnreadableImageError) else f"{file}: {error}")
            continue
        written = [arguments.output / f"{name}_{what}.png" for what in seen.figures]
        arrays = arguments.output / f"{name}.npz"
        np.savez_compressed(arrays, **seen.arrays)  # type: ignore[arg-type]
        for path, figure in zip(written, seen.figures.values(), strict=True):
            Image.fromarray(figure).save(path)
        print(f"{file}\n  {seen.grad_cam}\n{seen.layers}  written: {', '.join(map(str, [*written, arrays]))}")
    for reason in skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    return 1 if skipped else 0


def _look(network: _Network, file: Path, label: int | None, arguments: argparse.Namespace) -> _Seen:
    """What the network attends to in a picture.

    Args:
        network: what looks at it.
        file: the picture.
        label: of the class that is asked for.
        arguments: the command's, of which `detection` and `layer` count.

    Raises:
        UnreadableImageError: the file cannot be decoded; a ValueError.
        ValueError: what is asked for is not in the picture, or the picture cannot be resized.
    """
    picture, image = network.see(file)
    recording: AbstractContextManager[Mapping[str, LayerAttention]] = nullcontext({})
    if attention_layers(network.model):
        recording = record_attention(network.model)
    with recording as record, torch.no_grad():
        output = network.model(image[None])
    arrays: dict[str, Array] = {
        f"{layer.kind}/{path}": layer.weights[0].numpy() for path, layer in record.items() if layer.calls
    }
    figures = _draw_attention(picture, _visible_part(network, image), record)
    target = _target(network, output, label, arguments.detection)
    said = "nothing is detected, so that there is no Grad-CAM"
    if target is not None:
        heat = grad_cam(network.model, image, target.score, layer=arguments.layer).cpu()
        heat = _resized(heat[None], picture.shape[:2])[0]  # of a segmentation model, which saw another size
        arrays["grad_cam"] = heat.numpy()
        title = f"{target.name}: where the evidence is"
        figures["grad_cam"] = draw_grad_cam(picture, heat, title=title, box_xyxy=target.box)
        row, column = np.unravel_index(int(heat.argmax()), tuple(heat.shape))
        where = arguments.layer or ("layer4" if network.task == "classification" else "the stages under the head")
        peak = f"brightest at x {column}, y {row}" if heat.any() else "nothing speaks for it"
        said = f"Grad-CAM of {target.name}, at {where}: {peak}"
    return _Seen(arrays | {"image": picture}, figures, said, _summary(record))


def _find_pictures(images: Sequence[str], output: Path) -> list[Path]:
    """The images that are meant, without the figures that an earlier call wrote, unless these are named."""
    named = set(map(Path, images))
    folder = output.resolve()
    files = [
        file for file in find_images(images) if file in named or file.parent.resolve() != folder or not _is_figure(file)
    ]
    if not files:
        raise FileNotFoundError(f"there are only figures of an earlier call in {', '.join(images)}; name your images")
    return files


def _is_figure(file: Path) -> bool:
    """Whether a file is called as a figure is, and lies beside the arrays that a figure is made of."""
    ending = next((f"_{what}.png" for what in _FIGURES if file.name.endswith(f"_{what}.png")), None)
    return ending is not None and file.with_name(f"{file.name.removesuffix(ending)}.npz").is_file()


def _load_classifier(arguments: argparse.Namespace) -> _Network:
    if arguments.weights is None:
        raise ValueError("--backbone needs --weights: imagenet, another published file's name, a path or a URL")
    classifier = load_classifier(
        arguments.backbone,
        arguments.weights,
        class_names=read_class_names(arguments.classes) if arguments.classes else None,
        device=arguments.device,
    )

    def see(file: Path) -> tuple[Array, Tensor]:
        crop = classifier.prepare(file)  # (3, crop, crop)
        return crop.permute(1, 2, 0).numpy(), classifier.normalised(crop)

    assert isinstance(classifier.net.fc, nn.Linear)
    classifier.check_num_classes(classifier.net.fc.out_features)
    names = dict(enumerate(classifier.class_names))
    return _Network("classification", classifier.net, names, see)


def _load_run(arguments: argparse.Namespace) -> _Network:
    for option in ("weights", "classes"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for --backbone; a checkpoint has its own, so leave it out")
    predictor = Predictor.from_checkpoint(arguments.checkpoint, device=arguments.device)

    def see(file: Path) -> tuple[Array, Tensor]:
        picture = read_rgb(file, 0, 0)  # of no expected size, so always turned
        predictor.check_size(*picture.shape[:2])
        image: Tensor = images_to_device(torch.from_numpy(picture).permute(2, 0, 1), predictor.device)
        if predictor.task == "segmentation":  # which a detector does by itself
            image = _resized(image, _segmenter_size(image, predictor.settings.eval))
        return picture, image

    return _Network(predictor.task, predictor.model, predictor.class_names, see)


def _segmenter_size(image: Tensor, settings: Any) -> tuple[int, int]:
    """The height and width that an image (3, H, W) is resized to in evaluation."""
    height, width = image.shape[-2:]
    factor = settings.short_side / min(height, width) if settings.short_side else 1.0
    if settings.max_side:
        factor = min(factor, settings.max_side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _visible_part(network: _Network, image: Tensor) -> tuple[float, float]:
    """Which part of the height and of the width of what the network sees is the image; the rest is padding."""
    if network.task != "detection":
        return 1.0, 1.0
    images, _ = network.model.transform([image])  # type: ignore[operator]
    (height, width), (all_height, all_width) = images.image_sizes[0], images.tensors.shape[-2:]
    return height / all_height, width / all_width


def _find_class(wanted: str, class_names: Mapping[int, str]) -> int:
    """The label of a class that is named, or numbered."""
    found = [label for label, name in class_names.items() if name == wanted]
    if found:
        return found[0]
    if wanted.isdecimal() and int(wanted) in class_names:
        return int(wanted)
    nearest = difflib.get_close_matches(wanted, class_names.values(), n=1, cutoff=0)[0]
    raise ValueError(
        f"--class {wanted!r} is neither a name nor a number of the {len(class_names)} classes, which are numbered "
        f"{min(class_names)} to {max(class_names)}; did you mean {nearest!r}?"
    )


def _target(network: _Network, output: Any, label: int | None, rank: int | None) -> _Target | None:
    """What Grad-CAM is asked about in an image; None where nothing is detected and nothing was asked for."""
    if network.task == "classification":
        probabilities = output[0].float().softmax(0)
        label = int(probabilities.argmax()) if label is None else label
        return _Target(f"{network.class_names[label]} {probabilities[label]:.2f}", class_score(label))
    if network.task == "segmentation":
        labels = output["out"][0].argmax(0)
        label = int(labels.flatten().mode().values) if label is None else label
        if not (labels == label).any():
            found = ", ".join(network.class_names[int(index)] for index in labels.unique())
            raise ValueError(f"no pixel is found to be {network.class_names[label]!r}; ask for one of: {found}")
        share = (labels == label).float().mean().item()
        return _Target(f"{network.class_names[label]}, {share:.1%} of the image", segment_score(label))
    found_labels: list[int] = output[0]["labels"].tolist()
    places = [place for place, own in enumerate(found_labels) if label in (None, own)]
    if not places and label is None and rank is None:
        return None
    rank = 1 if rank is None else rank
    if rank > len(places):
        counts = Counter(network.class_names[own] for own in found_labels)
        of_class = "" if label is None else f" of {network.class_names[label]!r}"
        found = ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "nothing"
        raise ValueError(f"there is no detection {rank}{of_class}; detected: {found}")
    place = places[rank - 1]
    score, box = output[0]["scores"][place].item(), output[0]["boxes"][place].cpu()
    name = f"detection {place + 1}, {network.class_names[found_labels[place]]} {score:.2f}"
    return _Target(name, detection_score(place), box)


def _draw_attention(
    picture: Array, visible: tuple[float, float], record: Mapping[str, LayerAttention]
) -> dict[str, Array]:
    """The figures of what was recorded of one image.

    Args:
        picture: what was seen.
        visible: see _visible_part.
        record: of one image.
    """
    shares: dict[str, Array] = {}
    channels: dict[str, Array] = {}
    maps: dict[str, Array] = {}
    for path, layer in record.items():
        if not layer.calls:
            continue
        values = layer.weights[0].numpy()
        if layer.kind == "spatial":
            height, width = (math.ceil(side * part) for side, part in zip(values.shape, visible, strict=True))
            maps[path] = values[:height, :width]
        elif layer.kind == "channel":
            channels[path] = values
        elif len(values) == 1:  # of one split, the share is a weight
            channels[path] = values[0]
        else:
            shares[path] = values
    figures: dict[str, Array] = {}
    if shares:
        is_kernel = any(layer.kind == "branch" for layer in record.values())
        title = f"how each layer's channels are divided among its {'branches' if is_kernel else 'splits'}"
        figures["shares"] = draw_shares(_short(shares), part="branch" if is_kernel else "split", title=title)
    if channels:
        figures["channels"] = draw_channel_weights(_short(channels), title="by what each layer multiplies its channels")
    if maps:
        figures["spatial"] = draw_spatial_maps(picture, _short(maps), title="by what each layer multiplies positions")
    return figures


def _summary(record: Mapping[str, LayerAttention]) -> str:
    """The recorded values of one image, a line a layer."""
    rows = [("layer", "kind", "size", "mean", "lowest", "highest", "")]
    for path, layer in record.items():
        if not layer.calls:
            continue
        values = layer.weights[0]
        size = " x ".join(map(str, values.shape))
        note, mean = "", f"{values.mean():.3f}"
        if layer.kind in ("split", "branch") and len(values) > 1:
            mean = " ".join(f"{own:.3f}" for own in values.mean(1).tolist())
            clear = (values.amax(0) > _CLEAR_SHARE).float().mean().item()
            note = f"one {layer.kind} has over {_CLEAR_SHARE} in {clear:.0%} of the channels"
        rows.append((path, layer.kind, size, mean, f"{values.min():.3f}", f"{values.max():.3f}", note))
    if len(rows) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"  {line}\n" for line in lines)


def _short(layers: Mapping[str, Array]) -> dict[str, Array]:
    """The layers by their names without what all of them begin and end with; a single one by its whole name."""
    parts = [path.split(".") for path in layers]
    if len(parts) == 1:
        return dict(layers)
    begin = _num_shared(parts)
    end = _num_shared([own[:begin:-1] for own in parts])  # something of every name stays
    return {".".join(own[begin : len(own) - end]): values for own, values in zip(parts, layers.values(), strict=True)}


def _num_shared(paths: Sequence[Sequence[str]]) -> int:
    """With how many equal parts all paths begin."""
    columns = list(zip(*paths, strict=False))
    return next((index for index, column in enumerate(columns) if len(set(column)) > 1), len(columns))


def _names(files: Sequence[Path], output: Path) -> list[str]:
    """What the files of each image are called: by its stem, with a number behind it where that is taken.

    It is taken by another image, or where a figure would replace an image.
    """
    inputs = {file.resolve() for file in files}
    folder = output.resolve()
    last: Counter[str] = Counter()  # number behind each stem
    names: dict[str, None] = {}
    for file in files:
        name = file.stem
        while not last[file.stem] or name in names or any(folder / f"{name}_{what}.png" in inputs for what in _FIGURES):
            last[file.stem] += 1
            name = file.stem if last[file.stem] == 1 else f"{file.stem}_{last[file.stem]}"
        names[name] = None
    return list(names)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (C, H, W) bilinearly at another height and width."""
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
