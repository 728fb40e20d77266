"""The command `resnest-det`.

Each sub-command is one function: it adds its parser, with its arguments, and names the function that runs it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resnest_det import __version__
from resnest_det.classify import (
    classify_files,
    find_images,
    find_preprocessing,
    format_predictions,
    load_classifier,
    read_class_names,
)
from resnest_det.data.coco import read_coco_targets
from resnest_det.data.sample import ensure_sample_dataset, read_sample_summary
from resnest_det.evaluation import CocoMeanAveragePrecision, error_breakdown, read_coco_results
from resnest_det.reports import class_tables, write_detection_report

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after the program's name; None takes them from the command line.

    Returns:
        The exit status: 0, or 2 for a user's mistake, which is printed to stderr. As usual with argparse,
        `--help`, `--version` and words it cannot parse raise SystemExit.
    """
    parser = argparse.ArgumentParser(prog="resnest-det", description="ResNeSt and its relatives, on the command line.")
    parser.add_argument("--version", action="version", version=f"resnest-det {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_classify(commands)
    _add_evaluate(commands)
    _add_sample(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _add_classify(commands: SubParsers) -> None:
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
    parser.set_defaults(run=_run_classify)


def _run_classify(arguments: argparse.Namespace) -> None:
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
    # "surrogateescape" writes a file's name that is no valid UTF-8 as it stands on disk.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")
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


def _add_evaluate(commands: SubParsers) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score a file of detections, whichever detector they are from",
        description="Score detections in COCO's format of results against a COCO annotation file, as pycocotools does: "
        "average precision and recall, of each class too, and what each kind of error costs. No images are needed. "
        "Masks are small, medium or large by their own area, as in detectron2, where pycocotools goes by the box if "
        "a detection has both.",
        epilog="--output gets results.json, errors.json, confusion_matrix.json, and pictures of both and of precision "
        "by recall; those of masks have _masks in their names.",
    )
    parser.add_argument("--annotations", required=True, metavar="FILE", help="the ground truth, a COCO instances file")
    parser.add_argument("--results", required=True, metavar="FILE", help="the detections, in COCO's format of results")
    parser.add_argument(
        "--masks", action="store_true", help="evaluate masks beside boxes: detections need a segmentation, run lengths"
    )
    parser.add_argument(
        "--backend",
        default="pycocotools",
        metavar="B",
        help="pycocotools, or hotcoco for the same numbers in a fraction of the time (%(default)s)",
    )
    parser.add_argument(
        "--max-detections",
        type=int,
        nargs="+",
        default=[1, 10, 100],
        metavar="N",
        help="detections of a class in an image that count, in rising order (1 10 100)",
    )
    parser.add_argument(
        "--area-ranges",
        type=float,
        nargs=2,
        default=[32**2, 96**2],
        metavar=("SMALL", "MEDIUM"),
        help="areas in square pixels up to which an object is small, and up to which it is medium (1024 9216)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="a folder for the numbers and pictures")
    parser.set_defaults(run=_run_evaluate)


def _run_evaluate(arguments: argparse.Namespace) -> None:
    output: Path | None = arguments.output
    if output:
        written = [(output / name).resolve() for name in ("results.json", "errors.json", "errors_masks.json")]
        for given in (arguments.annotations, arguments.results):
            if Path(given).resolve() in written:
                raise ValueError(f"--output {output} would replace {given}; name another folder")
        if (output / "config.toml").exists():
            raise ValueError(f"--output {output} is the folder of a run, which has a results.json; name another folder")
        output.mkdir(parents=True, exist_ok=True)  # before the long work
    masks: bool = arguments.masks
    truth = read_coco_targets(arguments.annotations, masks=masks)
    metric = CocoMeanAveragePrecision(
        truth.class_names,
        masks=masks,
        backend=arguments.backend,
        max_detections=arguments.max_detections,
        area_ranges=arguments.area_ranges,
    )
    image_ids = [target["image_id"] for target in truth.targets]
    found = read_coco_results(arguments.results, image_ids=image_ids, labels=truth.labels, masks=masks)
    metric.update([found[image_id] for image_id in image_ids], truth.targets)
    numbers = metric.compute()
    if numbers["AP"] < 0:
        raise ValueError(
            f"{arguments.annotations} has no object to find; give annotations with other than crowd regions"
        )
    print(metric.table())
    if output:
        settings = {
            "annotations": arguments.annotations,
            "detections": arguments.results,
            "backend": metric.backend,
            "max_detections": metric.max_detections,
            "area_ranges": arguments.area_ranges,
        }
        tables = {name: [asdict(row) for row in rows] for name, rows in class_tables(metric, masks=masks).items()}
        content = {"results": numbers, "settings": settings} | tables
        (output / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    for of_masks in (False, True) if masks else (False,):
        if output:
            errors = write_detection_report(output, metric, masks=of_masks, suffix="_masks" if of_masks else "")
        else:
            limit = metric.max_detections[-1]
            breakdown = error_breakdown(
                metric.images.values(), metric.class_names, max_detections=limit, masks=of_masks
            )
            errors = breakdown.table()
        print(f"\n{errors}")
    if output:
        print(f"\nresults and pictures: {output}")


def _add_sample(commands: SubParsers) -> None:
    parser = commands.add_parser(
        "sample",
        help="write the small generated data set",
        description="Write the small generated data set, in COCO's and in ADE20K's layout.",
    )
    parser.add_argument("folder", metavar="DIR", help="a folder that is new or empty, or holds this very set")
    parser.add_argument("--train", type=int, default=400, metavar="N", help="training images (%(default)s)")
    parser.add_argument("--val", type=int, default=60, metavar="N", help="validation images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (%(default)s)")
    parser.set_defaults(run=_run_sample)


def _run_sample(arguments: argparse.Namespace) -> None:
    folder = ensure_sample_dataset(
        arguments.folder, num_train=arguments.train, num_val=arguments.val, seed=arguments.seed
    )
    summary = read_sample_summary(folder)
    print(
        f"{folder}\n"
        f"  images: {summary.num_train} training, {summary.num_val} validation (seed {summary.seed})\n"
        f"  objects: {summary.num_objects}, crowds: {summary.num_crowds}, images without any: {summary.num_empty}\n"
        f"  COCO layout: train/ val/ annotations/instances_train.json annotations/instances_val.json\n"
        f"  ADE20K layout: ade20k/"
    )


if __name__ == "__main__":
    sys.exit(main())
