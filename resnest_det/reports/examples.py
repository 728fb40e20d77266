"""The validation images that went worst and best, drawn with their ground truth beside the prediction."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from resnest_det.data import CocoDetection, MaskFolder
from resnest_det.evaluation import CocoMeanAveragePrecision, ImageBoxes, image_f1_scores
from resnest_det.reports.page import write_whole
from resnest_det.visualize import class_colour, draw_boxes, paint_segmentation

Key = TypeVar("Key")
Picture = npt.NDArray[np.uint8]  # (H, W, 3)
Colour = tuple[int, int, int]

_SCORE_THRESHOLD, _IOU_THRESHOLD = 0.5, 0.5
_LONGEST_SIDE = 720  # pixels of a picture; a larger one is reduced
_QUALITY = 80  # of WebP
_NOT_LABELLED = 255


@dataclass(frozen=True)
class Example:
    """One image: its file's name, its score, what that is made of, and its pictures by title."""

    name: str
    score: float
    note: str
    pictures: dict[str, Picture]


@dataclass(frozen=True)
class Examples:
    """Every validation image's score, and the images that went worst and best, each group from its extreme on."""

    score_name: str
    scores: dict[str, float]  # by the name of the image's file
    worst: list[Example]
    best: list[Example]
    legend: dict[str, Colour] = field(default_factory=dict)  # RGB of each class that is painted, by its name


def detection_examples(
    metric: CocoMeanAveragePrecision, dataset: CocoDetection, num_images: int, *, masks: bool = False
) -> Examples:
    """The images of an evaluation by their F1 score, of detections scored 0.5 and more at an IoU of 0.5.

    Args:
        metric: holds the images, so that the model is not run again.
        dataset: what was evaluated; the chosen images are read from it.
        num_images: pictures in all, a third of them of the best.
        masks: score and draw masks.
    """
    images = metric.images
    scores = image_f1_scores(
        images.values(),
        metric.class_names,
        score_threshold=_SCORE_THRESHOLD,
        iou_threshold=_IOU_THRESHOLD,
        masks=masks,
    )
    by_id = dict(zip(images, scores, strict=True))
    places = {image_id: place for place, image_id in enumerate(dataset.image_ids.tolist())}
    worst, best = extremes(
        {image_id: score.f1 for image_id, score in by_id.items()},
        num_images,
        weights={image_id: score.right + score.wrong + score.missed for image_id, score in by_id.items()},
    )

    def example(image_id: int) -> Example:
        score = by_id[image_id]
        return Example(
            name=dataset.file_name(places[image_id]),
            score=score.f1,
            note=f"{score.right} found, {score.missed} missed, {score.wrong} wrong",
            pictures=_draw_detections(dataset[places[image_id]][0], images[image_id], metric.class_names, masks=masks),
        )

    return Examples(
        score_name=f"F1 of {'masks' if masks else 'boxes'} at IoU {_IOU_THRESHOLD:g}, of detections scored "
        f"{_SCORE_THRESHOLD:g} and more",
        scores={dataset.file_name(places[image_id]): score.f1 for image_id, score in by_id.items()},
        worst=[example(image_id) for image_id in worst],
        best=[example(image_id) for image_id in best],
    )


def segmentation_examples(
    scores: Mapping[str, float],
    dataset: MaskFolder,
    predict: Callable[[Tensor], Tensor],
    num_images: int,
    *,
    colours: Mapping[int, Colour] | None = None,
) -> Examples:
    """The images of an evaluation by their mean IoU.

    Args:
        scores: `MeanIoU.image_scores`; images of which nothing is labelled, -1.0, are left out.
        dataset: what was evaluated; the chosen images are read from it.
        predict: gives the label map (H, W) of a uint8 image (3, H, W). It is called for the chosen images.
        num_images: pictures in all, a third of them of the best.
        colours: the RGB colour, 0..255, of each label; None for `class_colour`.
    """
    labelled = {name: score for name, score in scores.items() if score >= 0}
    worst, best = extremes(labelled, num_images)
    places = {dataset.file_name(index): index for index in range(len(dataset))}
    seen: set[int] = set()

    def example(name: str) -> Example:
        image, mask = dataset[places[name]]
        predicted = predict(image).cpu()
        label_maps = {"ground truth": mask.numpy(), "prediction": predicted.numpy().astype(np.uint8)}
        labels = {label for values in label_maps.values() for label in np.unique(values).tolist()}
        seen.update(labels - {_NOT_LABELLED})
        wrong = (mask != predicted) & (mask != _NOT_LABELLED)
        return Example(
            name=name,
            score=labelled[name],
            note=f"{wrong.sum().item() / max((mask != _NOT_LABELLED).sum().item(), 1):.1%} of the pixels wrong",
            pictures=_paint_segmentations(image.permute(1, 2, 0).numpy(), label_maps, colours),
        )

    examples = Examples(
        score_name="mean IoU of the classes in the image",
        scores=labelled,
        worst=[example(name) for name in worst],
        best=[example(name) for name in best],
    )
    for label in sorted(seen):
        examples.legend[dataset.class_names[label]] = colours[label] if colours else class_colour(label)
    return examples


def extremes(
    scores: Mapping[Key, float], num_chosen: int, *, weights: Mapping[Key, float] | None = None
) -> tuple[list[Key], list[Key]]:
    """The keys with the lowest scores, from the lowest on, and those with the highest, from the highest on.

    A third of `num_chosen`, rounded down, are of the highest. No key is in both. Of equal scores those of greater
    weight come first, then those that came first.
    """
    weights = weights or dict.fromkeys(scores, 0)
    num_chosen = min(num_chosen, len(scores))
    num_best = num_chosen // 3
    worst = sorted(scores, key=lambda key: (scores[key], -weights[key]))[: num_chosen - num_best]
    others = [key for key in scores if key not in set(worst)]
    return worst, sorted(others, key=lambda key: (-scores[key], -weights[key]))[:num_best]


def write_examples(folder: Path, examples: Examples, *, suffix: str = "") -> None:
    """Write examples{suffix}.json into a folder, and the pictures beside it, into examples{suffix}/."""
    pictures = folder / f"examples{suffix}"
    content: dict[str, Any] = {
        "score": examples.score_name,
        "images": examples.scores,
        "legend": examples.legend,
    }
    for group, chosen in (("worst", examples.worst), ("best", examples.best)):
        content[group] = [
            {
                "name": example.name,
                "score": example.score,
                "note": example.note,
                "pictures": _save_pictures(folder, pictures, f"{group}_{number}", example.pictures),
            }
            for number, example in enumerate(chosen, start=1)
        ]
    write_whole(folder / f"examples{suffix}.json", json.dumps(content, indent=1) + "\n")


def _save_pictures(folder: Path, pictures: Path, stem: str, drawn: Mapping[str, Picture]) -> dict[str, str]:
    """The pictures' files by title, relative to the folder."""
    pictures.mkdir(exist_ok=True)
    files = {}
    for title, picture in drawn.items():
        file = pictures / f"{stem}_{title.replace(' ', '_')}.webp"
        image = Image.fromarray(picture)
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(file, quality=_QUALITY)
        files[title] = file.relative_to(folder).as_posix()
    return files


def _draw_detections(
    image: Tensor, boxes: ImageBoxes, class_names: Mapping[int, str], *, masks: bool
) -> dict[str, Picture]:
    certain = np.flatnonzero(boxes.found_scores >= _SCORE_THRESHOLD)
    return {
        "ground truth": draw_boxes(
            image,
            _xyxy(boxes.true_boxes_xywh),
            boxes.true_labels,
            class_names,
            iscrowd=boxes.true_crowds,
            masks=boxes.true_masks if masks else None,
        ),
        "prediction": draw_boxes(
            image,
            _xyxy(boxes.found_boxes_xywh[certain]),
            boxes.found_labels[certain],
            class_names,
            boxes.found_scores[certain],
            masks=_chosen(boxes.found_masks, certain.tolist()) if masks else None,
        ),
    }


def _paint_segmentations(
    pixels: Picture, label_maps: Mapping[str, Picture], colours: Mapping[int, Colour] | None
) -> dict[str, Picture]:
    """The image, and its label maps painted over it, at the size at which they are shown, so that lines stay sharp."""
    scale = min(1.0, _LONGEST_SIDE / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    drawn = {"image": resized}
    for title, labels in label_maps.items():
        nearest = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        drawn[title] = paint_segmentation(resized, nearest, colours)
    return drawn


def _xyxy(boxes_xywh: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.concatenate((boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]), axis=1)


def _chosen(masks: Sequence[Any] | None, places: Sequence[int]) -> list[Any] | None:
    return None if masks is None else [masks[place] for place in places]
