"""The command `resnest-det`.

Each sub-command is one file here: its `add` makes the parser, with its arguments, and names the function that runs it.
`train-det` and `train-seg` are the two training scripts, which read their words themselves.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resnest_det import __version__
from resnest_det.cli import (
    attention,
    benchmark,
    classify,
    compare,
    configs,
    doctor,
    evaluate,
    export,
    predict,
    quantize,
    report,
    sample,
    train,
)

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after the program's name; None takes them from the command line.

    Returns:
        The exit status: 0; 1 where a command found what it was asked to look for, such as errors in a data set; 2 for a
        user's mistake, which is printed to stderr; 130 after Ctrl-C. As usual with argparse, `--help`, `--version` and
        words it cannot parse raise SystemExit.
    """
    # "surrogateescape" writes a file's name that is no valid UTF-8 as it stands on disk.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="surrogateescape")
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in train.SCRIPTS:
        return train.run(words[0], words[1:])
    parser = argparse.ArgumentParser(prog="resnest-det", description="ResNeSt and its relatives, on the command line.")
    parser.add_argument("--version", action="version", version=f"resnest-det {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (
        train,
        predict,
        evaluate,
        report,
        compare,
        classify,
        attention,
        doctor,
        configs,
        sample,
        export,
        quantize,
        benchmark,
    ):
        command.add(commands)
    arguments = parser.parse_args(words)
    try:
        status: int | None = arguments.run(arguments)
    except BrokenPipeError:  # whoever reads the output has enough of it, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return status or 0
