"""COCO's twelve numbers against the published ones, against pycocotools itself, and by hand."""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import json
import pickle
import random
import re
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

import resnest_det.evaluation.coco_map as coco_map
from resnest_det.evaluation import CocoMeanAveragePrecision

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
SQUARE = [10.0, 10.0, 60.0, 60.0]
ELSEWHERE = [200.0, 200.0, 250.0, 250.0]
SIDE = 240  # of the pictures with masks, in pixels

Json = dict[str, Any]

HAS_HOTCOCO = importlib.util.find_spec("hotcoco") is not None
BACKENDS = [
    "pycocotools",
    pytest.param("hotcoco", marks=pytest.mark.skipif(not HAS_HOTCOCO, reason="hotcoco is not installed")),
]

# pycocotools' extension module answers NumPy's newer protocol in an older way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def by_pycocotools(truth: Path, found: Path, kind: str = "bbox") -> COCOeval:
    """pycocotools run on the two files as its manual does it: the oracle."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(truth))
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(str(found)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def oracle_of(truth: Json, found: list[Json], folder: Path, kind: str) -> COCOeval:
    """The same for what the files hold. Where a detection has a box, pycocotools takes its area for the mask's."""
    (folder / "truth.json").write_text(json.dumps(truth))
    drop = "segmentation" if kind == "bbox" else "bbox"
    (folder / "found.json").write_text(json.dumps([{k: v for k, v in one.items() if k != drop} for one in found]))
    return by_pycocotools(folder / "truth.json", folder / "found.json", kind)


def xyxy(boxes_xywh: list[list[float]], dtype: torch.dtype) -> Tensor:
    boxes = torch.tensor(boxes_xywh, dtype=torch.float64).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1).to(dtype)


def as_batches(truth: Json, found: list[Json], dtype: torch.dtype) -> tuple[list[Json], list[Json]]:
    """The predictions and targets, image by image, that COCO's two files stand for."""
    true_of, found_of = defaultdict(list), defaultdict(list)
    for annotation in truth["annotations"]:
        true_of[annotation["image_id"]].append(annotation)
    for detection in found:
        found_of[detection["image_id"]].append(detection)
    predictions, targets = [], []
    for image in truth["images"]:
        seen, real = found_of[image["id"]], true_of[image["id"]]
        prediction = {
            "boxes": xyxy([one["bbox"] for one in seen], dtype),
            "labels": torch.tensor([one["category_id"] for one in seen], dtype=torch.int64),
            "scores": torch.tensor([one["score"] for one in seen], dtype=dtype),
        }
        target = {
            "image_id": image["id"],
            "boxes": xyxy([one["bbox"] for one in real], dtype),
            "labels": torch.tensor([one["category_id"] for one in real], dtype=torch.int64),
            "area": torch.tensor([one["area"] for one in real], dtype=dtype),
            "iscrowd": torch.tensor([one["iscrowd"] for one in real], dtype=torch.bool),
        }
        for item, objects in ((prediction, seen), (target, real)):
            if all("segmentation" in one for one in objects):
                item["masks"] = [one["segmentation"] for one in objects]
        predictions.append(prediction)
        targets.append(target)
    return predictions, targets


def classes_of(truth: Json, **arguments: Any) -> CocoMeanAveragePrecision:
    return CocoMeanAveragePrecision({one["id"]: one["name"] for one in truth["categories"]}, **arguments)


def metric_of(truth: Json, found: list[Json], dtype: torch.dtype, **arguments: Any) -> CocoMeanAveragePrecision:
    metric = classes_of(truth, **arguments)
    predictions, targets = as_batches(truth, found, dtype)
    for first in range(0, len(targets), 3):
        metric.update(predictions[first : first + 3], targets[first : first + 3])
    return metric


def assert_equals_pycocotools(metric: CocoMeanAveragePrecision, oracle: COCOeval) -> None:
    masks = oracle.params.iouType == "segm"
    numbers = {name: number for name, number in metric.compute().items() if name.startswith("mask_") == masks}
    assert list(numbers) == [f"mask_{name}" if masks else name for name in NAMES]
    assert list(numbers.values()) == pytest.approx(oracle.stats.tolist(), abs=1e-9)
    precision, recall = oracle.eval["precision"], oracle.eval["recall"]
    non_crowd = [one["category_id"] for one in oracle.cocoGt.anns.values() if not one["iscrowd"]]
    for k, (label, row) in enumerate(zip(oracle.params.catIds, metric.per_class(masks=masks), strict=True)):
        one_class = precision[:, :, k, :, -1]
        expected = [one_class[:, :, 0], one_class[0, :, 0]]
        expected += [one_class[:, :, size] for size in (1, 2, 3)]
        expected += [recall[:, k, 0, -1]]
        numbers = [row.AP, row.AP50, row.APs, row.APm, row.APl, row.AR]
        # Within one class and area range all is -1 or nothing is, so that a plain mean is the oracle.
        assert numbers == pytest.approx([float(values.mean()) for values in expected], abs=1e-9)
        assert (row.label, row.num_boxes) == (label, non_crowd.count(label))


def ellipse(bbox: list[float], compressed: bool = True) -> Json:
    """The ellipse in a box, in a picture of SIDE x SIDE pixels, as run lengths for JSON."""
    x, y, width, height = bbox
    rows, columns = np.mgrid[:SIDE, :SIDE]
    inside = ((columns - x) / width - 0.5) ** 2 + ((rows - y) / height - 0.5) ** 2 < 0.25
    if compressed:
        encoded = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
        return {"size": [SIDE, SIDE], "counts": encoded["counts"].decode()}
    flat = inside.ravel(order="F")
    changes = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    counts = np.diff(changes).tolist()
    return {"size": [SIDE, SIDE], "counts": [0, *counts] if flat[0] else counts}


def random_case(seed: int) -> tuple[Json, list[Json]]:
    """COCO's two files with everything awkward in them, in coordinates that float32 holds exactly.

    Crowds, images without ground truth, images without detections, equal scores, areas on the borders of
    the ranges, more than 100 detections of a class in an image, a class without ground truth (40), one
    without detections (41), and one absent from both (42). Masks are ellipses in their boxes, crowds' as
    uncompressed run lengths, and some of the detections' have no pixel.
    """
    rng = random.Random(seed)
    labels = [1, 2, 5, 40, 41, 42]
    annotations: list[Json] = []
    detections: list[Json] = []

    def box() -> list[float]:
        side = rng.choice([32, 96, 8, 20.25, 50.5, 130])
        other = side if rng.random() < 0.5 else side * rng.choice([0.5, 1.25])
        return [rng.randrange(0, 800) / 4, rng.randrange(0, 800) / 4, side, other]

    for image_id in range(3, 17):
        has_truth, has_detections = image_id != 4, image_id != 5
        for _ in range(rng.randrange(1, 9) * has_truth):
            bbox = box()
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": rng.choice([1, 1, 2, 5, 41]),
                "bbox": bbox,
                "area": rng.choice([bbox[2] * bbox[3], 32.0**2, 96.0**2, 700.25]),
                "iscrowd": int(rng.random() < 0.2),
            }
            annotations.append(annotation)
            for _ in range(rng.randrange(0, 3) * has_detections):
                near = [value + rng.randrange(-12, 13) / 4 for value in bbox]
                label = annotation["category_id"] if rng.random() < 0.8 else 40
                if label != 41:
                    detections.append({"image_id": image_id, "category_id": label, "bbox": near})
        for _ in range((130 if image_id == 6 else 3) * has_detections):
            label = 1 if image_id == 6 else rng.choice([1, 2, 5, 40])
            detections.append({"image_id": image_id, "category_id": label, "bbox": box()})
    rng.shuffle(detections)
    for detection in detections:
        detection["score"] = rng.randrange(1, 9) / 8
        outside = rng.random() < 0.05
        detection["segmentation"] = ellipse([-9, -9, 5, 5] if outside else detection["bbox"])
    for annotation in annotations:
        annotation["segmentation"] = ellipse(annotation["bbox"], compressed=not annotation["iscrowd"])
    categories = [{"id": label, "name": f"class {label}"} for label in labels]
    images = [{"id": image_id, "height": SIDE, "width": SIDE} for image_id in range(3, 17)]
    rng.shuffle(images)
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def prediction_of(*boxes: list[float], label: int = 1, scores: list[float] | None = None) -> Json:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.full((len(boxes),), label),
        "scores": torch.tensor(scores or [0.9] * len(boxes)),
    }


def target_of(*boxes: list[float], image_id: int = 7, label: int = 1) -> Json:
    return {
        "image_id": image_id,
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.full((len(boxes),), label),
    }


def animals(**arguments: Any) -> CocoMeanAveragePrecision:
    return CocoMeanAveragePrecision({1: "cat", 2: "dog"}, **arguments)


def with_masks(item: Json) -> Json:
    """A prediction or target whose objects fill their boxes, its masks dense (N, SIDE, SIDE)."""
    masks = torch.zeros(len(item["boxes"]), SIDE + 20, SIDE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, item["boxes"].int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return item | {"masks": masks}


# --- COCO's own check of its evaluator ---


def coco_reference(folder: Path) -> tuple[Path, Path]:
    return folder / "instances_val2014_100.json", folder / "instances_val2014_fakebbox100_results.json"


def test_fakebbox100_gives_the_published_numbers(real_data: Callable[[str], Path]) -> None:
    folder = real_data("coco_eval_reference")
    truth, found = coco_reference(folder)
    report = (folder / "val2014_fake_eval_res.txt").read_text().split("type=bbox")[1].split("type=")[0]
    published = re.findall(r"= (\d\.\d{3})$", report, flags=re.MULTILINE)
    assert len(published) == 12
    metric = metric_of(json.loads(truth.read_text()), json.loads(found.read_text()), torch.float32)
    assert [f"{number:.3f}" for number in metric.compute().values()] == published


# --- random cases ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_random_cases_equal_pycocotools(seed: int, backend: str, tmp_path: Path) -> None:
    truth, found = random_case(seed)
    metric = metric_of(truth, found, torch.float32, masks=True, backend=backend)
    for kind in ("bbox", "segm"):
        oracle = oracle_of(truth, found, tmp_path, kind)
        assert 0.05 < oracle.stats[0] < 0.95, "the case should tell good numbers from bad ones"
        assert_equals_pycocotools(metric, oracle)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_detections", [(5,), (1, 10, 100, 300)])
def test_other_limits_and_areas_equal_pycocotools(
    backend: str, max_detections: tuple[int, ...], tmp_path: Path
) -> None:
    truth, found = random_case(0)
    oracle = oracle_of(truth, found, tmp_path, "segm")
    oracle.params.maxDets = list(max_detections)
    oracle.params.areaRng = [[0, 1e10], [0, 700.25], [700.25, 2000], [2000, 1e10]]
    with contextlib.redirect_stdout(io.StringIO()):
        oracle.evaluate()
        oracle.accumulate()

    def mean(values: np.ndarray) -> float:
        return float(values[values > -1].mean())

    precision, recall = oracle.eval["precision"][..., -1], oracle.eval["recall"]
    expected = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, ..., 0]), "AP75": mean(precision[5, ..., 0])}
    expected |= {f"AP{size}": mean(precision[..., place]) for place, size in enumerate("sml", start=1)}
    expected |= {f"AR{limit}": mean(recall[:, :, 0, place]) for place, limit in enumerate(max_detections)}
    expected |= {f"AR{size}": mean(recall[:, :, place, -1]) for place, size in enumerate("sml", start=1)}
    arguments = {"masks": True, "max_detections": max_detections, "area_ranges": (700.25, 2000)}
    metric = metric_of(truth, found, torch.float32, backend=backend, **arguments)
    numbers = metric.compute()
    assert list(numbers) == [*expected, *(f"mask_{name}" for name in expected)]
    for name, number in expected.items():
        assert numbers[f"mask_{name}"] == pytest.approx(number, abs=1e-9)
    assert [row.AR for row in metric.per_class(masks=True)] == pytest.approx(recall[:, :, 0, -1].mean(axis=0).tolist())
    assert f"AR{max_detections[-1]}  masks" in metric.table()


def test_the_order_of_the_images_does_not_matter() -> None:
    truth, found = random_case(0)
    expected = metric_of(truth, found, torch.float32).compute()
    truth["images"].reverse()
    assert metric_of(truth, found, torch.float32).compute() == expected


# --- by hand ---


def test_one_object_found_exactly() -> None:
    metric = animals()
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE)])
    numbers = metric.compute()
    # The object has 50 x 50 pixels: medium.
    absent = {"APs", "APl", "ARs", "ARl"}
    assert numbers == pytest.approx({name: -1.0 if name in absent else 1.0 for name in NAMES})


def test_half_of_the_objects_found() -> None:
    metric = animals()
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE, ELSEWHERE)])
    numbers = metric.compute()
    # Precision is 1 up to a recall of 0.5: at 51 of the 101 recalls 0.00, 0.01 … 1.00.
    assert numbers["AP"] == pytest.approx(51 / 101)
    assert numbers["AR100"] == pytest.approx(0.5)


def test_a_box_that_overlaps_by_0_62_counts_at_three_of_the_ten_thresholds() -> None:
    metric = animals()
    metric.update([prediction_of([0.0, 0.0, 62.0, 100.0])], [target_of([0.0, 0.0, 100.0, 100.0])])
    numbers = metric.compute()
    assert numbers["AP50"] == pytest.approx(1.0)
    assert numbers["AP75"] == 0.0
    assert numbers["AP"] == pytest.approx(0.3)


def test_a_false_alarm_above_the_hit_halves_the_precision() -> None:
    metric = animals()
    metric.update([prediction_of(ELSEWHERE, SQUARE, scores=[0.9, 0.8])], [target_of(SQUARE)])
    assert metric.compute()["AP"] == pytest.approx(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_limit_of_one_detection_a_class_and_image(backend: str) -> None:
    metric = animals(max_detections=(1, 2), backend=backend)
    metric.update([prediction_of(SQUARE, ELSEWHERE)], [target_of(SQUARE, ELSEWHERE)])
    numbers = metric.compute()
    assert (numbers["AR1"], numbers["AR2"], numbers["AP"]) == pytest.approx((0.5, 1.0, 1.0))
    assert "AR10" not in numbers
    metric = animals(max_detections=(1,), backend=backend)
    metric.update([prediction_of(SQUARE, ELSEWHERE)], [target_of(SQUARE, ELSEWHERE)])
    assert metric.compute()["AP"] == pytest.approx(51 / 101)


def test_the_borders_of_the_areas() -> None:
    metric = animals(area_ranges=(2500, 2501))
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE)])  # 50 x 50: on the border, and so in both ranges
    numbers = metric.compute()
    assert (numbers["APs"], numbers["APm"], numbers["APl"]) == (pytest.approx(1.0), pytest.approx(1.0), -1.0)


def test_the_means_leave_out_classes_without_ground_truth() -> None:
    metric = animals()
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE)])
    metric.update([prediction_of(SQUARE, label=2)], [target_of(image_id=8)])
    assert metric.compute()["AP"] == pytest.approx(1.0)
    cat, dog = metric.per_class()
    assert (cat.name, cat.AP, cat.APs, cat.num_boxes) == ("cat", pytest.approx(1.0), -1.0, 1)
    assert (dog.label, dog.name, dog.AP, dog.AR, dog.num_boxes) == (2, "dog", -1.0, -1.0, 0)


# --- masks ---


def test_half_of_a_mask_in_a_right_box() -> None:
    metric = animals(masks=True)
    prediction, target = with_masks(prediction_of(SQUARE)), with_masks(target_of(SQUARE))
    prediction["masks"][:, 36:] = 0  # rows 10 to 35 of 10 to 59: an IoU of 0.52
    metric.update([prediction], [target])
    numbers = metric.compute()
    assert list(numbers) == [*NAMES, *(f"mask_{name}" for name in NAMES)]
    assert (numbers["AP"], numbers["mask_AP50"], numbers["mask_AP75"]) == pytest.approx((1.0, 1.0, 0.0))
    assert numbers["mask_AP"] == pytest.approx(0.1)
    assert [row.AP for row in metric.per_class(masks=True)] == pytest.approx([0.1, -1.0])
    assert [row.AP for row in metric.per_class()] == pytest.approx([1.0, -1.0])


def test_a_pixel_belongs_to_the_object_above_a_probability_of_one_half() -> None:
    metric = animals(masks=True)
    prediction, target = with_masks(prediction_of(SQUARE)), with_masks(target_of(SQUARE))
    inside = prediction["masks"][:, None].bool()  # (M, 1, H, W), as torchvision's Mask R-CNN gives them
    prediction["masks"] = torch.where(inside, 0.51, 0.5).to(torch.float16).requires_grad_()
    metric.update([prediction], [target])
    (image,) = metric.images.values()
    assert image.found_masks == image.true_masks
    assert metric.compute()["mask_AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_masks_and_every_form_of_run_lengths_give_the_same(backend: str) -> None:
    truth, found = random_case(3)
    expected = metric_of(truth, found, torch.float32, masks=True, backend=backend).compute()
    metric = classes_of(truth, masks=True, backend=backend)
    predictions, targets = as_batches(truth, found, torch.float32)
    for number, item in enumerate([*predictions, *targets]):
        if number % 2:
            dense = np.zeros((SIDE, SIDE, 0), np.uint8)
            if item["masks"]:
                dense = np.dstack([decoded(mask) for mask in item["masks"]])
            item["masks"] = torch.from_numpy(np.ascontiguousarray(dense.transpose(2, 0, 1)))
        else:  # bytes, as pycocotools gives them, in the place of text
            item["masks"] = [coco_mask.encode(np.asfortranarray(decoded(mask))) for mask in item["masks"]]
    metric.update(predictions, targets)
    assert metric.compute() == expected


def decoded(mask: Json) -> np.ndarray:
    """A mask of run lengths, compressed or not, as pixels (H, W)."""
    if isinstance(mask["counts"], list):
        mask = coco_mask.frPyObjects(mask, *mask["size"])
    return coco_mask.decode(mask)


def test_a_detection_on_a_crowd_s_mask_does_not_count() -> None:
    metric = animals(masks=True)
    target = with_masks(target_of(SQUARE, ELSEWHERE)) | {"iscrowd": torch.tensor([False, True])}
    metric.update([with_masks(prediction_of(ELSEWHERE, SQUARE, scores=[0.9, 0.8]))], [target])
    assert metric.compute()["mask_AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_images_with_nothing_in_them(backend: str) -> None:
    metric = animals(masks=True, backend=backend)
    metric.update([with_masks(prediction_of())], [with_masks(target_of())])
    assert metric.compute() == dict.fromkeys([*NAMES, *(f"mask_{name}" for name in NAMES)], -1.0)
    metric.update([with_masks(prediction_of(SQUARE))], [with_masks(target_of(image_id=8)) | {"masks": []}])
    metric.update([with_masks(prediction_of())], [with_masks(target_of(SQUARE, image_id=9))])
    numbers = metric.compute()
    assert (numbers["mask_AP"], numbers["mask_ARm"], numbers["mask_ARl"]) == (0.0, 0.0, -1.0)


def test_the_mask_decides_the_size_of_a_detection() -> None:
    """A false alarm counts where its area lies: 50 x 50 by its box, 20 x 20 by its mask."""
    metric = animals(masks=True)
    prediction = with_masks(prediction_of(ELSEWHERE, SQUARE, scores=[0.9, 0.8]))
    prediction["masks"][0, 220:] = prediction["masks"][0, :, 220:] = 0
    metric.update([prediction], [with_masks(target_of(SQUARE))])
    numbers = metric.compute()
    assert (numbers["APm"], numbers["mask_APm"]) == pytest.approx((0.5, 1.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_masks_in_an_image_than_a_byte_counts(backend: str) -> None:
    metric = animals(masks=True, backend=backend, max_detections=(300,))
    # The object is found last, behind 299 false alarms.
    prediction = with_masks(prediction_of(*[ELSEWHERE] * 299, SQUARE, scores=[0.9] * 299 + [0.1]))
    metric.update([prediction], [with_masks(target_of(SQUARE))])
    numbers = metric.compute()
    assert (numbers["mask_AR300"], numbers["mask_AP"]) == pytest.approx((1.0, 1 / 300))


def test_masks_are_kept_as_run_lengths() -> None:
    metric = animals(masks=True)
    prediction, target = with_masks(prediction_of(*[SQUARE] * 30)), with_masks(target_of(*[SQUARE] * 30))
    metric.update([prediction], [target])
    assert len(pickle.dumps(dict(metric.images))) < prediction["masks"].nbytes / 100


def test_without_masks_none_are_kept() -> None:
    metric = animals()
    metric.update([with_masks(prediction_of(SQUARE))], [target_of(SQUARE)])
    (image,) = metric.images.values()
    assert (image.true_masks, image.found_masks) == (None, None)
    metric.compute()
    with pytest.raises(ValueError, match="masks are not evaluated; make the metric with masks=True"):
        metric.per_class(masks=True)


def test_images_are_by_rising_id_and_read_only() -> None:
    metric = animals()
    for image_id in (9, -2, 4):
        metric.update([prediction_of(SQUARE)], [target_of(SQUARE, image_id=image_id)])
    assert list(metric.images) == [-2, 4, 9]
    assert metric.images[4].found_boxes_xywh.tolist() == [[10.0, 10.0, 50.0, 50.0]]
    with pytest.raises(TypeError, match="does not support item assignment"):
        metric.images[4] = metric.images[9]  # type: ignore[index]


# --- edge cases ---


def test_no_detections_at_all_are_zeros() -> None:
    metric = animals()
    metric.update([prediction_of()], [target_of(SQUARE)])
    absent = {"APs", "APl", "ARs", "ARl"}
    assert metric.compute() == {name: -1.0 if name in absent else 0.0 for name in NAMES}


def test_no_ground_truth_at_all_is_minus_one() -> None:
    metric = animals()
    metric.update([prediction_of(SQUARE)], [target_of()])
    assert metric.compute() == dict.fromkeys(NAMES, -1.0)


def test_neither_ground_truth_nor_detections() -> None:
    metric = animals()
    metric.update([prediction_of()], [target_of()])
    assert metric.compute() == dict.fromkeys(NAMES, -1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("image_id", [0, -3, 2**70])
def test_unusual_image_ids(image_id: int, backend: str) -> None:
    metric = animals(backend=backend)
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE, image_id=image_id)])
    assert metric.compute()["AP"] == pytest.approx(1.0)


def test_a_detection_on_a_crowd_does_not_count() -> None:
    metric = animals()
    target = target_of(SQUARE, ELSEWHERE) | {"iscrowd": torch.tensor([False, True])}
    metric.update([prediction_of(ELSEWHERE, SQUARE, scores=[0.9, 0.8])], [target])
    assert metric.compute()["AP"] == pytest.approx(1.0)
    assert metric.per_class()[0].num_boxes == 1


def test_the_annotated_area_decides_the_size() -> None:
    metric = animals()
    target = target_of(SQUARE) | {"area": torch.tensor([100.0])}
    metric.update([prediction_of(SQUARE)], [target])
    numbers = metric.compute()
    assert (numbers["APs"], numbers["APm"]) == (pytest.approx(1.0), -1.0)


def test_boxes_given_as_x_y_width_and_height_too_are_kept_to_the_last_bit() -> None:
    boxes_xywh = torch.tensor([[100.3, 57.1, 32.0, 32.0]], dtype=torch.float64)
    both = {"boxes": xyxy(boxes_xywh.tolist(), torch.float32), "boxes_xywh": boxes_xywh}
    metric = animals()
    metric.update([prediction_of(SQUARE) | both], [target_of(SQUARE) | both])
    image = metric.images[7]
    for kept in (image.true_boxes_xywh, image.found_boxes_xywh):
        assert kept.tolist() == boxes_xywh.tolist()
    assert image.true_areas.tolist() == [32.0**2]


def test_half_precision_predictions_and_a_tensor_as_image_id() -> None:
    metric = animals()
    prediction = prediction_of(SQUARE)
    for key in ("boxes", "scores"):
        prediction[key] = prediction[key].to(torch.bfloat16).requires_grad_()
    metric.update([prediction], [target_of(SQUARE) | {"image_id": torch.tensor([7])}])
    assert metric.compute()["AP"] == pytest.approx(1.0)


def test_what_the_caller_does_to_the_tensors_afterwards_changes_nothing() -> None:
    metric = animals()
    prediction = {key: value.double() for key, value in prediction_of(SQUARE, ELSEWHERE).items()}
    target = {"image_id": 7, "boxes": torch.tensor([SQUARE]).double(), "labels": torch.tensor([1])}
    target["area"] = torch.tensor([2500.0]).double()
    metric.update([prediction], [target])
    for tensor in (*prediction.values(), target["boxes"], target["labels"], target["area"]):
        tensor.zero_()
    assert metric.compute()["APm"] == pytest.approx(1.0)


def test_updates_after_compute_and_reset() -> None:
    metric = animals()
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE)])
    assert metric.compute()["AR100"] == pytest.approx(1.0)
    metric.update([prediction_of()], [target_of(SQUARE, image_id=8)])
    assert metric.compute()["AR100"] == pytest.approx(0.5)
    metric.reset()
    metric.update([prediction_of()], [target_of(SQUARE)])
    assert metric.compute()["AR100"] == 0.0


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_numbers_are_plain_floats_and_nothing_is_printed(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    metric = animals(masks=True, backend=backend, max_detections=(1, 7))
    metric.update([with_masks(prediction_of(SQUARE))], [with_masks(target_of(SQUARE))])
    numbers = metric.compute()
    assert len(numbers) == 22
    assert {type(number) for number in numbers.values()} == {float}
    assert capfd.readouterr() == ("", "")


def test_the_docstring_example() -> None:
    results = doctest.testmod(coco_map, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0


# --- the table ---


def test_table() -> None:
    metric = CocoMeanAveragePrecision({2: "dog", 1: "a cat of the longest name there is"})
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE, ELSEWHERE)])
    metric.compute()
    assert metric.table().splitlines() == [
        "boxes, by pycocotools",
        "      AP    AP50    AP75     APs     APm     APl",
        "   0.505   0.505   0.505       -   0.505       -",
        "     AR1    AR10   AR100     ARs     ARm     ARl",
        "   0.500   0.500   0.500       -   0.500       -",
        "",
        "label class                         AP   AP50    APs    APm    APl  AR100  boxes",
        "    1 a cat of the longest nam…  0.505  0.505      -  0.505      -  0.500      2",
        "    2 dog                            -      -      -      -      -      -      0",
    ]


def test_table_with_masks_names_the_backend_and_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = CocoMeanAveragePrecision({1: "cat"}, masks=True, max_detections=(2, 4))
    metric.update([with_masks(prediction_of(SQUARE))], [with_masks(target_of(SQUARE))])
    metric.compute()
    boxes, masks = ["boxes, by pycocotools"], ["masks, by pycocotools"]
    for lines, objects in ((boxes, "boxes"), (masks, "masks")):
        lines += [
            "      AP    AP50    AP75     APs     APm     APl",
            "   1.000   1.000   1.000       -   1.000       -",
            "     AR2     AR4     ARs     ARm     ARl",
            "   1.000   1.000       -   1.000       -",
            "",
            f"label class     AP   AP50    APs    APm    APl    AR4  {objects}",
            "    1 cat    1.000  1.000      -  1.000      -  1.000      1",
        ]
    assert metric.table().splitlines() == [*boxes, "", *masks]


@pytest.mark.skipif(not HAS_HOTCOCO, reason="hotcoco is not installed")
def test_the_backend_changes_nothing_but_its_name_in_the_table() -> None:
    truth, found = random_case(2)
    tables = []
    for backend in ("pycocotools", "hotcoco"):
        metric = metric_of(truth, found, torch.float32, masks=True, backend=backend)
        metric.compute()
        tables.append(metric.table())
    assert "by hotcoco" in tables[1]
    assert tables[1].replace("by hotcoco", "by pycocotools") == tables[0]


# --- several processes ---


def gathered(rank: int, folder: str, splits: list[list[int]]) -> None:
    """What one of two processes computes; each of `splits` says for every image which process saw it."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    truth, found = random_case(1)
    predictions, targets = as_batches(truth, found, torch.float32)
    results = []
    for split in splits:
        metric = classes_of(truth, masks=True)
        mine = [index for index, process in enumerate(split) if process == rank]
        metric.update([predictions[index] for index in mine], [targets[index] for index in mine])
        metric.merge()
        results.append([metric.compute(), metric.table()])
    metric = animals()
    metric.update([prediction_of()], [target_of(image_id=31)])
    with pytest.raises(ValueError, match="image 31 came twice") as error:
        metric.merge()
    Path(folder, f"{rank}.json").write_text(json.dumps([results, str(error.value)]))
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    truth, found = random_case(1)
    metric = metric_of(truth, found, torch.float32, masks=True)
    metric.merge()
    expected = [metric.compute(), metric.table()]
    num_images = len(truth["images"])
    splits = [
        [0] + [1] * (num_images - 1),
        [index % 2 for index in range(num_images)],
        [1] * num_images,
    ]
    torch.multiprocessing.spawn(gathered, args=(str(tmp_path), splits), nprocs=2)
    for rank in (0, 1):
        results, error = json.loads((tmp_path / f"{rank}.json").read_text())
        # JSON keeps every digit of a float.
        assert results == [expected] * len(splits)
        assert "a sampler that does not pad" in error


# --- mistakes ---


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        ({}, r"class_names is \{\}; give a mapping"),
        (["cat", "dog"], r"class_names is \['cat', 'dog'\]; give a mapping"),
        ({0: "background", 1: "cat"}, r"has the label 0; .* leave the background out"),
        ({"1": "cat"}, r"has the label '1'; a label is an int from 1"),
    ],
)
def test_wrong_class_names(class_names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CocoMeanAveragePrecision(class_names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "coco"}, r"backend='coco' is unknown; use one of 'pycocotools', 'hotcoco'"),
        ({"max_detections": ()}, r"max_detections is \(\); give one or more numbers of detections from 1"),
        ({"max_detections": (0, 10)}, r"max_detections is \(0, 10\)"),
        ({"max_detections": [100, 10]}, r"max_detections is \[100, 10\]; .* each larger than the one before"),
        ({"max_detections": (1.5,)}, r"max_detections is \(1\.5,\)"),
        ({"area_ranges": (1024,)}, r"area_ranges is \(1024,\); give the two areas in pixels²"),
        ({"area_ranges": (96, 32)}, r"area_ranges is \(96, 32\); .* rising between 0 and 1e\+10"),
        ({"area_ranges": (0, 32)}, r"area_ranges is \(0, 32\)"),
        ({"area_ranges": (32, float("nan"))}, r"area_ranges is \(32, nan\)"),
    ],
)
def test_wrong_arguments(arguments: Json, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        animals(**arguments)


def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = (
        r"backend='hotcoco' needs the package hotcoco, which is not installed: pip install \"resnest-det\[hotcoco\]"
    )
    with pytest.raises(ValueError, match=message):
        animals(backend="hotcoco")


WHOLE = {"size": [2, 3], "counts": [0, 6]}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(2, 4, 4), r"masks has the shape \(2, 4, 4\) beside 1 boxes; it must be \(1, height, width\)"),
        (torch.zeros(1, 3, 4, 4), r"masks has the shape \(1, 3, 4, 4\) beside 1 boxes"),
        (torch.tensor([[[-2.5, 7.0]]]), r"masks holds values from -2\.5 to 7; they must be probabilities"),
        (torch.tensor([[[0.5, torch.nan]]]), r"masks holds values from nan to nan"),
        (torch.full((1, 2, 2), 255, dtype=torch.uint8), r"masks holds values from 255 to 255"),
        ([], "0 masks came beside 1 boxes; every box needs one"),
        ([torch.zeros(4, 4)], r"masks\[0\] is of the type Tensor; run lengths are .* dense masks come as one tensor"),
        ([{"size": [2, 3]}], r"masks\[0\] has the keys \['size'\]; run lengths are"),
        ([WHOLE | {"size": [2, 3, 1]}], r"masks\[0\] has the size \[2, 3, 1\]; it must be \[height, width\]"),
        ([WHOLE | {"size": [0, 3]}], r"masks\[0\] has the size \[0, 3\]"),
        ([WHOLE | {"counts": None}], r"masks\[0\] has counts of the type NoneType"),
        ([WHOLE | {"counts": [0, 7]}], r"masks\[0\] has the counts \[0, 7\], which make no mask of 2 x 3 pixels"),
        ([WHOLE | {"counts": [9, -3]}], r"masks\[0\] has the counts \[9, -3\], which make no mask"),
        ([WHOLE | {"counts": b"oo"}], r"masks\[0\] has the counts b'oo', which make no mask of 2 x 3 pixels"),
        ([WHOLE | {"counts": "\u20ac"}], r"masks\[0\] has the counts \u20ac, which make no mask"),
        ([WHOLE | {"counts": ""}], r"masks\[0\] has the counts , which make no mask"),
        ([WHOLE], r"prediction for image 7: its masks are 2 x 3 pixels, those of the target 260 x 240; .* resized\?"),
    ],
)
def test_wrong_masks(masks: Any, message: str) -> None:
    metric = animals(masks=True)
    with pytest.raises(
        ValueError, match=rf"prediction for image 7: .*{message.removeprefix('prediction for image 7: ')}"
    ):
        metric.update([prediction_of(SQUARE) | {"masks": masks}], [with_masks(target_of(SQUARE))])


def test_masks_of_two_sizes() -> None:
    masks = [WHOLE, {"size": [3, 2], "counts": [0, 6]}]
    message = r"target of image 7: masks\[1\] is 3 x 2 pixels and masks\[0\] 2 x 3; all must have the size of the image"
    with pytest.raises(ValueError, match=message):
        animals(masks=True).update([with_masks(prediction_of())], [target_of(SQUARE, ELSEWHERE) | {"masks": masks}])


def test_missing_masks() -> None:
    with pytest.raises(ValueError, match=r"prediction for image 7 has no 'masks', only \["):
        animals(masks=True).update([prediction_of(SQUARE)], [with_masks(target_of(SQUARE))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([3])}, r"prediction for image 7: label 3 is not in class_names.* 1 to 2"),
        ({"labels": torch.tensor([0])}, r"prediction for image 7: label 0 is not in class_names"),
        ({"labels": torch.tensor([1.5])}, r"prediction for image 7: label 1\.5 is not in class_names"),
        ({"labels": torch.tensor([1, 1])}, r"labels has the shape \(2,\) beside 1 boxes; .* \(1,\)"),
        ({"scores": torch.tensor([[0.9]])}, r"scores has the shape \(1, 1\) beside 1 boxes"),
        ({"scores": torch.tensor([torch.inf])}, r"prediction for image 7: scores holds inf \(1 of 1 values"),
        ({"boxes": torch.zeros(0)}, r"boxes has the shape \(0,\); it must be \(N, 4\), so \(0, 4\) without"),
        ({"boxes": torch.tensor([[0, 0, torch.nan, 9]])}, r"prediction for image 7: boxes holds nan"),
        ({"boxes": torch.tensor([[50, 60, 20, 90]])}, r"box \[50\.0, 60\.0, 20\.0, 90\.0\] ends before"),
        (
            {"boxes_xywh": torch.tensor([[10.0, 10, 50, 50.1]])},
            r"boxes_xywh has \[10\.0, 10\.0, 50\.0, 50\.09.*\] where boxes has \[10\.0, 10\.0, 60\.0, 60\.0\]",
        ),
        (
            {"boxes": torch.tensor([[1.0, 1, 1, 1]]), "boxes_xywh": torch.tensor([[1, 1, -1e-7, 0]])},
            r"where boxes has \[1\.0, 1\.0, 1\.0, 1\.0\]; they must be the same boxes",
        ),
        (
            {"boxes_xywh": torch.zeros(2, 4)},
            r"boxes_xywh has the shape \(2, 4\) and boxes \(1, 4\); .* leave boxes_xywh",
        ),
        ({"boxes_xywh": torch.full((1, 4), torch.nan)}, r"prediction for image 7: boxes_xywh holds nan"),
    ],
)
def test_wrong_predictions(change: Json, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        animals().update([prediction_of(SQUARE) | change], [target_of(SQUARE)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([9])}, r"target of image 7: label 9 is not in class_names"),
        ({"boxes": torch.tensor([[0, 0, 5, -torch.inf]])}, r"target of image 7: boxes holds -inf"),
        ({"boxes": torch.tensor([[50, 60, 20, 90]])}, r"convert boxes given as \(x, y, width, height\)"),
        ({"area": torch.tensor([torch.nan])}, r"target of image 7: area holds nan"),
        (
            {"area": torch.tensor([-4.0])},
            r"target of image 7: area holds -4 \(1 of 1 are negative\); .* leave area out",
        ),
        ({"area": torch.tensor([1.0, 2.0])}, r"target of image 7: area has the shape \(2,\) beside 1 boxes"),
        ({"iscrowd": torch.zeros(3)}, r"target of image 7: iscrowd has the shape \(3,\) beside 1 boxes"),
        ({"image_id": "7.jpg"}, r"image_id is '7\.jpg'; it must be one int"),
        ({"image_id": torch.tensor([7, 8])}, r"image_id is tensor\(\[7, 8\]\); it must be one int"),
    ],
)
def test_wrong_targets(change: Json, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        animals().update([prediction_of(SQUARE)], [target_of(SQUARE) | change])


@pytest.mark.parametrize("key", ["boxes", "labels", "scores"])
def test_missing_keys(key: str) -> None:
    prediction = prediction_of(SQUARE)
    del prediction[key]
    with pytest.raises(ValueError, match=rf"prediction for image 7 has no '{key}', only \["):
        animals().update([prediction], [target_of(SQUARE)])


def test_a_target_without_image_id() -> None:
    with pytest.raises(ValueError, match=r"a target has no 'image_id', only \['boxes'\]"):
        animals().update([prediction_of(SQUARE)], [{"boxes": torch.zeros(0, 4)}])


def test_losses_in_place_of_predictions() -> None:
    with pytest.raises(ValueError, match=r"one dict with the keys \['loss_box'\].* evaluation mode"):
        animals().update({"loss_box": torch.tensor(1.0)}, [target_of(SQUARE)])  # type: ignore[arg-type]


def test_as_many_predictions_as_targets() -> None:
    with pytest.raises(ValueError, match="1 predictions came for 2 targets"):
        animals().update([prediction_of(SQUARE)], [target_of(SQUARE), target_of(image_id=8)])


def test_an_image_that_comes_twice() -> None:
    metric = animals()
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE)])
    with pytest.raises(ValueError, match=r"image 7 came twice; .* a sampler that does not pad"):
        metric.update([prediction_of()], [target_of(SQUARE)])
    with pytest.raises(ValueError, match="image 8 came twice"):
        metric.update([prediction_of(), prediction_of()], [target_of(image_id=8), target_of(image_id=8)])


def test_an_update_that_raises_adds_nothing() -> None:
    metric = animals()
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE)])
    expected = metric.compute()
    wrong = target_of(SQUARE, image_id=9, label=5)
    with pytest.raises(ValueError, match="label 5"):
        metric.update([prediction_of(), prediction_of()], [target_of(SQUARE, image_id=8), wrong])
    assert metric.compute() == expected


def test_compute_without_images() -> None:
    with pytest.raises(ValueError, match="no images to evaluate: call update"):
        animals().compute()


def test_results_before_compute() -> None:
    metric = animals()
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE)])
    for read in (metric.per_class, metric.table):
        with pytest.raises(ValueError, match=r"call compute\(\) first"):
            read()
