"""Images a second of the detection loader: `python -m tests.benchmarks.detection_loader --coco FOLDER`.

One worker process reads, recolours (in every second table), flips and resizes the images of a training set and their
boxes: in ours, and in torchvision's `CocoDetection`, wrapped for transforms.v2, with the policy "multiscale" of
torchvision's references/detection/presets.py. Same images, same short sides, same ranges of colours, drawn before the
resizing. The preset ends in float32 images, ours stay bytes until they are on the device; so torchvision's is measured
as it is and, step for step the same as ours, without that end.

The loaders are interleaved, so that a slow spell of the machine meets all of them. Prints Markdown tables of medians
with (lowest-highest); a loader's ratio is ours to its, taken within each round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision.transforms import v2

from resnest_det.data import CocoDetection, DetectionAugmentation, train_loader
from resnest_det.data.sample import ensure_sample_dataset
from tests.benchmarks.coco_scale import spread
from tests.markdown_tables import table

BATCH_SIZE = 4


class TrainingSet(NamedTuple):
    """A data set in COCO's layout, and the sizes at which it is trained."""

    name: str
    images: Path
    annotations: Path
    short_sides: tuple[int, ...]
    max_side: int


def coco(folder: Path) -> TrainingSet:
    """COCO 2017 or a part of it, at the sizes of torchvision's preset."""
    sizes = tuple(range(480, 801, 32))
    return TrainingSet("COCO", folder / "train2017", folder / "annotations/instances_train2017.json", sizes, 1333)


def generated(folder: Path, num_images: int) -> TrainingSet:
    """The generated sample set, at the sizes of its configuration."""
    root = ensure_sample_dataset(folder, num_train=num_images, num_val=1)
    return TrainingSet("generated", root / "train", root / "annotations/instances_train.json", (112, 128), 192)


def our_dataset(data: TrainingSet, color_jitter: bool) -> CocoDetection:
    """The images that have boxes: torchvision's references train on those alone."""
    augmentation = DetectionAugmentation(data.short_sides, data.max_side, color_jitter=float(color_jitter))
    return CocoDetection(data.images, data.annotations, train=True, transform=augmentation, keep_empty=False)


def ours(data: TrainingSet, color_jitter: bool) -> DataLoader[Any]:
    """CocoDetection, DetectionAugmentation and train_loader."""
    return train_loader(our_dataset(data, color_jitter), batch_size=BATCH_SIZE, num_workers=1, seed=0)


def torchvisions(
    data: TrainingSet, color_jitter: bool, *, backend: Literal["PIL", "tensors"], to_float: bool
) -> DataLoader[Any]:
    """The reference preset, on the same images."""
    steps: list[Callable[..., Any]] = []
    if backend == "tensors":
        steps.append(v2.PILToTensor())
    if color_jitter:
        steps.append(v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1))
    steps += [v2.RandomShortestSize(data.short_sides, max_size=data.max_side), v2.RandomHorizontalFlip(0.5)]
    if backend == "PIL":
        steps.append(v2.PILToTensor())
    if to_float:
        steps.append(v2.ToDtype(torch.float32, scale=True))
    steps += [v2.ConvertBoundingBoxFormat("XYXY"), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        dataset = datasets.CocoDetection(str(data.images), str(data.annotations), transforms=v2.Compose(steps))
    used = set(our_dataset(data, color_jitter).image_ids.tolist())
    places = [place for place, image_id in enumerate(dataset.ids) if image_id in used]
    return DataLoader(
        Subset(datasets.wrap_dataset_for_transforms_v2(dataset), places),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=1,
        collate_fn=as_lists,
        persistent_workers=True,
    )


def as_lists(samples: list[tuple[Any, Any]]) -> tuple[tuple[Any, ...], ...]:
    """torchvision's references' collation."""
    return tuple(zip(*samples, strict=True))


LOADERS: dict[str, Callable[[TrainingSet, bool], DataLoader[Any]]] = {
    "resnest_det": ours,
    "torchvision, PIL, bytes": partial(torchvisions, backend="PIL", to_float=False),
    "torchvision, tensors, bytes": partial(torchvisions, backend="tensors", to_float=False),
    "torchvision, PIL, float32 (the preset)": partial(torchvisions, backend="PIL", to_float=True),
    "torchvision, tensors, float32 (the preset)": partial(torchvisions, backend="tensors", to_float=True),
}


def images_a_second(loader: DataLoader[Any], seconds: float) -> float:
    """Whole epochs until the time is up, the worker already running."""
    num_images = epoch = 0
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        if hasattr(loader.batch_sampler, "set_epoch"):
            loader.batch_sampler.set_epoch(epoch)
        num_images += sum(len(batch[0]) for batch in loader)
        epoch += 1
    return num_images / (time.perf_counter() - start)


def report(data: TrainingSet, color_jitter: bool, rounds: int, seconds: float) -> None:
    """Measure all loaders and print their table."""
    loaders = {name: make(data, color_jitter) for name, make in LOADERS.items()}
    for loader in loaders.values():  # starts the workers, and brings the files into the system's memory
        images_a_second(loader, 0.1)
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            speeds[name].append(images_a_second(loader, seconds))
    rows = []
    for name, measured in speeds.items():
        ratios = [our / its for our, its in zip(speeds["resnest_det"], measured, strict=True)]
        rows.append((name, spread(measured, 1), spread(ratios, 2)))
    jitter = ", colour jitter" if color_jitter else ""
    print(f"\n{data.name}: short sides of {data.short_sides[0]} to {data.short_sides[-1]}, flip{jitter}\n")
    print(table(("loader", "images a second", "ours is this many times as fast"), "lrr", rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coco", type=Path, help="folder with train2017/ and annotations/instances_train2017.json")
    parser.add_argument("--images", type=int, default=200, help="images of the generated set")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each loader")
    parser.add_argument("--seconds", type=float, default=3, help="least duration of a measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sets = [generated(Path(folder) / "sample", arguments.images)]
        if arguments.coco:
            sets.append(coco(arguments.coco))
        for data in sets:
            for color_jitter in (False, True):
                report(data, color_jitter, arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
