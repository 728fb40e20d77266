"""Winograd's minimal filtering gives what a convolution gives, to the rounding that it states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnest_det import create_backbone
from resnest_det.deploy import optimize_for_inference, winograd
from resnest_det.deploy.winograd import WinogradConv2d, suits_winograd, winograd_products


def convolution(in_channels: int, channels: int, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(in_channels, channels, 3, padding=1, groups=groups, bias=bias).requires_grad_(False)


def in_float64(conv: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    return F.conv2d(x.double(), conv.weight.double(), bias, padding=1, groups=conv.groups)


def largest_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def test_transforms_give_the_convolution_of_a_tile() -> None:
    generator = torch.Generator().manual_seed(0)
    window, kernel = (torch.randn(size, size, generator=generator, dtype=torch.float64) for size in (6, 3))
    inputs, weights, outputs = (
        torch.tensor(matrix, dtype=torch.float64) for matrix in (winograd._INPUT, winograd._WEIGHTS, winograd._OUTPUT)
    )
    planes = (inputs @ window @ inputs.T) * (weights @ kernel @ weights.T)
    torch.testing.assert_close(
        outputs @ planes @ outputs.T, F.conv2d(window[None, None], kernel[None, None])[0, 0], rtol=1e-12, atol=1e-12
    )
    for matrix in (inputs, outputs):  # nothing is lost where they are applied
        assert torch.equal(torch.kron(matrix, matrix).float().double(), torch.kron(matrix, matrix))


# Sides that are multiples of 4 and not, smaller than a tile, and in several bands and batches of 64 tiles.
@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 29, 35), (4, 16, 18), (70, 3, 1), (9, 21, 13), (2, 70, 66)])
@pytest.mark.parametrize("tiles", [64, 256])
def test_against_float64(shape: tuple[int, int, int], tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_TILES_AT_A_TIME", tiles)
    conv = convolution(8, 12, groups=2)
    layer = WinogradConv2d(nn.Identity(), winograd_products(conv), relu=False)
    num_images, height, width = shape
    x = torch.randn(num_images, 8, height, width)
    expected = in_float64(conv, x)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        out = layer(images)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert largest_error(out, expected) < 2e-6


@pytest.mark.parametrize(("in_channels", "channels", "groups"), [(256, 512, 2), (512, 512, 1)])
def test_rounding_of_many_channels(in_channels: int, channels: int, groups: int) -> None:
    conv = convolution(in_channels, channels, groups, bias=False)
    x = torch.randn(1, in_channels, 32, 32).relu()
    expected = in_float64(conv, x)
    error = largest_error(WinogradConv2d(conv, winograd_products(conv), relu=False)(x), expected)
    assert largest_error(conv(x), expected) < error < 5e-6


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("term_shape", [None, (1, 6, 32, 32), (1, 6, 1, 1)])
def test_term_and_relu(relu: bool, term_shape: tuple[int, ...] | None) -> None:
    conv = convolution(4, 6)
    x, term = torch.randn(1, 4, 32, 32), None if term_shape is None else torch.randn(term_shape)
    expected = in_float64(conv, x) + (0 if term is None else term)
    out = WinogradConv2d(nn.Identity(), winograd_products(conv), relu=relu)(x, term)
    assert largest_error(out, expected.relu() if relu else expected) < 2e-6


def test_few_tiles_are_convolved_directly() -> None:
    conv = convolution(4, 6)
    layer = WinogradConv2d(conv, winograd_products(conv), relu=False)
    layer.products.forward = None  # type: ignore[assignment]
    for shape in ((0, 4, 40, 40), (1, 4, 12, 20), (15, 4, 1, 1)):
        x = torch.randn(shape)
        assert torch.equal(layer(x), conv(x))


def test_what_suits() -> None:
    def suits(in_channels: int = 128, channels: int = 128, kernel_size: int = 3, **arguments: int) -> bool:
        return suits_winograd(nn.Conv2d(in_channels, channels, kernel_size, **{"padding": 1, **arguments}))

    assert suits()
    assert suits(groups=2)
    assert not suits(groups=4)  # 32 channels each
    assert not suits(channels=32)
    assert not suits(in_channels=32)
    assert not suits(kernel_size=1)
    assert not suits(kernel_size=5)
    assert not suits(stride=2)
    assert not suits(dilation=2)
    assert not suits(padding=0)


class Twice(nn.Module):
    """A block that stands at two places."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(convolution(64, 64), nn.ReLU(), convolution(64, 64))
        self.first, self.second = nn.Sequential(block, nn.ReLU()), nn.Sequential(block)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_optimized_models() -> None:
    net, x = create_backbone("resnet18", num_classes=3).eval(), torch.rand(2, 3, 96, 96)
    fast = optimize_for_inference(net)
    found = [module for module in fast.modules() if isinstance(module, WinogradConv2d)]
    assert len(found) == 13  # the 3x3 of stride 1
    assert any(module.relu for module in found)
    used = []
    fast.layer1[0].conv1.products.register_forward_hook(lambda *_: used.append("layer1"))
    with torch.inference_mode():
        assert largest_error(fast(x), net(x)) < 1e-5
        assert used
        twice, features = Twice(), torch.randn(1, 64, 40, 32)
        assert largest_error(optimize_for_inference(twice)(features), twice(features)) < 1e-5


@pytest.mark.slow
def test_compiled() -> None:
    model = nn.Sequential(convolution(64, 64), nn.ReLU(), convolution(64, 64))
    fast = optimize_for_inference(model, compile=True)
    assert isinstance(fast[0], WinogradConv2d)
    with torch.inference_mode():
        for shape in ((1, 64, 32, 32), (2, 64, 65, 30), (1, 64, 8, 8)):
            x = torch.randn(shape)
            assert largest_error(fast(x), model(x)) < 1e-5
