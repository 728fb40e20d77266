"""The image files that someone means: named one by one, by a pattern, or by their folder."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from resnest_det.data.files import describe_near
from resnest_det.data.mask_folder import IMAGE_SUFFIXES


def find_images(
    paths: Sequence[str | Path], *, suffixes: Sequence[str] = IMAGE_SUFFIXES, leave_out: Sequence[Path] = ()
) -> list[Path]:
    """The files that are named, and the images that patterns and folders hold, each once.

    Args:
        paths: files, of any suffix; folders, searched with their sub-folders in the order of the files' paths; and
            patterns such as "photos/**/*.jpg", where ** is any number of folders, in the same order. In folders and
            among what a pattern matches, hidden files and folders and files of other suffixes are passed over.
        suffixes: in small letters; what images, or whatever is looked for, end in.
        leave_out: folders in which the search finds nothing, such as those of earlier results.

    Raises:
        FileNotFoundError: nothing is at a path, or a folder or pattern holds no images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in _files_below(path) if _is_wanted(file, suffixes, leave_out)]
            if not inside:
                raise FileNotFoundError(f"{path} holds no images; they end in {', '.join(suffixes)}")
            found += inside
        elif path.exists():
            found.append(path)
        elif glob.has_magic(str(path)):
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207 (Path.glob takes no absolute pattern)
            inside = [file for file in matches if file.is_file() and _is_wanted(file, suffixes, leave_out)]
            if not inside:
                raise FileNotFoundError(f"no image matches {path}; images end in {', '.join(suffixes)}")
            found += inside
        else:
            raise FileNotFoundError(f"there is no image or folder {path}; {describe_near(path, path.suffix)}")
    return list(dict.fromkeys(found))


def _files_below(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _is_wanted(file: Path, suffixes: Sequence[str], leave_out: Sequence[Path]) -> bool:
    if not file.name.lower().endswith(tuple(suffixes)):
        return False
    return not any(file.resolve().is_relative_to(folder.resolve()) for folder in leave_out)
