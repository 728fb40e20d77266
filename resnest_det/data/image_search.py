"""The image files that someone means: named one by one, by a pattern, or by their folder."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from resnest_det.data.files import describe_near, walk_folders
from resnest_det.data.mask_folder import IMAGE_SUFFIXES


def find_images(
    paths: Sequence[str | Path], *, suffixes: Sequence[str] = IMAGE_SUFFIXES, leave_out: Sequence[Path] = ()
) -> list[Path]:
    """The files that are named, and the images that patterns and folders hold, each once.

    Args:
        paths: files, of any suffix; folders, searched with their sub-folders in the order of the files' paths; and
            patterns such as "photos/**/*.jpg", where ** is any number of folders, in the same order. In folders and
            among what a pattern matches, hidden files and folders and files of other suffixes are passed over. Links
            are followed, but for those back to a folder that they lie in.
        suffixes: in small letters; what images, or whatever is looked for, end in.
        leave_out: folders in which the search finds nothing, such as those of earlier results.

    Raises:
        FileNotFoundError: nothing is at a path, or a folder or pattern holds no images.
    """
    found: list[Path] = []
    left_out = [folder.resolve() for folder in leave_out]
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in _files_below(path) if _is_wanted(file, suffixes, left_out)]
            if not inside:
                raise FileNotFoundError(f"{path} holds no images; they end in {', '.join(suffixes)}")
            found += inside
        elif path.exists():
            found.append(path)
        elif glob.has_magic(str(path)):
            matches = sorted(_matches(path))
            inside = [file for file in matches if file.is_file() and _is_wanted(file, suffixes, left_out)]
            if not inside:
                raise FileNotFoundError(f"no image matches {path}; images end in {', '.join(suffixes)}")
            found += inside
        else:
            raise FileNotFoundError(f"there is no image or folder {path}; {describe_near(path, path.suffix)}")
    return list(dict.fromkeys(found))


def _files_below(folder: Path) -> list[Path]:
    return sorted(parent / name for parent, names in walk_folders(folder) for name in names)


def _matches(pattern: Path) -> Iterator[Path]:
    """What a pattern matches; the same path may come twice."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        return
    # Python's own ** follows links in circles.
    place = pattern.parts.index("**")
    head, tail = Path(*pattern.parts[:place]), pattern.parts[place + 1 :] or ("*",)
    for folder in _matches(head) if glob.has_magic(str(head)) else [head]:
        if folder.is_dir():
            for parent, _ in walk_folders(folder):
                yield from _matches(Path(glob.escape(str(parent)), *tail))


def _is_wanted(file: Path, suffixes: Sequence[str], left_out: Sequence[Path]) -> bool:
    """Whether the search is for such a file, and it lies in none of the folders, which are resolved."""
    if not file.name.lower().endswith(tuple(suffixes)):
        return False
    return not left_out or not any(map(file.resolve().is_relative_to, left_out))
