"""Quantisation: what becomes integer, how near the outputs stay, and what is refused."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import roi_align

from resnest_det.deploy.quantization import cosine_similarities, quantize_onnx

SIDE = 32
Array = NDArray[np.float32]


class Network(nn.Module):
    """All that quantisation has to tell apart: attention over splits, a residual, a pyramid, proposals and regions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.splits = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.fc1 = nn.Conv2d(16, 8, 1)
        self.fc2 = nn.Conv2d(8, 16, 1)
        self.end = nn.Conv2d(16, 16, 1)
        self.deep = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.lateral = nn.Conv2d(16, 16, 1)
        self.logits = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x).relu(), 2)
        one, two = (split(x).relu() for split in self.splits)
        weight = self.fc2(self.fc1(F.adaptive_avg_pool2d(one + two, 1)).relu()).sigmoid()
        x = (self.end(one * weight + two * (1 - weight)) + x).relu()
        deep = self.deep(x).relu()
        x = self.lateral(x) + F.interpolate(deep, scale_factor=2.0, mode="nearest")
        return self.logits(x.relu()) * 2.0


def export(model: nn.Module, path: Path, *, side: int | None = None) -> Path:
    sizes = None if side else {"image": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(
        model.eval(),
        (torch.zeros(1, 3, side or SIDE, side or SIDE),),
        path,
        opset_version=17,
        dynamo=False,
        input_names=["image"],
        output_names=["out"],
        dynamic_axes=sizes,
    )
    return path


def smooth_images(number: int, *, side: int = SIDE, seed: int = 0) -> list[Array]:
    """Noise of few pixels, enlarged: neighbours are alike, as in photographs."""
    noise = torch.rand(number, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    large = F.interpolate(noise, size=(side, side), mode="bilinear")
    return [image[None].numpy() for image in large]


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return export(Network(), tmp_path_factory.mktemp("onnx") / "float.onnx")


def layer_names(nodes: tuple[str, ...]) -> set[str]:
    return {name.removeprefix("/").removesuffix("/Conv") for name in nodes}


def kernels(path: Path, folder: Path) -> Counter[str]:
    """The operators that onnxruntime runs, after it has optimised the graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3  # that the file is for this machine only
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def test_what_becomes_integer(float_file: Path, tmp_path: Path) -> None:
    nodes = quantize_onnx(float_file, tmp_path / "int8.onnx", smooth_images(4))
    assert layer_names(nodes.layers) == {"stem", "splits.0", "splits.1", "end", "deep", "lateral"}
    assert layer_names(nodes.pooled) == {"fc1", "fc2"}
    assert layer_names(nodes.last) == {"logits"}
    types = {node.name: node.op_type for node in onnx.load(float_file).graph.node}
    counts = Counter(types[name] for name in nodes.between)
    assert counts == {"MaxPool": 1, "Mul": 2, "Add": 3, "Relu": 6, "Resize": 1}
    run = kernels(tmp_path / "int8.onnx", tmp_path)
    assert run["QLinearConv"] == 6
    assert run["Conv"] + run["FusedConv"] == 3
    assert run["QLinearMul"] == 2
    assert run["QLinearAdd"] == 3
    # The two splits for their pooled sum, one weight for the other, and the input of the last layer.
    assert run["DequantizeLinear"] == 4


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_outputs_stay_near(method: Any, float_file: Path, tmp_path: Path) -> None:
    quantize_onnx(float_file, tmp_path / "int8.onnx", smooth_images(8), method=method)
    similarities = cosine_similarities(float_file, tmp_path / "int8.onnx", smooth_images(3, seed=1))
    assert len(similarities) == 3
    assert min(similarities) > 0.998
    assert max(similarities) < 1


def test_a_scale_for_each_channel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network()
    with torch.no_grad():  # one channel's weights are so large that with their scale the others would be 0 or 1
        network.deep.weight[0] *= 100
        network.logits.weight[:, 0] = 0
    path = export(network, tmp_path / "float.onnx")
    lowest = {}
    for per_channel in (True, False):
        quantize_onnx(path, tmp_path / "int8.onnx", smooth_images(4), per_channel=per_channel)
        lowest[per_channel] = min(cosine_similarities(path, tmp_path / "int8.onnx", smooth_images(2)))
    assert lowest[True] > lowest[False]


def test_other_sizes_and_batches(float_file: Path, tmp_path: Path) -> None:
    quantize_onnx(float_file, tmp_path / "int8.onnx", smooth_images(4))
    batch = np.concatenate(smooth_images(3, side=64, seed=2))
    (similarity,) = cosine_similarities(float_file, tmp_path / "int8.onnx", [batch])
    assert similarity > 0.998


def test_weights_are_bytes_and_metadata_stay(float_file: Path, tmp_path: Path) -> None:
    model = onnx.load(float_file)
    onnx.helper.set_model_props(model, {"input": "float32 RGB"})
    onnx.save(model, tmp_path / "float.onnx")
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", smooth_images(2))
    quantized = onnx.load(tmp_path / "int8.onnx")
    types = {tensor.name: tensor.data_type for tensor in quantized.graph.initializer}
    assert types["deep.weight_quantized"] == onnx.TensorProto.INT8
    assert types["fc1.weight"] == onnx.TensorProto.FLOAT
    properties = {entry.key: entry.value for entry in quantized.metadata_props}
    assert properties == {"input": "float32 RGB", "quantization": "int8, minmax over 2 images"}


class Proposer(nn.Module):
    """Proposals are found in the features, and where they are says what the head sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.neck = nn.Conv2d(8, 8, 3, padding=1)
        self.proposals = nn.Conv2d(8, 4, 1)
        self.masks = nn.Conv2d(8, 2, 1)
        self.hidden = nn.Linear(8 * 4, 16)
        self.boxes = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.neck(self.body(x).relu()).relu()
        corners = self.proposals(features).sigmoid().flatten(2)[0].T  # (H * W, 4)
        scores, places = corners.sum(1).topk(6)
        regions = (corners[places] * scores[:, None] + 1.0) * 4.0
        seen = roi_align(features, [regions], output_size=2)
        return self.boxes(self.hidden(seen.flatten(1)).relu()) * regions + self.masks(seen).mean()


def test_a_detector_proposes_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = export(Proposer(), tmp_path / "float.onnx")
    nodes = quantize_onnx(path, tmp_path / "int8.onnx", smooth_images(2))
    types = {node.name: node.op_type for node in onnx.load(path).graph.node}
    assert [types[name] for name in nodes.layers] == ["Conv", "Conv", "Gemm"]
    assert sorted(types[name] for name in nodes.last) == ["Conv", "Conv", "Gemm"]
    assert {types[name] for name in nodes.between} == {"Relu"}  # no product of what makes boxes
    assert layer_names(nodes.last_maps) == {"proposals"}
    assert min(cosine_similarities(path, tmp_path / "int8.onnx", smooth_images(2), nodes=nodes.last_maps)) > 0.999


def test_no_images(float_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no calibration images; give at least one"):
        quantize_onnx(float_file, tmp_path / "int8.onnx", [])
    assert not (tmp_path / "int8.onnx").exists()


def test_an_unknown_method(float_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method='mse' is unknown; choose one of minmax, entropy, percentile"):
        quantize_onnx(float_file, tmp_path / "int8.onnx", smooth_images(1), method="mse")  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime.quantization"])
def test_a_missing_package(package: str, float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    name = package.partition(".")[0]
    with pytest.raises(ValueError, match=rf"ONNX files need {name}, which .*install resnest-det\[export\]"):
        quantize_onnx(float_file, tmp_path / "int8.onnx", smooth_images(1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 32, 32), np.float32), r"calibration image 1 is float32 \(3, 32, 32\).*\(any, 3, any, any\)"),
        (np.zeros((1, 4, 32, 32), np.float32), r"calibration image 1 is float32 \(1, 4, 32, 32\)"),
        (np.zeros((1, 3, 32, 32), np.uint8), r"calibration image 1 is uint8 \(1, 3, 32, 32\), and .* takes float32"),
    ],
)
def test_an_image_that_does_not_fit(image: Any, message: str, float_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_onnx(float_file, tmp_path / "int8.onnx", [*smooth_images(1), image])


def test_files_that_cannot_be_quantised(float_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no ONNX file .*nothing.onnx; write one with export_onnx"):
        quantize_onnx(tmp_path / "nothing.onnx", tmp_path / "int8.onnx", smooth_images(1))
    with pytest.raises(ValueError, match=r"the file .*int8.ort must end in .onnx"):
        quantize_onnx(float_file, tmp_path / "int8.ort", smooth_images(1))
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere for the file int8.onnx; create it"):
        quantize_onnx(float_file, tmp_path / "nowhere" / "int8.onnx", smooth_images(1))
    quantize_onnx(float_file, tmp_path / "int8.onnx", smooth_images(1))
    with pytest.raises(ValueError, match="is quantised already; give the float32 file"):
        quantize_onnx(tmp_path / "int8.onnx", tmp_path / "again.onnx", smooth_images(1))
    single = export(nn.Conv2d(3, 4, 3), tmp_path / "single.onnx")
    with pytest.raises(ValueError, match="has 1 layers with weights, and none that is followed by another"):
        quantize_onnx(single, tmp_path / "int8.onnx", smooth_images(1))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_former_file_stays_when_the_new_one_cannot_be_written(
    error: BaseException, float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_halfway(file: Path, content: bytes) -> None:
        with file.open("wb") as stream:
            stream.write(content[: len(content) // 2])
        raise error

    output = tmp_path / "int8.onnx"
    output.write_text("the former")
    monkeypatch.setattr(Path, "write_bytes", stop_halfway)
    with pytest.raises(type(error)):
        quantize_onnx(float_file, output, smooth_images(1))
    assert output.read_text() == "the former"
    assert list(tmp_path.iterdir()) == [output]


def test_unknown_nodes(float_file: Path) -> None:
    with pytest.raises(ValueError, match="has no node 'fc'; its nodes are such as"):
        cosine_similarities(float_file, float_file, smooth_images(1), nodes=["fc"])
    assert cosine_similarities(float_file, float_file, smooth_images(1)) == pytest.approx([1])
