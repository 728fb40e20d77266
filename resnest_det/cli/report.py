"""`resnest-det report`: a run's report.html, written anew from what its folder holds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from resnest_det.reports import evaluation_suffixes, read_run, write_run_report

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "report",
        help="write a run's report.html anew, also of a run that crashed",
        description="Write a run's report.html anew from what its folder holds: neither the model nor the data are "
        "needed. A run that crashed, or an older one, gets a report of what is there.",
        epilog="Results of --eval-only in the folder get one each, report_CHECKPOINT_DATA.html.",
    )
    parser.add_argument("folder", metavar="RUN", help="the run folder")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    for suffix in evaluation_suffixes(arguments.folder):
        print(write_run_report(arguments.folder, suffix=suffix))
        for sentence in read_run(arguments.folder, suffix=suffix).missing:
            print(f"  missing: {sentence}")
