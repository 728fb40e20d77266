"""Samplers and loaders: which images, how often, with which seed, on which rank, in which process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnest_det.data import CocoDetection, DetectionAugmentation, error_message, eval_loader, train_loader
from resnest_det.data.loaders import EvaluationSampler, GroupedBatchSampler, collate

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


# --- EvaluationSampler


@pytest.mark.parametrize(("num_images", "world_size"), [(10, 1), (10, 3), (2, 3), (0, 2)])
def test_every_image_exactly_once_over_all_ranks(num_images: int, world_size: int) -> None:
    samplers = [EvaluationSampler(num_images, rank=r, world_size=world_size) for r in range(world_size)]
    assert sorted(index for sampler in samplers for index in sampler) == list(range(num_images))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]
    lengths = [len(sampler) for sampler in samplers]
    assert max(lengths) - min(lengths) <= 1


def test_evaluation_sampler_refuses_a_rank_outside() -> None:
    with pytest.raises(ValueError, match=re.escape("rank=-1 is outside 0..1")):
        EvaluationSampler(5, rank=-1, world_size=2)


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


# --- skipped images


def test_training_batches_keep_their_size_where_images_were_skipped() -> None:
    samples = [(torch.zeros(3, 1, 1), {}, "a.jpg"), None, (torch.ones(3, 1, 1), {}, "c.jpg"), None]
    assert collate(samples)[2] == ["a.jpg", "c.jpg"]
    assert collate(samples, refill=True)[2] == ["a.jpg", "c.jpg", "a.jpg", "c.jpg"]
    assert collate([None, None], refill=True) == ([], [], [])


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
