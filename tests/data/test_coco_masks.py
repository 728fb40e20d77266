"""CocoDetection(masks=True): pycocotools' pixels, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from resnest_det.data import CocoDetection, DetectionAugmentation, read_coco_targets

# pycocotools' extension module answers NumPy's newer protocol in an older way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WIDTH, HEIGHT = 40, 30
SQUARE = [10, 8, 20, 8, 20, 18, 10, 18]


def annotation(id_: int, segmentation: Any, image_id: int = 1, **changes: Any) -> dict[str, Any]:
    whole = [0, 0, WIDTH, HEIGHT]
    fields = {"id": id_, "image_id": image_id, "category_id": 1, "bbox": whole, "segmentation": segmentation}
    return fields | changes


def write(folder: Path, annotations: list[dict[str, Any]], num_images: int = 1) -> Path:
    """A file of `num_images` black pictures, with ids from 1."""
    pictures = folder / "images"
    pictures.mkdir()
    images = []
    for id_ in range(1, num_images + 1):
        Image.new("RGB", (WIDTH, HEIGHT)).save(pictures / f"{id_}.png")
        images.append({"id": id_, "file_name": f"{id_}.png", "width": WIDTH, "height": HEIGHT})
    file = folder / "instances.json"
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    file.write_text(json.dumps(content))
    return file


def read(file: Path, **arguments: Any) -> CocoDetection:
    return CocoDetection(file.parent / "images", file, masks=True, **arguments)


def refusal(file: Path) -> str:
    with pytest.raises(ValueError, match=r"instances\.json") as raised:
        read(file)
    return str(raised.value)


def run_lengths(mask: np.ndarray, compressed: bool) -> dict[str, Any]:
    """A mask (H, W) of 0 and 1 as the JSON has it."""
    if compressed:
        encoded = coco_mask.encode(np.asfortranarray(mask))
        return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (HEIGHT, WIDTH), np.uint8)


def assert_equals_pycocotools(data: CocoDetection, file: Path) -> None:
    coco = COCO(str(file))
    for index, (picture, target) in enumerate(data):
        annotations = [coco.anns[id_] for id_ in data.annotation_ids(index).tolist()]
        expected = [coco.annToMask(annotation) for annotation in annotations]
        assert target["masks"].dtype == torch.uint8
        assert target["masks"].shape == (len(target["boxes"]), *picture.shape[1:])
        for mask, ours in zip(expected, target["masks"].numpy(), strict=True):
            assert (mask == ours).all()


# --- pixels


def test_every_kind_of_segmentation_equals_pycocotools(tmp_path: Path) -> None:
    tall = np.zeros((HEIGHT, WIDTH), np.uint8)
    tall[:, 5:9] = 1  # long runs: several characters a number, and negative differences
    everywhere, nowhere = np.ones_like(tall), np.zeros_like(tall)
    masks = (tall, noise(0), noise(1), everywhere, nowhere)
    kinds = [run_lengths(mask, compressed) for mask in masks for compressed in (False, True)]
    kinds += [
        [SQUARE],
        [SQUARE, [25.5, 3.1, 35.7, 3.3, 30.9, 20.1], [1, 1, 3, 1, 3, 29, 1, 29]],
        [[-5, -5, 50, -5, 50, 12.3, -5, 12.3]],  # beyond the image
        [[10.1, 5.3, 20.7, 5.5, 20.9, 15.1]],  # half-way between fifths of a pixel
        [[3, 3, 3.1, 3, 3.1, 3.1]],  # too thin for a pixel
    ]
    file = write(tmp_path, [annotation(i, kind, image_id=1 + i % 3) for i, kind in enumerate(kinds)], num_images=4)
    data = read(file)
    assert_equals_pycocotools(data, file)
    assert [len(target["masks"]) for _, target in data] == [5, 5, 5, 0]
    assert {0, 1} == set(torch.cat([target["masks"].flatten() for _, target in data]).tolist())


def test_random_polygons_equal_pycocotools(tmp_path: Path) -> None:
    """With one decimal: half of the coordinates lie where the last bit of a float64 decides."""
    rng = np.random.default_rng(0)
    polygons = [[rng.uniform(-3, 43, 2 * rng.integers(3, 9)).round(1).tolist()] for _ in range(200)]
    file = write(tmp_path, [annotation(i, polygon) for i, polygon in enumerate(polygons)])
    assert_equals_pycocotools(read(file), file)


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_masks_equal_pycocotools(real_data: Callable[[str], Path], split: str) -> None:
    folder = real_data("coco_tiny")
    file = folder / "annotations" / f"instances_{split}.json"
    data = CocoDetection(folder / split, file, masks=True)
    assert_equals_pycocotools(data, file)
    assert sum(int(target["iscrowd"].sum()) for _, target in data) > 0  # they are written as run lengths


def test_without_masks_nothing_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, [annotation(1, "nonsense"), annotation(2, [[1]])])
    data = CocoDetection(tmp_path / "images", file)
    assert "masks" not in data[0][1]


# --- training


def test_training_masks_follow_the_selection_of_boxes(tmp_path: Path) -> None:
    crowd = run_lengths(noise(0), False)
    annotations = [
        annotation(1, crowd, image_id=2, iscrowd=1),
        annotation(2, [[1, 1, 9, 1, 9, 5, 1, 5]], image_id=2),
        annotation(3, [SQUARE], image_id=1),
        annotation(4, [SQUARE], image_id=1, bbox=[0, 0, 5, 0.5]),  # dropped by its box
        annotation(5, run_lengths(noise(1), True), image_id=1),
    ]
    file = write(tmp_path, annotations, num_images=2)
    with pytest.warns(UserWarning, match="annotation ids 4"):
        data = read(file, train=True)
    assert [data.annotation_ids(i).tolist() for i in range(2)] == [[3, 5], [2]]
    assert_equals_pycocotools(data, file)


def test_training_drops_a_box_whose_mask_has_no_pixel(tmp_path: Path) -> None:
    thin = [[3, 3, 3.1, 3, 3.1, 3.1]]
    file = write(tmp_path, [annotation(1, thin, area=1), annotation(2, [SQUARE], area=2), annotation(3, thin, area=3)])
    _, target = read(file, train=True)[0]
    assert target["area"].tolist() == [2]
    assert [len(target[key]) for key in ("boxes", "labels", "iscrowd", "masks")] == [1, 1, 1, 1]
    _, target = read(file)[0]
    assert target["masks"].sum(dim=(1, 2)).tolist() == [0, 100, 0]


def upper_left_corner(
    image: np.ndarray, boxes_xyxy: np.ndarray, masks: np.ndarray | None, seed: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """A transform that forgets the first box."""
    assert masks is not None
    return image[:9, :15], boxes_xyxy[1:].clip(0, 15), masks[1:, :9, :15], np.arange(1, len(boxes_xyxy))


def test_masks_go_through_the_transform(tmp_path: Path) -> None:
    below = [[0, 10, 5, 10, 5, 20, 0, 20]]
    file = write(tmp_path, [annotation(i, polygons) for i, polygons in enumerate(([SQUARE], [SQUARE], below))])
    _, target = read(file, train=True, transform=upper_left_corner)[0]
    assert target["masks"].shape == (1, 9, 15)  # nothing of the third is above row 9
    assert target["masks"][0].nonzero().tolist() == [[8, x] for x in range(10, 15)]


def test_flipped_masks_stay_in_their_boxes(real_data: Callable[[str], Path]) -> None:
    folder = real_data("coco_tiny")
    file = folder / "annotations" / "instances_val2017.json"
    transform = DetectionAugmentation((200, 300), 400, horizontal_flip=1)
    data = CocoDetection(folder / "val2017", file, train=True, masks=True, transform=transform)
    for index in range(10):
        sample = data.load(index, seed=index)
        assert sample is not None
        picture, target = sample
        assert target["masks"].shape == (len(target["boxes"]), *picture.shape[1:])
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            y, x = mask.nonzero().unbind(dim=1)
            around = torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1))
            assert (around - box).abs().max() <= 3  # annotated boxes and masks differ by a pixel or two


# --- run lengths


def test_run_lengths_are_the_masks(tmp_path: Path) -> None:
    kinds = [[SQUARE], run_lengths(noise(0), compressed=False), run_lengths(noise(1), compressed=True)]
    file = write(tmp_path, [annotation(i, kind, image_id=1 + i % 2) for i, kind in enumerate(kinds)], num_images=3)
    pixels, encoded = read(file), CocoDetection(tmp_path / "images", file, masks="rle")
    for (picture, dense), (_, target) in zip(pixels, encoded, strict=True):
        assert [mask["size"] for mask in target["masks"]] == [[HEIGHT, WIDTH]] * len(dense["boxes"])
        decoded = [coco_mask.decode(mask) for mask in target["masks"]]
        assert np.array_equal(np.array(decoded).reshape(-1, *picture.shape[1:]), dense["masks"].numpy())
        assert target["image_id"] == dense["image_id"]
    assert len(encoded[2][1]["masks"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masks": "rle", "train": True}, "masks='rle' is given with train=True, but only masks as pixels can be"),
        ({"masks": "rle", "transform": upper_left_corner}, "masks='rle' is given with a transform, but only masks as"),
        ({"masks": "RLE"}, "masks='RLE' is unknown; use True for pixels, 'rle' for run lengths, or False for none"),
    ],
)
def test_run_lengths_are_for_evaluation(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CocoDetection(tmp_path / "images", write(tmp_path, []), **arguments)


def test_targets_without_images_are_those_of_the_data_set(tmp_path: Path) -> None:
    annotations = [
        annotation(5, [SQUARE], image_id=2, bbox=[1.25, 2, 3.5, 4], area=7.5),
        annotation(6, run_lengths(noise(0), compressed=False), image_id=1, iscrowd=1, category_id=3),
        annotation(7, [SQUARE], image_id=2, category_id=3),
    ]
    file = write(tmp_path, annotations, num_images=3)
    content = json.loads(file.read_text())
    content["categories"] = [{"id": 3, "name": "late"}, {"id": 1, "name": "early"}]
    file.write_text(json.dumps(content))
    data = CocoDetection(tmp_path / "images", file, masks="rle")
    expected = [target for _, target in data]
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    truth = read_coco_targets(file, masks=True)
    assert truth.class_names == data.class_names == {1: "early", 2: "late"}
    assert truth.category_ids == data.category_ids == {1: 1, 2: 3}
    assert truth.labels == data.labels == {1: 1, 3: 2}
    for target, other in zip(truth.targets, expected, strict=True):
        assert target.keys() - {"boxes_xywh"} == other.keys()
        assert target["boxes"].dtype == torch.float64
        assert target["boxes"].float().equal(other["boxes"])
        assert all(target[key].equal(other[key]) for key in ("labels", "area", "iscrowd"))
        assert all(target[key] == other[key] for key in ("image_id", "masks"))
    assert truth.targets[1]["boxes"].tolist() == [[1.25, 2.0, 4.75, 6.0], [0.0, 0.0, WIDTH, HEIGHT]]
    assert "masks" not in read_coco_targets(file).targets[0]


def test_targets_keep_every_digit_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, [annotation(1, [SQUARE], bbox=[0.1, 0.2, 0.3, 0.4])])
    assert read_coco_targets(file).targets[0]["boxes"].tolist() == [[0.1, 0.2, 0.1 + 0.3, 0.2 + 0.4]]


def test_targets_of_a_wrong_file(tmp_path: Path) -> None:
    file = write(tmp_path, [annotation(1, [SQUARE], image_id=4)])
    with pytest.raises(ValueError, match=r"instances\.json .*\n- 1 annotations: image_id names no image of the file"):
        read_coco_targets(file)
    with pytest.raises(FileNotFoundError, match=r"the annotation file .*none\.json does not exist"):
        read_coco_targets(tmp_path / "none.json")


# --- sharing with workers


class Shared(torch.utils.data.Dataset[list[bool]]):
    """Answers, from inside a worker, which of the segmentations' tensors lie in shared memory."""

    def __init__(self, data: CocoDetection) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[bool]:
        assert self.data._segmentations is not None
        return [tensor.is_shared() for tensor in self.data._segmentations]


def first(samples: list[list[bool]]) -> list[bool]:
    return samples[0]


@pytest.mark.slow
def test_spawned_workers_share_the_segmentations(tmp_path: Path) -> None:
    data = read(write(tmp_path, [annotation(1, [SQUARE]), annotation(2, run_lengths(noise(0), True))]))
    loader = DataLoader(Shared(data), num_workers=1, multiprocessing_context="spawn", collate_fn=first)
    assert next(iter(loader)) == [True] * 2


def test_segmentations_are_tensors_of_little_more_than_their_text(tmp_path: Path) -> None:
    data = read(write(tmp_path, [annotation(i, [SQUARE]) for i in range(100)]))
    assert data._segmentations is not None
    num_bytes = sum(tensor.nbytes for tensor in data._segmentations)
    assert num_bytes == 100 * (len(json.dumps([SQUARE])) + 16)  # and where it begins and ends


# --- refusals

GOOD_COUNTS = {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT]}
TRUNCATED = coco_mask.encode(np.asfortranarray(noise(0)))["counts"].decode()[:-2]
MISSING = "segmentation is missing or empty; masks need polygons or run lengths"
POINTS = "a polygon of segmentation needs at least 3 points, written x, y, x, y ..."
COUNTS = "the run lengths of segmentation must be numbers from 0 that add up to its height x width"


@pytest.mark.parametrize(
    ("segmentation", "rule"),
    [
        (None, MISSING),
        ([], MISSING),
        ([[]], POINTS),
        ([SQUARE, [1, 2, 3, 4]], POINTS),
        ([[1, 2, 3, 4, 5, 6, 7]], POINTS),
        ([[1, 2, 3, 4, 5, 2e6]], "the coordinates of segmentation must be within ± 1e+06 pixels"),
        ([[1, 2, 3, 4, 5, -2e6]], "the coordinates of segmentation must be within ± 1e+06 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": []}, COUNTS),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, COUNTS),
        ({"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT - 1]}, COUNTS),
        ({"size": [HEIGHT, WIDTH], "counts": [-1, WIDTH * HEIGHT + 1]}, COUNTS),
        ({"size": [HEIGHT, WIDTH], "counts": TRUNCATED}, COUNTS),
        ({"size": [HEIGHT, WIDTH], "counts": "P"}, COUNTS),  # a number that goes on after its end
        ({"size": [HEIGHT, WIDTH], "counts": "PPPPPPPPPPPPPP0"}, COUNTS),
        ({"size": [HEIGHT, WIDTH], "counts": "~ é"}, COUNTS),
        (
            {"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]},
            "the size of a run-length segmentation must be the [height, width] of its image",
        ),
    ],
)
def test_broken_segmentation(tmp_path: Path, segmentation: Any, rule: str) -> None:
    around = [annotation(7, [SQUARE, SQUARE]), annotation(8, GOOD_COUNTS), annotation(9, [SQUARE])]
    file = write(tmp_path, [*around[:2], annotation(5, segmentation), around[2]])
    message = refusal(file)
    assert message.split("\n")[1:] == [f"- 1 annotations: {rule} (ids 5)"]


def test_annotation_without_segmentation(tmp_path: Path) -> None:
    bare = {key: value for key, value in annotation(4, None).items() if key != "segmentation"}
    assert f"1 annotations: {MISSING} (ids 4)" in refusal(write(tmp_path, [annotation(3, [SQUARE]), bare]))


def test_mistakes_of_all_kinds_are_told_together(tmp_path: Path) -> None:
    annotations = [annotation(i, []) for i in range(10, 17)]
    annotations += [annotation(20, [[1, 2]]), annotation(21, GOOD_COUNTS, image_id=5)]
    assert refusal(write(tmp_path, annotations)).split("\n")[1:] == [
        "- 1 annotations: image_id names no image of the file (ids 21)",
        f"- 7 annotations: {MISSING} (ids 10, 11, 12, 13, 14 and 2 more)",
        f"- 1 annotations: {POINTS} (ids 20)",
    ]


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ("polygon", "Expected `object | array | null`, got `str` - at `$.annotations[1].segmentation`"),
        ([[1, "2"]], "Expected `float`, got `str` - at `$.annotations[1].segmentation[0][1]`"),
        ([1, 2, 3], "Expected `array`, got `int` - at `$.annotations[1].segmentation[0]`"),
        ({"size": [3, 4]}, "Object missing required field `counts` - at `$.annotations[1].segmentation`"),
        ({"size": [0, 4], "counts": []}, "Expected `int` >= 1 - at `$.annotations[1].segmentation.size[0]`"),
    ],
)
def test_segmentation_of_wrong_form(tmp_path: Path, segmentation: Any, reason: str) -> None:
    message = refusal(write(tmp_path, [annotation(1, [SQUARE]), annotation(2, segmentation)]))
    assert "1 annotations cannot be read" in message
    assert "bbox = [x, y, width, height], and for masks a segmentation. The first:" in message
    assert message.endswith(f"\n- {reason}")


@pytest.mark.parametrize(("number", "reason"), [("NaN", "no JSON numbers"), ("1e999", "Number out of range")])
def test_coordinate_that_is_not_finite(tmp_path: Path, number: str, reason: str) -> None:
    file = write(tmp_path, [annotation(1, [[1, 2, 3, 4, 5, 12345]])])
    file.write_text(file.read_text().replace("12345", number))
    assert re.search(reason, refusal(file))
