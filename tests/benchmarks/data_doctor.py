"""How long the data doctor takes: `python -m tests.benchmarks.data_doctor [--photos FOLDER]`.

Prints a table: the checks of an annotation file of the size of COCO's train2017 (118 000 images, 830 000 annotations
with polygons, no pictures), in one process; and what an image takes to open, decode and hash, beside decoding it as
training does. Without a folder of photos, generated ones of 640 x 480 are taken. Times are of the processor.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from resnest_det.data.files import read_rgb
from resnest_det.reports.anchor_fit import Anchors
from resnest_det.reports.coco_doctor import examine_coco
from resnest_det.reports.image_files import open_image
from tests.benchmarks.coco_scale import FULL_SIZE, write_coco

NUM_PHOTOS = 100


def write_photos(folder: Path) -> None:
    """Smooth noise, which as JPEG is about as large as a photo."""
    generator = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        coarse = generator.integers(0, 256, (160, 213, 3), np.uint8)
        pixels = cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=FULL_SIZE, help="images in the annotation file")
    parser.add_argument("--photos", type=Path, help="a folder of JPEG files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, num_annotations = write_coco(folder, arguments.images)
        splits = {"train": (folder / "images", file)}
        checks = seconds(lambda: examine_coco(splits, masks=True, anchors=Anchors(), decode=False, progress=False))
        photos = arguments.photos
        if photos is None:
            photos = folder / "photos"
            photos.mkdir()
            write_photos(photos)
        files = sorted(photos.glob("*.jpg"))[:NUM_PHOTOS]
        sizes = [Image.open(file).size for file in files]
        opened = seconds(lambda: [open_image(str(file)) for file in files]) / len(files)
        read = seconds(lambda: [read_rgb(file, *size) for file, size in zip(files, sizes, strict=True)]) / len(files)
        kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1000
    print("| what | seconds |\n|---|---|")
    print(f"| the checks of {arguments.images} images and {num_annotations} annotations | {checks:.1f} |")
    print(f"| an image of {kilobytes:.0f} kB opened, decoded and hashed | {opened:.5f} |")
    print(f"| the same read for training | {read:.5f} |")
    print(f"| {arguments.images} of them, on one core | {arguments.images * opened:.0f} |")


if __name__ == "__main__":
    main()
