"""Recorded attention against the layers' formulas by hand, and Grad-CAM against its own, slow and plain."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnest_det import create_backbone, list_backbones
from resnest_det.attention import (
    LayerAttention,
    attention_layers,
    class_score,
    detection_score,
    grad_cam,
    record_attention,
    segment_score,
)
from resnest_det.layers import (
    CBAM,
    EfficientChannelAttention,
    SelectiveKernelConv2d,
    SplitAttentionConv2d,
    SqueezeExcitation,
    plain_layers,
)
from resnest_det.models import cascade_rcnn, deeplabv3plus, faster_rcnn, fcos, retinanet
from tests.random_norms import randomise_norms

QUICK = ("resnest14", "resnest50_fast_4s2x40d", "se_resnet18", "cbam_resnet18", "eca_resnet18")
WITHOUT = ("resnet", "resnext")


def seeded(layer: nn.Module) -> nn.Module:
    """The layer with random norms, in evaluation."""
    randomise_norms(layer)
    return layer.eval()


def only(record: dict[str, LayerAttention]) -> Tensor:
    (layer,) = record.values()
    return layer.weights


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- recorded values, by hand ---


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("radix", [1, 2, 3, 4])
def test_split_attention(radix: int, groups: int) -> None:
    layer = seeded(SplitAttentionConv2d(24, 12, groups=groups, radix=radix))
    x = torch.randn(3, 24, 7, 5)
    with record_attention(layer) as record, torch.no_grad():
        out = layer(x)
    shares = only(record)
    assert shares.shape == (3, radix, 12)

    with torch.no_grad():
        splits = F.relu(layer.bn0(layer.conv(x))).reshape(3, radix, 12, 7, 5)
        torch.testing.assert_close((splits * shares[..., None, None]).sum(1), out)  # what the layer is for
        pooled = splits.sum(1).mean((2, 3))
        hidden = F.relu(layer.bn1(layer.fc1(pooled[..., None, None])))[..., 0, 0]
        for group in range(groups):
            size, width = 12 // groups, hidden.shape[1] // groups
            for channel in range(size):
                logits = []
                for split in range(radix):
                    row = group * radix * size + split * size + channel
                    part = hidden[:, group * width : (group + 1) * width]
                    logits.append(part @ layer.fc2.weight[row, :, 0, 0] + layer.fc2.bias[row])
                stacked = torch.stack(logits, dim=1)
                expected = stacked.sigmoid() if radix == 1 else stacked.exp() / stacked.exp().sum(1, keepdim=True)
                torch.testing.assert_close(shares[:, :, group * size + channel], expected)
    if radix > 1:
        torch.testing.assert_close(shares.sum(1), torch.ones(3, 12))


@pytest.mark.parametrize("dilations", [(1, 2), (1, 2, 3)])
def test_selective_kernel(dilations: tuple[int, ...]) -> None:
    layer = seeded(SelectiveKernelConv2d(8, 12, branch_dilations=dilations))
    x = torch.randn(2, 8, 9, 9)
    with record_attention(layer) as record, torch.no_grad():
        out = layer(x)
    shares = only(record)
    assert record[""].kind == "branch"
    with torch.no_grad():
        maps = torch.stack([branch(x) for branch in layer.branches], dim=1)
        torch.testing.assert_close((maps * shares[..., None, None]).sum(1), out)
        pooled = maps.sum(1).mean((2, 3), keepdim=True)
        logits = layer.fc2(F.relu(layer.bn1(layer.fc1(pooled)))).reshape(2, len(dilations), 12)
    torch.testing.assert_close(shares, logits.exp() / logits.exp().sum(1, keepdim=True))
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 12))


@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize("shape", [(2, 16, 5, 4), (2, 16), (2, 16, 3, 5, 4)])
def test_squeeze_excitation(shape: tuple[int, ...], gate: Any) -> None:
    layer = SqueezeExcitation(16, reduction=4, gate=gate)
    x = torch.randn(shape)
    with record_attention(layer) as record, torch.no_grad():
        out = layer(x)
    weights = only(record)
    pooled = x.flatten(2).mean(2) if x.dim() > 2 else x
    with torch.no_grad():
        hidden = (pooled @ layer.fc1.weight[..., 0, 0].T + layer.fc1.bias).clamp(min=0)
        logits = hidden @ layer.fc2.weight[..., 0, 0].T + layer.fc2.bias
    expected = 1 / (1 + (-logits).exp()) if gate == "sigmoid" else ((logits + 3) / 6).clamp(0, 1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(x * weights.reshape(2, 16, *[1] * (x.dim() - 2)), out)


def test_squeeze_excitation_of_tokens() -> None:
    layer = SqueezeExcitation(16, channel_dim=-1)
    x = torch.randn(2, 7, 16)
    with record_attention(layer) as record, torch.no_grad():
        out = layer(x)
    torch.testing.assert_close(x * only(record)[:, None], out)


def test_efficient_channel_attention() -> None:
    layer = EfficientChannelAttention(12, kernel_size=5)
    x = torch.randn(2, 12, 6, 6)
    with record_attention(layer) as record, torch.no_grad():
        layer(x)
    padded = F.pad(x.mean((2, 3)), (2, 2))
    kernel = layer.conv.weight.detach()[0, 0]
    expected = torch.stack([(padded[:, c : c + 5] * kernel).sum(1) for c in range(12)], dim=1)
    torch.testing.assert_close(only(record), 1 / (1 + (-expected).exp()))


def test_cbam() -> None:
    layer = seeded(CBAM(32, reduction=2))
    x = torch.randn(2, 32, 9, 8)
    with record_attention(layer) as record, torch.no_grad():
        out = layer(x)
    assert {name: own.kind for name, own in record.items()} == {"channel": "channel", "spatial": "spatial"}
    channels, positions = record["channel"].weights, record["spatial"].weights

    def mlp(pooled: Tensor) -> Tensor:
        hidden = (pooled @ layer.channel.fc1.weight[..., 0, 0].T + layer.channel.fc1.bias).clamp(min=0)
        return hidden @ layer.channel.fc2.weight[..., 0, 0].T + layer.channel.fc2.bias

    with torch.no_grad():
        of_mean, of_maximum = mlp(x.flatten(2).mean(2)), mlp(x.flatten(2).max(2).values)
        assert (of_mean.abs().amax(1) > 1e-3).all()
        assert (of_maximum.abs().amax(1) > 1e-3).all()
        logits = of_mean + of_maximum
        torch.testing.assert_close(channels, 1 / (1 + (-logits).exp()))
        scaled = x * channels[..., None, None]
        planes = F.pad(torch.stack([scaled.max(1).values, scaled.mean(1)], dim=1), (3, 3, 3, 3))
        kernel, norm = layer.spatial.conv.weight[0], layer.spatial.bn
        for row, column in ((0, 0), (4, 3), (8, 7)):
            value = (planes[..., row : row + 7, column : column + 7] * kernel).sum((1, 2, 3))
            value = (value - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            torch.testing.assert_close(positions[:, row, column], 1 / (1 + (-value).exp()))
        assert positions.shape == (2, 9, 8)
        torch.testing.assert_close(scaled * positions[:, None], out)


# --- whole networks ---


def of_all(names: list[str]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", of_all([name for name in list_backbones() if not name.startswith(WITHOUT)]))
def test_every_network_with_attention_is_recorded(name: str) -> None:
    net = seeded(create_backbone(name))  # norms as built leave CBAM's spatial gate at 0.5
    blocks = [
        f"layer{stage}.{index}" for stage in (1, 2, 3, 4) for index in range(len(net.get_submodule(f"layer{stage}")))
    ]
    ends, kind = {
        "resnest": ([".conv2"], "split"),
        "sk": ([".conv2"], "branch"),
        "cbam": ([".gate.channel", ".gate.spatial"], "channel"),
    }.get(re.match("[a-z]+", name).group(), ([".gate"], "channel"))  # type: ignore[union-attr]
    with record_attention(net) as record, torch.no_grad():
        net(torch.rand(2, 3, 64, 64))
    assert list(record) == [block + end for block in blocks for end in ends]
    assert attention_layers(net) == {path: layer.kind for path, layer in record.items()}
    for path, layer in record.items():
        assert layer.kind == ("spatial" if path.endswith(".spatial") else kind)
        assert len(layer.calls) == 1
        weights = layer.weights
        assert len(weights) == 2
        assert weights.min() >= 0
        assert weights.max() <= 1
        if kind in ("split", "branch") and weights.shape[1] > 1:
            torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
        assert weights.std() > 0


@pytest.mark.parametrize("name", [name for name in list_backbones() if name.startswith(WITHOUT)][:1])
def test_networks_without_attention_are_refused(name: str) -> None:
    net = create_backbone(name)
    assert attention_layers(net) == {}
    with (
        pytest.raises(
            ValueError, match=r"^ResNet has no attention to record; recorded are SplitAttentionConv2d, .*cbam"
        ),
        record_attention(net),
    ):
        pass


def test_detectors_and_segmentation_models() -> None:
    detector = faster_rcnn(create_backbone("resnest14"), 3, min_size=64, max_size=96).eval()
    with record_attention(detector) as record, torch.no_grad():
        detector([torch.rand(3, 60, 70), torch.rand(3, 40, 30)])
    assert list(record) == [f"backbone.body.layer{stage}.0.conv2" for stage in (1, 2, 3, 4)]
    assert all(len(layer.weights) == 2 for layer in record.values())
    model = deeplabv3plus(create_backbone("cbam_resnet18", output_stride=16), 3, head_channels=8).eval()
    with record_attention(model) as record, torch.no_grad():
        model(torch.rand(1, 3, 64, 96))
    assert record["backbone.layer4.1.gate.spatial"].weights.shape == (1, 4, 6)


def test_calls_are_kept_and_joined() -> None:
    net = create_backbone("cbam_resnet18").eval()
    images = torch.rand(3, 3, 64, 64)
    with record_attention(net) as record, torch.no_grad():
        net(images)
        assert len(record["layer1.0.gate.channel"].calls) == 1  # readable within the context
        net(images[:1])
    channels, maps = record["layer2.0.gate.channel"], record["layer2.0.gate.spatial"]
    assert [len(call) for call in channels.calls] == [3, 1]
    assert channels.weights.shape == (4, 128)
    torch.testing.assert_close(channels.weights[3], channels.weights[0])
    with record_attention(net) as record, torch.no_grad():
        net(images)
        net(torch.rand(1, 3, 96, 64))
    assert [call.shape for call in record["layer2.0.gate.spatial"].calls] == [(3, 8, 8), (1, 12, 8)]
    assert maps.weights.shape == (4, 8, 8)
    with pytest.raises(
        ValueError, match=r"the 2 calls have the sizes \[\(8, 8\), \(12, 8\)\], which make no one tensor"
    ):
        _ = record["layer2.0.gate.spatial"].weights


def test_a_layer_that_did_not_run_has_no_weights() -> None:
    with record_attention(SqueezeExcitation(16)) as record:
        pass
    with pytest.raises(ValueError, match="^calls is empty: the layer has not run"):
        _ = record[""].weights


# --- no trace ---


def state_of(net: nn.Module) -> list[Any]:
    """What every module holds but its tensors, hooks among it."""
    return [
        (path, {key: list(value) if isinstance(value, dict) else type(value) for key, value in vars(module).items()})
        for path, module in net.named_modules()
    ]


@pytest.mark.parametrize("name", ["resnest14", "cbam_resnet18"])
def test_nothing_is_left_behind(name: str) -> None:
    net = create_backbone(name).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, before = net(x), state_of(net)
        tensors = {key: value.clone() for key, value in net.state_dict().items()}
        with record_attention(net):
            assert torch.equal(net(x), expected)  # and nothing is changed within
            assert list(net.state_dict()) == list(tensors)
        assert torch.equal(net(x), expected)
    assert state_of(net) == before
    assert all(torch.equal(value, tensors[key]) for key, value in net.state_dict().items())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert state_of(copied) == before


def test_nothing_is_left_after_an_exception() -> None:
    net = create_backbone("se_resnet18").eval()
    before = state_of(net)
    with pytest.raises(RuntimeError, match="in the middle"), record_attention(net):
        raise RuntimeError("in the middle")
    assert state_of(net) == before


def test_a_forward_pass_that_failed_leaves_no_values() -> None:
    layer = CBAM(16, reduction=1)

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    with record_attention(layer) as record, torch.no_grad():
        broken = layer.channel.fc2.register_forward_hook(fail)  # behind the recording one
        with pytest.raises(RuntimeError, match="broken"):
            layer(torch.randn(1, 16, 8, 8))
        broken.remove()
        x = torch.randn(1, 16, 8, 8)
        layer(x)
    with record_attention(layer) as alone, torch.no_grad():
        layer(x)
    torch.testing.assert_close(record["channel"].weights, alone["channel"].weights)


def test_contexts_within_each_other() -> None:
    net = create_backbone("eca_resnet18").eval()
    x = torch.rand(1, 3, 32, 32)
    with record_attention(net) as outer, torch.no_grad():
        with record_attention(net) as inner:
            net(x)
        net(x)
    assert len(inner["layer1.0.gate"].calls) == 1
    assert len(outer["layer1.0.gate"].calls) == 2


def test_gradients_and_training_go_on() -> None:
    net, x = create_backbone("resnest14", num_classes=2), torch.rand(2, 3, 64, 64)
    other = copy.deepcopy(net)
    with plain_layers():  # as layers with hooks are computed
        with record_attention(net) as record:
            net(x).sum().backward()
        other(x).sum().backward()
    assert not record["layer1.0.conv2"].weights.requires_grad
    for own, expected in zip(net.parameters(), other.parameters(), strict=True):
        assert own.grad is not None
        assert torch.equal(own.grad, expected.grad)


def test_recomputed_forwards_are_not_recorded_again() -> None:
    net = create_backbone("se_resnet18", num_classes=2, checkpoint=True)
    with record_attention(net) as record:
        net(torch.rand(2, 3, 64, 64)).sum().backward()
    assert [len(layer.calls) for layer in record.values()] == [1] * 8


def test_sixteen_bits_are_recorded_as_32() -> None:
    net = create_backbone("resnest14").eval()
    with record_attention(net) as record, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net(torch.rand(1, 3, 64, 64))
    weights = record["layer4.0.conv2"].weights
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(1, 512))


def test_compiled_networks_run_uncompiled_within_the_context() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            compiled.append(1)
            return graph(*arguments)

        return run

    net = nn.Sequential(nn.Conv2d(3, 16, 1), SqueezeExcitation(16)).eval()
    fast = torch.compile(net, backend=backend)
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = fast(x)
        assert compiled
        compiled.clear()
        with record_attention(fast) as record:
            torch.testing.assert_close(fast(x), expected)
        assert not compiled
        fast(x)
        assert compiled
    assert record["_orig_mod.1"].weights.shape == (1, 16)


# --- Grad-CAM ---


def plain_map(features: Tensor, gradient: Tensor) -> np.ndarray:
    """The paper's equations 1 and 2, one number at a time."""
    _, channels, height, width = features.shape
    alpha = [0.0] * channels
    for k in range(channels):
        for i in range(height):
            for j in range(width):
                alpha[k] += float(gradient[0, k, i, j]) / (height * width)
    heat = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            heat[i, j] = max(0.0, sum(alpha[k] * float(features[0, k, i, j]) for k in range(channels)))
    return heat


def small_net(num_classes: int = 2, strides: tuple[int, ...] = (1, 1, 1, 1)) -> nn.Sequential:
    """A plain classifier with four stages."""
    net, channels = nn.Sequential(), 3
    for number, stride in enumerate(strides, start=1):
        conv = nn.Conv2d(channels, 24, 3, stride, 1, bias=False)
        net.add_module(f"layer{number}", nn.Sequential(conv, nn.BatchNorm2d(24), nn.ReLU(inplace=True)))
        channels = 24
    net.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(24, num_classes))
    return net


def test_of_a_classifier_it_is_the_class_activation_map() -> None:
    """Behind mean and linear layer the gradient is the class's row of weights (Zhou et al., arXiv 1512.04150)."""
    net = seeded(small_net(5))
    nn.init.zeros_(net.fc.bias)
    image = torch.rand(3, 9, 7)
    with torch.no_grad():
        label = int(net(image[None]).argmax())  # whose logit is positive, so that something speaks for it
        features = net[:4](image[None])
        heat_by_hand = (net.fc.weight[label][:, None, None] * features[0]).sum(0).relu()
    heat = grad_cam(net, image, class_score(label))
    torch.testing.assert_close(heat, heat_by_hand / heat_by_hand.max(), atol=1e-5, rtol=1e-4)
    assert heat.max() == pytest.approx(1)
    assert heat.min() >= 0


@pytest.mark.parametrize("layer", ["layer1", "layer3", "layer2.1"])
def test_of_another_layer_it_is_the_papers(layer: str) -> None:
    net = seeded(small_net())
    image = torch.rand(3, 8, 8)
    modules = list(net)
    position = int(layer[5])
    front = modules[: position - 1] + (
        [nn.Sequential(*modules[position - 1][:2])] if "." in layer else [modules[position - 1]]
    )
    back = ([nn.ReLU()] if "." in layer else []) + modules[position:]
    features = nn.Sequential(*front)(image[None]).detach().requires_grad_()
    nn.Sequential(*back)(features)[0, 1].backward()
    for sign in (1, -1):  # for the class, and against it: at random weights, one of them may be nowhere
        expected = plain_map(features.detach(), sign * features.grad)
        heat = grad_cam(net, image, lambda output: sign * output[0, 1], layer=layer)  # noqa: B023
        np.testing.assert_allclose(heat.numpy(), expected / max(expected.max(), 1e-30), atol=2e-5)


def test_frozen_networks_have_one_too_and_nothing_is_left() -> None:
    net = seeded(small_net()).requires_grad_(False)
    before, image = state_of(net), torch.rand(3, 8, 8)
    heat = grad_cam(net, image, class_score(0))
    with torch.inference_mode():
        assert torch.equal(grad_cam(net, image, class_score(0)), heat)
    net.requires_grad_(True)
    assert torch.equal(grad_cam(net, image, class_score(0)), heat)
    assert state_of(net) == before
    assert all(parameter.grad is None for parameter in net.parameters())


def test_map_is_resized_to_the_image() -> None:
    net = seeded(small_net(strides=(2, 2, 2, 2)))
    nn.init.zeros_(net.fc.bias)
    image = torch.rand(3, 64, 48)
    with torch.no_grad():
        label = int(net(image[None]).argmax())
        coarse = (net.fc.weight[label][:, None, None] * net[:4](image[None])[0]).sum(0).relu()
    heat = grad_cam(net, image, class_score(label))
    assert coarse.shape == (4, 3)
    fine = F.interpolate(coarse[None, None], (64, 48), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(heat, fine / fine.max(), atol=1e-5, rtol=1e-4)


DETECTORS = {
    "faster_rcnn": partial(faster_rcnn, fpn_channels=16, box_head_channels=16, anchor_sizes=(8, 16, 32, 64, 128)),
    "cascade_rcnn": partial(cascade_rcnn, fpn_channels=16, box_head_channels=16, anchor_sizes=(8, 16, 32, 64, 128)),
    "retinanet": partial(retinanet, fpn_channels=32),
    "fcos": partial(fcos, fpn_channels=32),
}


def small_detector(name: str, backbone: str = "resnet18") -> nn.Module:
    """A random detector that finds something, and resizes an image of 40 x 60 to 140 x 210 in 160 x 224."""
    return seeded(DETECTORS[name](create_backbone(backbone), 3, min_size=140, max_size=256, score_threshold=0.0))


def sum_of_maps(leaves: list[Tensor], *, pooled: bool, sign: int, seen: tuple[int, int]) -> Tensor:
    """The stages' maps (seen), from their features and the gradients there."""
    total = torch.zeros(seen)
    for leaf in leaves:
        if leaf.grad is not None:
            weights = sign * (leaf.grad.mean((2, 3), keepdim=True) if pooled else leaf.grad)
            coarse = (weights * leaf.detach()).sum(1, keepdim=True).clamp(min=0)
            total += F.interpolate(coarse, seen, mode="bilinear", align_corners=False)[0, 0]
    return total


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("pooled", [None, True])
def test_of_a_detection_the_stages_under_the_pyramid_are_added(name: str, pooled: bool | None) -> None:
    model, image = small_detector(name), torch.rand(3, 40, 60)
    with torch.no_grad():
        found = model([image])[0]["scores"]
    index = len(found) // 2
    images, _ = model.transform([image])
    assert images.tensors.shape[-2:] == (160, 224)
    with torch.no_grad():
        stages = model.backbone.body(images.tensors)
    leaves = {key: features.requires_grad_() for key, features in stages.items()}
    pyramid = model.backbone.fpn(leaves)
    if name == "fcos":  # whose root of all scores has the gradient 0 / 0, for the background's are 0
        logits, _, centreness = model.head(list(pyramid.values())).values()
        scores = (logits.sigmoid() * centreness.sigmoid())[0, :, 1:].flatten()
        scores[(scores - found[index] ** 2).abs().argmin()].sqrt().backward()
    else:
        rest = copy.copy(model)
        rest._modules = {**model._modules, "backbone": lambda _: pyramid}
        rest([image])[0]["scores"][index].backward()
    for sign in (1, -1):
        seen = sum_of_maps(list(leaves.values()), pooled=bool(pooled), sign=sign, seen=(160, 224))[:140, :210]
        expected = F.interpolate(seen[None, None], (40, 60), mode="bilinear", align_corners=False)[0, 0]
        heat = grad_cam(model, image, lambda output: sign * detection_score(index)(output), pooled=pooled)  # noqa: B023
        torch.testing.assert_close(heat, expected / expected.max().clamp(min=1e-30), atol=1e-4, rtol=1e-3)
        if not pooled:
            assert heat.max() == pytest.approx(1)


def test_of_a_detection_at_a_layer_that_is_named() -> None:
    model, image = small_detector("faster_rcnn"), torch.rand(3, 40, 60)
    by_layer = [
        grad_cam(model, image, detection_score(), layer=f"backbone.{layer}")
        for layer in ("body.layer2", "body.layer3", "fpn.layer_blocks.0")
    ]
    for heat in by_layer:
        assert heat.shape == (40, 60)
    assert not torch.equal(by_layer[0], by_layer[1])


@pytest.mark.parametrize("pooled", [None, True])
def test_of_a_class_of_a_segmentation_model(pooled: bool | None) -> None:
    model = deeplabv3plus(create_backbone("resnet18", output_stride=8), 3, head_channels=8, low_level_channels=4)
    model, image = seeded(model), torch.rand(3, 64, 64)
    labels = model(image[None])["out"][0].argmax(0)
    label = int(labels.flatten().mode().values)
    region = torch.zeros(64, 64, dtype=torch.bool)
    region[10:30, 20:50] = True
    for score, inside in ((segment_score(label), labels == label), (segment_score(label, region), region)):
        with torch.no_grad():
            stages = model.backbone((image[None] - model.image_mean) / model.image_std)
        leaves = {key: features.requires_grad_() for key, features in stages.items()}
        rest = copy.copy(model)
        rest._modules = {**model._modules, "backbone": lambda _: leaves}  # noqa: B023
        rest(image[None])["out"][0, label][inside].sum().backward()
        expected = sum_of_maps(list(leaves.values()), pooled=bool(pooled), sign=1, seen=(64, 64))
        heat = grad_cam(model, image, score, pooled=pooled)
        torch.testing.assert_close(heat, expected / expected.max(), atol=1e-5, rtol=1e-4)


def striped(kind: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A disc of stripes, upright (0) or level (1), in a quarter of 32 x 32 pixels, and where it is."""
    radius = generator.integers(8, 13)
    middle = generator.integers(radius, 32 - radius + 1, 2)
    rows, columns = np.mgrid[:32, :32]
    disc = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < radius**2
    stripes = np.sin(2 * np.pi / 6 * (columns if kind == 0 else rows) + generator.uniform(0, 6))
    return np.where(disc, 0.5 + 0.4 * np.sign(stripes), np.nan), disc


def scene(quarters: dict[int, int], generator: np.random.Generator) -> tuple[Tensor, dict[int, np.ndarray]]:
    """An image (3, 64, 64) with an object of a kind in each of the named quarters; where each kind is."""
    image = generator.uniform(0.3, 0.7, (64, 64))
    masks = {}
    for kind, quarter in quarters.items():
        area = slice(32 * (quarter // 2), 32 * (quarter // 2) + 32), slice(32 * (quarter % 2), 32 * (quarter % 2) + 32)
        pixels, disc = striped(kind, generator)
        image[area] = np.where(disc, pixels, image[area])
        masks[kind] = np.zeros((64, 64), dtype=bool)
        masks[kind][area] = disc
    return torch.from_numpy(image).float().expand(3, 64, 64), masks


def test_of_two_objects_it_is_brightest_in_the_one_asked_for() -> None:
    """A classifier that was taught one object an image, for seconds, is shown two."""
    generator = np.random.default_rng(0)
    net = small_net(strides=(1, 2, 2, 1)).train()
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        kinds = generator.integers(0, 2, 24).tolist()
        images = torch.stack([scene({kind: int(generator.integers(4))}, generator)[0] for kind in kinds])
        optimiser.zero_grad()
        F.cross_entropy(net(images), torch.tensor(kinds)).backward()
        optimiser.step()
    net.eval()
    hits = []
    for _ in range(20):
        first, second = generator.permutation(4)[:2].tolist()
        image, masks = scene({0: first, 1: second}, generator)
        for kind, mask in masks.items():
            heat = grad_cam(net, image, class_score(kind)).numpy()
            hits.append(mask[np.unravel_index(heat.argmax(), heat.shape)])
            assert heat[mask].mean() > 2 * heat[masks[1 - kind]].mean()
    assert np.mean(hits) >= 0.95


def test_of_two_segments_it_is_brightest_in_the_one_asked_for() -> None:
    """The same of a segmentation model."""
    generator = np.random.default_rng(0)
    stages = small_net(strides=(2, 2, 2, 1))[:4]
    model = deeplabv3plus(
        stages, 3, aspp_rates=(1, 2), head_channels=16, low_level_channels=8, separable=False, dropout=0.0,
        class_weights=(1.0, 10.0, 10.0),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.train().parameters(), 0.01)
    for _ in range(80):
        images, targets = [], []
        for kind in generator.integers(0, 2, 12).tolist():
            image, masks = scene({kind: int(generator.integers(4))}, generator)
            images.append(image)
            targets.append(torch.from_numpy(masks[kind] * (kind + 1)))
        optimiser.zero_grad()
        sum(model(torch.stack(images), torch.stack(targets)).values()).backward()
        optimiser.step()
    model.eval()
    hits = []
    for _ in range(10):
        first, second = generator.permutation(4)[:2].tolist()
        image, masks = scene({0: first, 1: second}, generator)
        for kind, mask in masks.items():
            heat = grad_cam(model, image, segment_score(kind + 1)).numpy()
            hits.append(mask[np.unravel_index(heat.argmax(), heat.shape)])
            assert heat[mask].mean() > 2 * heat[masks[1 - kind]].mean()
    assert np.mean(hits) >= 0.95


# --- Grad-CAM: mistakes ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.rand(1, 3, 8, 8)}, r"image is a float32 tensor of shape \(1, 3, 8, 8\), expected one image"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}, r"image is a uint8 tensor of shape \(3, 8, 8\)"),
        ({"layer": "layer5"}, "Sequential has no layer 'layer5'; did you mean 'layer4'"),
        ({"layer": "fc"}, r"layer 'fc' gives a float32 tensor of shape \(1, 2\), expected feature maps"),
        ({"score": class_score(2)}, "class 2 is not among the model's 2 classes, which count from 0"),
        ({"score": class_score(-1)}, "class -1 is not among"),
        ({"score": detection_score()}, "detection_score is of a list of detections, and the model returned a float32"),
        ({"score": segment_score(1)}, "segment_score is of a dict with logits 'out', and the model returned a float32"),
        ({"score": lambda output: output.detach().sum()}, "has no gradient at layer4: the layer has no part in it"),
    ],
)  # fmt: skip
def test_mistakes(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"image": torch.rand(3, 8, 8), "score": class_score(0)} | change
    with pytest.raises(ValueError, match=message):
        grad_cam(seeded(small_net()), **arguments)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="the model is in training mode, .*call model.eval"):
        grad_cam(small_net(), torch.rand(3, 8, 8), class_score(0))


def test_a_network_without_layer4_needs_a_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(ValueError, match="Sequential has 0 modules named layer4, .*has the children 0, 1, 2"):
        grad_cam(net, torch.rand(3, 8, 8), class_score(0))


def test_a_layer_that_runs_twice_is_refused() -> None:
    model = small_detector("retinanet")
    layer = "head.classification_head.cls_logits"
    with pytest.raises(ValueError, match=f"layer '{layer}' ran 5 times for one image"):
        grad_cam(model, torch.rand(3, 40, 60), detection_score(), layer=layer)


def test_detections_and_segments_that_are_not_there() -> None:
    detector = small_detector("faster_rcnn")
    image = torch.rand(3, 64, 64)
    with pytest.raises(ValueError, match="detection 500 is not among the model's 100 detections"):
        grad_cam(detector, image, detection_score(500))
    for nothing in ([], [torch.zeros(2)]):
        with pytest.raises(ValueError, match="detection_score is of a list of detections, and the model returned"):
            detection_score(0)(nothing)
    with pytest.raises(ValueError, match="class_score is of logits .* the model returned a list"):
        grad_cam(detector, image, class_score(0))
    model = deeplabv3plus(create_backbone("resnet18", output_stride=16), 3, head_channels=8).eval()
    model.classifier.bias.data = torch.tensor([5.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="label 2 is nowhere the likeliest, only 0; ask for one of these"):
        grad_cam(model, image, segment_score(2))
    with pytest.raises(ValueError, match=r"region has shape \(3, 3\), expected the image's \(64, 64\)"):
        grad_cam(model, image, segment_score(2, torch.ones(3, 3)))
    with pytest.raises(ValueError, match="region is False everywhere"):
        grad_cam(model, image, segment_score(2, torch.zeros(64, 64)))
    with pytest.raises(ValueError, match="label 3 is not among the model's 3 classes"):
        grad_cam(model, image, segment_score(3))


def test_an_image_of_inference_mode() -> None:
    net = seeded(small_net())
    with torch.inference_mode():
        image = torch.rand(3, 8, 8)
        heat = grad_cam(net, image, class_score(0))
    torch.testing.assert_close(heat, grad_cam(net, image.clone(), class_score(0)), rtol=0, atol=0)


def test_where_nothing_speaks_for_the_score_the_map_is_zero() -> None:
    net = seeded(small_net())
    with torch.no_grad():
        net.fc.weight.copy_(-net.fc.weight.abs())
    assert not grad_cam(net, torch.rand(3, 8, 8), class_score(0)).any()
