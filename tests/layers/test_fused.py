"""What is computed in fewer passes, against the modules called one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

from resnest_det import create_backbone
from resnest_det.backbones.resnet import BasicBlock, Bottleneck
from resnest_det.layers import SplitAttentionConv2d, SyncBatchNorm, plain_layers
from resnest_det.layers import fused as fused_layers
from resnest_det.layers.fused import average_pool, conv_norm_relu, convolve, norm_add_relu, norm_relu_conv, trains_fused
from tests.benchmarks.activation_checkpointing import SavedBytes
from tests.random_norms import randomise_norms

LAYOUTS = [torch.contiguous_format, torch.channels_last]
NORMS = [nn.BatchNorm2d, FrozenBatchNorm2d]


def maps(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()


def norm(kind: Callable[[int], nn.Module], channels: int, *, training: bool = True) -> nn.Module:
    layer = kind(channels).double().train(training)
    with torch.no_grad():
        for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            getattr(layer, name).copy_(torch.rand(channels) + low)
    return layer


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of every parameter, of a training step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = net(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    grads = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.requires_grad}
    # In front of a norm, a bias has a gradient of rounding alone.
    return [out.detach(), x.grad, *[grad for name, grad in grads.items() if not name.endswith("fc1.bias")]]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the matrix products that convolutions were computed by."""
    shapes: list[torch.Size] = []

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        out = original(x, weight)
        shapes.append(out.shape)
        return out

    assert fused_layers.has_onednn_product()
    original = fused_layers.onednn_product
    monkeypatch.setattr(fused_layers, "onednn_product", multiply)
    return shapes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_finite_differences(
    layout: torch.memory_format, kind: Callable[[int], nn.Module], training: bool
) -> None:
    torch.manual_seed(0)
    x, shortcut = (maps(2, 4, 5, 3, layout=layout) for _ in range(2))
    layer = norm(kind, 4, training=training)
    if training and kind is nn.BatchNorm2d:
        layer.momentum = 0.0  # gradcheck calls it often
    conv = nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False).double()
    assert trains_fused(x, (conv,), (layer,))
    assert gradcheck(lambda x, *_: norm_relu_conv(x, layer, conv), (x, conv.weight, *layer.parameters()))
    assert gradcheck(lambda x, s, *_: norm_add_relu(x, layer, s), (x, shortcut, *layer.parameters()))
    pool = nn.AvgPool2d(3, 2, 1)
    assert gradcheck(lambda x: average_pool(x, pool), (x,))


@pytest.mark.parametrize("radix", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_split_attention_are_those_of_finite_differences(radix: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    layer = SplitAttentionConv2d(2 * radix, 4, groups=2, radix=radix, reduction=1).double()
    for module in (layer.bn0, layer.bn1):
        module.momentum = 0.0
    x = maps(3, 2 * radix, 4, 3, layout=layout)
    assert layer.trains_fused(x)
    parameters = [p for name, p in layer.named_parameters() if name != "fc1.bias"]
    assert gradcheck(lambda x, *_: layer(x), (x, *parameters))


@pytest.mark.filterwarnings("ignore:.*double precision")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 2), (1, 1)])
def test_gradients_of_a_matrix_product_are_those_of_finite_differences(
    layout: torch.memory_format, size: tuple[int, int], products: list[torch.Size]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, *size).contiguous(memory_format=layout).requires_grad_()
    conv = nn.Conv2d(12, 5, 1, bias=False).to(memory_format=layout)
    out = convolve(x, conv)
    torch.testing.assert_close(out, conv(x))
    assert out.is_contiguous(memory_format=layout)
    # oneDNN has no float64; the differences of what is linear in each of its inputs are exact, however far apart.
    assert gradcheck(lambda x, _: convolve(x, conv), (x, conv.weight), eps=1.0, atol=1e-4)
    assert bool(products) == (layout == torch.channels_last or size == (1, 1))


@pytest.mark.parametrize("case", ["few pixels", "many pixels", "NCHW", "stride", "padding", "groups", "3x3", "float64"])
def test_which_convolutions_are_matrix_products(case: str, products: list[torch.Size]) -> None:
    torch.manual_seed(0)
    arguments = {"stride": {"stride": 2}, "padding": {"padding": 1}, "groups": {"groups": 2}}.get(case, {})
    conv = nn.Conv2d(64, 6, 3 if case == "3x3" else 1, bias=False, **arguments)
    x = torch.randn(2, 64, 6 if case == "many pixels" else 5, 6)
    if case != "NCHW":
        x = x.contiguous(memory_format=torch.channels_last)
    if case == "float64":
        conv, x = conv.double(), x.double()
    layer = norm(nn.BatchNorm2d, 64).to(x.dtype)
    layer.momentum = 0.0
    x.requires_grad_()
    for ours, plain in (
        (lambda: convolve(x, conv), lambda: conv(x)),
        (lambda: norm_relu_conv(x, layer, conv), lambda: conv(layer(x).relu())),
    ):
        products.clear()
        found, expected = (
            (out, *torch.autograd.grad(out.square().sum(), (x, conv.weight))) for out in (ours(), plain())
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # Of the forward pass, the input's gradient and the weight's.
        assert products == ([(60, 6), (60, 64), (6, 64)] if case == "few pixels" else [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_weights_lie_as_the_weights(layout: torch.memory_format, products: list[torch.Size]) -> None:
    """DistributedDataParallel warns of others."""
    x = torch.randn(2, 64, 3, 4).contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(64, 6, 1, bias=False).to(memory_format=layout)
    (grad,) = torch.autograd.grad(convolve(x, conv).sum(), conv.weight)
    assert products
    assert grad.stride() == conv.weight.stride()


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_only_wanted_gradients_are_multiplied(frozen: str, products: list[torch.Size]) -> None:
    x = torch.randn(2, 64, 3, 4).contiguous(memory_format=torch.channels_last).requires_grad_(frozen != "input")
    conv = nn.Conv2d(64, 6, 1, bias=False)
    conv.weight.requires_grad_(frozen != "weight")
    convolve(x, conv).sum().backward()
    assert products == [(24, 6), (6, 64) if frozen == "input" else (24, 64)]
    assert (x.grad is None, conv.weight.grad is None) == (frozen == "input", frozen == "weight")


def test_a_matrix_product_in_a_training_step(products: list[torch.Size]) -> None:
    torch.manual_seed(0)
    net = create_backbone("resnest14", num_classes=4, norm="frozen_bn").to(memory_format=torch.channels_last)
    exact = copy.deepcopy(net).double()
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    ours = step(net, x)
    with plain_layers():
        expected = step(exact, x.double())
    # conv1, conv3 and shortcut of the last two stages, each in three passes.
    assert len(products) == 18
    for own, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(own.double(), reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("shape", [(2, 32, 1, 1), (32, 2, 1)])
def test_a_wrong_shape_is_refused_by_the_convolution(shape: tuple[int, ...], products: list[torch.Size]) -> None:
    with pytest.raises(RuntimeError, match="to have 64 channels, but got 32 channels instead"):
        convolve(torch.zeros(shape), nn.Conv2d(64, 4, 1, bias=False))
    assert not products


@pytest.mark.parametrize("without", ["operator", "autocast", "gradients", "hook", "plain_layers"])
def test_where_the_convolution_is_called(
    without: str, monkeypatch: pytest.MonkeyPatch, products: list[torch.Size]
) -> None:
    if without == "operator":
        monkeypatch.setattr(fused_layers, "has_onednn_product", lambda: False)
    x, conv = torch.randn(2, 16, 2, 2).contiguous(memory_format=torch.channels_last), nn.Conv2d(16, 4, 1, bias=False)
    calls: list[int] = []
    if without == "hook":
        conv.register_forward_hook(lambda *_: calls.append(1))
    with (
        torch.set_grad_enabled(without != "gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=without == "autocast"),
        plain_layers() if without == "plain_layers" else nullcontext(),
    ):
        out = convolve(x, conv)
    assert not products
    assert calls == ([1] if without == "hook" else [])
    assert out.dtype == (torch.bfloat16 if without == "autocast" else torch.float32)


NETWORKS = ["resnest14", "resnest50_fast_4s2x40d", "resnest50_fast_1s1x64d", "se_resnet50", "resnet18", "sk_resnet50"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm_name", ["bn", "frozen_bn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_step_is_that_of_the_modules(name: str, norm_name: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    net = create_backbone(name, num_classes=4, norm=norm_name).double().to(memory_format=layout)
    randomise_norms(net)
    other = copy.deepcopy(net)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=layout)
    ours = step(net, x)
    with plain_layers():
        expected = step(other, x)
    for own, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-8, atol=1e-10 * float(reference.abs().max()))
    for own, reference in zip(net.buffers(), other.buffers(), strict=True):
        assert torch.equal(own, reference)


@pytest.mark.parametrize("name", ["resnest14", "resnet18"])
def test_training_step_in_bfloat16(name: str) -> None:
    torch.manual_seed(0)
    net = create_backbone(name, num_classes=4)
    exact = copy.deepcopy(net)
    x = torch.randn(4, 3, 64, 64)
    with plain_layers():
        expected = step(exact, x)
        plain_net = copy.deepcopy(net)
        with torch.autocast("cpu", torch.bfloat16):
            plain = step(plain_net, x)
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(net, x)
    for own, other, reference in zip(ours, plain, expected, strict=True):
        assert own.dtype == other.dtype
        # Both are as far from float32 as sixteen bits are; neither is further than twice the other.
        errors = [float((grad.float() - reference).norm() / reference.norm()) for grad in (own, other)]
        assert errors[0] < 2 * errors[1] + 1e-3


def test_a_step_in_float16_keeps_its_dtypes() -> None:
    torch.manual_seed(0)
    layer = SplitAttentionConv2d(8, 8)
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.float16
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}
    with plain_layers(), torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(out, layer(x), rtol=1e-2, atol=1e-2)


def test_less_is_kept_for_the_backward_pass() -> None:
    net, x = create_backbone("resnest50", num_classes=4), torch.randn(2, 3, 64, 64)
    kept = {}
    for plain in (False, True):
        saved = SavedBytes(net)
        with saved:
            if plain:
                with plain_layers():
                    loss = net(x).sum()
            else:
                loss = net(x).sum()
        kept[plain] = saved.now
        del loss
    assert kept[False] < 0.85 * kept[True]


def test_a_backward_pass_twice() -> None:
    layer = SplitAttentionConv2d(4, 4).double()
    x = maps(3, 4, 5, 5)
    loss = layer(x).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_parameters_that_are_not_trained() -> None:
    torch.manual_seed(0)
    net = create_backbone("resnest14", num_classes=4).double()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("layer3" in name or "fc" in name)
    other = copy.deepcopy(net)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    net(x).sum().backward()
    with plain_layers():
        other(x).sum().backward()
    for (name, own), expected in zip(net.named_parameters(), other.parameters(), strict=True):
        assert (own.grad is None) == (expected.grad is None), name
        if own.grad is not None and not name.endswith("fc1.bias"):
            torch.testing.assert_close(own.grad, expected.grad, rtol=1e-8, atol=1e-10)


def test_second_derivatives_need_plain_layers() -> None:
    layer, x = SplitAttentionConv2d(4, 4).double(), maps(3, 4, 5, 5)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with plain_layers():
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["resnest14", "resnet18"])
def test_empty_batches_train(name: str) -> None:
    net = create_backbone(name, num_classes=2, norm="frozen_bn")
    out = net(torch.zeros(0, 3, 64, 64))
    out.sum().backward()
    assert out.shape == (0, 2)
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_one_value_a_channel_is_refused() -> None:
    x = maps(1, 4, 1, 1)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 1, 1\), one value a channel"):
        norm_relu_conv(x, norm(nn.BatchNorm2d, 4), nn.Conv2d(4, 4, 1, bias=False).double())


def test_running_statistics_of_a_cumulative_average() -> None:
    ours, expected = (nn.BatchNorm2d(4, momentum=None).double() for _ in range(2))
    conv = nn.Conv2d(4, 4, 1, bias=False).double()
    for _ in range(3):
        x = maps(2, 4, 3, 3)
        norm_relu_conv(x, ours, conv)
        expected(x)
    torch.testing.assert_close(ours.state_dict(), expected.state_dict())


# Inference.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*NORMS, SyncBatchNorm])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_in_the_weights(layout: torch.memory_format, kind: Callable[[int], nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    conv, relu = nn.Conv2d(6, 8, 3, 2, 1, groups=2, bias=bias), nn.ReLU()
    layer = norm(kind, 8, training=False).float()
    x = torch.randn(2, 6, 16, 16).contiguous(memory_format=layout)
    for activation in (relu, None):
        with torch.inference_mode():
            out = conv_norm_relu(x, conv, layer, activation)
            expected = layer(conv(x))
            expected = expected if activation is None else activation(expected)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert out.is_contiguous(memory_format=layout)


def test_changed_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = []
    original = fused_layers._folded_convolution
    monkeypatch.setattr(fused_layers, "_folded_convolution", lambda *a: folded.append(1) or original(*a))
    conv, layer = nn.Conv2d(4, 4, 1), norm(nn.BatchNorm2d, 4, training=False).float()
    x = torch.randn(1, 4, 8, 8)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(conv_norm_relu(x, conv, layer, None), layer(conv(x)), rtol=1e-5, atol=1e-5)
        conv.weight.data.mul_(2)  # which no version counter sees
    assert len(folded) == 2


@pytest.mark.parametrize("without", ["grad", "training", "hook", "bfloat16", "few pixels", "plain_layers", "fused op"])
def test_what_is_not_folded(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conv, layer = nn.Conv2d(4, 4, 3, padding=1), norm(nn.BatchNorm2d, 4, training=without == "training").float()
    x = torch.randn(2, 4, 1 if without == "few pixels" else 9, 5)
    calls: list[int] = []
    if without == "hook":
        layer.register_forward_hook(lambda *_: calls.append(1))
    if without == "bfloat16":
        conv, layer, x = conv.bfloat16(), layer.bfloat16(), x.bfloat16()
    if without == "fused op":
        monkeypatch.setattr(fused_layers, "has_fused_convolution", lambda: False)
    else:
        monkeypatch.setattr(fused_layers, "_folded_convolution", lambda *_: pytest.fail("folded"))
    with torch.set_grad_enabled(without == "grad"):
        if without == "plain_layers":
            with plain_layers():
                out = conv_norm_relu(x, conv, layer, nn.ReLU())
        else:
            out = conv_norm_relu(x, conv, layer, nn.ReLU())
        assert calls == ([1] if without == "hook" else [])
        layer._forward_hooks.clear()
        torch.testing.assert_close(out, layer(conv(x)).relu(), rtol=1e-5, atol=1e-5)


def test_whoever_counts_operations_sees_all_of_them() -> None:
    net, x = create_backbone("resnest14").eval(), torch.rand(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(2.75, abs=0.02)


@pytest.mark.parametrize("child", ["conv1", "relu", "conv2", "conv2.conv", "conv2.bn0", "downsample"])
@pytest.mark.parametrize("training", [True, False])
def test_hooks_in_a_block_are_called(child: str, training: bool) -> None:
    net = create_backbone("resnest14").train(training)
    block = net.layer1[0]
    calls: list[int] = []
    block.get_submodule(child).register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(training):
        net(torch.rand(2, 3, 64, 64))
    assert calls


@pytest.mark.parametrize("name", ["resnest14", "resnest50_fast_2s1x64d", "resnet50", "resnet18"])
def test_every_block_takes_the_other_way(name: str) -> None:
    net = create_backbone(name)
    blocks = [block for block in net.modules() if isinstance(block, (Bottleneck, BasicBlock))]
    kinds: list[str] = []
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        out = block(x)  # which keeps its graph
        functions, waiting = set(), [out.grad_fn]
        while waiting:
            node = waiting.pop()
            functions.add(type(node).__name__)
            waiting += [other for other, _ in node.next_functions if other is not None]
        assert {"_NormAddReluBackward", "_NormReluConvBackward"} & functions == (
            {"_NormAddReluBackward"}
            if getattr(block, "avd_before", None)
            else {"_NormAddReluBackward", "_NormReluConvBackward"}
        )
        kinds += functions
        with plain_layers():
            assert "_Norm" not in type(block(x).grad_fn).__name__
    assert ("_AveragePoolBackward" in kinds) == ("_AttendBackward" in kinds) == ("resnest" in name)


@pytest.mark.parametrize("training", [True, False])
def test_another_activation_is_called(training: bool) -> None:
    net = create_backbone("resnest14", num_classes=3).double().train(training)
    for block in net.modules():
        if isinstance(block, (Bottleneck, SplitAttentionConv2d)):
            block.relu = nn.SiLU()
    other = copy.deepcopy(net)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        out = net(x)
        with plain_layers():
            torch.testing.assert_close(out, other(x))


def test_a_hook_on_a_gradient_runs_once() -> None:
    torch.manual_seed(0)
    layer = SplitAttentionConv2d(4, 4).double()
    other = copy.deepcopy(layer)
    for own in (layer, other):
        own.fc2.weight.register_hook(lambda grad: grad * 0.5)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    layer(x).square().sum().backward()
    with plain_layers():
        other(x).square().sum().backward()
    torch.testing.assert_close(layer.fc2.weight.grad, other.fc2.weight.grad)


@pytest.mark.parametrize("built_without", [True, False])
def test_statistics_that_are_not_tracked(built_without: bool) -> None:
    ours = nn.BatchNorm2d(4, track_running_stats=not built_without).double()
    ours.track_running_stats = False
    before, expected = copy.deepcopy(ours.state_dict()), copy.deepcopy(ours)
    x, conv = maps(2, 4, 3, 3), nn.Conv2d(4, 4, 1, bias=False).double()
    for training in (True, False):
        if not training and not built_without:
            continue
        ours.train(training), expected.train(training)
        torch.testing.assert_close(norm_relu_conv(x, ours, conv), conv(expected(x).relu()))
    torch.testing.assert_close(ours.state_dict(), before)


@pytest.mark.parametrize("pool", ["layer2.0.avd_after", "layer2.0.downsample.0"])
def test_hooks_on_pools_are_called(pool: str) -> None:
    net = create_backbone("resnest14")
    calls: list[int] = []
    net.get_submodule(pool).register_forward_hook(lambda *_: calls.append(1))
    net(torch.rand(2, 3, 64, 64))
    assert calls == [1]


def test_the_random_numbers_of_a_run_are_not_touched() -> None:
    fused_layers.has_fused_convolution.cache_clear()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fused_layers.has_fused_convolution()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("plain_forward", [True, False])
def test_a_recomputation_takes_the_way_of_its_forward_pass(plain_forward: bool) -> None:
    torch.manual_seed(0)
    net = create_backbone("resnest14", num_classes=3, checkpoint=True).double()
    other = copy.deepcopy(net)
    for stage in (other.layer1, other.layer2, other.layer3, other.layer4):
        stage.checkpoint = False
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for own in (net, other):
        if plain_forward:
            with plain_layers():
                loss = own(x).square().sum()
        else:
            loss = own(x).square().sum()
        loss.backward()
    for own, expected in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(own.grad, expected.grad)


def test_part_of_the_stem() -> None:
    stem = create_backbone("resnest14").conv1
    assert type(stem[:3]) is nn.Sequential
    assert stem[:3](torch.rand(1, 3, 8, 8)).shape == (1, 32, 4, 4)
