"""Recall on a large scene, whole and in tiles: `python -m tests.benchmarks.sliced_inference --checkpoint RUN/best.pt`.

RUN is the run folder of `python train_det.py` (the sample data). The scene is generated, 4000x3000 pixels: the grounds
and the objects of the sample data set, none overlapping another. Small, medium and the lesser of the large objects are
drawn as they are there; the others, up to 600 pixels, are magnified, as what is near in a photograph.

Each way of running the detector is measured in a process of its own, interleaved, so that a slow spell of the machine
meets all of them. Prints a Markdown table: the part of the objects of COCO's three sizes that was found (class and IoU
of 0.5 or more), the detections scored 0.5 or more that found none, seconds as medians with (lowest-highest), and the
process's peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from resnest_det.backbones import load_weights
from resnest_det.build import build_detector
from resnest_det.config import DetectionSettings, load_settings
from resnest_det.data import sample
from resnest_det.evaluation import DetectionInference

HEIGHT, WIDTH, GROUND = 3000, 4000, 500  # pixels; the last is the side of a piece of ground
# How many objects, and the square root of their areas in pixels.
OBJECTS = ((8, (250.0, 600.0)), (20, sample._LARGE), (100, sample._MEDIUM), (300, sample._SMALL))
DRAWN_SIZE = 90.0  # of the objects that are magnified, before
COCO_SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}  # areas in pixels²
LIMIT = 1000  # proposals and detections of one call, for every way: the sample detector's own 100 are too few here
MATCHED, SURE = 0.5, 0.5  # IoU of a found object, score of a false detection that counts


class Truth(NamedTuple):
    boxes: Tensor  # (N, 4) xyxy
    labels: Tensor  # (N,)
    areas: Tensor  # (N,)


def draw_scene(seed: int) -> tuple[NDArray[np.uint8], Truth]:
    """The image (H, W, 3) and its objects."""
    rng = np.random.default_rng(seed)
    image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    grounds = {}  # the mean colours of each piece
    for top in range(0, HEIGHT, GROUND):
        for left in range(0, WIDTH, GROUND):
            ground, _, colours = sample._draw_ground(GROUND, GROUND, rng)
            image[top : top + GROUND, left : left + GROUND] = ground
            grounds[top // GROUND, left // GROUND] = colours
    boxes: list[list[float]] = []
    labels, areas = [], []
    for count, sizes in OBJECTS:
        for _ in range(count):
            shape, size = int(rng.integers(len(sample.SHAPES))), float(rng.uniform(*sizes))
            while True:
                x, y = rng.uniform(size, WIDTH - size), rng.uniform(size, HEIGHT - size)
                near = grounds[int(y) // GROUND, int(x) // GROUND]
                colours = [
                    np.array(colour, np.float32)
                    for colour in sample._OBJECT_COLOURS
                    if min(np.linalg.norm(colour - ground) for ground in near) >= sample._MIN_COLOUR_DISTANCE
                ]
                factor = max(1.0, size / DRAWN_SIZE) if size > sample._LARGE[1] else 1.0
                patch = sample._make_patch(shape, (x / factor, y / factor), size / factor, colours, rng)
                corners = factor * patch.points
                box = [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()]
                if all(box[2] + 6 < b[0] or b[2] + 6 < box[0] or box[3] + 6 < b[1] or b[3] + 6 < box[1] for b in boxes):
                    break
            if factor > 1:
                paint_magnified(image, patch, factor)
            else:
                sample._paint(image, patch)
            boxes.append(box)
            labels.append(shape + 1)
            areas.append(size**2)
    image += rng.normal(0.0, 1.5, image.shape).astype(np.float32)
    truth = Truth(torch.tensor(boxes), torch.tensor(labels), torch.tensor(areas))
    return image.clip(0, 255).round().astype(np.uint8), truth


def paint_magnified(image: NDArray[np.float32], patch: sample._Patch, factor: float) -> None:
    """Paint a patch whose points are in pixels `factor` times as large; without a shadow."""
    low, high = patch.points.min(axis=0), patch.points.max(axis=0)
    left, top = np.floor((low - 4) * factor).clip(min=0).astype(int)
    right, bottom = np.minimum(np.ceil((high + 4) * factor), (WIDTH, HEIGHT)).astype(int)
    window = image[top:bottom, left:right]
    shrunk = cv2.resize(window, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)
    moved = patch._replace(points=patch.points - np.array([left / factor, top / factor], np.float32))
    sample._paint(shrunk, moved)
    inside = sample._coverage(moved.points, shrunk.shape[:2], 0)
    size = (right - left, bottom - top)
    share = cv2.resize(inside, size, interpolation=cv2.INTER_LINEAR)[..., None]
    window += share * (cv2.resize(shrunk, size, interpolation=cv2.INTER_LINEAR) - window)


def ways(tile: int, min_size: int) -> dict[str, DetectionInference]:
    same_scale = round(HEIGHT * min_size / tile)
    return {
        f"whole image, short side {min_size} (the model's)": DetectionInference(),
        f"whole image, short side {same_scale} (the tiles' scale)": DetectionInference(short_sides=(same_scale,)),
        f"tiles of {tile}": DetectionInference(tile=tile),
        f"tiles of {tile}, and the whole image": DetectionInference(tile=tile, whole_image=True),
        f"tiles of {tile}, and the whole image, tile_match=iou": DetectionInference(
            tile=tile, whole_image=True, tile_match="iou"
        ),
    }


def load_detector(checkpoint: Path) -> tuple[Any, int]:
    """The run's detector, and the short side that it resizes to."""
    overrides = [f"model.rpn_proposals_eval={LIMIT}", f"model.detections_per_image={LIMIT}"]
    settings = load_settings(DetectionSettings, checkpoint.parent / "config.toml", overrides).model
    model = build_detector(settings, len(sample.SHAPES) + 1, load_weights=False)
    load_weights(model, checkpoint)
    return model.eval(), settings.min_size


def compare_with(truth: Truth, found: dict[str, Tensor]) -> dict[str, Any]:
    """The part of the objects of each size that was found, and the sure detections that found none."""
    overlaps = box_iou(found["boxes"], truth.boxes) * (found["labels"][:, None] == truth.labels)
    is_found = torch.zeros(len(truth.boxes), dtype=torch.bool)
    num_false = 0
    for score, of_detection in zip(found["scores"].tolist(), overlaps, strict=True):  # best first
        best, position = (of_detection * ~is_found).max(dim=0)
        if best >= MATCHED:
            is_found[position] = True
        elif score >= SURE:
            num_false += 1
    recalls = {}
    for name, (smallest, largest) in COCO_SIZES.items():
        of_size = (truth.areas >= smallest) & (truth.areas < largest)
        recalls[name] = is_found[of_size].float().mean().item()
    return {"recalls": recalls, "false": num_false}


def measure(way: str, checkpoint: Path, tile: int, scene: Path) -> dict[str, Any]:
    model, min_size = load_detector(checkpoint)
    with np.load(scene) as arrays:
        image = torch.from_numpy(arrays["image"]).permute(2, 0, 1).float() / 255
        truth = Truth(*(torch.from_numpy(arrays[name]) for name in Truth._fields))
    predict = ways(tile, min_size)[way]
    start = time.perf_counter()
    (found,) = predict(model, [image])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_mb(), **compare_with(truth, found)}


def peak_mb() -> float:
    """The highest resident set of this process so far; getrusage's would begin with that of the process it is from."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1]) / 1e6


def in_a_fresh_process(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.sliced_inference", *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pt of a run on the sample data")
    parser.add_argument("--tile", type=int, default=208, help="side of the tiles; such are the sample images")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each way")
    parser.add_argument("--seed", type=int, default=0, help="of the scene")
    parser.add_argument("--picture", type=Path, help="where to write the scene as a picture too")
    parser.add_argument("--way", nargs=2, metavar=("WAY", "SCENE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        way, scene = arguments.way
        print(f"\n{json.dumps(measure(way, arguments.checkpoint, arguments.tile, Path(scene)))}")
        return
    _, min_size = load_detector(arguments.checkpoint)
    image, truth = draw_scene(arguments.seed)
    if arguments.picture:
        cv2.imwrite(str(arguments.picture), image[..., ::-1])
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways(arguments.tile, min_size)}
    with tempfile.TemporaryDirectory() as folder:
        scene = Path(folder) / "scene.npz"
        np.savez(scene, image=image, **{name: values.numpy() for name, values in truth._asdict().items()})
        common = ("--checkpoint", arguments.checkpoint, "--tile", arguments.tile)
        for _ in range(arguments.repeats):
            for way, measured in results.items():
                measured.append(in_a_fresh_process(*common, "--way", way, scene))
    counts = {
        name: int(((truth.areas >= smallest) & (truth.areas < largest)).sum())
        for name, (smallest, largest) in COCO_SIZES.items()
    }
    headings = " | ".join(f"recall, {count} {name}" for name, count in counts.items())
    print(
        f"{WIDTH}x{HEIGHT} pixels, {len(truth.boxes)} objects, {torch.get_num_threads()} threads; median of "
        f"{arguments.repeats} (lowest-highest)\n\n"
        f"| way | {headings} | false | seconds | peak memory, MB |\n|---|{'---|' * (len(counts) + 3)}"
    )
    for way, measured in results.items():
        seconds = [once["seconds"] for once in measured]
        low, middle, high = (f"{f(seconds):.1f}" for f in (min, statistics.median, max))
        recalls = " | ".join(f"{recall:.3f}" for recall in measured[0]["recalls"].values())
        peak = statistics.median(once["peak"] for once in measured)
        print(f"| {way} | {recalls} | {measured[0]['false']} | {middle} ({low}-{high}) | {peak:.0f} |")


if __name__ == "__main__":
    main()
