"""A file of weights for the tests of reading and of finding files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnest_det import create_backbone


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of resnet18's random weights with 1000 classes."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("small") / "resnet18.pth"
    torch.save(create_backbone("resnet18").state_dict(), file)
    return file


@pytest.fixture
def state(small: Path) -> dict[str, torch.Tensor]:
    return torch.load(small, weights_only=True)
