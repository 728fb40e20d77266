from __future__ import annotations

import random

import numpy as np
import torch

from resnest_det.engine import seed_random_numbers
from resnest_det.engine.random_numbers import random_states, restore_random_states


def draw() -> tuple[float, float, float, float]:
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()


def test_they_go_on_where_they_were() -> None:
    draw()
    states = random_states()
    drawn = [draw(), draw()]
    restore_random_states(states)
    assert [draw(), draw()] == drawn


def test_a_seed_gives_the_same_and_another_seed_others() -> None:
    drawn = []
    for seed in (7, 7, 2**40 + 1):
        seed_random_numbers(seed)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(one != other for one, other in zip(drawn[0], drawn[2], strict=True))
