"""Which run lengths are a mask, against a decoder that reads character by character."""

from __future__ import annotations

import random

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from resnest_det.coco_format import encoded_mask, encoded_masks

# pycocotools' extension module answers NumPy's newer protocol in an older way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def counts_in(text: bytes) -> list[int] | None:
    """The run lengths in a compressed string, None where it is not one: the oracle."""
    counts: list[int] = []
    value = digits = 0
    for character in text:
        code = character - 48
        if not 0 <= code <= 63:
            return None
        value |= (code & 31) << 5 * digits
        digits += 1
        if code & 32:
            continue
        if code & 16:
            value -= 1 << 5 * digits
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = digits = 0
    return None if digits or not counts else counts


def random_masks(seed: int, num_masks: int) -> list[tuple[tuple[int, int], bytes]]:
    """Sizes and compressed counts of blobs, noise, full and empty masks."""
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(num_masks):
        height, width = rng.integers(1, 90, 2).tolist()
        mask = (rng.random((height, width)) < rng.choice([0, 0.02, 0.5, 1])).astype(np.uint8)
        mask[: rng.integers(0, height + 1), : rng.integers(0, width + 1)] = 1
        masks.append(((height, width), coco_mask.encode(np.asfortranarray(mask))["counts"]))
    return masks


def test_masks_of_pycocotools_come_back_as_they_are() -> None:
    masks = random_masks(0, 600)  # more than are checked at a time
    expected = [{"size": list(size), "counts": counts} for size, counts in masks]
    assert encoded_masks(masks) == expected
    assert encoded_masks([(size, counts.decode()) for size, counts in masks]) == expected
    lists = [(size, counts_in(counts) or []) for size, counts in masks]
    assert encoded_masks(lists) == expected


def test_damaged_masks_are_found_among_others() -> None:
    rng = random.Random(0)
    masks, num_damaged = random_masks(1, 600), 0
    for place in rng.sample(range(600), 60):
        (height, width), text = masks[place]
        damaged = bytearray(text)
        damaged[rng.randrange(len(text))] = rng.randrange(40, 120)
        masks[place] = (height, width), bytes(damaged[: rng.randint(0, len(text))] if rng.random() < 0.3 else damaged)
    for (size, text), mask in zip(masks, encoded_masks(masks), strict=True):
        counts = counts_in(text)
        is_mask = counts is not None and min(counts) >= 0 and sum(counts) == size[0] * size[1]
        assert mask == ({"size": list(size), "counts": text} if is_mask else None)
        assert encoded_mask(*size, text) == mask
        num_damaged += not is_mask
    assert num_damaged > 50


def test_no_masks() -> None:
    assert encoded_masks([]) == []
