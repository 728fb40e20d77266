"""What every attention layer promises: memory formats, half precision, compile, export, gradients, no images."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torchvision.ops import FrozenBatchNorm2d

from resnest_det.layers import (
    CBAM,
    ChannelAttention,
    EfficientChannelAttention,
    SelectiveKernelConv2d,
    SpatialAttention,
    SplitAttentionConv2d,
    SqueezeExcitation,
    group_norm,
    pooled_group_norm,
)

IMAGE_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "squeeze_excitation": lambda: SqueezeExcitation(32, reduction=4),
    "squeeze_excitation_hard_residual": lambda: SqueezeExcitation(32, reduction=4, gate="hard_sigmoid", residual=True),
    "squeeze_excitation_groups": lambda: SqueezeExcitation(32, reduction=4, groups=4),
    "eca": lambda: EfficientChannelAttention(32),
    "channel_attention": lambda: ChannelAttention(32, reduction=4),
    "spatial_attention": SpatialAttention,
    "cbam": lambda: CBAM(32, reduction=4),
    "selective_kernel": lambda: SelectiveKernelConv2d(32, 32, groups=4),
    "selective_kernel_3": lambda: SelectiveKernelConv2d(32, 32, branch_dilations=(1, 2, 3)),
    "split_attention": lambda: SplitAttentionConv2d(32, 32),
    "split_attention_1": lambda: SplitAttentionConv2d(32, 32, radix=1, groups=2),
    "split_attention_4": lambda: SplitAttentionConv2d(32, 32, radix=4, groups=2),
}
OTHER_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "squeeze_excitation_tokens": (lambda: SqueezeExcitation(32, channel_dim=-1), (3, 9, 32)),
    "squeeze_excitation_pooled": (lambda: SqueezeExcitation(32), (3, 32)),
    "squeeze_excitation_video": (lambda: SqueezeExcitation(32), (3, 32, 2, 5, 4)),
    "eca_sequence": (lambda: EfficientChannelAttention(32), (3, 32, 9)),
    "eca_video": (lambda: EfficientChannelAttention(32), (3, 32, 2, 5, 4)),
}
ALL_LAYERS = {name: (build, (3, 32, 9, 6)) for name, build in IMAGE_LAYERS.items()} | OTHER_LAYERS
every_image_layer = pytest.mark.parametrize("build", IMAGE_LAYERS.values(), ids=IMAGE_LAYERS)
every_layer = pytest.mark.parametrize(("build", "shape"), ALL_LAYERS.values(), ids=ALL_LAYERS)


def awake(layer: nn.Module) -> nn.Module:
    """The layer with every norm's weight away from zero: CBAM's spatial gate starts there and would hide errors."""
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return layer


@every_image_layer
def test_channels_last_in_and_out(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = awake(build()).eval()
    x = torch.randn(2, 32, 9, 6)
    expected = layer(x)
    got = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert expected.is_contiguous()
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [SqueezeExcitation(32), EfficientChannelAttention(32)], ids=["se", "eca"])
def test_channels_last_video(layer: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 3, 5, 4)
    got = layer(x.to(memory_format=torch.channels_last_3d))
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(got, layer(x))


@pytest.mark.parametrize("layer", [SqueezeExcitation(32), EfficientChannelAttention(32)], ids=["se", "eca"])
def test_strided_features(layer: nn.Module) -> None:
    torch.manual_seed(0)
    for x in (torch.randn(32, 3).T, torch.randn(5, 32, 3).permute(2, 1, 0)):
        torch.testing.assert_close(layer(x), layer(x.contiguous()))


@every_layer
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(
    build: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    half = awake(build()).eval().to(dtype)
    x = torch.randn(shape).to(dtype)
    got = half(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), half.float()(x.float()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cls", [SelectiveKernelConv2d, SplitAttentionConv2d])
@pytest.mark.parametrize(
    ("norm_layer", "pooled_norm_layer"),
    [(nn.BatchNorm2d, None), (FrozenBatchNorm2d, None), (group_norm, pooled_group_norm)],
    ids=["bn", "frozen_bn", "gn"],
)
def test_autocast_with_every_norm(cls: type, norm_layer: type, pooled_norm_layer: type | None) -> None:
    """A norm that returns float32 meets logits in half precision."""
    torch.manual_seed(0)
    layer = cls(32, 32, norm_layer=norm_layer, pooled_norm_layer=pooled_norm_layer)
    x = torch.randn(2, 32, 9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
    torch.testing.assert_close(got.float(), layer(x), rtol=5e-2, atol=5e-2)


@every_layer
def test_compiles_whole(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    layer = awake(build())  # in training, where a norm behind a pool looks at the number of images
    x = torch.randn(shape)
    expected = copy.deepcopy(layer)(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)


@every_layer
def test_exports_with_any_number_of_images(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = awake(build()).eval()
    program = export(layer, (torch.randn(shape),), dynamic_shapes=({0: Dim("batch")},))
    for batch in (1, 5):
        x = torch.randn(batch, *shape[1:])
        torch.testing.assert_close(program.module()(x), layer(x))


@every_layer
def test_every_parameter_gets_a_gradient(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = awake(build())
    layer(torch.randn(shape)).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_layer
def test_no_images(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    x: Tensor = torch.zeros(0, *shape[1:])
    assert build().eval()(x).shape == x.shape
