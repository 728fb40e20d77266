"""Classification: the same numbers as torchvision's evaluation, from files of every kind."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Literal

import numpy as np
import pytest
import timm.data
import torch
import torchvision
from PIL import Image
from resnest.transforms import ECenterCrop
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights
from torchvision.transforms import functional as F

from resnest_det.backbones.published import Preprocessing, list_weights
from resnest_det.classify import (
    IMAGENET_CLASS_NAMES,
    Classifier,
    Prediction,
    classify_files,
    find_preprocessing,
    format_predictions,
    load_classifier,
    read_class_names,
)
from resnest_det.data.files import UnreadableImageError

SMALL = Preprocessing(40, 32, "bilinear")
SIZES = [(300, 200), (201, 333), (97, 64), (256, 256)]  # (W, H)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A few large patches of colour, and noise from pixel to pixel."""
    generator = np.random.default_rng(seed)
    patches = Image.fromarray(generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((width, height))
    noise = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Image.blend(patches, noise, 0.3)


def save_resnet18(path: Path, num_classes: int = 1000) -> Path:
    """A random network of torchvision's, with statistics that make its answers depend on the picture."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=num_classes, norm_layer=partial(nn.BatchNorm2d, momentum=1.0))
    images = torch.stack([F.to_tensor(picture(64, 64, seed)) for seed in range(16)])
    with torch.no_grad():
        net(F.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_resnet18(tmp_path_factory.mktemp("weights") / "resnet18.pth")


@pytest.fixture(scope="module")
def five_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_resnet18(tmp_path_factory.mktemp("weights") / "five.pth", num_classes=5)


class Recorder(nn.Module):
    """Keeps its input, and finds both of two classes equally probable."""

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return images.new_zeros(len(images), 2)


def network_input(preprocessing: Preprocessing, image: str | Path | Image.Image) -> Tensor:
    net = Recorder()
    Classifier(net, ["a", "b"], preprocessing, device="cpu")([image])
    return net.images[0]


def test_classes_are_torchvisions(weights: Path, tmp_path: Path) -> None:
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    oracle = torchvision.models.resnet18().eval()
    oracle.load_state_dict(torch.load(weights))
    prepared = torch.stack([ResNet18_Weights.IMAGENET1K_V1.transforms()(image) for image in images])
    with torch.inference_mode():
        probabilities, indices = oracle(prepared).softmax(1).topk(5)
    assert len(set(indices[:, 0].tolist())) > 1  # else the order of the images would not be tested

    classifier = load_classifier("resnet18", str(weights), device="cpu")
    ours = classifier([tmp_path / f"{index}.png" for index in range(len(images))])
    assert [[p.class_index for p in ranked] for ranked in ours] == indices.tolist()
    torch.testing.assert_close(torch.tensor([[p.probability for p in ranked] for ranked in ours]), probabilities)
    categories = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    assert all(p.class_name == categories[p.class_index] for ranked in ours for p in ranked)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("published", ResNet50_Weights)
def test_input_is_torchvisions_bit_for_bit(published: ResNet50_Weights, size: tuple[int, int]) -> None:
    image = picture(*size)
    name = {"IMAGENET1K_V1": "imagenet", "IMAGENET1K_V2": "imagenet_v2"}[published.name]
    ours = network_input(find_preprocessing("resnet50", name), image)
    assert torch.equal(ours, published.transforms()(image))


@pytest.mark.parametrize("size", SIZES)
def test_bicubic_input_is_timms(size: tuple[int, int]) -> None:
    image = picture(*size)
    theirs = timm.data.create_transform(input_size=224, interpolation="bicubic", crop_pct=224 / 256)(image)
    torch.testing.assert_close(network_input(Preprocessing(256, 224, "bicubic"), image), theirs)


@pytest.mark.parametrize("crop", [224, 256, 320, 416])
def test_released_resnest_evaluation_sees_the_same_field(crop: int) -> None:
    """Released: crop, then resize. Ours: resize, then crop. Half a pixel apart at most, at the crop's edges."""
    x, y = np.meshgrid(np.linspace(0, 255, 500), np.linspace(0, 255, 375))
    image = Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))
    released = F.pil_to_tensor(ECenterCrop(crop)(image)).float()

    def difference(resize: int) -> float:
        classifier = Classifier(Recorder(), ["a", "b"], Preprocessing(resize, crop, "bicubic"), device="cpu")
        return (classifier.prepare(image).float() - released).abs().mean().item()

    level = 255 / 375  # between two pixels of the file
    assert difference(crop + 32) < level
    assert difference(crop) > 4 * level


@pytest.mark.parametrize("crop", [224, 256, 320, 416])
def test_released_resnest_evaluation_is_bicubic(crop: int) -> None:
    """At every crop, though the released code asks for bilinear below 320: in noise, of half the size in the end."""
    side = 2 * (crop + 32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    inside = (..., slice(4, -4), slice(4, -4))  # without what lies beyond the released crop's edges
    released = F.pil_to_tensor(ECenterCrop(crop)(image)).float()[inside]

    def difference(interpolation: Literal["bilinear", "bicubic"]) -> float:
        preprocessing = Preprocessing(crop + 32, crop, interpolation)
        ours = Classifier(Recorder(), ["a", "b"], preprocessing, device="cpu").prepare(image)
        return (ours.float()[inside] - released).abs().max().item()

    assert difference("bicubic") == 0
    assert difference("bilinear") > 20


def test_preprocessing_is_that_of_the_published_file() -> None:
    resnest101 = Preprocessing(288, 256, "bicubic")
    assert find_preprocessing("resnest101", "imagenet") == resnest101
    assert find_preprocessing("resnest101", "mine.pth") == resnest101
    v2 = Preprocessing(232, 224, "bilinear")
    file = next(entry for entry in list_weights("resnet50") if entry.name == "imagenet_v2")
    assert find_preprocessing("resnet50", "imagenet_v2") == v2
    assert find_preprocessing("resnet50", f"folder/{file.file_name}") == v2
    assert find_preprocessing("resnet50", rf"C:\folder\{file.file_name}") == v2
    assert find_preprocessing("resnet50", file.urls[0]) == v2
    assert find_preprocessing("resnet50", f"https://x.org/{file.file_name}?download=1#start") == v2
    default = Preprocessing(256, 224, "bilinear")
    assert find_preprocessing("resnet50", "mine.pth") == default
    assert find_preprocessing("cbam_resnet18", "mine.pth") == default  # of which nothing is published


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "I;16", "CMYK"])
def test_files_of_every_mode(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    grey = Image.new("RGB", (60, 50), (128,) * 3)
    wide = Image.fromarray(np.full((50, 60), 128 * 257, np.uint16))
    (wide if mode == "I;16" else grey.quantize() if mode == "P" else grey.convert(mode)).save(path)
    with Image.open(path) as file:
        assert file.mode == mode
    prepared = Classifier(Recorder(), ["a", "b"], SMALL, device="cpu").prepare(path)
    assert (prepared.shape, prepared.dtype) == ((3, 32, 32), torch.uint8)
    assert prepared.unique().tolist() == [128]


def test_photo_is_turned_upright(tmp_path: Path) -> None:
    upright = Image.new("RGB", (40, 40))
    upright.paste((255, 255, 255), (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    upright.rotate(90).save(tmp_path / "x.png", exif=exif)
    classifier = Classifier(Recorder(), ["a", "b"], Preprocessing(40, 40, "bilinear"), device="cpu")
    assert torch.equal(classifier.prepare(tmp_path / "x.png"), F.pil_to_tensor(upright))


def test_image_in_memory_must_be_rgb() -> None:
    classifier = Classifier(Recorder(), ["a", "b"], SMALL, device="cpu")
    with pytest.raises(ValueError, match=r"mode 'LA', not RGB; give image\.convert\('RGB'\)"):
        classifier([Image.new("LA", (40, 40))])


def test_number_of_classes_is_the_files(five_classes: Path) -> None:
    classifier = load_classifier("resnet18", str(five_classes), preprocessing=SMALL, device="cpu")
    [ranked] = classifier([picture(60, 50)])
    assert sorted(p.class_name for p in ranked) == [f"class {index}" for index in range(5)]
    assert sum(p.probability for p in ranked) == pytest.approx(1, abs=1e-5)
    assert [p.probability for p in ranked] == sorted((p.probability for p in ranked), reverse=True)


def test_class_names_are_in_the_order_of_the_outputs(five_classes: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "eel"]
    classifier = load_classifier("resnet18", str(five_classes), class_names=names, preprocessing=SMALL, device="cpu")
    [ranked] = classifier([picture(60, 50)])
    assert all(p.class_name == names[p.class_index] for p in ranked)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_prefixed_file_has_its_classes(prefix: str, five_classes: Path, tmp_path: Path) -> None:
    state = {prefix + key: value for key, value in torch.load(five_classes).items()}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    assert len(load_classifier("resnet18", str(tmp_path / "x.pth"), device="cpu").class_names) == 5


def test_class_names_of_another_number(five_classes: Path) -> None:
    classifier = load_classifier("resnet18", str(five_classes), class_names=["a", "b"], preprocessing=SMALL)
    with pytest.raises(ValueError, match="has 5 classes, but 2 class names were given"):
        classifier([picture(60, 50)])


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_file_without_classifier(prefix: str, weights: Path, tmp_path: Path) -> None:
    """A backbone alone, and a detector of mmdetection's, which has none by nature."""
    state = {f"{prefix}{key}": value for key, value in torch.load(weights).items() if not key.startswith("fc.")}
    torch.save({"state_dict": state}, tmp_path / "detector.pth")
    message = r"detector\.pth' have no classifier: .* or a published one: imagenet"
    with pytest.warns(UserWarning, match="it has no classifier"), pytest.raises(ValueError, match=message):
        load_classifier("resnet18", str(tmp_path / "detector.pth"))


@pytest.fixture
def url_of_five_classes(five_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The file at an address, with a query that is longer than a file's name can be."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    handler = partial(SimpleHTTPRequestHandler, directory=five_classes.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{five_classes.name}?signature={'0' * 300}"
        server.shutdown()


def test_number_of_classes_is_that_of_the_file_at_an_address(url_of_five_classes: str) -> None:
    classifier = load_classifier("resnet18", url_of_five_classes)
    assert classifier.class_names == tuple(f"class {index}" for index in range(5))


def test_published_name_is_no_file(five_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the working folder that is called like published weights is not asked for its classes."""
    (tmp_path / "imagenet").write_bytes(five_classes.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(load_classifier("resnet18", "./imagenet").class_names) == 5
    monkeypatch.setattr(
        "resnest_det.classify.load_backbone_weights", lambda net, *args, **kwargs: nn.init.ones_(net.fc.weight)
    )
    assert len(load_classifier("resnet18", "imagenet").class_names) == 1000


@pytest.mark.parametrize("top_k", [0, 3])
def test_top_k_out_of_range(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}, expected 1 to 2"):
        Classifier(Recorder(), ["a", "b"], SMALL, top_k=top_k)


@pytest.mark.parametrize(("resize", "crop"), [(32, 33), (32, 0), (0, 0)])
def test_crop_outside_the_image(resize: int, crop: int) -> None:
    with pytest.raises(ValueError, match=f"crop is {crop} and resize is {resize};.* give 1 <= crop <= resize"):
        Classifier(Recorder(), ["a", "b"], Preprocessing(resize, crop, "bilinear"))


def test_class_names_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcrane\r\n kiwi \r\ncrane\r\n\r\n".encode())
    assert read_class_names(path) == ["crane", "kiwi", "crane"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names.txt names no class"),
        (b"a\n\nb\n", "names.txt, line 2 is empty"),
        (b"a\xff\n", "names.txt is not UTF-8 text"),
    ],
)
def test_wrong_class_names(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_class_names(tmp_path / "names.txt")


def test_missing_class_names(tmp_path: Path) -> None:
    (tmp_path / "other.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"names\.txt do not exist; .* holds the \.txt files other\.txt"):
        read_class_names(tmp_path / "names.txt")


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_unreadable_files_are_left_out(batch_size: int, five_classes: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.png" for index in range(4)]
    for index, file in enumerate(files):
        picture(50 + index, 60, seed=index).save(file)
    files[1].write_bytes(files[1].read_bytes()[:100])
    classifier = load_classifier("resnet18", str(five_classes), preprocessing=SMALL, device="cpu")
    predictions, unreadable = classify_files(classifier, files, batch_size=batch_size)
    assert list(predictions) == [files[0], files[2], files[3]]
    assert predictions[files[3]][0].class_index == classifier([files[3]])[0][0].class_index
    assert [str(files[1]) in str(error) for error in unreadable] == [True]
    with pytest.raises(UnreadableImageError, match=re.escape(str(files[1]))):
        classifier(files)


def test_no_file_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not a picture")
    classifier = Classifier(Recorder(), ["a", "b"], SMALL)
    with pytest.raises(ValueError, match=r"none of 1 images can be read; the first: .*x\.png"):
        classify_files(classifier, [tmp_path / "x.png"])


def test_batch_size_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        classify_files(Classifier(Recorder(), ["a", "b"], SMALL), [tmp_path / "x.png"], batch_size=0)


PREDICTIONS = {
    Path("a.png"): [Prediction(134, 'crane, "bird"', 0.75), Prediction(517, "crane", 0.125)],
    Path("folder/b.png"): [Prediction(7, "cock", 0.5), Prediction(8, "hen", 0.25)],
}


def test_list() -> None:
    lines = ["a.png", '  0.750   134  crane, "bird"', "  0.125   517  crane"]
    lines += ["folder/b.png", "  0.500     7  cock", "  0.250     8  hen", ""]
    assert format_predictions(PREDICTIONS, "list") == "\n".join(lines)


def test_table() -> None:
    assert format_predictions(PREDICTIONS, "table").splitlines() == [
        "image         class  name           probability  others",
        'a.png           134  crane, "bird"        0.750  crane 0.125',
        "folder/b.png      7  cock                 0.500  hen 0.250",
    ]


def test_csv_is_read_back() -> None:
    rows = list(csv.DictReader(io.StringIO(format_predictions(PREDICTIONS, "csv"))))
    assert len(rows) == 4
    expected = {"image": "a.png", "rank": "1", "class_index": "134", "class_name": 'crane, "bird"'}
    assert rows[0] == {**expected, "probability": "0.750000"}
    assert [row["rank"] for row in rows] == ["1", "2", "1", "2"]


def test_imagenet_names() -> None:
    assert len(IMAGENET_CLASS_NAMES) == 1000
    assert (IMAGENET_CLASS_NAMES[0], IMAGENET_CLASS_NAMES[999]) == ("tench", "toilet tissue")
