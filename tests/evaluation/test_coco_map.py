"""COCO's twelve numbers against the published ones, against pycocotools itself, and by hand."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

import resnest_det.evaluation.coco_map as coco_map
from resnest_det.evaluation import CocoMeanAveragePrecision

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
SQUARE = [10.0, 10.0, 60.0, 60.0]
ELSEWHERE = [200.0, 200.0, 250.0, 250.0]

Json = dict[str, Any]


def by_pycocotools(truth: Path, found: Path) -> COCOeval:
    """pycocotools run on the two files as its manual does it: the oracle."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(truth))
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(str(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


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
        predictions.append(prediction)
        targets.append(target)
    return predictions, targets


def metric_of(truth: Json, found: list[Json], dtype: torch.dtype) -> CocoMeanAveragePrecision:
    metric = CocoMeanAveragePrecision({one["id"]: one["name"] for one in truth["categories"]})
    predictions, targets = as_batches(truth, found, dtype)
    for first in range(0, len(targets), 3):
        metric.update(predictions[first : first + 3], targets[first : first + 3])
    return metric


def assert_equals_pycocotools(metric: CocoMeanAveragePrecision, oracle: COCOeval) -> None:
    assert list(metric.compute().values()) == pytest.approx(oracle.stats.tolist(), abs=1e-9)
    precision, recall = oracle.eval["precision"], oracle.eval["recall"]
    non_crowd = [one["category_id"] for one in oracle.cocoGt.anns.values() if not one["iscrowd"]]
    for k, (label, row) in enumerate(zip(oracle.params.catIds, metric.per_class(), strict=True)):
        one_class = precision[:, :, k, :, -1]
        expected = [one_class[:, :, 0], one_class[0, :, 0]]
        expected += [one_class[:, :, size] for size in (1, 2, 3)]
        expected += [recall[:, k, 0, -1]]
        numbers = [row.AP, row.AP50, row.APs, row.APm, row.APl, row.AR100]
        # Within one class and area range all is -1 or nothing is, so that a plain mean is the oracle.
        assert numbers == pytest.approx([float(values.mean()) for values in expected], abs=1e-9)
        assert (row.label, row.num_boxes) == (label, non_crowd.count(label))


def random_case(seed: int) -> tuple[Json, list[Json]]:
    """COCO's two files with everything awkward in them, in coordinates that float32 holds exactly.

    Crowds, images without ground truth, images without detections, equal scores, areas on the borders of
    the ranges, more than 100 detections of a class in an image, a class without ground truth (40), one
    without detections (41), and one absent from both (42).
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
    categories = [{"id": label, "name": f"class {label}"} for label in labels]
    images = [{"id": image_id} for image_id in range(3, 17)]
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


def animals() -> CocoMeanAveragePrecision:
    return CocoMeanAveragePrecision({1: "cat", 2: "dog"})


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


def test_fakebbox100_equals_pycocotools(real_data: Callable[[str], Path]) -> None:
    truth, found = coco_reference(real_data("coco_eval_reference"))
    metric = metric_of(json.loads(truth.read_text()), json.loads(found.read_text()), torch.float64)
    assert_equals_pycocotools(metric, by_pycocotools(truth, found))


# --- random cases ---


@pytest.mark.parametrize("seed", range(6))
def test_random_cases_equal_pycocotools(seed: int, tmp_path: Path) -> None:
    truth, found = random_case(seed)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(found))
    oracle = by_pycocotools(tmp_path / "truth.json", tmp_path / "found.json")
    assert 0.05 < oracle.stats[0] < 0.95, "the case should tell good numbers from bad ones"
    assert_equals_pycocotools(metric_of(truth, found, torch.float32), oracle)


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


def test_the_means_leave_out_classes_without_ground_truth() -> None:
    metric = animals()
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE)])
    metric.update([prediction_of(SQUARE, label=2)], [target_of(image_id=8)])
    assert metric.compute()["AP"] == pytest.approx(1.0)
    cat, dog = metric.per_class()
    assert (cat.name, cat.AP, cat.APs, cat.num_boxes) == ("cat", pytest.approx(1.0), -1.0, 1)
    assert (dog.label, dog.name, dog.AP, dog.AR100, dog.num_boxes) == (2, "dog", -1.0, -1.0, 0)


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


def test_image_id_zero() -> None:
    metric = animals()
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE, image_id=0)])
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


def test_the_numbers_are_plain_floats_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    metric = animals()
    metric.update([prediction_of(SQUARE)], [target_of(SQUARE)])
    numbers = metric.compute()
    assert list(numbers) == NAMES
    assert {type(number) for number in numbers.values()} == {float}
    assert capsys.readouterr() == ("", "")


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
        "      AP    AP50    AP75     APs     APm     APl",
        "   0.505   0.505   0.505       -   0.505       -",
        "     AR1    AR10   AR100     ARs     ARm     ARl",
        "   0.500   0.500   0.500       -   0.500       -",
        "",
        "label class                         AP   AP50    APs    APm    APl  AR100  boxes",
        "    1 a cat of the longest nam…  0.505  0.505      -  0.505      -  0.500      2",
        "    2 dog                            -      -      -      -      -      -      0",
    ]


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
        metric = CocoMeanAveragePrecision({one["id"]: one["name"] for one in truth["categories"]})
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
    metric = metric_of(truth, found, torch.float32)
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
