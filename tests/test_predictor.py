"""The predictor: the model called by hand, whatever the image comes as and wherever the checkpoint lies."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from resnest_det.build import build_detection_inference, build_detector, build_inference, build_segmenter
from resnest_det.config import (
    DetectionSettings,
    SegmentationSettings,
    load_settings,
    settings_as_data,
    settings_from_data,
    write_settings,
)
from resnest_det.data import ADE20K_CLASS_NAMES, ADE20K_PALETTE
from resnest_det.data.files import UnreadableImageError, channels_first
from resnest_det.engine import save_checkpoint
from resnest_det.predictor import Predictor
from resnest_det.visualize import class_colour
from tests.tiny_configs import write_detection_config, write_segmentation_config

NAMES = {1: "disc", 2: "square", 3: "star"}
GROUNDS = {0: "wall", 1: "sky", 2: "tree"}
IMAGE_SIDE = 70
Run = Callable[..., Path]


def pixels(height: int = IMAGE_SIDE, width: int = 90, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_batch(*images: NDArray[np.uint8]) -> list[Tensor]:
    return [channels_first(image).float() / 255 for image in images]


def settings_of(folder: Path, task: str, *overrides: str) -> Any:
    write = write_detection_config if task == "det" else write_segmentation_config
    config = write(folder / "tiny.toml", sample=folder, run=folder)
    return load_settings(DetectionSettings if task == "det" else SegmentationSettings, config, overrides)


def write_run(folder: Path, task: str, *overrides: str, **extra: Any) -> Path:
    """A run folder with random weights, as training leaves it."""
    folder.mkdir(exist_ok=True)
    settings = settings_of(folder, task, *overrides)
    write_settings(settings, folder / "config.toml")
    torch.manual_seed(1)
    model = build_detector(settings.model, 4) if task == "det" else build_segmenter(settings.model, 3)
    content = {
        "model": model.state_dict(),
        "epoch": 1,
        "class_names": NAMES if task == "det" else GROUNDS,
        "settings": settings_as_data(settings),
    }
    save_checkpoint(folder / "best.pt", {key: value for key, value in (content | extra).items() if value is not None})
    return folder


def by_hand(folder: Path) -> torch.nn.Module:
    """The model of a run of write_run, without the predictor."""
    content = torch.load(folder / "best.pt", weights_only=True)
    settings = settings_from_data(content["settings"], "the test")
    is_detector = isinstance(settings, DetectionSettings)
    model = build_detector(settings.model, 4) if is_detector else build_segmenter(settings.model, 3)  # type: ignore[arg-type]
    model.load_state_dict(content["model"])
    return model.eval()


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("detector"), "det")


@pytest.fixture(scope="module")
def mask_detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    return write_run(folder, "det", "model.detector=mask_rcnn", "model.mask_head_channels=8")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("segmenter"), "seg")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def test_boxes_are_the_models(detector: Path) -> None:
    image = pixels()
    found = Predictor.from_checkpoint(detector)(image)
    with torch.no_grad():
        (expected,) = by_hand(detector)(as_batch(image))
    assert len(found["boxes"]) > 3
    assert_same(found, expected)


def test_masks_are_the_models(mask_detector: Path) -> None:
    image = pixels()
    found = Predictor.from_checkpoint(mask_detector)(image)
    with torch.no_grad():
        (expected,) = by_hand(mask_detector)(as_batch(image))
    assert found["masks"].shape == (len(found["boxes"]), *image.shape[:2])
    assert found["masks"].any()
    assert torch.equal(found["masks"], expected.pop("masks")[:, 0] > 0.5)
    del found["masks"]
    assert_same(found, expected)


def test_labels_are_the_models(segmenter: Path) -> None:
    image = pixels()
    predictor = Predictor.from_checkpoint(segmenter)
    settings: Any = load_settings(SegmentationSettings, segmenter / "config.toml")
    assert settings.eval.short_side == 64  # so that the run's own way of running it shows
    (expected,) = build_inference(settings.eval)(by_hand(segmenter), as_batch(image))
    found = predictor(image)
    assert_same(found, {"out": expected})
    assert len(found["out"].unique()) > 1
    assert found["out"].dtype == torch.int64


def test_a_detector_is_run_as_in_the_evaluation(tmp_path: Path, detector: Path) -> None:
    overrides = "eval.flip=true", "eval.short_sides=[64, 80]", "eval.tile=48", "eval.whole_image=true"
    run = write_run(tmp_path / "run", "det", *overrides)
    predictor = Predictor.from_checkpoint(run)
    inference = build_detection_inference(predictor.settings.eval, detections_per_image=100)  # type: ignore[arg-type]
    assert inference is not None
    image = pixels()
    (expected,) = inference(by_hand(run), as_batch(image))
    found = predictor(image)
    assert_same(found, expected)
    assert len(found["boxes"]) != len(Predictor.from_checkpoint(detector)(image)["boxes"])


def test_masks_in_tiles_are_dense(tmp_path: Path) -> None:
    overrides = "model.detector=mask_rcnn", "model.mask_head_channels=8", "eval.tile=48"
    predictor = Predictor.from_checkpoint(write_run(tmp_path / "run", "det", *overrides))
    image = pixels()
    found = predictor(image)
    assert found["masks"].shape == (len(found["boxes"]), *image.shape[:2])
    assert found["masks"].dtype == torch.bool
    for mask, (x1, y1, x2, y2) in zip(found["masks"], found["boxes"].tolist(), strict=True):
        rows, columns = mask.nonzero().unbind(1)
        if len(rows):
            assert x1 - 2 <= columns.min() <= columns.max() <= x2 + 2
            assert y1 - 2 <= rows.min() <= rows.max() <= y2 + 2
    nothing = Predictor.from_checkpoint(tmp_path / "run", score_threshold=1.0)(image)
    assert nothing["masks"].shape == (0, *image.shape[:2])


def test_windows_of_a_segmenter(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "seg", "eval.window=48", "eval.flip=true", "eval.short_side=0")
    predictor = Predictor.from_checkpoint(run)
    image = pixels()
    settings: Any = predictor.settings
    (expected,) = build_inference(settings.eval)(by_hand(run), as_batch(image))
    assert torch.equal(predictor(image)["out"], expected)


def test_the_moving_average_is_taken(tmp_path: Path, detector: Path) -> None:
    weights = torch.load(detector / "best.pt", weights_only=True)["model"]
    other = {key: torch.zeros_like(value) for key, value in weights.items()}
    run = write_run(tmp_path / "run", "det", model=other, ema={"model": weights, "num_updates": 3})
    assert_same(Predictor.from_checkpoint(run)(pixels()), Predictor.from_checkpoint(detector)(pixels()))


def test_score_threshold(detector: Path) -> None:
    whole = Predictor.from_checkpoint(detector)(pixels())
    middle = whole["scores"].median().item()
    some = Predictor.from_checkpoint(detector, score_threshold=middle)(pixels())
    assert 0 < len(some["scores"]) < len(whole["scores"])
    kept = whole["scores"] >= middle
    assert_same(some, {key: value[kept] for key, value in whole.items()})


def test_score_threshold_below_the_settings(tmp_path: Path, detector: Path) -> None:
    """The model itself drops what is scored below its own threshold, so it must be built with a lower one."""
    run = write_run(tmp_path / "run", "det", "model.score_threshold=0.9")
    assert len(Predictor.from_checkpoint(run)(pixels())["scores"]) == 0
    found = Predictor.from_checkpoint(run, score_threshold=0.0)(pixels())
    assert_same(found, Predictor.from_checkpoint(detector)(pixels()))


# --- what an image may come as


def files_of(folder: Path, image: NDArray[np.uint8]) -> dict[str, Any]:
    """The same pixels in every form."""
    (folder / "image.png").unlink(missing_ok=True)
    Image.fromarray(image).save(folder / "image.png")
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    return {
        "text": str(folder / "image.png"),
        "path": folder / "image.png",
        "pillow": Image.fromarray(image),
        "opened": Image.open(folder / "image.png"),
        "array": image,
        "reversed array": np.ascontiguousarray(image[..., ::-1])[..., ::-1],
        "bytes": tensor,
        "float": tensor.float() / 255,
        "double": tensor.double() / 255,
    }


FORMS = ["text", "path", "pillow", "opened", "array", "reversed array", "bytes", "float", "double"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_gives_the_same(form: str, detector: Path, tmp_path: Path) -> None:
    predictor = Predictor.from_checkpoint(detector)
    image = pixels()
    form_of_it = files_of(tmp_path, image)[form]
    assert_same(predictor(form_of_it), predictor(image))
    np.testing.assert_array_equal(predictor.draw(form_of_it, predictor(image)), predictor.draw(image, predictor(image)))


def test_modes_of_pillow(segmenter: Path, tmp_path: Path) -> None:
    predictor = Predictor.from_checkpoint(segmenter)
    colour = Image.fromarray(pixels())
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1", "I;16"):
        image = colour.convert("L").convert("I;16") if mode == "I;16" else colour.convert(mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 256)
        expected = predictor(np.asarray(colour.convert("L").convert("RGB") if mode == "I;16" else image.convert("RGB")))
        assert_same(predictor(image), expected)
        if mode not in ("CMYK", "YCbCr"):  # which PNG has not
            image.save(tmp_path / "image.png")
            assert_same(predictor(tmp_path / "image.png"), expected)


def test_images_are_turned_as_exif_says(segmenter: Path, tmp_path: Path) -> None:
    predictor = Predictor.from_checkpoint(segmenter)
    image = Image.fromarray(pixels())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for turned in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert_same(predictor(turned), predictor(image))
        assert predictor.draw(turned, predictor(image)).shape == predictor.draw(image, predictor(image)).shape


@pytest.mark.parametrize("task", ["det", "seg"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 5)])
def test_tiny_images(task: str, size: tuple[int, int], detector: Path, segmenter: Path) -> None:
    predictor = Predictor.from_checkpoint(detector if task == "det" else segmenter)
    image = pixels(*size)
    found = predictor(image)
    if task == "seg":
        assert found["out"].shape == size
    else:
        assert found["boxes"].shape == (len(found["scores"]), 4)
    assert predictor.draw(image, found).dtype == np.uint8


# --- several images


@pytest.mark.parametrize("task", ["det", "seg"])
def test_batches_equal_singles(task: str, detector: Path, mask_detector: Path, segmenter: Path) -> None:
    """Of one size and of several: no image's predictions depend on the others' sizes."""
    for run in (detector, mask_detector) if task == "det" else (segmenter,):
        predictor = Predictor.from_checkpoint(run)
        images = [pixels(70, 90, 0), pixels(40, 60, 1), pixels(70, 90, 2), pixels(90, 70, 3)]
        together = predictor.predict_batch(images)
        for image, found in zip(images, together, strict=True):
            alone = predictor(image)
            assert found.keys() == alone.keys()
            for key, value in found.items():
                assert value.shape == alone[key].shape
                if value.dtype == torch.float32:
                    torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-4)
                else:
                    assert (value == alone[key]).float().mean() > 0.999


def test_no_images(detector: Path) -> None:
    assert Predictor.from_checkpoint(detector).predict_batch([]) == []


# --- where settings and class names come from


def test_a_checkpoint_by_itself(detector: Path, segmenter: Path, tmp_path: Path) -> None:
    for run in (detector, segmenter):
        alone = tmp_path / run.name / "anything.pt"
        alone.parent.mkdir()
        shutil.copy(run / "best.pt", alone)
        predictor = Predictor.from_checkpoint(alone)
        original = Predictor.from_checkpoint(str(run))
        assert predictor.class_names == original.class_names == (NAMES if run is detector else GROUNDS)
        assert predictor.task == original.task == ("detection" if run is detector else "segmentation")
        assert_same(predictor(pixels()), original(pixels()))


def test_an_older_checkpoint_has_its_settings_beside_it(detector: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "det", settings=None)
    assert_same(Predictor.from_checkpoint(run)(pixels()), Predictor.from_checkpoint(detector)(pixels()))
    moved = shutil.copy(run / "best.pt", tmp_path / "moved.pt")
    with pytest.raises(ValueError, match=r"moved\.pt does not say what model its weights belong to.* give config="):
        Predictor.from_checkpoint(moved)


def test_given_settings_and_names_count(detector: Path, tmp_path: Path) -> None:
    config = write_detection_config(tmp_path / "mine.toml", sample=tmp_path, run=tmp_path)
    config.write_text(config.read_text().replace("score_threshold = 0.0", "score_threshold = 0.99"))
    predictor = Predictor.from_checkpoint(detector, config=config, class_names=["a", "b", "c"])
    assert predictor.class_names == {1: "a", 2: "b", 3: "c"}
    assert len(predictor(pixels())["boxes"]) == 0


def write_state(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path)
    return path


TORCHVISION_CONFIG = """
[model]
detector = "faster_rcnn"
backbone = "resnet18"
norm = "frozen_bn"
min_size = 64
max_size = 96
score_threshold = 0.0
"""


def test_a_state_dict_of_torchvisions(tmp_path: Path) -> None:
    theirs = torchvision.models.detection.FasterRCNN(
        torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=5
        ),
        num_classes=5,
        min_size=64,
        max_size=96,
        box_score_thresh=0.0,
    ).eval()
    file = write_state(tmp_path / "torchvision.pth", theirs.state_dict())
    (tmp_path / "frcnn.toml").write_text(TORCHVISION_CONFIG)
    names = ["__background__", "person", "car", "dog", "cat"]
    predictor = Predictor.from_checkpoint(file, config=tmp_path / "frcnn.toml", class_names=names)
    assert predictor.class_names == {1: "person", 2: "car", 3: "dog", 4: "cat"}
    image = pixels()
    with torch.no_grad():
        (expected,) = theirs(as_batch(image))
    found = predictor(image)
    assert len(found["boxes"]) > 3
    assert torch.equal(found["labels"], expected["labels"])
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)


def test_names_by_label_may_have_holes(detector: Path) -> None:
    predictor = Predictor.from_checkpoint(detector, class_names={3: "star"})
    assert predictor.class_names == {1: "label 1", 2: "label 2", 3: "star"}
    assert predictor.draw(pixels(), predictor(pixels())).shape[2] == 3


def test_shipped_settings_by_name(tmp_path: Path, detector: Path) -> None:
    with pytest.raises(ValueError, match=r"the tensors of .*best\.pt are not those of this FasterRCNN"):
        Predictor.from_checkpoint(detector, config="det/sample")
    with pytest.raises(ValueError, match="det/none is not one of the 31 shipped experiments"):
        Predictor.from_checkpoint(detector, config="det/none")


def test_no_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("something was fetched")

    run = write_run(tmp_path / "run", "det")
    settings = settings_of(run, "det", "model.weights=imagenet")
    content = torch.load(run / "best.pt", weights_only=True) | {"settings": settings_as_data(settings)}
    torch.save(content, run / "best.pt")
    monkeypatch.setattr("resnest_det.backbones.weights.find_weights", fetched)
    monkeypatch.setattr("urllib.request.urlopen", fetched)
    assert Predictor.from_checkpoint(run).settings.model.weights == "imagenet"


# --- pictures


def test_classes_have_their_colours(segmenter: Path) -> None:
    predictor = Predictor.from_checkpoint(segmenter)
    image = np.zeros((500, 600, 3), np.uint8)
    prediction = {"out": torch.ones(500, 600, dtype=torch.int64)}
    drawn = predictor.draw(image, prediction)
    assert drawn[250, 300].tolist() == [round(0.6 * part) for part in class_colour(1)]
    assert predictor.colours is None
    assert drawn.shape[0] > 500  # with what the colours mean below


def test_ade20ks_classes_have_ade20ks_colours(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "seg")
    model = build_segmenter(settings.model, 150)
    predictor = Predictor(model, settings, dict(enumerate(ADE20K_CLASS_NAMES)))
    image = np.zeros((500, 600, 3), np.uint8)
    drawn = predictor.draw(image, {"out": torch.full((500, 600), 2)})
    assert drawn[250, 300].tolist() == [round(0.6 * part) for part in ADE20K_PALETTE[2]]
    assert (drawn == ADE20K_PALETTE[2]).all(axis=-1).sum() == 32 * 20  # the swatch of the legend


# --- mistakes


def test_wrong_images(detector: Path, tmp_path: Path) -> None:
    predictor = Predictor.from_checkpoint(detector)
    (tmp_path / "broken.jpg").write_text("no image")
    mistakes: list[tuple[Any, str]] = [
        (np.zeros((5, 5), np.uint8), r"an array of uint8 \(5, 5\); an array is uint8 RGB \(H, W, 3\)"),
        (np.zeros((5, 5, 3), np.float32), r"an array of float32 \(5, 5, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), r"an array of uint8 \(0, 5, 3\); .* at least one pixel"),
        (torch.zeros(5, 5, 3), r"a tensor of shape \(5, 5, 3\); a tensor is RGB \(3, H, W\)"),
        (torch.zeros(1, 3, 5, 5), r"a tensor of shape \(1, 3, 5, 5\)"),
        (torch.zeros(3, 5, 5, dtype=torch.int64), r"a tensor of int64; give uint8, or float"),
        (torch.full((3, 5, 5), 200.0), r"values from 200 to 200, expected \[0, 1\]; divide bytes by 255"),
        (torch.full((3, 5, 5), float("nan")), r"values from nan to nan, expected \[0, 1\]"),
        ([[0, 1], [2, 3]], r"the image is of the type list; give a file's path"),
    ]
    for image, message in mistakes:
        with pytest.raises(ValueError, match=message):
            predictor(image)
    for file in (tmp_path / "broken.jpg", tmp_path / "missing.jpg"):
        with pytest.raises(UnreadableImageError, match=re.escape(f"cannot read the image {file}")):
            predictor(file)


def test_image_too_long_for_a_detector(detector: Path) -> None:
    predictor = Predictor.from_checkpoint(detector)
    assert predictor.settings.model.max_size == 96  # type: ignore[union-attr]
    assert len(predictor.predict_batch([pixels(1, 96), pixels(96, 1)])) == 2
    with pytest.raises(ValueError, match=r"an image is 97 x 1 pixels: resized to a long side of 96 it would have less"):
        predictor(pixels(1, 97))
    predictor.check_size(1, 96)
    with pytest.raises(ValueError, match=r"an image is 97 x 1 pixels"):
        predictor.check_size(1, 97)


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        (["eval.flip=true"], True),
        (["eval.short_sides=[64,96]"], True),
        (["eval.tile=64"], False),
        (["eval.tile=64", "eval.whole_image=true"], True),
    ],
)
def test_image_too_long_in_several_passes(change: list[str], is_refused: bool, tmp_path: Path) -> None:
    predictor = Predictor.from_checkpoint(write_run(tmp_path, "det", *change), device="cpu")
    with pytest.raises(ValueError, match="an image is 400 x 1 pixels") if is_refused else nullcontext():
        predictor(pixels(1, 400))


def test_wrong_checkpoints(detector: Path, segmenter: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run folder or checkpoint .*none\.pt; .* holds no \.pt files"):
        Predictor.from_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"is no run folder: it has no config\.toml and no checkpoint"):
        Predictor.from_checkpoint(tmp_path)
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt is damaged, or not plain data"):
        Predictor.from_checkpoint(tmp_path / "text.pt")
    state = torch.load(detector / "best.pt", weights_only=True)["model"]
    foreign = write_state(tmp_path / "state.pt", state)
    with pytest.raises(ValueError, match=r"state\.pt does not say what model .* config= \(--config\), .* class_names="):
        Predictor.from_checkpoint(foreign)
    with pytest.raises(ValueError, match=r"state\.pt does not say what its classes are called.* class_names= \(--cl"):
        Predictor.from_checkpoint(foreign, config=detector / "config.toml")
    with pytest.raises(ValueError, match=r"(?s)state\.pt are not those of this FasterRCNN.*number of classes"):
        Predictor.from_checkpoint(foreign, config=detector / "config.toml", class_names=["only one"])
    with pytest.raises(ValueError, match=r"state\.pt are not those of this DeepLabV3Plus"):
        Predictor.from_checkpoint(foreign, config=segmenter / "config.toml", class_names=["a", "b"])


def test_wrong_settings(detector: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    with pytest.raises(ValueError, match=r"there is no config file .*config\.toml"):
        Predictor.from_checkpoint(detector, config=config)
    config.write_text("[model]\ndetector = 'faster_rcnn'\nscore_threshhold = 0.5\n")
    with pytest.raises(ValueError, match=r"model\.score_threshhold .* did you mean model\.score_threshold"):
        Predictor.from_checkpoint(detector, config=config)
    config.write_text("[model]\nbackbone = 'resnet18'\n")
    with pytest.raises(ValueError, match="may be for detection or for segmentation; add model.detector=faster_rcnn or"):
        Predictor.from_checkpoint(detector, config=config)


def test_wrong_class_names(detector: Path, segmenter: Path) -> None:
    mistakes: list[tuple[Path, Any, str]] = [
        (detector, {0: "disc", 1: "square"}, r"has the label 0 'disc', but label 0 is the background"),
        (segmenter, {-1: "wall"}, r"has the label -1 'wall', but labels count from 0"),
        (detector, [], r"class_names is empty"),
        (
            detector,
            ["one", "two"],
            r"class_names has 2 names, but .*best\.pt was trained on 3 classes: .*; give one name",
        ),
        (detector, "disc", r"class_names is the text 'disc'; give a list"),
        (segmenter, ["x"] * 255, r"class_names has 255 classes; a label map of 8 bits holds at most 254"),
    ]
    for run, names, message in mistakes:
        with pytest.raises(ValueError, match=message):
            Predictor.from_checkpoint(run, class_names=names)


def test_wrong_score_thresholds_and_devices(detector: Path, segmenter: Path) -> None:
    with pytest.raises(ValueError, match=r"score_threshold is 1\.5, expected 0 to 1"):
        Predictor.from_checkpoint(detector, score_threshold=1.5)
    with pytest.raises(
        ValueError, match=r"score_threshold is 0\.5, and a segmentation model gives every pixel a class"
    ):
        Predictor.from_checkpoint(segmenter, score_threshold=0.5)
    with pytest.raises(ValueError, match=r"device 'tpu' is not a device"):
        Predictor.from_checkpoint(detector, device="tpu")
