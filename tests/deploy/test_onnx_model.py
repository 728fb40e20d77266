"""ONNX files in the place of their models: one image or many, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resnest_det.deploy.onnx_model import OnnxModel

pytest.importorskip("onnxruntime")


def export(net: nn.Module, path: Path, *examples: Tensor, outputs: Sequence[str] = ("out",)) -> Path:
    """A file for any number of images and any size of an image."""
    names = [f"x{number}" for number in range(len(examples))]
    torch.onnx.export(
        net.eval(),
        examples,
        str(path),
        dynamo=False,
        input_names=names,
        output_names=list(outputs),
        dynamic_axes={name: {0: "n"} if own.ndim == 4 else {1: "h"} for name, own in zip(names, examples, strict=True)},
    )
    return path


def test_a_file_of_batches(tmp_path: Path) -> None:
    net = nn.Conv2d(3, 4, 3)
    model = OnnxModel(export(net, tmp_path / "net.onnx", torch.rand(1, 3, 8, 8)))
    assert not model.training
    images = torch.rand(2, 3, 8, 8)
    expected = net(images).detach()
    for batch in (images, images.to(memory_format=torch.channels_last), list(images)):
        found = model(batch)
        assert found.keys() == {"out"}
        torch.testing.assert_close(found["out"], expected, atol=1e-5, rtol=1e-5)


class Boxes(nn.Module):
    """A detector's answer."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = image.mean((1, 2))
        return torch.stack([best, best, best + 1, best + 2], 1), best.argsort(), best


def test_a_file_of_one_image_runs_on_one_after_the_other(tmp_path: Path) -> None:
    names = ("boxes", "labels", "scores")
    model = OnnxModel(export(Boxes(), tmp_path / "net.onnx", torch.zeros(3, 4, 5), outputs=names))
    for images in ([torch.rand(3, 6, 5), torch.rand(3, 4, 5)], torch.rand(2, 3, 7, 5)):
        found = model(images)
        assert len(found) == 2
        for image, answer in zip(images, found, strict=True):
            assert tuple(answer) == names
            for name, expected in zip(names, Boxes()(image), strict=True):
                torch.testing.assert_close(answer[name], expected)


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_files_that_are_none_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.onnx; write it with resnest-det export"):
        OnnxModel(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match=r"text.onnx cannot be read by ONNX Runtime: .*INVALID_PROTOBUF"):
        OnnxModel(tmp_path / "text.onnx")
    two = export(Sum(), tmp_path / "two.onnx", torch.rand(1, 3, 2, 2), torch.rand(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"has the inputs x0 .*, x1 .*; expected one"):
        OnnxModel(two)


def test_images_that_the_file_does_not_take(tmp_path: Path) -> None:
    model = OnnxModel(export(nn.ReLU(), tmp_path / "single.onnx", torch.rand(3, 8, 8)))
    message = r"single.onnx takes tensor\(float\) \[3, 'h', 8\], and does not run on float32 \(3, 8, 9\); .*--size"
    with pytest.raises(ValueError, match=message):
        model(torch.rand(2, 3, 8, 9))


def test_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.onnx").write_text("")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"ONNX files need onnxruntime, .* install resnest-det\[export\]"):
        OnnxModel(tmp_path / "net.onnx")
