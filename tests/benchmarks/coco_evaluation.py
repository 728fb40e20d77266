"""Time and memory of COCO's evaluation by several packages: `python -m tests.benchmarks.coco_evaluation`, on Linux.

Writes annotations and results of the size of COCO's val2017 (5,000 images, 34,000 objects, 80 classes) with 75
detections an image into a temporary folder, and scores them for boxes and for masks in several ways, each in a process
of its own, interleaved, so that a slow spell of the machine meets all of them. Prints a Markdown table of medians with
(lowest-highest), and fails where the ways disagree.

Reading is from the two files to whatever the way keeps of them, and evaluating from there to the twelve numbers; for
CocoMeanAveragePrecision that is `read_coco_targets` and `read_coco_results`, with their checks, then `update` and
`compute`. It evaluates boxes beside masks, the others one of them. The peak is of the resident set, above the one
after the imports. hotcoco takes all cores, the others one. `pip install faster-coco-eval hotcoco` installs the other
packages; the ways of one that is missing are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

NUM_CATEGORIES, NUM_OBJECTS = 80, 1000
WIDTH, HEIGHT = 640, 480
FULL_SIZE = 5000
EXPONENTIAL_MEAN, DETECTIONS_AN_IMAGE = 7.3, 75
MB = 1e6

Numbers = list[float]
Read = Callable[[], Callable[[], Numbers]]  # reads the files, and returns what evaluates them


def write_files(folder: Path, num_images: int, seed: int = 0) -> None:
    """Write folder/annotations.json and folder/results.json."""
    rng = random.Random(seed)
    # Objects to choose from, each as it is and as it is found, somewhat off.
    pool = [[outlined(rng, shape, shift) for shift in (0, 2, 5, 12)] for shape in range(NUM_OBJECTS)]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(num_images):
        true = [(rng.randrange(NUM_OBJECTS), rng.randint(1, NUM_CATEGORIES)) for _ in range(number_of_objects(rng))]
        for shape, category_id in true:
            polygon, bbox, _ = pool[shape][0]
            box_area = bbox[2] * bbox[3]
            one = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id, "bbox": bbox}
            one |= {"segmentation": [polygon], "area": 0.7 * box_area, "iscrowd": 0}
            if rng.random() < 0.01:
                one |= {"segmentation": pool[shape][0][2], "iscrowd": 1}
            annotations.append(one)
        for _ in range(DETECTIONS_AN_IMAGE):
            shape, category_id = rng.choice(true) if true and rng.random() < 0.3 else (rng.randrange(NUM_OBJECTS), 0)
            _, bbox, encoded = rng.choice(pool[shape])
            if not category_id or rng.random() < 0.1:
                category_id = rng.randint(1, NUM_CATEGORIES)
            one = {"image_id": image_id, "category_id": category_id, "bbox": bbox, "segmentation": encoded}
            results.append(one | {"score": round(rng.random(), 5)})
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(num_images)]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, NUM_CATEGORIES + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    # The others take a box's area for that of its mask where a detection has both, so each kind gets its own file.
    for kind, unwanted in (("bbox", "segmentation"), ("segm", "bbox")):
        kept = [{key: value for key, value in one.items() if key != unwanted} for one in results]
        (folder / f"results_{kind}.json").write_text(json.dumps(kept))


def number_of_objects(rng: random.Random) -> int:
    """How many an image has: mostly few, at times dozens, 6.8 in the mean."""
    return min(int(rng.expovariate(1 / EXPONENTIAL_MEAN)), 60)


def outlined(rng: random.Random, shape: int, shift: int) -> tuple[list[float], list[float], dict[str, Any]]:
    """A dented ellipse of 30 points, moved a little: its polygon, its box and its mask."""
    of_shape = np.random.default_rng(shape)
    width, height = (float(min(8 + of_shape.lognormal(4, 0.9), 0.9 * side)) for side in (WIDTH, HEIGHT))
    left, top = of_shape.uniform(0, WIDTH - width), of_shape.uniform(0, HEIGHT - height)
    angles, radii = np.linspace(0, 2 * np.pi, 30, endpoint=False), of_shape.uniform(0.35, 0.5, 30)
    move = [rng.uniform(-shift, shift) for _ in range(2)]
    xs = np.clip(left + move[0] + width * (0.5 + radii * np.cos(angles)), 0, WIDTH)
    ys = np.clip(top + move[1] + height * (0.5 + radii * np.sin(angles)), 0, HEIGHT)
    polygon = np.stack((xs, ys), axis=1).round(2).ravel().tolist()
    bbox = [round(float(value), 2) for value in (xs.min(), ys.min(), np.ptp(xs), np.ptp(ys))]
    (encoded,) = coco_mask.frPyObjects([np.array(polygon)], HEIGHT, WIDTH)
    return polygon, bbox, {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}


# Imports stand inside: each process pays, and is charged, only for what it measures.


def by_coco_classes(package: str, folder: Path, kind: str) -> Read:
    """pycocotools, or one that goes by its classes."""
    if package == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    elif package == "hotcoco":
        from hotcoco import COCO, COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval

    def read() -> Callable[[], Numbers]:
        truth = COCO(str(folder / "annotations.json"))
        found = truth.loadRes(str(folder / f"results_{kind}.json"))

        def evaluate() -> Numbers:
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            return [float(number) for number in evaluation.stats[:12]]

        return evaluate

    return read


def by_ours(backend: Any, folder: Path, kind: str) -> Read:
    """What `resnest-det evaluate` does before it looks at the errors."""
    from resnest_det.data import read_coco_targets
    from resnest_det.evaluation import CocoMeanAveragePrecision, read_coco_results

    masks = kind == "segm"

    def read() -> Callable[[], Numbers]:
        truth = read_coco_targets(folder / "annotations.json", masks=masks)
        image_ids = [target["image_id"] for target in truth.targets]
        path = folder / f"results_{kind}.json"
        found = read_coco_results(path, image_ids=image_ids, labels=truth.labels, masks=masks)

        def evaluate() -> Numbers:
            metric = CocoMeanAveragePrecision(truth.class_names, masks=masks, backend=backend)
            metric.update([found[image_id] for image_id in image_ids], truth.targets)
            return list(metric.compute().values())[-12:]

        return evaluate

    return read


WAYS: dict[str, Callable[[Path, str], Read]] = {
    "pycocotools": lambda folder, kind: by_coco_classes("pycocotools", folder, kind),
    "faster-coco-eval": lambda folder, kind: by_coco_classes("faster_coco_eval", folder, kind),
    "hotcoco": lambda folder, kind: by_coco_classes("hotcoco", folder, kind),
    "CocoMeanAveragePrecision": lambda folder, kind: by_ours("pycocotools", folder, kind),
    'CocoMeanAveragePrecision(backend="hotcoco")': lambda folder, kind: by_ours("hotcoco", folder, kind),
}


# What each needs.
PACKAGES = {
    "pycocotools": "pycocotools",
    "faster-coco-eval": "faster_coco_eval",
    "hotcoco": "hotcoco",
    "CocoMeanAveragePrecision": "pycocotools",
    'CocoMeanAveragePrecision(backend="hotcoco")': "hotcoco",
}


def installed_ways() -> list[str]:
    """The ways whose package is installed; a line is printed of each of the others."""
    installed = []
    for way, package in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            print(f"{way} is left out: {package} is not installed\n")
        else:
            installed.append(way)
    return installed


def measure(way: str, folder: Path, kind: str) -> dict[str, Any]:
    """Seconds of both steps, by how many MB they raise the peak, and the numbers."""
    with redirect_stdout(sys.stderr):
        read = WAYS[way](folder, kind)
        before, start = peak_mb(), time.perf_counter()
        evaluate = read()
        between = time.perf_counter()
        numbers = evaluate()
        end = time.perf_counter()
    return {"read": between - start, "evaluate": end - between, "peak": peak_mb() - before, "numbers": numbers}


def peak_mb() -> float:
    """The highest resident set of this process so far."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1]) / MB


def in_a_fresh_process(way: str, folder: Path, kind: str) -> dict[str, Any]:
    """What `measure` returns there."""
    command = [sys.executable, "-m", "tests.benchmarks.coco_evaluation", "--measure", way, str(folder), kind]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    measured: dict[str, Any] = json.loads(finished.stdout)
    return measured


def spread(values: Iterable[float], digits: int) -> str:
    """Median (lowest-highest)."""
    low, middle, high = (f"{f(list(values)):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=FULL_SIZE, help="images in the files")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way")
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "FOLDER", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, folder, kind = arguments.measure
        print(json.dumps(measure(way, Path(folder), kind)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, ways = Path(name), installed_ways()
        write_files(folder, arguments.images)
        print(
            f"{arguments.images} images, {DETECTIONS_AN_IMAGE * arguments.images} detections, {os.cpu_count()} cores; "
            f"median of {arguments.repeats} (lowest-highest)\n\n"
            f"| kind | way | seconds to read | seconds to evaluate | both, of pycocotools' | peak MB | AP |\n"
            f"|---|---|---|---|---|---|---|"
        )
        for kind, title in (("bbox", "boxes"), ("segm", "masks")):
            results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
            for _ in range(arguments.repeats):
                for way, measured in results.items():
                    measured.append(in_a_fresh_process(way, folder, kind))
            seconds = {
                way: statistics.median(once["read"] + once["evaluate"] for once in measured)
                for way, measured in results.items()
            }
            for way, measured in results.items():
                row = [
                    *(spread([once[step] for once in measured], 2) for step in ("read", "evaluate")),
                    f"1/{seconds['pycocotools'] / seconds[way]:.1f}",
                    spread([once["peak"] for once in measured], 0),
                    f"{measured[0]['numbers'][0]:.6f}",
                ]
                print(f"| {title} | {way} | {' | '.join(row)} |")
            numbers = np.array([measured[0]["numbers"] for measured in results.values()])
            assert np.ptp(numbers, axis=0).max() < 1e-9, (
                f"the ways disagree: {dict(zip(results, numbers, strict=True))}"
            )


if __name__ == "__main__":
    main()
