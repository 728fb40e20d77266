"""Files of results: COCO's published numbers from its own files, the way there and back, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from resnest_det.data import read_coco_targets
from resnest_det.evaluation import CocoMeanAveragePrecision, read_coco_results, write_coco_results
from tests.benchmarks import coco_evaluation
from tests.evaluation.test_coco_map import by_pycocotools, classes_of, metric_of, random_case

HAS_HOTCOCO = importlib.util.find_spec("hotcoco") is not None
BACKENDS = [
    "pycocotools",
    pytest.param("hotcoco", marks=pytest.mark.skipif(not HAS_HOTCOCO, reason="hotcoco is not installed")),
]
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
WIDTH, HEIGHT = 6, 5

Json = dict[str, Any]

# pycocotools' extension module answers NumPy's newer protocol in an older way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def score(truth: Path, found: Path, *, masks: bool, backend: Any = "pycocotools") -> dict[str, float]:
    """The numbers of a file of results."""
    ground_truth = read_coco_targets(truth, masks=masks)
    image_ids = [target["image_id"] for target in ground_truth.targets]
    predictions = read_coco_results(found, image_ids=image_ids, labels=ground_truth.labels, masks=masks)
    metric = CocoMeanAveragePrecision(ground_truth.class_names, masks=masks, backend=backend)
    metric.update([predictions[image_id] for image_id in image_ids], ground_truth.targets)
    return metric.compute()


def detection(**changes: Any) -> Json:
    return {"image_id": 7, "category_id": 90, "bbox": [1.5, 2, 3, 2.25], "score": 0.5} | changes


def segmentation(compressed: bool = True) -> Json:
    """Three pixels of the second column, rows 1 to 3."""
    if not compressed:
        return {"size": [HEIGHT, WIDTH], "counts": [6, 3, 21]}
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[1:4, 1] = 1
    return {"size": [HEIGHT, WIDTH], "counts": coco_mask.encode(mask)["counts"].decode()}


def without(key: str, **changes: Any) -> Json:
    return {name: value for name, value in detection(**changes).items() if name != key}


def written(folder: Path, detections: Any) -> Path:
    path = folder / "found.json"
    path.write_text(json.dumps(detections))
    return path


def read(folder: Path, *detections: Json, **arguments: Any) -> dict[int, Json]:
    """The predictions for the images 7 and 9 in the file's categories 40 and 90, labels 1 and 2."""
    return read_coco_results(written(folder, detections), image_ids=[9, 7], labels={40: 1, 90: 2}, **arguments)


def refusal(folder: Path, *detections: Json, **arguments: Any) -> str:
    with pytest.raises(ValueError, match=r"found\.json") as raised:
        read(folder, *detections, **arguments)
    return str(raised.value)


# --- COCO's own check of its evaluator


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_published_numbers(kind: str, backend: str, real_data: Callable[[str], Path]) -> None:
    folder = real_data("coco_eval_reference")
    report = (folder / "val2014_fake_eval_res.txt").read_text().split(f"type={kind}")[1].split("type=")[0]
    published = re.findall(r"= (\d\.\d{3})$", report, flags=re.MULTILINE)
    assert len(published) == 12
    truth, found = folder / "instances_val2014_100.json", folder / f"instances_val2014_fake{kind}100_results.json"
    numbers = score(truth, found, masks=kind == "segm", backend=backend)
    prefix = "mask_" if kind == "segm" else ""
    assert [f"{numbers[prefix + name]:.3f}" for name in NAMES] == published
    oracle = by_pycocotools(truth, found, kind)
    assert [numbers[prefix + name] for name in NAMES] == pytest.approx(oracle.stats.tolist(), abs=1e-9)


# --- there and back


@pytest.mark.parametrize("seed", range(2))
def test_what_is_written_is_read_back(seed: int, tmp_path: Path) -> None:
    truth, found = random_case(seed)
    metric = metric_of(truth, found, torch.float32, masks=True)
    category_ids = {one["id"]: 1000 - one["id"] for one in truth["categories"]}
    write_coco_results(tmp_path / "found.json", metric.results_json(category_ids))

    labels = {category_id: label for label, category_id in category_ids.items()}
    predictions = read_coco_results(tmp_path / "found.json", image_ids=metric.images, labels=labels, masks=True)
    again = classes_of(truth, masks=True)
    targets = [
        {
            "image_id": image_id,
            "boxes": np.hstack(
                (image.true_boxes_xywh[:, :2], image.true_boxes_xywh[:, :2] + image.true_boxes_xywh[:, 2:])
            ),
            "labels": image.true_labels,
            "area": image.true_areas,
            "iscrowd": image.true_crowds,
            "masks": image.true_masks,
        }
        for image_id, image in metric.images.items()
    ]
    again.update([predictions[image_id] for image_id in metric.images], targets)
    for image_id, image in metric.images.items():
        for name in ("found_boxes_xywh", "found_labels", "found_scores", "found_masks"):
            assert np.array_equal(getattr(again.images[image_id], name), getattr(image, name))
    assert again.compute() == metric.compute()


def test_results_are_in_coco_s_format_by_rising_image_id() -> None:
    metric = CocoMeanAveragePrecision({1: "cat", 2: "dog"})
    for image_id, label in ((9, 2), (4, 1)):
        boxes, labels = torch.tensor([[1.0, 2.0, 4.0, 2.5]]), torch.tensor([label])
        found = {"boxes": boxes, "labels": labels, "scores": torch.tensor([0.25])}
        metric.update([found], [{"image_id": image_id, "boxes": boxes, "labels": labels}])
    assert metric.results_json({1: 40, 2: 90}) == [
        {"image_id": 4, "category_id": 40, "bbox": [1.0, 2.0, 3.0, 0.5], "score": 0.25},
        {"image_id": 9, "category_id": 90, "bbox": [1.0, 2.0, 3.0, 0.5], "score": 0.25},
    ]
    with pytest.raises(ValueError, match=r"category_ids has no id for the label 2, only for \[1\]"):
        metric.results_json({1: 40})


def test_predictions_of_every_image_in_the_file_s_order(tmp_path: Path) -> None:
    found = read(tmp_path, detection(score=0.25), detection(category_id=40, bbox=[0, 0, 1, 1], extra="ignored"))
    assert list(found) == [9, 7]
    assert found[7]["boxes"].tolist() == [[1.5, 2.0, 4.5, 4.25], [0.0, 0.0, 1.0, 1.0]]
    assert found[7]["labels"].tolist() == [2, 1]
    assert found[7]["scores"].tolist() == [0.25, 0.5]
    assert [found[9][key].shape for key in ("boxes", "labels", "scores")] == [(0, 4), (0,), (0,)]
    assert "masks" not in found[7]


@pytest.mark.parametrize("compressed", [True, False])
def test_a_detection_without_a_box_gets_the_one_around_its_mask(compressed: bool, tmp_path: Path) -> None:
    masked = without("bbox", segmentation=segmentation(compressed))
    for masks in (False, True):
        found = read(tmp_path, detection(segmentation=segmentation(compressed)), masked, masks=masks)[7]
        assert found["boxes"].tolist() == [[1.5, 2.0, 4.5, 4.25], [1.0, 1.0, 2.0, 4.0]]
        assert found["boxes_xywh"].tolist() == [[1.5, 2.0, 3.0, 2.25], [1.0, 1.0, 1.0, 3.0]]
        assert ("masks" in found) == masks
    found = read(tmp_path, masked, masks=True)
    assert found[7]["masks"] == [segmentation() | {"counts": segmentation()["counts"].encode()}]
    assert found[9]["masks"] == []


@pytest.mark.parametrize("masks", [False, True])
def test_an_empty_box_is_none(masks: bool, tmp_path: Path) -> None:
    empty = detection(bbox=[], segmentation=segmentation())
    found = read(tmp_path, detection(segmentation=segmentation()), empty, masks=masks)[7]
    assert found["boxes"].tolist() == [[1.5, 2.0, 4.5, 4.25], [1.0, 1.0, 2.0, 4.0]]
    assert "bbox and segmentation are missing; one is needed (detection 0)" in refusal(tmp_path, detection(bbox=[]))
    with pytest.warns(UserWarning, match="holds no detection"):
        assert read_coco_results(written(tmp_path, []), image_ids=[], labels={}) == {}


def test_ids_that_are_whole_floats(tmp_path: Path) -> None:
    floats = detection(image_id=7.0, category_id=40.0, segmentation=segmentation())
    found = read(tmp_path, detection(segmentation=segmentation()), floats, masks=True)[7]
    assert found["labels"].tolist() == [2, 1]
    assert found["masks"][0] == found["masks"][1]
    message = refusal(tmp_path, floats, detection(image_id=7.5), detection(image_id=7.0, bbox=[1]))
    assert "2 of 3 detections cannot be read" in message
    assert "\n- detection 1: Expected `int`, got `float` - at `$.image_id`" in message
    assert "\n- detection 2: Expected `array` of length 4" in message


def test_a_byte_order_mark(tmp_path: Path) -> None:
    file = written(tmp_path, [detection()])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_coco_results(file, image_ids=[7], labels={90: 1})[7]["boxes"]) == 1


def coco_files(folder: Path, boxes: list[list[float]], detections: list[Json]) -> tuple[Path, Path]:
    """An annotation file with these objects of category 90 in image 7, and a file of results."""
    annotations = [
        {
            "id": number,
            "image_id": 7,
            "category_id": 90,
            "bbox": bbox,
            "area": bbox[2] * bbox[3],
            "iscrowd": 0,
            "segmentation": segmentation(),
        }
        for number, bbox in enumerate(boxes, start=1)
    ]
    image = {"id": 7, "file_name": "7.png", "width": WIDTH, "height": HEIGHT}
    categories = [{"id": 90, "name": "thing"}]
    truth = folder / "truth.json"
    truth.write_text(json.dumps({"images": [image], "annotations": annotations, "categories": categories}))
    return truth, written(folder, detections)


@pytest.mark.parametrize("masks", [False, True])
def test_a_file_without_detections_scores_0(masks: bool, tmp_path: Path) -> None:
    metric = CocoMeanAveragePrecision({1: "thing"}, masks=masks)
    nothing: Json = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    one: Json = {"image_id": 7, "boxes": torch.tensor([[1.0, 1, 3, 3]]), "labels": torch.tensor([1])}
    metric.update([nothing | {"masks": []}], [one | {"masks": [segmentation()]}])
    truth, found = coco_files(tmp_path, [[1, 1, 2, 2]], [])
    write_coco_results(found, metric.results_json({1: 90}))
    with pytest.warns(UserWarning, match=r"found\.json holds no detection, .* score threshold") as warned:
        numbers = score(truth, found, masks=masks)
    assert warned[0].filename == __file__
    for prefix in ("", "mask_") if masks else ("",):
        assert [numbers[prefix + name] for name in ("AP", "AP50", "APs", "AR100")] == [0.0] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_on_a_border_are_those_of_the_file(backend: str, tmp_path: Path) -> None:
    # 1024 pixels² are small and medium, but not where 132.3 - 100.3 is taken for the width of 32.
    sizes = [(32, 32), (16, 64), (64, 16), (8, 128)]
    boxes = [[100.3 + 200.1 * n, 57.1 + 33.7 * n, float(w), float(h)] for n, (w, h) in enumerate(sizes * 3)]
    false = [[x + 5000.7, y, w, h] for x, y, w, h in boxes]
    found = [detection(bbox=box, score=0.9 - 0.01 * n) for n, box in enumerate([*false, *boxes])]
    truth, results = coco_files(tmp_path, boxes, found)
    numbers, oracle = score(truth, results, masks=False, backend=backend), by_pycocotools(truth, results, "bbox")
    assert [numbers[name] for name in NAMES] == pytest.approx(oracle.stats.tolist(), abs=1e-12)
    ground_truth = read_coco_targets(truth)
    predictions = read_coco_results(results, image_ids=[7], labels=ground_truth.labels)
    assert ground_truth.targets[0]["boxes_xywh"].tolist() == boxes
    assert predictions[7]["boxes_xywh"].tolist() == [*false, *boxes]
    metric = CocoMeanAveragePrecision(ground_truth.class_names)
    metric.update([predictions[7]], ground_truth.targets)
    assert [one["bbox"] for one in metric.results_json({1: 90})] == [*false, *boxes]


def test_segmentations_are_not_looked_at_without_masks(tmp_path: Path) -> None:
    assert len(read(tmp_path, detection(segmentation="nonsense"))[7]["boxes"]) == 1


def test_the_benchmark_leaves_out_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coco_evaluation.PACKAGES.keys() == coco_evaluation.WAYS.keys()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "faster_coco_eval" else name)
    assert coco_evaluation.installed_ways() == [way for way in coco_evaluation.WAYS if way != "faster-coco-eval"]
    assert capsys.readouterr().out == "faster-coco-eval is left out: faster_coco_eval is not installed\n\n"


# --- mistakes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (detection(image_id=8), "image_id names no image of the annotation file (detection 1: 8)"),
        (detection(category_id=3), "category_id is none of the annotation file's 2 (ids 40, 90) (detection 1: 3)"),
        (detection(bbox=[5, 5, 3, -2]), "must not be negative; convert corners (detection 1: [5.0, 5.0, 3.0, -2.0])"),
        (detection(bbox=[2e9, 5, 3, 2]), "bbox must be within ± 1e+09 pixels (detection 1: [2000000000.0, 5.0, 3.0"),
        (without("bbox"), "bbox and segmentation are missing; one is needed (detection 1)"),
        (without("bbox", segmentation=[[1, 2, 3]]), "segmentation must be run lengths, {"),
        (without("bbox", segmentation={"size": [5, 6]}), "Object missing required field `counts`"),
        (
            without("bbox", segmentation={"size": [5, 6], "counts": [1, 2]}),
            "add up to height x width (detection 1: [1, 2])",
        ),
        (without("bbox", segmentation={"size": [5, 6], "counts": "oo"}), "add up to height x width (detection 1: oo)"),
    ],
)
def test_wrong_detections(wrong: Json, message: str, tmp_path: Path) -> None:
    told = refusal(tmp_path, detection(), wrong)
    assert "is no file of results for these annotations; detections count from 0:\n- 1 of 2 detections: " in told
    assert message in told


def test_masks_need_segmentations(tmp_path: Path) -> None:
    message = refusal(tmp_path, *[detection()] * 7, masks=True)
    assert "7 of 7 detections: masks need a segmentation (detection 0, detection 1, detection 2" in message
    assert "detection 4 and 2 more)" in message


def test_all_mistakes_are_told_together(tmp_path: Path) -> None:
    wrong = [detection(image_id=1), detection(category_id=1), detection(bbox=[0, 0, -1, 1]), without("bbox")]
    assert refusal(tmp_path, *wrong).count("\n- 1 of 4 detections: ") == 4


def test_labels_in_place_of_category_ids(tmp_path: Path) -> None:
    hint = "labels, which count the categories from 1, must be turned into the file's ids"
    assert hint in refusal(tmp_path, detection(category_id=1), detection(category_id=2))
    assert hint not in refusal(tmp_path, detection(category_id=1), detection())


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (without("score"), "Object missing required field `score`"),
        (without("image_id"), "Object missing required field `image_id`"),
        (detection(score="high"), "Expected `float`, got `str` - at `$.score`"),
        (detection(bbox=[1, 2, 3]), "Expected `array` of length 4 - at `$.bbox`"),
        (detection(bbox=[1, 2, None, 4]), "Expected `float`, got `null` - at `$.bbox[2]`"),
        (detection(score=123456), "Number out of range - at `$.score`"),
        (detection(category_id="dog"), "Expected `int`, got `str` - at `$.category_id`"),
        ([1, 2], "Expected `object`, got `array`"),
    ],
)
def test_detections_of_another_form(wrong: Any, reason: str, tmp_path: Path) -> None:
    file = written(tmp_path, [detection(), wrong])
    file.write_text(file.read_text().replace("123456", "1e999"))  # which is no float
    with pytest.raises(ValueError, match=r"found\.json") as raised:
        read_coco_results(file, image_ids=[7], labels={90: 1})
    message = str(raised.value)
    assert "1 of 2 detections cannot be read; each needs image_id, category_id, score and bbox" in message
    assert message.endswith(f"\n- detection 1: {reason}")


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
@pytest.mark.parametrize("key", ["bbox", "score"])
def test_numbers_that_json_does_not_have(number: str, key: str, tmp_path: Path) -> None:
    value = [1, 2, 3, float(number)] if key == "bbox" else float(number)
    message = refusal(tmp_path, detection(**{key: value}))
    assert "found.json is broken JSON at byte" in message
    assert "NaN and Infinity are no JSON numbers, although Python writes them" in message


@pytest.mark.parametrize("start", ['{"info": ', '{"annotations": [', "[5, "])
def test_annotations_nested_too_deeply(start: str, tmp_path: Path) -> None:
    file = tmp_path / "truth.json"
    file.write_text(start + "[" * 100_000)
    if start == "[5, ":
        message = r"truth\.json: Expected `object`, got `array` at its top"
    else:
        message = r"truth\.json nests lists or objects too deeply to be read"
    with pytest.raises(ValueError, match=message):
        read_coco_targets(file)


def test_other_files(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    arguments: Json = {"image_ids": [7], "labels": {90: 1}}
    for text, message in (
        ("", r"found\.json is empty; it should be a file of results"),
        ("[" * 100_000, r"found\.json nests lists or objects too deeply to be read"),
        ("[5, " + "[" * 100_000, r"found\.json nests lists or objects too deeply to be read"),
        ('{"annotations": []}', r"Expected `array`, got `object` at its top \(an object with annotations is an"),
        ("[{", r"found\.json is cut off"),
        ("[1}", r"found\.json is broken JSON at byte 2, line 1"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_coco_results(file, **arguments)
    with pytest.raises(FileNotFoundError, match=r"the file of results .*none\.json does not exist; give the JSON file"):
        read_coco_results(tmp_path / "none.json", **arguments)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_coco_results(tmp_path, **arguments)
