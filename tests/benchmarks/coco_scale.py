"""Time and memory of a COCO-sized annotation file: `python -m tests.benchmarks.coco_scale`, on Linux.

Writes a file of the size of COCO's train2017 (118 000 images, 830 000 annotations with polygons) into a temporary
folder and opens it as a data set in several ways, each in a process of its own, interleaved, so that a slow spell of
the machine meets all of them. Prints two Markdown tables; times are medians with (lowest-highest). With the full file,
it fails where CocoDetection takes more than a third of the others' time or a tenth of their workers' private memory.

The first table is of one process and its DataLoader's workers, which are forked. Private memory is what
/proc/PID/smaps_rollup calls Private_Clean and Private_Dirty: what the system would get back if that process alone
ended. It is read after one epoch: all of a worker's, and of a process that loads for itself what it has above the one
after the imports. There are no images to decode: for every reader, pixels are zeros, and few, so that what is measured
is annotations. Workers send their samples as they come from the data set.

The second table is of two processes under torchrun, which read the file each for itself or once for both. Peaks are of
the resident set, above the one after the imports, mapped files included. What both hold is the sum of their
proportional set sizes (Pss: a page shared by two counts half for each), above the one after the imports, when each has
loaded its half of the images.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

NUM_CATEGORIES = 80
WIDTH, HEIGHT = 160, 120
FULL_SIZE = 118_000
ANNOTATIONS_AN_IMAGE = 830_000 / FULL_SIZE
NUM_WORKERS = (0, 2, 8)
TIME_RATIO, MEMORY_RATIO = 1 / 3, 1 / 10  # the most that CocoDetection may take of what the others take
MB = 1e6


def write_coco(folder: Path, num_images: int, seed: int = 0) -> tuple[Path, int]:
    """Write folder/instances.json, and an empty file in folder/images for every image.

    Returns:
        The JSON, and its number of annotations.
    """
    rng = random.Random(seed)
    # A thousand objects serve for all: drawing each anew would take longer than everything measured.
    objects = [outline(rng) for _ in range(1000)]
    num_annotations = round(num_images * ANNOTATIONS_AN_IMAGE)
    (folder / "images").mkdir()
    path = folder / "instances.json"
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        for i in range(num_images):
            name = f"{i:012d}.jpg"
            (folder / "images" / name).touch()
            file.write(
                f'{", " if i else ""}{{"license": 3, "file_name": "{name}", "coco_url": "http://images.cocodataset'
                f'.org/train2017/{name}", "height": {HEIGHT}, "width": {WIDTH}, "date_captured": "2013-11-14 11:18:45"'
                f', "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg", "id": {i}}}'
            )
        file.write('], "annotations": [')
        for i in range(num_annotations):
            file.write(
                f'{", " if i else ""}{{{rng.choice(objects)}, "iscrowd": 0, "image_id": {rng.randrange(num_images)}, '
                f'"category_id": {rng.randint(1, NUM_CATEGORIES)}, "id": {i + 1}}}'
            )
        categories = [{"supercategory": "x", "id": i, "name": f"c{i}"} for i in range(1, NUM_CATEGORIES + 1)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path, num_annotations


def outline(rng: random.Random) -> str:
    """An object's segmentation, area and bbox in JSON: a dented ellipse of about 26 points, one in ten in two parts."""
    width, height = (min(4 + rng.lognormvariate(2.6, 0.9), 0.9 * side) for side in (WIDTH, HEIGHT))
    left, top = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)

    def part(first: float, last: float) -> list[float]:
        """The piece between two fractions of the width."""
        num_points = max(4, round(rng.lognormvariate(3.1, 0.6)))
        points = []
        for step in range(num_points):
            angle, radius = 2 * math.pi * step / num_points, rng.uniform(0.35, 0.5)
            across = first + (last - first) * (0.5 + radius * math.cos(angle))
            points += [left + width * across, top + height * (0.5 + radius * math.sin(angle))]
        return [round(value, 2) for value in points]

    parts = [part(0, 0.45), part(0.55, 1)] if rng.random() < 0.1 else [part(0, 1)]
    xs, ys = ([value for polygon in parts for value in polygon[axis::2]] for axis in (0, 1))
    box = [round(value, 2) for value in (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))]
    return f'"segmentation": {json.dumps(parts)}, "area": {0.6 * box[2] * box[3]:.5f}, "bbox": {json.dumps(box)}'


# Imports stand inside: each process pays, and is charged, only for what it measures.


def prepare_coco_detection(masks: bool) -> Callable[[Path], Dataset[Any]]:
    """Ours with all its checks, without and with masks, which are decoded as they are asked for."""
    from resnest_det.data import CocoDetection, coco

    coco.read_rgb = no_pixels
    return lambda path: CocoDetection(path.parent / "images", path, train=True, masks=masks)


def prepare_torchvision() -> Callable[[Path], Dataset[Any]]:
    """torchvision's, whose targets are the annotations as the file has them."""
    from PIL import Image
    from torchvision.datasets import CocoDetection
    from torchvision.transforms.functional import pil_to_tensor

    class WithoutPixels(CocoDetection):
        def _load_image(self, id: int) -> Image.Image:
            return Image.new("RGB", (WIDTH, HEIGHT))

    return lambda path: WithoutPixels(str(path.parent / "images"), str(path), transform=pil_to_tensor)


def prepare_pycocotools() -> Callable[[Path], Dataset[Any]]:
    """pycocotools' index, asked for the boxes and labels of an image: what many a data set is made of."""
    from pycocotools.coco import COCO

    class Boxes(Dataset[Any]):
        def __init__(self, path: Path) -> None:
            self.coco = COCO(str(path))
            self.ids = sorted(self.coco.imgs)

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, index: int) -> Any:
            annotations = self.coco.loadAnns(self.coco.getAnnIds(imgIds=self.ids[index]))
            target = {
                "boxes": torch.tensor([annotation["bbox"] for annotation in annotations]).reshape(-1, 4),
                "labels": torch.tensor([annotation["category_id"] for annotation in annotations]),
            }
            return torch.from_numpy(no_pixels(Path(), WIDTH, HEIGHT)).permute(2, 0, 1).contiguous(), target

    return Boxes


def no_pixels(path: Path, width: int, height: int) -> NDArray[np.uint8]:
    return np.zeros((height, width, 3), np.uint8)


READERS: dict[str, Callable[[], Callable[[Path], Dataset[Any]]]] = {
    "CocoDetection": lambda: prepare_coco_detection(masks=False),
    "CocoDetection, masks=True": lambda: prepare_coco_detection(masks=True),
    "pycocotools' COCO": prepare_pycocotools,
    "torchvision's CocoDetection": prepare_torchvision,
}
OURS = [name for name in READERS if name.startswith("CocoDetection")]
OTHERS = [name for name in READERS if name not in OURS]

# Of two processes of a machine: whether one of them reads for both, and whether masks are read.
WAYS = {
    "each reads the file": (False, False),
    "once_per_machine": (True, False),
    "each reads the file, masks=True": (False, True),
    "once_per_machine, masks=True": (True, True),
}


def measure_opening(reader: str, path: Path) -> dict[str, Any]:
    """Seconds of opening the file, and by how many MB it raises the peak."""
    open_file = READERS[reader]()
    before, start = peak_mb(), time.perf_counter()
    dataset = open_file(path)
    seconds, peak = time.perf_counter() - start, peak_mb() - before
    del dataset
    return {"seconds": seconds, "peak": peak}


def measure_epoch(reader: str, path: Path, num_workers: int) -> list[float]:
    """Private MB of each worker after an epoch; of a process that loads for itself, those above the imports."""
    open_file = READERS[reader]()
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than this machine has cores
    before = private_mb("self")
    dataset = open_file(path)
    loader = DataLoader(
        dataset,
        batch_size=4,
        sampler=random_places(dataset),
        num_workers=num_workers,
        collate_fn=list,
        multiprocessing_context="fork" if num_workers else None,
        persistent_workers=num_workers > 0,
    )
    batches: Any = iter(loader)
    for _ in batches:
        pass
    return [private_mb(worker.pid) for worker in batches._workers] if num_workers else [private_mb("self") - before]


def measure_way(way: str, path: Path) -> dict[str, Any] | None:
    """Under torchrun: seconds until both have the data set, each one's peak MB, and the MB that both hold."""
    from resnest_det.data import sharing
    from resnest_det.distributed import barrier, distributed_session, gather_objects, rank

    shared, masks = WAYS[way]
    open_file = prepare_coco_detection(masks)
    with distributed_session("cpu"):
        barrier()
        peak_before, held_before, start = peak_mb(), kernel_mb("self/smaps_rollup", "Pss"), time.perf_counter()
        dataset: Any = sharing.once_per_machine(lambda: open_file(path)) if shared else open_file(path)
        barrier()
        seconds, peak = time.perf_counter() - start, peak_mb() - peak_before
        for place in random_places(dataset)[rank() :: 2]:
            dataset[place]
        barrier()
        held = kernel_mb("self/smaps_rollup", "Pss") - held_before
        peaks, helds = gather_objects(peak), gather_objects(held)
        return {"seconds": seconds, "peaks": peaks, "held": sum(helds)} if rank() == 0 else None


def random_places(dataset: Any) -> list[int]:
    """All places in the data set, in a random order."""
    return np.random.default_rng(0).permutation(len(dataset)).tolist()


def peak_mb() -> float:
    """The highest resident set of this process so far."""
    return kernel_mb("self/status", "VmHWM")


def private_mb(process: int | str) -> float:
    """What that process alone holds."""
    return kernel_mb(f"{process}/smaps_rollup", "Private_Clean", "Private_Dirty")


def kernel_mb(file: str, *names: str) -> float:
    """The sum of those lines of a file in /proc, which has them as "name: number kB"."""
    lines = Path("/proc", file).read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.split(":")[0] in names) / MB


def in_a_fresh_process(*arguments: object, processes: int = 1) -> Any:
    """What this script prints as its last line when it is started with these arguments."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.benchmarks.coco_scale", *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # as torchrun would set it, with a note each time
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def spread(values: Iterable[float], digits: int) -> str:
    """Median (lowest-highest)."""
    low, middle, high = (f"{f(list(values)):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def compare_readers(path: Path, repeats: int) -> dict[str, tuple[float, float]]:
    """Print the first table.

    Returns:
        For each of ours, the largest ratios of its seconds and of its workers' memory to the others'.
    """
    opened: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}
    for _ in range(repeats):
        for reader, measured in opened.items():
            measured.append(in_a_fresh_process("--open", reader, path))
    private: dict[str, list[list[float]]] = {reader: [] for reader in READERS}
    for num_workers in NUM_WORKERS:
        for reader, by_workers in private.items():
            by_workers.append(in_a_fresh_process("--epoch", reader, path, num_workers))
    columns = ["the process, no workers", *(f"each of {number} workers" for number in NUM_WORKERS[1:])]
    print(
        f"| reader | seconds to open | peak while opening, MB | private MB: {' | '.join(columns)} |\n"
        f"|{'---|' * (3 + len(columns))}"
    )
    for reader, measured in opened.items():
        (process,), *workers = private[reader]
        row = [
            spread([once["seconds"] for once in measured], 1),
            spread([once["peak"] for once in measured], 0),
            f"{process:.0f}",
            *(spread(each, 0) for each in workers),
        ]
        print(f"| {reader} | {' | '.join(row)} |")

    def seconds(reader: str) -> float:
        return statistics.median(once["seconds"] for once in opened[reader])

    def megabytes(reader: str) -> list[float]:
        return [statistics.median(each) for each in private[reader][1:]]

    return {
        ours: (
            max(seconds(ours) / seconds(other) for other in OTHERS),
            max(a / b for other in OTHERS for a, b in zip(megabytes(ours), megabytes(other), strict=True)),
        )
        for ours in OURS
    }


def compare_ways(path: Path, repeats: int) -> None:
    """Print the second table."""
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, measured in results.items():
            measured.append(in_a_fresh_process("--way", way, path, processes=2))
    print("| two processes | seconds | peak of each while opening, MB | held by both, MB |\n|---|---|---|---|")
    for way, measured in results.items():
        peaks = (statistics.median(once["peaks"][rank] for once in measured) for rank in range(2))
        row = [
            spread([once["seconds"] for once in measured], 1),
            " and ".join(f"{peak:.0f}" for peak in peaks),
            spread([once["held"] for once in measured], 0),
        ]
        print(f"| {way} | {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=FULL_SIZE, help="images in the file")
    parser.add_argument("--repeats", type=int, default=3, help="openings of the file by each reader")
    parser.add_argument("--open", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--epoch", nargs=3, metavar=("READER", "FILE", "WORKERS"), help=argparse.SUPPRESS)
    parser.add_argument("--way", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        reader, file = arguments.open
        print(f"\n{json.dumps(measure_opening(reader, Path(file)))}")
    elif arguments.epoch:
        reader, file, num_workers = arguments.epoch
        print(f"\n{json.dumps(measure_epoch(reader, Path(file), int(num_workers)))}")
    elif arguments.way:
        way, file = arguments.way
        if measured := measure_way(way, Path(file)):
            print(f"\n{json.dumps(measured)}")
    else:
        compare(arguments.images, arguments.repeats)


def compare(num_images: int, repeats: int) -> None:
    """Print both tables, and check the ratios that are required of the full file."""
    with tempfile.TemporaryDirectory() as folder:
        path, num_annotations = write_coco(Path(folder), num_images)
        print(f"{num_images} images, {num_annotations} annotations, {path.stat().st_size / MB:.0f} MB\n")
        ratios = compare_readers(path, repeats)
        print()
        compare_ways(path, repeats)
    print()
    for reader, (seconds, megabytes) in ratios.items():
        print(f"{reader}: at most {seconds:.2f} of the others' time and {megabytes:.3f} of their workers' memory")
    if num_images >= FULL_SIZE:
        worst = [max(pair) for pair in zip(*ratios.values(), strict=True)]
        assert worst[0] <= TIME_RATIO, f"{worst[0]:.2f} of the others' time, not the {TIME_RATIO:.2f} required"
        assert worst[1] <= MEMORY_RATIO, f"{worst[1]:.3f} of the others' memory, not the {MEMORY_RATIO:.2f} required"


if __name__ == "__main__":
    main()
