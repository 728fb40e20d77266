"""The form for ONNX Runtime: the model's function, in the operations that its docstring promises."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from resnest_det import create_backbone
from resnest_det.backbones import Bottleneck
from resnest_det.deploy.export import export_onnx
from resnest_det.deploy.onnx_form import onnx_form
from resnest_det.layers import SplitAttentionConv2d
from resnest_det.models import deeplabv3plus
from tests.random_norms import randomise_norms


def assert_equal_outputs(form: nn.Module, model: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        expected, found = model(images), form(images)
    if isinstance(expected, dict):
        expected, found = expected["out"], found["out"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "name",
    [
        "resnest14",
        "resnest50_fast_1s4x24d",  # one split, in groups; the average pool before the convolution
        "resnest50_fast_4s2x40d",  # four splits, in groups
        "sk_resnet50",
        "se_resnet18",
    ],
)
def test_outputs_are_the_models(name: str) -> None:
    net = randomise_norms(create_backbone(name, num_classes=10)).eval()
    assert_equal_outputs(onnx_form(net), net, torch.rand(2, 3, 65, 96))


def test_norms_that_cannot_be_folded_stay() -> None:
    net = create_backbone("resnest14", num_classes=10, norm="gn").eval()
    form = onnx_form(net)
    assert sum(isinstance(module, nn.GroupNorm) for module in form.modules()) == sum(
        isinstance(module, nn.GroupNorm) for module in net.modules()
    )
    assert_equal_outputs(form, net, torch.rand(2, 3, 64, 64))


def test_dilated_stages_of_a_segmentation_model() -> None:
    net = create_backbone("resnest14", output_stride=16)
    model = randomise_norms(deeplabv3plus(net, 5, head_channels=16)).eval()
    assert_equal_outputs(onnx_form(model), model, torch.rand(1, 3, 64, 80))


@pytest.mark.parametrize(("radix", "groups"), [(1, 1), (2, 1), (3, 2)])
def test_a_layer_by_itself(radix: int, groups: int) -> None:
    layer = randomise_norms(SplitAttentionConv2d(12, 8, radix=radix, groups=groups)).eval()
    assert_equal_outputs(onnx_form(layer), layer, torch.randn(2, 12, 9, 7))


def test_the_model_is_not_changed() -> None:
    net = randomise_norms(create_backbone("resnest14")).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    form = onnx_form(net)
    assert not form.training
    assert net.training
    assert all(
        block.avd_after is not None for block in net.modules() if isinstance(block, Bottleneck) and _pools(block)
    )
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def _pools(block: Bottleneck) -> bool:
    return block.downsample is not None and isinstance(block.downsample[0], nn.AvgPool2d)


def test_the_graph_sums_over_no_axis(tmp_path: Path) -> None:
    """Only GlobalAveragePool averages, and each strided block pools its splits before their sum."""
    net = create_backbone("resnest14").eval()
    export_onnx(onnx_form(net), tmp_path / "net.onnx", torch.rand(1, 3, 64, 64), reference=net)
    graph = onnx.load(tmp_path / "net.onnx").graph
    kinds = Counter(node.op_type for node in graph.node)
    assert not {"ReduceSum", "ReduceMean", "BatchNormalization", "Less", "Where"} & kinds.keys()
    assert kinds["GlobalAveragePool"] == 4 + 1  # blocks, and the classifier's
    makers = {output: node.op_type for node in graph.node for output in node.output}
    pooled = [makers[node.input[0]] for node in graph.node if node.op_type == "AveragePool"]
    assert sorted(pooled) == ["Relu"] * 6  # splits and shortcuts of three blocks
