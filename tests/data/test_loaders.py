"""Samplers and loaders: which images, how often, with which seed, on which rank, in which process."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnest_det.data import CocoDetection, DetectionAugmentation, error_message, eval_loader, train_loader
from resnest_det.data.loaders import Draw, EvaluationBatchSampler, GroupedBatchSampler, collate, repeat_factors

RATIOS = torch.tensor([1.5] * 23 + [0.6] * 10 + [1.0] * 4)


def indices(sampler: GroupedBatchSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return [[draw.index for draw in batch] for batch in sampler]


# --- GroupedBatchSampler


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 12, 100])
@pytest.mark.parametrize("num_images", [3, 7, 37])
def test_every_image_at_most_once_in_as_many_full_batches_as_promised(
    group: bool, world_size: int, batch_size: int, num_images: int
) -> None:
    for epoch in range(3):
        batches = []
        for rank in range(world_size):
            sampler = GroupedBatchSampler(
                RATIOS[-num_images:], batch_size, seed=1, group=group, rank=rank, world_size=world_size
            )
            mine = indices(sampler, epoch)
            size = min(batch_size, num_images // world_size)
            assert len(mine) == len(sampler) == num_images // size // world_size
            assert all(len(batch) == size for batch in mine)
            batches += mine
        drawn = [index for batch in batches for index in batch]
        assert len(set(drawn)) == len(drawn)
        assert num_images - len(drawn) < size * world_size
        assert set(drawn) <= set(range(num_images))


def test_batches_are_of_one_orientation_but_for_the_pooled_rest() -> None:
    landscape = (RATIOS >= 1).tolist()

    def num_mixed(group: bool) -> int:
        batches = indices(GroupedBatchSampler(RATIOS, 4, seed=0, group=group))
        return sum(len({landscape[index] for index in batch}) > 1 for batch in batches)

    assert num_mixed(group=True) <= 1  # 27 landscape and 10 portrait images leave 3 + 2 over
    assert num_mixed(group=False) > 1


def test_order_changes_with_epoch_and_seed_and_comes_again() -> None:
    sampler = GroupedBatchSampler(RATIOS, 4, seed=0)
    assert indices(sampler, 1) == indices(GroupedBatchSampler(RATIOS, 4, seed=0), 1)
    assert indices(sampler, 0) != indices(sampler, 1)
    assert indices(sampler, 0) != indices(GroupedBatchSampler(RATIOS, 4, seed=1), 0)


def test_over_epochs_no_image_is_left_out_for_good() -> None:
    sampler = GroupedBatchSampler(RATIOS, 16, seed=0)  # 37 images: 5 sit out each epoch
    seen = {index for epoch in range(20) for batch in indices(sampler, epoch) for index in batch}
    assert seen == set(range(37))


def test_seed_of_a_draw_depends_on_seed_epoch_and_image_only() -> None:
    def seeds(epoch: int, seed: int = 3, **arguments: Any) -> dict[int, int]:
        sampler = GroupedBatchSampler(RATIOS, seed=seed, **arguments)
        sampler.set_epoch(epoch)
        return {draw.index: draw.seed for batch in sampler for draw in batch}

    all_of_them = seeds(2, batch_size=1)
    assert len(set(all_of_them.values())) == 37
    for other in (seeds(2, batch_size=5, group=False), seeds(2, batch_size=2, rank=1, world_size=3)):
        assert other.items() <= all_of_them.items()
    for other in (seeds(1, batch_size=1), seeds(2, seed=4, batch_size=1)):
        assert not set(other.values()) & set(all_of_them.values())


def test_order_and_seeds_are_those_of_runs_done_before() -> None:
    sampler = GroupedBatchSampler([1.5, 0.5, 1.5, 1.5, 0.5, 1.0], 2, seed=3)
    sampler.set_epoch(1)
    assert list(sampler) == [
        [Draw(2, 11679836372483601169), Draw(0, 11425928242767342472)],
        [Draw(5, 1636926441038586439), Draw(3, 12721837920280094598)],
        [Draw(1, 14964165266733655597), Draw(4, 3597864690932655003)],
    ]


# --- an epoch that begins in its middle


@pytest.mark.parametrize("factors", [None, torch.linspace(1, 3, 37)], ids=["once", "repeated"])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_an_epoch_begun_at_any_batch_ends_as_the_unbroken_one(
    factors: torch.Tensor | None, rank: int, world_size: int
) -> None:
    sampler = GroupedBatchSampler(RATIOS, 4, seed=2, repeat_factors=factors, rank=rank, world_size=world_size)
    sampler.set_epoch(5)
    unbroken = list(sampler)
    for first_batch in range(len(unbroken) + 1):
        sampler.set_epoch(5, first_batch)
        assert list(sampler) == unbroken[first_batch:]
        assert len(sampler) == len(unbroken)
    sampler.set_epoch(5)
    assert list(sampler) == unbroken


@pytest.mark.parametrize("first_batch", [-1, 10])
def test_first_batch_lies_in_the_epoch(first_batch: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"first_batch={first_batch} is outside 0..9, the batches of")):
        GroupedBatchSampler(RATIOS, 4, seed=0).set_epoch(0, first_batch)


# --- repeat factors


def drawn(factors: Sequence[float], epoch: int, **arguments: Any) -> list[Draw]:
    sampler = GroupedBatchSampler(RATIOS[: len(factors)], repeat_factors=torch.tensor(factors), seed=0, **arguments)
    sampler.set_epoch(epoch)
    return [draw for batch in sampler for draw in batch]


def test_repeats_are_the_factor_rounded_and_its_mean_over_epochs() -> None:
    factors = [1.0, 1.25, 1.5, 2.0, 3.7, 1.0, 5.9, 1.1, 1.3, 2.25]  # they add up to 21
    counts = np.array([np.bincount([d.index for d in drawn(factors, e, batch_size=1)]) for e in range(2000)])
    assert (counts.sum(axis=1) == 21).all()
    assert ((counts == np.floor(factors)) | (counts == np.ceil(factors))).all()
    # A mean over 2000 epochs of a rounding up or down has a standard deviation of at most 0.5 / sqrt(2000) = 0.011.
    np.testing.assert_allclose(counts.mean(axis=0), factors, atol=0.045)


@pytest.mark.parametrize("group", [True, False])
def test_every_epoch_and_rank_has_as_many_batches_with_repeats(group: bool) -> None:
    factors = torch.linspace(1, 2.6, 37)  # 66.6 draws an epoch
    for world_size in (1, 2, 3):
        for epoch in range(20):
            lengths = []
            for rank in range(world_size):
                sampler = GroupedBatchSampler(
                    RATIOS, 4, seed=1, group=group, repeat_factors=factors, rank=rank, world_size=world_size
                )
                mine = indices(sampler, epoch)
                assert all(len(batch) == 4 for batch in mine)
                lengths += [len(mine), len(sampler)]
            assert set(lengths) == {66 // 4 // world_size}


def test_copies_of_an_image_are_augmented_differently_and_the_same_on_any_number_of_ranks() -> None:
    factors = [3.5, 1.0, 2.0, 1.0, 8.5]
    alone = drawn(factors, 4, batch_size=1)
    assert max(Counter(draw.index for draw in alone).values()) >= 8
    assert len({draw.seed for draw in alone}) == len(alone) == 16
    shared = [d for rank in range(2) for d in drawn(factors, 4, batch_size=2, rank=rank, world_size=2)]
    assert set(shared) == set(alone)


def test_copies_of_an_image_meet_in_a_batch_by_chance_only() -> None:
    draws = [drawn([4.0] + [1.0] * 6, epoch, batch_size=2) for epoch in range(300)]
    meetings = [
        first.index == second.index for epoch in draws for first, second in zip(epoch[::2], epoch[1::2], strict=True)
    ]
    assert len(meetings) == 300 * 5
    assert np.mean(meetings) == pytest.approx(4 / 10 * 3 / 9, abs=0.05)  # five standard deviations


def test_factors_of_one_draw_every_image_once() -> None:
    assert sorted(draw.index for draw in drawn([1.0] * 37, 0, batch_size=1)) == list(range(37))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1.0] * 36, "repeat_factors has the shape (36,) for 37 images"),
        ([1.0] * 36 + [0.5], "repeat_factors[36]=0.5 is outside 1..1000"),
        ([1.0, float("nan")] + [1.0] * 35, "repeat_factors[1]=nan is outside 1..1000"),
        ([1e9] + [1.0] * 36, "repeat_factors[0]=1000000000.0 is outside 1..1000"),
    ],
)
def test_batch_sampler_refuses_factors(factors: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        GroupedBatchSampler(RATIOS, 4, seed=0, repeat_factors=torch.tensor(factors))


def flat(labels: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets and labels, as `repeat_factors` takes them."""
    offsets = torch.tensor([0, *np.cumsum([len(of_image) for of_image in labels])])
    return offsets, torch.tensor([label for of_image in labels for label in of_image])


def test_repeat_factors_follow_the_rarest_class_of_an_image() -> None:
    labels = [[1, 1, 1], [1, 2], [], [1], [1, 2, 7, 7], [1], [1], [1]]  # class 1 in 7 of 8 images, 2 in 2, 7 in 1
    factors = repeat_factors(*flat(labels), threshold=0.5)
    assert factors.dtype == torch.float64
    expected = [1, np.sqrt(0.5 / (2 / 8)), 1, 1, np.sqrt(0.5 / (1 / 8)), 1, 1, 1]
    np.testing.assert_allclose(factors, expected, rtol=1e-15)


def test_repeat_factors_equal_the_papers_formula_written_plainly() -> None:
    rng = np.random.default_rng(0)
    labels = [rng.zipf(1.5, rng.integers(0, 6)).clip(max=40).tolist() for _ in range(200)]
    expected = []
    for of_image in labels:
        fractions = [sum(c in other for other in labels) / len(labels) for c in of_image]
        expected.append(max([1.0, *(max(1.0, (0.05 / fraction) ** 0.5) for fraction in fractions)]))
    factors = repeat_factors(*flat(labels), threshold=0.05)
    np.testing.assert_allclose(factors, expected, rtol=1e-15)
    assert 1 < np.mean(expected) < 2


def test_images_without_any_label_come_once() -> None:
    assert repeat_factors(torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 0.1).tolist() == [1] * 3


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.5, float("nan")])
def test_threshold_is_a_fraction(threshold: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"threshold={threshold} is not above 0 and at most 1")):
        repeat_factors(torch.tensor([0, 1]), torch.tensor([1]), threshold)


@pytest.mark.parametrize("offsets", [[0, 1], [1, 2], [0, 3, 2], [0], []])
def test_offsets_belong_to_the_labels(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"to {offsets[-1:]} do not divide 2 labels")):
        repeat_factors(torch.tensor(offsets, dtype=torch.int64), torch.tensor([1, 2]), 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"seed": -1}, "seed=-1 is negative"),
        ({"rank": 2, "world_size": 2}, "rank=2 is outside 0..1, the ranks of world_size=2"),
        ({"rank": 0, "world_size": 40}, "37 images cannot be divided over 40 processes"),
    ],
)
def test_batch_sampler_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        GroupedBatchSampler(RATIOS, **({"batch_size": 4, "seed": 0} | arguments))


# --- EvaluationBatchSampler


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (10, 1), (2, 3), (12, 4), (0, 2)])
def test_evaluation_batches_are_the_same_on_any_number_of_ranks(
    num_images: int, batch_size: int, world_size: int
) -> None:
    everything = list(range(num_images))
    expected = [everything[start : start + batch_size] for start in range(0, num_images, batch_size)]
    samplers = [
        EvaluationBatchSampler(num_images, batch_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for rank, sampler in enumerate(samplers):
        assert list(sampler) == expected[rank::world_size]
        assert len(sampler) == len(expected[rank::world_size])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 1, "rank": -1, "world_size": 2}, "rank=-1 is outside 0..1"),
        ({"batch_size": 0}, "batch_size=0 is below 1"),
    ],
)
def test_evaluation_sampler_refuses(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EvaluationBatchSampler(5, **arguments)


# --- collate


def test_collate_drops_what_was_skipped() -> None:
    pictures = [torch.zeros(3, 4, 5), torch.ones(3, 6, 2)]
    batch = collate([(pictures[0], {"image_id": 1}, "a"), None, (pictures[1], {"image_id": 2}, "b")])
    assert batch[0][0] is pictures[0]
    assert batch[0][1] is pictures[1]
    assert batch[1:] == ([{"image_id": 1}, {"image_id": 2}], ["a", "b"])
    assert collate([None, None]) == ([], [], [])


# --- the loaders


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Ten noisy pictures, three of them portraits, each with up to three boxes."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(10):
        width, height = (32, 24) if i % 3 else (24, 32)
        name = f"{i:02d}.png"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / name)
        images.append({"id": 100 + i, "file_name": name, "width": width, "height": height})
        for _ in range(i % 4):
            bbox = [*rng.uniform(0, 12, 2).round(2), *rng.uniform(2, 12, 2).round(2)]
            annotations.append({"id": len(annotations), "image_id": 100 + i, "category_id": 1, "bbox": bbox})
    file = tmp_path / "instances.json"
    categories = [{"id": 1, "name": "thing"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return folder, file


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def augmented(files: tuple[Path, Path]) -> CocoDetection:
    transform = DetectionAugmentation((16, 24, 40), 60, vertical_flip=0.5, color_jitter=0.5)
    return CocoDetection(*files, train=True, transform=transform)


def epochs(files: tuple[Path, Path], num_workers: int) -> list[list[Any]]:
    loader = train_loader(augmented(files), batch_size=3, num_workers=num_workers, seed=5)
    result = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        result.append(list(loader))
    return result


def test_any_number_of_workers_yields_the_same_batches(files: tuple[Path, Path]) -> None:
    alone, two = epochs(files, 0), epochs(files, 2)
    assert [len(epoch) for epoch in alone] == [3, 3]
    assert same(alone, two)
    assert not same(alone[0], alone[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_goes_on_in_the_middle_of_an_epoch(files: tuple[Path, Path], num_workers: int) -> None:
    loader = train_loader(augmented(files), batch_size=2, num_workers=num_workers, seed=5)
    loader.batch_sampler.set_epoch(1)
    unbroken = list(loader)
    loader.batch_sampler.set_epoch(0)
    next(iter(loader))  # left with batches on their way from the workers, which persist
    loader.batch_sampler.set_epoch(1, first_batch=3)
    assert same(list(loader), unbroken[3:])
    assert len(loader) == len(unbroken) == 5


def test_train_loader_repeats_images(files: tuple[Path, Path]) -> None:
    factors = torch.tensor([1.0] * 9 + [6.0])
    loader = train_loader(augmented(files), batch_size=5, num_workers=0, seed=0, repeat_factors=factors)
    names = Counter(name for batch in loader for name in batch[2])
    assert names == Counter([f"{i:02d}.png" for i in range(10)] + ["09.png"] * 5)


def test_train_loader_yields_lists_of_images_targets_and_names(files: tuple[Path, Path]) -> None:
    data = augmented(files)
    loader = train_loader(data, batch_size=4, num_workers=0, seed=0, group_by_aspect=False)
    assert len(loader) == 2
    assert loader.pin_memory == torch.cuda.is_available()
    for images, targets, names in loader:
        assert len(images) == len(targets) == len(names) == 4
        for picture, target, name in zip(images, targets, names, strict=True):
            assert picture.dtype == torch.uint8
            assert target["image_id"] == 100 + int(Path(name).stem)
            assert len(target["boxes"]) == len(target["labels"]) == len(target["area"])


def test_loading_draws_nothing_from_the_global_generator(files: tuple[Path, Path]) -> None:
    before = torch.random.get_rng_state()
    list(train_loader(augmented(files), batch_size=2, num_workers=0, seed=0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_eval_loader_yields_every_image_once_in_order(files: tuple[Path, Path], num_workers: int) -> None:
    data = CocoDetection(*files)
    batches = list(eval_loader(data, batch_size=4, num_workers=num_workers))
    assert [len(names) for _, _, names in batches] == [4, 4, 2]
    assert [name for _, _, names in batches for name in names] == [f"{i:02d}.png" for i in range(10)]
    flat = [(p, t) for images, targets, _ in batches for p, t in zip(images, targets, strict=True)]
    assert same(flat, list(data))


def test_skipped_images_of_workers_are_counted_and_left_out(files: tuple[Path, Path]) -> None:
    for name in ("03.png", "04.png", "08.png"):
        (files[0] / name).write_bytes(b"broken")
    data = CocoDetection(*files, on_unreadable="skip")
    batches = list(eval_loader(data, batch_size=2, num_workers=2))
    assert [len(names) for _, _, names in batches] == [2, 1, 1, 2, 1]
    assert data.skipped == ["03.png", "04.png", "08.png"]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:skipped")
def test_next_readable_image_comes_in_the_place_of_a_skipped_one(files: tuple[Path, Path], num_workers: int) -> None:
    for name in ("03.png", "04.png", "09.png"):
        (files[0] / name).write_bytes(b"broken")
    data = CocoDetection(*files, train=True, on_unreadable="skip")
    loader = train_loader(data, batch_size=2, num_workers=num_workers, seed=0)
    replaced = {3: 5, 4: 5, 9: 0}
    names = [batch[2] for batch in loader]
    assert names == [[f"{replaced.get(i, i):02d}.png" for i in batch] for batch in indices(loader.batch_sampler)]
    assert data.skipped == ["03.png", "04.png", "09.png"]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:skipped")
def test_training_without_a_readable_image_ends(files: tuple[Path, Path], num_workers: int) -> None:
    for file in files[0].iterdir():
        file.write_bytes(b"broken")
    loader = train_loader(
        CocoDetection(*files, train=True, on_unreadable="skip"), batch_size=2, num_workers=num_workers, seed=0
    )
    with pytest.raises(
        ValueError, match=r"none of the 10 training images can be read, neither \d\d\.png nor any other"
    ):
        next(iter(loader))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_a_worker_names_the_image(files: tuple[Path, Path], num_workers: int) -> None:
    (files[0] / "03.png").write_bytes(b"broken")
    loader = eval_loader(CocoDetection(*files), batch_size=2, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"cannot read the image .*03\.png \(UnidentifiedImageError"):
        list(loader)


@pytest.mark.slow
def test_spawned_workers(files: tuple[Path, Path]) -> None:
    """The data set, its transform and the loader's own parts travel to a spawned worker."""
    alone = next(iter(train_loader(augmented(files), batch_size=3, num_workers=0, seed=5)))
    loader = train_loader(augmented(files), batch_size=3, num_workers=1, seed=5)
    loader.multiprocessing_context = "spawn"
    assert same(next(iter(loader)), alone)


@pytest.mark.parametrize("make", [train_loader, eval_loader])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0, "num_workers": 0}, "batch_size=0 is below 1"),
        ({"batch_size": 1, "num_workers": -1}, "num_workers=-1 is negative; use 0"),
    ],
)
def test_loaders_refuse(
    files: tuple[Path, Path], make: Callable[..., Any], arguments: dict[str, int], message: str
) -> None:
    seed = {"seed": 0} if make is train_loader else {}
    with pytest.raises(ValueError, match=re.escape(message)):
        make(CocoDetection(*files), **arguments, **seed)


class Bare:
    """The least that the loaders ask for; its targets are strings."""

    def __len__(self) -> int:
        return 5

    def load(self, index: int, seed: int | None = None) -> tuple[torch.Tensor, str] | None:
        return torch.tensor(index), f"seed {seed}"

    def file_name(self, index: int) -> str:
        return f"{index}.jpg"


def test_loaders_take_any_data_set_that_loads() -> None:
    assert list(eval_loader(Bare(), batch_size=5, num_workers=0)) == [
        ([torch.tensor(index) for index in range(5)], ["seed None"] * 5, [f"{index}.jpg" for index in range(5)])
    ]
    batches = list(train_loader(Bare(), batch_size=2, num_workers=0, seed=0, group_by_aspect=False))
    sampler = GroupedBatchSampler(torch.ones(5), 2, seed=0, group=False)
    assert [targets for _, targets, _ in batches] == [[f"seed {draw.seed}" for draw in batch] for batch in sampler]
    assert [names for _, _, names in batches] == [[f"{index}.jpg" for index in batch] for batch in indices(sampler)]


class Nested:
    """Targets of many kinds, among them tensors that share memory, hold nothing, or are small or large."""

    def __len__(self) -> int:
        return 3

    def load(self, index: int, seed: int | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
        image = torch.arange(3 * 300 * 300).view(3, 300, 300).to(torch.uint8) + index
        small = torch.arange(6, dtype=torch.float64).view(2, 3)
        parts = (small[:, 1], [torch.zeros(0, 4), torch.tensor(True)], "text")
        return image, {"parts": parts, "masks": image[:, ::2], "id": index, "flipped": small.T, "half": small.half()}

    def file_name(self, index: int) -> str:
        return f"{index}.jpg"


def test_batches_of_workers_are_those_of_the_main_process() -> None:
    (alone,), (sent,) = (eval_loader(Nested(), batch_size=3, num_workers=number) for number in (0, 1))
    assert same(alone, sent)
    assert all(image.is_contiguous() for image in sent[0])


def test_a_batch_arrives_in_one_block_that_small_tensors_do_not_keep() -> None:
    loader = eval_loader(Nested(), batch_size=3, num_workers=1)
    images, targets, _ = next(iter(loader))
    images[0].fill_(7)  # a batch is the receiver's own, one image apart from the other
    assert (images[1] != 7).any()
    blocks = {tensor.untyped_storage().data_ptr() for tensor in (*images, *(target["masks"] for target in targets))}
    assert len(blocks) == 1
    assert images[0].is_shared()
    for target in targets:
        assert target["flipped"].untyped_storage().nbytes() == 48
        assert not target["flipped"].is_shared()


def test_grouping_needs_aspect_ratios() -> None:
    with pytest.raises(ValueError, match="which Bare does not know; use group_by_aspect=False"):
        train_loader(Bare(), batch_size=2, num_workers=0, seed=0)


def test_coco_tiny_from_end_to_end(real_data: Callable[[str], Path]) -> None:
    folder = real_data("coco_tiny")
    data = CocoDetection(
        folder / "train2017",
        folder / "annotations" / "instances_train2017.json",
        train=True,
        transform=DetectionAugmentation((160, 240), 400, color_jitter=0.5),
    )
    loader = train_loader(data, batch_size=8, num_workers=0, seed=0)
    seen = []
    for images, targets, _ in loader:
        for picture, target in zip(images, targets, strict=True):
            height, width = picture.shape[1:]
            boxes = target["boxes"]
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes >= 0).all()
            assert (boxes <= torch.tensor([width, height, width, height])).all()
            assert not target["iscrowd"].any()
            seen.append(target["image_id"])
    assert len(set(seen)) == len(seen) == 40


# --- errors of workers


class Broken(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        try:
            raise OSError("bytes ran out")
        except OSError as error:
            raise ValueError("cannot read a.jpg: 3 bytes\nand a second line") from error


@pytest.mark.parametrize("num_workers", [0, 1])
def test_message_of_an_error_is_the_same_from_a_worker(num_workers: int) -> None:
    with pytest.raises(ValueError, match="a.jpg") as error:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=num_workers)))
    assert ("Traceback" in str(error.value)) == (num_workers > 0)
    assert error_message(error.value) == "cannot read a.jpg: 3 bytes\nand a second line"


# --- signals and the end of workers


@pytest.fixture
def no_garbage() -> None:
    """No iterator that an earlier error keeps in a cycle: a worker that collects one can lock up as it begins."""
    gc.collect()


class SlowWorkers:
    """Its targets name the worker's process, and are so long that a worker waits for the main process to read."""

    def __len__(self) -> int:
        return 12

    def load(self, index: int, seed: int | None = None) -> tuple[torch.Tensor, tuple[int, str]]:
        time.sleep(0.02)
        return torch.tensor(index), (os.getpid(), "x" * 100_000)

    def file_name(self, index: int) -> str:
        return f"{index}.jpg"


@pytest.mark.usefixtures("no_garbage")
@pytest.mark.parametrize(
    ("number", "context"),
    [
        (signal.SIGINT, "fork"),
        (signal.SIGTERM, "fork"),
        pytest.param(signal.SIGTERM, "spawn", marks=pytest.mark.slow),
    ],
)
def test_workers_go_on_when_everything_is_signalled(number: signal.Signals, context: str) -> None:
    loader = eval_loader(SlowWorkers(), batch_size=1, num_workers=2)
    loader.multiprocessing_context = context
    batches = iter(loader)
    pids = {target[0] for _ in range(2) for target in next(batches)[1]}
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, number)
    assert {target[0] for batch in batches for target in batch[1]} == pids


def run_and_end(end: str, pids: Connection) -> None:
    """A main process with two workers in the middle of their work."""
    loader = eval_loader(SlowWorkers(), batch_size=1, num_workers=2)
    batches = iter(loader)
    pids.send([next(batches)[1][0][0] for _ in range(2)])
    globals()["kept"] = batches  # alive when the interpreter ends
    if end == "error":
        raise RuntimeError("wanted")
    if end == "killed":
        time.sleep(60)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.usefixtures("no_garbage")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["return", "error", "killed"])
def test_workers_end_with_the_main_process(end: str) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    main_process = context.Process(target=run_and_end, args=(end, sender))
    main_process.start()
    pids = receiver.recv()
    try:
        assert len(set(pids)) == 2
        if end == "killed":
            time.sleep(0.5)  # the workers now wait for someone to read their batches
            assert all(map(is_running, pids))
            main_process.kill()
        main_process.join(timeout=10)
        assert main_process.exitcode == {"return": 0, "error": 1, "killed": -signal.SIGKILL}[end]
        deadline = time.monotonic() + 10
        while any(map(is_running, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(is_running, pids))
    finally:
        for pid in filter(is_running, [main_process.pid, *pids]):
            os.kill(pid, signal.SIGKILL)
