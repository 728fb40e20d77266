"""Where a run's numbers come from: its command, versions, device and times, in the run folder's provenance.json."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from resnest_det.distributed import world_size
from resnest_det.reports.page import write_whole

PACKAGES = (
    "resnest-det",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "albumentations",
    "pycocotools",
    "hotcoco",
    "timm",
)
_GIT_SECONDS = 5.0  # a repository on a slow disk is not waited for


def note_start(folder: Path, device: torch.device) -> None:
    """Add an entry to a run's provenance.json: a run that is resumed has one for every time that it was started.

    Args:
        folder: the run folder.
        device: of this process.
    """
    file = folder / "provenance.json"
    _write(file, [*_read(file), {**describe_environment(device), "seconds": None}])


def note_end(folder: Path, *, skipped: Sequence[str], warnings: Sequence[str]) -> None:
    """Complete the last entry of a run's provenance.json; of a file that was damaged since, what is known is written.

    Args:
        folder: the run folder, in which `note_start` began the entry.
        skipped: names of the images that could not be read.
        warnings: what was warned of, each once.
    """
    file = folder / "provenance.json"
    *former, entry = _read(file) or [describe_environment(None)]
    try:
        seconds = round((datetime.now(UTC) - datetime.fromisoformat(entry["date"])).total_seconds(), 1)
    except (KeyError, TypeError, ValueError):
        seconds = None
    noted = {"seconds": seconds, "skipped": list(skipped), "warnings": list(warnings)}
    _write(file, [*former, {**entry, **noted}])


def note_evaluation(
    folder: Path, device: torch.device, *, suffix: str, skipped: Sequence[str], warnings: Sequence[str]
) -> None:
    """Write the provenance of an evaluation without training, to a file of its own.

    Args:
        folder: where the evaluation's files are.
        device: of this process.
        suffix: what their names have before their ending.
        skipped: names of the images that could not be read.
        warnings: what was warned of, each once.
    """
    noted = {"skipped": list(skipped), "warnings": list(warnings)}
    _write(folder / f"provenance{suffix}.json", [{**describe_environment(device), **noted}])


def describe_environment(device: torch.device | None) -> dict[str, Any]:
    """The command, versions and device of this process, as plain data; the commit is that of the working folder."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "device": "not known" if device is None else _device_name(device),
        "processes": world_size(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))} | {"torch": torch.__version__},
        "commit": _commit(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    threads = f", {os.cpu_count()} cores, torch on {torch.get_num_threads()}" if device.type == "cpu" else ""
    return f"{device}{threads}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The git commit of the working folder, and whether files differ from it; None where there is none."""
    answers = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(done.stdout.strip())
    commit, changes = answers
    return f"{commit} with uncommitted changes" if changes else commit


def _read(file: Path) -> list[dict[str, Any]]:
    """The entries of a provenance.json; none of a file that is damaged or not there."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _write(file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    write_whole(file, json.dumps(entries, indent=2) + "\n")
