"""MeanIoU against torchmetrics, against a plain loop over the classes, and by hand."""

from __future__ import annotations

import doctest
import json
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

import resnest_det.evaluation.miou as miou
from resnest_det.evaluation import MeanIoU

NAMES = ["mIoU", "mAcc", "aAcc", "fwIoU"]
IGNORED = 255

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def named(num_classes: int) -> dict[int, str]:
    return {label: f"class {label}" for label in range(num_classes)}


def street() -> MeanIoU:
    return MeanIoU({0: "road", 1: "car", 2: "sky"})


def labels(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def random_case(seed: int) -> tuple[list[Tensor], list[Tensor], int]:
    """Label maps and masks of 6 sizes and 9 classes, with ignored pixels and an image of nothing else.

    Class 6 is only in the truth, 7 only in the predictions, and 8 in neither.
    """
    generator = torch.Generator().manual_seed(seed)
    predictions, masks = [], []
    for height, width in [(1, 1), (7, 5), (16, 16), (3, 40), (33, 21), (4, 4)]:
        mask = torch.randint(0, 7, (height, width), generator=generator)
        noise = torch.randint(0, 7, (height, width), generator=generator)
        noise[noise == 6] = 7
        right = torch.rand(height, width, generator=generator) < 0.6
        predictions.append(torch.where(right & (mask != 6), mask, noise))
        mask[torch.rand(height, width, generator=generator) < 0.2] = IGNORED
        masks.append(mask.to(torch.uint8))
    masks[-1].fill_(IGNORED)
    return predictions, masks, 9


def metric_of(predictions: list[Tensor], masks: list[Tensor], num_classes: int) -> MeanIoU:
    metric = MeanIoU(named(num_classes))
    for first in range(0, len(masks), 2):
        metric.update(predictions[first : first + 2], masks[first : first + 2])
    return metric


def by_a_loop(
    predictions: list[Tensor], masks: list[Tensor], num_classes: int
) -> tuple[list[float], list[list[float]]]:
    """The four numbers, and for each class IoU, accuracy and share: the slow and obvious oracle."""
    truth = [label for mask in masks for label in mask.flatten().tolist()]
    found = [label for prediction in predictions for label in prediction.flatten().tolist()]
    pixels = [(true, seen) for true, seen in zip(truth, found, strict=True) if true != IGNORED]
    rows = []
    for label in range(num_classes):
        both = sum(true == label and seen == label for true, seen in pixels)
        either = sum(true == label or seen == label for true, seen in pixels)
        of_truth = sum(true == label for true, _ in pixels)
        iou = both / either if either else -1.0
        accuracy = both / of_truth if of_truth else -1.0
        rows.append([iou, accuracy, of_truth / len(pixels)])
    ious = [iou for iou, _, _ in rows if iou != -1]
    accuracies = [accuracy for _, accuracy, _ in rows if accuracy != -1]
    summary = [
        sum(ious) / len(ious),
        sum(accuracies) / len(accuracies),
        sum(true == seen for true, seen in pixels) / len(pixels),
        sum(share * iou for iou, _, share in rows if share),
    ]
    return summary, rows


# --- the oracles ---


@pytest.mark.parametrize("seed", range(5))
def test_random_cases_equal_a_plain_loop(seed: int) -> None:
    predictions, masks, num_classes = random_case(seed)
    summary, rows = by_a_loop(predictions, masks, num_classes)
    assert 0.2 < summary[0] < 0.8, "the case should tell good numbers from bad ones"
    metric = metric_of(predictions, masks, num_classes)
    assert list(metric.compute().values()) == pytest.approx(summary, abs=1e-12)
    for row, expected in zip(metric.per_class(), rows, strict=True):
        assert [row.IoU, row.accuracy, row.share] == pytest.approx(expected, abs=1e-12)
    assert [row.name for row in metric.per_class()] == list(named(num_classes).values())
    assert metric.absent == ["class 8"]


@pytest.mark.parametrize("seed", range(5))
def test_random_cases_equal_torchmetrics(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # torchmetrics divides in float32, which would hide differences below 1e-7.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    predictions, masks, num_classes = random_case(seed)
    metric = metric_of(predictions, masks, num_classes)
    numbers = metric.compute()
    options: dict[str, Any] = {"num_classes": num_classes, "ignore_index": IGNORED}
    expected = {}
    for name, oracle in {
        "mIoU": MulticlassJaccardIndex(**options),
        "IoU": MulticlassJaccardIndex(average="none", **options),
        "accuracy": MulticlassAccuracy(average="none", **options),
        "aAcc": MulticlassAccuracy(average="micro", **options),
        "fwIoU": MulticlassJaccardIndex(average="weighted", **options),
    }.items():
        for prediction, mask in zip(predictions, masks, strict=True):
            oracle.update(prediction[None], mask[None].long())
        expected[name] = oracle.compute()
    assert expected["IoU"].dtype == torch.float64
    for name in ("mIoU", "aAcc", "fwIoU"):
        assert numbers[name] == pytest.approx(float(expected[name]), abs=1e-12)
    # Its 0 stands for "not defined" too, and its mean accuracy counts classes that the truth does not have.
    rows = metric.per_class()
    assert [max(row.IoU, 0.0) for row in rows] == pytest.approx(expected["IoU"].tolist(), abs=1e-12)
    assert [max(row.accuracy, 0.0) for row in rows] == pytest.approx(expected["accuracy"].tolist(), abs=1e-12)
    assert numbers["mAcc"] == pytest.approx(float(expected["accuracy"][:7].mean()), abs=1e-12)


def test_the_order_of_the_images_does_not_matter() -> None:
    predictions, masks, num_classes = random_case(0)
    expected = metric_of(predictions, masks, num_classes).compute()
    assert metric_of(predictions[::-1], masks[::-1], num_classes).compute() == expected


def test_the_truth_of_ade20k_as_prediction_scores_one(real_data: Callable[[str], Path]) -> None:
    paths = sorted(real_data("ade20k_samples").rglob("annotations/**/*.png"))
    assert paths, "no masks among the samples"
    metric = MeanIoU(named(150))
    for path in paths:
        # 0 is "other" and ignored, 1 to 150 are the classes: in bytes, 0 - 1 is 255.
        mask = torch.from_numpy(np.array(Image.open(path)) - np.uint8(1))
        metric.update([mask], [mask])
    assert metric.compute() == dict.fromkeys(NAMES, 1.0)
    assert 0 < len(metric.absent) < 150


# --- by hand ---


def test_one_wrong_pixel_of_four() -> None:
    metric = street()
    metric.update([labels([0, 0, 0, 1])], [labels([0, 0, 1, 1])])
    # road: 2 of 3; car: 1 of 2.
    expected = {"mIoU": (2 / 3 + 1 / 2) / 2, "mAcc": 3 / 4, "aAcc": 3 / 4, "fwIoU": (2 / 3 + 1 / 2) / 2}
    assert metric.compute() == pytest.approx(expected, abs=1e-15)
    road, car, sky = metric.per_class()
    assert (road.label, road.name, road.IoU, road.accuracy, road.share) == (0, "road", pytest.approx(2 / 3), 1.0, 0.5)
    assert (car.IoU, car.accuracy, car.share) == (0.5, 0.5, 0.5)
    assert (sky.IoU, sky.accuracy, sky.share) == (-1.0, -1.0, 0.0)
    assert metric.absent == ["sky"]


def test_a_predicted_class_that_is_nowhere_in_the_truth_counts_0_in_the_mean_iou_only() -> None:
    metric = street()
    metric.update([labels([0, 0, 0, 2])], [labels([0, 0, 0, 0])])
    assert metric.compute() == {"mIoU": 0.375, "mAcc": 0.75, "aAcc": 0.75, "fwIoU": 0.75}
    assert metric.absent == ["car"]
    assert (metric.per_class()[2].IoU, metric.per_class()[2].accuracy) == (0.0, -1.0)


def test_what_is_predicted_on_ignored_pixels_counts_nowhere() -> None:
    metric = street()
    # 255 is no class either: as long as it stands on ignored pixels only, it may be predicted.
    metric.update([labels([0, 1, 2, 255])], [labels([0, 1, 255, 255])])
    assert metric.compute() == dict.fromkeys(NAMES, 1.0)
    assert metric.absent == ["sky"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_type_of_mask(dtype: torch.dtype) -> None:
    metric = street()
    mask = labels([0, 1, 1, 255]).to(dtype)
    metric.update([labels([0, 1, 2, 2]).to(dtype)], mask[None])
    assert metric.compute()["aAcc"] == pytest.approx(2 / 3)
    assert mask.tolist() == [[0, 1, 1, 255]]


def test_another_ignored_value() -> None:
    metric = MeanIoU({0: "road", 1: "car"}, ignore_index=-1)
    metric.update([labels([0, 1])], [labels([0, -1])])
    assert metric.compute()["aAcc"] == 1.0
    # In bytes -1 would be 255, which is not what was declared.
    with pytest.raises(ValueError, match=r"mask 0 of the batch holds 255; there are 2 classes.* in masks -1"):
        metric.update([labels([0, 1])], [labels([0, 255]).to(torch.uint8)])


# --- logits ---


def test_a_models_logits_are_resized_to_each_mask() -> None:
    logits = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    sizes = [(13, 9), (6, 5), (2, 3)]
    resized = [
        F.interpolate(one[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
        for one, size in zip(logits, sizes, strict=True)
    ]
    masks = [torch.randint(0, 4, size, generator=torch.Generator().manual_seed(1)) for size in sizes]
    expected = metric_of(resized, masks, 4).compute()
    for predictions in ({"out": logits}, logits, list(logits)):
        metric = MeanIoU(named(4))
        metric.update(predictions, masks)
        assert metric.compute() == expected


def test_half_precision_logits_of_another_size_do_not_tie() -> None:
    # Between 256 and 258 bfloat16 has no number: rounded after resizing, the classes would be equal.
    logits = torch.tensor([[[256.0, 258.0]], [[256.0, 260.0]]], dtype=torch.bfloat16)
    metric = MeanIoU(named(2))
    metric.update([logits], [labels([0, 1, 1, 1])])
    assert metric.compute()["aAcc"] == 1.0


def test_the_truth_as_logits_scores_one() -> None:
    mask = torch.randint(0, 5, (2, 12, 8), generator=torch.Generator().manual_seed(0))
    metric = MeanIoU(named(5))
    metric.update({"out": F.one_hot(mask, 5).permute(0, 3, 1, 2).float()}, mask.to(torch.uint8))
    assert metric.compute() == dict.fromkeys(NAMES, 1.0)


def test_updates_in_and_out_of_inference_mode() -> None:
    metric = street()
    with torch.inference_mode():
        metric.update([labels([0, 1])], [labels([0, 1])])
    metric.update([labels([0, 1])], [labels([0, 0])])
    assert metric.compute()["aAcc"] == 0.75


def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        metric = street()
        metric.update([labels([0, 1])], [labels([0, 1])])
        assert metric.compute()["mIoU"] == 1.0
    finally:
        torch.use_deterministic_algorithms(False)


@needs_cuda
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_matrix_is_on_the_predictions_device(deterministic: bool) -> None:
    predictions, masks, num_classes = random_case(0)
    expected = metric_of(predictions, masks, num_classes).compute()
    torch.use_deterministic_algorithms(deterministic)
    try:
        metric = metric_of([prediction.cuda() for prediction in predictions], masks, num_classes)
        assert metric._matrix.device.type == "cuda"
        assert metric.compute() == expected
    finally:
        torch.use_deterministic_algorithms(False)


# --- edge cases ---


def test_all_pixels_ignored_is_minus_one() -> None:
    metric = street()
    metric.update([labels([0, 1])], [labels([255, 255])])
    assert metric.compute() == dict.fromkeys(NAMES, -1.0)
    assert metric.absent == ["road", "car", "sky"]
    assert metric.table().splitlines()[1] == "       -       -       -       -"


def test_one_class_and_one_pixel() -> None:
    metric = MeanIoU({0: "road"})
    metric.update([labels([0])], [labels([0])])
    assert metric.compute() == dict.fromkeys(NAMES, 1.0)


def test_an_empty_batch_adds_nothing() -> None:
    metric = street()
    metric.update([], [])
    with pytest.raises(ValueError, match="no images to evaluate: call update"):
        metric.compute()


def test_updates_after_compute_and_reset() -> None:
    metric = street()
    metric.update([labels([0, 1])], [labels([0, 1])])
    assert metric.compute()["aAcc"] == 1.0
    metric.update([labels([0, 1])], [labels([1, 0])])
    assert metric.compute()["aAcc"] == 0.5
    metric.reset()
    metric.update([labels([0, 1])], [labels([1, 0])])
    assert metric.compute()["aAcc"] == 0.0


def test_the_numbers_are_plain_floats() -> None:
    metric = street()
    metric.update([labels([0, 1])], [labels([0, 1])])
    numbers = metric.compute()
    assert list(numbers) == NAMES
    assert {type(number) for number in numbers.values()} == {float}


def test_the_docstring_example() -> None:
    results = doctest.testmod(miou, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0


# --- the table ---


def test_table() -> None:
    metric = MeanIoU({1: "a car of the longest name there is", 0: "road", 2: "sky", 3: "sea"})
    metric.update([labels([0, 0, 0, 1, 0, 0, 0, 2])], [labels([0, 0, 1, 1, 0, 0, 0, 0])])
    metric.compute()
    assert metric.table().splitlines() == [
        "    mIoU    mAcc    aAcc   fwIoU",
        "   0.405   0.667   0.750   0.661",
        "",
        "label class                         IoU  accuracy  pixels",
        "    0 road                        0.714     0.833  75.00%",
        "    1 a car of the longest nam…   0.500     0.500  25.00%",
        "    2 sky                         0.000         -   0.00%",
        "",
        "absent from ground truth and predictions, left out: sea",
    ]


def test_a_table_of_many_absent_classes_keeps_its_width() -> None:
    metric = MeanIoU(named(150))
    metric.update([labels([0])], [labels([0])])
    metric.compute()
    lines = metric.table().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].endswith("class 149")


def test_a_table_without_absent_classes_does_not_speak_of_them() -> None:
    metric = street()
    metric.update([labels([0, 1, 2])], [labels([0, 1, 2])])
    metric.compute()
    assert metric.absent == []
    assert "absent" not in metric.table()


# --- several processes ---


def gathered(rank: int, folder: str, splits: list[list[int]]) -> None:
    """One of two processes: of each split, updates with the images that are this process's."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    predictions, masks, num_classes = random_case(1)
    results = []
    for split in splits:
        mine = [index for index, process in enumerate(split) if process == rank]
        metric = MeanIoU(named(num_classes))
        names = [f"{index}.png" for index in mine]
        metric.update([predictions[index] for index in mine], [masks[index] for index in mine], names)
        metric.merge()
        results.append([metric.compute(), metric.table(), metric.image_scores])
    with pytest.raises(ValueError, match=r"merge\(\) came twice") as error:
        metric.merge()
    metric.reset()
    metric.update(predictions[:1], masks[:1])
    metric.merge()
    metric.reset()
    metric.update(predictions[:1], masks[:1], ["same.png"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metric.merge()
    assert ["the name 'same.png' came twice" in str(warning.message) for warning in caught] == [True] * (rank == 0)
    assert metric.image_scores == {}
    metric.compute()
    Path(folder, f"{rank}.json").write_text(json.dumps([results, str(error.value)]))
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    predictions, masks, num_classes = random_case(1)
    num_images = len(masks)
    metric = MeanIoU(named(num_classes))
    metric.update(predictions, masks, [f"{index}.png" for index in range(num_images)])
    metric.merge()
    expected = [metric.compute(), metric.table(), metric.image_scores]
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
        assert "every image would count more than once" in error


# --- the score of each image ---


def test_image_scores_by_hand() -> None:
    metric = street()
    masks = [labels([0, 0, 1, 1]), labels([IGNORED, IGNORED, IGNORED, IGNORED]), labels([2, 2, 2, IGNORED])]
    found = [labels([0, 1, 1, 1]), labels([0, 1, 2, 0]), labels([2, 2, 2, 0])]
    metric.update(found[:2], masks[:2], ["a", "b"])
    metric.update(found[2:], masks[2:], ["c"])
    metric.update(found[:1], masks[:1])  # without a name it counts, and has no score of its own
    # Of a: 1 of 2 pixels of the road, 2 of 3 of the cars, and no sky; what is ignored in c is not wrong.
    assert metric.image_scores == pytest.approx({"a": (1 / 2 + 2 / 3) / 2, "b": -1.0, "c": 1.0})
    metric.reset()
    assert metric.image_scores == {}


@pytest.mark.parametrize("seed", range(3))
def test_an_images_score_is_the_mean_iou_of_it_alone(seed: int) -> None:
    predictions, masks, num_classes = random_case(seed)
    metric = MeanIoU(named(num_classes))
    metric.update(predictions, masks, [str(index) for index in range(len(masks))])
    for index, (prediction, mask) in enumerate(zip(predictions, masks, strict=True)):
        alone = metric_of([prediction], [mask], num_classes).compute()["mIoU"]
        assert metric.image_scores[str(index)] == pytest.approx(alone, abs=1e-6)


def test_images_of_the_same_name() -> None:
    metric = street()
    mask = labels([0, 1])
    metric.update([mask], [mask], ["a.png"])
    with pytest.warns(UserWarning, match="the name 'a.png' came twice: there are no scores of single images"):
        metric.update([mask], [mask], ["a.png"])
    metric.update([mask, mask], [mask, mask], ["b.png", "b.png"])  # it is warned of once
    metric.merge()
    assert metric.compute()["mIoU"] == 1.0
    assert metric.image_scores == {}
    metric.reset()
    metric.update([mask], [mask], ["a.png"])
    assert metric.image_scores == {"a.png": 1.0}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["b", "b"], "the name 'b' came twice"),
        (["b"], "1 names came for 2 images"),
        ([], "0 names came for 2 images"),
        ("bc", "one string came for 2 images"),
        ([1, 2], "a name is of type int, no string"),
    ],
)
def test_names_never_make_an_evaluation_fail(names: Any, message: str) -> None:
    metric = street()
    mask = labels([0, 1])
    with pytest.warns(UserWarning, match=message):
        metric.update([mask, mask], [mask, mask], names)
    assert metric.image_scores == {}
    assert metric.compute()["mIoU"] == 1.0


# --- mistakes ---


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        ({}, r"class_names is \{\}; give a mapping"),
        (["road", "car"], r"class_names is \['road', 'car'\]; give a mapping"),
        ({1: "road", 2: "car"}, r"has the label 2 among 2 classes; labels are the ints from 0 to 1"),
        ({0: "road", 5: "car"}, r"has the label 5 among 2 classes"),
        ({"0": "road"}, r"has the label '0' among 1 classes"),
    ],
)
def test_wrong_class_names(class_names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanIoU(class_names)


def test_an_ignored_value_that_is_a_class() -> None:
    with pytest.raises(ValueError, match=r"ignore_index=255 is the label of 'class 255'; .* below 0 or from 300"):
        MeanIoU(named(300))


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (labels([0, 3]), r"prediction 0 of the batch holds 3; there are 3 classes, 0 to 2"),
        (labels([-1, 0]), r"prediction 0 of the batch holds -1; there are 3 classes"),
        (labels([2**32, 0]), r"prediction 0 of the batch holds 4294967296; there are 3 classes"),
        (labels([0, 1, 2]), r"prediction 0 of the batch is a label map of 1x3 beside a mask of 1x2"),
        (torch.tensor([0, 1]), r"prediction 0 of the batch is int64 \(2,\); it must be logits"),
        (torch.zeros(1, 2), r"prediction 0 of the batch is float32 \(1, 2\); it must be logits"),
        (torch.zeros(3, 1, 2, dtype=torch.int64), r"is int64 \(3, 1, 2\); it must be logits \(K, H, W\) of floats"),
        (torch.zeros(2, 1, 2), r"prediction 0 of the batch has 2 channels for 3 classes"),
        (torch.full((3, 1, 2), torch.nan), r"prediction 0 of the batch has logits that are NaN"),
        (torch.full((3, 4, 4), torch.nan), r"prediction 0 of the batch has logits that are NaN"),
        (np.zeros((1, 2)), r"prediction 0 of the batch is of type ndarray; it must be"),
    ],
)
def test_wrong_predictions(prediction: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        street().update([prediction], [labels([0, 1])])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (labels([0, 3]), r"mask 0 of the batch holds 3; there are 3 classes, 0 to 2, and in masks 255"),
        (labels([0, 254]).to(torch.uint8), r"mask 0 of the batch holds 254; there are 3 classes"),
        (labels([-1, 0]), r"mask 0 of the batch holds -1; there are 3 classes"),
        (labels([2**32, 0]), r"mask 0 of the batch holds 4294967296; there are 3 classes"),
        (torch.zeros(1, 2), r"mask 0 of the batch is float32 \(1, 2\); it must be a tensor \(H, W\) of integers"),
        (torch.zeros(3, 1, 2, dtype=torch.uint8), r"mask 0 of the batch is uint8 \(3, 1, 2\); .* picture in colours"),
        (torch.zeros(0, 2, dtype=torch.uint8), r"mask 0 of the batch is uint8 \(0, 2\)"),
        ([[0, 1]], r"mask 0 of the batch is of type list"),
    ],
)
def test_wrong_masks(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        street().update([labels([0, 1])], [mask])


def test_losses_in_place_of_predictions() -> None:
    with pytest.raises(ValueError, match=r"no 'out', only \['loss_seg'\].* evaluation mode"):
        street().update({"loss_seg": torch.tensor(1.0)}, [labels([0])])


def test_as_many_predictions_as_masks() -> None:
    with pytest.raises(ValueError, match="1 predictions came for 2 masks"):
        street().update([labels([0])], [labels([0]), labels([0])])


def test_an_update_that_raises_adds_nothing() -> None:
    metric = street()
    metric.update([labels([0, 1])], [labels([0, 1])])
    expected = metric.compute()
    with pytest.raises(ValueError, match="mask 1 of the batch holds 7"):
        metric.update([labels([0]), labels([0])], [labels([1]), labels([7])])
    assert metric.compute() == expected


def test_compute_without_images() -> None:
    with pytest.raises(ValueError, match="no images to evaluate: call update"):
        street().compute()


def test_results_before_compute() -> None:
    metric = street()
    metric.update([labels([0, 1])], [labels([0, 1])])
    for read in (metric.per_class, metric.table, lambda: metric.absent):
        with pytest.raises(ValueError, match=r"call compute\(\) first"):
            read()
