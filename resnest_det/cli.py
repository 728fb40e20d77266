"""The command `resnest-det`.

Each sub-command is one function: it adds its parser, with its arguments, and names the function that runs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resnest_det import __version__
from resnest_det.data.sample import ensure_sample_dataset, read_sample_summary

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
    parser = argparse.ArgumentParser(prog="resnest-det", description="ResNeSt detectors, on the command line.")
    parser.add_argument("--version", action="version", version=f"resnest-det {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_sample(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


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
