"""`resnest-det classify`: a backbone, its weights and pictures -> the likeliest classes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resnest_det.classify import (
    classify_files,
    find_preprocessing,
    format_predictions,
    load_classifier,
    read_class_names,
)
from resnest_det.data.image_search import find_images

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "classify",
        help="name what is in pictures: the quick check that weights were loaded right",
        description="Name what is in pictures, with a backbone and its weights: the quick check that weights were "
        "loaded right. Pictures are resized and cropped as in the published evaluation of the weights.",
        epilog="Results go to stdout or --output, everything else to stderr. Weights that were not loaded right show "
        "in the last line: different pictures get one and the same class, whatever its probability.",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, and folders, searched with their sub-folders"
    )
    parser.add_argument("--backbone", required=True, metavar="NAME", help="the network, such as resnest50")
    parser.add_argument(
        "--weights",
        required=True,
        metavar="W",
        help="imagenet, or another name of the network's published files; a file's path; a URL",
    )
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line (ImageNet's for 1000 classes)")
    parser.add_argument("--top-k", type=int, metavar="K", help="classes an image (5, or all where there are fewer)")
    parser.add_argument(
        "--format",
        choices=("list", "table", "csv"),
        help="list: a block of lines an image; table: a line an image; csv: a line an image and rank "
        "(csv where --output ends in .csv, else table where a folder is named, else list)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the results go, instead of stdout")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    parser.add_argument("--resize", type=int, metavar="N", help="length of the resized short side, in pixels")
    parser.add_argument("--crop", type=int, metavar="N", help="side of the centre square cut out of it, in pixels")
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="the filter that resizes")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    output: Path | None = arguments.output
    if output and not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} for the output {output.name}; create it")
    if output and output.is_dir():
        raise ValueError(f"the output {output} is a folder; name a file in it")
    files = find_images(arguments.images)
    given = {
        name: value for name in ("resize", "crop", "interpolation") if (value := getattr(arguments, name)) is not None
    }
    preprocessing = replace(find_preprocessing(arguments.backbone, arguments.weights), **given)
    classifier = load_classifier(
        arguments.backbone,
        arguments.weights,
        class_names=read_class_names(arguments.classes) if arguments.classes else None,
        preprocessing=preprocessing,
        top_k=arguments.top_k,
        device=arguments.device,
    )
    print(
        f"{arguments.backbone}, weights {arguments.weights}, {len(classifier.class_names)} classes; "
        f"short side {preprocessing.resize} ({preprocessing.interpolation}), centre {preprocessing.crop} x "
        f"{preprocessing.crop}; {classifier.device}",
        file=sys.stderr,
    )
    # Opened before the long work, which would be lost where the file cannot be written.
    opened = output.open("w", encoding="utf-8", errors="surrogateescape") if output else nullcontext(sys.stdout)
    with opened as stream:
        predictions, unreadable = classify_files(classifier, files, batch_size=arguments.batch_size)
        text = format_predictions(predictions, arguments.format or _default_format(arguments.images, output))
        print(text, end="", file=stream, flush=True)
    for error in unreadable:
        print(f"skipped: {error}", file=sys.stderr)
    if len(predictions) > 1:
        best = [ranked[0] for ranked in predictions.values()]
        print(
            f"{len(best)} images: mean top-1 probability {sum(p.probability for p in best) / len(best):.3f}; "
            f"different top-1 classes: {len({p.class_index for p in best})}",
            file=sys.stderr,
        )


def _default_format(images: Sequence[str], output: Path | None) -> Literal["list", "table", "csv"]:
    if output and output.suffix.lower() == ".csv":
        return "csv"
    return "table" if any(Path(image).is_dir() for image in images) else "list"
