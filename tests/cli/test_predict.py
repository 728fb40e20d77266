"""The command predict: what it finds, draws and writes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from resnest_det.cli import main, predict
from resnest_det.data.files import read_rgb
from resnest_det.data.videos import VideoReader
from resnest_det.predictor import Predictor
from tests.test_predictor import NAMES, pixels, write_run


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("detector"), "det")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("segmenter"), "seg")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two folders; one image's name is in both, and one file is broken."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("ants/1.png", "ants/2.jpg", "bees/1.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(60 + number, 80, number)).save(folder / name)
    return folder


def write_video(path: Path, num_frames: int = 5, fourcc: str = "mp4v") -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 10.0, (96, 64))
    assert writer.isOpened()
    for number in range(num_frames):
        writer.write(np.full((64, 96, 3), (0, 40 * number, 200), np.uint8))
    writer.release()
    return path


def run(*arguments: object) -> int:
    return main(["predict", *map(str, arguments), "--device", "cpu"])


def read_results(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "predictions.json").read_text(encoding="utf-8"))
    return content


def test_a_folder(detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert run(detector, photos, "--output", output, "--score-threshold", 0.3) == 0
    results = read_results(output)
    assert results["task"] == "detection"
    assert results["score_threshold"] == 0.3
    assert results["class_names"] == {str(label): name for label, name in NAMES.items()}
    assert results["videos"] == results["skipped"] == []
    names = ["ants/1.png", "ants/2.jpg", "bees/1.png"]
    assert [image["file"] for image in results["images"]] == [str(photos / name) for name in names]
    assert [image["picture"] for image in results["images"]] == [f"pictures/{name}" for name in names]

    predictor = Predictor.from_checkpoint(detector, score_threshold=0.3)
    num_found = 0
    for image, name in zip(results["images"], names, strict=True):
        original = read_rgb(photos / name, 0, 0)
        assert (image["height"], image["width"]) == original.shape[:2]
        expected = predictor(original)
        assert [found["label"] for found in image["detections"]] == expected["labels"].tolist()
        assert [found["class_name"] for found in image["detections"]] == [NAMES[i] for i in expected["labels"].tolist()]
        boxes = np.array([found["box_xyxy"] for found in image["detections"]]).reshape(-1, 4)
        np.testing.assert_allclose(boxes, expected["boxes"], atol=0.006)
        np.testing.assert_allclose([found["score"] for found in image["detections"]], expected["scores"], atol=6e-5)
        picture = np.asarray(Image.open(output / image["picture"]))
        drawn = predictor.draw(original, expected)
        assert picture.shape == drawn.shape
        if name.endswith(".png"):
            np.testing.assert_array_equal(picture, drawn)
        else:
            assert np.abs(picture.astype(int) - drawn).mean() < 3
        num_found += len(boxes)
    assert num_found > 0
    printed = capsys.readouterr()
    assert printed.err == "faster_rcnn on resnet18, 3 classes; scores from 0.3; cpu\n"
    assert printed.out.startswith(f"3 images; {num_found} detections in the images: ")


def test_scores_from_one_half_by_default(detector: Path, photos: Path, tmp_path: Path) -> None:
    assert run(detector, photos / "ants", "--output", tmp_path / "out") == 0
    results = read_results(tmp_path / "out")
    assert results["score_threshold"] == 0.5
    assert all(found["score"] >= 0.5 for image in results["images"] for found in image["detections"])


def test_the_json_has_a_line_for_each_detection(detector: Path, photos: Path, tmp_path: Path) -> None:
    run(detector, photos, "--output", tmp_path / "out", "--score-threshold", 0)
    lines = (tmp_path / "out" / "predictions.json").read_text().splitlines()
    found = [line for line in lines if '"box_xyxy"' in line]
    assert len(found) == sum(len(image["detections"]) for image in read_results(tmp_path / "out")["images"])
    assert all(line.strip().startswith('{"label": ') and line.rstrip(",").endswith("]}") for line in found)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches(batch_size: int, detector: Path, photos: Path, tmp_path: Path) -> None:
    assert run(detector, photos, "--output", tmp_path / "out", "--batch-size", batch_size) == 0
    assert len(read_results(tmp_path / "out")["images"]) == 3


def test_segmentation(segmenter: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert run(segmenter, photos / "ants", photos / "bees", "--output", output) == 0
    results = read_results(output)
    assert "score_threshold" not in results
    predictor = Predictor.from_checkpoint(segmenter)
    assert [image["mask"] for image in results["images"]] == [
        "masks/ants/1.png",
        "masks/ants/2.png",
        "masks/bees/1.png",
    ]
    for image in results["images"]:
        labels = predictor(image["file"])["out"].numpy()
        mask = Image.open(output / image["mask"])
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), labels)
        shares = {found["label"]: found["share"] for found in image["classes"]}
        assert shares == {int(label): pytest.approx((labels == label).mean(), abs=1e-6) for label in np.unique(labels)}
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert {found["class_name"] for found in image["classes"]} <= {"wall", "sky", "tree"}
        assert (output / image["picture"]).is_file()
    shares = [found for image in results["images"] for found in image["classes"]]
    wall = sum(found["share"] for found in shares if found["class_name"] == "wall") / 3
    assert re.search(rf"^3 images: .*\bwall {wall:.0%}", capsys.readouterr().out)


def test_masks_are_run_lengths(photos: Path, tmp_path: Path) -> None:
    model = write_run(tmp_path / "run", "det", "model.detector=mask_rcnn", "model.mask_head_channels=8")
    assert run(model, photos / "bees", "--output", tmp_path / "out", "--score-threshold", 0) == 0
    (image,) = read_results(tmp_path / "out")["images"]
    expected = Predictor.from_checkpoint(model)(photos / "bees" / "1.png")
    assert len(image["detections"]) == len(expected["masks"]) > 0
    for found, mask in zip(image["detections"], expected["masks"], strict=True):
        np.testing.assert_array_equal(coco_mask.decode(found["mask"]), mask)


def test_no_pictures(detector: Path, photos: Path, tmp_path: Path) -> None:
    assert run(detector, photos, "--output", tmp_path / "out", "--no-pictures") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]
    assert "picture" not in read_results(tmp_path / "out")["images"][0]


def test_patterns_and_files_share_a_folder(detector: Path, photos: Path, tmp_path: Path) -> None:
    assert run(detector, photos / "*" / "1.*", "--output", tmp_path / "out") == 0
    assert [image["picture"] for image in read_results(tmp_path / "out")["images"]] == [
        "pictures/ants/1.png",
        "pictures/bees/1.png",
    ]
    assert run(detector, photos / "bees" / "1.png", "--output", tmp_path / "one") == 0
    assert [image["picture"] for image in read_results(tmp_path / "one")["images"]] == ["pictures/1.png"]


def test_names_that_differ_in_their_suffix(segmenter: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.tif", "c.gif"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels(20, 30)).save(tmp_path / "photos" / name)
    files = sorted((tmp_path / "photos").iterdir())
    assert run(segmenter, *files, "--output", tmp_path / "out") == 0
    images = read_results(tmp_path / "out")["images"]
    pictures = ["pictures/a.jpg", "pictures/a.png", "pictures/b.tif", "pictures/c.gif.png"]
    assert [image["picture"] for image in images] == pictures
    assert [image["mask"] for image in images] == ["masks/a.jpg.png", "masks/a.png.png", "masks/b.png", "masks/c.png"]


def test_names_that_would_collide(detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("c.gif", "c.gif.png"):
        Image.fromarray(pixels(20, 30)).save(tmp_path / name)
    assert run(detector, tmp_path / "c.gif", tmp_path / "c.gif.png", "--output", tmp_path / "out") == 2
    assert "c.gif and" in (message := capsys.readouterr().err)
    assert "would both be written to pictures/c.gif.png" in message
    assert not (tmp_path / "out").exists()


def test_own_pictures_are_not_predicted_again(detector: Path, photos: Path) -> None:
    for _ in range(2):
        assert run(detector, photos, "--output", photos / "out") == 0
        results = read_results(photos / "out")
        assert [image["picture"] for image in results["images"]] == [
            "pictures/ants/1.png",
            "pictures/ants/2.jpg",
            "pictures/bees/1.png",
        ]


def test_inputs_are_never_replaced(
    detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    mine = (photos / "ants" / "1.png").rename(tmp_path / "pictures" / "1.png")
    content = mine.read_bytes()
    assert run(detector, mine, "--output", tmp_path) == 2
    assert f"error: --output {tmp_path} would replace the input {mine}; name another" in capsys.readouterr().err
    assert run(detector, photos, "--output", tmp_path) == 2
    assert f"error: --output {tmp_path} holds other things than predictions" in capsys.readouterr().err
    assert mine.read_bytes() == content
    assert run(detector, photos, "--output", mine) == 2
    assert f"error: --output {mine} is a file; name a folder" in capsys.readouterr().err


def test_unreadable_images_are_skipped(
    detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bees" / "0.jpg").write_text("no image")
    (photos / "clip.mp4").write_text("no video")
    assert run(detector, photos, "--output", tmp_path / "out") == 1
    results = read_results(tmp_path / "out")
    assert len(results["images"]) == 3
    assert [skipped["file"] for skipped in results["skipped"]] == [
        str(photos / "bees" / "0.jpg"),
        str(photos / "clip.mp4"),
    ]
    printed = capsys.readouterr().err
    assert f"skipped: cannot read the image {photos / 'bees' / '0.jpg'} (Unidentified" in printed
    assert f"skipped: cannot read the video {photos / 'clip.mp4'}: OpenCV finds no frame" in printed
    assert not (tmp_path / "out" / "pictures" / "bees" / "0.jpg").exists()
    assert not (tmp_path / "out" / "frames").exists()


@pytest.mark.parametrize("place", ["frames/clip.png", "frames/clip.jsonl", "predictions.json"])
def test_legends_frames_and_results_replace_no_input(
    place: str, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    mine = tmp_path / place
    mine.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels(20, 30)).save(mine, "png")
    content = mine.read_bytes()
    (tmp_path / "predictions.json").touch()
    assert run(detector, clip, mine, "--output", tmp_path) == 2
    assert f"error: --output {tmp_path} would replace the input {mine}; name another" in capsys.readouterr().err
    assert mine.read_bytes() == content


def test_what_is_too_long_is_skipped(
    detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = photos / "ants" / "0.png"
    Image.fromarray(pixels(1, 4000)).save(long)
    assert run(detector, photos, "--output", tmp_path / "out") == 1
    results = read_results(tmp_path / "out")
    assert len(results["images"]) == 3
    assert [skipped["file"] for skipped in results["skipped"]] == [str(long)]
    assert f"skipped: {long}: an image is 4000 x 1 pixels: resized to a long side" in capsys.readouterr().err


def test_a_video_that_cannot_be_written_has_its_frames_in_json(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr("resnest_det.data.videos._CODEC", "none")
    assert run(detector, clip, "--output", tmp_path / "out", "--batch-size", 2) == 1
    results = read_results(tmp_path / "out")
    (video,), (skipped,) = results["videos"], results["skipped"]
    assert "picture" not in video
    assert len((tmp_path / "out" / video["frames"]).read_text().splitlines()) == video["num_frames"] == 5
    assert skipped["file"] == str(clip)
    assert skipped["reason"].startswith(f"{clip}: the video {tmp_path / 'out' / 'pictures' / 'clip.mp4'} of ")
    assert f"skipped: {clip}: " in capsys.readouterr().err


def test_nothing_can_be_read(detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.jpg").write_text("no image")
    assert run(detector, tmp_path / "0.jpg", "--output", tmp_path / "out") == 1
    assert capsys.readouterr().out.startswith("0 images\n")


@pytest.mark.parametrize(
    ("suffix", "fourcc"), [(".mp4", "mp4v"), (".avi", "MJPG"), (".mov", "mp4v"), (".mkv", "mp4v"), (".webm", "VP80")]
)
def test_a_video(suffix: str, fourcc: str, detector: Path, tmp_path: Path) -> None:
    clip = write_video(tmp_path / f"clip{suffix}", fourcc=fourcc)
    assert run(detector, clip, "--output", tmp_path / "out", "--score-threshold", 0, "--batch-size", 2) == 0
    results = read_results(tmp_path / "out")
    assert results["images"] == []
    (video,) = results["videos"]
    assert video == {
        "file": str(clip),
        "width": 96,
        "height": 64,
        "num_frames": 5,
        "frames_per_second": 10.0,
        "frames": "frames/clip.jsonl",
        "picture": "pictures/clip.mp4",
    }
    lines = [json.loads(line) for line in (tmp_path / "out" / video["frames"]).read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(5))
    assert [line["seconds"] for line in lines] == [0, 0.1, 0.2, 0.3, 0.4]

    predictor = Predictor.from_checkpoint(detector, score_threshold=0)
    with VideoReader(clip) as original, VideoReader(tmp_path / "out" / video["picture"]) as drawn:
        assert drawn.frames_per_second == pytest.approx(10)
        pairs = list(zip(original, drawn, strict=True))
    assert len(pairs) == 5
    for line, (frame, picture) in zip(lines, pairs, strict=True):
        prediction = predictor(frame)
        assert [found["label"] for found in line["detections"]] == prediction["labels"].tolist()
        assert np.abs(predictor.draw(frame, prediction).astype(int) - picture).mean() < 12


def test_a_segmented_video(segmenter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = write_video(tmp_path / "clip.mp4", num_frames=3)
    assert run(segmenter, clip, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("1 video of 3 frames\n")
    (video,) = read_results(tmp_path / "out")["videos"]
    lines = [json.loads(line) for line in (tmp_path / "out" / video["frames"]).read_text().splitlines()]
    assert all(sum(found["share"] for found in line["classes"]) == pytest.approx(1, abs=1e-4) for line in lines)
    with VideoReader(tmp_path / "out" / video["picture"]) as drawn:
        assert [picture.shape for picture in drawn] == [(64, 96, 3)] * 3
    assert Image.open(tmp_path / "out" / video["legend"]).width >= 120


def test_interrupted(
    detector: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was predicted before Ctrl-C stays, and the folder can be used again."""
    original = predict._predict_images

    def until_the_third(*arguments: Any, **options: Any) -> None:
        if len(arguments[3]["images"]) == 2:
            raise KeyboardInterrupt
        original(*arguments, **options)

    monkeypatch.setattr(predict, "_predict_images", until_the_third)
    assert run(detector, photos, "--output", tmp_path / "out", "--batch-size", 1) == 130
    assert "stopped" in capsys.readouterr().err
    assert len(read_results(tmp_path / "out")["images"]) == 2
    monkeypatch.setattr(predict, "_predict_images", original)
    assert run(detector, photos, "--output", tmp_path / "out") == 0
    assert len(read_results(tmp_path / "out")["images"]) == 3


def test_foreign_weights(detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.load(detector / "best.pt", weights_only=True)["model"], tmp_path / "state.pt")
    command = [tmp_path / "state.pt", photos, "--output", tmp_path / "out"]
    assert run(*command) == 2
    assert "give config= (--config), a file of the model's settings, and class_names=" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert run(*command, "--config", detector / "config.toml", "--classes", tmp_path / "names.txt") == 0
    assert read_results(tmp_path / "out")["class_names"] == {"1": "a", "2": "b", "3": "c"}


def test_mistakes(
    detector: Path, segmenter: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    mistakes: list[tuple[list[object], str]] = [
        ([detector, tmp_path / "empty"], f"{tmp_path / 'empty'} holds no images; they end in .jpg"),
        ([detector, photos / "*.jpg"], f"no image matches {photos / '*.jpg'}; images end in .jpg"),
        ([detector, photos / "3.png"], f"there is no image or folder {photos / '3.png'}"),
        ([tmp_path / "none", photos], f"there is no run folder or checkpoint {tmp_path / 'none'}"),
        ([detector, photos, "--batch-size", 0], "--batch-size is 0, expected at least 1"),
        ([detector, photos, "--score-threshold", 2], "score_threshold is 2.0, expected 0 to 1"),
        ([segmenter, photos, "--score-threshold", 0.5], "score_threshold is 0.5, and a segmentation model"),
    ]
    for arguments, message in mistakes:
        assert run(*arguments, "--output", tmp_path / "out") == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
