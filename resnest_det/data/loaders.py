"""From a data set to batches: which images, in which order, decoded by which process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from resnest_det.distributed import rank as current_rank
from resnest_det.distributed import world_size as current_world_size

TargetT = TypeVar("TargetT")
TargetT_co = TypeVar("TargetT_co", covariant=True)
NamedSample: TypeAlias = tuple[Tensor, TargetT, str]
Batch: TypeAlias = tuple[list[Tensor], list[TargetT], list[str]]


class LoadableDataset(Protocol[TargetT_co]):
    """What the loaders ask of a data set; its targets may be anything."""

    def __len__(self) -> int:
        """The number of images."""
        ...

    def load(self, index: int, seed: int | None = None) -> tuple[Tensor, TargetT_co] | None:
        """The image (3, H, W) and its target, augmented by `seed`; None for an image that is skipped."""
        ...

    def file_name(self, index: int) -> str:
        """The image's file name, for messages."""
        ...


@dataclass(frozen=True, slots=True)
class Draw:
    """One image of an epoch, with the seed of its augmentation."""

    index: int
    seed: int


class GroupedBatchSampler(Sampler[list[Draw]]):
    """Batches for training, of images of like orientation, so that little of a batch is padding.

    Every epoch, the images are shuffled by (seed, epoch) and cut into full batches within landscape (width >=
    height) and portrait. What is left of the two fills mixed batches. All batches have the same size, every
    image comes at most once, and every rank gets the same number of batches; the fewer than batch_size x
    world_size images that remain sit this epoch out, others in the next. A data set too small to give each
    rank one batch is divided evenly instead: the batches are then smaller than batch_size.

    Args:
        aspect_ratios: width / height of every image, (num_images,).
        batch_size: images in a batch on one rank.
        seed: not negative; with the epoch it decides the order, with the epoch and the image the draw's seed.
        group: False to shuffle over both orientations.
        rank: this process's number.
        world_size: the number of processes.

    Raises:
        ValueError: batch_size below 1, a negative seed, rank outside the world, or fewer images than ranks.
    """

    def __init__(
        self,
        aspect_ratios: Tensor | Sequence[float],
        batch_size: int,
        *,
        seed: int,
        group: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        num_images = len(aspect_ratios)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is below 1; a batch holds at least one image")
        if seed < 0:
            raise ValueError(f"seed={seed} is negative; use 0 or more")
        _check_rank(rank, world_size)
        if num_images < world_size:
            raise ValueError(
                f"{num_images} images cannot be divided over {world_size} processes; use at most {num_images} processes"
            )
        landscape = np.asarray(aspect_ratios) >= 1
        self._group_of = landscape if group else np.zeros_like(landscape)
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._batch_size = min(batch_size, num_images // world_size)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the seeds of the next iteration; call it before every epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        # The leftovers of both orientations are pooled, so grouping does not change the number of batches.
        return len(self._group_of) // self._batch_size // self._world_size

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self._epoch
        generator = np.random.default_rng((self._seed, epoch))
        shuffled = generator.permutation(len(self._group_of))
        batches: list[list[int]] = []
        left_over: list[int] = []
        for orientation in (True, False):
            members = shuffled[self._group_of[shuffled] == orientation].tolist()
            full, rest = self._cut(members)
            batches += full
            left_over += rest
        batches += self._cut(left_over)[0]
        order = generator.permutation(len(batches))[: len(self) * self._world_size]
        for place in order[self._rank :: self._world_size]:
            yield [Draw(index, self._draw_seed(epoch, index)) for index in batches[place]]

    def _cut(self, indices: list[int]) -> tuple[list[list[int]], list[int]]:
        """Full batches, and the rest."""
        size = self._batch_size
        end = len(indices) // size * size
        return [indices[start : start + size] for start in range(0, end, size)], indices[end:]

    def _draw_seed(self, epoch: int, index: int) -> int:
        # Of the image, not of its batch or rank: the same augmentation on any number of processes.
        return int(np.random.SeedSequence((self._seed, epoch, index)).generate_state(1, np.uint64)[0])


class EvaluationSampler(Sampler[int]):
    """Every image exactly once over all ranks, without padding: ranks may differ by one image.

    Args:
        num_images: size of the data set.
        rank: this process's number.
        world_size: the number of processes.

    Raises:
        ValueError: rank outside the world.
    """

    def __init__(self, num_images: int, *, rank: int = 0, world_size: int = 1) -> None:
        _check_rank(rank, world_size)
        self._indices = range(rank, num_images, world_size)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)


def collate(samples: Sequence[NamedSample[TargetT] | None], *, refill: bool = False) -> Batch[TargetT]:
    """Samples as lists of images, targets and file names; images differ in size, so nothing is stacked.

    Args:
        samples: None stands for an image that was skipped. A batch of nothing else becomes three empty lists.
        refill: put others of the batch in the places of skipped ones, so that batches keep their size: BatchNorm
            cannot train on what may be left.
    """
    read = [sample for sample in samples if sample is not None]
    if refill and read:
        read = list(itertools.islice(itertools.cycle(read), len(samples)))
    return [sample[0] for sample in read], [sample[1] for sample in read], [sample[2] for sample in read]


def train_loader(
    dataset: LoadableDataset[TargetT],
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    group_by_aspect: bool = True,
) -> DataLoader[NamedSample[TargetT] | None]:
    """Shuffled batches for this process's share of the training.

    Call `loader.batch_sampler.set_epoch(epoch)` before every epoch. The batches depend on seed and epoch
    alone: any number of workers yields the same. Where an unreadable image is skipped, another of its batch
    comes twice, so that batches keep their size.

    Args:
        dataset: of training images, usually with a transform; `CocoDetection` or `MaskFolder`, for example.
        batch_size: images in a batch on one process.
        num_workers: processes that decode and augment; 0 does it in this one.
        seed: of the order and the augmentation, not negative.
        group_by_aspect: put landscape and portrait images into different batches. The data set then needs
            `aspect_ratios`, width / height of every image; crops of one size need no groups.

    Returns:
        A loader of (images, targets, names).

    Raises:
        ValueError: as `GroupedBatchSampler`, num_workers is negative, or the data set has no aspect ratios to
            group by.
    """
    aspect_ratios = getattr(dataset, "aspect_ratios", None) if group_by_aspect else torch.ones(len(dataset))
    if aspect_ratios is None:
        raise ValueError(
            f"group_by_aspect=True needs the images' aspect ratios, which {type(dataset).__name__} does not know; use "
            f"group_by_aspect=False"
        )
    sampler = GroupedBatchSampler(
        aspect_ratios,
        batch_size,
        seed=seed,
        group=group_by_aspect,
        rank=current_rank(),
        world_size=current_world_size(),
    )
    return DataLoader(
        _NamedSamples(dataset),
        batch_sampler=sampler,
        collate_fn=partial(collate, refill=True),
        **_worker_settings(num_workers),
    )


def eval_loader(
    dataset: LoadableDataset[TargetT], *, batch_size: int, num_workers: int
) -> DataLoader[NamedSample[TargetT] | None]:
    """Batches of this process's share of an evaluation: every image once, in order.

    Args:
        dataset: of evaluation images, without a transform.
        batch_size: images in a batch on one process; the last one may be smaller.
        num_workers: processes that decode; 0 does it in this one.

    Returns:
        A loader of (images, targets, names).

    Raises:
        ValueError: batch_size below 1, or num_workers negative.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is below 1; a batch holds at least one image")
    sampler = EvaluationSampler(len(dataset), rank=current_rank(), world_size=current_world_size())
    return DataLoader(
        _NamedSamples(dataset),
        sampler=sampler,
        batch_size=batch_size,
        collate_fn=collate,
        **_worker_settings(num_workers),
    )


def error_message(error: BaseException) -> str:
    """An error's message, without the traceback that DataLoader puts around one that a worker raised."""
    _, marker, trace = str(error).rpartition("Traceback (most recent call last):\n")
    if not marker:
        return str(error)
    # Frames are indented; the error follows them, as "module.Name: message" over one or more lines.
    lines = trace.splitlines()
    first = next((index for index, line in enumerate(lines) if not line.startswith(" ")), 0)
    return "\n".join(lines[first:]).partition(": ")[2] or lines[first]


class _NamedSamples(Dataset[NamedSample[TargetT] | None]):
    """The data set as loaders see it: asked with a draw's seed, answering with the file's name."""

    def __init__(self, dataset: LoadableDataset[TargetT]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw | int) -> NamedSample[TargetT] | None:
        index, seed = (draw.index, draw.seed) if isinstance(draw, Draw) else (draw, None)
        sample = self.dataset.load(index, seed)
        return None if sample is None else (*sample, self.dataset.file_name(index))


def _worker_settings(num_workers: int) -> dict[str, Any]:
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} is negative; use 0 to load in the main process")
    return {
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": num_workers > 0,
        "worker_init_fn": _limit_threads,
        # Of its own, so that starting an epoch takes no number from the global generator.
        "generator": torch.Generator(),
    }


def _limit_threads(_worker: int) -> None:
    """One thread a worker: more would fight over the cores that the other workers use."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is outside 0..{world_size - 1}, the ranks of world_size={world_size}")
