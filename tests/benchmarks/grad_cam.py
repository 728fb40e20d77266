"""Whether Grad-CAM of a detection is brightest in the object that was detected: `python -m tests.benchmarks.grad_cam`.

Over the sample's validation images, with the detector of `python train_det.py` (`make demo`): the detections with a
score from 0.5 that are right (of an object's class, IoU from 0.5), with gradients averaged over the image as published,
and of each position, as `grad_cam` has them for detectors.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torchvision.ops import box_iou

from resnest_det.attention import detection_score, grad_cam
from resnest_det.build import build_coco_set
from resnest_det.config import DetectionSettings
from resnest_det.predictor import Predictor

MIN_SCORE = MIN_IOU = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="runs/sample", help="a run folder of train_det.py (%(default)s)")
    parser.add_argument("--images", type=int, default=60, help="validation images (%(default)s)")
    arguments = parser.parse_args()
    predictor = Predictor.from_checkpoint(arguments.run, device="cpu")
    settings = predictor.settings
    assert isinstance(settings, DetectionSettings)
    dataset = build_coco_set(settings.data, "val")
    rows: dict[bool, list[tuple[bool, float]]] = {True: [], False: []}  # by pooled: brightest inside, part inside
    for index in range(min(arguments.images, len(dataset))):
        pixels, target = dataset[index][:2]
        image = pixels / 255
        with torch.no_grad():
            found = predictor.model([image])[0]
        if len(target["boxes"]) == 0:
            continue
        overlaps, objects = box_iou(found["boxes"], target["boxes"]).max(dim=1)
        right = (found["labels"] == target["labels"][objects]) & (overlaps >= MIN_IOU) & (found["scores"] >= MIN_SCORE)
        for place in right.nonzero().flatten().tolist():
            left, top, right_edge, bottom = target["boxes"][objects[place]].round().int().tolist()
            for pooled, results in rows.items():
                heat = grad_cam(predictor.model, image, detection_score(place), pooled=pooled).numpy()
                row, column = np.unravel_index(heat.argmax(), heat.shape)
                inside = left <= column <= right_edge and top <= row <= bottom and heat.any()
                part = heat[top : bottom + 1, left : right_edge + 1].sum() / max(heat.sum(), 1e-9)
                results.append((bool(inside), float(part)))
    print(f"{len(rows[True])} right detections in {arguments.images} images")
    for pooled, results in rows.items():
        inside, part = np.mean(results, axis=0)
        name = "averaged over the image" if pooled else "of each position"
        print(f"gradient {name:24} brightest in the object's box {inside:4.0%}   of the map in it {part:4.0%}")


if __name__ == "__main__":
    main()
