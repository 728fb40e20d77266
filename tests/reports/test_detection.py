"""What is written after an evaluation: it is what the metric's own images give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from resnest_det.evaluation import CocoMeanAveragePrecision, confusion_matrix, error_breakdown, precision_recall
from resnest_det.reports import write_detection_report


def evaluated(*, masks: bool = False, crowd: bool = False) -> CocoMeanAveragePrecision:
    """One image with an object found, one found as another class, and one missed."""
    boxes = torch.tensor([[10.0, 10.0, 40.0, 40.0], [50.0, 50.0, 90.0, 90.0], [5.0, 60.0, 30.0, 90.0]])
    target = {"image_id": 1, "boxes": boxes, "labels": torch.tensor([1, 1, 2]), "iscrowd": torch.tensor([crowd] * 3)}
    found = {"boxes": boxes[:2], "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.8])}
    if masks:
        dense = np.zeros((100, 100, 3), np.uint8, order="F")
        for number, (x1, y1, x2, y2) in enumerate(boxes.int().tolist()):
            dense[y1:y2, x1:x2, number] = 1
        encoded = coco_mask.encode(dense)
        target["masks"], found["masks"] = encoded, encoded[:2]
    metric = CocoMeanAveragePrecision({1: "disc", 2: "square"}, masks=masks)
    metric.update([found], [target])
    metric.compute()
    return metric


@pytest.mark.parametrize("masks", [False, True])
def test_writes_the_errors_and_their_pictures(masks: bool, tmp_path: Path) -> None:
    metric = evaluated(masks=masks)
    table = write_detection_report(tmp_path, metric, masks=masks, suffix="_here")
    expected = error_breakdown(metric.images.values(), metric.class_names, masks=masks)
    matrix = confusion_matrix(metric.images.values(), metric.class_names, masks=masks)
    assert table == f"{expected.table()}\n\n{matrix.table(limit=10)}"
    counts = json.loads((tmp_path / "confusion_matrix_here.json").read_text())
    assert counts == {
        "class_names": ["disc", "square", "background"],
        "counts": [[1, 1, 0], [0, 0, 1], [0, 0, 0]],
        "score_threshold": 0.3,
        "iou_threshold": 0.5,
    }
    curves = json.loads((tmp_path / "precision_recall_here.json").read_text())
    of_class = precision_recall(metric.images.values(), metric.class_names, iou_thresholds=(0.5,), masks=masks)
    assert curves["class_names"] == list(of_class.class_names)
    np.testing.assert_allclose(curves["precisions"], of_class.precisions[0], atol=1e-4)
    np.testing.assert_allclose(curves["recalls"], np.linspace(0, 1, 101), atol=1e-9)
    written = json.loads((tmp_path / "errors_here.json").read_text())
    assert written["main"]["classification"]["delta_ap"] == expected.main["classification"].delta_ap > 0
    pictures = ["confusion_matrix_here.png", "errors_here.png", "precision_recall_here.png"]
    assert sorted(file.name for file in tmp_path.glob("*.png")) == pictures
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300


def test_without_objects_there_are_no_errors_to_tell_apart(tmp_path: Path) -> None:
    assert write_detection_report(tmp_path, evaluated(crowd=True)).startswith("no objects in the images")
    assert not list(tmp_path.iterdir())
