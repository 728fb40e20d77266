"""Every network of the table: its size, its outputs beside other implementations, and what any backbone must do."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import resnest.torch as released
import timm
import torch
from resnest.torch.resnet import Bottleneck as ReleasedBottleneck
from resnest.torch.resnet import ResNet as ReleasedResNet
from timm.layers import SEModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

import resnest_det
from resnest_det import create_backbone, list_backbones, load_weights, stage_extractor
from resnest_det.backbones import VARIANTS, convert_state_dict, freeze_stages
from resnest_det.layers import CBAM, EfficientChannelAttention, SelectiveKernelConv2d, SqueezeExcitation
from tests.random_norms import randomise_norms

# Parameters with a classifier of 1000: of ResNeSt as computed from the released code, of the plain networks as
# published, of SE and SK as in timm; with_gates computes the others.
NUM_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnest14": 10_611_688,
    "resnest26": 17_069_448,
    "resnest50": 27_483_240,
    "resnest101": 48_275_016,
    "resnest200": 70_201_544,
    "resnest269": 110_929_480,
    "resnest50_fast_1s1x64d": 26_217_896,
    "resnest50_fast_2s1x64d": 27_483_240,
    "resnest50_fast_4s1x64d": 31_912_712,
    "resnest50_fast_1s2x40d": 25_946_680,
    "resnest50_fast_2s2x40d": 26_943_792,
    "resnest50_fast_4s2x40d": 30_417_592,
    "resnest50_fast_1s4x24d": 25_677_000,
    "se_resnet50": 28_088_024,
    "se_resnet101": 49_326_872,
    "se_resnet152": 66_821_848,
    "se_resnext50_32x4d": 27_559_896,
    "se_resnext101_32x4d": 48_955_416,
    "sk_resnet50": 27_479_784,
    "sk_resnet101": 48_736_040,
}
# Blocks of each stage, and channels of their outputs.
DEPTHS = {
    "resnet18": ((2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": ((3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": ((3, 4, 6, 3), (256, 512, 1024, 2048)),
    "resnet101": ((3, 4, 23, 3), (256, 512, 1024, 2048)),
    "resnet152": ((3, 8, 36, 3), (256, 512, 1024, 2048)),
}
# Kernels of ECA in each stage, as in the names of the released files.
ECA_KERNELS = {
    "resnet18": (3, 5, 7, 7),
    "resnet34": (3, 3, 5, 7),
    "resnet50": (3, 5, 5, 7),
    "resnet101": (3, 3, 5, 7),
    "resnet152": (3, 3, 5, 7),
}


def with_gates(name: str, sizes: Iterable[int]) -> int:
    """Parameters of a plain network and of a gate in each of its blocks, given the gates' sizes by stage."""
    return NUM_PARAMETERS[name] + sum(count * size for count, size in zip(DEPTHS[name][0], sizes, strict=True))


# By the papers: two layers to C / 16 and back with their biases; for CBAM also a 7x7 on two planes and a norm of one.
SE_SIZES = {name: [2 * c * c // 16 + c // 16 + c for c in channels] for name, (_, channels) in DEPTHS.items()}
NUM_PARAMETERS |= {f"se_{name}": with_gates(name, SE_SIZES[name]) for name in ("resnet18", "resnet34")}
NUM_PARAMETERS |= {
    f"cbam_{name}": with_gates(name, [size + 98 + 2 for size in SE_SIZES[name]])
    for name in ("resnet18", "resnet34", "resnet50", "resnet101")
}
NUM_PARAMETERS |= {f"eca_{name}": with_gates(name, kernels) for name, kernels in ECA_KERNELS.items()}

TIMM_NAMES = {
    **{name: name for name in list_backbones("resne") if not name.startswith("resnest")},
    "resnest14": "resnest14d",
    "resnest26": "resnest26d",
    "resnest50": "resnest50d",
    "resnest101": "resnest101e",
    "resnest200": "resnest200e",
    "resnest269": "resnest269e",
    "resnest50_fast_4s2x40d": "resnest50d_4s2x40d",
    "resnest50_fast_1s4x24d": "resnest50d_1s4x24d",
    # Those whose widths timm's rounding to multiples of 8 leaves as they are: not seresnet18 and seresnet34.
    "se_resnet50": "seresnet50",
    "se_resnet101": "seresnet101",
    "se_resnet152": "seresnet152",
    "se_resnext50_32x4d": "seresnext50_32x4d",
    "se_resnext101_32x4d": "seresnext101_32x4d",
    "sk_resnet50": "skresnext50_32x4d",
}
# The arguments of the released package's ResNet beyond those that all its networks share.
RELEASED = {
    "resnest14": {"layers": [1, 1, 1, 1]},
    "resnest26": {"layers": [2, 2, 2, 2]},
    "resnest50": {"layers": [3, 4, 6, 3]},
    "resnest101": {"layers": [3, 4, 23, 3], "stem_width": 64},
    "resnest200": {"layers": [3, 24, 36, 3], "stem_width": 64},
    "resnest269": {"layers": [3, 30, 48, 8], "stem_width": 64},
    **{
        f"resnest50_fast_{radix}s{groups}x{width}d": {
            "layers": [3, 4, 6, 3],
            "radix": radix,
            "groups": groups,
            "bottleneck_width": width,
            "avd_first": True,
        }
        for radix, groups, width in ((1, 1, 64), (2, 1, 64), (4, 1, 64), (1, 2, 40), (2, 2, 40), (4, 2, 40), (1, 4, 24))
    },
}
# One of each form; the rest of the table differs from these in its number of blocks.
FORMS = [
    *("resnet18", "resnet50", "resnext50_32x4d"),
    *("resnest14", "resnest50_fast_1s4x24d", "resnest50_fast_4s2x40d"),
    *("se_resnet18", "sk_resnet50", "cbam_resnet18", "eca_resnet18"),
]


def released_network(name: str, **dilation: object) -> nn.Module:
    arguments = {"radix": 2, "groups": 1, "bottleneck_width": 64, "stem_width": 32, **RELEASED[name]}
    with torch.device("meta"):  # its weights are ours in a moment
        return ReleasedResNet(ReleasedBottleneck, deep_stem=True, avg_down=True, avd=True, **arguments, **dilation)


def one_block_a_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test's end, the network of that name has its form and a fraction of its depth."""
    monkeypatch.setitem(VARIANTS, name, replace(VARIANTS[name], layers=(1, 1, 1, 1)))


@torch.inference_mode()
def check_equal(ours: nn.Module, theirs: nn.Module, size: int = 96, layout: str = "resnest_det") -> None:
    """The same logits to 1e-5, with the same weights and norms as of a trained network."""
    state = convert_state_dict(randomise_norms(ours).state_dict(), to=layout)
    theirs.load_state_dict(state, assign=True)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = theirs.eval()(x)
    assert 0.1 < expected.abs().max() < 10
    assert (ours.eval()(x) - expected).abs().max() < 1e-5


def test_every_name_has_its_count() -> None:
    assert sorted(list_backbones()) == sorted(NUM_PARAMETERS)
    assert list_backbones("resnest50_fast") == [name for name in NUM_PARAMETERS if "fast" in name]


@pytest.mark.parametrize("name", VARIANTS)
def test_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        net = create_backbone(name)
    assert sum(parameter.numel() for parameter in net.parameters()) == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_equals_timm(name: str) -> None:
    torch.manual_seed(0)
    ours = create_backbone(name)
    with torch.device("meta"):
        theirs = timm.create_model(TIMM_NAMES[name])
    check_equal(ours, theirs, layout="timm")


def test_hard_sigmoid_equals_timm() -> None:
    torch.manual_seed(0)
    ours = create_backbone("se_resnet50", hard_sigmoid=True)
    with torch.device("meta"):
        attention = partial(SEModule, gate_layer="hard_sigmoid")
        theirs = timm.create_model("seresnet50", block_args={"attn_layer": attention})
    check_equal(ours, theirs, layout="timm")


DEEP = ("resnest101", "resnest200", "resnest269")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in DEEP else ()) for name in RELEASED]
)
def test_equals_the_released_package(name: str) -> None:
    torch.manual_seed(0)
    ours = create_backbone(name)
    check_equal(ours, released_network(name))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "resnest14" or "fast" in name else pytest.mark.slow) for name in RELEASED],
)
@pytest.mark.parametrize(("output_stride", "dilation"), [(16, {"dilation": 2}), (8, {"dilated": True})])
def test_dilated_forms_equal_the_released_package(name: str, output_stride: int, dilation: dict[str, object]) -> None:
    torch.manual_seed(0)
    ours = create_backbone(name, output_stride=output_stride)
    check_equal(ours, released_network(name, **dilation), size=75)


def test_released_builders_have_the_same_form() -> None:
    """The released package's own builder for one network, so that RELEASED above is not our reading alone."""
    torch.manual_seed(0)
    ours = create_backbone("resnest50")
    check_equal(ours, released.resnest50())


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_resnets_equal_torchvision(name: str, output_stride: int) -> None:
    import torchvision

    dilation = [False, output_stride == 8, True]
    theirs = getattr(torchvision.models, name)(replace_stride_with_dilation=dilation)
    ours = create_backbone(name, output_stride=output_stride)
    check_equal(ours, theirs)


@pytest.mark.parametrize("name", ["se_resnet50", "sk_resnet50"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_attention_equals_timm(name: str, output_stride: int) -> None:
    torch.manual_seed(0)
    ours = create_backbone(name, output_stride=output_stride)
    with torch.device("meta"):
        theirs = timm.create_model(TIMM_NAMES[name], output_stride=output_stride)
    check_equal(ours, theirs, size=75, layout="timm")


def plain_norm(x: Tensor, state: dict[str, Tensor], key: str) -> Tensor:
    mean, variance = state[f"{key}.running_mean"], state[f"{key}.running_var"]
    scale = state[f"{key}.weight"] / torch.sqrt(variance + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{key}.bias"][:, None, None]


def plain_gate(x: Tensor, state: dict[str, Tensor], key: str, hard_sigmoid: bool) -> Tensor:
    """The papers' formulas of SE, ECA or CBAM, whichever the names of the tensors at `key` show."""

    def linear(pooled: Tensor, layer: str) -> Tensor:
        return pooled @ state[f"{layer}.weight"].flatten(1).T + state[f"{layer}.bias"]

    pooled = x.mean((2, 3))  # (N, C)
    if f"{key}.fc1.weight" in state:
        logits = linear(linear(pooled, f"{key}.fc1").clamp(min=0), f"{key}.fc2")
        scale = (logits + 3).clamp(0, 6) / 6 if hard_sigmoid else logits.sigmoid()
        return x * scale[:, :, None, None]
    if f"{key}.conv.weight" in state:
        kernel = state[f"{key}.conv.weight"].flatten()
        reach = len(kernel) // 2
        out = torch.empty_like(x)
        for channel in range(x.shape[1]):
            logit = torch.zeros(len(x))
            for offset, weight in enumerate(kernel):
                neighbour = channel + offset - reach
                if 0 <= neighbour < x.shape[1]:
                    logit += weight * pooled[:, neighbour]
            out[:, channel] = x[:, channel] * logit.sigmoid()[:, None, None]
        return out
    mlp = [
        linear(linear(one, f"{key}.channel.fc1").clamp(min=0), f"{key}.channel.fc2") for one in (pooled, x.amax((2, 3)))
    ]
    x = x * (mlp[0] + mlp[1]).sigmoid()[:, :, None, None]
    planes = torch.stack([x.amax(1), x.mean(1)], dim=1)
    spatial = F.conv2d(planes, state[f"{key}.spatial.conv.weight"], padding=3)
    return x * plain_norm(spatial, state, f"{key}.spatial.bn").sigmoid()


def plain_selective_kernel(x: Tensor, state: dict[str, Tensor], key: str, stride: int) -> Tensor:
    """SK from the paper's formulas: two branches of 32 groups, their sum pooled, a softmax over them by channel."""
    branches = []
    for index, dilation in enumerate((1, 2)):
        weight = state[f"{key}.branches.{index}.0.weight"]
        out = F.conv2d(x, weight, stride=stride, padding=dilation, dilation=dilation, groups=32)
        branches.append(plain_norm(out, state, f"{key}.branches.{index}.1").clamp(min=0))
    pooled = (branches[0] + branches[1]).mean((2, 3), keepdim=True)
    hidden = plain_norm(F.conv2d(pooled, state[f"{key}.fc1.weight"]), state, f"{key}.bn1").clamp(min=0)
    logits = F.conv2d(hidden, state[f"{key}.fc2.weight"]).exp()
    channels = logits.shape[1] // 2
    first, second = logits[:, :channels], logits[:, channels:]
    return (branches[0] * first + branches[1] * second) / (first + second)


def plain_network(x: Tensor, state: dict[str, Tensor], groups: int, hard_sigmoid: bool = False) -> Tensor:
    """The logits of a ResNet or ResNeXt with whatever attention its state dict names."""
    x = plain_norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), state, "bn1").clamp(min=0)
    x = F.max_pool2d(x, 3, 2, 1)
    for key in dict.fromkeys(match[0] for name in state if (match := re.match(r"layer\d\.\d+", name))):
        stride = 2 if re.fullmatch(r"layer[234]\.0", key) else 1
        bottleneck = f"{key}.conv3.weight" in state
        out = F.conv2d(x, state[f"{key}.conv1.weight"], **({} if bottleneck else {"stride": stride, "padding": 1}))
        out = plain_norm(out, state, f"{key}.bn1").clamp(min=0)
        if f"{key}.conv2.fc1.weight" in state:
            out = plain_selective_kernel(out, state, f"{key}.conv2", stride)
        else:
            weight = state[f"{key}.conv2.weight"]
            out = F.conv2d(out, weight, stride=stride if bottleneck else 1, padding=1, groups=groups)
            out = plain_norm(out, state, f"{key}.bn2")
        if bottleneck:
            out = plain_norm(F.conv2d(out.clamp(min=0), state[f"{key}.conv3.weight"]), state, f"{key}.bn3")
        if any(name.startswith(f"{key}.gate.") for name in state):
            out = plain_gate(out, state, f"{key}.gate", hard_sigmoid)
        if f"{key}.downsample.0.weight" in state:
            x = plain_norm(
                F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=stride), state, f"{key}.downsample.1"
            )
        x = (x + out).clamp(min=0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


PLAIN = ["se_resnet18", "sk_resnet50", "cbam_resnet18", "cbam_resnet50", "eca_resnet18"]
PLAIN_SLOW = [name for name in VARIANTS if re.match("(se|sk|cbam|eca)_", name) and name not in PLAIN]


@pytest.mark.parametrize("name", [*PLAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in PLAIN_SLOW)])
@torch.inference_mode()
def test_equals_a_plain_implementation(name: str) -> None:
    torch.manual_seed(0)
    net = randomise_norms(create_backbone(name)).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = plain_network(x, net.state_dict(), VARIANTS[name].groups)
    assert 0.1 < expected.abs().max() < 10
    assert (net(x) - expected).abs().max() < 1e-5


@torch.inference_mode()
def test_hard_sigmoid_equals_a_plain_implementation() -> None:
    """With the weights of the network that has the sigmoid, whose logits are others."""
    torch.manual_seed(0)
    soft = randomise_norms(create_backbone("se_resnet18")).eval()
    hard = resnest_det.se_resnet18(hard_sigmoid=True).eval()
    hard.load_state_dict(soft.state_dict())
    for block in (*hard.layer1, *hard.layer2, *hard.layer3, *hard.layer4):
        block.gate.fc2.bias.uniform_(-4, 4)  # beyond both ends of the line
    soft.load_state_dict(hard.state_dict())
    x = torch.randn(2, 3, 64, 64)
    expected = plain_network(x, hard.state_dict(), groups=1, hard_sigmoid=True)
    assert (hard(x) - expected).abs().max() < 1e-5
    assert (soft(x) - expected).abs().max() > 1e-3


def stage_gates(name: str) -> list[nn.Module]:
    """The gate of each stage's last block."""
    with torch.device("meta"):
        net = create_backbone(name)
    return [net.get_submodule(f"layer{stage}")[-1].gate for stage in (1, 2, 3, 4)]


def test_widths_and_kernels_of_the_gates() -> None:
    """As the papers and the released code have them: channels / 16; ECA's kernels literally, not by its formula."""
    kernels = {}
    for name in list_backbones():
        family = name.partition("_")[0]
        if family in ("se", "cbam"):
            gates = stage_gates(name)
            assert {type(gate) for gate in gates} == {SqueezeExcitation if family == "se" else CBAM}
            fc1 = [gate.fc1 if family == "se" else gate.channel.fc1 for gate in gates]
            channels = [64, 128, 256, 512] if name.endswith(("18", "34")) else [256, 512, 1024, 2048]
            assert [fc.in_channels for fc in fc1] == channels
            assert [fc.out_channels for fc in fc1] == [width // 16 for width in channels]
        elif family == "eca":
            gates = stage_gates(name)
            assert {type(gate) for gate in gates} == {EfficientChannelAttention}
            kernels[name] = [gate.conv.kernel_size[0] for gate in gates]
    assert kernels == {f"eca_{name}": list(sizes) for name, sizes in ECA_KERNELS.items()}


def test_norms_of_the_attention_are_those_of_the_network() -> None:
    for norm, kind in {"bn": nn.BatchNorm2d, "frozen_bn": FrozenBatchNorm2d, "gn": nn.GroupNorm}.items():
        with torch.device("meta"):
            cbam = create_backbone("cbam_resnet18", norm=norm).layer1[0].gate.spatial.bn
            selective = create_backbone("sk_resnet50", norm=norm).layer1[0].conv2
        assert [type(layer) for layer in (cbam, selective.branches[1][1], selective.bn1)] == [kind] * 3
    assert selective.bn1.num_groups == 1  # features pooled to 1x1
    assert selective.branches[0][1].num_groups == 32


@pytest.mark.parametrize("name", VARIANTS)
def test_stages_state_their_true_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one_block_a_stage(name, monkeypatch)
    for output_stride in (8, 16, 32):
        with torch.device("meta"):
            net = create_backbone(name, output_stride=output_stride).eval()
            stages = stage_extractor(net)
            features = stages(torch.empty(1, 3, 64, 96))
        for stage, feature in features.items():
            stride = stages.strides[stage]
            assert feature.shape == (1, stages.channels[stage], 64 // stride, 96 // stride)
        assert stages.strides["layer4"] == output_stride
        assert net.inplanes == stages.channels["layer4"]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "sync_bn", "gn"])
def test_trains_with_every_norm(name: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one_block_a_stage(name, monkeypatch)
    torch.manual_seed(0)
    net = create_backbone(name, num_classes=5, norm=norm)
    for parameter in net.parameters():
        if not parameter.any():  # CBAM's spatial norm starts at 0, and lets no gradient through to its convolution
            nn.init.normal_(parameter, std=0.1)
    loss = nn.functional.cross_entropy(net(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1]))
    loss.backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "drop_path"),
    [
        ("resnest14", 0.0),
        ("resnest14", 0.3),
        ("resnet18", 0.0),
        ("resnet18", 0.3),
        ("cbam_resnet18", 0.3),
        ("sk_resnet50", 0.0),
    ],
)
def test_checkpointing_changes_nothing_but_memory(name: str, drop_path: float, monkeypatch: pytest.MonkeyPatch) -> None:
    one_block_a_stage(name, monkeypatch)
    torch.manual_seed(0)
    plain = create_backbone(name, num_classes=3, drop_path=drop_path)
    saving = create_backbone(name, num_classes=3, drop_path=drop_path, checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for net in (plain, saving):
        for _ in range(2):
            torch.manual_seed(5)
            net(x).square().sum().backward()
    for (key, one), (_, other) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), key
    for (key, one), (_, other) in zip(plain.named_buffers(), saving.named_buffers(), strict=True):
        assert torch.equal(one, other), key


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = net(x)
    assert out.requires_grad
    return sum(storages.values()) - sum(p.untyped_storage().nbytes() for p in net.parameters())


def test_checkpointing_saves_memory() -> None:
    x = torch.randn(2, 3, 128, 128)
    torch.manual_seed(0)
    assert saved_bytes(create_backbone("resnest26", checkpoint=True), x) < 0.5 * saved_bytes(
        create_backbone("resnest26"), x
    )


def test_drop_path_drops_whole_branches_and_rises_with_depth() -> None:
    net = create_backbone("resnest26", drop_path=0.7)
    rates = [
        block.drop_path.p if block.drop_path else 0.0 for i in (1, 2, 3, 4) for block in net.get_submodule(f"layer{i}")
    ]
    assert rates == pytest.approx([0.1 * i for i in range(8)])
    block = net.layer4[1].train()
    torch.manual_seed(0)
    x = torch.rand(200, 2048, 1, 1)  # not negative, so that the last ReLU keeps a dropped branch's input as it is
    with torch.no_grad():
        same = (block(x) == x).flatten(1).all(1).float().mean().item()
        assert same == pytest.approx(0.7, abs=0.1)
        assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_part_of_a_stage() -> None:
    stage = create_backbone("resnest26").eval().layer3
    x = torch.randn(1, 512, 8, 8)
    assert torch.equal(stage[1:](stage[0](x)), stage(x))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_network_has_its_function(name: str) -> None:
    builder = getattr(resnest_det, name)
    assert builder.__name__ == name
    with torch.device("meta"):
        net = builder(num_classes=7)
    assert net.fc.out_features == 7
    with pytest.raises(TypeError, match="num_clases"):
        builder(num_clases=7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnst50"}, "backbone 'resnst50' is unknown; did you mean 'resnest50'"),
        ({"name": "resnest14", "norm": "batch"}, "norm 'batch' is unknown"),
        ({"name": "resnest14", "output_stride": 4}, "output_stride=4 must be 8, 16 or 32"),
        ({"name": "resnest14", "drop_path": 1.0}, "drop_path=1.0 must be at least 0 and below 1"),
        ({"name": "resnest14", "num_classes": 0}, "num_classes=0 must be 1 or more"),
        ({"name": "se_resnet5O"}, "backbone 'se_resnet5O' is unknown; did you mean 'se_resnet50'"),
        ({"name": "resnet18", "spatial_conv": SelectiveKernelConv2d}, "spatial_conv and .* need block=Bottleneck"),
        *(
            (
                {"name": name, "hard_sigmoid": True},
                f"hard_sigmoid=True is .* and {name} has none; leave it out, or use one of se_resnet18, .*_32x4d$",
            )
            for name in ("resnest14", "cbam_resnet18", "eca_resnet18", "sk_resnet50")
        ),
        (
            {"name": "se_resnet18", "hard_sigmoid": True, "gate": EfficientChannelAttention},
            "hard_sigmoid=True is .*, and a gate of one's own stands in its place; leave it out",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_backbone(**arguments)


def test_basic_blocks_have_no_3x3_slot() -> None:
    from resnest_det.backbones import BasicBlock, ResNet

    with pytest.raises(ValueError, match="need block=Bottleneck"):
        ResNet(BasicBlock, (1, 1, 1, 1), groups=2)
    with pytest.raises(ValueError, match=r"layers=\(1, 1\) must be four numbers"):
        ResNet(BasicBlock, (1, 1))


def test_the_gate_slot_stands_before_the_addition() -> None:
    from resnest_det.backbones import BasicBlock, Bottleneck, ResNet

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0

    for block in (BasicBlock, Bottleneck):
        net = ResNet(block, (2, 1, 1, 1), gate=lambda channels: Nothing()).eval()
        x = torch.rand(1, net.layer1.channels, 8, 8)
        torch.testing.assert_close(net.layer1[1](x), x, rtol=0, atol=0)


class OwnGate(nn.Module):
    """Scales the channels by learnt numbers that start at 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def own_conv(channels: int, *, stride: int, dilation: int, groups: int, norm_layer: object) -> nn.Module:
    """A 5x5 depthwise convolution with its norm."""
    conv = nn.Conv2d(channels, channels, 5, stride, 2 * dilation, dilation, groups=channels, bias=False)
    return nn.Sequential(conv, norm_layer(channels), nn.ReLU())


def train_a_step(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = [parameter.clone() for parameter in net.parameters()]
    net.train()(torch.randn(2, 3, 40, 40)).logsumexp(1).sum().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "se_resnet18", "resnest14"])
def test_own_gate(name: str) -> None:
    torch.manual_seed(0)
    net = create_backbone(name, num_classes=5, gate=OwnGate)
    assert all(
        isinstance(block.gate, OwnGate) for stage in (1, 2, 3, 4) for block in net.get_submodule(f"layer{stage}")
    )
    assert not any(isinstance(module, SqueezeExcitation) for module in net.modules())
    train_a_step(net)


@pytest.mark.parametrize(("norm", "output_stride"), [("bn", 32), ("gn", 8)])
def test_own_spatial_conv(norm: str, output_stride: int) -> None:
    torch.manual_seed(0)
    net = create_backbone("resnet50", num_classes=5, norm=norm, output_stride=output_stride, spatial_conv=own_conv)
    assert net.layer4[2].conv2[0].kernel_size == (5, 5)
    assert net.layer4[2].conv2[0].dilation == ((1, 1) if output_stride == 32 else (4, 4))
    assert isinstance(net.layer1[0].conv2[1], nn.BatchNorm2d if norm == "bn" else nn.GroupNorm)
    assert stage_extractor(net).strides["layer4"] == output_stride
    train_a_step(net)


def test_own_gate_keeps_its_values_beside_loaded_weights(tmp_path: Path) -> None:
    published = randomise_norms(create_backbone("resnet18"))
    file = tmp_path / "resnet18.pth"
    torch.save(published.state_dict(), file)
    with pytest.warns(UserWarning, match=r"8 of the network's tensors .* layer1\.0\.gate\.scale"):
        net = resnest_det.resnet18(str(file), gate=OwnGate)
    assert torch.equal(net.layer4[1].conv2.weight, published.layer4[1].conv2.weight)
    assert torch.equal(net.layer1[0].gate.scale, torch.full((64, 1, 1), 2.0))
    net.layer1[0].gate.scale.data.fill_(3.0)
    torch.save(net.state_dict(), file)  # a file that has the gates gives them too
    again = create_backbone("resnet18", str(file), gate=OwnGate)
    assert torch.equal(again.layer1[0].gate.scale, torch.full((64, 1, 1), 3.0))
    with pytest.raises(ValueError, match=r"8 extra: layer1\.0\.gate\.scale"):
        create_backbone("resnet18", str(file))


def test_own_gate_in_place_of_the_one_that_the_weights_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_block_a_stage("se_resnet18", monkeypatch)
    published = randomise_norms(create_backbone("se_resnet18"))
    file = tmp_path / "se_resnet18.pth"
    torch.save(published.state_dict(), file)
    with pytest.warns(
        UserWarning, match=r"4 of the network's .* layer1\.0\.gate\.scale.*16 of its .* layer1\.0\.gate\.fc1"
    ):
        net = create_backbone("se_resnet18", str(file), gate=OwnGate)
    assert torch.equal(net.layer4[0].conv2.weight, published.layer4[0].conv2.weight)
    assert torch.equal(net.layer1[0].gate.scale, torch.full((64, 1, 1), 2.0))


def test_freezing_names_the_own_gates_that_no_weights_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_block_a_stage("resnet18", monkeypatch)
    file = tmp_path / "resnet18.pth"
    torch.save(create_backbone("resnet18").state_dict(), file)
    with pytest.warns(UserWarning, match="keep their values"):
        net = create_backbone("resnet18", str(file), gate=OwnGate)
    gates = {f"layer{stage}.0.gate.scale" for stage in (1, 2, 3, 4)}
    assert net.random_tensors == gates
    assert not net.weights_loaded
    with pytest.warns(
        UserWarning, match=r"freezes layer1\.0\.gate\.scale, layer2\.0\.gate\.scale, whose weights are random"
    ):
        freeze_stages(copy.deepcopy(net), 2)
    net.load_state_dict({key: net.state_dict()[key] for key in gates}, strict=False)
    assert net.weights_loaded


class KeepsItsOutput(OwnGate):
    """Ends in a ReLU, which reads its output again for the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize("name", ["resnet18", "resnest14"])
def test_own_gate_that_needs_its_output_again(name: str) -> None:
    torch.manual_seed(0)
    train_a_step(create_backbone(name, num_classes=5, gate=KeepsItsOutput))


def no_module(channels: int, **arguments: object) -> None:
    return None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"gate": SqueezeExcitation(64)},
            r"gate is a module of SqueezeExcitation, and .*: pass a function of \(channels\)",
        ),
        ({"gate": nn.Sequential()}, "gate is a module of Sequential"),
        ({"gate": no_module}, "gate returned None for 256 channels; it must return a module"),
        ({"gate": nn.Conv2d}, r"gate must be a function of \(channels\), and failed called so: .*'out_channels'"),
        ({"spatial_conv": nn.Identity()}, "spatial_conv is a module of Identity"),
        ({"spatial_conv": no_module}, "spatial_conv returned None for 64 channels; it must return a module"),
        (
            {"spatial_conv": SelectiveKernelConv2d},
            r"spatial_conv must be a function of \(channels, \*, stride, dilation, groups, norm_layer\), .*'channels'",
        ),
    ],
)
def test_what_fills_no_slot(arguments: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_backbone("resnet50", **arguments)


def test_own_spatial_conv_beside_loaded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_block_a_stage("resnet50", monkeypatch)
    published = randomise_norms(create_backbone("resnet50"))
    file = tmp_path / "resnet50.pth"
    torch.save(published.state_dict(), file)
    with pytest.raises(ValueError, match=r"(?s)missing: layer1\.0\.conv2\.0\.weight.* extra: layer1\.0\.bn2\.bias"):
        create_backbone("resnet50", str(file), spatial_conv=own_conv)
    net = create_backbone("resnet50", spatial_conv=own_conv)
    own = net.layer1[0].conv2[0].weight.clone()
    with pytest.warns(UserWarning, match=r"keep their values: layer1\.0\.conv2\.0\.weight.* left out: layer1\.0\.bn2"):
        load_weights(net, file, keep=["layer?.*.conv2.*"], drop=["layer?.*.conv2.*", "layer?.*.bn2.*"])
    assert torch.equal(net.layer1[0].conv2[0].weight, own)
    assert torch.equal(net.layer4[0].conv3.weight, published.layer4[0].conv3.weight)


def test_new_classifier(tmp_path: Path) -> None:
    file = tmp_path / "se_resnet18.pth"
    torch.save(create_backbone("se_resnet18").state_dict(), file)
    with pytest.raises(ValueError, match="new_classifier=True"):
        create_backbone("se_resnet18", str(file), num_classes=7)
    with pytest.warns(UserWarning, match="classifier has 1000 classes, and the network's, of 7, keeps its values"):
        net = resnest_det.se_resnet18(str(file), num_classes=7, new_classifier=True)
    assert net.fc.out_features == 7


def test_gates_keep_their_initial_values() -> None:
    torch.manual_seed(0)
    zero = create_backbone("resnet18", gate=partial(SqueezeExcitation, zero_init=True))
    assert not zero.layer1[0].gate.fc2.weight.any()
    bound = 1 / zero.layer4[0].gate.fc1.in_channels ** 0.5  # torch's own initialisation of a 1x1 convolution
    assert 0.9 * bound < zero.layer4[0].gate.fc1.weight.abs().max() <= bound
    assert not create_backbone("cbam_resnet18").layer1[0].gate.spatial.bn.weight.any()
    assert create_backbone("cbam_resnet18", norm="frozen_bn").layer1[0].gate.spatial.bn.weight.item() == 1
    he = (2 / (512 * 9)) ** 0.5  # the trunk's, by its outputs
    assert zero.layer4[1].conv2.weight.std().item() == pytest.approx(he, rel=0.01)
