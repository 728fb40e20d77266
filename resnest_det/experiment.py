"""What the training scripts share around the loop: the command line, the run folder, and errors as messages."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from resnest_det.config import (
    Command,
    DetectionSettings,
    ExperimentSettings,
    Section,
    SegmentationSettings,
    ineffective_settings,
    parse_command_line,
    with_run_folder,
    write_settings,
)
from resnest_det.data import error_message
from resnest_det.data.files import ImageFiles
from resnest_det.engine import check_class_names, new_run_folder

S = TypeVar("S", bound=ExperimentSettings)
T = TypeVar("T")


def run_script(
    cls: type[S],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default_config: Path,
    train: Callable[[Command[S]], None],
    evaluate_only: Callable[[Command[S], Path], None],
) -> int:
    """A training script from its command line to its exit status.

    Args:
        cls: the script's settings.
        argv: the arguments without the script's name, see `config.parse_command_line`.
        prog: the script's name.
        description: what the script does, for `-h`.
        default_config: the configuration used where none is named.
        train: what the script does; it is given the command.
        evaluate_only: what it does with --eval-only; it is given the command, and the checkpoint or run folder.

    Returns:
        0, or 2 after a mistake of the user's, which is printed without a traceback.
    """
    try:
        command = parse_command_line(cls, argv, prog=prog, description=description, default_config=default_config)
        for sentence in ineffective_settings(command.settings):
            warnings.warn(sentence, stacklevel=2)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"training on several processes is not built yet: start {prog} without torchrun")
        if command.eval_only:
            evaluate_only(command, command.eval_only)
        else:
            train(command)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error_message(error)}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def run_folder(command: Command[S], class_names: dict[int, str]) -> Iterator[Path]:
    """The folder of a run: a new one with the settings in it, or the one that is resumed.

    An error within the block leaves its traceback in the folder, in `error.txt`; a script prints the message alone.

    Args:
        command: what was asked for.
        class_names: the training set's.

    Raises:
        ValueError: the run to be resumed was trained on other classes; its folder is left as it was.
    """
    if command.resume:
        check_class_names(command.resume / "last.pt", class_names)
        folder = command.resume
    else:
        folder = new_run_folder(Path(command.settings.run.dir))
        write_settings(with_run_folder(command.settings, str(folder)), folder / "config.toml")
    (folder / "error.txt").unlink(missing_ok=True)
    try:
        yield folder
    except Exception:
        (folder / "error.txt").write_text(traceback.format_exc())
        raise


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that --eval-only means: the file itself, or the best one of a run folder.

    Raises:
        ValueError: the run has none yet.
    """
    if not path.is_dir():
        return path
    best = path / "best.pt"
    if not best.exists():
        raise ValueError(f"{path} has no best.pt: the run was not evaluated yet; name its last.pt, or resume it")
    return best


def write_results(path: Path, settings: Section, results: dict[str, float], per_class: Iterable[Any]) -> Path:
    """Write what was measured, and how, as JSON. Another measurement's file is never replaced.

    Args:
        path: the file; where it holds another measurement, the name gets -2, -3, ... behind it.
        settings: how it was measured, the settings of the evaluation.
        results: numbers by name.
        per_class: the metric's dataclass of each class.

    Returns:
        The file that was written.
    """
    content = {
        "results": results,
        "settings": settings.model_dump(mode="json"),
        "classes": [asdict(row) for row in per_class],
    }
    text = json.dumps(content, indent=2) + "\n"
    file, number = path, 1
    while file.exists() and file.read_text() != text:
        number += 1
        file = path.with_name(f"{path.stem}-{number}{path.suffix}")
    file.write_text(text)
    return file


def write_evaluation(
    settings: DetectionSettings | SegmentationSettings,
    checkpoint: Path,
    set_name: str,
    results: dict[str, float],
    per_class: Iterable[Any],
) -> Path:
    """Write what --eval-only measured, as write_results does.

    A run's own folder takes what is measured of it; a file from elsewhere gets a folder of its own. The file is named
    after the checkpoint and `set_name`, the data that it was measured on.

    Returns:
        Where the predictions' picture goes, beside what was written.
    """
    own_folder = Path(settings.run.dir) == checkpoint.parent
    folder = checkpoint.parent if own_folder else new_run_folder(Path(settings.run.dir))
    written = write_results(folder / f"results_{checkpoint.stem}_{set_name}.json", settings.eval, results, per_class)
    return written.with_name(f"{written.stem.replace('results', 'predictions', 1)}.png")


def memory_format(settings: ExperimentSettings) -> torch.memory_format:
    """How a model's weights lie in memory; features follow them."""
    return torch.channels_last if settings.run.channels_last else torch.contiguous_format


def spread_samples(dataset: ImageFiles[T], num_samples: int) -> dict[str, T]:
    """Samples spread over a data set, by the names of their files; those that cannot be read are left out."""
    spread = range(0, len(dataset), max(len(dataset) // max(num_samples, 1), 1))[:num_samples]
    samples = {dataset.file_name(index): dataset.load(index) for index in spread}
    return {name: sample for name, sample in samples.items() if sample is not None}


def report_skipped(*datasets: ImageFiles[Any]) -> None:
    """Say how many images could not be read, where skipping them was asked for: they are in no figure."""
    for dataset in datasets:
        if names := dataset.skipped:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            print(f"{len(names)} of {len(dataset)} images were unreadable and skipped: {shown}")
