"""What docs/fidelity.md says of other implementations, where they are not what we build; and the tests it names.

Where they are the same, test_variants.py and the tests of the layers show it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import timm
import torch
from resnest.torch.resnet import Bottleneck as ReleasedBottleneck
from resnest.torch.resnet import ResNet as ReleasedResNet
from timm.layers import DropPath, EcaModule
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from resnest_det import create_backbone
from resnest_det.layers.eca import eca_kernel_size

REPOSITORY = Path(__file__).parents[2]
STAGES = ("layer1", "layer2", "layer3", "layer4")


# --- ResNeSt: stochastic depth


@torch.no_grad()
def test_timms_resnest_drops_no_branch() -> None:
    """In a block without a projection, the dropped tensor is not used any more: stochastic depth does nothing."""
    torch.manual_seed(0)
    x = torch.rand(2, 256, 8, 8)
    theirs = timm.create_model("resnest26d", zero_init_last=False).layer1[1].train()
    expected = theirs(x)
    theirs.drop_path = DropPath(1.0)
    assert torch.equal(theirs(x), expected)
    assert not torch.equal(expected, x)

    ours = create_backbone("resnest26").layer1[1].train()
    ours.drop_path = StochasticDepth(1.0, "row")
    assert torch.equal(ours(x), x)


class OfZeros(nn.Module):
    """What a module makes of zeros in place of its input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(torch.zeros_like(x))


@torch.no_grad()
def test_timms_resnest_drops_the_shortcut() -> None:
    """In a block with a projection, the branch stays and the shortcut loses its input. Ours loses the branch."""
    torch.manual_seed(0)
    x = torch.rand(2, 256, 8, 8)
    theirs = timm.create_model("resnest14d", zero_init_last=False).layer2[0].eval()
    undropped = theirs(x)
    theirs.drop_path = DropPath(1.0).train()
    dropped = theirs(x)
    theirs.drop_path, theirs.downsample = None, OfZeros(theirs.downsample)
    assert torch.equal(dropped, theirs(x))
    assert not torch.equal(dropped, undropped)

    ours = create_backbone("resnest14").layer2[0].eval()
    ours.drop_path = StochasticDepth(1.0, "row").train()
    assert torch.equal(ours(x), ours.downsample(x).relu())


# --- ResNeSt: dilated stages


def stage_outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []
    for stage in STAGES:
        net.get_submodule(stage).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    net.eval()(images)
    return outputs


@pytest.mark.parametrize(("output_stride", "dilation"), [(16, {"dilation": 2}), (8, {"dilated": True})])
@torch.inference_mode()
def test_dilated_resnests_of_timm_are_others(output_stride: int, dilation: dict[str, object]) -> None:
    """The weights fit, and the outputs are those of ours and of the released package up to the first dilated stage."""
    torch.manual_seed(0)
    ours = create_backbone("resnest14", output_stride=output_stride)
    theirs = timm.create_model("resnest14d", output_stride=output_stride)
    form = {"radix": 2, "groups": 1, "bottleneck_width": 64, "stem_width": 32, "deep_stem": True, "avg_down": True}
    released = ReleasedResNet(ReleasedBottleneck, [1, 1, 1, 1], avd=True, **form, **dilation)
    for net in (theirs, released):
        net.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64)
    outputs, of_timm, of_released = (stage_outputs(net, images) for net in (ours, theirs, released))
    equal = {16: [True, True, True, False], 8: [True, True, False, False]}[output_stride]
    assert [bool((a - b).abs().max() < 1e-5) for a, b in zip(outputs, of_released, strict=True)] == [True] * 4
    assert [bool((a - b).abs().max() < 1e-5) for a, b in zip(outputs, of_timm, strict=True)] == equal
    assert all((a - b).abs().max() > 0.1 for a, b, same in zip(outputs, of_timm, equal, strict=True) if not same)

    first = STAGES[equal.index(False)]
    block, of_theirs, of_release = (net.get_submodule(first)[0] for net in (ours, theirs, released))
    assert (block.avd_after.kernel_size, block.avd_after.stride) == (3, 1)
    assert (of_release.avd_layer.kernel_size, of_release.avd_layer.stride) == (3, 1)
    assert of_theirs.avd_last is None
    assert of_release.downsample[0].kernel_size == 1  # the identity
    assert of_theirs.downsample[0].kernel_size == (2, 2)


# --- SE and ECA: widths and kernels


def test_width_of_squeeze_and_excitation_in_timm() -> None:
    """A sixteenth of the channels, but at least 8, which the 64 of the first stage of basic blocks do not reach."""
    with torch.device("meta"):
        ours, theirs = create_backbone("se_resnet18"), timm.create_model("seresnet18")
    assert [ours.get_submodule(stage)[0].gate.fc1.out_channels for stage in STAGES] == [4, 8, 16, 32]
    assert [theirs.get_submodule(stage)[0].se.fc1.out_channels for stage in STAGES] == [8, 8, 16, 32]
    counts = [sum(parameter.numel() for parameter in net.parameters()) for net in (ours, theirs)]
    assert counts == [11_778_592, 11_779_624]


@pytest.mark.parametrize(
    ("name", "released", "formula"),
    [
        ("eca_resnet18", [3, 5, 7, 7], [3, 5, 5, 5]),
        ("eca_resnet34", [3, 3, 5, 7], [3, 5, 5, 5]),
        ("eca_resnet50", [3, 5, 5, 7], [5, 5, 5, 7]),
        ("eca_resnet101", [3, 3, 5, 7], [5, 5, 5, 7]),
        ("eca_resnet152", [3, 3, 5, 7], [5, 5, 5, 7]),
    ],
)
def test_released_kernels_of_eca_are_not_the_formulas(name: str, released: list[int], formula: list[int]) -> None:
    with torch.device("meta"):
        net = create_backbone(name)
    gates = [net.get_submodule(stage)[-1].gate for stage in STAGES]
    assert [gate.conv.kernel_size[0] for gate in gates] == released
    assert [EcaModule(gate.channels).conv.kernel_size[0] for gate in gates] == formula
    assert [eca_kernel_size(gate.channels) for gate in gates] == formula
    by_hand = [math.floor(math.log2(gate.channels) / 2 + 1 / 2) for gate in gates]  # the paper's |log2(C) / 2 + 1 / 2|
    assert [size + (size % 2 == 0) for size in by_hand] == formula


def test_kernels_of_eca_in_timms_networks_are_the_formulas() -> None:
    with torch.device("meta"):
        net = timm.create_model("ecaresnet50d")
    assert [net.get_submodule(stage)[-1].se.conv.kernel_size[0] for stage in STAGES] == [5, 5, 5, 7]


# --- docs/fidelity.md


def test_tests_that_the_page_names_are_there() -> None:
    page = (REPOSITORY / "docs" / "fidelity.md").read_text()
    named = re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)(?:::(\w+))?", page)
    assert any(function for _, function in named)
    for file, function in named:
        found = list((REPOSITORY / "tests").rglob(file))
        assert found, file
        if function:
            assert any(re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE) for path in found), function
