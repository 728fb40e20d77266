"""Time and memory of reading a COCO instances file: `python -m tests.benchmarks.coco_parsing`.

Writes a file of the size of COCO's train2017 (118 000 images, 860 000 annotations with polygons) into a
temporary folder and reads it in three ways, each in a process of its own, interleaved, so that a slow spell
of the machine meets all of them. Prints a Markdown table of medians with (lowest-highest).

Peak memory is the resident set's, less what it was after the imports. For `CocoDetection`, it includes the
pages of the mapped file, which the system can take back at any time.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NUM_CATEGORIES = 80
ANNOTATIONS_AN_IMAGE = 7.29  # train2017: 860 001 on 118 287


def write_coco(folder: Path, num_images: int, seed: int = 0) -> tuple[Path, int]:
    """Write folder/instances.json, and an empty file in folder/images for every image.

    Returns:
        The JSON, and its number of annotations.
    """
    rng = random.Random(seed)
    # A thousand polygons serve for all: drawing each anew would take longer than everything measured.
    polygons = [json.dumps([round(rng.uniform(0, 480), 2) for _ in range(50)]) for _ in range(1000)]
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
                f'.org/train2017/{name}", "height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", '
                f'"flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg", "id": {i}}}'
            )
        file.write('], "annotations": [')
        for i in range(num_annotations):
            width, height = round(rng.uniform(2, 200), 2), round(rng.uniform(2, 200), 2)
            box = [round(rng.uniform(0, 400), 2), round(rng.uniform(0, 250), 2), width, height]
            file.write(
                f'{", " if i else ""}{{"segmentation": [{rng.choice(polygons)}], "area": {width * height * 0.6:.5f}, '
                f'"iscrowd": 0, "image_id": {rng.randrange(num_images)}, "bbox": {box}, '
                f'"category_id": {rng.randint(1, NUM_CATEGORIES)}, "id": {i + 1}}}'
            )
        categories = [{"supercategory": "x", "id": i, "name": f"c{i}"} for i in range(1, NUM_CATEGORIES + 1)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path, num_annotations


# The imports stand inside: each process pays, and is charged, only for what it measures.


def prepare_coco_detection() -> Callable[[Path], object]:
    """The whole construction of the data set, with its checks."""
    from resnest_det.data import CocoDetection

    return lambda path: CocoDetection(path.parent / "images", path, train=True)


def prepare_msgspec() -> Callable[[Path], object]:
    """msgspec without types: the document as dicts and lists."""
    import msgspec

    return lambda path: msgspec.json.decode(path.read_bytes())


def prepare_pycocotools() -> Callable[[Path], object]:
    """pycocotools' index."""
    from pycocotools.coco import COCO

    return lambda path: COCO(str(path))


METHODS = {
    "CocoDetection": prepare_coco_detection,
    "msgspec.json.decode": prepare_msgspec,
    "pycocotools.COCO": prepare_pycocotools,
}


def peak_mb() -> float:
    """The highest resident set of this process so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure_here(method: str, path: Path) -> None:
    """Print seconds and megabytes of one reading, as the last line."""
    read = METHODS[method]()
    before, start = peak_mb(), time.perf_counter()
    content = read(path)
    print()
    print(json.dumps([time.perf_counter() - start, peak_mb() - before]))
    del content


def measure(method: str, path: Path) -> list[float]:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.coco_parsing", "--measure", method, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds_and_mb: list[float] = json.loads(output.splitlines()[-1])
    return seconds_and_mb


def spread(values: list[float], digits: int) -> str:
    """Median (lowest-highest)."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=118_000, help="images in the file")
    parser.add_argument("--repeats", type=int, default=3, help="readings by each method")
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        method, file = arguments.measure
        measure_here(method, Path(file))
        return
    with tempfile.TemporaryDirectory() as folder:
        path, num_annotations = write_coco(Path(folder), arguments.images)
        results: dict[str, list[list[float]]] = {method: [] for method in METHODS}
        for _ in range(arguments.repeats):
            for method, measured in results.items():
                measured.append(measure(method, path))
        print(
            f"{arguments.images} images, {num_annotations} annotations, {path.stat().st_size / 1e6:.0f} MB; "
            f"median of {arguments.repeats} (lowest-highest)\n\n"
            f"| reader | seconds | peak memory above the imports, MB |\n|---|---|---|"
        )
        for method, measured in results.items():
            seconds, megabytes = (list(column) for column in zip(*measured, strict=True))
            print(f"| {method} | {spread(seconds, 1)} | {spread(megabytes, 0)} |")


if __name__ == "__main__":
    main()
