"""CocoDetection: what it reads, what it refuses and in which words."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from resnest_det.data import CocoDetection
from resnest_det.data.loaders import collate

WIDTH, HEIGHT = 40, 30


def image(id_: Any = 1, **changes: Any) -> dict[str, Any]:
    return {"id": id_, "file_name": f"{id_}.png", "width": WIDTH, "height": HEIGHT} | changes


def box(id_: Any = 10, **changes: Any) -> dict[str, Any]:
    return {"id": id_, "image_id": 1, "category_id": 3, "bbox": [5, 6, 10, 12]} | changes


CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def write(folder: Path, images: Any, annotations: Any, categories: Any = CATEGORIES) -> Path:
    """A JSON in `folder` and, in folder/images, a picture for each of its images. Returns the JSON."""
    for item in images:
        path = folder / "images" / item["file_name"]
        if not item["file_name"].startswith(("/", "..")) and item["width"] > 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (item["width"], item["height"]), (200, 100, 50)).save(path)
    return write_text(folder, json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_text(folder: Path, text: str) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    path = folder / "instances.json"
    path.write_text(text)
    return path


def read(file: Path, **arguments: Any) -> CocoDetection:
    return CocoDetection(file.parent / "images", file, **arguments)


def refusal(file: Path, error: type[Exception] = ValueError, **arguments: Any) -> str:
    with pytest.raises(error) as raised:
        read(file, **arguments)
    return str(raised.value)


# --- what it reads


def test_sample_holds_what_the_file_says(tmp_path: Path) -> None:
    data = read(
        write(
            tmp_path,
            [image(1), image(2)],
            [
                box(10, image_id=2, bbox=[1.5, 2.5, 3, 4], area=7.25),
                box(11, image_id=1, category_id=7, iscrowd=1),
                box(12, image_id=2, category_id=7),
            ],
        )
    )
    assert len(data) == 2
    picture, target = data[1]
    assert (picture.dtype, picture.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert picture[:, 3, 4].tolist() == [200, 100, 50]
    torch.testing.assert_close(target["boxes"], torch.tensor([[1.5, 2.5, 4.5, 6.5], [5, 6, 15, 18]]))
    assert target["labels"].tolist() == [1, 2]
    assert target["labels"].dtype == torch.int64
    assert (target["image_id"], type(target["image_id"])) == (2, int)
    assert target["area"].tolist() == [7.25, 120.0]  # the second from width x height
    assert target["area"].dtype == torch.float64
    assert target["iscrowd"].tolist() == [False, False]
    assert data[0][1]["iscrowd"].tolist() == [True]
    assert data.annotation_ids(1).tolist() == [10, 12]
    assert data.file_name(-1) == "2.png"
    assert data.image_path(0) == tmp_path / "images" / "1.png"


def test_labels_are_contiguous_by_category_id_and_lead_back(tmp_path: Path) -> None:
    data = read(write(tmp_path, [image()], []))
    assert data.class_names == {1: "cat", 2: "dog"}
    assert data.category_ids == {1: 3, 2: 7}
    assert data.labels == {3: 1, 7: 2}
    assert data.num_classes == 3
    assert data.image_ids.tolist() == [1]
    torch.testing.assert_close(data.aspect_ratios, torch.tensor([40 / 30]))


def test_image_without_boxes_gives_empty_tensors_of_the_right_types(tmp_path: Path) -> None:
    target = read(write(tmp_path, [image()], []))[0][1]
    assert target["boxes"].shape == (0, 4)
    assert [target[key].dtype for key in ("boxes", "labels", "area", "iscrowd")] == [
        torch.float32,
        torch.int64,
        torch.float64,
        torch.bool,
    ]


def test_ids_beyond_32_bits(tmp_path: Path) -> None:
    data = read(write(tmp_path, [image(2**40)], [box(2**41, image_id=2**40)]))
    assert data[0][1]["image_id"] == 2**40
    assert data.annotation_ids(0).tolist() == [2**41]


def test_extra_keys_are_ignored_and_file_names_may_hold_folders_and_any_letters(tmp_path: Path) -> None:
    name = "a/bĉ 1.png"
    file = write(tmp_path, [image(file_name=name, coco_url="http://x")], [box(segmentation=[[1, 2, 3, 4, 5, 6]])])
    assert read(file).file_name(0) == name


def test_a_sample_can_be_written_to_without_changing_the_data_set(tmp_path: Path) -> None:
    data = read(write(tmp_path, [image()], [box()]))
    for key in ("boxes", "labels", "area"):
        data[0][1][key].zero_()
    data[0][1]["iscrowd"].fill_(True)
    target = data[0][1]
    assert target["boxes"].tolist() == [[5, 6, 15, 18]]
    assert (target["labels"].item(), target["area"].item(), target["iscrowd"].item()) == (1, 120, False)


def test_label_lists(tmp_path: Path) -> None:
    annotations = [box(10, image_id=3), box(11, image_id=1, category_id=7), box(12, image_id=3, category_id=7)]
    data = read(write(tmp_path, [image(1), image(2), image(3)], annotations))
    offsets, labels = data.label_lists()
    assert (offsets.dtype, labels.dtype) == (torch.int64, torch.int64)
    assert offsets.tolist() == [0, 1, 1, 3]
    assert labels.tolist() == [2, 1, 2]
    for index in range(3):
        assert labels[offsets[index] : offsets[index + 1]].tolist() == data[index][1]["labels"].tolist()
    labels.zero_()
    assert data[0][1]["labels"].tolist() == [2]


@pytest.mark.parametrize("index", [2, -3])
def test_index_outside(tmp_path: Path, index: int) -> None:
    data = read(write(tmp_path, [image(1), image(2)], []))
    with pytest.raises(IndexError, match=f"index {index} is outside this data set of 2 images"):
        data[index]
    assert [sample[1]["image_id"] for sample in data] == [1, 2]  # iteration ends by IndexError


# --- training and evaluation


def test_training_leaves_out_crowds_and_images_of_nothing_else(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        [image(1), image(2), image(3)],
        [box(10, image_id=1), box(11, image_id=1, iscrowd=1), box(12, image_id=2, iscrowd=1)],
    )
    data = read(file, train=True)
    assert data.image_ids.tolist() == [1, 3]
    assert [len(sample[1]["boxes"]) for sample in data] == [1, 0]
    summary = data.summary()
    assert summary.startswith("instances.json: 2 images (1 of them without boxes), 1 boxes (0 of them crowd")
    assert "2 crowd regions and 0 degenerate boxes were dropped" in summary
    assert "1 images left out because all of their annotations were dropped" in summary
    assert "1 images without annotations kept as negatives" in summary

    data = read(file, train=True, keep_empty=False)
    assert data.image_ids.tolist() == [1]
    assert "1 images without annotations left out" in data.summary()

    data = read(file)
    assert data.image_ids.tolist() == [1, 2, 3]
    assert "3 images (1 of them without boxes), 3 boxes (2 of them crowd regions), 2 classes" in data.summary()


def test_training_clips_boxes_and_drops_degenerate_ones_aloud(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        [image(1), image(2)],
        [
            box(10, bbox=[-5, -6, 100, 100]),
            box(11, bbox=[39.5, 0, 10, 10]),  # half a pixel of it is inside
            box(12, bbox=[5, 5, 10, 0]),
            box(13, bbox=[1.8, 5, 1.0, 10]),  # 1.8 + 1 - 1.8 < 1 in floating point
            box(14, image_id=2, bbox=[50, 50, 5, 5]),  # outside altogether
        ],
    )
    match = re.escape("3 boxes less than 1 px wide or high after clipping were dropped (annotation ids 11, 12, 14)")
    with pytest.warns(UserWarning, match=match):
        data = read(file, train=True)
    assert data.annotation_ids(0).tolist() == [10, 13]
    assert data[0][1]["boxes"][0].tolist() == [0, 0, WIDTH, HEIGHT]
    assert data.image_ids.tolist() == [1]
    assert "3 degenerate boxes were dropped, 1 boxes clipped" in data.summary()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read(file)
    assert data[0][1]["boxes"].tolist()[0] == [-5, -6, 95, 94]
    assert len(data[0][1]["boxes"]) == 4


def test_keep_empty_without_effect_is_said(tmp_path: Path) -> None:
    file = write(tmp_path, [image()], [])
    with pytest.warns(UserWarning, match="keep_empty=False has no effect with train=False"):
        assert len(read(file, keep_empty=False)) == 1


def test_nothing_left_for_training(tmp_path: Path) -> None:
    file = write(tmp_path, [image()], [box(iscrowd=1)])
    assert "none of its 1 images is left for training" in refusal(file, train=True)


def test_evaluation_ground_truth_equals_pycocotools(real_data: Callable[[str], Path]) -> None:
    folder = real_data("coco_tiny")
    file = folder / "annotations" / "instances_val2017.json"
    data = CocoDetection(folder / "val2017", file)
    coco = COCO(str(file))
    assert data.image_ids.tolist() == [item["id"] for item in coco.dataset["images"]]
    num_crowds = 0
    for index, (picture, target) in enumerate(data):
        expected = coco.imgToAnns[target["image_id"]]
        assert data.annotation_ids(index).tolist() == [a["id"] for a in expected]
        assert [data.category_ids[label] for label in target["labels"].tolist()] == [a["category_id"] for a in expected]
        xywh = np.array([a["bbox"] for a in expected])
        xyxy = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1).astype(np.float32)
        assert (target["boxes"].numpy() == xyxy).all()
        assert (target["area"].numpy() == np.array([a["area"] for a in expected])).all()
        assert target["iscrowd"].tolist() == [a["iscrowd"] == 1 for a in expected]
        num_crowds += int(target["iscrowd"].sum())
        info = coco.imgs[target["image_id"]]
        assert picture.shape == (3, info["height"], info["width"])
    assert num_crowds == 9  # written as run lengths


def test_bccd_with_its_zero_size_boxes(real_data: Callable[[str], Path]) -> None:
    folder = real_data("bccd")
    file = folder / "annotations_coco" / "instances_train.json"
    document = json.loads(file.read_text())
    thin = [a["id"] for a in document["annotations"] if min(a["bbox"][2:]) < 1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = CocoDetection(folder / "JPEGImages", file, train=True)
    assert data.num_classes == 4
    kept = torch.cat([data.annotation_ids(i) for i in range(len(data))])
    assert len(kept) == len(document["annotations"]) - len(thin)
    assert not set(thin) & set(kept.tolist())
    assert len(caught) == (1 if thin else 0)


# --- pictures


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    file = write(tmp_path, [image(file_name=f"x.{suffix}")], [])
    Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255)).convert(mode).save(tmp_path / "images" / f"x.{suffix}")
    picture = read(file)[0][0]
    assert picture.shape == (3, HEIGHT, WIDTH)
    assert picture.unique().tolist() == [255]


def save_turned(path: Path, size: tuple[int, int]) -> None:
    """A picture whose EXIF tag says that it must be turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", size).save(path, exif=exif)


def test_exif_turned_picture_is_taken_as_the_file_has_it(tmp_path: Path) -> None:
    file = write(tmp_path, [image(1, file_name="1.jpg"), image(2, file_name="2.jpg")], [])
    save_turned(tmp_path / "images" / "1.jpg", (WIDTH, HEIGHT))  # annotated on the raw pixels
    save_turned(tmp_path / "images" / "2.jpg", (HEIGHT, WIDTH))  # annotated on the turned picture
    assert [sample[0].shape for sample in read(file)] == [(3, HEIGHT, WIDTH)] * 2


@pytest.mark.parametrize("on_unreadable", ["raise", "skip"])
def test_picture_of_another_size(tmp_path: Path, on_unreadable: str) -> None:
    file = write(tmp_path, [image()], [])
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "1.png")
    with pytest.raises(ValueError, match=r"1\.png is 20 x 10 pixels, but the annotation file says 40 x 30"):
        read(file, on_unreadable=on_unreadable).load(0)


def break_picture(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_unreadable_picture_names_file_and_cause(tmp_path: Path) -> None:
    file = write(tmp_path, [image(1), image(2)], [])
    break_picture(tmp_path / "images" / "1.png")
    (tmp_path / "images" / "2.png").write_text("no picture")
    data = read(file)
    with pytest.raises(ValueError, match=r"cannot read the image .*images/1\.png \(OSError: .*truncated"):
        data.load(0)
    with pytest.raises(ValueError, match=r"2\.png \(UnidentifiedImageError: cannot identify"):
        data[1]


def test_skipping_warns_once_a_file_and_lists_it(tmp_path: Path) -> None:
    file = write(tmp_path, [image(1), image(2)], [])
    break_picture(tmp_path / "images" / "2.png")
    data = read(file, on_unreadable="skip")
    assert data.skipped == []
    with pytest.warns(UserWarning, match=r"skipped: cannot read the image .*2\.png") as caught:
        assert [data.load(i) is None for i in (0, 1, 1)] == [False, True, True]
    assert len(caught) == 1
    assert data.skipped == ["2.png"]
    with pytest.raises(ValueError, match="cannot read the image"):
        data[1]


def test_unknown_on_unreadable(tmp_path: Path) -> None:
    file = write(tmp_path, [image()], [])
    assert refusal(file, on_unreadable="ignore") == "on_unreadable='ignore' is unknown; use 'raise' or 'skip'"


# --- the transform


def drop_first(
    pixels: np.ndarray, boxes_xyxy: np.ndarray, masks: np.ndarray | None, seed: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    assert masks is None
    return pixels[:10] + np.uint8(seed or 0), boxes_xyxy[1:] + 1, None, np.arange(1, len(boxes_xyxy))


def test_labels_area_and_crowd_follow_the_kept_boxes(tmp_path: Path) -> None:
    annotations = [box(10), box(11, category_id=7, area=5, iscrowd=1)]
    data = read(write(tmp_path, [image()], annotations), transform=drop_first)
    sample = data.load(0, seed=4)
    assert sample is not None
    picture, target = sample
    assert picture.shape == (3, 10, WIDTH)
    assert picture[:, 0, 0].tolist() == [204, 104, 54]
    assert target["boxes"].tolist() == [[6, 7, 16, 19]]
    assert target["labels"].tolist() == [2]
    assert target["area"].tolist() == [5]
    assert target["iscrowd"].tolist() == [True]
    assert data[0][0][:, 0, 0].tolist() == [200, 100, 50]  # seed None


# --- sharing with workers


ARRAYS = (
    "image_ids",
    "aspect_ratios",
    "_sizes",
    "_names",
    "_name_offsets",
    "_offsets",
    "_boxes",
    "_labels",
    "_areas",
    "_iscrowd",
    "_annotation_ids",
    "_skipped",
)


class Shared(torch.utils.data.Dataset[list[bool]]):
    """Answers, from inside a worker, which of the data set's arrays lie in shared memory."""

    def __init__(self, data: CocoDetection) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[bool]:
        return [getattr(self.data, name).is_shared() for name in ARRAYS]


def first(samples: list[list[bool]]) -> list[bool]:
    return samples[0]


def test_spawned_workers_share_the_arrays(tmp_path: Path) -> None:
    data = read(write(tmp_path, [image()], [box()]))
    assert set(ARRAYS) == {name for name, value in vars(data).items() if isinstance(value, torch.Tensor)}
    loader = DataLoader(Shared(data), num_workers=1, multiprocessing_context="spawn", collate_fn=first)
    assert next(iter(loader)) == [True] * len(ARRAYS)


def test_no_object_an_annotation_is_kept(tmp_path: Path) -> None:
    few = read(write(tmp_path, [image()], [box(i) for i in range(10)]))
    many = read(write(tmp_path, [image()], [box(i) for i in range(1000)]))
    per_annotation = (len(pickle.dumps(many)) - len(pickle.dumps(few))) / 990
    assert per_annotation == pytest.approx(4 * 4 + 8 + 8 + 8 + 1, abs=0.1)  # box, label, id, area, crowd


class _OnlySkips(torch.utils.data.Dataset[None]):
    def __init__(self, data: CocoDetection) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> None:
        assert self.data.load(index) is None


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_skips_of_workers_are_seen_by_the_main_process(tmp_path: Path, context: str) -> None:
    file = write(tmp_path, [image(i) for i in range(1, 5)], [])
    for i in range(1, 5):
        break_picture(tmp_path / "images" / f"{i}.png")
    data = read(file, on_unreadable="skip")
    loader = DataLoader(_OnlySkips(data), num_workers=2, multiprocessing_context=context, collate_fn=collate)
    assert list(loader) == [([], [], [])] * 4
    assert data.skipped == ["1.png", "2.png", "3.png", "4.png"]


# --- missing files


def test_missing_image_folder_names_what_is_near(tmp_path: Path) -> None:
    file = write(tmp_path, [image()], [])
    with pytest.raises(FileNotFoundError) as raised:
        CocoDetection(tmp_path / "pictures", file)
    assert f"image folder {tmp_path / 'pictures'} does not exist" in str(raised.value)
    assert f"{tmp_path} holds the folders images" in str(raised.value)


def test_missing_annotation_file_names_the_json_files_near(tmp_path: Path) -> None:
    file = write(tmp_path, [image()], [])
    with pytest.raises(FileNotFoundError) as raised:
        CocoDetection(tmp_path / "images", tmp_path / "instance.json")
    assert f"{tmp_path / 'instance.json'} does not exist; {tmp_path} holds the .json files" in str(raised.value)
    assert file.name in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"is a folder; .* holds no \.json files"):
        CocoDetection(tmp_path / "images", tmp_path / "images")


def test_missing_images(tmp_path: Path) -> None:
    file = write(tmp_path, [image(i) for i in range(1, 10)] + [image(10, file_name="sub/a.png")], [])
    for i in range(1, 8):
        (tmp_path / "images" / f"{i}.png").unlink()
    message = refusal(file, FileNotFoundError)
    assert "7 of 10 images are not in" in message
    assert "1.png, 2.png, 3.png, 4.png, 5.png and 2 more; it holds 8.png, 9.png, sub" in message
    (tmp_path / "images" / "sub" / "a.png").unlink()
    (tmp_path / "images" / "sub").rmdir()
    assert "8 of 10 images" in refusal(file, FileNotFoundError)


# --- broken files


def test_broken_json_shows_the_place(tmp_path: Path) -> None:
    text = '{\n"images": [],\n"annotations": [}\n'
    message = refusal(write_text(tmp_path, text))
    assert f"instances.json is broken JSON at byte {text.index('}')}, line 3, near ..." in message
    assert '"annotations": [}' in message
    assert "invalid character" in message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("key", ["bbox", "area", "score"])
def test_nan_gets_a_sentence_of_its_own(tmp_path: Path, number: str, key: str) -> None:
    value = [1, 2, 3, float(number)] if key == "bbox" else float(number)
    message = refusal(write(tmp_path, [image()], [box(**{key: value})]))
    assert "instances.json is broken JSON at byte" in message
    assert f"{number.lstrip('-')}" in message.split("near")[1].split(": NaN and")[0]
    assert "NaN and Infinity are no JSON numbers, although Python writes them" in message


def test_cut_off_json(tmp_path: Path) -> None:
    file = write(tmp_path, [image()], [box()])
    text = file.read_text()[:-40]
    file.write_text(text)
    message = refusal(file)
    assert f"is cut off: the JSON does not end where the file does, after {len(text)} bytes" in message
    assert text[-20:] in message


def test_empty_file(tmp_path: Path) -> None:
    assert "instances.json is empty" in refusal(write_text(tmp_path, ""))


def test_not_utf8(tmp_path: Path) -> None:
    file = write(tmp_path, [image()], [])
    file.write_bytes(file.read_bytes().replace(b"1.png", b"\xff.png"))
    assert "is not UTF-8 text" in refusal(file)


def test_results_list(tmp_path: Path) -> None:
    message = refusal(write_text(tmp_path, '[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]'))
    assert "Expected `object`, got `array` at its top (a list of detections is a results file)" in message
    assert "an object with the keys images, annotations and categories" in message


def test_missing_keys(tmp_path: Path) -> None:
    message = refusal(write_text(tmp_path, '{"info": {}, "images": []}'))
    assert "instances.json has the keys info, images and lacks annotations, categories" in message


@pytest.mark.parametrize("value", [1.0, "1", None])
def test_image_id_of_another_type(tmp_path: Path, value: Any) -> None:
    message = refusal(write(tmp_path, [image(1), image(2, id=value)], []))
    kind = {float: "float", str: "str", type(None): "null"}[type(value)]
    assert f"Expected `int`, got `{kind}` - at `$.images[1].id`" in message


def test_ids_beyond_64_bits(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, [image(2**63)], []))
    assert "- at `$.images[0].id`" in message


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"bbox": [1, 2, 3]}, "Expected `array` of length 4 - at `$.annotations[1].bbox`"),
        ({"bbox": [1, 2, 3, 4, 5]}, "Expected `array` of length 4 - at `$.annotations[1].bbox`"),
        ({"bbox": [1, 2, 3, "4"]}, "Expected `float`, got `str` - at `$.annotations[1].bbox[3]`"),
        ({"image_id": 1.0}, "Expected `int`, got `float` - at `$.annotations[1].image_id`"),
    ],
)
def test_annotation_of_wrong_form(tmp_path: Path, wrong: dict[str, Any], reason: str) -> None:
    message = refusal(write(tmp_path, [image()], [box(1), box(2, **wrong), box(3)]))
    assert "instances.json: 1 annotations cannot be read; each needs id, image_id, category_id" in message
    assert message.endswith(f"The first:\n- {reason}")


def test_annotations_without_bbox(tmp_path: Path) -> None:
    annotations = [{key: value for key, value in box(i).items() if key != "bbox"} for i in range(9)]
    message = refusal(write(tmp_path, [image()], annotations))
    assert "9 annotations cannot be read; each needs id, image_id, category_id and bbox" in message
    assert "\n- Object missing required field `bbox` - at `$.annotations[0]`\n" in message
    assert message.count("missing required field") == 5


# --- values that contradict each other


@pytest.mark.parametrize(
    ("images", "annotations", "categories", "mistake"),
    [
        ([], [], CATEGORIES, "it lists no images"),
        ([image()], [], [], "it lists no categories"),
        ([image(1), image(2), image(1)], [], CATEGORIES, "1 images: the id was used before"),
        ([image()], [], CATEGORIES + CATEGORIES, "2 categories: the id was used before"),
        ([image()], [box(5), box(5)], CATEGORIES, "1 annotations: the id was used before"),
        ([image()], [box(4), box(5, image_id=9)], CATEGORIES, "1 annotations: image_id names no image"),
        ([image()], [box(5, category_id=1)], CATEGORIES, "1 annotations: category_id names no category"),
        ([image()], [box(5, bbox=[1, 2, 3, -4])], CATEGORIES, "bbox must not be negative (ids 5)"),
        ([image()], [box(5, bbox=[1, 2, 3e39, 4])], CATEGORIES, "bbox must be within ± 1e+09 pixels (ids 5)"),
        ([image(1, width=0)], [], CATEGORIES, "1 images: width and height must be positive (ids 1)"),
        ([image(1, height=-3, width=-3)], [], CATEGORIES, "width and height must be positive (ids 1)"),
        ([image(file_name="/x.png")], [], CATEGORIES, "stay in the image folder (/x.png)"),
        ([image(file_name="../x.png")], [], CATEGORIES, "stay in the image folder (../x.png)"),
        ([image(file_name="../a/../../x.png")], [], CATEGORIES, "stay in the image folder (../a/../../x.png)"),
    ],
)
def test_contradiction(tmp_path: Path, images: Any, annotations: Any, categories: Any, mistake: str) -> None:
    message = refusal(write(tmp_path, images, annotations, categories))
    assert "instances.json is no valid COCO instances file:\n- " in message
    assert mistake in message


def test_all_contradictions_are_told_together_with_the_first_ids(tmp_path: Path) -> None:
    annotations = [box(i, image_id=99) for i in range(20, 28)] + [box(1, category_id=5)]
    message = refusal(write(tmp_path, [image(1), image(1)], annotations))
    assert message.split("\n")[1:] == [
        "- 1 images: the id was used before; ids must be unique (ids 1)",
        "- 8 annotations: image_id names no image of the file (ids 20, 21, 22, 23, 24 and 3 more)",
        "- 1 annotations: category_id names no category of the file (ids 1)",
    ]


def test_number_out_of_range(tmp_path: Path) -> None:
    file = write(tmp_path, [image()], [box(bbox=[1, 2, 3, 12345])])
    file.write_text(file.read_text().replace("12345", "1e999"))
    assert "Number out of range" in refusal(file)
