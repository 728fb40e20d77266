"""SplitAttentionConv2d against a plain loop and the released layer."""

from __future__ import annotations

import pytest
import torch
from resnest.torch.splat import SplAtConv2d
from torch import Tensor, nn
from torch.nn import functional as F

from resnest_det.layers import SplitAttentionConv2d, group_norm, pooled_group_norm
from tests.random_norms import randomise_norms

CASES = [(radix, groups) for radix in (1, 2, 3, 4) for groups in (1, 2, 4)]


def plain_split_attention(layer: SplitAttentionConv2d, x: Tensor) -> Tensor:
    """The paper's formulas with loops over images, groups, channels and splits."""
    radix, groups = layer.radix, layer.groups
    maps = F.relu(layer.bn0(layer.conv(x)))
    channels = maps.shape[1] // radix
    splits = [maps[:, r * channels : (r + 1) * channels] for r in range(radix)]
    pooled = sum(splits).mean((2, 3))[:, :, None, None]
    logits = layer.fc2(F.relu(layer.bn1(layer.fc1(pooled))))[:, :, 0, 0]
    out = torch.zeros_like(splits[0])
    per_group = channels // groups
    for image in range(len(x)):
        for group in range(groups):
            for c in range(per_group):
                start = group * radix * per_group
                own = torch.stack([logits[image, start + r * per_group + c] for r in range(radix)])
                weights = own.sigmoid() if radix == 1 else own.softmax(0)
                for r in range(radix):
                    out[image, group * per_group + c] += weights[r] * splits[r][image, group * per_group + c]
    return out


@pytest.mark.parametrize(("radix", "groups"), CASES)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_equals_the_plain_formulas(radix: int, groups: int, stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    layer = randomise_norms(
        SplitAttentionConv2d(48, 16, 3, stride, dilation, dilation, groups=groups, radix=radix)
    ).eval()
    x = torch.randn(2, 48, 9, 7)
    torch.testing.assert_close(layer(x), plain_split_attention(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("radix", "groups"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_released_layer(radix: int, groups: int, training: bool) -> None:
    torch.manual_seed(0)
    ours = randomise_norms(SplitAttentionConv2d(48, 48, groups=groups, radix=radix)).double().train(training)
    theirs = SplAtConv2d(48, 48, 3, padding=1, groups=groups, bias=False, radix=radix, norm_layer=nn.BatchNorm2d)
    theirs.double().train(training).load_state_dict(ours.state_dict())
    inputs = [torch.randn(3, 48, 8, 8, dtype=torch.float64, requires_grad=True)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [layer(x) for layer, x in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-8, atol=1e-10)
    own, released = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert own.keys() == released.keys()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, released[name].grad, rtol=1e-8, atol=1e-10)


def test_children_have_the_released_names() -> None:
    names = [name for name, child in SplitAttentionConv2d(32, 32).named_children() if list(child.parameters())]
    assert names == ["conv", "bn0", "fc1", "bn1", "fc2"]


def test_width_of_the_attention_is_a_multiple_of_groups() -> None:
    layer = SplitAttentionConv2d(30, 30, groups=3, radix=2)  # 30 * 2 // 4 = 15, at least 32, then a multiple of 3
    assert layer.fc1.out_channels == 33
    assert layer.eval()(torch.randn(1, 30, 4, 4)).shape == (1, 30, 4, 4)


def test_group_norm_after_pooling_passes_the_image_on() -> None:
    torch.manual_seed(0)
    layer = SplitAttentionConv2d(64, 64, norm_layer=group_norm, pooled_norm_layer=pooled_group_norm)
    pooled = torch.randn(2, 128, 1, 1)
    assert not torch.allclose(layer.attention_logits(pooled)[0], layer.attention_logits(pooled)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radix": 0}, r"radix=0 and groups=1 must both be 1 or more"),
        ({"groups": 0}, r"radix=2 and groups=0 must both be 1 or more"),
        ({"groups": 5}, r"in_channels=32 must be divisible by groups \* radix = 10"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitAttentionConv2d(32, 32, **arguments)


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_one_image_in_training_is_a_clear_error(norm_layer: type[nn.Module]) -> None:
    layer = SplitAttentionConv2d(32, 32, norm_layer=norm_layer)
    with pytest.raises(ValueError, match="cannot train on one image"):
        layer(torch.randn(1, 32, 8, 8))
    layer.bn1.eval()  # kept as it is while the rest trains
    layer(torch.randn(1, 32, 8, 8))
    layer.eval()(torch.randn(1, 32, 8, 8))
