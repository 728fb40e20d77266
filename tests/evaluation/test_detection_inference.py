"""DetectionInference: detectors at several sizes, mirrored, and in tiles."""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection import FCOS, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import resnest_det.evaluation.detection_inference as detection_inference
from resnest_det import create_backbone, fpn_backbone
from resnest_det.evaluation import CocoMeanAveragePrecision, DetectionInference, evaluate
from resnest_det.models import faster_rcnn

Box = tuple[int, int, int, int]


class BrightSpots(nn.Module):
    """Finds what is bright: each connected piece of channel c is an object of class c + 1, scored by its brightness.

    Remembers the sizes of the images of each call.
    """

    def __init__(self, *, masks: bool = False) -> None:
        super().__init__()
        self.masks = masks
        self.calls: list[list[tuple[int, int]]] = []

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        self.calls.append([(image.shape[1], image.shape[2]) for image in images])
        return [self.find(image) for image in images]

    def find(self, image: Tensor) -> dict[str, Tensor]:
        boxes, labels, scores, masks = [], [], [], []
        for channel, plane in enumerate(image):
            count, pieces = cv2.connectedComponents((plane.numpy() > 0.5).astype(np.uint8), connectivity=4)
            for number in range(1, count):
                rows, columns = np.nonzero(pieces == number)
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                labels.append(channel + 1)
                scores.append(float(plane[rows, columns].max()))
                masks.append(torch.from_numpy(pieces == number).float())
        order = torch.tensor(scores).argsort(descending=True, stable=True)
        found = {
            "boxes": torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4)[order],
            "labels": torch.tensor(labels, dtype=torch.int64)[order],
            "scores": torch.tensor(scores)[order],
        }
        if self.masks:
            found["masks"] = torch.stack(masks)[order][:, None] if masks else torch.zeros(0, 1, *image.shape[1:])
        return found


class ResizingBrightSpots(BrightSpots):
    """The same on images that torchvision's transform has resized."""

    def __init__(self, min_size: int = 32, max_size: int = 64) -> None:
        super().__init__()
        self.transform = GeneralizedRCNNTransform(min_size, max_size, [0.0] * 3, [1.0] * 3, _skip_resize=True)

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        resized, _ = self.transform(list(images))
        sizes = resized.image_sizes
        found = super().forward(
            [image[:, :height, :width] for image, (height, width) in zip(resized.tensors, sizes, strict=True)]
        )
        return self.transform.postprocess(found, sizes, [(image.shape[1], image.shape[2]) for image in images])


class Answers(nn.Module):
    """Answers anything with the same."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Any) -> Any:
        return self.answer


class SurerOfLess(BrightSpots):
    """The smaller a box, the higher its score: a cut object is scored above the whole."""

    def find(self, image: Tensor) -> dict[str, Tensor]:
        found = super().find(image)
        x1, y1, x2, y2 = found["boxes"].unbind(1)
        scores = 1 / (1 + 0.001 * (x2 - x1) * (y2 - y1))
        order = scores.argsort(descending=True)
        return {"boxes": found["boxes"][order], "labels": found["labels"][order], "scores": scores[order]}


def picture(height: int, width: int, *objects: tuple[Box, int, float]) -> Tensor:
    """A black image (3, H, W) with filled boxes: (xyxy, label, brightness)."""
    image = torch.zeros(3, height, width)
    for (x1, y1, x2, y2), label, brightness in objects:
        image[label - 1, y1:y2, x1:x2] = brightness
    return image


def as_set(found: dict[str, Any]) -> set[tuple[Any, ...]]:
    rows = zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
    return {(*box, label, round(score, 5)) for box, label, score in rows}


def expected_of(*objects: tuple[Box, int, float]) -> set[tuple[Any, ...]]:
    return {(*map(float, box), label, brightness) for box, label, brightness in objects}


def is_exactly(results: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    return [list(found) for found in results] == [list(found) for found in expected] and all(
        torch.equal(found[key], wanted[key]) for found, wanted in zip(results, expected, strict=True) for key in wanted
    )


def scattered(height: int, width: int, largest: int, seed: int = 0) -> list[tuple[Box, int, float]]:
    """Objects of sides from 2 to `largest` that do not touch, those of a class beginning and ending anywhere."""
    generator = np.random.default_rng(seed)
    taken, objects = np.zeros((height, width), dtype=bool), []
    for _ in range(400):
        w, h = (int(side) for side in generator.integers(2, largest + 1, 2))
        x, y = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
        if not taken[max(0, y - 1) : y + h + 1, max(0, x - 1) : x + w + 1].any():
            taken[y : y + h, x : x + w] = True
            objects.append(((x, y, x + w, y + h), int(generator.integers(1, 4)), round(generator.uniform(0.7, 1), 5)))
    return objects


EVEN = (((2, 4, 12, 20), 1, 0.9), ((30, 8, 34, 12), 1, 0.8), ((20, 16, 44, 30), 3, 0.7))


@pytest.fixture
def model() -> BrightSpots:
    return BrightSpots().eval()


@pytest.fixture
def resizing() -> ResizingBrightSpots:
    return ResizingBrightSpots().eval()


# --- one pass ---


def detectors() -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 96}

    def pyramid() -> Any:
        return fpn_backbone(create_backbone("resnet18"), out_channels=32)

    square = AnchorGenerator(tuple((size,) for size in (8, 16, 32, 64, 128)), ((1.0,),) * 5)
    single = nn.Conv2d(3, 8, 3, stride=32)
    single.out_channels = [8]  # type: ignore[assignment]
    return {
        "faster_rcnn": faster_rcnn(
            create_backbone("resnet18"), 4, fpn_channels=32, box_head_channels=16, score_threshold=0.0, **sizes
        ),
        "retinanet": RetinaNet(
            pyramid(),
            4,
            anchor_generator=square,
            score_thresh=0.0,
            detections_per_img=300,
            topk_candidates=100,
            **sizes,
        ),
        "fcos": FCOS(pyramid(), 4, anchor_generator=square, score_thresh=0.0, topk_candidates=100, **sizes),
        "ssd": SSD(single, DefaultBoxGenerator([[2]]), (96, 64), 4, score_thresh=0.0),
    }


def test_mask_rcnn() -> None:
    torch.manual_seed(0)
    pyramid = fpn_backbone(create_backbone("resnet18"), out_channels=32)
    detector = MaskRCNN(pyramid, 4, min_size=64, max_size=96, box_score_thresh=0.0, box_detections_per_img=10).eval()
    images = [torch.rand(3, 60, 90), torch.rand(3, 40, 50)]
    with torch.no_grad():
        expected = detector(images)
    assert is_exactly(DetectionInference()(detector, images), expected)
    results = DetectionInference(short_sides=(48, 64), flip=True, detections_per_image=10)(detector, images)
    assert [found["masks"].shape for found in results] == [(10, 1, 60, 90), (10, 1, 40, 50)]
    (found,) = DetectionInference(tile=64, whole_image=True)(detector, images[:1])
    assert len(found["masks"]) == len(found["boxes"]) > 0
    assert {tuple(mask["size"]) for mask in found["masks"]} == {(60, 90)}


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet", "fcos", "ssd"])
def test_every_detector_without_arguments_and_with_all(name: str) -> None:
    detector = detectors()[name].eval()
    images = [torch.rand(3, height, width) for height, width in [(60, 90), (70, 50)]]
    with torch.no_grad():
        expected = detector(images)
        (alone,) = detector(images[:1])
    assert all(len(found["boxes"]) for found in expected)
    assert is_exactly(DetectionInference()(detector, images), expected)
    assert is_exactly(DetectionInference(tile=90)(detector, images[:1]), [alone])
    short_sides = () if name == "ssd" else (48, 64)
    for merge in ("nms", "wbf"):
        predict = DetectionInference(
            short_sides=short_sides, flip=True, merge=merge, tile=64, whole_image=True, detections_per_image=20
        )
        (found,) = predict(detector, images[:1])
        assert len(found["boxes"]) == len(found["labels"]) == len(found["scores"]) == 20
        assert found["scores"].diff().max() <= 0
        assert found["boxes"].min() >= -1e-4
        assert (found["boxes"].max(dim=0).values <= torch.tensor([90, 60, 90, 60]) + 1e-4).all()


def test_the_models_answer_is_passed_on_whole(model: BrightSpots) -> None:
    answer = [{**model.find(picture(8, 8, ((1, 1, 4, 4), 1, 0.9))), "keypoints": torch.ones(1, 5, 3)}]
    (found,) = DetectionInference()(Answers(answer).eval(), [torch.zeros(3, 8, 8)])
    assert found["keypoints"] is answer[0]["keypoints"]


def test_no_images(model: BrightSpots) -> None:
    assert DetectionInference()(model, []) == []
    assert DetectionInference(tile=8)(model, []) == []
    assert model.calls == []


def test_a_tensor_of_images(model: BrightSpots) -> None:
    results = DetectionInference(flip=True)(model, torch.stack([picture(32, 48, *EVEN), torch.zeros(3, 32, 48)]))
    assert [as_set(found) for found in results] == [expected_of(*EVEN), set()]


# --- sizes and mirror images ---


def test_a_mirrored_image_gives_back_the_exact_boxes(model: BrightSpots) -> None:
    images = [picture(32, 48, *EVEN), picture(9, 7, ((0, 0, 1, 9), 2, 0.75)), picture(5, 5)]
    results = DetectionInference(flip=True)(model, images)
    assert len(model.calls) == 2
    assert [as_set(found) for found in results] == [expected_of(*EVEN), {(0, 0, 1, 9, 2, 0.75)}, set()]
    for found in results:
        assert (found["scores"].diff() <= 0).all()


def test_what_only_the_mirror_image_shows_is_at_its_place() -> None:
    class LeftHalf(BrightSpots):
        def find(self, image: Tensor) -> dict[str, Tensor]:
            return super().find(image[:, :, : image.shape[2] // 2])

    left, right = ((2, 4, 12, 20), 1, 0.9), ((30, 8, 34, 12), 2, 0.8)
    (found,) = DetectionInference(flip=True)(LeftHalf().eval(), [picture(32, 48, left, right)])
    assert as_set(found) == expected_of(left, right)


@pytest.mark.parametrize("merge", ["nms", "wbf"])
@pytest.mark.parametrize("flip", [False, True])
def test_every_size_gives_back_the_exact_boxes(merge: Any, flip: bool, resizing: ResizingBrightSpots) -> None:
    predict = DetectionInference(short_sides=(16, 32, 64), flip=flip, merge=merge)
    results = predict(resizing, [picture(32, 48, *EVEN), picture(48, 32)])
    assert [as_set(found) for found in results] == [expected_of(*EVEN), set()]
    seen = [[(16, 24), (24, 16)], [(32, 48), (48, 32)], [(64, 96), (96, 64)]]
    assert resizing.calls == [sizes for sizes in seen for _ in range(2 if flip else 1)]


@pytest.mark.parametrize(
    ("max_side", "seen"),
    [(0, (32, 128)), (100, (25, 100)), (64, (16, 64))],  # the model's own bound is 64 at a short side of 16
)
def test_the_bound_of_the_long_side(max_side: int, seen: tuple[int, int]) -> None:
    model = ResizingBrightSpots(min_size=16, max_size=64).eval()
    DetectionInference(short_sides=(32,), max_side=max_side)(model, [torch.zeros(3, 50, 200)])
    assert model.calls == [[seen]]


def test_sizes_are_put_back_after_each_call_and_after_an_error(resizing: ResizingBrightSpots) -> None:
    before = resizing.transform.min_size, resizing.transform.max_size
    predict = DetectionInference(short_sides=(16, 64), max_side=80)
    predict(resizing, [torch.zeros(3, 32, 48)])
    assert (resizing.transform.min_size, resizing.transform.max_size) == before
    resizing.find = lambda image: 1 / 0  # type: ignore[assignment,method-assign]
    with pytest.raises(ZeroDivisionError):
        predict(resizing, [torch.zeros(3, 32, 48)])
    assert (resizing.transform.min_size, resizing.transform.max_size) == before


def test_masks_are_turned_back_and_stay_with_their_boxes() -> None:
    model = BrightSpots(masks=True).eval()
    image = picture(20, 31, ((2, 3, 9, 11), 1, 0.9), ((15, 5, 25, 9), 2, 0.8))
    image[0, 3:6, 2:5] = 0  # a corner is missing, so that the mask is not its own mirror image
    predict = DetectionInference(flip=True)
    (found,) = predict(model, [image])
    assert torch.equal(found["masks"], model.find(image)["masks"])
    assert found["masks"].shape == (2, 1, 20, 31)
    (nothing,) = predict(model, [torch.zeros(3, 6, 7)])
    assert nothing["masks"].shape == (0, 1, 6, 7)


# --- tiles ---


@pytest.mark.parametrize("match", ["iou", "ios"])
@pytest.mark.parametrize("whole_image", [False, True])
@pytest.mark.parametrize("size", [(70, 101), (32, 101), (20, 101), (101, 32)])
def test_tiles_give_back_the_exact_boxes(
    size: tuple[int, int], whole_image: bool, match: Any, model: BrightSpots
) -> None:
    # Neighbours share 16 pixels: each object lies whole in a tile. By IoU pieces of half an object and less remain.
    objects = scattered(*size, largest=15)
    predict = DetectionInference(tile=32, tile_overlap=0.5, whole_image=whole_image, tile_match=match)
    (found,) = predict(model, [picture(*size, *objects)])
    if match == "ios":
        assert as_set(found) == expected_of(*objects)
    assert as_set(found) >= expected_of(*objects)
    whole = [size] if whole_image else []
    assert {shape for call in model.calls for shape in call} == {(min(32, size[0]), min(32, size[1])), *whole}
    assert max(len(call) for call in model.calls) == detection_inference.TILES_AT_ONCE or size != (70, 101)


def test_where_tiles_lie(model: BrightSpots) -> None:
    # Steps of 8. Rows from 0, 8 and, at the border, 10; columns from 0, 8, 16 and 21.
    DetectionInference(tile=10, tile_overlap=0.2)(model, [torch.zeros(3, 20, 31)])
    assert [len(call) for call in model.calls] == [8, 4]
    assert DetectionInference(tile=10)._starts(20) == [0, 8, 10]
    assert DetectionInference(tile=10)._starts(31) == [0, 8, 16, 21]


def test_without_overlap_tiles_lie_side_by_side(model: BrightSpots) -> None:
    objects = (((3, 3, 10, 10), 1, 0.9), ((12, 2, 15, 5), 1, 0.8))
    (found,) = DetectionInference(tile=10, tile_overlap=0)(model, [picture(20, 30, *objects)])
    assert [len(call) for call in model.calls] == [6]
    assert as_set(found) == expected_of(*objects)


@pytest.mark.parametrize("size", [(20, 31), (31, 31), (7, 9), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"whole_image": True}, {"flip": True}])
def test_an_image_that_is_no_larger_than_a_tile_is_one(
    size: tuple[int, int], options: dict[str, Any], model: BrightSpots
) -> None:
    image = picture(*size, ((0, 0, 1, 1), 1, 0.9))
    (found,) = DetectionInference(tile=31, **options)(model, [image])
    assert model.calls == [[size]] * (2 if "flip" in options else 1)
    assert is_exactly([found], [model.find(image)])


def test_a_piece_at_an_edge_yields_to_the_whole_though_it_is_scored_higher() -> None:
    # Tiles of 20 begin at columns 0, 10 and 20: the second holds it whole, the others 4 and 9 columns of it.
    image = picture(20, 40, ((16, 4, 29, 16), 1, 0.9))
    (found,) = DetectionInference(tile=20, tile_overlap=0.5)(SurerOfLess().eval(), [image])
    assert found["boxes"].tolist() == [[16, 4, 29, 16]]


def test_the_whole_image_shows_what_is_larger_than_a_tile(model: BrightSpots) -> None:
    large, small = ((3, 3, 60, 50), 1, 0.9), ((70, 70, 74, 75), 2, 0.8)
    image = picture(80, 80, large, small)
    (pieces,) = DetectionInference(tile=32)(model, [image])
    assert len(pieces["boxes"]) > 2
    (found,) = DetectionInference(tile=32, whole_image=True)(model, [image])
    assert as_set(found) == expected_of(large, small)


def test_tiles_of_every_size_and_mirrored(resizing: ResizingBrightSpots) -> None:
    objects = [
        ((2 * x1, 2 * y1, 2 * x2, 2 * y2), label, score)
        for (x1, y1, x2, y2), label, score in scattered(40, 64, largest=7)
    ]
    predict = DetectionInference(short_sides=(16, 64), flip=True, tile=32, tile_overlap=0.5)
    (found,) = predict(resizing, [picture(80, 128, *objects)])
    assert {shape for call in resizing.calls for shape in call} == {(16, 16), (64, 64)}
    assert as_set(found) == expected_of(*objects)


@pytest.mark.parametrize("whole_image", [False, True])
def test_masks_of_tiles_are_run_lengths_in_the_image(whole_image: bool) -> None:
    model = BrightSpots(masks=True).eval()
    objects = scattered(50, 70, largest=9)
    image = picture(50, 70, *objects)
    image[torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0)) < 0.15] = 0  # frayed, in several pieces
    expected = model.find(image)
    (found,) = DetectionInference(tile=20, tile_overlap=0.5, whole_image=whole_image)(model, [image])
    assert len(found["masks"]) == len(found["boxes"])
    masks = {
        (*box, label): coco_mask.decode(run_lengths)
        for box, label, run_lengths in zip(
            found["boxes"].tolist(), found["labels"].tolist(), found["masks"], strict=True
        )
    }
    seen = 0
    for box, label, mask in zip(
        expected["boxes"].tolist(), expected["labels"].tolist(), expected["masks"], strict=True
    ):
        if (*box, label) in masks:
            assert np.array_equal(masks[(*box, label)], mask[0].numpy())
            seen += 1
    assert seen > 20
    (nothing,) = DetectionInference(tile=20)(model, [torch.zeros(3, 30, 40)])
    assert nothing["masks"] == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("shape", "corner"), [((4, 5), (3, 2)), ((10, 5), (0, 0)), ((4, 9), (6, 0)), ((10, 9), (0, 0))]
)
def test_run_lengths_are_those_of_the_drawn_mask(seed: int, shape: Any, corner: Any) -> None:
    mask = np.random.default_rng(seed).random(shape) < (0.0, 0.3, 0.5, 0.8, 1.0)[seed]
    drawn = np.zeros((10, 9), dtype=np.uint8, order="F")
    drawn[corner[0] : corner[0] + shape[0], corner[1] : corner[1] + shape[1]] = mask
    assert detection_inference._run_lengths(mask, *corner, (10, 9)) == coco_mask.encode(drawn)


# --- the end ---


@pytest.mark.parametrize("options", [{}, {"tile": 32}, {"flip": True, "merge": "wbf"}])
def test_the_best_are_kept(options: dict[str, Any], model: BrightSpots) -> None:
    (found,) = DetectionInference(detections_per_image=2, **options)(model, [picture(32, 48, *EVEN)])
    assert found["scores"].tolist() == pytest.approx([0.9, 0.8])
    assert as_set(found) == expected_of(*EVEN[:2])


@pytest.mark.parametrize(
    "options", [{}, {"flip": True}, {"flip": True, "merge": "wbf"}, {"tile": 32, "tile_overlap": 0.5}]
)
def test_evaluate_on_images_of_several_sizes(options: dict[str, Any], model: BrightSpots) -> None:
    sizes = [(70, 101), (32, 48), (20, 24)]
    objects = [scattered(*size, largest=15, seed=seed) for seed, size in enumerate(sizes)]
    images = [(picture(*size, *of_image) * 255).byte() for size, of_image in zip(sizes, objects, strict=True)]
    targets = [
        {
            "image_id": image_id,
            "boxes": torch.tensor([box for box, _, _ in of_image], dtype=torch.float32),
            "labels": torch.tensor([label for _, label, _ in of_image]),
        }
        for image_id, of_image in enumerate(objects)
    ]
    metric = CocoMeanAveragePrecision({1: "red", 2: "green", 3: "blue"})
    loader = [(images[:2], targets[:2]), (images[2:], targets[2:])]
    results = evaluate(model.train(), loader, metric, predict=DetectionInference(**options))
    assert results["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("options", [{"flip": True}, {"tile": 32, "tile_overlap": 0.5, "whole_image": True}])
def test_masks_are_evaluated(options: dict[str, Any]) -> None:
    model = BrightSpots(masks=True).eval()
    image = picture(50, 70, *scattered(50, 70, largest=15))
    expected = model.find(image)
    target = {
        "image_id": 1,
        **{key: expected[key] for key in ("boxes", "labels")},
        "masks": expected["masks"][:, 0] > 0,
    }
    metric = CocoMeanAveragePrecision({1: "red", 2: "green", 3: "blue"}, masks=True)
    loader = [([(image * 255).byte()], [target])]
    results = evaluate(model, loader, metric, predict=DetectionInference(**options))
    assert results["AP"] == pytest.approx(1.0)
    assert results["mask_AP"] == pytest.approx(1.0)


def test_the_docstring_example() -> None:
    results = doctest.testmod(detection_inference, extraglobs={"DetectionInference": DetectionInference})
    assert results.attempted > 0
    assert results.failed == 0


# --- mistakes ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_sides": (32, 0)}, r"short_sides has 0; a side is a whole number of pixels from 1"),
        ({"short_sides": (640, 640.5)}, r"short_sides has 640\.5; a side is a whole number"),
        ({"short_sides": 640}, r"short_sides=640 must be a sequence of sides, such as \(640,\)"),
        ({"tile": 1.5}, r"tile=1\.5 is no whole number; give one from 1, or 0 to leave it out"),
        ({"short_sides": (640,), "max_side": 800.0}, r"max_side=800\.0 is no whole number"),
        ({"detections_per_image": "3"}, r"detections_per_image='3' is no whole number"),
        ({"max_side": -1}, r"max_side=-1 is negative; give a number from 1, or 0"),
        ({"tile": -2}, r"tile=-2 is negative"),
        ({"detections_per_image": -3}, r"detections_per_image=-3 is negative"),
        ({"max_side": 600}, r"max_side=600 has no effect without short_sides"),
        ({"short_sides": (400, 601), "max_side": 600}, r"short_sides has 601, above max_side=600"),
        ({"merge": "mean", "flip": True}, r"merge='mean' must be 'nms' or 'wbf'"),
        ({"merge": "wbf"}, r"merge='wbf' has no effect on one pass; give flip=True or several short_sides"),
        ({"merge": "wbf", "short_sides": (32,)}, r"merge='wbf' has no effect on one pass"),
        ({"merge_threshold": 1.1}, r"merge_threshold=1\.1 must be from 0 to 1"),
        ({"tile": 8, "tile_overlap": 1.0}, r"tile_overlap=1\.0 must be from 0 to below 1"),
        ({"tile": 8, "tile_overlap": -0.1}, r"tile_overlap=-0\.1 must be"),
        ({"whole_image": True}, r"whole_image=True has no effect without tile"),
        ({"tile": 8, "tile_match": "iom"}, r"tile_match='iom' must be 'iou' or 'ios'"),
        ({"tile": 8, "tile_match_threshold": -1}, r"tile_match_threshold=-1 must be from 0 to 1"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionInference(**options)


@pytest.mark.parametrize("tile", [0, 8])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"image 0 is uint8 \(3, 4, 4\); .* divided by 255"),
        (torch.zeros(4, 4), r"image 0 is float32 \(4, 4\); an image is float \(3, H, W\)"),
        (torch.zeros(3, 0, 4), r"image 0 is float32 \(3, 0, 4\); .* at least one pixel"),
    ],
)
def test_wrong_images(image: Tensor, message: str, tile: int, model: BrightSpots) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionInference(tile=tile)(model, [image])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"loss": torch.zeros(())}, r"the model returned dict; a detector returns a list .* here 1"),
        ([], r"the model returned list of 0; .* here 1"),
        ([{"boxes": torch.zeros(0, 4)}], r"the model returned dict of \['boxes'\] for an image"),
        ([torch.zeros(0, 4)], r"the model returned Tensor for an image; .* boxes, labels and scores"),
    ],
)
def test_wrong_answers(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionInference()(Answers(answer).eval(), [torch.zeros(3, 4, 4)])


def test_a_model_in_training_mode(model: BrightSpots) -> None:
    with pytest.raises(ValueError, match=r"in training mode, .* call eval\(\)"):
        DetectionInference()(model.train(), [torch.zeros(3, 4, 4)])


def test_a_model_whose_size_cannot_be_set(model: BrightSpots) -> None:
    predict, image = DetectionInference(short_sides=(32, 64)), torch.zeros(3, 4, 4)
    with pytest.raises(ValueError, match=r"BrightSpots.transform is NoneType; short_sides needs .* Generalized"):
        predict(model, [image])
    with pytest.raises(ValueError, match=r"SSD resizes every image to its fixed_size of \(96, 64\), .* no effect"):
        predict(detectors()["ssd"].eval(), [image])


@pytest.mark.parametrize("options", [{"flip": True}, {"tile": 8}])
def test_what_cannot_be_merged(options: dict[str, Any], model: BrightSpots) -> None:
    answer = [{**model.find(torch.zeros(3, 8, 8)), "keypoints": torch.ones(0, 5, 3)}]
    with pytest.raises(ValueError, match=r"the model returns keypoints, which cannot be turned back, moved and merged"):
        DetectionInference(**options)(Answers(answer).eval(), [torch.zeros(3, 8, 8)])


@pytest.mark.parametrize("options", [{"flip": True}, {"flip": True, "merge": "wbf"}, {"tile": 8}])
@pytest.mark.parametrize(
    ("masks", "came"),
    [
        ([{"size": [8, 8], "counts": "P2"}], "of the type list beside 1 boxes"),
        (None, "of the type NoneType beside 1 boxes"),
        (torch.zeros(1, 8, 8), r"of the shape \(1, 8, 8\) beside 1 boxes"),
        (torch.zeros(1, 2, 8, 8), r"of the shape \(1, 2, 8, 8\) beside 1 boxes"),
        (torch.zeros(3, 1, 8, 8), r"of the shape \(3, 1, 8, 8\) beside 1 boxes"),
    ],
)
def test_masks_of_another_form_cannot_be_merged(masks: Any, came: str, options: dict[str, Any]) -> None:
    box = {"boxes": torch.tensor([[1.0, 1, 3, 3]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
    model, image = Answers([{**box, "masks": masks}]).eval(), torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match=rf"the model returns masks {came}, and only a tensor of \(M, 1, H, W\)"):
        DetectionInference(**options)(model, [image])
    assert DetectionInference()(model, [image])[0]["masks"] is masks


def test_whole_numbers_of_numpy_are_sides() -> None:
    predict = DetectionInference(short_sides=np.array([32, 64]), tile=np.int64(8))
    assert (predict.short_sides, predict.tile) == ((32, 64), 8)


def test_masks_are_not_fused() -> None:
    with pytest.raises(ValueError, match=r"detections hold masks, and weighted boxes fusion makes new boxes"):
        DetectionInference(flip=True, merge="wbf")(BrightSpots(masks=True).eval(), [torch.zeros(3, 8, 8)])
