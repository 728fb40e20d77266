"""The data doctor: what the test broke is found, by its code and place, and nothing else is."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import warnings
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from resnest_det.data import ADE20K_CLASS_NAMES, CocoDetection, MaskFolder, read_class_list
from resnest_det.data.files import UnreadableImageError, read_rgb
from resnest_det.data.sample import write_sample_dataset
from resnest_det.reports import coco_doctor
from resnest_det.reports.anchor_fit import Anchors, better_anchors
from resnest_det.reports.coco_doctor import examine_coco
from resnest_det.reports.data_doctor import KINDS, DataReport, Occurrence
from resnest_det.reports.data_folders import find_coco_splits, find_mask_splits
from resnest_det.reports.image_files import open_image
from resnest_det.reports.lenient_coco import read_leniently
from resnest_det.reports.mask_doctor import examine_masks

WIDTH, HEIGHT = 64, 48
NUM_IMAGES = 40
NUM_MUTATIONS = 300


# --- a sound set in COCO's format, made by the test


def noise(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def annotation(number: int, image_id: int, box: list[float], category_id: int) -> dict[str, Any]:
    x, y, width, height = box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "area": width * height,
        "iscrowd": 0,
        "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
    }


def write_split(folder: Path, split: str, first: int, number: int) -> dict[str, Any]:
    """Images `first` to `first + number - 1`, each with two objects, annotations 10 i and 10 i + 1."""
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for i in range(first, first + number):
        noise(i).save(folder / split / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT})
        annotations += [annotation(10 * i, i, [4, 5, 20, 16], 1), annotation(10 * i + 1, i, [30, 20, 24, 20], 2)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


class CocoSet:
    """Two splits on disk, which a test breaks: image i of the training split has the annotations 10 i and 10 i + 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train, self.val = write_split(folder, "train", 1, NUM_IMAGES), write_split(folder, "val", 101, 4)

    def image(self, number: int) -> dict[str, Any]:
        return next(image for image in self.train["images"] if image["id"] == number)

    def annotation(self, number: int) -> dict[str, Any]:
        return next(one for one in self.train["annotations"] if one["id"] == number)

    def file(self, number: int) -> Path:
        return self.folder / "train" / f"{number}.jpg"

    def examine(self, **arguments: Any) -> DataReport:
        for split, document in (("train", self.train), ("val", self.val)):
            (self.folder / f"{split}.json").write_text(json.dumps(document))
        splits = {split: (self.folder / split, self.folder / f"{split}.json") for split in ("train", "val")}
        return examine_coco(splits, num_workers=0, progress=False, **arguments)


def found_codes(report: DataReport) -> set[str]:
    """The codes of errors and warnings."""
    return {finding.code for finding in report.findings if finding.severity != "info"}


def the_example(report: DataReport, code: str) -> Occurrence:
    (finding,) = report.found(code)
    assert finding.count == 1, finding
    (example,) = finding.examples
    return example


# --- fifteen and more ways to break it


class Break(NamedTuple):
    """A way to break the set, and what is to be found then."""

    code: str
    do: Callable[[CocoSet], object]
    file: str
    annotation_id: int | None = None
    detail: str = ""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


def turn(path: Path, orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(77 + orientation, *size).save(path, exif=exif)


def copied(data: CocoSet) -> None:
    shutil.copy(data.file(30), data.file(31))


def leaked(data: CocoSet) -> None:
    shutil.copy(data.file(32), data.folder / "val" / "102.jpg")


def add(data: CocoSet, number: int, image_id: int, box: list[float], category_id: int = 1, **changes: Any) -> None:
    data.train["annotations"].append(annotation(number, image_id, box, category_id) | changes)


def add_image(data: CocoSet, **entry: Any) -> None:
    data.train["images"].append({"id": 900, "file_name": "1.jpg", "width": WIDTH, "height": HEIGHT} | entry)


def encoded(width: int, height: int) -> dict[str, Any]:
    return {"size": [height, width], "counts": [0, width * height]}


BREAKS = [
    Break("image-broken", lambda data: cut(data.file(1)), "1.jpg", detail="truncated"),
    Break("image-missing", lambda data: data.file(2).unlink(), "2.jpg", detail="id 2"),
    Break(
        "size-mismatch",
        lambda data: noise(0, 50, 40).save(data.file(3)),
        "3.jpg",
        detail="50 x 40, the annotations say 64 x 48",
    ),
    Break("exif-ambiguous", lambda data: turn(data.file(4), 6, (WIDTH, HEIGHT)), "4.jpg", detail="orientation 6"),
    Break(
        "box-outside",
        lambda data: add(data, 59, 5, [70, 5, 9, 9], segmentation=[]),
        "5.jpg",
        59,
        "[70, 5, 9, 9] in 64 x 48",
    ),
    Break(
        "box-over-edge", lambda data: add(data, 69, 6, [50, 5, 30, 20], segmentation=[]), "6.jpg", 69, "[50, 5, 30, 20]"
    ),
    Break(
        "box-degenerate",
        lambda data: add(data, 79, 7, [9, 9, 0, 8], area=0, segmentation=[]),
        "7.jpg",
        79,
        "[9, 9, 0, 8]",
    ),
    Break(
        "box-negative", lambda data: add(data, 89, 8, [30, 30, -9, 8], segmentation=[]), "8.jpg", 89, "[30, 30, -9, 8]"
    ),
    Break(
        "box-not-finite",
        lambda data: data.annotation(90).update(bbox=[None, 5, 20, 16]),
        "9.jpg",
        90,
        "[nan, 5, 20, 16]",
    ),
    Break("annotation-twice", lambda data: add(data, 109, 10, [4, 5, 20, 16]), "10.jpg", 109, "[4, 5, 20, 16]"),
    Break("annotation-id-twice", lambda data: add(data, 110, 11, [9, 9, 9, 9]), "11.jpg", 110, "used before"),
    Break(
        "image-id-twice",
        lambda data: (noise(500).save(data.file(500)), add_image(data, id=12, file_name="500.jpg")),
        "500.jpg",
        detail="id 12",
    ),
    Break(
        "annotation-without-image", lambda data: add(data, 7777, 777, [1, 1, 9, 9]), "train.json", 7777, "image_id 777"
    ),
    Break(
        "annotation-without-category",
        lambda data: data.annotation(130).update(category_id=9),
        "13.jpg",
        130,
        "category_id 9",
    ),
    Break(
        "annotation-malformed",
        lambda data: data.annotation(140).update(bbox=[4, 5, 20]),
        "14.jpg",
        140,
        "bbox is [4, 5, 20], expected four numbers",
    ),
    Break("image-malformed", lambda data: data.image(15).update(width="64"), "15.jpg", detail='width is "64"'),
    Break(
        "category-malformed",
        lambda data: data.train["categories"].append({"id": 3}),
        "train.json, categories[2]",
        detail="name is missing",
    ),
    Break(
        "category-name-twice",
        lambda data: data.train["categories"].append({"id": 5, "name": "cat"}),
        "train.json",
        detail="id 5, 'cat'",
    ),
    Break(
        "file-name-outside",
        lambda data: data.image(16).update(file_name="../val/101.jpg"),
        "../val/101.jpg",
        detail="'../val/101.jpg'",
    ),
    Break(
        "mask-malformed",
        lambda data: data.annotation(170).update(segmentation=[[4, 5, 24, 5]]),
        "17.jpg",
        170,
        "4 numbers",
    ),
    Break(
        "mask-size",
        lambda data: data.annotation(180).update(segmentation=encoded(10, 9), bbox=[0, 0, 10, 9], area=90),
        "18.jpg",
        180,
        "10 x 9, the image is 64 x 48",
    ),
    Break(
        "polygon-outside",
        lambda data: data.annotation(190).update(bbox=[44, 5, 20, 16], segmentation=[[44, 5, 67, 5, 67, 21, 44, 21]]),
        "19.jpg",
        190,
        "[44, 5, 67, 21]",
    ),
    Break(
        "mask-box-mismatch",
        lambda data: data.annotation(200).update(bbox=[30, 5, 20, 16]),
        "20.jpg",
        200,
        "[4, 5, 24, 21]",
    ),
    Break(
        "area-mismatch", lambda data: data.annotation(210).update(area=5000), "21.jpg", 210, "area 5000, of the box 320"
    ),
    Break("mask-missing", lambda data: data.annotation(220).pop("segmentation"), "22.jpg", 220),
    Break("image-twice", copied, "31.jpg", detail="the content of 30.jpg and the same annotations"),
    Break("split-leak", leaked, "32.jpg", detail="in val: 102.jpg"),
]

# What else a break rightly brings about.
CONSEQUENCES: dict[str, set[str]] = {
    "box-outside": {"mask-missing"},
    "box-over-edge": {"mask-missing"},
    "box-degenerate": {"mask-missing"},
    "box-negative": {"mask-missing"},
    "category-malformed": {"categories-differ"},
    "category-name-twice": {"categories-differ"},
}


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.code)
def test_each_mistake_alone(one: Break, tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    one.do(data)
    report = data.examine()
    assert found_codes(report) == {one.code} | CONSEQUENCES.get(one.code, set())
    example = the_example(report, one.code)
    assert (example.file, example.annotation_id) == (one.file, one.annotation_id)
    assert one.detail in example.detail


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    assert len(BREAKS) >= 15
    data = CocoSet(tmp_path)
    for one in BREAKS:
        one.do(data)
    report = data.examine(masks=True)
    assert found_codes(report) == {one.code for one in BREAKS} | {"categories-differ"}
    for one in BREAKS:
        examples = [example for finding in report.found(one.code) for example in finding.examples]
        places = {(example.file, example.annotation_id) for example in examples if one.detail in example.detail}
        assert (one.file, one.annotation_id) in places, one.code
    assert report.has_errors
    text = report.table()
    assert all(one.code in text for one in BREAKS)
    assert "8.jpg, annotation 89: bbox [30, 30, -9, 8] in 64 x 48" in text
    content = json.loads(json.dumps(report.as_dict()))
    assert [finding["code"] for finding in content["findings"]] == [finding.code for finding in report.findings]
    assert report.draw() is not None


def test_nothing_is_found_in_a_sound_set(tmp_path: Path) -> None:
    report = CocoSet(tmp_path).examine(masks=True)
    assert report.findings == ()
    assert not report.has_errors
    assert report.splits["train"].numbers["classes"] == {"cat": NUM_IMAGES, "dog": NUM_IMAGES}


def test_without_decoding_no_image_is_opened(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    data.file(1).write_text("no picture")
    data.file(2).unlink()
    leaked(data)
    assert found_codes(data.examine(decode=False)) == {"image-missing"}


def test_masks_that_are_trained_on_must_be_right(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    data.annotation(170).update(segmentation=[[4, 5, 24, 5]])
    data.annotation(180).pop("segmentation")
    assert [(finding.code, finding.severity) for finding in data.examine().findings] == [
        ("mask-missing", "warning"),
        ("mask-malformed", "warning"),
    ]
    assert {finding.severity for finding in data.examine(masks=True).findings} == {"error"}


def test_boxes_only_are_no_mistake(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    for one in (*data.train["annotations"], *data.val["annotations"]):
        del one["segmentation"]
    assert data.examine().findings == ()
    assert data.examine(masks=True).found("mask-missing")[0].count == 2 * NUM_IMAGES


@pytest.mark.parametrize("form", ["corners", "fractions"])
def test_boxes_of_another_format(form: str, tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    for one in data.train["annotations"]:
        x, y, width, height = one["bbox"]
        one["bbox"] = [x, y, x + width, y + height]
        if form == "fractions":
            one["bbox"] = [x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT]
        del one["segmentation"], one["area"]
    report = data.examine()
    assert found_codes(report) == {"box-format"}
    (finding,) = report.found("box-format")
    assert finding.count == 2 * NUM_IMAGES
    assert {"corners": "a corner", "fractions": "fractions"}[form] in finding.examples[0].detail


def test_images_twice_with_other_annotations_and_by_name(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    copied(data)
    add(data, 319, 31, [9, 9, 9, 9])
    add_image(data, id=900, file_name="33.jpg")
    (finding,) = data.examine().found("image-twice")
    assert finding.count == 2
    details = {example.file: example.detail for example in finding.examples}
    assert "other annotations (ids 30 and 31)" in details["31.jpg"]
    assert "one name and other annotations (ids 33 and 900)" in details["33.jpg"]


def test_one_file_or_name_in_both_splits(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    data.val["images"][0]["file_name"] = "1.jpg"
    (data.folder / "val" / "101.jpg").rename(data.folder / "val" / "1.jpg")
    (finding,) = data.examine().found("split-same-name")
    assert (finding.severity, finding.split, finding.examples[0].file) == ("info", "train, val", "1.jpg")
    splits = dict.fromkeys(("train", "val"), (data.folder / "train", data.folder / "train.json"))
    (finding,) = examine_coco(splits, decode=False, progress=False).found("split-leak")
    assert finding.count == NUM_IMAGES


def test_entries_without_a_name_are_not_the_same_image(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    for document in (data.train, data.train, data.val):
        document["images"].append({"id": 990 + len(document["images"]), "width": WIDTH, "height": HEIGHT})
    report = data.examine()
    assert found_codes(report) == {"image-malformed"}
    assert [finding.count for finding in report.found("image-malformed")] == [2, 1]


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    for one in BREAKS:
        one.do(data)
    alone = data.examine().as_dict()
    splits = {split: (data.folder / split, data.folder / f"{split}.json") for split in ("train", "val")}
    state = torch.random.get_rng_state()
    assert examine_coco(splits, num_workers=2, progress=False).as_dict() == alone
    assert torch.equal(torch.random.get_rng_state(), state)


def test_facts_are_notes(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    noise(901).save(data.folder / "train" / "extra.png")  # in no file
    turn(data.file(4), 6, (HEIGHT, WIDTH))  # turned as the annotations have it
    for number in (50, 51):  # image 5 becomes a negative
        data.train["annotations"].remove(data.annotation(number))
    data.annotation(60)["iscrowd"] = 1
    for document in (data.train, data.val):
        document["categories"].append({"id": 7, "name": "bird"})
    report = data.examine()
    assert found_codes(report) == set()
    expected = {
        "image-unlisted": "extra.png",
        "exif-rotated": "4.jpg",
        "image-without-annotations": "5.jpg",
        "crowd-region": "6.jpg",
    }
    assert {code: the_example(report, code).file for code in expected} == expected
    (finding,) = report.found("category-ids-have-holes")
    assert (finding.count, finding.examples[0].detail) == (4, "3 ids from 1 to 7")
    assert the_example(report, "category-unused").detail == "bird"


def test_classes_of_the_splits(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    for one in data.train["annotations"]:
        one["category_id"] = 1
    for one in data.val["annotations"]:
        one["category_id"] = 2
    report = data.examine()
    train, val = report.found("class-absent")
    assert (train.split, train.severity, train.examples[0].detail) == (
        "train",
        "warning",
        "dog: none here, 8 elsewhere",
    )
    assert (val.split, val.severity, val.examples[0].detail) == ("val", "info", "cat: none here, 80 elsewhere")
    data.annotation(10)["category_id"] = 2
    example = the_example(data.examine(), "class-imbalance")
    assert example.detail == "objects: dog 1, cat 79"


def test_nothing_to_train_on(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    for one in data.train["annotations"]:
        one["iscrowd"] = 1
    report = data.examine()
    assert found_codes(report) == {"no-objects", "crowd-region", "class-absent"}
    data.train = {"images": [], "annotations": [], "categories": []}
    assert {"no-images", "no-categories"} <= found_codes(data.examine())


def test_boxes_that_training_drops_are_nothing_to_train_on(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    for one in data.train["annotations"]:
        one["bbox"] = [500, 500, 9, 9]
    assert "no-objects" in found_codes(data.examine())
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ValueError, match="none of its 40 images is left for training"),
    ):
        CocoDetection(tmp_path / "train", tmp_path / "train.json", train=True)
    data = CocoSet(tmp_path / "more")
    shutil.rmtree(data.folder / "train")
    (data.folder / "train").mkdir()
    assert found_codes(data.examine()) == {"image-missing", "no-objects"}


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("a\0/b.png", "its folder cannot be read: embedded null byte"),
        ("a\0.png", "id 1"),
        (f"{'A' * 300}.png", "id 1"),
        (f"{'A' * 300}/B.png", "its folder cannot be read: File name too long"),
    ],
    ids=["null-folder", "null", "long", "long-folder"],
)
def test_names_that_no_file_can_have(name: str, detail: str, tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    data.image(1)["file_name"] = name
    report = data.examine()
    assert found_codes(report) == {"image-missing"}
    example = the_example(report, "image-missing")
    assert (example.file, example.detail) == (name, detail)
    assert set(find_coco_splits(tmp_path)) == {"train", "val"}


def test_a_sub_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = CocoSet(tmp_path)
    data.image(1)["file_name"] = "sub/1.jpg"
    scandir = os.scandir

    def refusing(path: Path) -> Any:
        if path.name == "sub":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    example = the_example(data.examine(), "image-missing")
    assert (example.file, example.detail) == ("sub/1.jpg", "its folder cannot be read: Permission denied")


@pytest.mark.parametrize("decode", [True, False])
def test_implausible_sizes_are_drawn_without_a_crash(decode: bool, tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    sound = data.examine(num_pictures=2).drawings[0].draw()
    for image in data.train["images"]:
        image.update(width=1_000_000, height=1_000_000)
    drawn = data.examine(num_pictures=2, decode=decode).drawings[0].draw()
    assert drawn is not None
    assert sound is not None
    assert np.array_equal(drawn, sound) == decode  # its masks are those of the file's size


def test_no_dense_masks_of_boxes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = CocoSet(tmp_path)
    for one in data.train["annotations"]:
        del one["segmentation"]
    given: list[Any] = []

    def drawing(image: NDArray[np.uint8], *_: Any, masks: Any, **__: Any) -> NDArray[np.uint8]:
        given.append(masks)
        return image

    monkeypatch.setattr(coco_doctor, "draw_boxes", drawing)
    train, val = data.examine(num_pictures=2).drawings
    assert train.draw() is not None
    assert val.draw() is not None
    assert given[0] is None
    assert len(given[1]) == 2


def test_ids_as_large_as_they_can_be(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    for document in (data.train, data.val):
        for entry in (*document["categories"], *document["annotations"]):
            key = "category_id" if "category_id" in entry else "id"
            entry[key] = {1: -(2**62), 2: 2**62 + 9}[entry[key]]
    (finding,) = data.examine().found("category-ids-have-holes")
    assert finding.count == 2**63 + 8


# --- files that are no COCO files


def examine_text(folder: Path, text: bytes) -> DataReport:
    (folder / "a.json").write_bytes(text)
    return examine_coco({"train": (folder, folder / "a.json")}, num_workers=0, progress=False)


EMPTY = b'{"images": [], "annotations": [], "categories": []}'


@pytest.mark.parametrize(
    ("text", "code", "detail"),
    [
        (b"", "json-broken", "empty"),
        (b'{"images": [],\n "annotations": [}', "json-broken", "line 2, column 18: Expecting value"),
        (b'{"images": [{"id": 1', "json-broken", "line 1, column 21"),
        (EMPTY.replace(b'"images": [', b'"images": [{"id": 1, "file_name": "\xff"}'), "image-malformed", "not utf-8"),
        (b'{"images": ' + b"[" * 100_000, "json-broken", "recursion"),
        (b"\xef\xbb\xbf" + EMPTY, "json-nonstandard", "byte 0"),
        (
            EMPTY.replace(b'"annotations": [', b'"annotations": [{"area": NaN, "bbox": [-Infinity]}'),
            "json-nonstandard",
            "2 times -Infinity, NaN",
        ),
        (b'[{"image_id": 1, "score": 0.5}]', "key-missing", "a results file"),
        (b'{"images": []}', "key-missing", "annotations is missing; the file has the keys images"),
        (b'{"images": {}, "annotations": [], "categories": []}', "key-missing", "images is no list"),
    ],
)
def test_files_that_are_no_coco_files(text: bytes, code: str, detail: str, tmp_path: Path) -> None:
    report = examine_text(tmp_path, text)
    assert detail.lower() in report.found(code)[0].examples[0].detail.lower()
    assert report.has_errors


def test_entries_of_any_kind_are_read(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "1.jpg")
    text = json.dumps(
        {
            "images": [
                3,
                None,
                {},
                {"id": "1", "file_name": "1.jpg", "width": 64, "height": 48},
                {"id": True, "width": -1},
            ],
            "annotations": [
                "box",
                [],
                {},
                {"id": 2.5, "image_id": [], "category_id": {}, "bbox": "0 0 1 1", "area": "x", "iscrowd": "y"},
                {"id": 5, "image_id": "1", "category_id": 1.0, "bbox": ["1", 2, 3, 4], "segmentation": 7},
            ],
            "categories": [{"id": 1, "name": 5}, 8],
        }
    )
    report = examine_text(tmp_path, text.encode())
    counts = {
        code: report.found(code)[0].count for code in ("image-malformed", "annotation-malformed", "category-malformed")
    }
    assert counts == {"image-malformed": 5, "annotation-malformed": 5, "category-malformed": 2}
    last = report.found("annotation-malformed")[0].examples[-1]
    assert last.file == "1.jpg"  # image_id "1" is that of the image with id "1"
    assert last.annotation_id == 5
    assert 'image_id is "1", expected an integer' in last.detail
    assert report.draw() is not None


VALUES = (None, True, -1, 0, 0.5, 1e12, 2**70, float("nan"), "", "7", "../x", [], {}, [1, 2], [[1.0, 2.0, 3.0]])


def mutated(document: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    """The document with one value, anywhere in it, deleted or replaced."""
    document = json.loads(json.dumps(document))
    node: Any = document
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[generator.integers(len(keys))]
        child = node[key]
        if isinstance(child, dict | list) and child and generator.random() < 0.85:
            node = child
        elif generator.random() < 0.3:
            del node[key]
            return document
        else:
            node[key] = VALUES[generator.integers(len(VALUES))]
            return document


def test_what_training_refuses_is_an_error_here(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    data.train["images"], data.train["annotations"] = data.train["images"][:2], data.train["annotations"][:4]
    mask = coco_mask.encode(np.asfortranarray(np.ones((HEIGHT, WIDTH), np.uint8)))
    data.train["annotations"][3].update(segmentation={"size": mask["size"], "counts": mask["counts"].decode()})
    generator = np.random.default_rng(0)
    num_refused = 0
    for _ in range(NUM_MUTATIONS):
        (tmp_path / "a.json").write_text(json.dumps(mutated(data.train, generator)))
        folder, file = tmp_path / "train", tmp_path / "a.json"
        report = examine_coco({"train": (folder, file)}, masks=True, decode=False, progress=False)
        assert report.table()
        refusal = ""
        with warnings.catch_warnings(action="ignore"):
            try:
                CocoDetection(folder, file, train=True, masks=True)
            except (ValueError, FileNotFoundError) as error:
                refusal = str(error)
        num_refused += refusal != ""
        assert report.has_errors or not refusal, refusal
    assert NUM_MUTATIONS / 3 < num_refused < NUM_MUTATIONS


def test_missing_files_and_no_splits(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(EMPTY)
    with pytest.raises(FileNotFoundError, match=r"the image folder .*nowhere does not exist"):
        examine_coco({"train": (tmp_path / "nowhere", tmp_path / "a.json")})
    with pytest.raises(FileNotFoundError, match=r"b\.json does not exist; .* holds the \.json files a\.json"):
        examine_coco({"train": (tmp_path, tmp_path / "b.json")})
    with pytest.raises(ValueError, match="splits is empty"):
        examine_coco({})
    with pytest.raises(ValueError, match="splits is empty"):
        examine_masks({}, ["a"])
    with pytest.raises(ValueError, match="class_names is empty"):
        examine_masks({"train": (tmp_path, tmp_path)}, [])
    with pytest.raises(ValueError, match="first_class_value=-1 is negative"):
        examine_masks({"train": (tmp_path, tmp_path)}, ["a"], first_class_value=-1)
    with pytest.raises(ValueError, match="ignore_value=1 is a class's value too: classes are 0 to 1, 1 is ignored"):
        examine_masks({"train": (tmp_path, tmp_path)}, ["a", "b"], ignore_value=1)
    with pytest.raises(FileNotFoundError, match=r"the mask folder .*nowhere does not exist"):
        examine_masks({"train": (tmp_path, tmp_path / "nowhere")}, ["a"])
    with pytest.raises(ValueError, match="'image-lost' is no code of a finding; they are json-broken"):
        DataReport({}, ()).found("image-lost")


# --- against what training reads, and slow ways to compute the same


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_cut_files_are_broken_where_training_cannot_read_them(suffix: str, tmp_path: Path) -> None:
    whole, part = tmp_path / f"whole.{suffix}", tmp_path / f"part.{suffix}"
    noise(0).save(whole)
    content = whole.read_bytes()
    verdicts = []
    for length in [*range(0, len(content), 61), len(content) - 2, len(content) - 1, len(content)]:
        part.write_bytes(content[:length])
        try:
            read_rgb(part, WIDTH, HEIGHT)
            readable = True
        except UnreadableImageError:
            readable = False
        verdicts.append(readable)
        assert (open_image(str(part)).error == "") == readable, length
    assert verdicts[-1]
    assert not verdicts[0]


def test_measures_of_masks_are_those_of_their_pixels(tmp_path: Path) -> None:
    write_sample_dataset(tmp_path / "sample", num_train=12, num_val=1, seed=0)
    file = tmp_path / "sample" / "annotations" / "instances_train.json"
    content = read_leniently(file)
    annotations = json.loads(file.read_text())["annotations"]
    assert [one["iscrowd"] for one in annotations] == content.iscrowd.tolist()
    assert content.iscrowd.any()
    for place, one in enumerate(annotations):
        if one["iscrowd"]:
            mask = content.encoded_mask(place, *one["segmentation"]["size"])
            assert content.mask_areas[place] == coco_mask.area(mask) == one["area"]
            assert content.mask_bounds_xyxy[place].tolist() == pytest.approx(
                np.add(one["bbox"], [0, 0, *one["bbox"][:2]])
            )
            continue
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in one["segmentation"]])
        assert content.mask_bounds_xyxy[place].tolist() == [*points.min(axis=0), *points.max(axis=0)]
        slow = 0.0
        for polygon in one["segmentation"]:
            corners = [*zip(polygon[0::2], polygon[1::2], strict=True)]
            slow += (
                abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(corners, corners[1:] + corners[:1], strict=True))) / 2
            )
        assert content.mask_areas[place] == pytest.approx(slow)
        assert content.mask_areas[place] == pytest.approx(one["area"], rel=0.35, abs=30)


# --- anchors


@pytest.mark.parametrize("octaves", [1, 3])
def test_anchors_are_torchvisions(octaves: int) -> None:
    anchors = Anchors(sizes=(10, 20, 33, 80, 160), aspect_ratios=(0.4, 1.0, 2.5), octaves=octaves)
    sizes = tuple(tuple(int(size * 2 ** (octave / 3)) for octave in range(octaves)) for size in anchors.sizes)
    generator = AnchorGenerator(sizes, (anchors.aspect_ratios,) * 5)
    expected = [
        sorted([*(cell[2:] - cell[:2]).tolist(), stride] for cell in cells)
        for cells, stride in zip(generator.cell_anchors, anchors.strides, strict=True)
    ]
    shapes = sorted(anchors.shapes().tolist(), key=lambda shape: shape[2])
    assert [sorted(level) for _, level in itertools.groupby(shapes, key=lambda shape: shape[2])] == expected


def test_best_ious_are_those_of_boxes_beside_each_other() -> None:
    anchors = Anchors(sizes=(16, 32, 64, 128, 256))
    sizes = np.random.default_rng(0).uniform(3, 300, (50, 2))
    objects = torch.from_numpy(np.concatenate((-sizes / 2, sizes / 2), axis=1))
    expected = torch.zeros(50, dtype=torch.float64)
    for width, height, stride in anchors.shapes():
        middle = stride / 4
        box = torch.tensor([[middle - width / 2, middle - height / 2, middle + width / 2, middle + height / 2]])
        expected = torch.maximum(expected, box_iou(objects, box.double())[:, 0])
    assert anchors.best_ious(sizes) == pytest.approx(expected.numpy())


def test_resizing_is_torchvisions() -> None:
    anchors = Anchors(min_size=800, max_size=1333)
    sizes = anchors.resized(np.array([[10.0, 20.0]] * 2), np.array([[640, 480], [2000, 500]]))
    assert sizes[0].tolist() == pytest.approx([10 * 800 / 480, 20 * 800 / 480])
    assert sizes[1].tolist() == pytest.approx([10 * 1333 / 2000, 20 * 1333 / 2000])


def test_better_anchors_fit_better_or_are_not_suggested() -> None:
    generator = np.random.default_rng(0)
    small = generator.uniform(8, 24, (500, 2))
    anchors = Anchors()
    better = better_anchors(small, anchors)
    assert better is not None
    assert (better.best_ious(small) < 0.5).mean() <= (anchors.best_ious(small) < 0.5).mean() - 0.05
    assert len(better.sizes) == 5
    assert better_anchors(small, better) is None
    fitting = anchors.shapes()[generator.integers(15, size=200), :2]
    assert better_anchors(fitting, anchors) is None
    assert better_anchors(np.zeros((0, 2)), anchors) is None


def test_mistaken_anchors() -> None:
    with pytest.raises(ValueError, match="sizes has 2 levels and strides 5"):
        Anchors(sizes=(8, 16))
    with pytest.raises(ValueError, match=r"aspect_ratios=\(0,\).* not positive"):
        Anchors(aspect_ratios=(0,))


def test_anchors_of_a_data_set_and_the_line_to_paste(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    (finding,) = data.examine(anchors=Anchors(min_size=HEIGHT, sizes=(8, 16, 22, 64, 128))).found("anchors")
    assert (finding.severity, finding.count, finding.suggestion) == ("info", 2 * NUM_IMAGES, "")
    assert "best IoU below 0.5 for 0% of the objects" in finding.examples[1].detail
    (finding,) = data.examine(anchors=Anchors(min_size=HEIGHT, max_size=WIDTH)).found("anchors")
    assert finding.severity == "warning"
    assert "best IoU below 0.5 for 100% of the objects" in finding.examples[1].detail
    assert "as suggested: best IoU below 0.5 for 0%" in finding.examples[2].detail
    key, _, value = finding.suggestion.strip("'").partition("=")
    assert key == "model.anchor_sizes"
    better = Anchors(min_size=HEIGHT, max_size=WIDTH, sizes=tuple(json.loads(value)))
    objects = np.array([[20.0, 16], [24, 20]])
    assert (better.best_ious(objects) >= 0.5).all()
    assert (Anchors().best_ious(objects) < 0.5).all()


@pytest.mark.filterwarnings("error")
def test_wrong_boxes_are_no_objects_of_the_anchors(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    boxes: list[list[float]] = [[1e308] * 4, [0, 0, 1e308, 1e308], [500, 500, 40, 40], [60, 4, 3, 0.2]]
    for number, box in enumerate(boxes):
        add(data, 900 + number, 1, box)
    (finding,) = data.examine(anchors=Anchors(min_size=HEIGHT, max_size=WIDTH)).found("anchors")
    assert finding.count == 2 * NUM_IMAGES


# --- folders of masks


class MaskSet:
    """Two splits of images and index masks of three classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for split, seeds in (("train", range(10)), ("val", range(20, 23))):
            for kind in ("images", "masks"):
                (folder / kind / split).mkdir(parents=True)
            for seed in seeds:
                noise(seed).save(self.image(seed, split))
                values = np.random.default_rng(seed).integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8)
                values[0] = 255
                Image.fromarray(values).save(self.mask(seed, split))

    def image(self, number: int, split: str = "train") -> Path:
        return self.folder / "images" / split / f"{number}.jpg"

    def mask(self, number: int, split: str = "train") -> Path:
        return self.folder / "masks" / split / f"{number}.png"

    def fill(self, number: int, value: int) -> None:
        Image.fromarray(np.full((HEIGHT, WIDTH), value, np.uint8)).save(self.mask(number))

    def examine(self, **arguments: Any) -> DataReport:
        splits = {split: (self.folder / "images" / split, self.folder / "masks" / split) for split in ("train", "val")}
        return examine_masks(splits, ["a", "b", "c"], num_workers=0, progress=False, **arguments)


MASK_BREAKS = [
    Break("image-broken", lambda data: cut(data.image(0)), "0.jpg", detail="truncated"),
    Break("mask-broken", lambda data: data.mask(1).write_text("no mask"), "1.png", detail="UnidentifiedImageError"),
    Break("mask-not-index", lambda data: noise(0).save(data.mask(2)), "2.png", detail="mode RGB"),
    Break(
        "size-mismatch",
        lambda data: noise(0, 50, 40).save(data.image(3)),
        "3.jpg",
        detail="the mask is 64 x 48, the image 50 x 40",
    ),
    Break(
        "mask-values",
        lambda data: data.fill(4, 7),
        "4.png",
        detail="the values 7 in 100.0% of the pixels; classes are 0 to 2",
    ),
    Break("image-without-mask", lambda data: data.mask(6).unlink(), "6.jpg"),
    Break("mask-without-image", lambda data: data.image(7).unlink(), "7.png"),
    Break(
        "name-twice",
        lambda data: shutil.copy(data.mask(8), data.mask(8).with_suffix(".bmp")),
        "train/8.bmp",
        detail="and 8.png",
    ),
    Break("exif-ambiguous", lambda data: turn(data.image(9), 3, (WIDTH, HEIGHT)), "9.jpg", detail="orientation 3"),
    Break(
        "split-leak", lambda data: shutil.copy(data.image(8), data.image(20, "val")), "8.jpg", detail="in val: 20.jpg"
    ),
]


@pytest.mark.parametrize("one", MASK_BREAKS, ids=lambda one: one.code)
def test_each_mistake_in_masks_alone(one: Break, tmp_path: Path) -> None:
    data = MaskSet(tmp_path)
    one.do(data)
    report = data.examine()
    assert found_codes(report) == {one.code}
    example = the_example(report, one.code)
    assert example.file == one.file
    assert one.detail in example.detail


def test_all_mistakes_in_masks_at_once(tmp_path: Path) -> None:
    data = MaskSet(tmp_path)
    for one in MASK_BREAKS:
        one.do(data)
    report = data.examine()
    assert found_codes(report) == {one.code for one in MASK_BREAKS}
    assert report.draw() is not None


def test_sound_masks(tmp_path: Path) -> None:
    report = MaskSet(tmp_path).examine()
    (finding,) = report.findings[:1]
    assert {finding.code for finding in report.findings} == {"ignored-fraction"}
    assert (finding.severity, finding.count) == ("info", 10 * WIDTH)
    assert finding.examples[0].detail == f"{1 / HEIGHT:.1%} of the pixels, value 255"
    assert MaskSet(tmp_path / "more").examine(decode=False).findings == ()


def test_masks_without_a_label(tmp_path: Path) -> None:
    data = MaskSet(tmp_path)
    data.fill(5, 255)
    example = the_example(data.examine(), "mask-all-ignored")
    assert (example.file, example.detail) == ("5.png", "all 3072 pixels are 255")
    assert data.examine().found("mask-all-ignored")[0].severity == "info"
    for number in range(6):
        data.fill(number, 255)
    report = data.examine()
    assert {(finding.code, finding.count) for finding in report.findings if finding.severity == "warning"} == {
        ("mask-all-ignored", 6),
        ("ignored-fraction", 6 * WIDTH * HEIGHT + 4 * WIDTH),
    }


def test_values_that_tell_what_they_mean(tmp_path: Path) -> None:
    data = MaskSet(tmp_path)
    data.fill(0, 3)
    assert data.examine().found("mask-values")[0].suggestion == "data.first_class_value=1 data.ignore_value=0"
    data = MaskSet(tmp_path / "more")
    train, val = data.examine(ignore_value=None).found("mask-values")
    assert train.suggestion == val.suggestion == "data.ignore_value=255"
    data.fill(0, 255)
    assert data.examine(first_class_value=1, ignore_value=0).found("mask-values")[0].suggestion == ""  # ADE20K's layout


def test_two_classes_saved_as_0_and_255(tmp_path: Path) -> None:
    data = MaskSet(tmp_path)
    for mask in (tmp_path / "masks").rglob("*.png"):
        values = (np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.2) * np.uint8(255)
        Image.fromarray(values).save(mask)
    splits = {"train": (tmp_path / "images" / "train", tmp_path / "masks" / "train")}
    report = examine_masks(splits, ["ground", "object"], num_workers=0, progress=False)
    assert found_codes(report) == {"mask-binary"}
    assert the_example(report, "mask-binary").detail == "no pixel is object, value 1"
    assert data.examine().found("mask-binary") == []  # of three classes


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I", "L;4"])
def test_values_are_those_that_training_reads(mode: str, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    values = np.random.default_rng(0).integers(0, 2 if mode == "1" else 9, (HEIGHT, WIDTH))
    if mode == "L;4":
        write_grey_of_4_bits(tmp_path / "masks" / "0.png", values)
    elif mode == "1":
        Image.fromarray(values.astype(bool)).save(tmp_path / "masks" / "0.png")
    elif mode == "I;16":
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / "masks" / "0.png")
    elif mode == "I":
        Image.fromarray(values.astype(np.int32)).save(tmp_path / "masks" / "0.tif")
    else:
        picture = Image.fromarray(values.astype(np.uint8))
        if mode == "P":
            picture.putpalette(list(range(255, -1, -1)) * 3)
        picture.save(tmp_path / "masks" / "0.png")
    noise(0).save(tmp_path / "images" / "0.jpg")
    names = [str(number) for number in range(9)]
    _, mask = MaskFolder(tmp_path / "images", tmp_path / "masks", names)[0]
    assert mask.numpy().tolist() == values.tolist()
    report = examine_masks({"train": (tmp_path / "images", tmp_path / "masks")}, names, num_workers=0, progress=False)
    assert list(report.splits["train"].numbers["classes"].values()) == np.bincount(values.ravel(), minlength=9).tolist()
    assert not report.has_errors


def test_more_classes_than_a_mask_can_hold(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    noise(0).save(tmp_path / "images" / "0.jpg")
    values = np.full((HEIGHT, WIDTH), 254, np.uint8)
    values[:9] = 253
    Image.fromarray(values).save(tmp_path / "masks" / "0.png")
    splits = {"all": (tmp_path / "images", tmp_path / "masks")}
    names = [f"class {number}" for number in range(300)]
    report = examine_masks(splits, names, ignore_value=None, num_workers=0, progress=False)
    assert the_example(report, "too-many-classes").detail == "300 classes, expected 1 to 254"
    assert report.found("mask-values") == []
    with pytest.raises(ValueError, match="it needs 1 to 254"):
        MaskFolder(*splits["all"], names)
    drawn = report.drawings[0].draw()
    assert drawn is not None
    assert not (drawn == (255, 0, 255)).all(axis=-1).any()  # 254 is a class here
    sound = examine_masks(splits, names[:254], num_workers=0, progress=False)
    assert found_codes(sound) == {"mask-values"}
    drawn = sound.drawings[0].draw()
    assert drawn is not None
    assert (drawn == (255, 0, 255)).all(axis=-1).any()


def write_grey_of_4_bits(path: Path, values: NDArray[np.int64]) -> None:
    """A PNG whose pixels have 4 bits, which Pillow spreads over 0 to 255."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (values[:, 0::2] << 4 | values[:, 1::2]).astype(np.uint8)
    scan = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 4, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scan)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_image_twice_with_another_mask(tmp_path: Path) -> None:
    data = MaskSet(tmp_path)
    shutil.copy(data.image(0), data.image(1))
    assert "the content of 0.jpg and another mask" in the_example(data.examine(), "image-twice").detail


# --- real data, and the generated set


def test_nothing_is_invented_in_the_generated_set(tmp_path: Path) -> None:
    sample = tmp_path / "sample"
    write_sample_dataset(sample, num_train=24, num_val=12, seed=0)
    coco = examine_coco(find_coco_splits(sample), masks=True, num_workers=0, progress=False)
    assert list(coco.splits) == ["train", "val"]
    assert found_codes(coco) == set()
    crowds = [
        one
        for one in json.loads((sample / "annotations" / "instances_train.json").read_text())["annotations"]
        if one["iscrowd"]
    ]
    assert coco.found("crowd-region")[0].count == len(crowds)
    found = find_mask_splits(sample / "ade20k")
    assert found is not None
    assert found.class_list == sample / "ade20k" / "classes.txt"
    masks = examine_masks(
        found.splits,
        read_class_list(found.class_list),
        first_class_value=1,
        ignore_value=0,
        num_workers=0,
        progress=False,
    )
    assert list(masks.splits) == ["training", "validation"]
    assert found_codes(masks) == set()


def test_nothing_is_invented_in_coco(real_data: Callable[[str], Path]) -> None:
    folder = real_data("coco_tiny")
    splits = find_coco_splits(folder)
    assert {name: images.name for name, (images, _) in splits.items()} == {
        "train2017": "train2017",
        "val2017": "val2017",
    }
    report = examine_coco(splits, masks=True, num_workers=0, progress=False)
    # Forty photos cannot show all of eighty classes; that is true, and nothing else is found.
    assert found_codes(report) == {"class-absent"}
    documents = [json.loads(file.read_text()) for _, file in splits.values()]
    seen = [{one["category_id"] for one in document["annotations"] if not one["iscrowd"]} for document in documents]
    assert [finding.count for finding in report.found("class-absent")] == [
        len(seen[1] - seen[0]),
        len(seen[0] - seen[1]),
    ]
    assert [finding.count for finding in report.found("crowd-region")] == [6, 9]


def test_zero_size_boxes_of_blood_cells(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    """The VOC files as they are, converted without leaving anything out."""
    folder = real_data("bccd")
    names = sorted({"Platelets", "RBC", "WBC"})
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    thin = []
    for image_id, file in enumerate(sorted((folder / "Annotations").glob("*.xml")), start=1):
        root = ElementTree.parse(file).getroot()
        images.append({"id": image_id, "file_name": f"{file.stem}.jpg", "width": 640, "height": 480})
        for entry in root.iter("object"):
            x1, y1, x2, y2 = (float(entry.find(f"bndbox/{key}").text) for key in ("xmin", "ymin", "xmax", "ymax"))  # type: ignore[union-attr, arg-type]
            label = names.index(entry.find("name").text) + 1  # type: ignore[union-attr, arg-type]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
            if x1 == x2 or y1 == y2:
                thin.append((f"{file.stem}.jpg", len(annotations)))
    categories = [{"id": label, "name": name} for label, name in enumerate(names, start=1)]
    (tmp_path / "a.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    report = examine_coco({"all": (folder / "JPEGImages", tmp_path / "a.json")}, decode=False, progress=False)
    (finding,) = report.found("box-degenerate")
    assert finding.count == len(thin) == 2
    assert [(example.file, example.annotation_id) for example in finding.examples] == thin
    with pytest.warns(UserWarning, match="2 boxes less than 1 px wide or high"):
        CocoDetection(folder / "JPEGImages", tmp_path / "a.json", train=True)


def test_ade20k(real_data: Callable[[str], Path]) -> None:
    found = find_mask_splits(real_data("ade20k_samples") / "ADEChallengeData2016")
    assert found is not None
    assert found.is_ade20k
    report = examine_masks(
        found.splits, ADE20K_CLASS_NAMES, first_class_value=1, ignore_value=0, num_workers=0, progress=False
    )
    assert found_codes(report) == {"class-absent"}


# --- the page of pictures


def test_images_with_findings_come_first(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    add(data, 59, 5, [50, 5, 30, 20], segmentation=[])
    add(data, 58, 5, [70, 5, 9, 9], segmentation=[])
    add(data, 69, 6, [50, 5, 30, 20], segmentation=[])
    cut(data.file(1))  # cannot be drawn
    report = data.examine(num_pictures=8)
    titles = [drawing.title for drawing in report.drawings]
    assert len(titles) == 8
    assert titles[0] == "train 5.jpg: box-outside, box-over-edge, mask-missing"
    assert titles[1] == "train 6.jpg: box-over-edge, mask-missing"
    assert [title.split()[0] for title in titles] == ["train"] * 4 + ["val"] * 4
    assert len({*titles}) == 8
    assert not any(title.startswith("train 1.jpg") for title in titles)
    page = report.draw()
    assert page is not None
    assert page.shape[1] == 3 * 560 + 4 * 12


def test_a_page_without_pictures(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    shutil.rmtree(data.folder / "train")
    shutil.rmtree(data.folder / "val")
    (data.folder / "train").mkdir()
    (data.folder / "val").mkdir()
    assert data.examine().draw() is None


# --- where a folder has its data set


def write_json(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"images": [{"id": 1, "file_name": name, "width": 64, "height": 48}], "annotations": []})
    )


@pytest.mark.parametrize(
    ("file", "images", "split"),
    [
        ("annotations/instances_train2017.json", "train2017", "train2017"),
        ("annotations/instances_train.json", "images/train", "train"),
        ("annotations_coco/instances_train.json", "JPEGImages", "train"),
        ("annotations/train.json", "images", "train"),
        ("train/_annotations.coco.json", "train", "train"),
        ("result.json", ".", "result"),
        ("instances.json", "images", "instances"),
    ],
)
def test_layouts_of_coco(file: str, images: str, split: str, tmp_path: Path) -> None:
    (tmp_path / images).mkdir(parents=True, exist_ok=True)
    noise(0).save(tmp_path / images / "one.jpg")
    write_json(tmp_path / file, "one.jpg")
    ((name, (folder, found)),) = find_coco_splits(tmp_path).items()
    assert (name, folder.resolve(), found) == (split, (tmp_path / images).resolve(), tmp_path / file)
    assert find_mask_splits(tmp_path) is None


def test_splits_are_in_the_order_of_their_use(tmp_path: Path) -> None:
    for split in ("test", "train", "valid"):
        (tmp_path / split).mkdir()
        noise(0).save(tmp_path / split / "one.jpg")
        write_json(tmp_path / split / "_annotations.coco.json", "one.jpg")
    assert list(find_coco_splits(tmp_path)) == ["train", "valid", "test"]


def test_images_that_are_nowhere(tmp_path: Path) -> None:
    write_json(tmp_path / "annotations" / "instances_train.json", "lost.jpg")
    with pytest.raises(ValueError, match=r"such as lost\.jpg, are in none of the folders .* name theirs with --images"):
        find_coco_splits(tmp_path)


def test_panoptic_pictures_are_no_masks(tmp_path: Path) -> None:
    for name in ("images/train2017", "annotations/panoptic_train2017"):
        (tmp_path / name).mkdir(parents=True)
        noise(0).save(tmp_path / name / "one.png")
    assert find_mask_splits(tmp_path) is not None
    write_json(tmp_path / "annotations" / "instances_train2017.json", "one.png")
    assert find_mask_splits(tmp_path) is None
    assert list(find_coco_splits(tmp_path)) == ["train2017"]


def test_other_json_is_no_split(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "one.jpg")
    write_json(tmp_path / "train.json", "one.jpg")
    report = examine_coco(find_coco_splits(tmp_path), progress=False)
    (tmp_path / "doctor.json").write_text(json.dumps(report.as_dict()))
    (tmp_path / "info.json").write_text('{"year": 2026, "images": 3}')
    (tmp_path / "empty.json").touch()
    assert list(find_coco_splits(tmp_path)) == ["train"]
    (tmp_path / "val.json").write_text((tmp_path / "train.json").read_text(), encoding="utf-16")
    assert list(find_coco_splits(tmp_path)) == ["train", "val"]


@pytest.mark.parametrize(
    ("images", "masks", "splits", "is_ade20k"),
    [
        ("images", "masks", None, False),
        ("images/train", "masks/train", ["train"], False),
        ("images/training", "annotations/training", ["training"], True),
        ("train/images", "train/labels", ["train"], False),
    ],
)
def test_layouts_of_masks(images: str, masks: str, splits: list[str] | None, is_ade20k: bool, tmp_path: Path) -> None:
    for folder in (images, masks):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / folder / "1.png")
    found = find_mask_splits(tmp_path)
    assert found is not None
    assert list(found.splits) == (splits or [tmp_path.name])
    assert list(found.splits.values()) == [(tmp_path / images, tmp_path / masks)]
    assert found.is_ade20k == is_ade20k


def test_every_kind_has_its_line_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    for code, kind in KINDS.items():
        assert f"\n| `{code}` | {kind.severity} | {kind.meaning} | {kind.remedy} |\n" in page
    assert page.count("\n| `") == len(KINDS)
