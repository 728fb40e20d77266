"""The form for integer kernels: the same function, without grouped convolutions and cut maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from resnest_det.backbones import create_backbone
from resnest_det.backbones.resnet import Bottleneck, ResNet
from resnest_det.deploy.integer_form import integer_form
from resnest_det.layers import SplitAttentionConv2d
from tests.random_norms import randomise_norms


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (N, C, H, W): one of a user's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def network(
    *, radix: int = 2, groups: int = 1, average_pool: Any = "after", norm_layer: Any = nn.BatchNorm2d
) -> nn.Module:
    def split_attention(channels: int, *, stride: int, dilation: int, groups: int, norm_layer: Any) -> nn.Module:
        return SplitAttentionConv2d(
            channels,
            channels,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=groups,
            radix=radix,
            norm_layer=norm_layer,
        )

    net = ResNet(
        Bottleneck,
        (1, 1, 1, 2),
        num_classes=5,
        groups=groups,
        width_per_group=12,
        spatial_conv=split_attention,
        average_pool=average_pool,
        drop_path=0.2,
        norm_layer=norm_layer,
    )
    return randomise_norms(net).eval()


@torch.no_grad()
def assert_same(net: nn.Module) -> nn.Module:
    form = integer_form(net)
    images = torch.randn(2, 3, 45, 64)
    expected, given = net(images), form(images)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    return form


@pytest.mark.parametrize("average_pool", ["after", "before", None])
@pytest.mark.parametrize(("radix", "groups"), [(2, 1), (1, 1), (2, 2), (3, 2), (4, 1)])
def test_the_same_function(radix: int, groups: int, average_pool: Any) -> None:
    form = assert_same(network(radix=radix, groups=groups, average_pool=average_pool))
    assert {module.groups for module in form.modules() if isinstance(module, nn.Conv2d)} <= {1, groups}
    assert not any(isinstance(module, SplitAttentionConv2d | nn.BatchNorm2d) for module in form.modules())


@pytest.mark.parametrize("name", ["resnest14", "resnet18", "sk_resnet50"])
def test_networks_of_the_table(name: str) -> None:
    assert_same(randomise_norms(create_backbone(name, num_classes=5)).eval())


def test_the_model_stays_as_it_was() -> None:
    net = network().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    form = integer_form(net)
    assert net.training
    assert not form.training
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_stages_of_an_extractor() -> None:
    net = network()
    body = IntermediateLayerGetter(net, {"layer2": "a", "layer4": "b"}).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected, given = body(images), integer_form(body)(images)
    for key, features in expected.items():
        torch.testing.assert_close(given[key], features, rtol=1e-5, atol=1e-5 * float(features.abs().max()))


def test_other_norms_keep_their_splits_together() -> None:
    form = assert_same(create_backbone("resnest14", num_classes=5, norm="gn").eval())
    assert any(isinstance(module, nn.Conv2d) and module.groups == 2 for module in form.modules())


@pytest.mark.parametrize("norm_layer", [ChannelNorm, nn.Identity])
def test_norms_of_ones_own(norm_layer: Any) -> None:
    form = assert_same(network(norm_layer=norm_layer))
    assert sum(isinstance(module, norm_layer) for module in form.modules()) > 10


def test_another_activation() -> None:
    net = network()
    for block in net.modules():
        if isinstance(block, Bottleneck):
            block.relu = nn.SiLU()  # type: ignore[assignment]
    assert_same(net)
