"""`resnest-det evaluate`: a file of detections and the ground truth -> scores and kinds of error."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from resnest_det.data.coco import read_coco_targets
from resnest_det.evaluation import CocoMeanAveragePrecision, error_breakdown, read_coco_results
from resnest_det.reports import class_tables, write_detection_report

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "evaluate",
        help="score a file of detections, whichever detector they are from",
        description="Score detections in COCO's format of results against a COCO annotation file, as pycocotools does: "
        "average precision and recall, of each class too, and what each kind of error costs. No images are needed. "
        "Masks are small, medium or large by their own area, as in detectron2, where pycocotools goes by the box if "
        "a detection has both.",
        epilog="--output gets results.json, and errors, confusion_matrix and precision_recall, each as .json and as "
        ".png; those of masks have _masks in their names.",
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
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
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
