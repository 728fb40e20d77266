"""From an annotation file through data set, loader and metric: the numbers of pycocotools on the files."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from resnest_det.data import ADE20K, CocoDetection, eval_loader, read_class_list
from resnest_det.data.sample import write_sample_dataset
from resnest_det.evaluation import CocoMeanAveragePrecision, MeanIoU, evaluate


class Recall(nn.Module):
    """A detector that knows the answers and garbles them: moved, mislabelled, missed and invented boxes."""

    def __init__(self, dataset: CocoDetection) -> None:
        super().__init__()
        self.targets = iter(dataset[index][1] for index in range(len(dataset)))
        self.num_classes = dataset.num_classes
        self.rng = np.random.default_rng(0)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.garble(next(self.targets), image.shape[2]) for image in images]

    def garble(self, target: dict[str, Any], width: int) -> dict[str, Tensor]:
        known = target["boxes"][torch.from_numpy(self.rng.random(len(target["boxes"])) < 0.8)]
        invented = torch.from_numpy(self.rng.uniform(0, width / 2, (3, 4)).astype(np.float32))
        invented[:, 2:] += invented[:, :2] + 1
        boxes = torch.cat([known + torch.from_numpy(self.rng.normal(0, 2, known.shape).astype(np.float32)), invented])
        boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 1)
        labels = torch.from_numpy(self.rng.integers(1, self.num_classes, len(boxes)))
        labels[: len(known)] = torch.where(
            torch.from_numpy(self.rng.random(len(known)) < 0.9), self.labels_of(target, known), labels[: len(known)]
        )
        return {"boxes": boxes, "labels": labels, "scores": torch.from_numpy(self.rng.random(len(boxes)))}

    @staticmethod
    def labels_of(target: dict[str, Any], known: Tensor) -> Tensor:
        if not len(known):
            return target["labels"][:0]
        rows = (target["boxes"][None] == known[:, None]).all(2).float().argmax(1)
        return target["labels"][rows]


class Noting(CocoMeanAveragePrecision):
    """Also keeps what it is given as a results file of COCO."""

    def __init__(self, dataset: CocoDetection) -> None:
        super().__init__(dataset.class_names)
        self.category_ids = dataset.category_ids
        self.results: list[dict[str, Any]] = []

    def update(self, predictions: Any, targets: Any) -> None:
        super().update(predictions, targets)
        for prediction, target in zip(predictions, targets, strict=True):
            columns = (prediction[key].tolist() for key in ("boxes", "labels", "scores"))
            for (x1, y1, x2, y2), label, score in zip(*columns, strict=True):
                self.results.append(
                    {
                        "image_id": target["image_id"],
                        "category_id": self.category_ids[label],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": score,
                    }
                )


def check(images: Path, annotations: Path, scratch: Path) -> None:
    dataset = CocoDetection(images, annotations)
    metric = Noting(dataset)
    numbers = evaluate(Recall(dataset), eval_loader(dataset, batch_size=2, num_workers=0), metric)
    (scratch / "results.json").write_text(json.dumps(metric.results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(scratch / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert list(numbers.values()) == pytest.approx(evaluation.stats.tolist(), abs=1e-9)
    assert 0.1 < numbers["AP"] < 0.9


def test_sample(tmp_path: Path) -> None:
    write_sample_dataset(tmp_path / "sample", num_train=1, num_val=24)
    check(tmp_path / "sample" / "val", tmp_path / "sample" / "annotations" / "instances_val.json", tmp_path)


@pytest.mark.parametrize(
    ("name", "images", "annotations"),
    [
        ("coco_tiny", "val2017", "annotations/instances_val2017.json"),
        ("bccd", "JPEGImages", "annotations_coco/instances_val.json"),
    ],
)
def test_real(name: str, images: str, annotations: str, real_data: Callable[[str], Path], tmp_path: Path) -> None:
    check(real_data(name) / images, real_data(name) / annotations, tmp_path)


@pytest.mark.parametrize("source", ["sample", "ade20k_samples"])
def test_masks_given_as_prediction_score_one(source: str, tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    """Data set, loader, evaluation and metric agree on every class of every pixel; what is ignored is not looked at."""
    if source == "sample":
        write_sample_dataset(tmp_path / "sample", num_train=1, num_val=12)
        root = tmp_path / "sample" / "ade20k"
        dataset = ADE20K(root, "validation", class_names=read_class_list(root / "classes.txt"))
    else:
        dataset = ADE20K(real_data(source) / "ADEChallengeData2016", "validation")
    masks = iter(dataset[index][1] for index in range(len(dataset)))
    wrong = 0  # pixels whose predicted class is made wrong

    def predict(_model: nn.Module, images: list[Tensor]) -> list[Tensor]:
        answers = [next(masks).long() for _ in images]
        answers = [torch.where(answer == 255, 3, answer) for answer in answers]
        answers[0].view(-1)[:wrong] = (answers[0].view(-1)[:wrong] + 1) % dataset.num_classes
        return answers

    metric = MeanIoU(dataset.class_names)
    loader = eval_loader(dataset, batch_size=3, num_workers=0)
    results = evaluate(nn.Identity(), loader, metric, predict=predict)
    assert results == {"mIoU": 1.0, "mAcc": 1.0, "aAcc": 1.0, "fwIoU": 1.0}
    # The metric's pixels are the files', where 0 is the one value that counts for nothing.
    values = [np.asarray(Image.open(dataset.mask_path(index))) for index in range(len(dataset))]
    pixels = np.bincount(np.concatenate([value.ravel() for value in values]), minlength=dataset.num_classes + 1)[1:]
    assert [row.share for row in metric.per_class()] == pytest.approx((pixels / pixels.sum()).tolist())
    assert len(metric.absent) == int((pixels == 0).sum())
    masks, wrong = iter(dataset[index][1] for index in range(len(dataset))), 500
    assert evaluate(nn.Identity(), loader, metric, predict=predict)["aAcc"] < 1
