"""`resnest-det sample`: the small generated data set, written to a folder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from resnest_det.data.sample import ensure_sample_dataset, read_sample_summary

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "sample",
        help="write the small generated data set",
        description="Write the small generated data set, in COCO's and in ADE20K's layout.",
    )
    parser.add_argument("folder", metavar="DIR", help="a folder that is new or empty, or holds this very set")
    parser.add_argument("--train", type=int, default=400, metavar="N", help="training images (%(default)s)")
    parser.add_argument("--val", type=int, default=60, metavar="N", help="validation images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (%(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
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
