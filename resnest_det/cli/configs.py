"""`resnest-det configs`: the experiments that are shipped, by name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from resnest_det.config import find_experiment, shipped_experiments
from resnest_det.shipped import shipped_file

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "configs",
        help="list the experiments that are shipped, or show one",
        description="List the experiments that are shipped, or show one. train-det and train-seg take them by name.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the experiment to show, such as det/sample")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    folder = shipped_file("configs")
    if arguments.name is not None:
        file = find_experiment(arguments.name, folder)
        print(f"# {file}\n{file.read_text()}", end="")
        return
    files = shipped_experiments(folder)
    width = max(map(len, files))
    for name, file in files.items():
        print(f"{name:{width}}  {_first_sentence(file)}")


def _first_sentence(file: Path) -> str:
    """What a configuration's header begins with."""
    header = file.read_text().partition("\n#\n")[0]
    text = " ".join(line.removeprefix("#").strip() for line in header.splitlines())
    return f"{text.partition('. ')[0].rstrip('.')}."
