"""From a data set to batches: which images, in which order, decoded by which process."""

from __future__ import annotations

import io
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from resnest_det.distributed import rank as current_rank
from resnest_det.distributed import world_size as current_world_size

TargetT = TypeVar("TargetT")
TargetT_co = TypeVar("TargetT_co", covariant=True)
NamedSample: TypeAlias = tuple[Tensor, TargetT, str]
Batch: TypeAlias = tuple[list[Tensor], list[TargetT], list[str]]

_ALIGNMENT = 64  # bytes; where a tensor begins in a block that a batch is sent in
_COPIED_OUT = 2**14  # bytes; tensors up to this size leave the block they came in
_MAX_REPEAT_FACTOR = 1000.0
_ONE = 2**32  # repeat factors are added up as whole numbers of 2^-32: exactly, in whatever order


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

    Every epoch, the images are shuffled by (seed, epoch) and cut into steps of batch_size x world_size images
    within landscape (width >= height) and portrait. What is left of the two fills mixed steps. Of each step,
    every rank takes its batch: which images a step has depends on their number, not on that of the ranks. All
    batches have the same size, and every image comes at most once; the fewer than a step that remain sit this
    epoch out, others in the next. A data set too small for one step is divided evenly instead: the batches are
    then smaller than batch_size.

    With repeat factors, an image comes as often as its factor says, rounded up or down at random so that the
    mean over epochs is the factor. An epoch draws the sum of the factors, rounded down. In LVIS's own sampling
    (as in detectron2's RepeatFactorTrainingSampler) each image is rounded by itself and epochs differ in
    length; here the roundings are drawn together (systematic sampling) and every epoch has as many batches.

    Args:
        aspect_ratios: width / height of every image, (num_images,).
        batch_size: images in a batch on one rank.
        seed: not negative; with the epoch it decides the order, with the epoch and the image the draw's seed.
        group: False to shuffle over both orientations.
        repeat_factors: how often an epoch draws every image, (num_images,), each from 1 to 1000; None: once.
        rank: this process's number.
        world_size: the number of processes.

    Raises:
        ValueError: batch_size below 1, a negative seed, rank outside the world, fewer images than ranks, or
            repeat factors that are not one for each image or outside their range.
    """

    def __init__(
        self,
        aspect_ratios: Tensor | Sequence[float],
        batch_size: int,
        *,
        seed: int,
        group: bool = True,
        repeat_factors: Tensor | Sequence[float] | None = None,
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
        self._factors = None if repeat_factors is None else _whole_factors(repeat_factors, num_images)
        self._num_draws = num_images if self._factors is None else int(self._factors.sum()) // _ONE
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._batch_size = min(batch_size, self._num_draws // world_size)
        self._epoch, self._first_batch = 0, 0

    @property
    def batch_size(self) -> int:
        """Images in a batch on one rank: as asked for, or what a small data set gives."""
        return self._batch_size

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order and the seeds of the next iteration; call it before every epoch.

        Args:
            epoch: number of the epoch.
            first_batch: how many of this rank's batches to leave out, 0..len(self): the rest are those that an
                unbroken epoch ends with. The length stays that of the whole epoch.

        Raises:
            ValueError: first_batch is outside the epoch.
        """
        if not 0 <= first_batch <= len(self):
            raise ValueError(
                f"first_batch={first_batch} is outside 0..{len(self)}, the batches of an epoch; where a run is "
                f"resumed, data set, batch size and number of processes must be those that it was started with"
            )
        self._epoch, self._first_batch = epoch, first_batch

    def __len__(self) -> int:
        # The leftovers of both orientations are pooled, so grouping does not change the number of batches.
        return self._num_draws // self._batch_size // self._world_size

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, first_batch = self._epoch, self._first_batch
        generator = np.random.default_rng((self._seed, epoch))
        images, copies = self._shuffled_draws(generator)
        orientations = self._group_of[images]
        steps: list[list[int]] = []
        left_over: list[int] = []
        for orientation in (True, False):
            full, rest = self._cut(np.flatnonzero(orientations == orientation).tolist())
            steps += full
            left_over += rest
        steps += self._cut(left_over)[0]
        own = slice(self._rank * self._batch_size, (self._rank + 1) * self._batch_size)
        for number in generator.permutation(len(steps))[first_batch:]:
            yield [self._draw(epoch, int(images[place]), int(copies[place])) for place in steps[number][own]]

    def _shuffled_draws(self, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's images in their order, and for each draw how often its image was drawn before."""
        images = generator.permutation(len(self._group_of))
        if self._factors is None:
            return images, np.zeros_like(images)
        # The factors laid end to end on a line with a mark at every whole number, moved by one random offset:
        # an image comes once for each mark in its stretch.
        ends = (np.cumsum(self._factors[images]) + generator.integers(_ONE)) // _ONE
        counts = np.diff(ends, prepend=0)
        copies = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        order = generator.permutation(self._num_draws)  # there may be one draw more: the last is left out
        return np.repeat(images, counts)[order], copies[order]

    def _cut(self, places: list[int]) -> tuple[list[list[int]], list[int]]:
        """The places of full steps, and the rest."""
        size = self._batch_size * self._world_size
        end = len(places) // size * size
        return [places[start : start + size] for start in range(0, end, size)], places[end:]

    def _draw(self, epoch: int, index: int, copy: int) -> Draw:
        # Of the image, not of its batch or rank: the same augmentation on any number of processes.
        source = (self._seed, epoch, index, copy) if copy else (self._seed, epoch, index)
        return Draw(index, int(np.random.SeedSequence(source).generate_state(1, np.uint64)[0]))


class EvaluationBatchSampler(Sampler[list[int]]):
    """Every image exactly once over all ranks, in batches that are the same for any number of them.

    The images in their order are cut into batches, and the batches dealt to the ranks in turn. What a batch is
    padded to, and so the last digits of its predictions, then do not depend on the number of processes. Ranks
    may differ by one batch.

    Args:
        num_images: size of the data set.
        batch_size: images in a batch; the last of all may have fewer.
        rank: this process's number.
        world_size: the number of processes.

    Raises:
        ValueError: batch_size below 1, or rank outside the world.
    """

    def __init__(self, num_images: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is below 1; a batch holds at least one image")
        _check_rank(rank, world_size)
        self._num_images, self._batch_size = num_images, batch_size
        self._starts = range(rank * batch_size, num_images, world_size * batch_size)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            yield list(range(start, min(start + self._batch_size, self._num_images)))


def repeat_factors(offsets: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """How often to draw each image in an epoch, so that rare classes are seen more often.

    The repeat factor sampling of LVIS (Gupta et al., arXiv 1908.03195): a class found in the fraction f of the
    images has the factor max(1, sqrt(threshold / f)), and an image the largest of its classes'.

    Args:
        offsets: where each image's labels begin and the last one's end, int64 (num_images + 1,).
        labels: of all boxes, image by image, int64 (num_boxes,).
        threshold: the fraction of images, above 0 and at most 1, below which a class is repeated. LVIS: 0.001.

    Returns:
        The factors, float64 (num_images,); 1 for an image without labels.

    Raises:
        ValueError: the threshold is outside its range, or the offsets do not belong to the labels.
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            f"threshold={threshold} is not above 0 and at most 1; it is the fraction of images below which a class "
            f"is repeated, such as 0.001"
        )
    counts = np.diff(offsets.numpy())
    if not len(counts) or offsets[0] != 0 or offsets[-1] != len(labels) or (counts < 0).any():
        raise ValueError(
            f"offsets from {offsets[:1].tolist()} to {offsets[-1:].tolist()} do not divide {len(labels)} labels; "
            f"they rise from 0 to the number of labels, one more than there are images"
        )
    num_images = len(counts)
    classes, class_of = np.unique(labels.numpy(), return_inverse=True)
    image_of = np.repeat(np.arange(num_images), counts)
    pairs = np.unique(image_of * len(classes) + class_of)  # a class counts once an image
    frequencies = np.bincount(pairs % len(classes), minlength=len(classes)) / num_images
    factors = np.ones(num_images)
    np.maximum.at(factors, image_of, np.sqrt(threshold / frequencies)[class_of])
    return torch.from_numpy(factors)


def collate(samples: Sequence[NamedSample[TargetT] | None]) -> Batch[TargetT]:
    """Samples as lists of images, targets and file names; images differ in size, so nothing is stacked.

    Args:
        samples: None stands for an image that was skipped. A batch of nothing else becomes three empty lists.
    """
    read = [sample for sample in samples if sample is not None]
    return [sample[0] for sample in read], [sample[1] for sample in read], [sample[2] for sample in read]


def train_loader(
    dataset: LoadableDataset[TargetT],
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    group_by_aspect: bool = True,
    repeat_factors: Tensor | None = None,
) -> DataLoader[NamedSample[TargetT]]:
    """Shuffled batches for this process's share of the training.

    Call `loader.batch_sampler.set_epoch(epoch)` before every epoch, or `set_epoch(epoch, first_batch)` to go on
    within one. The batches depend on seed and epoch alone: any number of workers yields the same. Where the data
    set skips an unreadable image, the next readable one takes its place: a process whose batch were empty would
    leave the others waiting for its gradients.

    Args:
        dataset: of training images, usually with a transform; `CocoDetection` or `MaskFolder`, for example.
        batch_size: images in a batch on one process.
        num_workers: processes that decode and augment; 0 does it in this one.
        seed: of the order and the augmentation, not negative.
        group_by_aspect: put landscape and portrait images into different batches. The data set then needs
            `aspect_ratios`, width / height of every image; crops of one size need no groups.
        repeat_factors: how often an epoch draws every image, (num_images,), as `repeat_factors()` computes them
            from the classes; None: once.

    Returns:
        A loader of (images, targets, names). Iterating raises ValueError where every image was skipped.

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
        repeat_factors=repeat_factors,
        rank=current_rank(),
        world_size=current_world_size(),
    )
    return DataLoader(
        _TrainingSamples(dataset), batch_sampler=sampler, collate_fn=_collate, **_worker_settings(num_workers)
    )


def eval_loader(
    dataset: LoadableDataset[TargetT], *, batch_size: int, num_workers: int
) -> DataLoader[NamedSample[TargetT] | None]:
    """Batches of this process's share of an evaluation: every image once, in order.

    What a batch holds does not depend on the number of processes (see `EvaluationBatchSampler`).

    Args:
        dataset: of evaluation images, without a transform.
        batch_size: images in a batch on one process; the last one may be smaller, and so is one with skipped
            images, which may be empty.
        num_workers: processes that decode; 0 does it in this one.

    Returns:
        A loader of (images, targets, names).

    Raises:
        ValueError: batch_size below 1, or num_workers negative.
    """
    sampler = EvaluationBatchSampler(len(dataset), batch_size, rank=current_rank(), world_size=current_world_size())
    return DataLoader(
        _EvaluationSamples(dataset), batch_sampler=sampler, collate_fn=_collate, **_worker_settings(num_workers)
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


class _TrainingSamples(Dataset[NamedSample[TargetT]]):
    """The data set as the training loader sees it: asked with a draw, answering with the file's name as well."""

    def __init__(self, dataset: LoadableDataset[TargetT]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> NamedSample[TargetT]:
        num_images = len(self.dataset)
        for step in range(num_images):
            index = (draw.index + step) % num_images
            sample = self.dataset.load(index, draw.seed)
            if sample is not None:
                return *sample, self.dataset.file_name(index)
        raise ValueError(
            f"none of the {num_images} training images can be read, neither {self.dataset.file_name(draw.index)} nor "
            f"any other; see the warnings for the reasons, and check that the folder of images is still there"
        )


class _EvaluationSamples(Dataset[NamedSample[TargetT] | None]):
    """The data set as the evaluation loader sees it: answering with the file's name, or None for a skipped image."""

    def __init__(self, dataset: LoadableDataset[TargetT]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> NamedSample[TargetT] | None:
        sample = self.dataset.load(index)
        return None if sample is None else (*sample, self.dataset.file_name(index))


def _collate(samples: Sequence[NamedSample[TargetT] | None]) -> Batch[TargetT] | _Parcel:
    batch = collate(samples)
    return batch if get_worker_info() is None else _Parcel(batch)


class _Parcel:
    """A batch on its way out of a worker, its tensors in one block of shared memory; unpickled, it is the batch.

    Sent one by one, as DataLoader does it, every tensor takes an open file of the main process and a round trip
    between the two: 8 workers with batches of 16 images and their targets come close to the 1024 open files that
    many systems allow.
    """

    def __init__(self, batch: Batch[Any]) -> None:
        content = io.BytesIO()
        packer = _Packer(content, pickle.HIGHEST_PROTOCOL)
        packer.dump(batch)
        # Shared before it is filled: pages never written to cost nothing to copy.
        self._block = torch.empty(packer.num_bytes, dtype=torch.uint8).share_memory_()
        self._tensors = packer.tensors
        self._content = content.getvalue()

    def __reduce__(self) -> tuple[Any, ...]:
        # Filled here, in the thread that sends, while the worker goes on with the next batch.
        for place, tensor in self._tensors:
            place.of(self._block).copy_(tensor)
        return _unpack, (self._block, self._content)


class _Place(NamedTuple):
    """Where in a block a tensor is."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, block: Tensor) -> Tensor:
        return block[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


class _Packer(pickle.Pickler):
    """Pickles everything but tensors, which it lists with their places in a block of num_bytes."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[tuple[_Place, Tensor]] = []
        self.num_bytes = 0

    def persistent_id(self, item: Any) -> _Place | None:
        if type(item) is not Tensor:
            return None
        place = _Place(self.num_bytes, item.dtype, tuple(item.shape))
        self.tensors.append((place, item))
        self.num_bytes += math.ceil(place.num_bytes / _ALIGNMENT) * _ALIGNMENT
        return place


class _Unpacker(pickle.Unpickler):
    """Puts the tensors of a block back in their places."""

    def __init__(self, file: io.BytesIO, block: Tensor) -> None:
        super().__init__(file)
        self._block = block

    def persistent_load(self, place: _Place) -> Tensor:
        tensor = place.of(self._block)
        # Whoever keeps some boxes, as a metric does, must not keep the pixels of a whole batch with them.
        return tensor.clone() if place.num_bytes <= _COPIED_OUT else tensor


def _unpack(block: Tensor, content: bytes) -> Batch[Any]:
    return _Unpacker(io.BytesIO(content), block).load()


def _worker_settings(num_workers: int) -> dict[str, Any]:
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} is negative; use 0 to load in the main process")
    # Set when this process ends: before multiprocessing waits, without a limit, for the workers it asked by SIGTERM.
    ending = torch.zeros(1, dtype=torch.bool).share_memory_()
    Finalize(None, ending.fill_, args=(True,), exitpriority=0)
    return {
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": num_workers > 0,
        "worker_init_fn": partial(_begin_worker, ending),
        # Of its own, so that starting an epoch takes no number from the global generator.
        "generator": torch.Generator(),
    }


def _begin_worker(ending: Tensor, _number: int) -> None:
    """What a worker does before its first image."""
    # A thread a worker: more would fight over the cores that the other workers use.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C and schedulers signal every process of a run. The main process finishes its step and saves, for which
    # it still needs its workers; they end when it does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_main_process, args=(ending,), daemon=True).start()


def _end_with_main_process(ending: Tensor) -> None:
    """End this worker soon after the main process says that it ends, or is gone.

    DataLoader's own watch over the main process does not see a worker that waits to hand over a batch.
    """
    started_by = os.getppid()
    while os.getppid() == started_by and not ending:
        time.sleep(0.5)
    os._exit(0)


def _whole_factors(factors: Tensor | Sequence[float], num_images: int) -> NDArray[np.int64]:
    """Repeat factors as whole numbers of 2^-32, checked."""
    values = np.asarray(factors, np.float64)
    if values.shape != (num_images,):
        raise ValueError(
            f"repeat_factors has the shape {values.shape} for {num_images} images; it needs one factor for each image"
        )
    outside = np.flatnonzero(~((values >= 1) & (values <= _MAX_REPEAT_FACTOR)))  # NaN too
    if len(outside):
        raise ValueError(
            f"repeat_factors[{outside[0]}]={values[outside[0]]} is outside 1..{_MAX_REPEAT_FACTOR:g}; an epoch draws "
            f"every image at least once"
        )
    return np.rint(values * _ONE).astype(np.int64)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is outside 0..{world_size - 1}, the ranks of world_size={world_size}")
