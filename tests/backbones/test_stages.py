"""Stages as features, pyramids, freezing, and torchvision's own consumers taking our networks unchanged."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FrozenBatchNorm2d

from resnest_det import create_backbone, fpn_backbone, stage_extractor
from resnest_det.backbones import BasicBlock, ResNet, freeze_stages
from resnest_det.layers import SyncBatchNorm

NAMES = ["resnet18", "resnest14", "resnest50_fast_1s4x24d"]
TARGETS = [
    {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


def images() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]


def check_detector(model: nn.Module) -> None:
    losses = model.train()(images(), TARGETS)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    predictions = model.eval()(images())
    assert [sorted(p) for p in predictions] == [["boxes", "labels", "scores"]] * 2


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_network(name: str) -> None:
    net = create_backbone(name).eval()
    x = torch.randn(1, 3, 64, 64)
    features = stage_extractor(net, ("layer2", "layer4"))(x)
    stem = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    layer2 = net.layer2(net.layer1(stem))
    assert list(features) == ["layer2", "layer4"]
    assert torch.equal(features["layer2"], layer2)
    assert torch.equal(features["layer4"], net.layer4(net.layer3(layer2)))


def test_extractor_states_channels_and_strides_and_ends_at_the_last_stage() -> None:
    stages = stage_extractor(create_backbone("resnest14", output_stride=16), ("layer1", "layer3"))
    assert stages.channels == {"layer1": 256, "layer3": 1024}
    assert stages.strides == {"layer1": 4, "layer3": 16}
    assert list(stages)[-1] == "layer3"


def test_a_network_of_ones_own() -> None:
    net = nn.Sequential()
    net.add_module("first", nn.Conv2d(3, 8, 3, stride=2, padding=1))
    net.first.channels, net.first.stride = 8, 2
    net.add_module("second", nn.Conv2d(8, 4, 3, stride=4, padding=1))
    assert stage_extractor(net, ["first"])(torch.rand(1, 3, 8, 8))["first"].shape == (1, 8, 4, 4)
    stages = stage_extractor(net, ["first", "second"])
    assert (stages.channels, stages.strides) == ({"first": 8, "second": 4}, {"first": 2, "second": 8})
    net.first.channels, net.first.stride = 80, 20  # no longer true, but stated
    assert stage_extractor(net, ["first"]).strides == {"first": 20}


def test_unknown_stage() -> None:
    with pytest.raises(ValueError, match="ResNet has no stage 'layer5'; did you mean 'layer"):
        stage_extractor(create_backbone("resnet18"), ["layer5"])
    with pytest.raises(ValueError, match=r"stages=\('layer4', 'layer1'\) must be in the order they run"):
        fpn_backbone(create_backbone("resnet18"), stages=("layer4", "layer1"))
    with pytest.raises(ValueError, match=r"stages=\(\) must be .* and at least one"):
        stage_extractor(create_backbone("resnet18"), ())
    net = create_backbone("resnet18")
    with pytest.raises(ValueError, match="no stage 'layer5'"):
        fpn_backbone(net, trainable_stages=0, stages=("layer4", "layer5"))
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("extra_level", "levels"), [("pool", ["pool"]), ("p6p7", ["p6", "p7"]), ("p6p7_c5", ["p6", "p7"])]
)
def test_pyramid_levels(extra_level: str, levels: list[str]) -> None:
    fpn = fpn_backbone(create_backbone("resnet18"), extra_level=extra_level, out_channels=32)
    features = fpn(torch.randn(2, 3, 128, 128))
    assert list(features) == ["0", "1", "2", "3", *levels]
    assert [f.shape[2] for f in features.values()] == [32, 16, 8, 4, 2, 1][: len(features)]
    assert fpn.out_channels == 32
    assert {f.shape[1] for f in features.values()} == {32}


@pytest.mark.parametrize(("extra_level", "source"), [("p6p7", "pyramid"), ("p6p7_c5", "stage")])
@pytest.mark.parametrize("out_channels", [32, 512], ids=["", "as many channels as layer4"])
def test_what_p6_is_made_of(extra_level: str, source: str, out_channels: int) -> None:
    fpn = fpn_backbone(create_backbone("resnet18"), extra_level=extra_level, out_channels=out_channels).eval()
    seen = []
    fpn.fpn.extra_blocks.p6.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 3, 128, 128)
    levels, stages = fpn(x), fpn.body(x)
    assert torch.equal(seen[0], levels["3"] if source == "pyramid" else stages["3"])


@pytest.mark.parametrize("norm", ["bn", "gn", "sync_bn"])
def test_pyramid_norms(norm: str) -> None:
    plain = fpn_backbone(create_backbone("resnet18"))
    with_norm = fpn_backbone(create_backbone("resnet18"), norm=norm)
    assert len(list(with_norm.fpn.modules())) == len(list(plain.fpn.modules())) + 8
    with_norm(torch.randn(2, 3, 64, 64))


def test_pyramid_is_torchvisions() -> None:
    """The same keys, shapes and features as torchvision's own extractor on its own resnet50."""
    ours = fpn_backbone(create_backbone("resnet50", norm="frozen_bn")).eval()
    theirs = _resnet_fpn_extractor(torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d), 5).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for ours_level, theirs_level in zip(ours(x).values(), theirs(x).values(), strict=True):
        torch.testing.assert_close(ours_level, theirs_level, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        (5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
        (4, {"layer1", "layer2", "layer3", "layer4"}),
        (3, {"layer2", "layer3", "layer4"}),
        (1, {"layer4"}),
        (0, set()),
    ],
)
@pytest.mark.parametrize("name", ["resnest14", "resnet18"])
def test_freezing(name: str, trainable: int, expected: set[str]) -> None:
    net = create_backbone(name).eval()
    net.load_state_dict(net.state_dict())  # no longer random, so that freezing it is no mistake
    x = torch.randn(2, 3, 64, 64)
    before = stage_extractor(net)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        body = fpn_backbone(net, trainable_stages=trainable).body
    after = stage_extractor(net.eval())(x)
    for stage, feature in before.items():
        torch.testing.assert_close(after[stage], feature, rtol=1e-5, atol=1e-5)
    assert {key.split(".")[0] for key, p in body.named_parameters() if p.requires_grad} == expected
    buffers = {key: value.clone() for key, value in body.named_buffers()}
    body.train()(x)
    changed = {key.split(".")[0] for key, value in body.named_buffers() if not torch.equal(value, buffers[key])}
    assert changed == {name for name in expected if list(body[name].buffers())}


def test_freezing_random_weights_warns() -> None:
    with pytest.warns(UserWarning, match="trainable_stages=3 freezes conv1, bn1, layer1, whose weights are random"):
        fpn_backbone(create_backbone("resnet18"), trainable_stages=3)
    with pytest.raises(ValueError, match="trainable_stages=6 must be between 0"):
        freeze_stages(create_backbone("resnet18"), 6)
    with pytest.raises(ValueError, match="extra_level='p6' must be 'pool', 'p6p7' or 'p6p7_c5'"):
        fpn_backbone(create_backbone("resnet18"), extra_level="p6")


def test_freezing_names_the_tensors_that_no_weights_held() -> None:
    net = create_backbone("resnet18")
    state = net.state_dict()
    net.load_state_dict({}, strict=False)
    assert not net.weights_loaded
    net.load_state_dict({key: state[key] for key in state if "layer1.0." not in key and "fc" not in key}, strict=False)
    assert not net.weights_loaded
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze_stages(copy.deepcopy(net), 4)  # the stem alone
    message = (
        r"=3 freezes layer1\.0\.conv1\.weight, layer1\.0\.bn1\.weight, .*running_var, .* and 4 more, whose weights"
    )
    with pytest.warns(UserWarning, match=message):
        freeze_stages(copy.deepcopy(net), 3)
    net.load_state_dict(state)
    assert net.weights_loaded
    assert not net.random_tensors


def test_loading_a_model_marks_the_network_in_it() -> None:
    model = nn.ModuleDict({name: ResNet(BasicBlock, (1, 1, 1, 1), num_classes=1) for name in ("first", "second")})
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("first.layer1.")}
    model.load_state_dict(state, strict=False)
    assert not model["first"].weights_loaded
    assert model["second"].weights_loaded
    assert pickle.loads(pickle.dumps(model))["second"].weights_loaded


@pytest.mark.parametrize("kind", [SyncBatchNorm, nn.SyncBatchNorm])
def test_frozen_synchronised_norms(kind: type[nn.Module]) -> None:
    net = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=kind)
    net.load_state_dict(net.state_dict())  # no longer random, so that freezing it is no mistake
    net.bn1.running_mean.normal_()
    expected = net.bn1.state_dict()
    freeze_stages(net, 4)
    assert type(net.bn1) is FrozenBatchNorm2d
    assert all(torch.equal(buffer, expected[name]) for name, buffer in net.bn1.state_dict().items())
    assert type(net.layer1[0].bn1) is kind


def test_frozen_stages_drop_no_branch() -> None:
    net = create_backbone("resnet18", drop_path=0.9)
    net.load_state_dict(net.state_dict())
    freeze_stages(net, 1)
    x = torch.randn(4, 3, 64, 64)
    stages = stage_extractor(net, ("layer1", "layer2", "layer3"))
    expected = stages.eval()(x)
    for name, feature in stages.train()(x).items():
        assert torch.equal(feature, expected[name])
    assert net.layer4[1].drop_path.p == 0.9


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_intermediate_layer_getter(name: str) -> None:
    net = create_backbone(name).eval()
    x = torch.randn(1, 3, 64, 64)
    features = IntermediateLayerGetter(net, {"layer1": "low", "layer4": "out"})(x)
    assert {key: tuple(f.shape) for key, f in features.items()} == {
        "low": (1, net.layer1.channels, 16, 16),
        "out": (1, net.layer4.channels, 2, 2),
    }


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_faster_rcnn(name: str) -> None:
    net = create_backbone(name)
    channels = [net.get_submodule(f"layer{i}").channels for i in (1, 2, 3, 4)]
    fpn = BackboneWithFPN(net, {f"layer{i + 1}": str(i) for i in range(4)}, channels, 64)
    check_detector(FasterRCNN(fpn, num_classes=3, min_size=64, max_size=96))


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_builds_its_own_pyramid_on_our_network(name: str) -> None:
    fpn = _resnet_fpn_extractor(create_backbone(name), 5)  # reads `inplanes`
    if name != "resnet18":
        assert fpn.fpn.inner_blocks[3][0].in_channels == 2048
    check_detector(FasterRCNN(fpn, num_classes=3, min_size=64, max_size=96))


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_retinanet(name: str) -> None:
    fpn = fpn_backbone(
        create_backbone(name), stages=("layer2", "layer3", "layer4"), extra_level="p6p7", out_channels=64
    )
    check_detector(RetinaNet(fpn, num_classes=3, min_size=64, max_size=96))


@pytest.mark.parametrize("name", NAMES[:2])
def test_torchvision_deeplabv3(name: str) -> None:
    net = create_backbone(name, output_stride=8 if name != "resnet18" else 32)
    body = IntermediateLayerGetter(net, {"layer4": "out", "layer3": "aux"})
    model = DeepLabV3(body, DeepLabHead(net.layer4.channels, 5), FCNHead(net.layer3.channels, 5))
    out = model(torch.randn(2, 3, 64, 64))
    assert out["out"].shape == out["aux"].shape == (2, 5, 64, 64)
    (out["out"].mean() + out["aux"].mean()).backward()
