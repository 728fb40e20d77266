"""The random numbers of a run: seeded, and kept in its checkpoints.

What augmentation draws has seeds of its own, see the data sets; these are what a model draws in training, and whatever
of a user's draws from Python's and numpy's global generators.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from resnest_det.distributed import gather_objects, rank


def seed_random_numbers(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> list[dict[str, Any]]:
    """The state of every process's random numbers: Python's, numpy's, and torch's on the CPU and its GPU."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    own = {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }
    return gather_objects(own)


def restore_random_states(states: list[dict[str, Any]]) -> None:
    """Put this process's random numbers into its state of random_states()."""
    own = states[rank()]
    random.setstate(own["python"])
    keys, position, has_gauss, cached = own["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(own["torch"])
    if torch.cuda.is_initialized() and own["cuda"] is not None:
        torch.cuda.set_rng_state(own["cuda"])
