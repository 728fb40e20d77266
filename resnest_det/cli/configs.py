"""`resnest-det configs`: the experiments that are shipped, by name."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from resnest_det.config import shipped_configs
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
    files = {f"{task}/{name}": file for task in ("det", "seg") for name, file in shipped_configs(folder / task).items()}
    if arguments.name is None:
        width = max(map(len, files))
        for name, file in files.items():
            print(f"{name:{width}}  {_first_sentence(file)}")
        return
    found = [file for name, file in files.items() if arguments.name in (name, name.partition("/")[2])]
    if not found:
        near = get_close_matches(arguments.name, [*files, *(name.partition("/")[2] for name in files)], 1)
        hint = f"did you mean {near[0]}?" if near else "resnest-det configs lists them"
        raise ValueError(f"{arguments.name} is not one of the {len(files)} experiments; {hint}")
    if len(found) > 1:
        raise ValueError(f"{arguments.name} is in det and in seg; name det/{arguments.name} or seg/{arguments.name}")
    print(f"# {found[0]}\n{found[0].read_text()}", end="")


def _first_sentence(file: Path) -> str:
    """What a configuration's header begins with."""
    header = file.read_text().partition("\n#\n")[0]
    text = " ".join(line.removeprefix("#").strip() for line in header.splitlines())
    return f"{text.partition('. ')[0].rstrip('.')}."
