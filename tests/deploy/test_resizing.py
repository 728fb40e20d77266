"""The size that a detector's file resizes an image to: the eager transform's, at any size of the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from resnest_det import create_backbone
from resnest_det.deploy.onnx_model import OnnxModel
from resnest_det.deploy.resizing import resized_as_eager
from resnest_det.models import faster_rcnn


class Resized(nn.Module):
    """What a detector's backbone is given, and the size that it has before it is padded."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        images, _ = self.transform([image])
        return images.tensors, torch.stack([torch.as_tensor(side) for side in images.image_sizes[0]])


def transform_of(min_size: int, max_size: int, **settings: Any) -> GeneralizedRCNNTransform:
    return GeneralizedRCNNTransform(min_size, max_size, [0.5] * 3, [0.25] * 3, **settings).eval()


def export(
    model: nn.Module, path: Path, *, opset: int = 17, size: tuple[int, int] = (281, 205), dynamic: bool = True
) -> OnnxModel:
    torch.onnx.export(
        model.eval(),
        (torch.rand(3, *size),),
        str(path),
        dynamo=False,
        opset_version=opset,
        input_names=["image"],
        output_names=["images", "size"],
        dynamic_axes={"image": {1: "height", 2: "width"}} if dynamic else None,
    )
    return OnnxModel(path)


def differing(model: Resized, file: OnnxModel, sizes: np.ndarray) -> int:
    """How many images are resized to another size by the file; the others have the same pixels."""
    number = 0
    for height, width in sizes.tolist():
        image = torch.rand(3, height, width)
        images, size = model(image)
        (found,) = file([image])
        if torch.equal(found["size"], size):
            torch.testing.assert_close(found["images"], images, atol=2e-3, rtol=0)
        else:
            number += 1
    return number


@pytest.mark.parametrize(
    ("min_size", "max_size", "opset"), [(64, 96, 17), (100, 160, 16), (75, 75, 20), (224, 1333, 18)]
)
def test_every_size_is_the_eager_one(min_size: int, max_size: int, opset: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = Resized(transform_of(min_size, max_size))
    sizes = np.random.default_rng(0).integers(40, 400, (100, 2))
    assert differing(model, export(resized_as_eager(model), tmp_path / "exact.onnx", opset=opset), sizes) == 0
    assert (
        differing(model, export(model, tmp_path / "plain.onnx", opset=opset), sizes) > 0
    )  # else nothing is tested here


def test_a_detector_has_the_weights_that_it_had() -> None:
    model = faster_rcnn(create_backbone("resnet18"), 3, fpn_channels=16, box_head_channels=16)
    copy = resized_as_eager(model)
    assert copy is not model
    assert type(model.transform) is GeneralizedRCNNTransform
    assert type(copy.transform) is not GeneralizedRCNNTransform
    assert copy.transform.__dict__.keys() == model.transform.__dict__.keys()
    own = model.state_dict(keep_vars=True)
    assert all(tensor is own[name] for name, tensor in copy.state_dict(keep_vars=True).items())


def test_outside_of_a_trace_it_is_torchvisions() -> None:
    model = Resized(transform_of(64, 96))
    images, size = resized_as_eager(model)(torch.rand(3, 209, 275, generator=torch.Generator().manual_seed(0)))
    expected, expected_size = model(torch.rand(3, 209, 275, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(size, expected_size)
    assert torch.equal(images, expected)


def test_what_stays() -> None:
    class Own(GeneralizedRCNNTransform):
        pass

    own = Resized(Own(64, 96, [0.5] * 3, [0.25] * 3))
    assert resized_as_eager(own) is own
    net = nn.Conv2d(3, 1, 1)
    assert resized_as_eager(net) is net


def test_a_file_of_one_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = Resized(transform_of(64, 96))
    for number, size in enumerate([(209, 275), (637, 263), (137, 673)]):  # of which float32 makes other sizes
        file = export(resized_as_eager(model), tmp_path / f"{number}.onnx", size=size, dynamic=False)
        assert differing(model, file, np.array([size])) == 0


def test_a_size_that_is_set_stays(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = Resized(transform_of(64, 96, fixed_size=(70, 50)))
    (found,) = export(resized_as_eager(model), tmp_path / "fixed.onnx")([torch.rand(3, 209, 275)])
    assert found["size"].tolist() == [50, 70]
