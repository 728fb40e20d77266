"""CBAM and its two gates against plain loops and timm's module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers.cbam import CbamModule
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from resnest_det.layers import CBAM, ChannelAttention, SpatialAttention, group_norm, norm_layer
from tests.layers.gradients import output_and_gradients
from tests.random_norms import randomise_norms


def plain_channel_attention(layer: ChannelAttention, x: Tensor) -> Tensor:
    """The released formulas, image by image."""

    def mlp(pooled: Tensor) -> Tensor:
        inner = (layer.fc1.weight[:, :, 0, 0] @ pooled + layer.fc1.bias).clamp(min=0)
        return layer.fc2.weight[:, :, 0, 0] @ inner + layer.fc2.bias

    images = []
    for image in x:
        z = mlp(torch.stack([c.mean() for c in image])) + mlp(torch.stack([c.max() for c in image]))
        images.append(torch.stack([c / (1 + torch.exp(-own)) for c, own in zip(image, z, strict=True)]))
    return torch.stack(images)


def plain_spatial_attention(layer: SpatialAttention, x: Tensor) -> Tensor:
    """The released formulas with loops over images and positions, with the norm's running statistics."""
    size = layer.conv.kernel_size[0]
    reach = size // 2
    height, width = x.shape[2:]
    images = []
    for image in x:
        planes = torch.zeros(2, height + 2 * reach, width + 2 * reach, dtype=x.dtype)
        planes[0, reach : reach + height, reach : reach + width] = image.max(0).values
        planes[1, reach : reach + height, reach : reach + width] = image.mean(0)
        rows = []
        for i in range(height):
            z = [(planes[:, i : i + size, j : j + size] * layer.conv.weight[0]).sum() for j in range(width)]
            rows.append(torch.stack(z))
        z = (torch.stack(rows) - layer.bn.running_mean) / (layer.bn.running_var + 1e-5).sqrt()
        images.append(image / (1 + torch.exp(-(z * layer.bn.weight + layer.bn.bias))))
    return torch.stack(images)


@pytest.mark.parametrize(("channels", "reduction"), [(32, 16), (32, 4), (7, 3)])
def test_channel_attention_equals_the_plain_formulas(channels: int, reduction: int) -> None:
    torch.manual_seed(0)
    layer = ChannelAttention(channels, reduction=reduction).double()
    x = torch.randn(3, channels, 5, 4, dtype=torch.float64)
    parameters = list(layer.parameters())
    expected = output_and_gradients(lambda x: plain_channel_attention(layer, x), x, parameters)
    torch.testing.assert_close(output_and_gradients(layer, x, parameters), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("shape", [(2, 5, 6, 8), (1, 3, 1, 1)])
def test_spatial_attention_equals_the_plain_formulas(kernel_size: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = SpatialAttention(kernel_size=kernel_size).double().eval()
    randomise_norms(layer.bn)
    x = torch.randn(shape, dtype=torch.float64)
    parameters = list(layer.parameters())
    expected = output_and_gradients(lambda x: plain_spatial_attention(layer, x), x, parameters)
    torch.testing.assert_close(output_and_gradients(layer, x, parameters), expected, rtol=1e-10, atol=1e-12)


def test_cbam_is_the_channel_gate_then_the_spatial_gate() -> None:
    torch.manual_seed(0)
    layer = CBAM(16, reduction=4, kernel_size=3).double().eval()
    randomise_norms(layer.spatial.bn)
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    expected = plain_spatial_attention(layer.spatial, plain_channel_attention(layer.channel, x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_timm_agrees_without_biases_and_with_the_planes_swapped(training: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = CBAM(64).double().train(training), CbamModule(64).double().train(training)
    for norm in (theirs.spatial.conv.bn, ours.spatial.bn):
        randomise_norms(norm)
    nn.init.zeros_(ours.channel.fc1.bias)
    nn.init.zeros_(ours.channel.fc2.bias)
    ours.channel.load_state_dict(
        theirs.channel.state_dict() | {"fc1.bias": torch.zeros(4), "fc2.bias": torch.zeros(64)}
    )
    ours.spatial.bn.load_state_dict(theirs.spatial.conv.bn.state_dict())
    ours.spatial.conv.load_state_dict({"weight": theirs.spatial.conv.conv.weight.flip(1)})
    x = torch.randn(3, 64, 6, 5, dtype=torch.float64)
    expected = output_and_gradients(theirs, x, [theirs.channel.fc1.weight, theirs.spatial.conv.conv.weight])
    got = output_and_gradients(ours, x, [ours.channel.fc1.weight, ours.spatial.conv.weight])
    torch.testing.assert_close((*got[:3], got[3].flip(1)), expected, rtol=1e-10, atol=1e-12)
    ours.spatial.conv.load_state_dict({"weight": theirs.spatial.conv.conv.weight})
    assert (ours(x) - theirs(x)).abs().max() > 0.01  # as they are, weights do not interchange


def test_spatial_gate_starts_at_one_half_and_leaves_it() -> None:
    torch.manual_seed(0)
    layer = SpatialAttention()
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(layer(x), 0.5 * x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.conv.weight.detach().clone()
    for _ in range(2):  # the norm's weight in the first step, the convolution from the second
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert layer.bn.weight.item() != 0
    assert not torch.equal(layer.conv.weight, before)


@pytest.mark.parametrize(
    ("name", "weight", "momentum"), [("bn", 0, 0.01), ("sync_bn", 0, 0.01), ("gn", 0, None), ("frozen_bn", 1, None)]
)
def test_spatial_norm_of_every_kind(name: Any, weight: float, momentum: float | None) -> None:
    norm = SpatialAttention(norm_layer=norm_layer(name)).bn
    assert norm.weight.tolist() == [weight]
    assert norm.eps == 1e-5
    assert getattr(norm, "momentum", None) == momentum


def test_frozen_norm_leaves_the_gate_open() -> None:
    torch.manual_seed(0)
    layer = CBAM(16, norm_layer=FrozenBatchNorm2d)
    x = torch.randn(2, 16, 6, 6)
    channel_only = layer.channel(x)
    assert (layer(x) - 0.5 * channel_only).abs().max() > 0.01
    layer(x).square().sum().backward()
    assert layer.spatial.conv.weight.grad.any()


def test_a_norm_whose_weight_is_not_trained_keeps_it() -> None:
    def fixed(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels).requires_grad_(False)

    assert SpatialAttention(norm_layer=fixed).bn.weight.tolist() == [1]
    assert SpatialAttention(norm_layer=lambda channels: nn.BatchNorm2d(channels, affine=False)).bn.weight is None


def test_group_norm_layer_trains() -> None:
    torch.manual_seed(0)
    layer = CBAM(16, norm_layer=group_norm)
    layer(torch.randn(1, 16, 6, 6)).square().sum().backward()
    assert layer.spatial.bn.weight.grad.any()


def test_children() -> None:
    names = {name for name, _ in CBAM(32).named_parameters()}
    assert names == {
        *(f"channel.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")),
        "spatial.conv.weight",
        "spatial.bn.weight",
        "spatial.bn.bias",
    }


def test_width_is_at_least_one() -> None:
    assert ChannelAttention(8, reduction=16).fc1.out_channels == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels=0 and reduction=16 must both be 1 or more"),
        ({"reduction": 0}, "channels=32 and reduction=0 must both be 1 or more"),
        ({"kernel_size": 6}, "kernel_size=6 must be odd and 1 or more"),
        ({"kernel_size": -7}, "kernel_size=-7 must be odd and 1 or more"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CBAM(**{"channels": 32, **arguments})


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"x of shape \(2, 31, 4, 4\) must be \(N, 32, H, W\)"):
        ChannelAttention(32)(torch.randn(2, 31, 4, 4))
    with pytest.raises(ValueError, match=r"x of shape \(32, 4, 4\) must be \(N, 32, H, W\)"):
        ChannelAttention(32)(torch.randn(32, 4, 4))
    with pytest.raises(ValueError, match=r"x of shape \(32, 4, 4\) must be \(N, C, H, W\)"):
        SpatialAttention()(torch.randn(32, 4, 4))
