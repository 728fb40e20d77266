"""SelectiveKernelConv2d against a plain loop and timm's module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import SelectiveKernel
from torch import Tensor, nn
from torch.nn import functional as F

from resnest_det.layers import SelectiveKernelConv2d, group_norm, pooled_group_norm
from tests.layers.gradients import output_and_gradients
from tests.random_norms import randomise_norms


def plain_selective_kernel(layer: SelectiveKernelConv2d, x: Tensor, dilations: list[int], stride: int) -> Tensor:
    """The paper's formulas in the order it gives them, with loops over images and channels."""

    def norm(module: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)

    maps = []
    for (conv, bn, _), d in zip(layer.branches, dilations, strict=True):
        padding = d * (conv.kernel_size[0] // 2)
        maps.append(norm(bn, F.conv2d(x, conv.weight, None, stride, padding, d, conv.groups)).clamp(min=0))
    channels = maps[0].shape[1]
    hidden = (layer.fc1.weight[:, :, 0, 0] @ sum(maps).mean((2, 3)).T).T
    hidden = norm(layer.bn1, hidden[:, :, None, None])[:, :, 0, 0].clamp(min=0)
    logits = (layer.fc2.weight[:, :, 0, 0] @ hidden.T).T
    images = []
    for image in range(len(x)):
        selected = []
        for c in range(channels):
            weights = torch.stack([logits[image, m * channels + c] for m in range(len(maps))]).exp()
            selected.append(sum(w * own[image, c] for w, own in zip(weights / weights.sum(), maps, strict=True)))
        images.append(torch.stack(selected))
    return torch.stack(images)


@pytest.mark.parametrize("branch_dilations", [(1, 2), (2, 1, 3), (1, 1, 2, 2)])
@pytest.mark.parametrize(
    ("stride", "dilation", "groups", "kernel_size"), [(1, 1, 1, 3), (2, 1, 4, 3), (1, 2, 2, 3), (1, 1, 1, 5)]
)
def test_equals_the_plain_formulas(
    branch_dilations: tuple[int, ...], stride: int, dilation: int, groups: int, kernel_size: int
) -> None:
    torch.manual_seed(0)
    layer = SelectiveKernelConv2d(
        8,
        12,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        groups=groups,
        branch_dilations=branch_dilations,
    )
    randomise_norms(layer).double().eval()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    dilations = [dilation * own for own in branch_dilations]
    parameters = list(layer.parameters())
    expected = output_and_gradients(lambda x: plain_selective_kernel(layer, x, dilations, stride), x, parameters)
    torch.testing.assert_close(output_and_gradients(layer, x, parameters), expected, rtol=1e-10, atol=1e-11)


def key_of_timm(key: str) -> str:
    """The name in timm's SelectiveKernel of a tensor of ours."""
    parts = key.split(".")
    if parts[0] == "branches":
        return ".".join(["paths", parts[1], {"0": "conv", "1": "bn"}[parts[2]], *parts[3:]])
    return ".".join(["attn", {"fc1": "fc_reduce", "bn1": "bn", "fc2": "fc_select"}[parts[0]], *parts[1:]])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("num_branches", "stride", "dilation", "groups"), [(2, 1, 1, 8), (2, 2, 1, 8), (2, 1, 2, 1), (3, 1, 1, 4)]
)
def test_equals_timm(training: bool, num_branches: int, stride: int, dilation: int, groups: int) -> None:
    torch.manual_seed(0)
    ours = SelectiveKernelConv2d(
        32,
        64,
        stride=stride,
        dilation=dilation,
        groups=groups,
        branch_dilations=tuple(range(1, num_branches + 1)),
    )
    theirs = SelectiveKernel(
        32,
        64,
        kernel_size=[3, 5, 7][:num_branches],
        stride=stride,
        dilation=dilation,
        groups=groups,
        rd_divisor=32,
        split_input=False,
    )
    randomise_norms(theirs).double().train(training)
    ours.double().train(training).load_state_dict(
        {key: theirs.state_dict()[key_of_timm(key)] for key in ours.state_dict()}
    )
    x = torch.randn(3, 32, 8, 7, dtype=torch.float64)
    names = [name for name, _ in ours.named_parameters()]
    assert {key_of_timm(name) for name in names} == {name for name, _ in theirs.named_parameters()}
    expected = output_and_gradients(theirs, x, [theirs.get_parameter(key_of_timm(name)) for name in names])
    got = output_and_gradients(ours, x, list(ours.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, theirs.get_buffer(key_of_timm(name)))


@pytest.mark.parametrize(("channels", "reduction", "width"), [(128, 16, 32), (1024, 16, 64), (1024, 8, 128)])
def test_width_of_the_attention(channels: int, reduction: int, width: int) -> None:
    layer = SelectiveKernelConv2d(64, channels, groups=32, reduction=reduction)
    assert layer.fc1.out_channels == width


def test_group_norm_after_pooling_passes_the_image_on() -> None:
    torch.manual_seed(0)
    layer = SelectiveKernelConv2d(32, 32, norm_layer=group_norm, pooled_norm_layer=pooled_group_norm)
    assert isinstance(layer.branches[0][1], nn.GroupNorm)
    logits = layer.attention_logits(torch.randn(2, 32, 1, 1))
    assert logits.shape == (2, 2, 32)
    assert not torch.allclose(logits[0], logits[1])
    layer(torch.randn(1, 32, 5, 5))  # independent of the batch, so that one image trains


def test_children() -> None:
    keys = SelectiveKernelConv2d(32, 32).state_dict().keys()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert set(keys) == {
        "fc1.weight",
        "fc2.weight",
        *(f"bn1.{name}" for name in norm),
        *(f"branches.{branch}.0.weight" for branch in (0, 1)),
        *(f"branches.{branch}.1.{name}" for branch in (0, 1) for name in norm),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "in_channels=32, channels=0, stride=1, dilation=1, groups=1 and reduction=16 must all be 1"),
        ({"reduction": 0}, "reduction=0 must all be 1 or more"),
        ({"stride": 0}, "stride=0, .* must all be 1 or more"),
        ({"dilation": 0}, "dilation=0, .* must all be 1 or more"),
        ({"groups": 0}, "groups=0 and .* must all be 1 or more"),
        ({"groups": 3}, "groups=3 must divide in_channels=32 and channels=32"),
        ({"channels": 30, "groups": 4}, "groups=4 must divide in_channels=32 and channels=30"),
        ({"kernel_size": 2}, "kernel_size=2 must be odd and 1 or more"),
        ({"branch_dilations": (1,)}, r"branch_dilations=\(1,\) must be two or more numbers, .* nothing to select"),
        ({"branch_dilations": ()}, r"branch_dilations=\(\) must be two or more numbers"),
        ({"branch_dilations": [1, 0]}, r"branch_dilations=\(1, 0\) must be two or more numbers, each 1 or more"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveKernelConv2d(**{"in_channels": 32, "channels": 32, **arguments})


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_one_image_in_training_is_a_clear_error(norm_layer: type[nn.Module]) -> None:
    layer = SelectiveKernelConv2d(32, 32, norm_layer=norm_layer)
    assert layer.needs_several_images()
    with pytest.raises(ValueError, match="selective kernel attention .* cannot train on one image"):
        layer(torch.randn(1, 32, 8, 8))
    layer.bn1.eval()  # kept as it is while the rest trains
    assert not layer.needs_several_images()
    layer(torch.randn(1, 32, 8, 8))
    layer.eval()(torch.randn(1, 32, 8, 8))


def test_sync_bn_shares_with_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    assert not SelectiveKernelConv2d(32, 32, norm_layer=nn.SyncBatchNorm).needs_several_images()
    assert SelectiveKernelConv2d(32, 32, norm_layer=nn.BatchNorm2d).needs_several_images()
