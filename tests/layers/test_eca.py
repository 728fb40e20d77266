"""EfficientChannelAttention against a plain loop and timm's module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import EcaModule
from torch import Tensor

from resnest_det.layers import EfficientChannelAttention
from tests.layers.gradients import output_and_gradients


def plain_eca(layer: EfficientChannelAttention, x: Tensor) -> Tensor:
    """The paper's formulas with loops over samples, channels and neighbours."""
    kernel = layer.conv.weight[0, 0]
    reach = len(kernel) // 2
    samples = []
    for sample in x:
        means = [features.mean() for features in sample]
        scaled = []
        for c, features in enumerate(sample):
            z = torch.zeros((), dtype=x.dtype)
            for tap, weight in enumerate(kernel):
                if 0 <= c + tap - reach < len(means):
                    z = z + weight * means[c + tap - reach]
            scaled.append(features / (1 + torch.exp(-z)))
        samples.append(torch.stack(scaled))
    return torch.stack(samples)


@pytest.mark.parametrize("shape", [(3, 10), (3, 10, 5), (3, 10, 5, 4), (3, 10, 2, 3, 4), (1, 10, 1, 1)])
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 25])  # the last one reaches over both ends
def test_equals_the_plain_formulas(shape: tuple[int, ...], kernel_size: int) -> None:
    torch.manual_seed(0)
    layer = EfficientChannelAttention(10, kernel_size=kernel_size).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = output_and_gradients(lambda x: plain_eca(layer, x), x, [layer.conv.weight])
    got = output_and_gradients(layer, x, [layer.conv.weight])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [None, 3, 9])
def test_equals_timm_by_name(kernel_size: int | None) -> None:
    torch.manual_seed(0)
    ours = EfficientChannelAttention(256, kernel_size=kernel_size).double()
    theirs = (EcaModule(256) if kernel_size is None else EcaModule(kernel_size=kernel_size)).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 256, 5, 4, dtype=torch.float64)
    expected = output_and_gradients(theirs, x, [theirs.conv.weight])
    got = output_and_gradients(ours, x, [ours.conv.weight])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_formula_gives_the_kernels_of_timm() -> None:
    for channels in (*range(1, 130), 256, 512, 640, 960, 1024, 2048, 4096):
        for gamma, beta in ((2, 1), (1, 0), (1.5, -3)):
            ours = EfficientChannelAttention(channels, gamma=gamma, beta=beta).conv.kernel_size
            assert ours == EcaModule(channels, gamma=gamma, beta=beta).conv.kernel_size


@pytest.mark.parametrize(("channels", "kernel_size"), [(1, 3), (64, 3), (256, 5), (512, 5), (1024, 5), (2048, 7)])
def test_formula(channels: int, kernel_size: int) -> None:
    assert EfficientChannelAttention(channels).conv.kernel_size == (kernel_size,)


def test_children() -> None:
    layer = EfficientChannelAttention(32)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"conv.weight": (1, 1, 3)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels=0 must be 1 or more"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd and 1 or more"),
        ({"kernel_size": -1}, "kernel_size=-1 must be odd and 1 or more"),
        ({"gamma": 0}, "gamma=0 must be above 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientChannelAttention(**{"channels": 32, **arguments})


@pytest.mark.parametrize("shape", [(32,), (2, 31, 4, 4), (2, 4, 32)])
def test_wrong_input(shape: tuple[int, ...]) -> None:
    message = rf"x of shape \({', '.join(map(str, shape))},?\) must be \(N, 32, \.\.\.\): channels=32"
    with pytest.raises(ValueError, match=message):
        EfficientChannelAttention(32)(torch.randn(shape))
