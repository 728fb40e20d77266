"""`resnest-det attention`, from its words to its files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnest_det import create_backbone
from resnest_det.attention import class_score, grad_cam
from resnest_det.build import build_detector, build_segmenter
from resnest_det.cli import main
from resnest_det.cli.attention import _names
from resnest_det.config import DetectionSettings, SegmentationSettings, load_settings, settings_as_data
from resnest_det.engine.checkpoint import save_checkpoint
from tests.random_norms import randomise_norms
from tests.tiny_configs import write_detection_config, write_segmentation_config

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(pixels).resize((120, 90)).save(path)
    return path


def save_classifier(folder: Path, name: str) -> list[str]:
    """The words of the command for a random network of four classes."""
    torch.manual_seed(0)
    net = randomise_norms(create_backbone(name, num_classes=4))
    torch.save(net.state_dict(), folder / f"{name}.pth")
    (folder / "names.txt").write_text("\n".join(CLASSES))
    return ["--backbone", name, "--weights", str(folder / f"{name}.pth"), "--classes", str(folder / "names.txt")]


@pytest.mark.parametrize(
    ("name", "pictures", "keys"),
    [
        ("resnest14", {"shares", "grad_cam"}, {f"split/layer{k}.0.conv2" for k in (1, 2, 3, 4)}),
        (
            "cbam_resnet18",
            {"channels", "spatial", "grad_cam"},
            {"channel/layer4.1.gate.channel", "spatial/layer1.0.gate.spatial"},
        ),
        ("eca_resnet18", {"channels", "grad_cam"}, {"channel/layer2.1.gate"}),
        ("resnet18", {"grad_cam"}, set()),
    ],
)
def test_classifiers(
    name: str, pictures: set[str], keys: set[str], photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = save_classifier(tmp_path, name)
    out = tmp_path / "out"
    assert main(["attention", str(photo), *words, "--class", "cat", "--output", str(out), "--device", "cpu"]) == 0
    assert {path.name for path in out.iterdir()} == {"photo.npz", *(f"photo_{kind}.png" for kind in pictures)}
    arrays = np.load(out / "photo.npz")
    assert keys | {"grad_cam", "image"} <= set(arrays)
    assert arrays["image"].shape == (224, 224, 3)
    for key in keys:
        assert arrays[key].dtype == np.float32
        if key.startswith("split"):
            np.testing.assert_allclose(arrays[key].sum(axis=0), 1, atol=1e-5)

    net = create_backbone(name, str(tmp_path / f"{name}.pth"), num_classes=4).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    seen = (torch.from_numpy(arrays["image"]).float() / 255 - mean) / std
    heat = grad_cam(net, seen.permute(2, 0, 1), class_score(2)).numpy()
    np.testing.assert_allclose(arrays["grad_cam"], heat, atol=1e-4)

    printed = capsys.readouterr().out
    row, column = np.unravel_index(arrays["grad_cam"].argmax(), (224, 224))
    peak = f"brightest at x {column}, y {row}" if arrays["grad_cam"].any() else "nothing speaks for it"
    assert str(photo) in printed
    assert f", at layer4: {peak}\n" in printed
    assert "Grad-CAM of cat 0." in printed
    for key in keys:
        assert f"{key.partition('/')[2]} " in printed
    assert ("the network has no attention layers" in printed) == (not keys)


def test_another_number_of_class_names(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = save_classifier(tmp_path, "resnet18")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat")
    assert main(["attention", str(photo), *words, "--output", str(tmp_path / "out")]) == 2
    assert "the network has 4 classes, but 3 class names were given" in capsys.readouterr().err


def test_layer_and_class_by_number(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*save_classifier(tmp_path, "resnet18"), "--output", str(tmp_path / "out"), "--layer", "layer2"]
    assert main(["attention", str(photo), *words, "--class", "1"]) == 0
    assert "Grad-CAM of bee 0." in (printed := capsys.readouterr().out)
    assert ", at layer2: " in printed


def test_images_of_the_same_name(photo: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    second = tmp_path / "other" / "photo.jpg"
    Image.open(photo).save(second)
    words = [*save_classifier(tmp_path, "resnet18"), "--output", str(tmp_path / "out")]
    assert main(["attention", str(photo), str(second), *words]) == 0
    assert {"photo.npz", "photo_2.npz"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_unreadable_images_are_skipped(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.png").write_text("no image")
    words = [*save_classifier(tmp_path, "resnet18"), "--output", str(tmp_path / "out")]
    assert main(["attention", str(tmp_path / "broken.png"), str(photo), *words]) == 1
    assert f"skipped: cannot read the image {tmp_path / 'broken.png'} (" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"photo.npz", "photo_grad_cam.png"}


def test_output_among_the_images(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures of an earlier call are not looked at, unless they are named, and never replace an image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    monkeypatch.chdir(folder)
    mine = folder / "other_grad_cam.png"  # what the figure of other.png would be called
    for name in ("photo.png", "other.png", mine.name):
        shutil.copy(photo, folder / name)
    words = [*save_classifier(tmp_path, "resnet18"), "--output", "."]
    for _ in range(2):
        assert main(["attention", ".", *words]) == 0
        assert mine.read_bytes() == photo.read_bytes()
        assert {path.stem for path in folder.glob("*.npz")} == {"other_2", "other_grad_cam", "photo"}
    capsys.readouterr()
    assert main(["attention", "photo_grad_cam.png", *words]) == 0
    assert main(["attention", "photo_*.png", *words]) == 2
    assert "error: there are only figures of an earlier call in photo_*.png" in capsys.readouterr().err


def test_many_images_of_one_name() -> None:
    files = [Path(str(number), "a.png") for number in range(3000)]
    assert _names([*files, Path("a_2.png")], Path("out"))[-2:] == ["a_3000", "a_2_2"]


def save_detector(folder: Path, *, score_threshold: float = 0.0) -> Path:
    config = write_detection_config(folder / "tiny.toml", sample=folder, run=folder / "run")
    settings = load_settings(
        DetectionSettings, config, [f"model.score_threshold={score_threshold}", "model.backbone=resnest14"]
    )
    model = randomise_norms(build_detector(settings.model, 4))
    content = {"model": model.state_dict(), "class_names": {1: "ant", 2: "bee", 3: "cat"}}
    save_checkpoint(folder / "best.pt", content | {"settings": settings_as_data(settings)})
    return folder / "best.pt"


def test_detectors(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    checkpoint = save_detector(tmp_path)
    words = [
        "attention",
        str(photo),
        "--checkpoint",
        str(checkpoint),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main([*words, "--detection", "2"]) == 0
    printed = capsys.readouterr().out
    assert "Grad-CAM of detection 2, " in printed
    assert ", at the stages under the head: brightest at x " in printed
    arrays = np.load(tmp_path / "out" / "photo.npz")
    assert arrays["grad_cam"].shape == (90, 120)
    assert arrays["split/backbone.body.layer3.0.conv2"].shape == (2, 256)
    assert main([*words, "--detection", "5000"]) == 1
    assert f"skipped: {photo}: there is no detection 5000; detected: " in capsys.readouterr().err
    assert main([*words, "--detection", "0"]) == 2
    assert "error: --detection is 0; the best is 1" in capsys.readouterr().err


def test_a_detector_that_finds_nothing(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_detector(tmp_path, score_threshold=0.99)
    words = ["attention", str(photo), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert "nothing is detected, so that there is no Grad-CAM" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"photo.npz", "photo_shares.png"}
    words[-1] = str(tmp_path / "bees")
    assert main([*words, "--class", "bee"]) == 1
    assert f"skipped: {photo}: there is no detection 1 of 'bee'; detected: nothing" in capsys.readouterr().err
    assert list((tmp_path / "bees").iterdir()) == []  # no figures without their arrays


def test_segmentation_models(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = write_segmentation_config(tmp_path / "tiny.toml", sample=tmp_path, run=tmp_path / "run")
    settings = load_settings(SegmentationSettings, config, ["model.backbone=cbam_resnet18"])
    model = randomise_norms(build_segmenter(settings.model, 3))
    model.classifier.bias.data = torch.tensor([9.0, 0.0, -9.0])
    content = {"model": model.state_dict(), "class_names": {0: "sky", 1: "sea", 2: "sand"}}
    save_checkpoint(tmp_path / "best.pt", content | {"settings": settings_as_data(settings)})
    words = ["attention", str(photo), "--checkpoint", str(tmp_path / "best.pt"), "--output", str(tmp_path / "out")]
    assert main([*words, "--class", "sky"]) == 0
    assert "Grad-CAM of sky, 100.0% of the image, at the stages under the head" in capsys.readouterr().out
    arrays = np.load(tmp_path / "out" / "photo.npz")
    assert arrays["grad_cam"].shape == (90, 120)
    assert arrays["spatial/backbone.layer1.0.gate.spatial"].shape == (16, 22)  # of the 64 x 85 of eval.short_side
    assert main([*words, "--class", "sand"]) == 1
    assert f"skipped: {photo}: no pixel is found to be 'sand'; ask for one of: sky" in capsys.readouterr().err
    assert main([*words, "--detection", "1"]) == 2
    assert "error: --detection is for detectors, and this is a model for segmentation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --backbone and --weights for a classifier, or --checkpoint for a run"),
        (["--backbone", "resnet18", "--checkpoint", "run"], "one of the two"),
        (["--backbone", "resnet18"], "--backbone needs --weights"),
        (["--checkpoint", "run", "--weights", "imagenet"], "--weights is for --backbone; a checkpoint has its own"),
        (["--checkpoint", "run", "--classes", "names.txt"], "--classes is for --backbone"),
    ],
)
def test_words_that_do_not_fit(
    words: list[str], message: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attention", str(photo), *words, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class", "cta"], "--class 'cta' is neither a name nor a number of the 4 classes.* 0 to 3; .* mean 'cat'"),
        (["--class", "4"], "--class '4' is neither"),
        (["--detection", "1"], "--detection is for detectors, and this is a model for classification"),
        (["--layer", "layer9"], "ResNet has no layer 'layer9'; did you mean 'layer"),
    ],
)  # fmt: skip
def test_what_is_not_there(
    words: list[str], message: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["attention", str(photo), *save_classifier(tmp_path, "resnet18"), *words, "--output", str(tmp_path)]) == 2
    )
    assert re.search(message, capsys.readouterr().err)
