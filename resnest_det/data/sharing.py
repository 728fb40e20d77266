"""A data set that is built once a machine, however many of the run's processes it serves."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from resnest_det.data.files import ImageFiles
from resnest_det.distributed import gather_objects, local_rank, rank, world_size

T = TypeVar("T")
DatasetT = TypeVar("DatasetT", bound=ImageFiles[Any])


def once_per_machine(build: Callable[[], DatasetT]) -> DatasetT:
    """The data set that `build` returns, read by one process of each machine and shared with the others there.

    The first process of a machine builds it and writes it to a temporary file, which all of its processes map and which
    is removed before this returns: the machine holds the arrays once, in its page cache. Every process of the run has
    to call this. In a single process it is `build()`.

    Args:
        build: makes the data set. Only the first process of each machine calls it, and hears its warnings.

    Returns:
        The data set. Its `skipped` lists what this process and its own workers skipped.

    Raises:
        ValueError: the data set cannot be pickled.
        OSError: the folder for temporary files has no room.
        Exception: whatever `build` raises, on every process, with the same message.
    """
    if world_size() == 1:
        return build()
    with ExitStack() as until_mapped:

        def write() -> Path | None:
            if local_rank() != 0:
                return None
            dataset = build()
            folder = until_mapped.enter_context(TemporaryDirectory(prefix="resnest-det-"))
            return _write(dataset, Path(folder))

        files = gather_objects(_unless_any_fails(write))

        def map_file() -> DatasetT:
            # torchrun numbers the processes of a machine one after another, so this is its first one's.
            file = files[rank() - local_rank()]
            assert file is not None
            # Not only weights, but the file is our own, and nobody else could write to it.
            dataset: DatasetT = torch.load(file, mmap=True, weights_only=False)
            return dataset

        return _unless_any_fails(map_file)


def _unless_any_fails(step: Callable[[], T]) -> T:
    """This process's result of `step`; an error of one process is raised on all, so that none waits for it for ever."""
    result, error = None, None
    try:
        result = step()
    except Exception as raised:
        error = raised
    errors = gather_objects(None if error is None else _as_it_travels(error))
    if error is not None:
        raise error
    for other in errors:
        if other is not None:
            raise other
    return result  # type: ignore[return-value]  # without an error, there is one


def _as_it_travels(error: Exception) -> Exception:
    """The error, or one of its kind with its message where pickling would not bring it back."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # a class of its own may raise anything here
        pass
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def _write(dataset: ImageFiles[Any], folder: Path) -> Path:
    """The data set as a file in `folder`, for this user alone."""
    file = folder / "dataset.pt"
    file.touch(mode=0o600)
    try:
        with file.open("wb") as stream:
            torch.save(dataset, stream)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{type(dataset).__name__} cannot be given to the other processes of this machine ({error}); build it, its "
            f"transform above all, of classes and functions of a module: a lambda or a function within a function "
            f"cannot be pickled"
        ) from error
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):  # torch.save wraps what the stream raises
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise OSError(
            cause.errno or errno.EIO,
            f"the data set could not be written for the other processes of this machine ({cause.strerror}; {free:.0f} "
            f"MiB are free): make room, or set TMPDIR to another folder",
            os.fspath(folder.parent),
        ) from error
    return file
