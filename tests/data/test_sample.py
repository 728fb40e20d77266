from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from resnest_det.data import sample
from resnest_det.data.sample import (
    ADE_CLASS_NAMES,
    SHAPES,
    default_cache_folder,
    ensure_sample_dataset,
    read_sample_summary,
    write_sample_dataset,
)

NUM_IMAGES = {"train": 14, "val": 12}  # 12 is what the data set's promises need
ADE_SPLIT = {"train": "training", "val": "validation"}
SMALL, LARGE = 32**2, 96**2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sample"
    write_sample_dataset(path, num_train=NUM_IMAGES["train"], num_val=NUM_IMAGES["val"], seed=3)
    return path


@pytest.fixture(params=["train", "val"])
def split(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def coco(folder: Path, split: str) -> COCO:
    return COCO(folder / "annotations" / f"instances_{split}.json")


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects_of(coco: COCO) -> list[dict[str, Any]]:
    return [annotation for annotation in coco.anns.values() if not annotation["iscrowd"]]


def test_images_are_as_the_json_says(folder: Path, split: str, coco: COCO) -> None:
    assert len(coco.imgs) == NUM_IMAGES[split]
    assert {path.name for path in (folder / split).iterdir()} == {image["file_name"] for image in coco.imgs.values()}
    orientations = set()
    for image in coco.imgs.values():
        with Image.open(folder / split / image["file_name"]) as picture:
            assert (picture.size, picture.mode) == ((image["width"], image["height"]), "RGB")
        assert max(picture.size) <= 288
        orientations.add(image["width"] > image["height"])
    assert orientations == {True, False}


def test_image_and_annotation_ids_are_unique_over_both_splits(folder: Path) -> None:
    splits = [COCO(folder / "annotations" / f"instances_{split}.json") for split in NUM_IMAGES]
    assert not set(splits[0].imgs) & set(splits[1].imgs)
    assert not set(splits[0].anns) & set(splits[1].anns)


def test_category_ids_have_holes(coco: COCO) -> None:
    assert sorted(coco.cats) == [1, 2, 4, 5, 7, 9]
    assert [coco.cats[shape.category_id]["name"] for shape in SHAPES] == [shape.name for shape in SHAPES]


def test_polygon_bbox_and_area_agree(coco: COCO) -> None:
    for annotation in objects_of(coco):
        (polygon,) = annotation["segmentation"]
        points = np.array(polygon).reshape(-1, 2)
        x, y, width, height = annotation["bbox"]
        np.testing.assert_allclose([x, y], points.min(axis=0))
        np.testing.assert_allclose([x + width, y + height], points.max(axis=0))

        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        # A mask has whole pixels only: it loses the tips of stars and crescents where they are narrower than one,
        # which is less than two pixels before their end.
        bounds = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(bounds, [x, y, x + width, y + height], atol=2)


def test_boxes_lie_in_the_image_and_are_not_tiny(coco: COCO) -> None:
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= image["width"]
        assert y + height <= image["height"]
        assert max(width, height) >= 14


def test_crowd_is_run_length_coded(coco: COCO) -> None:
    crowds = [annotation for annotation in coco.anns.values() if annotation["iscrowd"]]
    assert crowds
    for crowd in crowds:
        mask = coco.annToMask(crowd)
        assert mask.sum() == crowd["area"]
        code = coco_mask.encode(np.asfortranarray(mask))
        assert coco_mask.toBbox(code).tolist() == crowd["bbox"]


def test_run_lengths_begin_with_zeros() -> None:
    mask = np.array([[1, 0], [1, 1]], dtype=bool)
    assert sample._run_lengths(mask) == [0, 2, 1, 1]
    assert sample._run_lengths(~mask) == [2, 1, 1]
    assert sample._run_lengths(np.zeros((2, 2), dtype=bool)) == [4]


def test_each_split_has_all_classes_all_sizes_a_crowd_and_an_empty_image(coco: COCO) -> None:
    objects = objects_of(coco)
    assert {annotation["category_id"] for annotation in objects} == {shape.category_id for shape in SHAPES}
    sizes = Counter(
        "small" if annotation["area"] < SMALL else "large" if annotation["area"] > LARGE else "medium"
        for annotation in objects
    )
    assert set(sizes) == {"small", "medium", "large"}
    assert any(annotation["iscrowd"] for annotation in coco.anns.values())
    assert any(not coco.getAnnIds(imgIds=image_id) for image_id in coco.imgs)


def test_some_objects_overlap_and_none_is_heavily_hidden(coco: COCO) -> None:
    num_overlaps = 0
    for image_id in coco.imgs:
        masks = [
            coco.annToMask(annotation).astype(bool)
            for annotation in coco.imgToAnns[image_id]
            if not annotation["iscrowd"]
        ]
        boxes = [annotation["bbox"] for annotation in coco.imgToAnns[image_id] if not annotation["iscrowd"]]
        ious = coco_mask.iou(boxes, boxes, [0] * len(boxes)) if boxes else np.zeros((0, 0))
        num_overlaps += np.count_nonzero(np.triu(ious, 1))
        for first in range(len(masks)):
            for second in range(first):
                # What is visible of one object is not visible of another; their borders share pixels.
                shared = np.count_nonzero(masks[first] & masks[second])
                assert shared <= 0.2 * min(masks[first].sum(), masks[second].sum())
    assert num_overlaps > 0


def test_ade20k_holds_the_same_scenes(folder: Path, split: str, coco: COCO) -> None:
    images = folder / "ade20k" / "images" / ADE_SPLIT[split]
    masks = folder / "ade20k" / "annotations" / ADE_SPLIT[split]
    value_of = {shape.category_id: value for value, shape in enumerate(SHAPES, start=1)}
    seen = set()
    for image in coco.imgs.values():
        name = image["file_name"]
        assert (images / name).read_bytes() == (folder / split / name).read_bytes()
        with Image.open(masks / name.replace(".jpg", ".png")) as picture:
            assert picture.mode == "L"
            values = np.asarray(picture)
        assert values.shape == (image["height"], image["width"])
        seen |= set(np.unique(values).tolist())
        is_object = np.zeros(values.shape, dtype=bool)
        for annotation in coco.imgToAnns[image["id"]]:
            mask = coco.annToMask(annotation).astype(bool)
            agreeing = np.count_nonzero(values[mask] == value_of[annotation["category_id"]])
            # pycocotools draws a polygon's border pixels too, half of which are the neighbour's.
            width, height = annotation["bbox"][2:]
            border = 0 if annotation["iscrowd"] else 2 * (width + height)
            assert agreeing >= mask.sum() - border
            is_object |= mask
        shape_pixels = (values >= 1) & (values <= len(SHAPES))
        assert np.count_nonzero(shape_pixels & ~is_object) <= 0.02 * values.size
    assert seen == set(range(len(ADE_CLASS_NAMES) + 1))


def test_class_list_has_the_columns_of_ade20k(folder: Path) -> None:
    header, *lines = (folder / "ade20k" / "classes.txt").read_text().splitlines()
    assert header.split("\t") == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    rows = [line.split("\t") for line in lines]
    assert [(int(row[0]), row[5]) for row in rows] == list(enumerate(ADE_CLASS_NAMES, start=1))
    assert sum(float(row[1]) for row in rows) == pytest.approx(1, abs=0.001)
    assert all(1 <= int(row[2]) <= NUM_IMAGES["train"] and 1 <= int(row[3]) <= NUM_IMAGES["val"] for row in rows)
    assert [row[5] for row in rows if row[4] == "1"] == list(ADE_CLASS_NAMES[len(SHAPES) :])


def test_summary_counts_what_was_written(folder: Path) -> None:
    summary = read_sample_summary(folder)
    splits = [COCO(folder / "annotations" / f"instances_{split}.json") for split in NUM_IMAGES]
    assert summary.num_objects == sum(len(objects_of(coco)) for coco in splits)
    assert summary.num_crowds == sum(len(coco.anns) - len(objects_of(coco)) for coco in splits)
    assert summary.num_empty == sum(not coco.imgToAnns[image_id] for coco in splits for image_id in coco.imgs)
    assert (summary.num_train, summary.num_val, summary.seed) == (14, 12, 3)


def test_same_seed_gives_the_same_bytes_whatever_the_global_state(tmp_path: Path) -> None:
    for name, global_seed in (("first", 1), ("second", 2)):
        np.random.seed(global_seed)
        write_sample_dataset(tmp_path / name, num_train=3, num_val=2, seed=5)
        assert np.random.randint(10**9) == np.random.RandomState(global_seed).randint(10**9)  # not drawn from
    write_sample_dataset(tmp_path / "other", num_train=3, num_val=2, seed=6)
    first = all_bytes(tmp_path / "first")
    assert first == all_bytes(tmp_path / "second")
    assert first["train/000001.jpg"] != (tmp_path / "other" / "train" / "000001.jpg").read_bytes()


def test_an_image_does_not_depend_on_how_many_follow(folder: Path, tmp_path: Path) -> None:
    write_sample_dataset(tmp_path / "short", num_train=2, num_val=1, seed=3)
    for name in ("train/000001.jpg", "train/000002.jpg"):
        assert (tmp_path / "short" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "short/val/000003.jpg").read_bytes() == (folder / "val/000015.jpg").read_bytes()


def test_colour_does_not_give_the_class_away() -> None:
    rng = np.random.default_rng(0)
    pairs = set()
    for index in range(60):
        objects, _ = sample._place_objects(index, 192, 256, [np.full(3, 235, np.float32)], rng)
        pairs |= {(placed.shape_index, tuple(placed.patches[0].colour.tolist())) for placed in objects}
    colours = {colour for _, colour in pairs}
    assert len(colours) >= 5
    assert len(pairs) >= 0.8 * len(colours) * len(SHAPES)


def test_surfaces_of_the_shapes_are_told_apart() -> None:
    y, x = np.mgrid[-40:41, -40:41].astype(np.float32)
    surfaces = [shape.surface(x, y).ravel() for shape in SHAPES]
    assert all(np.abs(surface).max() <= 1 for surface in surfaces)
    for index, one in enumerate(surfaces):
        for other in surfaces[:index]:
            likeness = abs(np.mean((one - one.mean()) * (other - other.mean()))) / (one.std() * other.std() + 1e-6)
            assert likeness < 0.8
            assert np.abs(one - other).mean() > 0.3


def test_outlines_are_simple_polygons_of_the_stated_area() -> None:
    rng = np.random.default_rng(0)
    for shape_index, shape in enumerate(SHAPES):
        patch = sample._make_patch(shape_index, (100.0, 90.0), 60.0, [np.zeros(3, np.float32)], rng)
        code = coco_mask.frPyObjects([patch.points.ravel().tolist()], 180, 200)
        assert int(coco_mask.area(code)[0]) == pytest.approx(3600, rel=0.02), shape.name


# ------------------------------------------------------------------------------------------------- the folder


def test_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "_write_class_list", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_sample_dataset(tmp_path / "sample", num_train=1, num_val=1)
    assert list(tmp_path.iterdir()) == []


def test_write_takes_an_empty_folder_and_makes_parents(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_sample_dataset(tmp_path / "empty", num_train=1, num_val=1)
    write_sample_dataset(str(tmp_path / "a" / "b"), num_train=1, num_val=1)
    assert all_bytes(tmp_path / "empty") == all_bytes(tmp_path / "a" / "b")


@pytest.mark.parametrize("generate", [write_sample_dataset, ensure_sample_dataset])
def test_foreign_folder_is_refused_and_left_alone(generate: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=rf"{tmp_path} is not empty.*give a new or an empty folder"):
        generate(tmp_path, num_train=1, num_val=1)
    assert all_bytes(tmp_path) == {"thesis.txt": b"precious"}


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match=r"file is not empty"):
        write_sample_dataset(tmp_path / "file", num_train=1, num_val=1)


def test_ensure_generates_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ensure_sample_dataset(tmp_path / "sample", num_train=2, num_val=1, seed=7)
    assert path == (tmp_path / "sample").resolve()

    monkeypatch.setattr(sample, "write_sample_dataset", lambda *_, **__: pytest.fail("generated again"))
    assert ensure_sample_dataset(tmp_path / "sample", num_train=2, num_val=1, seed=7) == path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, r"seed 7 \(asked for: 8\)"),
        ({"num_train": 3}, r"num_train 2 \(asked for: 3\)"),
        ({"num_val": 4}, r"num_val 1 \(asked for: 4\)"),
    ],
)
def test_ensure_refuses_another_set(change: dict[str, int], message: str, tmp_path: Path) -> None:
    numbers = {"num_train": 2, "num_val": 1, "seed": 7}
    ensure_sample_dataset(tmp_path / "sample", **numbers)
    with pytest.raises(ValueError, match=message):
        ensure_sample_dataset(tmp_path / "sample", **(numbers | change))


def test_ensure_refuses_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_sample_dataset(tmp_path / "sample", num_train=1, num_val=1)
    monkeypatch.setattr(sample, "SAMPLE_VERSION", 99)
    with pytest.raises(ValueError, match=r"version 2 \(asked for: 99\)"):
        ensure_sample_dataset(tmp_path / "sample", num_train=1, num_val=1)


def test_ensure_keeps_the_set_another_process_finished_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = tmp_path / "finished"
    write_sample_dataset(finished, num_train=1, num_val=1)
    write_class_list = sample._write_class_list

    def be_overtaken(*arguments: Any) -> None:
        write_class_list(*arguments)
        finished.rename(tmp_path / "sample")

    monkeypatch.setattr(sample, "_write_class_list", be_overtaken)
    path = ensure_sample_dataset(tmp_path / "sample", num_train=1, num_val=1)
    assert read_sample_summary(path).num_train == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["sample"]


@pytest.mark.parametrize("generate", [write_sample_dataset, ensure_sample_dataset])
@pytest.mark.parametrize(("name", "value", "least"), [("num_train", 0, 1), ("num_val", -2, 1), ("seed", -1, 0)])
def test_number_out_of_range(generate: Any, name: str, value: int, least: int, tmp_path: Path) -> None:
    numbers = {"num_train": 1, "num_val": 1, "seed": 0} | {name: value}
    with pytest.raises(ValueError, match=rf"{name} is {value}, expected at least {least}"):
        generate(tmp_path / "sample", **numbers)
    assert list(tmp_path.iterdir()) == []


def test_summary_of_a_folder_that_is_no_sample(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"sample\.json does not exist"):
        read_sample_summary(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", json.dumps({"version": 1})])
def test_marker_that_is_none_of_ours(content: str, tmp_path: Path) -> None:
    (tmp_path / "sample.json").write_text(content)
    with pytest.raises(ValueError, match=r"sample\.json is not a sample data set's marker \(.+\)"):
        ensure_sample_dataset(tmp_path)


def test_default_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNEST_DET_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert default_cache_folder() == tmp_path / "own"
    monkeypatch.delenv("RESNEST_DET_CACHE")
    assert default_cache_folder() == tmp_path / "shared" / "resnest_det"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "resnest_det"
