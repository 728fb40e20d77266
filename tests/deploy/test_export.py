"""Exported files beside the models they are of, on sizes that the export has not seen; and what is refused."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch._meta_registrations
from numpy.typing import NDArray
from torch import Tensor, nn

from resnest_det import create_backbone, stage_extractor
from resnest_det.deploy import export
from resnest_det.deploy.export import NormalisedNetwork, export_onnx, export_program
from resnest_det.deploy.onnx_form import onnx_form
from resnest_det.models import cascade_rcnn, deeplabv3plus
from tests.models.test_detectors import small_detector
from tests.random_norms import randomise_norms

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Colours(nn.Module):
    """The mean colour of each image, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.factor


class OneBox(nn.Module):
    """A detector that finds in each image one box, of a given left edge, and a score."""

    def __init__(self, left: float = 1.0, score: float = 0.9, num_found: int = 1) -> None:
        super().__init__()
        self.left, self.score, self.num_found = left, score, num_found

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            brightness = image.mean() * 0
            boxes = torch.tensor([[self.left, 2.0, 30.0, 40.0]])[: self.num_found] + brightness
            weak = torch.tensor([[5.0, 5.0, 8.0, 8.0]])[: self.num_found]
            scores = torch.tensor([self.score, 0.1])[: 2 * self.num_found] + brightness
            labels = torch.tensor([1, 2])[: 2 * self.num_found]
            found.append({"boxes": torch.cat([boxes, weak]), "labels": labels, "scores": scores})
        return found


def run_onnx(path: Path, **images: Tensor) -> dict[str, NDArray[Any]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: image.numpy() for name, image in images.items()})
    return {output.name: value for output, value in zip(session.get_outputs(), outputs, strict=True)}


def assert_close(found: NDArray[Any], expected: Tensor) -> None:
    assert np.abs(found - expected.numpy()).max() <= 1e-5 * expected.abs().max()


# --- files and their models


def test_a_classifier(tmp_path: Path) -> None:
    net = randomise_norms(create_backbone("resnest14", num_classes=7)).eval()
    model = NormalisedNetwork(net).eval()
    done = export_onnx(
        onnx_form(model), tmp_path / "net.onnx", torch.rand(1, 3, 64, 64), reference=model, metadata={"task": "naming"}
    )
    assert [check.images for check in done.checks] == ["1x3x64x64", "2x3x49x81"]
    assert done.largest_difference() <= 1e-5
    images = torch.rand(3, 3, 70, 45)
    with torch.no_grad():
        expected = net((images - MEAN[:, None, None]) / STD[:, None, None])
    assert_close(run_onnx(done.path, images=images)["logits"], expected)

    content = onnx.load(done.path)
    onnx.checker.check_model(content)
    metadata = {entry.key: entry.value for entry in content.metadata_props}
    assert metadata == done.metadata
    assert metadata["task"] == "naming"
    assert metadata["opset"] == "17" == str(content.opset_import[0].version)
    assert metadata["input"] == "float32 RGB (N, 3, H, W), in [0, 1]; the model normalises"
    for package in ("torch", "torchvision", "onnx"):
        assert metadata[package] == version(package)
    assert metadata["resnest_det"] == version("resnest-det")
    assert [check["images"] for check in json.loads(metadata["checks"])] == ["1x3x64x64", "2x3x49x81"]


def test_features_of_stages(tmp_path: Path) -> None:
    stages = NormalisedNetwork(stage_extractor(create_backbone("resnet18"), ("layer2", "layer4"))).eval()
    done = export_onnx(
        onnx_form(stages), tmp_path / "stages.onnx", torch.rand(2, 3, 64, 64), reference=stages, opset=18
    )
    assert done.metadata["opset"] == "18"
    images = torch.rand(1, 3, 65, 99)
    with torch.no_grad():
        expected = stages(images)
    found = run_onnx(done.path, images=images)
    assert found.keys() == expected.keys() == {"layer2", "layer4"}
    for name, features in expected.items():
        assert_close(found[name], features)


def test_segmentation_of_bytes(tmp_path: Path) -> None:
    net = create_backbone("resnest14", output_stride=16)
    model = randomise_norms(deeplabv3plus(net, 5, head_channels=16)).eval()
    images = torch.randint(0, 256, (3, 3, 66, 90), dtype=torch.uint8)
    done = export_onnx(onnx_form(model), tmp_path / "seg.onnx", images[:1, :, :64, :64], reference=model)
    assert done.metadata["input"] == "uint8 RGB (N, 3, H, W), bytes, which the model scales; the model normalises"
    with torch.no_grad():
        expected = model(images.float() / 255)["out"]
    assert_close(run_onnx(done.path, images=images)["out"], expected)


@pytest.mark.parametrize(
    "detector",
    [
        "cascade_mask_rcnn",
        "fcos",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mask_rcnn", "cascade_rcnn", "retinanet")),
    ],
)
def test_detectors(detector: str, tmp_path: Path) -> None:
    model = randomise_norms(small_detector(detector, score_threshold=0.02)).eval()
    if detector == "retinanet":  # whose random scores are all but equal
        for conv in (module for module in model.head.classification_head.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight)
    done = export_onnx(onnx_form(model), tmp_path / "det.onnx", [torch.rand(3, 80, 120)], reference=model)
    assert [check.num_detections for check in done.checks] == [10, 10]
    assert done.metadata["input"] == "float32 RGB (3, H, W), in [0, 1]; the model normalises"
    image = torch.rand(3, 101, 75)
    with torch.no_grad():
        (expected,) = model([image])
    found = run_onnx(done.path, image=image)
    assert found.keys() == expected.keys()
    assert len(found["boxes"]) == len(expected["boxes"]) == 10
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-5)
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-3)
    if "masks" in expected:
        assert found["masks"].shape == (10, 1, 101, 75)
        np.testing.assert_allclose(found["masks"], expected["masks"], atol=1e-4)


def test_a_cascade_takes_any_number_of_proposals(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cascade_rcnn(create_backbone("resnest14", norm="frozen_bn"), 4, min_size=96, max_size=128).eval()
    proposals = []
    model.rpn.register_forward_hook(lambda _module, _inputs, output: proposals.append(len(output[0][0])))
    images = [torch.rand(3, 96, width) for width in (96, 112, 80)]
    export_onnx(
        onnx_form(model), tmp_path / "det.onnx", images[:1], checks=[[image] for image in images], reference=model
    )
    assert len(set(proposals)) > 1


def test_a_detector_of_two_images_finds_in_each_what_it_finds_alone(tmp_path: Path) -> None:
    model = randomise_norms(small_detector("faster_rcnn")).eval()
    images = [torch.rand(3, 80, 120), torch.rand(3, 90, 60)]
    done = export_onnx(model, tmp_path / "det.onnx", images)
    found = run_onnx(done.path, image_0=images[1], image_1=images[0])  # their sizes change places
    with torch.no_grad():
        expected = model(images[::-1])
    for index in range(2):
        for key in ("boxes", "labels", "scores"):
            np.testing.assert_allclose(found[f"{key}_{index}"], expected[index][key], atol=1e-3)


def test_a_fixed_size(tmp_path: Path) -> None:
    done = export_onnx(Colours().eval(), tmp_path / "net.onnx", torch.rand(1, 3, 8, 9), dynamic=False)
    assert done.metadata["input"] == "float32 RGB 1x3x8x9, in [0, 1]; the model normalises"
    with pytest.raises(Exception, match=r"Got: 10 Expected: 9"):
        run_onnx(done.path, images=torch.rand(1, 3, 8, 10))


def test_a_program(tmp_path: Path) -> None:
    net = randomise_norms(create_backbone("resnet18", num_classes=5))
    model = NormalisedNetwork(net).eval()
    done = export_program(model, tmp_path / "net.pt2", torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    files = {"metadata.json": ""}
    program = torch.export.load(done.path, extra_files=files).module()
    assert json.loads(files["metadata.json"]) == done.metadata
    assert done.metadata["torch"] == version("torch")
    images = torch.randint(0, 256, (3, 3, 75, 97), dtype=torch.uint8)
    with torch.no_grad():
        assert_close(program(images).numpy(), model(images.float() / 255))


def test_a_program_of_pools_takes_odd_and_even_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def divided(size: Any, stride: Any) -> Any:
        """As torch 2.11 does."""
        quotient, remainder = size // stride, size % stride
        return quotient - 1 if remainder != 0 and bool(remainder < 0) != bool(stride < 0) else quotient

    monkeypatch.setattr(torch._meta_registrations, "div_rtn", divided)
    checks = [torch.rand(2, 3, 8 + number, 12 + 2 * number) for number in range(4)]
    pools = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2)).eval()
    done = export_program(pools, tmp_path / "net.pt2", checks[0], checks=checks)
    assert [check.images for check in done.checks] == ["2x3x8x12", "2x3x9x14", "2x3x10x16", "2x3x11x18"]
    assert torch._meta_registrations.div_rtn is divided


def test_a_program_returns_what_the_model_returns(tmp_path: Path) -> None:
    class Named(Colours):
        def forward(self, images: Tensor) -> Any:
            return {"colours": super().forward(images)}

    done = export_program(Named().eval(), tmp_path / "net.pt2", torch.rand(2, 3, 8, 8), dynamic=False)
    images = torch.rand(2, 3, 8, 8)
    found = torch.export.load(done.path).module()(images)
    torch.testing.assert_close(found, {"colours": images.mean((2, 3))})


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = NormalisedNetwork(create_backbone("resnest14")).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_onnx(model, tmp_path / "net.onnx", torch.rand(1, 3, 32, 32), dynamic=False)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- checks


def test_another_function_is_refused_and_the_former_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_text("the former")
    with pytest.raises(
        ValueError, match=r"logits differ from the model's by 0\.5 on images of 1x3x8x8, more than .*0\.0001"
    ):
        export_onnx(Colours(1.0).eval(), path, torch.rand(1, 3, 8, 8), reference=Colours(2.0))
    assert path.read_text() == "the former"
    assert list(tmp_path.iterdir()) == [path]


def test_a_difference_within_the_tolerance(tmp_path: Path) -> None:
    images = torch.rand(1, 3, 8, 8)
    done = export_onnx(Colours().eval(), tmp_path / "net.onnx", images, reference=Colours(1.001), tolerance=0.01)
    assert done.largest_difference() == pytest.approx(0.001 / 1.001, rel=1e-3)


def test_a_size_taken_for_a_constant(tmp_path: Path) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, :, : int(images.shape[2]) // 2]

    with pytest.raises(ValueError, match=r"logits of shape \(2, 3, 4, 11\) .* 2x3x7x11, and the model \(2, 3, 3, 11\)"):
        export_onnx(Constant().eval(), tmp_path / "net.onnx", torch.rand(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_what_the_runtime_cannot_run(tmp_path: Path) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.reshape(-1, 3, int(images.shape[2]) * int(images.shape[3]))

    with pytest.raises(ValueError, match=r"fails on images of 2x3x7x11: .*; if it took a size .* dynamic=False"):
        export_onnx(Constant().eval(), tmp_path / "net.onnx", torch.rand(1, 3, 8, 8))


def test_an_error_without_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def run(self, *_: object) -> None:
            raise MemoryError

    monkeypatch.setattr(export, "open_session", lambda *_: Broken())
    with pytest.raises(ValueError, match=r"the exported model fails on images of 1x3x8x8: MemoryError$"):
        export_onnx(Colours().eval(), tmp_path / "net.onnx", torch.rand(1, 3, 8, 8), dynamic=False)


def test_nan_is_a_difference(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="logits differ from the model's by nan"):
        export_onnx(Colours(float("nan")).eval(), tmp_path / "net.onnx", torch.rand(1, 3, 8, 8))


def test_another_box_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 detections of 2 .* and 2 .* the best of them scores 0\.900"):
        export_onnx(OneBox(left=1.5).eval(), tmp_path / "det.onnx", [torch.rand(3, 50, 50)], reference=OneBox())
    assert not list(tmp_path.iterdir())


def test_another_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scores differ from the model's by 0\.1 on images of 3x50x50"):
        export_onnx(OneBox(score=0.8).eval(), tmp_path / "det.onnx", [torch.rand(3, 50, 50)], reference=OneBox())


def test_nothing_found_proves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found nothing in the images of the check"):
        export_onnx(OneBox(num_found=0).eval(), tmp_path / "det.onnx", [torch.rand(3, 50, 50)])


def detections(*scores: float, left: float = 0.0) -> dict[str, NDArray[Any]]:
    boxes = [[left + 10 * index, 0, left + 10 * index + 5, 5] for index in range(len(scores))]
    return {"boxes": np.array(boxes, np.float32), "labels": np.ones(len(scores), int), "scores": np.array(scores)}


def test_detections_are_matched_whatever_their_order() -> None:
    found = detections(0.9, 0.8, 0.8)
    other = {key: values[[0, 2, 1]] for key, values in found.items()}
    assert export._match(found, other, 100, 1e-4) == [(0, 0), (1, 2), (2, 1)]


def test_only_the_lowest_scores_may_be_without_a_counterpart() -> None:
    more, fewer = detections(0.9, 0.5, 0.50005), detections(0.9, 0.5)
    assert export._match(more, fewer, 100, 1e-4) == export._match(fewer, more, 100, 1e-4) == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match=r"1 detections of 3 .* and 2 .* scores 0\.700"):
        export._match(detections(0.9, 0.5, 0.7), fewer, 100, 1e-4)


def test_a_label_is_part_of_a_detection() -> None:
    found = detections(0.9, 0.5)
    other = found | {"labels": np.array([2, 1])}
    with pytest.raises(ValueError, match=r"2 detections of 2 .* scores 0\.900"):
        export._match(found, other, 100, 1e-4)


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "net.pb"}, "net.pb must end in .onnx"),
        ({"path": "nowhere/net.onnx"}, "there is no folder nowhere for the file net.onnx"),
        ({"opset": 15}, "opset=15 must be 16 to 20"),
        ({"opset": 21}, "opset=21 must be 16 to 20"),
        ({"tolerance": 0.0}, "tolerance=0.0 must be between 0 and 1"),
        ({"checks": []}, "checks is empty"),
        ({"checks": [torch.rand(3, 8, 8)]}, "the images are float32 (3, 8, 8)"),
        ({"example": torch.rand(1, 1, 8, 8)}, "the images are float32 (1, 1, 8, 8)"),
        ({"example": torch.rand(1, 3, 8, 8).double()}, "the images are float64 (1, 3, 8, 8)"),
        ({"example": torch.rand(1, 3, 0, 8)}, "the images are float32 (1, 3, 0, 8)"),
        ({"example": []}, "the example is an empty list"),
        ({"model": Colours().train()}, "the model is in training mode"),
        ({"model": nn.Sequential(Colours(), nn.GRU(3, 3)).eval()}, "the model returned a tuple"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"model": Colours().eval(), "path": "net.onnx", "example": torch.rand(1, 3, 8, 8)} | arguments
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        export_onnx(**given)
    assert not list(tmp_path.iterdir())


def test_a_program_of_a_detector(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a detector, which torch\.export does not take.*export it as ONNX"):
        export_program(OneBox().eval(), tmp_path / "det.pt2", [torch.rand(3, 50, 50)])  # type: ignore[arg-type]


def test_a_program_under_another_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"net\.onnx must end in \.pt2"):
        export_program(Colours().eval(), tmp_path / "net.onnx", torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"ONNX files need {package}, .* install resnest-det\[export\]"):
        export_onnx(Colours().eval(), tmp_path / "net.onnx", torch.rand(1, 3, 8, 8))
