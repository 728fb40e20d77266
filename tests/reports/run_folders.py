"""Run folders made by hand: what train_det.py and train_seg.py leave behind, with results that are known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from resnest_det.config import DetectionSettings, SegmentationSettings, write_settings
from resnest_det.data import CocoDetection, MaskFolder
from resnest_det.evaluation import CocoMeanAveragePrecision, MeanIoU
from resnest_det.reports import (
    class_tables,
    detection_examples,
    note_end,
    note_start,
    segmentation_examples,
    write_detection_report,
    write_examples,
)

CPU = torch.device("cpu")
SIDE = 64  # pixels of every image
NAMES = {1: "disc", 2: 'a <b>&"bold"'}
BOX = [8.0, 8.0, 40.0, 40.0]
OTHER_BOX = [34.0, 30.0, 60.0, 62.0]
SEGMENT_NAMES = ["ground", "<i>thing"]


def write_images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def detection_set(folder: Path) -> CocoDetection:
    """Four images: of a disc, of two objects, of nothing, and of one of the other class."""
    names = ["one.png", "two.png", "none.png", "last.png"]
    write_images(folder, names)
    boxes = [(1, 1, BOX), (2, 1, BOX), (2, 2, OTHER_BOX), (4, 2, BOX)]
    annotations = [
        {"id": number, "image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
        for number, (image, label, (x1, y1, x2, y2)) in enumerate(boxes, start=1)
    ]
    images = [{"id": n, "file_name": name, "width": SIDE, "height": SIDE} for n, name in enumerate(names, start=1)]
    categories = [{"id": label, "name": name} for label, name in NAMES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(content))
    return CocoDetection(folder, folder / "val.json")


def detection_metric(dataset: CocoDetection, *, score: float = 0.9) -> CocoMeanAveragePrecision:
    """The disc is found, of the two objects one as another class, a detection is where nothing is, the last is missed.

    So the F1 scores are 1, 1/2, 0 and 0.
    """
    found = [
        ([BOX], [1]),
        ([BOX, OTHER_BOX], [1, 1]),
        ([BOX], [2]),
        ([], []),
    ]
    metric = CocoMeanAveragePrecision(dataset.class_names)
    predictions = [
        {
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.full((len(boxes),), score),
        }
        for boxes, labels in found
    ]
    metric.update(predictions, [dataset[index][1] for index in range(len(dataset))])
    metric.compute()
    return metric


def write_settings_and_curves(
    folder: Path, settings: DetectionSettings | SegmentationSettings, curves: dict[str, list[float]]
) -> None:
    """config.toml, and metrics.jsonl with an evaluation after every epoch; the curves are the results, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(settings, folder / "config.toml")
    lines = []
    for epoch, row in enumerate(zip(*curves.values(), strict=True), start=1):
        lines.append(
            {"kind": "train", "epoch": epoch, "step": 10 * epoch, "lr": 0.01, "loss": 1 / epoch, "loss_a": 0.5}
        )
        results = dict(zip(curves, row, strict=True))
        lines.append({"kind": "eval", "epoch": epoch, "step": 10 * epoch, "seconds": 1.0, **results})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_detection_run(
    folder: Path,
    data: Path,
    *,
    seed: int = 0,
    lr: float = 0.02,
    shift: float = 0.0,
    aps: tuple[float, ...] = (0.1, 0.3),
) -> CocoMeanAveragePrecision:
    """A run folder as train_det.py leaves it, but for checkpoints and pictures.

    Args:
        folder: of the run.
        data: where the images are, see `detection_set`.
        seed: run.seed.
        lr: optim.lr.
        shift: added to every result and every class's AP in results.json.
        aps: the results of the evaluations in training.
    """
    settings = DetectionSettings.model_validate(
        {
            "run": {"dir": str(folder), "seed": seed},
            "data": {"root": str(data), "batch_size": 4},
            "model": {"backbone": "resnet18"},
            "optim": {"lr": lr, "epochs": len(aps)},
        }
    )
    write_settings_and_curves(folder, settings, {"AP": list(aps), "AP50": list(aps)})
    note_start(folder, CPU)
    dataset = detection_set(data)
    metric = detection_metric(dataset)
    classes = [asdict(row) for row in class_tables(metric, masks=False)["classes"]]
    for row in classes:
        row["AP"] += shift
    results = {name: value if value == -1 else value + shift for name, value in metric.compute().items()}
    content = {"results": results, "settings": settings.eval.model_dump(mode="json"), "classes": classes}
    (folder / "results.json").write_text(json.dumps(content))
    write_detection_report(folder, metric)
    write_examples(folder, detection_examples(metric, dataset, 4))
    note_end(folder, skipped=["broken.png"], warnings=["a <u>warning</u>"])
    return metric


def mask_set(folder: Path) -> MaskFolder:
    """Three images: all ground, half of each class, and one that nothing is labelled in."""
    names = ["all.png", "half.png", "unlabelled.png"]
    write_images(folder / "images", names)
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for name, mask in zip(names, masks(), strict=True):
        Image.fromarray(mask).save(folder / "masks" / name)
    return MaskFolder(folder / "images", folder / "masks", SEGMENT_NAMES)


def masks() -> list[np.ndarray]:
    half = np.zeros((SIDE, SIDE), np.uint8)
    half[:, SIDE // 2 :] = 1
    return [np.zeros_like(half), half, np.full_like(half, 255)]


def write_segmentation_run(folder: Path, data: Path, *, seed: int = 0) -> MeanIoU:
    """A run folder as train_seg.py leaves it, but for checkpoints and pictures; everything is taken for ground."""
    settings = SegmentationSettings.model_validate(
        {
            "run": {"dir": str(folder), "seed": seed},
            "data": {"root": str(data), "layout": "mask_folder", "classes": "classes.txt"},
        }
    )
    write_settings_and_curves(folder, settings, {"mIoU": [0.1, 0.2], "mAcc": [0.2, 0.3], "aAcc": [0.5, 0.6]})
    note_start(folder, CPU)
    dataset = mask_set(data)
    metric = MeanIoU(dataset.class_names)
    ground = torch.zeros(SIDE, SIDE, dtype=torch.int64)
    names = [dataset.file_name(index) for index in range(3)]
    metric.update([ground] * 3, [dataset[index][1] for index in range(3)], names)
    results = metric.compute()
    content = {
        "results": results,
        "settings": settings.eval.model_dump(mode="json"),
        "classes": [asdict(row) for row in metric.per_class()],
    }
    (folder / "results.json").write_text(json.dumps(content))
    write_examples(folder, segmentation_examples(metric.image_scores, dataset, lambda image: ground, 3))
    note_end(folder, skipped=[], warnings=[])
    return metric
