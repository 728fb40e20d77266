"""Where the files are that are shipped beside the package: configs/, train_det.py and train_seg.py."""

from __future__ import annotations

from pathlib import Path


def shipped_file(name: str) -> Path:
    """A file or folder of the repository's top level, which a wheel has within the package.

    Args:
        name: "configs", "train_det.py" or "train_seg.py".

    Raises:
        FileNotFoundError: it is in neither place: the package was copied without it.
    """
    package = Path(__file__).parent
    places = [package / "shipped" / name, package.parent / name]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(
        f"{name} is neither at {places[0]}, where an installation has it, nor at {places[1]}, where a clone has it; "
        f"install the package again"
    )
