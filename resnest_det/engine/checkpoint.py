"""Checkpoints: everything a run needs to go on, written so that a crash leaves the previous one intact.

A checkpoint is plain data (tensors, numbers, strings, lists and dicts), so that it is read without running code. A run
folder's newest is `last.pt`, and those before it are `last-1.pt`, `last-2.pt`, and so on.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from resnest_det.backbones.weights import read_plain
from resnest_det.distributed import gather_objects, rank

_FORMAT = 2


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint beside `path`, force it to disk, then rename it into place.

    Args:
        path: the file; what stood there before stays until the new one is complete.
        content: plain data.

    Raises:
        OSError: the file could not be written; `path` is as it was.
    """
    _write_beside(path, content).replace(path)


def save_last(folder: Path, content: dict[str, Any], *, keep: int, replace: bool) -> None:
    """Write `last.pt` of a run folder; at every moment, one of its checkpoints is complete.

    Args:
        folder: the run folder.
        content: plain data.
        keep: how many checkpoints stay, with this one; at least 1.
        replace: put it in the place of the last one, instead of before it.

    Raises:
        OSError: the file could not be written; the folder is as it was.
    """
    last = folder / "last.pt"
    partial = _write_beside(last, content)
    if last.exists() and not replace:
        former = [_former(folder, number) for number in range(1, keep)]
        for newer, older in reversed(list(itertools.pairwise(former))):
            if newer.exists():
                newer.replace(older)
        if former:
            _duplicate(last, former[0])
    partial.replace(last)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of save_checkpoint or save_last, onto the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged or something else.
    """
    return _checked(path, _read(path))


def load_last(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint of a run folder that can be read, the same on every process.

    Damaged ones before it are passed over with a warning, and renamed, such as to `last.pt.damaged`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: all of them are damaged, or they are of another version.
    """
    paths = [folder / "last.pt", *sorted(folder.glob("last-*.pt"), key=_number)]
    paths = [path for path in paths if path.is_file()] or paths[:1]
    content, chosen = None, None
    if rank() == 0:
        damaged: list[tuple[Path, ValueError]] = []
        for path in paths:
            try:
                _check_sums(path)
                content, chosen = _read(path), path
                break
            except ValueError as error:
                if path == paths[-1]:
                    raise
                damaged.append((path, error))
        for path, reason in damaged:
            warnings.warn(f"{reason}; the run goes on from the checkpoint before it", stacklevel=2)
            path.replace(path.with_name(path.name + ".damaged"))
    chosen = gather_objects(chosen)[0]
    assert chosen is not None
    return _checked(chosen, _read(chosen) if content is None else content)


def trained_class_names(path: Path) -> dict[int, str] | None:
    """The classes that a checkpoint of a run was trained on; None of any other file, and where there is none."""
    try:
        content = _read(path)
    except (ValueError, OSError):
        return None  # whoever loads its weights says what is wrong
    return content.get("class_names") if isinstance(content, dict) else None


def check_class_names(path: Path, class_names: dict[int, str], content: Any = None) -> None:
    """Refuse a checkpoint whose classes are not `class_names`; one that does not name its classes passes.

    Args:
        path: the file.
        class_names: of the data set.
        content: what the file holds, where it has been read already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the checkpoint has other classes, or the same in another order, or it is damaged.
    """
    content = _read(path) if content is None else content
    trained = content.get("class_names") if isinstance(content, dict) else None
    if trained is not None and trained != class_names:
        labels = [label for label in {**trained, **class_names} if trained.get(label) != class_names.get(label)]
        first = ", ".join(f"{label} is {trained.get(label)!r} and {class_names.get(label)!r}" for label in labels[:3])
        raise ValueError(
            f"{path} was trained on other classes than the data set's: {len(trained)} and {len(class_names)} classes, "
            f"{len(labels)} labels differ ({first}{', ...' if len(labels) > 3 else ''}); labels would be taken for one "
            f"another. Use data with the checkpoint's list of classes, or train anew"
        )


def _write_beside(path: Path, content: dict[str, Any]) -> Path:
    """The checkpoint in a file beside `path`, complete and on the disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            torch.save({"format": _FORMAT, **content}, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException as error:
        partial.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):  # torch.save wraps what the stream raises
            free = shutil.disk_usage(path.parent).free / 2**20
            raise OSError(
                cause.errno or errno.EIO,
                f"the checkpoint could not be written ({cause.strerror}; {free:.0f} MiB are free). The one before it "
                f"is intact: make room, then resume the run",
                str(path),
            ) from error
        raise
    return partial


def _check_sums(path: Path) -> None:
    """Refuse a file whose bytes are not those that were written, which torch.load does not notice."""
    _check_exists(path)
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged, or not written by torch.save: {error}") from error
    if wrong is not None:
        raise ValueError(f"{path} is damaged: the check sum of its entry {wrong} is wrong")


def _duplicate(file: Path, copy: Path) -> None:
    """The file under a second name; where the file system knows no links, by copying it."""
    partial = copy.with_name(copy.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(file, partial)
    except OSError:
        shutil.copyfile(file, partial)
    partial.replace(copy)


def _former(folder: Path, number: int) -> Path:
    return folder / f"last-{number}.pt"


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("last-")
    return int(digits) if digits.isdigit() else 0


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: a run writes its first one after its first epoch")


def _read(path: Path) -> Any:
    _check_exists(path)
    return read_plain(path)


def _checked(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version (format {_FORMAT}): write it anew by training")
    return content
