"""Every network of the table: its size, its outputs beside other implementations, and what any backbone must do."""

from __future__ import annotations

import copy
import pickle

import pytest
import resnest.torch as released
import timm
import torch
from resnest.torch.resnet import Bottleneck as ReleasedBottleneck
from resnest.torch.resnet import ResNet as ReleasedResNet
from torch import Tensor, nn

import resnest_det
from resnest_det import create_backbone, list_backbones, stage_extractor
from resnest_det.backbones import VARIANTS, Stage

# Parameters with a classifier of 1000: of ResNeSt as computed from the released code, of the others as published.
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
}
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
FORMS = ["resnet18", "resnet50", "resnext50_32x4d", "resnest14", "resnest50_fast_1s4x24d", "resnest50_fast_4s2x40d"]


def randomise_norms(net: nn.Module) -> nn.Module:
    """Statistics and affine as of a trained network, so that a norm left out or misplaced shows.

    The last norm of a block is small: the features of 269 layers then stay of the order of 1, and an absolute
    difference means something.
    """
    generator = torch.Generator().manual_seed(1)
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            small = 0.1 if name.endswith("bn3") else 1.0
            module.weight.data = small * (0.5 + 0.5 * torch.rand(module.weight.shape, generator=generator))
            module.bias.data = 0.1 * small * torch.randn(module.bias.shape, generator=generator)
            module.running_mean.data = 0.1 * torch.randn(module.bias.shape, generator=generator)
            module.running_var.data = 0.5 + torch.rand(module.bias.shape, generator=generator)
    return net


def released_network(name: str, **dilation: object) -> nn.Module:
    arguments = {"radix": 2, "groups": 1, "bottleneck_width": 64, "stem_width": 32, **RELEASED[name]}
    with torch.device("meta"):  # its weights are ours in a moment
        return ReleasedResNet(ReleasedBottleneck, deep_stem=True, avg_down=True, avd=True, **arguments, **dilation)


@torch.inference_mode()
def check_equal(ours: nn.Module, theirs: nn.Module, size: int = 96) -> None:
    """The same logits to 1e-5, with the same weights and norms as of a trained network."""
    theirs.load_state_dict(randomise_norms(ours).state_dict(), assign=True)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = theirs.eval()(x)
    assert 0.1 < expected.abs().max() < 10
    assert (ours.eval()(x) - expected).abs().max() < 1e-5


def test_every_name_has_its_count() -> None:
    assert list_backbones() == list(NUM_PARAMETERS)
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
    check_equal(ours, theirs)


@pytest.mark.parametrize("name", RELEASED)
def test_equals_the_released_package(name: str) -> None:
    torch.manual_seed(0)
    ours = create_backbone(name)
    check_equal(ours, released_network(name))


@pytest.mark.parametrize("name", RELEASED)
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


@pytest.mark.parametrize("name", VARIANTS)
def test_stages_state_their_true_shapes(name: str) -> None:
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


@pytest.mark.parametrize("name", VARIANTS)
def test_children_are_flat_and_in_the_order_they_run(name: str) -> None:
    with torch.device("meta"):
        net = create_backbone(name)
    names = [child for child, _ in net.named_children()]
    assert names == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    assert all(isinstance(net.get_submodule(f"layer{i}"), Stage) for i in (1, 2, 3, 4))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "sync_bn", "gn"])
def test_trains_with_every_norm(name: str, norm: str) -> None:
    torch.manual_seed(0)
    net = create_backbone(name, num_classes=5, norm=norm)
    loss = nn.functional.cross_entropy(net(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1]))
    loss.backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("name", FORMS)
def test_channels_last_gives_the_same(name: str) -> None:
    torch.manual_seed(0)
    net = randomise_norms(create_backbone(name)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = net(x)
        net.to(memory_format=torch.channels_last)
        torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
        feature = stage_extractor(net, ["layer3"])(x.to(memory_format=torch.channels_last))["layer3"]
    assert feature.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnest14", "resnet18"])
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_checkpointing_changes_nothing_but_memory(name: str, drop_path: float) -> None:
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


def test_copies_and_pickles() -> None:
    net = create_backbone("resnest14").eval()
    x = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))


def test_part_of_a_stage() -> None:
    stage = create_backbone("resnest26").eval().layer3
    x = torch.randn(1, 512, 8, 8)
    assert torch.equal(stage[1:](stage[0](x)), stage(x))


def test_odd_sizes() -> None:
    net = create_backbone("resnest14").eval()
    features = stage_extractor(net)(torch.randn(1, 3, 65, 97))
    assert [tuple(f.shape[2:]) for f in features.values()] == [(17, 25), (9, 13), (5, 7), (3, 4)]


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
