"""What a detector gets wrong: its errors by kind, its precision by recall, and which classes it confuses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from resnest_det.evaluation import (
    ClassAveragePrecision,
    CocoMeanAveragePrecision,
    confusion_matrix,
    error_breakdown,
    precision_recall,
)
from resnest_det.visualize import draw_confusion_matrix, draw_error_breakdown, draw_precision_recall


def class_tables(metric: CocoMeanAveragePrecision, *, masks: bool) -> dict[str, list[ClassAveragePrecision]]:
    """Each class's results by the name that files of results give them: "classes", and of masks "mask_classes"."""
    return {"classes": metric.per_class()} | ({"mask_classes": metric.per_class(masks=True)} if masks else {})


def write_detection_report(
    folder: Path, metric: CocoMeanAveragePrecision, *, masks: bool = False, suffix: str = ""
) -> str:
    """Write into a folder what a metric's detections get wrong, as numbers and as pictures.

    The files are `errors`, `precision_recall` and `confusion_matrix`, each as `.json` and as `.png`.

    Without any object in the images there is nothing to write.

    Args:
        folder: exists; files of these names are replaced.
        metric: holds the images of an evaluation; their boxes are looked at, or their masks.
        masks: compare masks, which the metric must hold then.
        suffix: what the files' names have before their ending, such as "_masks".

    Returns:
        The errors by kind, and the classes that are confused most, as tables of text.
    """
    images, class_names, limit = metric.images.values(), metric.class_names, metric.max_detections[-1]
    if not any((~image.true_crowds).any() for image in images):
        return "no objects in the images: no errors to tell apart"
    breakdown = error_breakdown(images, class_names, max_detections=limit, masks=masks)
    (folder / f"errors{suffix}.json").write_text(json.dumps(asdict(breakdown), indent=2) + "\n")
    curves = precision_recall(images, class_names, iou_thresholds=(0.5,), max_detections=limit, masks=masks)
    matrix = confusion_matrix(images, class_names, masks=masks)
    precisions = {
        "class_names": curves.class_names,
        "iou_threshold": curves.iou_thresholds[0],
        "recalls": curves.recalls.round(2).tolist(),
        "precisions": curves.precisions[0].round(4).tolist(),
    }
    (folder / f"precision_recall{suffix}.json").write_text(json.dumps(precisions) + "\n")
    confusions = {
        "class_names": [*matrix.class_names, "background"],
        "counts": matrix.counts.tolist(),
        "score_threshold": matrix.score_threshold,
        "iou_threshold": matrix.iou_threshold,
    }
    (folder / f"confusion_matrix{suffix}.json").write_text(json.dumps(confusions) + "\n")
    kind = "masks" if masks else "boxes"
    pictures = {
        "errors": draw_error_breakdown(
            {name: effect.delta_ap for name, effect in breakdown.main.items()},
            {name: effect.delta_ap for name, effect in breakdown.special.items()},
            average_precision=breakdown.AP,
            title=f"{kind}, IoU from {breakdown.foreground_iou:g}",
        ),
        "precision_recall": draw_precision_recall(
            curves.recalls, curves.precisions[0], curves.class_names, title=f"{kind}, IoU from 0.5"
        ),
        "confusion_matrix": draw_confusion_matrix(
            matrix.counts,
            matrix.class_names,
            title=f"{kind}, scores from {matrix.score_threshold:g}, IoU from {matrix.iou_threshold:g}",
        ),
    }
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}{suffix}.png")
    return f"{breakdown.table()}\n\n{matrix.table(limit=10)}"
