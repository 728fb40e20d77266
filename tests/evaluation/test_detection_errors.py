"""Precision by recall against pycocotools, errors against TIDE's own package, and both by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnest_det.evaluation import (
    CocoMeanAveragePrecision,
    confusion_matrix,
    error_breakdown,
    image_f1_scores,
    precision_recall,
)
from resnest_det.evaluation.detection_errors import MAIN_ERRORS, SPECIAL_ERRORS, ErrorBreakdown
from resnest_det.evaluation.image_boxes import ImageBoxes

ANIMALS = {1: "cat", 2: "dog"}
HERE, THERE, ELSEWHERE = (0.0, 0.0, 100.0, 100.0), (200.0, 0.0, 100.0, 100.0), (0.0, 300.0, 50.0, 50.0)
THIRD_OF_HERE = (0.0, 0.0, 100.0, 30.0)  # an IoU of 0.3 with HERE

Box = tuple[float, float, float, float]
Object = tuple[int, Box] | tuple[int, Box, bool]  # label, xywh, whether it is a crowd
Detection = tuple[int, Box, float]  # label, xywh, score


def image_of(objects: Sequence[Object], detections: Sequence[Detection], *, masks: bool = False) -> ImageBoxes:
    """With masks those of diamonds, whose corners are in the middle of the boxes' sides."""
    true_boxes, found_boxes = [one[1] for one in objects], [one[1] for one in detections]
    return ImageBoxes(
        true_boxes_xywh=np.array(true_boxes, dtype=np.float64).reshape(-1, 4),
        true_labels=np.array([one[0] for one in objects], dtype=np.int64),
        true_areas=np.array([box[2] * box[3] for box in true_boxes], dtype=np.float64),
        true_crowds=np.array([len(one) == 3 and one[2] for one in objects], dtype=np.bool_),
        found_boxes_xywh=np.array(found_boxes, dtype=np.float64).reshape(-1, 4),
        found_labels=np.array([one[0] for one in detections], dtype=np.int64),
        found_scores=np.array([one[2] for one in detections], dtype=np.float64),
        true_masks=[diamond(box) for box in true_boxes] if masks else None,
        found_masks=[diamond(box) for box in found_boxes] if masks else None,
    )


def diamond(box: Box) -> dict[str, Any]:
    x, y, width, height = box
    corners = [x, y + height / 2, x + width / 2, y, x + width, y + height / 2, x + width / 2, y + height]
    return coco_mask.frPyObjects([corners], 400, 400)[0]


def random_images(seed: int, *, masks: bool = False) -> tuple[list[ImageBoxes], dict[int, str]]:
    """Everything awkward: crowds, images without objects or detections, equal scores, objects that lie on each other.

    Of the classes, 40 has detections but no objects, 41 objects but no detections, and 42 neither. One image has more
    than 100 detections of a class.
    """
    rng = np.random.default_rng(seed)
    images = []
    for number in range(14):
        objects: list[Object] = []
        detections: list[Detection] = []
        for _ in range(0 if number == 2 else rng.integers(1, 8)):
            box = tuple(rng.uniform((0, 0, 20, 20), (250, 250, 150, 150)).tolist())
            label = int(rng.choice([1, 1, 2, 5, 41]))
            objects.append((label, box, bool(rng.random() < 0.2)))
            if rng.random() < 0.15:
                objects.append((int(rng.choice([label, 2])), box, False))
            for _ in range(0 if number == 3 else rng.integers(0, 4)):
                near = np.array(box) + rng.normal(0, rng.choice([1, 8, 25]), 4)
                found = label if rng.random() < 0.7 else int(rng.choice([1, 2, 5, 40]))
                if found != 41:
                    detections.append((found, (*near[:2], *near[2:].clip(4)), rng.integers(1, 9) / 8))
        for _ in range(0 if number == 3 else 130 if number == 4 else 2):
            box = tuple(rng.uniform((0, 0, 20, 20), (250, 250, 150, 150)).tolist())
            detections.append((1 if number == 4 else int(rng.choice([1, 2, 5, 40])), box, rng.integers(1, 9) / 8))
        order = rng.permutation(len(detections))
        images.append(image_of(objects, [detections[place] for place in order], masks=masks))
    return images, {label: f"class {label}" for label in (1, 2, 5, 40, 41, 42)}


def fake100(folder: Path, *, masks: bool) -> tuple[list[ImageBoxes], dict[int, str]]:
    """The images with which COCO checks its evaluator, by id."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "instances_val2014_100.json"))
    kind = "segm" if masks else "bbox"
    found = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
    images = []
    for image_id in sorted(truth.imgs):
        objects = truth.imgToAnns[image_id]
        detections = [one for one in found if one["image_id"] == image_id]
        found_masks = [one["segmentation"] for one in detections] if masks else None
        found_boxes = coco_mask.toBbox(found_masks) if found_masks else [one["bbox"] for one in detections if not masks]
        image = ImageBoxes(
            true_boxes_xywh=np.array([one["bbox"] for one in objects], dtype=np.float64).reshape(-1, 4),
            true_labels=np.array([one["category_id"] for one in objects], dtype=np.int64),
            true_areas=np.array([one["area"] for one in objects], dtype=np.float64),
            true_crowds=np.array([one["iscrowd"] for one in objects], dtype=np.bool_),
            found_boxes_xywh=np.array(found_boxes, dtype=np.float64).reshape(-1, 4),
            found_labels=np.array([one["category_id"] for one in detections], dtype=np.int64),
            found_scores=np.array([one["score"] for one in detections], dtype=np.float64),
            true_masks=[truth.annToRLE(one) for one in objects] if masks else None,
            found_masks=found_masks,
        )
        images.append(image)
    return images, {category["id"]: category["name"] for category in truth.dataset["categories"]}


def prediction_of(image: ImageBoxes) -> dict[str, Any]:
    """As a detector gives it."""
    prediction = {
        "boxes": torch.from_numpy(xyxy(image.found_boxes_xywh)),
        "labels": torch.from_numpy(image.found_labels),
        "scores": torch.from_numpy(image.found_scores),
    }
    return prediction if image.found_masks is None else prediction | {"masks": image.found_masks}


def target_of(image: ImageBoxes) -> dict[str, Any]:
    target = {
        "boxes": torch.from_numpy(xyxy(image.true_boxes_xywh)),
        "labels": torch.from_numpy(image.true_labels),
        "iscrowd": torch.from_numpy(image.true_crowds),
    }
    return target if image.true_masks is None else target | {"masks": image.true_masks}


def xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def by_pycocotools(
    images: Sequence[ImageBoxes], class_names: dict[int, str], thresholds: Sequence[float], *, masks: bool
) -> np.ndarray:
    """COCOeval's precisions (IoU thresholds, classes, 101) of objects of all sizes: the oracle."""
    objects: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        for place, label in enumerate(image.true_labels.tolist()):
            annotation = {
                "id": len(objects) + 1,
                "image_id": image_id,
                "category_id": label,
                "bbox": image.true_boxes_xywh[place].tolist(),
                "area": image.true_areas[place],
                "iscrowd": int(image.true_crowds[place]),
            }
            objects.append(annotation | ({"segmentation": image.true_masks[place]} if masks else {}))
        for place, label in enumerate(image.found_labels.tolist()):
            annotation = {
                "id": len(detections) + 1,
                "image_id": image_id,
                "category_id": label,
                "bbox": image.found_boxes_xywh[place].tolist(),
                "area": 1.0,
                "score": image.found_scores[place],
            }
            detections.append(annotation | ({"segmentation": image.found_masks[place]} if masks else {}))
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for annotations in (objects, detections):
            coco = COCO()
            coco.dataset = {
                "images": [{"id": number, "height": 0, "width": 0} for number in range(1, len(images) + 1)],
                "annotations": annotations,
                "categories": [{"id": label, "name": name} for label, name in class_names.items()],
            }
            coco.createIndex()
            sides.append(coco)
        evaluation = COCOeval(*sides, "segm" if masks else "bbox")
        evaluation.params.iouThrs = np.array(thresholds)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, -1].transpose(0, 2, 1)


@pytest.fixture(scope="module")
def tidecv() -> Any:
    """The package of TIDE's authors.

    It is no dependency of the tests, as it brings an OpenCV that takes the place of the headless one:
    pip install --no-deps tidecv. What it imports for its pictures and downloads is not needed here.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("seaborn", "pandas", "appdirs"):
            if importlib.util.find_spec(name) is None:
                patch.setitem(sys.modules, name, SimpleNamespace(user_data_dir=None))
        return pytest.importorskip("tidecv")


def by_tidecv(
    tidecv: Any,
    images: Sequence[ImageBoxes],
    class_names: dict[int, str],
    *,
    foreground_iou: float,
    background_iou: float,
    masks: bool,
) -> dict[str, tuple[int, float]]:
    """AP, and each error's count and effect, by tidecv given what it leaves open or does otherwise than COCOeval.

    Scores are replaced by their ranks, so that none are equal; objects come in the reverse order, so that of equal
    IoUs the last counts; 100 detections of a class in an image are kept; detections that lie on a crowd are not
    counted; and the mean is over the classes that have objects.
    """
    limited = []
    for image in images:
        kept: list[int] = []
        for place in np.argsort(-image.found_scores, kind="stable").tolist():
            if sum(image.found_labels[kept] == image.found_labels[place]) < 100:
                kept.append(place)
        limited.append(sorted(kept))
    in_order = [(image, place) for image, kept in zip(images, limited, strict=True) for place in kept]
    ranked = sorted(range(len(in_order)), key=lambda i: -in_order[i][0].found_scores[in_order[i][1]])
    score_of = {i: 1 - (rank + 1) / (len(ranked) + 1) for rank, i in enumerate(ranked)}

    truth, found = tidecv.Data("truth", max_dets=10**6), tidecv.Data("found", max_dets=10**6)
    next_score = iter(range(len(in_order)))
    for number, (image, kept) in enumerate(zip(images, limited, strict=True)):
        truth.add_image(number, str(number))
        for place in reversed(range(len(image.true_labels))):
            add = truth.add_ignore_region if image.true_crowds[place] else truth.add_ground_truth
            mask = image.true_masks[place] if masks else None
            add(number, int(image.true_labels[place]), image.true_boxes_xywh[place].tolist(), mask)
        for place in kept:
            mask = image.found_masks[place] if masks else None
            box = image.found_boxes_xywh[place].tolist()
            found.add_detection(number, int(image.found_labels[place]), score_of[next(next_score)], box, mask)
    mode = "mask" if masks else "bbox"
    run = tidecv.quantify.TIDERun(truth, found, foreground_iou, background_iou, mode, truth.max_dets)

    present = {label for image in images for label in image.true_labels[~image.true_crowds].tolist()}

    def mean_ap(data: Any) -> float:
        return np.mean([one.get_ap() / 100 for k, one in data.objs.items() if k in present and not one.is_empty()])

    from tidecv.errors import main_errors as errors

    kinds = (
        errors.ClassError,
        errors.BoxError,
        errors.OtherError,
        errors.DuplicateError,
        errors.BackgroundError,
        errors.MissedError,
    )
    base_ap = mean_ap(run.ap_data)
    results = {"AP": (0, base_ap)}
    for name, kind in zip(MAIN_ERRORS, kinds, strict=True):
        of_kind = [one for one in run.error_dict[kind] if not hasattr(one, "pred") or one.pred["used"] is not None]
        fixed = mean_ap(run.fix_errors(lambda one, kind=kind: isinstance(one, kind)))
        results[name] = len(of_kind), max(fixed - base_ap, 0)
    fixed = mean_ap(run.fix_errors(transform=errors.FalsePositiveError.fix))
    num_wrong = sum(pred["used"] is False for pred in found.annotations)
    results["false positives"] = num_wrong, fixed - base_ap
    fixed = mean_ap(run.fix_errors(false_neg_dict=run.false_negatives))
    results["false negatives"] = sum(map(len, run.false_negatives.values())), fixed - base_ap
    return results


def numbers_of(breakdown: ErrorBreakdown) -> dict[str, tuple[int, float]]:
    effects = breakdown.main | breakdown.special
    return {"AP": (0, breakdown.AP)} | {name: (one.count, one.delta_ap) for name, one in effects.items()}


def assert_equal_numbers(numbers: dict[str, tuple[int, float]], expected: dict[str, tuple[int, float]]) -> None:
    assert list(numbers) == list(expected)
    assert [count for count, _ in numbers.values()] == [count for count, _ in expected.values()]
    np.testing.assert_allclose([ap for _, ap in numbers.values()], [ap for _, ap in expected.values()], atol=1e-12)


# --- precision by recall ---


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_precisions_equal_pycocotools(seed: int, masks: bool) -> None:
    images, class_names = random_images(seed, masks=masks)
    thresholds = (0.1, 0.5, 0.75, 0.95)
    curves = precision_recall(images, class_names, iou_thresholds=thresholds, masks=masks)
    oracle = by_pycocotools(images, class_names, thresholds, masks=masks)
    np.testing.assert_allclose(curves.precisions, oracle, rtol=0, atol=1e-12)
    assert 0.05 < oracle[1, :3].mean() < 0.95, "the case should tell good numbers from bad ones"
    np.testing.assert_allclose(curves.mean(), oracle[:, [0, 1, 2, 4]].mean(axis=1), atol=1e-12)
    assert curves.class_names == tuple(class_names.values())
    assert (curves.precisions[:, [3, 5]] == -1).all()  # without objects


@pytest.mark.parametrize("masks", [False, True])
def test_fake100_equals_pycocotools(masks: bool, real_data: Callable[[str], Path]) -> None:
    images, class_names = fake100(real_data("coco_eval_reference"), masks=masks)
    thresholds = np.linspace(0.5, 0.95, 10).tolist()
    curves = precision_recall(images, class_names, iou_thresholds=thresholds, masks=masks)
    oracle = by_pycocotools(images, class_names, thresholds, masks=masks)
    np.testing.assert_allclose(curves.precisions, oracle, rtol=0, atol=1e-12)
    # As published with the files: 0.505 and 0.697 for boxes, 0.320 and 0.562 for masks.
    published = (0.320, 0.562) if masks else (0.505, 0.697)
    assert (round(curves.mean().mean(), 3), round(curves.mean()[0].mean(), 3)) == published


def test_boxes_without_area_overlap_nothing() -> None:
    nothing = (20.0, 20.0, 0.0, 30.0)
    images = [
        image_of([(1, HERE, True), (1, HERE)], [(1, nothing, 0.9), (1, HERE, 0.8)]),
        image_of([(2, nothing)], [(2, nothing, 0.7)]),
    ]
    oracle = by_pycocotools(images, ANIMALS, [0.5], masks=False)
    assert oracle[0, :, 0].tolist() == pytest.approx([0.5, 0])
    np.testing.assert_allclose(precision_recall(images, ANIMALS, iou_thresholds=[0.5]).precisions, oracle, atol=1e-12)


def test_max_detections_are_those_of_a_class_in_an_image() -> None:
    image = image_of([(1, HERE), (2, THERE)], [(1, ELSEWHERE, 0.9), (1, HERE, 0.8), (2, THERE, 0.7)])
    precisions = [precision_recall([image], ANIMALS, max_detections=limit).precisions[0, :, -1] for limit in (1, 2)]
    np.testing.assert_allclose(precisions, [[0, 1], [0.5, 1]])


def test_no_objects_and_no_images() -> None:
    for images in ([], [image_of([], [(1, HERE, 0.9)])]):
        curves = precision_recall(images, ANIMALS)
        assert curves.precisions.shape == (2, 2, 101)
        assert (curves.precisions == -1).all()
        assert (curves.mean() == -1).all()


# --- kinds of error ---


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("foreground_iou", "background_iou"), [(0.5, 0.1), (0.75, 0.3)])
@pytest.mark.parametrize("seed", range(4))
def test_random_errors_equal_tidecv(
    tidecv: Any, seed: int, foreground_iou: float, background_iou: float, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, class_names = random_images(seed, masks=masks)
    # COCOeval's recalls: tidecv's i / 100 are sometimes lower by a last bit, which counts where a recall equals one.
    by_recall = SimpleNamespace(
        array=np.array, searchsorted=lambda recalls, _, side: np.searchsorted(recalls, np.linspace(0, 1, 101), side)
    )
    monkeypatch.setattr(sys.modules["tidecv.ap"], "np", by_recall)
    thresholds = {"foreground_iou": foreground_iou, "background_iou": background_iou}
    numbers = numbers_of(error_breakdown(images, class_names, **thresholds, masks=masks))
    assert_equal_numbers(numbers, by_tidecv(tidecv, images, class_names, **thresholds, masks=masks))
    assert min(count for name, (count, _) in numbers.items() if name != "AP") > 0, "every kind should occur"


def test_errors_equal_tidecv_as_it_is(tidecv: Any) -> None:
    """Where it leaves nothing open: every class has objects, seven, so that no recall is i / 100, and no scores or IoUs
    are equal.
    """
    rng = np.random.default_rng(0)
    images = []
    truth, found = tidecv.Data("truth"), tidecv.Data("found")
    for number in range(7):
        objects = [(label, tuple(rng.uniform((0, 0, 80, 80), (40, 40, 150, 150)).tolist())) for label in (1, 2)]
        detections = [
            (int(rng.integers(1, 3)), tuple((np.array(box) + rng.normal(0, 20, 4)).tolist()), float(rng.random()))
            for _, box in objects * 3
        ]
        crowd = (1, (300.0, 300.0, 50.0, 50.0), True)
        detections += [(1, (310.0, 310.0, 10.0, 10.0), float(rng.random())), (2, ELSEWHERE, float(rng.random()))]
        images.append(image_of([*objects, crowd], detections))
        truth.add_image(number, str(number))
        truth.add_ignore_region(number, crowd[0], list(crowd[1]))
        for label, box in objects:
            truth.add_ground_truth(number, label, list(box))
        for label, box, score in detections:
            found.add_detection(number, label, score, list(box))
    run = tidecv.quantify.TIDERun(truth, found, 0.5, 0.1, "bbox", 100)
    expected = [run.ap, *run.fix_main_errors().values(), *run.fix_special_errors().values()]
    numbers = numbers_of(error_breakdown(images, ANIMALS))
    np.testing.assert_allclose([ap for _, ap in numbers.values()], np.array(expected) / 100, rtol=0, atol=1e-12)
    assert sum(ap > 0 for _, ap in numbers.values()) >= 6, "the errors should have effects"


@pytest.mark.parametrize("masks", [False, True])
def test_fake100_errors(masks: bool, real_data: Callable[[str], Path]) -> None:
    """Numbers of tidecv 1.0.1 for these files, by `by_tidecv` with the recalls of COCOeval."""
    images, class_names = fake100(real_data("coco_eval_reference"), masks=masks)
    boxes_aps = [0.6969727, 0.1675748, 0.0024988, 0, 0.0002060, 0, 0.0935810, 0.0740315, 0.1931655]
    masks_aps = [0.5622884, 0.1370722, 0.1259611, 0.0035071, 0, 0.0029662, 0.0852771, 0.0940058, 0.2589638]
    numbers = numbers_of(error_breakdown(images, class_names, masks=masks))
    np.testing.assert_allclose([ap for _, ap in numbers.values()], masks_aps if masks else boxes_aps, atol=1e-7)
    counts = [0, 76, 82, 7, 0, 4, 109, 169, 265] if masks else [0, 83, 1, 0, 1, 0, 97, 85, 181]
    assert [count for count, _ in numbers.values()] == counts


@pytest.mark.parametrize("masks", [False, True])
def test_ap_is_that_of_the_metric(masks: bool) -> None:
    images, class_names = random_images(7, masks=masks)
    metric = CocoMeanAveragePrecision(class_names, masks=masks)
    for number in reversed(range(len(images))):  # equal scores rank by image id all the same
        metric.update([prediction_of(images[number])], [target_of(images[number]) | {"image_id": number}])
    ap50 = metric.compute()["mask_AP50" if masks else "AP50"]
    collected = metric.images.values()
    breakdown = error_breakdown(collected, metric.class_names, masks=masks)
    np.testing.assert_allclose(breakdown.AP, ap50, rtol=0, atol=1e-12)
    curves = precision_recall(collected, metric.class_names, masks=masks)
    np.testing.assert_allclose(curves.mean()[0].mean(), ap50, rtol=0, atol=1e-12)


def case_of(**effects: tuple[int, float]) -> dict[str, tuple[int, float]]:
    """By name with underscores: the count and effect of the errors that there are."""
    return {name: effects.get(name.replace(" ", "_"), (0, 0.0)) for name in ("AP", *MAIN_ERRORS, *SPECIAL_ERRORS)}


HALF = 51 / 101  # the AP of one object of two: precision is 1 at the recalls 0.00 to 0.50


@pytest.mark.parametrize(
    ("objects", "detections", "expected"),
    [
        pytest.param(
            [(1, HERE), (2, THERE)],
            [(2, HERE, 0.9), (2, THERE, 0.8)],
            # cat 0, dog 0.5; corrected, the first is the cat. Without the object that is not found there are no cats.
            case_of(
                AP=(0, 0.25), classification=(1, 0.75), false_positives=(1, 0.25), false_negatives=(1, 0.25)
            ),
            id="classification",
        ),
        pytest.param(
            [(1, HERE), (1, THERE)],
            [(1, THERE, 0.9), (1, THIRD_OF_HERE, 0.8), (1, THIRD_OF_HERE, 0.7)],
            case_of(
                AP=(0, HALF), localisation=(2, 1 - HALF), false_positives=(2, 0.0), false_negatives=(1, 1 - HALF)
            ),
            id="localisation",
        ),
        pytest.param(
            [(1, HERE), (2, THERE)],
            [(1, HERE, 0.9), (2, THIRD_OF_HERE, 0.8), (2, THERE, 0.7)],
            case_of(AP=(0, 0.75), both=(1, 0.25), false_positives=(1, 0.25)),
            id="both",
        ),
        pytest.param(
            [(1, HERE), (1, THERE)],
            [(1, HERE, 0.9), (1, HERE, 0.8), (1, THERE, 0.7)],
            case_of(AP=(0, (51 + 50 * 2 / 3) / 101), duplicate=(1, 50 / 303), false_positives=(1, 50 / 303)),
            id="duplicate",
        ),
        pytest.param(
            [(1, HERE)],
            [(1, ELSEWHERE, 0.9), (1, HERE, 0.8)],
            case_of(AP=(0, 0.5), background=(1, 0.5), false_positives=(1, 0.5)),
            id="background",
        ),
        pytest.param(
            [(1, HERE), (1, THERE)],
            [(1, HERE, 0.9)],
            case_of(AP=(0, HALF), missed=(1, 1 - HALF), false_negatives=(1, 1 - HALF)),
            id="missed",
        ),
        pytest.param(
            [(1, HERE), (1, THERE, True)],
            [(1, THERE, 0.9), (1, HERE, 0.8)],
            case_of(AP=(0, 1.0)),
            id="on a crowd",
        ),
        pytest.param(
            [(1, HERE)],
            [(2, ELSEWHERE, 0.9), (1, HERE, 0.8)],
            case_of(AP=(0, 1.0), background=(1, 0.0), false_positives=(1, 0.0)),
            id="of a class without objects",
        ),
        pytest.param(
            [(1, HERE)],
            [],
            case_of(AP=(0, 0.0), missed=(1, 1.0), false_negatives=(1, 1.0)),
            id="nothing detected",
        ),
    ],
)  # fmt: skip
def test_errors_by_hand(
    objects: list[Object], detections: list[Detection], expected: dict[str, tuple[int, float]]
) -> None:
    assert_equal_numbers(numbers_of(error_breakdown([image_of(objects, detections)], ANIMALS)), expected)


# --- classes confused ---


def slow_confusion(images: Sequence[ImageBoxes], labels: list[int], score: float, iou: float) -> np.ndarray:
    counts = np.zeros((len(labels) + 1, len(labels) + 1), dtype=np.int64)
    for image in images:
        found = [i for i in range(len(image.found_labels)) if image.found_scores[i] >= score]
        true = [j for j in range(len(image.true_labels)) if not image.true_crowds[j]]
        crowds = [j for j in range(len(image.true_labels)) if image.true_crowds[j]]

        def overlap(i: int, j: int, image: ImageBoxes = image) -> float:
            (x, y, w, h), (p, q, v, g) = image.found_boxes_xywh[i], image.true_boxes_xywh[j]
            inside = max(0.0, min(x + w, p + v) - max(x, p)) * max(0.0, min(y + h, q + g) - max(y, q))
            return inside / (w * h if image.true_crowds[j] else w * h + v * g - inside)

        while True:
            pairs = [
                (-overlap(i, j), image.found_labels[i] != image.true_labels[j], -image.found_scores[i], i, j)
                for i, j in itertools.product(found, true)
                if overlap(i, j) >= iou
            ]
            if not pairs:
                break
            *_, i, j = min(pairs)
            counts[labels.index(image.true_labels[j]), labels.index(image.found_labels[i])] += 1
            found.remove(i)
            true.remove(j)
        for j in true:
            counts[labels.index(image.true_labels[j]), -1] += 1
        for i in found:
            on_crowd = any(overlap(i, j) >= iou for j in crowds if image.true_labels[j] == image.found_labels[i])
            counts[-1, labels.index(image.found_labels[i])] += not on_crowd
    return counts


@pytest.mark.parametrize("seed", range(4))
def test_random_confusion_equals_a_slow_one(seed: int) -> None:
    images, class_names = random_images(seed)
    for score, iou in ((0.0, 0.5), (0.5, 0.3), (0.625, 0.8)):
        matrix = confusion_matrix(images, class_names, score_threshold=score, iou_threshold=iou)
        np.testing.assert_array_equal(matrix.counts, slow_confusion(images, list(class_names), score, iou))
        assert matrix.counts[-1, -1] == 0


def test_confusion_of_masks() -> None:
    """Boxes that are the same, and masks that are not."""
    image = image_of([(1, HERE)], [(2, HERE, 0.9)], masks=True)
    image.true_masks[0] = coco_mask.frPyObjects([[0, 0, 20, 0, 20, 20, 0, 20]], 400, 400)[0]
    assert confusion_matrix([image], ANIMALS).counts.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert confusion_matrix([image], ANIMALS, masks=True).counts.tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("objects", "detections", "expected"),
    [
        pytest.param([(1, HERE)], [(1, HERE, 0.3)], [[1, 0, 0], [0, 0, 0], [0, 0, 0]], id="found"),
        pytest.param([(1, HERE)], [(1, HERE, 0.29)], [[0, 0, 1], [0, 0, 0], [0, 0, 0]], id="of too low a score"),
        pytest.param([(1, HERE)], [(2, HERE, 0.9)], [[0, 1, 0], [0, 0, 0], [0, 0, 0]], id="confused"),
        pytest.param(
            [(1, HERE)], [(2, HERE, 0.9), (1, HERE, 0.4)], [[1, 0, 0], [0, 0, 0], [0, 1, 0]], id="right class first"
        ),
        pytest.param(
            [(1, HERE)],
            [(2, HERE, 0.4), (1, (0.0, 0.0, 100.0, 99.0), 0.9)],
            [[0, 1, 0], [0, 0, 0], [1, 0, 0]],
            id="higher IoU before class and score",
        ),
        pytest.param([(1, HERE)], [(1, THIRD_OF_HERE, 0.9)], [[0, 0, 1], [0, 0, 0], [1, 0, 0]], id="missed"),
        pytest.param(
            [(1, HERE, True)], [(1, THIRD_OF_HERE, 0.9), (2, HERE, 0.9)], [[0] * 3, [0] * 3, [0, 1, 0]], id="crowd"
        ),
        pytest.param([], [], [[0] * 3] * 3, id="nothing"),
    ],
)
def test_confusion_by_hand(objects: list[Object], detections: list[Detection], expected: list[list[int]]) -> None:
    assert confusion_matrix([image_of(objects, detections)], ANIMALS).counts.tolist() == expected


def test_an_iou_of_one_is_reached_by_equal_boxes() -> None:
    boxes = np.random.default_rng(0).uniform(0, 100, (50, 4)).tolist()
    images = [image_of([(1, tuple(box))], [(1, tuple(box), 0.9)]) for box in boxes]
    assert confusion_matrix(images, ANIMALS, iou_threshold=1.0).counts[0, 0] == 50
    assert round(error_breakdown(images, ANIMALS, foreground_iou=1.0).AP, 9) == 1


def test_most_confused_pairs() -> None:
    detections = [(2, HERE, 0.9), (2, THERE, 0.9), (1, ELSEWHERE, 0.9)]
    images = [image_of([(1, HERE), (1, THERE), (2, ELSEWHERE)], detections), image_of([(2, HERE)], [])]
    matrix = confusion_matrix(images, ANIMALS)
    assert [dataclasses.astuple(pair) for pair in matrix.most_confused()] == [
        ("cat", "dog", 2, 1.0),
        ("dog", "cat", 1, 0.5),
    ]
    assert len(matrix.most_confused(limit=1)) == 1
    assert matrix.table(limit=1) == (
        "scores from 0.3, IoU from 0.5\n"
        "4 objects: 0 found, 3 found as another class, 1 missed\n"
        "3 detections: 0 of them where no object is\n"
        "\n"
        "class     found as   times  of its objects\n"
        "cat       dog            2          100.0%"
    )


# --- what is shown and kept ---


def test_table_of_errors() -> None:
    images, class_names = random_images(0)
    breakdown = error_breakdown(images, class_names)
    rows = {line[:16].rstrip(): line[16:].split()[:2] for line in breakdown.table().splitlines()}
    assert breakdown.table().startswith(f"AP of boxes at IoU 0.5: {breakdown.AP:.4f}\n")
    for name, effect in (breakdown.main | breakdown.special).items():
        assert rows[name] == [f"{effect.delta_ap:.4f}", str(effect.count)]


def test_tables_fit_the_terminal() -> None:
    names = {1: "a class with a name that is too long", 2: "another class with a name that is too long"}
    image = image_of([(1, HERE)] * 3, [(2, HERE, 0.9)] * 3)
    images = [image] * 1000
    tables = [confusion_matrix(images, names).table(), error_breakdown(images, names, masks=False).table()]
    for line in "\n".join(tables).splitlines():
        assert len(line) <= 80, line


def test_errors_as_json() -> None:
    breakdown = error_breakdown([image_of([(1, HERE)], [(2, HERE, 0.9)])], ANIMALS)
    data = json.loads(json.dumps(dataclasses.asdict(breakdown)))
    assert data["main"]["classification"] == {"count": 1, "delta_ap": pytest.approx(1)}
    assert data["foreground_iou"] == 0.5


# --- mistakes ---


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (precision_recall, {"iou_thresholds": ()}, "iou_thresholds is empty"),
        (precision_recall, {"iou_thresholds": (0.5, 50)}, r"iou_thresholds has 50, expected an IoU in \(0, 1\]"),
        (precision_recall, {"max_detections": 0}, "max_detections is 0, expected a whole number from 1"),
        (confusion_matrix, {"iou_threshold": 0.0}, r"iou_threshold has 0.0, expected an IoU in \(0, 1\]"),
        (confusion_matrix, {"score_threshold": 30}, r"score_threshold is 30, expected a score in \[0, 1\]"),
        (confusion_matrix, {"masks": True}, r"image 0 has no masks.*CocoMeanAveragePrecision\(masks=True\)"),
        (error_breakdown, {"foreground_iou": 1.5}, "foreground_iou has 1.5, expected an IoU"),
        (error_breakdown, {"background_iou": 0.6}, "background_iou is 0.6, .* below foreground_iou, which is 0.5"),
        (error_breakdown, {"background_iou": 0.0}, "background_iou is 0.0, expected an IoU above 0"),
        (error_breakdown, {"masks": True}, "image 0 has no masks"),
    ],
)
def test_wrong_arguments(function: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function([image_of([(1, HERE)], [(1, HERE, 0.9)])], ANIMALS, **options)


def test_labels_without_a_name() -> None:
    images = [image_of([], []), image_of([(1, HERE)], [(3, HERE, 0.9)])]
    for function in (precision_recall, confusion_matrix, error_breakdown):
        with pytest.raises(ValueError, match="the detections of image 1 have the label 3, .* 2 labels of class_names"):
            function(images, ANIMALS)
        with pytest.raises(ValueError, match="the objects of image 1 have the label 1, .* 1 labels of class_names"):
            function(images, {3: "fish"})


def test_errors_of_images_without_objects() -> None:
    with pytest.raises(ValueError, match="no objects"):
        error_breakdown([image_of([], [(1, HERE, 0.9)])], ANIMALS)


# --- the score of each image ---


def test_image_f1_by_hand() -> None:
    images = [
        image_of([(1, HERE), (2, THERE)], [(1, HERE, 0.9), (2, THERE, 0.8)]),
        image_of([(1, HERE), (2, THERE)], [(2, HERE, 0.9), (2, THERE, 0.8), (2, THERE, 0.7)]),
        image_of([], []),
        image_of([], [(1, HERE, 0.9), (1, THERE, 0.4)]),
        image_of([(1, HERE, True), (1, ELSEWHERE)], [(1, THIRD_OF_HERE, 0.9)]),  # on a crowd: neither right nor wrong
    ]
    scores = image_f1_scores(images, ANIMALS)
    assert [(score.right, score.wrong, score.missed) for score in scores] == [
        (2, 0, 0),
        (1, 2, 1),  # the other class and the duplicate are wrong
        (0, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
    ]
    assert [score.f1 for score in scores] == [1.0, 0.4, 1.0, 0.0, 0.0]
    assert [score.wrong for score in image_f1_scores(images, ANIMALS, score_threshold=0.3)] == [0, 2, 0, 2, 0]
    assert image_f1_scores([], ANIMALS) == []


@pytest.mark.parametrize("masks", [False, True])
def test_image_f1_is_that_of_each_image_alone(masks: bool) -> None:
    """By COCOeval's own matching of one image: its precision and recall at the score threshold."""
    images, class_names = random_images(0, masks=masks)
    scores = image_f1_scores(images, class_names, score_threshold=0.5, masks=masks)
    for image, score in zip(images, scores, strict=True):
        certain = image.found_scores >= 0.5
        kept = dataclasses.replace(
            image,
            found_boxes_xywh=image.found_boxes_xywh[certain],
            found_labels=image.found_labels[certain],
            found_scores=image.found_scores[certain],
            found_masks=[mask for mask, keep in zip(image.found_masks or [], certain, strict=True) if keep]
            if masks
            else None,
        )
        num_objects = int((~image.true_crowds).sum())
        if num_objects:
            special = error_breakdown([kept], class_names, masks=masks, max_detections=1000).special
            assert score.missed == special["false negatives"].count
            assert score.wrong == special["false positives"].count
            assert score.right == num_objects - score.missed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score_threshold": 50}, "score_threshold is 50, expected"),
        ({"iou_threshold": 0}, "iou_threshold has 0, expected"),
    ],
)
def test_thresholds_of_image_f1(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_f1_scores([], ANIMALS, **arguments)
