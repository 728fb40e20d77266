"""`resnest-det compare`: runs side by side, on the terminal and as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from resnest_det.reports import compare_runs, write_comparison

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "compare",
        help="put runs side by side: results, settings, classes, errors, curves",
        description="Put runs side by side: their results with the differences to the first one's, the settings that "
        "differ, each class, each kind of error. Runs that differ in run.seed alone are one experiment, of which the "
        "mean and the standard deviation are given.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, the one to compare with first")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a page with all of it and the learning curves, such as compare.html",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    output: Path | None = arguments.output
    if output and output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output} is no page; name a file that ends in .html, such as compare.html")
    if output and not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} for the output {output.name}; create it")
    comparison = compare_runs(arguments.runs)
    print(comparison.table())
    if output:
        print(f"\npage: {write_comparison(output, comparison)}")
