"""Layouts: files as other projects write them load into our networks and give their outputs; and names both ways.

The networks of projects that are not installed are written here in plain form, each with its project's names.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from resnest.torch import resnest50 as released_resnest50
from resnest.torch.resnet import Bottleneck as ReleasedBottleneck
from resnest.torch.resnet import ResNet as ReleasedResNet
from timm.models.resnet import BasicBlock as TimmBasicBlock
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.resnet import ResNet as TimmResNet
from timm.models.sknet import SelectiveKernelBottleneck
from torch import Tensor, nn

from resnest_det import create_backbone, load_weights
from resnest_det.backbones import VARIANTS, BasicBlock, Bottleneck, ResNet
from resnest_det.backbones.key_layouts import convert_state_dict, detect_layout
from resnest_det.layers import EfficientChannelAttention
from resnest_det.models import deeplabv3plus, faster_rcnn


def random_weights(net: nn.Module) -> nn.Module:
    """Weights with which no norm is the identity and no gate is shut, and the output stays near one."""
    generator = torch.Generator().manual_seed(0)

    def uniform(value: Tensor) -> Tensor:
        return torch.rand(value.shape, generator=generator)

    for key, value in net.state_dict().items():
        if key.endswith("running_mean"):
            value.copy_(0.2 * uniform(value) - 0.1)
        elif key.endswith("running_var"):
            value.copy_(0.5 + uniform(value))
        elif key.endswith("weight") and value.dim() == 1:
            value.copy_(0.3 + 0.6 * uniform(value))
        elif key.endswith("bias"):
            value.copy_(uniform(value) - 0.5)
        elif value.dim() > 1:
            fan_in = value[0].numel()
            value.copy_((2 * uniform(value) - 1) * (3 / fan_in) ** 0.5)
    return net.eval()


def assert_same_outputs(ours: nn.Module, theirs: Callable[[Tensor], Tensor], size: int = 64) -> None:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(x)
        assert expected.std() > 1e-2  # images and channels differ: the comparison says something
        assert 0.1 < expected.abs().max() < 10
        assert (ours.eval()(x) - expected).abs().max() < 1e-5


# --- projects that are installed


def timm_resnet(block: type[nn.Module], **arguments: object) -> nn.Module:
    """timm's ResNet with one block a stage: its names do not depend on the depth."""
    return TimmResNet(block, (1, 1, 1, 1), num_classes=10, **arguments)


def resnet(name: str) -> ResNet:
    """The network called `name` with one block a stage."""
    variant = dataclasses.replace(VARIANTS[name], layers=(1, 1, 1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, name, variant)
        return create_backbone(name, num_classes=10)


SELECTIVE = {"sk_kwargs": {"rd_ratio": 1 / 16, "rd_divisor": 32, "split_input": False}}


@pytest.mark.parametrize(
    ("name", "theirs", "layout"),
    [
        ("resnet18", partial(timm_resnet, TimmBasicBlock), "resnest_det"),
        ("resnext50_32x4d", partial(timm_resnet, TimmBottleneck, cardinality=32, base_width=4), "resnest_det"),
        ("resnest50", partial(timm.create_model, "resnest14d", num_classes=10), "resnest_det"),
        ("se_resnet50", partial(timm_resnet, TimmBottleneck, block_args={"attn_layer": "se"}), "timm"),
        (
            "sk_resnet50",
            partial(timm_resnet, SelectiveKernelBottleneck, cardinality=32, base_width=4, block_args=SELECTIVE),
            "timm",
        ),
    ],
)
def test_timm(name: str, theirs: Callable[[], nn.Module], layout: str, tmp_path: Path) -> None:
    check_timm(resnet(name), theirs(), layout, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs", "layout"),
    [
        ("resnet18", "resnet18", "resnest_det"),
        ("resnet50", "resnet50", "resnest_det"),
        ("resnext50_32x4d", "resnext50_32x4d", "resnest_det"),
        ("resnest14", "resnest14d", "resnest_det"),
        ("resnest26", "resnest26d", "resnest_det"),
        ("resnest50", "resnest50d", "resnest_det"),
        ("se_resnet50", "seresnet50", "timm"),
        ("se_resnext50_32x4d", "seresnext50_32x4d", "timm"),
        ("sk_resnet50", "skresnext50_32x4d", "timm"),
    ],
)
def test_whole_networks_of_timm(name: str, theirs: str, layout: str, tmp_path: Path) -> None:
    check_timm(create_backbone(name), timm.create_model(theirs), layout, tmp_path)


def check_timm(ours: nn.Module, theirs: nn.Module, layout: str, tmp_path: Path) -> None:
    state = random_weights(theirs).state_dict()
    assert detect_layout(state) == layout
    torch.save(state, tmp_path / "timm.pth")
    load_weights(ours, tmp_path / "timm.pth")
    assert_same_outputs(ours, theirs)
    back = convert_state_dict(ours.state_dict(), to="timm")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_timms_efficient_channel_attention(tmp_path: Path) -> None:
    released = random_weights(timm_resnet(TimmBasicBlock, block_args={"attn_layer": "eca"}))
    torch.save(released.state_dict(), tmp_path / "timm.pth")
    # Kernel sizes by the formula, as in timm.
    net = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, gate=EfficientChannelAttention)
    load_weights(net, tmp_path / "timm.pth")
    assert_same_outputs(net, released)


def test_other_kernel_sizes_of_efficient_channel_attention(tmp_path: Path) -> None:
    released = TimmResNet(TimmBasicBlock, (2, 2, 2, 2), block_args={"attn_layer": "eca"})
    torch.save(released.state_dict(), tmp_path / "timm.pth")
    with pytest.raises(ValueError, match=r"layer2.0.gate.conv.weight \(1x1x5 in the file") as error:
        create_backbone("eca_resnet34", weights=str(tmp_path / "timm.pth"))
    assert "Only the kernels" not in str(error.value)  # the depth differs, too
    with pytest.raises(ValueError, match=r"of size 3, 5, 5, 5 in layer1 to layer4") as error:
        create_backbone("eca_resnet18", weights=str(tmp_path / "timm.pth"))
    advice = re.search(r"gate=(lambda.*\))\)$", str(error.value))
    gate = eval(advice[1], {"EfficientChannelAttention": EfficientChannelAttention})
    load_weights(create_backbone("resnet18", gate=gate), tmp_path / "timm.pth")


def test_timms_skresnet50_is_not_the_papers(tmp_path: Path) -> None:
    theirs = timm_resnet(SelectiveKernelBottleneck, block_args={"sk_kwargs": {"split_input": True}})
    torch.save(theirs.state_dict(), tmp_path / "skresnet50.pth")
    shapes = r"layer1.0.conv1.weight \(64x64x1x1 in the file, 128x64x1x1 in the network\)"
    with pytest.raises(ValueError, match=f"of another shape: {shapes}"):
        load_weights(resnet("sk_resnet50"), tmp_path / "skresnet50.pth")


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_torchvision(name: str, tmp_path: Path) -> None:
    released = random_weights(torchvision.models.get_model(name))
    torch.save(released.state_dict(), tmp_path / "torchvision.pth")
    net = create_backbone(name, weights=str(tmp_path / "torchvision.pth"))
    assert_same_outputs(net, released)
    assert list(convert_state_dict(net.state_dict(), to="torchvision")) == list(released.state_dict())


@pytest.mark.slow
def test_whole_network_of_the_released_resnest(tmp_path: Path) -> None:
    released = random_weights(released_resnest50())
    torch.save(released.state_dict(), tmp_path / "resnest.pth")
    assert_same_outputs(create_backbone("resnest50", weights=str(tmp_path / "resnest.pth")), released)


def released_resnest14() -> nn.Module:
    arguments = {"radix": 2, "bottleneck_width": 64, "deep_stem": True, "stem_width": 32, "avg_down": True, "avd": True}
    return random_weights(ReleasedResNet(ReleasedBottleneck, [1, 1, 1, 1], **arguments))


def test_released_resnest(tmp_path: Path) -> None:
    released = released_resnest14()
    torch.save(released.state_dict(), tmp_path / "resnest.pth")
    net = create_backbone("resnest14", weights=str(tmp_path / "resnest.pth"))
    assert_same_outputs(net, released)
    assert list(convert_state_dict(net.state_dict(), to="resnest")) == list(released.state_dict())


@pytest.mark.parametrize("with_classifier", [True, False])
def test_backbone_of_pytorch_encoding(with_classifier: bool, tmp_path: Path) -> None:
    segmenter = nn.Module()
    segmenter.pretrained = released_resnest14()
    segmenter.head = nn.Conv2d(2048, 5, 1)
    segmenter.auxlayer = nn.Conv2d(1024, 5, 1)
    if not with_classifier:
        segmenter.pretrained.fc = nn.Identity()
    torch.save({"state_dict": segmenter.state_dict(), "epoch": 3}, tmp_path / "encoding.pth")
    net = create_backbone("resnest14")
    if with_classifier:
        load_weights(net, tmp_path / "encoding.pth")
    else:
        with pytest.warns(UserWarning, match="it has no classifier, and the network's, of 1000 classes, keeps its"):
            load_weights(net, tmp_path / "encoding.pth")
        net.fc = nn.Identity()
    assert_same_outputs(net, segmenter.pretrained)


# --- ECANet and CBAM: torchvision's basic block with an attention before the addition


class PlainECA(nn.Module):
    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3))  # (N, C)
        return x * torch.sigmoid(self.conv(mean[:, None]))[:, 0, :, None, None]


class PlainChannelGate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 16
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        return x * torch.sigmoid(logits)[:, :, None, None]


class PlainSpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Sequential()
        self.spatial.add_module("conv", nn.Conv2d(2, 1, 7, padding=3, bias=False))
        self.spatial.add_module("bn", nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.spatial(torch.stack((x.amax(1), x.mean(1)), dim=1)))


class BasicBlockWithAttention(torchvision.models.resnet.BasicBlock):
    """torchvision's block, and `attention` before the addition."""

    attention: str

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = getattr(self, self.attention)(out)
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class BottleneckWithAttention(torchvision.models.resnet.Bottleneck):
    """torchvision's block, and `attention` before the addition."""

    attention: str

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = getattr(self, self.attention)(self.bn3(self.conv3(out)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def block_of_ecanet(base: type[nn.Module], *kernel_sizes: int) -> type[nn.Module]:
    """A block of ECANet, whose kernel sizes are those of the four stages."""
    of_width = dict(zip((64, 128, 256, 512), kernel_sizes, strict=True))

    class Block(base):
        attention = "eca"

        def __init__(self, inplanes: int, planes: int, *others: object, **named: object) -> None:
            super().__init__(inplanes, planes, *others, **named)
            self.eca = PlainECA(of_width[planes])

    return Block


def block_of_cbam(base: type[nn.Module]) -> type[nn.Module]:
    class Block(base):
        attention = "cbam"

        def __init__(self, inplanes: int, planes: int, *others: object, **named: object) -> None:
            super().__init__(inplanes, planes, *others, **named)
            self.cbam = nn.Sequential()
            self.cbam.add_module("ChannelGate", PlainChannelGate(planes * base.expansion))
            self.cbam.add_module("SpatialGate", PlainSpatialGate())

    return Block


@pytest.mark.parametrize(
    ("name", "block", "layout"),
    [
        ("eca_resnet18", block_of_ecanet(BasicBlockWithAttention, 3, 5, 7, 7), "ecanet"),
        ("eca_resnet50", block_of_ecanet(BottleneckWithAttention, 3, 5, 5, 7), "ecanet"),
        ("cbam_resnet18", block_of_cbam(BasicBlockWithAttention), "cbam"),
        ("cbam_resnet50", block_of_cbam(BottleneckWithAttention), "cbam"),
    ],
)
def test_gates_of_released_networks(name: str, block: type[nn.Module], layout: str, tmp_path: Path) -> None:
    released = random_weights(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10))
    state = {f"module.{key}": value for key, value in released.state_dict().items()}
    torch.save({"epoch": 99, "arch": "resnet", "state_dict": state, "best_prec1": 70.9}, tmp_path / "best.pth.tar")
    assert detect_layout(state) == layout
    net = resnet(name)
    load_weights(net, tmp_path / "best.pth.tar")
    assert_same_outputs(net, released)
    back = convert_state_dict(net.state_dict(), to=layout)
    assert back.keys() == released.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in released.state_dict().items())


@pytest.mark.parametrize(
    ("name", "released", "layout"),
    [
        (
            "eca_resnet50",
            lambda: torchvision.models.ResNet(block_of_ecanet(BottleneckWithAttention, 3, 5, 5, 7), [1, 1, 1, 1]),
            "ecanet",
        ),
        ("se_resnet50", partial(timm_resnet, TimmBottleneck, block_args={"attn_layer": "se"}), "timm"),
    ],
)
def test_attention_inside_a_detector(name: str, released: Callable[[], nn.Module], layout: str, tmp_path: Path) -> None:
    theirs = random_weights(released())
    state = {f"backbone.{key}": value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert detect_layout(state) == layout
    torch.save({"state_dict": state | {"neck.lateral_convs.0.conv.weight": torch.zeros(2)}}, tmp_path / "detector.pth")
    net = resnet(name)
    with pytest.warns(UserWarning, match="it has no classifier"):
        load_weights(net, tmp_path / "detector.pth")
    net.fc = theirs.fc
    assert_same_outputs(net, theirs)


def test_ecas_detectors_have_other_kernel_sizes(tmp_path: Path) -> None:
    theirs = torchvision.models.ResNet(block_of_ecanet(BottleneckWithAttention, 3, 3, 7, 7), [1, 1, 1, 1])
    state = {f"backbone.{key}": value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    torch.save({"state_dict": state}, tmp_path / "mask_rcnn_ecanet50_k3377.pth")
    with pytest.raises(ValueError, match="the file's are of size 3, 3, 7, 7 in layer1 to layer4"):
        load_weights(resnet("eca_resnet50"), tmp_path / "mask_rcnn_ecanet50_k3377.pth")


# --- detectron2's and mmdetection's ResNeSt, with one block a stage


class PlainSplitAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 32)
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=2, bias=False)
        self.bn0 = nn.BatchNorm2d(2 * channels)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.bn0(self.conv(x))).chunk(2, dim=1)
        pooled = (first + second).mean((2, 3), keepdim=True)
        logits = self.fc2(F.relu(self.bn1(self.fc1(pooled))))
        weights = torch.stack(logits.chunk(2, dim=1)).softmax(dim=0)
        return weights[0] * first + weights[1] * second


class ConvAndNorm(nn.Conv2d):
    """A convolution that holds its norm, as detectron2's does."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class BlockOfDetectron2(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = ConvAndNorm(in_channels, width, 1)
        self.conv2 = PlainSplitAttention(width)
        self.conv3 = ConvAndNorm(width, 4 * width, 1)
        self.shortcut = ConvAndNorm(in_channels, 4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        if self.stride > 1:
            out = F.avg_pool2d(out, 3, self.stride, padding=1)
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return F.relu(self.conv3(out) + self.shortcut(x))


class BackboneOfDetectron2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1_1 = ConvAndNorm(3, 32, 3, stride=2)
        self.stem.conv1_2 = ConvAndNorm(32, 32, 3)
        self.stem.conv1_3 = ConvAndNorm(32, 64, 3)
        self.res2 = nn.Sequential(BlockOfDetectron2(64, 64, 1))
        self.res3 = nn.Sequential(BlockOfDetectron2(256, 128, 2))
        self.res4 = nn.Sequential(BlockOfDetectron2(512, 256, 2))
        self.res5 = nn.Sequential(BlockOfDetectron2(1024, 512, 2))

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.stem.conv1_1, self.stem.conv1_2, self.stem.conv1_3):
            x = F.relu(conv(x))
        x = F.max_pool2d(x, 3, 2, padding=1)
        return self.res5(self.res4(self.res3(self.res2(x))))


class BlockOfMmdetection(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = PlainSplitAttention(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(in_channels, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.bn1(self.conv1(x))))
        if self.stride > 1:
            out = F.avg_pool2d(out, 3, self.stride, padding=1)
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class BackboneOfMmdetection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stem: list[nn.Module] = []
        for in_channels, channels, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
            conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
            stem += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        self.layer1 = nn.Sequential(BlockOfMmdetection(64, 64, 1))
        self.layer2 = nn.Sequential(BlockOfMmdetection(256, 128, 2))
        self.layer3 = nn.Sequential(BlockOfMmdetection(512, 256, 2))
        self.layer4 = nn.Sequential(BlockOfMmdetection(1024, 512, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    ("layout", "backbone", "prefix", "wrapper"),
    [
        ("detectron2", BackboneOfDetectron2, "backbone.bottom_up.", "model"),
        ("mmdetection", BackboneOfMmdetection, "backbone.", "state_dict"),
    ],
)
def test_backbones_of_detectors(
    layout: str, backbone: type[nn.Module], prefix: str, wrapper: str, bare: bool, tmp_path: Path
) -> None:
    theirs = random_weights(backbone())
    inner = theirs.state_dict()
    state = {prefix + key: value for key, value in inner.items()}
    heads = {"backbone.fpn_lateral2.weight": torch.zeros(2)} if layout == "detectron2" else {}
    heads |= {"neck.lateral_convs.0.conv.weight": torch.zeros(2), "roi_heads.box_head.fc1.weight": torch.zeros(2, 2)}
    torch.save({wrapper: inner if bare else state | heads}, tmp_path / "detector.pth")
    assert detect_layout(inner if bare else state) == layout
    net = create_backbone("resnest14")
    own_classifier = net.fc.weight.clone()
    with pytest.warns(UserWarning, match="it has no classifier, and the network's, of 1000 classes, keeps its values"):
        load_weights(net, tmp_path / "detector.pth")
    assert net.weights_loaded
    assert torch.equal(net.fc.weight, own_classifier)
    back = convert_state_dict(net.state_dict(), to=layout)
    classifier = {key for key in back if key not in state}
    assert len(classifier) == 2
    assert back.keys() - classifier == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    net.fc = nn.Identity()
    assert_same_outputs(net, lambda x: theirs(x).mean((2, 3)))


def test_plain_backbone_of_mmdetection(tmp_path: Path) -> None:
    released = random_weights(torchvision.models.resnet18())
    state = {f"backbone.{key}": value for key, value in released.state_dict().items() if not key.startswith("fc.")}
    state["rpn_head.rpn_conv.weight"] = torch.zeros(2)
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, tmp_path / "mmdet.pth")
    with pytest.warns(UserWarning, match="it has no classifier"):
        net = create_backbone("resnet18", weights=str(tmp_path / "mmdet.pth"))
    net.fc = released.fc
    assert_same_outputs(net, released)


@pytest.mark.parametrize(
    "model", [faster_rcnn, partial(deeplabv3plus, aspp_rates=(1, 2, 3))], ids=["detector", "segmentation model"]
)
@pytest.mark.parametrize("name", ["resnet18", "resnest50", "se_resnet18"])
def test_backbone_of_our_own_models(name: str, model: Callable[..., nn.Module], tmp_path: Path) -> None:
    backbone = random_weights(resnet(name))
    torch.save({"model": model(copy.deepcopy(backbone), 3).state_dict()}, tmp_path / "best.pth")
    net = resnet(name)
    with pytest.warns(UserWarning, match="it has no classifier"):
        load_weights(net, tmp_path / "best.pth")
    net.fc = backbone.fc
    assert_same_outputs(net, backbone)


@pytest.mark.parametrize(
    "model",
    [torchvision.models.detection.fasterrcnn_resnet50_fpn, torchvision.models.segmentation.deeplabv3_resnet50],
    ids=lambda model: model.__name__,
)
def test_backbone_of_torchvisions_models(model: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        state = model(weights=None, weights_backbone=None).state_dict()
        ours = create_backbone("resnet50").state_dict()
    counters = {key for key in ours if key.endswith("num_batches_tracked")}
    found = convert_state_dict(state, to="resnest_det")
    assert found.keys() - counters == ours.keys() - counters - {"fc.weight", "fc.bias"}


def test_what_is_unknown_in_a_backbone_is_not_left_out(tmp_path: Path) -> None:
    state = convert_state_dict(create_backbone("resnest14").state_dict(), to="detectron2")
    torch.save(state | {"backbone.bottom_up.res2.0.gate.weight": torch.zeros(1)}, tmp_path / "detector.pth")
    with pytest.raises(ValueError, match="1 extra: res2.0.gate.weight"):
        create_backbone("resnest14", weights=str(tmp_path / "detector.pth"))


# --- both ways

HELD = {
    "resnet18": {"resnest_det", "torchvision", "timm", "mmdetection", "pytorch_encoding"},
    "resnest14": {"resnest_det", "resnest", "timm", "detectron2", "mmdetection", "pytorch_encoding"},
    "resnest50_fast_2s2x40d": {"resnest_det", "resnest", "timm", "detectron2", "mmdetection", "pytorch_encoding"},
    "se_resnet18": {"resnest_det", "timm"},
    "se_resnext50_32x4d": {"resnest_det", "timm"},
    "eca_resnet18": {"resnest_det", "timm", "ecanet"},
    "cbam_resnet18": {"resnest_det", "cbam"},
    "cbam_resnet50": {"resnest_det", "cbam"},
    "sk_resnet50": {"resnest_det", "timm"},
}
LAYOUTS = set().union(*HELD.values())


@pytest.mark.parametrize("name", HELD)
def test_round_trips(name: str) -> None:
    with torch.device("meta"):
        net = create_backbone(name)
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    state = {key: torch.tensor(index).expand(shape) for index, (key, shape) in enumerate(shapes.items())}
    assert len(LAYOUTS) == 9
    for layout in LAYOUTS:
        if layout not in HELD[name]:
            with pytest.raises(
                ValueError, match=f"the layout '{layout}' has no place for .*there is one in: "
            ) as error:
                convert_state_dict(state, to=layout)
            assert set(str(error.value).rpartition(": ")[2].split(", ")) == HELD[name]
            continue
        theirs = convert_state_dict(state, to=layout)
        back = convert_state_dict(theirs, to="resnest_det")
        assert list(back) == list(state)
        assert all(torch.equal(back[key], state[key]) for key in state)
        named = convert_state_dict(theirs, to="resnest_det", source=layout)
        assert list(named) == list(state)


def test_from_one_layout_to_another() -> None:
    torch.manual_seed(0)
    ours = create_backbone("resnest14").state_dict()
    state = convert_state_dict({f"_orig_mod.module.{key}": value for key, value in ours.items()}, to="detectron2")
    across = convert_state_dict(state, to="mmdetection", source="detectron2")
    assert "backbone.stem.7.running_var" in across
    assert torch.equal(across["head.fc.weight"], ours["fc.weight"])


@pytest.mark.parametrize(("stem_width", "first"), [(32, "backbone.stem.0.weight"), (None, "backbone.conv1.weight")])
@pytest.mark.parametrize("name", ["resnet50", "resnest50"])
def test_the_stem_decides_how_mmdetection_names_it(name: str, stem_width: int | None, first: str) -> None:
    with torch.device("meta"):
        net = ResNet(Bottleneck, (1, 1, 1, 1), stem_width=stem_width, spatial_conv=VARIANTS[name].spatial_conv)
    state = net.state_dict()
    theirs = convert_state_dict(state, to="mmdetection")
    assert next(iter(theirs)) == first
    assert ("backbone.stem.7.weight" in theirs) == (stem_width is not None) == ("backbone.bn1.weight" not in theirs)
    assert list(convert_state_dict(theirs, to="resnest_det")) == list(state)


def test_a_gate_of_ones_own_has_a_place_in_our_layout_alone() -> None:
    state = create_backbone("resnet18").state_dict() | {"layer1.0.gate.scale": torch.zeros(1)}
    assert list(convert_state_dict(state, to="resnest_det")) == list(state)
    with pytest.raises(
        ValueError, match=r"the layout 'timm' has no place for an attention of another kind \(layer1.0.gate.scale\)"
    ):
        convert_state_dict(state, to="timm")
    resnest = create_backbone("resnest14").state_dict() | {"head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="the layout 'detectron2' has no place for the tensor head.weight"):
        convert_state_dict(resnest, to="detectron2")


def test_unknown_and_wrong_layouts() -> None:
    state = {"conv1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="layout 'detectron' is unknown; did you mean 'detectron2'. There are: "):
        convert_state_dict(state, to="detectron")
    with pytest.raises(ValueError, match="layout 'tim' is unknown; did you mean 'timm'"):
        convert_state_dict(state, to="resnest_det", source="tim")
    with pytest.raises(ValueError, match="source='cbam', and the state dict has no key .* begins with 'conv1.weight'"):
        convert_state_dict(state, to="resnest_det", source="cbam")


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("backbone.bottom_up.stem.conv1.weight", "detectron2's plain ResNets"),
        ("stem.conv1.norm.bias", "detectron2's plain ResNets"),
        ("backbone.bottom_up.res3.0.conv2_offset.weight", "deformable convolutions"),
        ("backbone.layer2.0.conv2.conv_offset.weight", "deformable convolutions"),
        ("layer1.0.se_module.fc1.weight", "the SENet files of pretrainedmodels"),
        ("module.layer1.0.se.channel.fc1.weight", "timm's CBAM"),
        ("layer1.0.se.spatial.conv.conv.weight", "timm's CBAM"),
        ("backbone.layer1.0.se.spatial.conv.conv.weight", "timm's CBAM"),
    ],
)
def test_other_functions_under_the_same_shapes_are_refused(key: str, what: str, tmp_path: Path) -> None:
    state = {key: torch.zeros(2)}
    with pytest.raises(ValueError, match=re.escape(key.removeprefix("module.")) + f".* is of .*{what}.* not converted"):
        convert_state_dict(state, to="resnest_det")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth: .* is of .*{what}"):
        create_backbone("resnet18", weights=str(tmp_path / "other.pth"))


def test_timms_cbam_is_recognised() -> None:
    theirs = TimmResNet(TimmBasicBlock, (1, 1, 1, 1), block_args={"attn_layer": "cbam"})
    with pytest.raises(ValueError, match="is of timm's CBAM"):
        convert_state_dict(theirs.state_dict(), to="cbam")
