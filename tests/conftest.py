"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
DATA_VARIABLE = "RESNEST_DET_TEST_DATA"


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A test's random weights do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """A function from a folder's name ("coco_tiny", "coco_eval_reference") to its path.

    The data are not part of the repository. They are looked for in the folder that the environment variable
    RESNEST_DET_TEST_DATA names, else in shared/data beside the repository; a test that asks for a folder
    which is not there is skipped.
    """
    beside_the_repository = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get(DATA_VARIABLE, beside_the_repository))

    def folder(name: str) -> Path:
        path = root / name
        if not path.is_dir():
            pytest.skip(f"no folder {path}; set {DATA_VARIABLE} to the folder that holds {name}")
        return path

    return folder


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the package's wheel, built and unpacked: what an installation has."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"
