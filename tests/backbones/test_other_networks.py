"""Networks of torchvision and timm as backbones: their own features, frozen by stages, and in both models."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from resnest_det.backbones import STAGES, fpn_backbone, freeze_stages, stage_extractor
from resnest_det.models import deeplabv3plus, faster_rcnn
from tests.random_norms import randomise_norms

SIZES = [(64, 96), (65, 97)]

# The modules of torchvision's networks whose outputs are the stages', and their channels.
TORCHVISION = {
    "resnet18": (STAGES, (64, 128, 256, 512)),
    "regnet_y_400mf": ([f"trunk_output.block{i}" for i in (1, 2, 3, 4)], (48, 104, 208, 440)),
    "convnext_tiny": (["features.1", "features.3", "features.5", "features.7"], (96, 192, 384, 768)),
    "mobilenet_v2": (["features.3", "features.6", "features.13", "features.18"], (24, 32, 96, 1280)),
    "mobilenet_v3_small": (["features.1", "features.3", "features.8", "features.12"], (16, 24, 48, 576)),
    "mobilenet_v3_large": (["features.3", "features.6", "features.12", "features.16"], (24, 40, 112, 960)),
    "efficientnet_b0": (["features.2", "features.3", "features.5", "features.8"], (24, 40, 112, 1280)),
    "densenet121": (
        ["features.denseblock1", "features.denseblock2", "features.denseblock3", "features.norm5"],
        (256, 512, 1024, 1024),
    ),
    "swin_t": (["features.1", "features.3", "features.5", "features.7"], (96, 192, 384, 768)),
    "swin_v2_t": (["features.1", "features.3", "features.5", "features.7"], (96, 192, 384, 768)),
}
ON_META = {  # channels of networks that are only measured
    "resnext50_32x4d": (256, 512, 1024, 2048),
    "wide_resnet50_2": (256, 512, 1024, 2048),
    "efficientnet_v2_s": (48, 64, 160, 1280),
    "convnext_large": (192, 384, 768, 1536),
}
TIMM = [
    "resnet18",
    "resnest14d",
    "seresnet18",
    "regnety_002",
    "convnext_atto",
    "efficientnet_lite0",
    "mobilenetv3_small_100",
]


def random_statistics(net: nn.Module) -> nn.Module:
    """`net` in evaluation with running statistics that are not those of its start."""
    for key, value in net.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith("running_mean"):
            value.normal_(std=0.1)
    return net.eval()


def torchvision_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return random_statistics(getattr(torchvision.models, name)())


def timm_network(name: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return random_statistics(timm.create_model(name, **arguments))


NETWORKS = {
    "mobilenet_v3_small": partial(torchvision_network, "mobilenet_v3_small"),
    "densenet121": partial(torchvision_network, "densenet121"),
    "timm resnet18": partial(timm_network, "resnet18"),
    "timm regnety_002": partial(timm_network, "regnety_002"),
    "timm efficientnet_lite0": partial(timm_network, "efficientnet_lite0"),
}


def hooked_outputs(net: nn.Module, names: list[str], x: Tensor) -> list[Tensor]:
    """What the modules of these names give while the network itself runs."""
    outputs: list[Tensor] = []
    # Cloned: DenseNet's forward applies a ReLU in place to its last module's output.
    hooks = [
        net.get_submodule(name).register_forward_hook(lambda m, i, out: outputs.append(out.clone())) for name in names
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("name", TORCHVISION)
def test_features_are_those_of_torchvisions_network(name: str) -> None:
    modules, channels = TORCHVISION[name]
    net = torchvision_network(name)
    stages = stage_extractor(net)
    assert tuple(stages.channels.values()) == channels
    assert stages.strides == {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
    for size in SIZES:
        x = torch.randn(1, 3, *size)
        features = stages(x)
        assert list(features) == list(STAGES)
        for feature, expected in zip(features.values(), hooked_outputs(net, modules, x), strict=True):
            assert torch.equal(feature, expected.permute(0, 3, 1, 2) if name.startswith("swin") else expected)


@pytest.mark.parametrize("name", ON_META)
def test_measures_without_memory(name: str) -> None:
    with torch.device("meta"):
        net = getattr(torchvision.models, name)()
    stages = stage_extractor(net)
    assert tuple(stages.channels.values()) == ON_META[name]
    assert tuple(stages.strides.values()) == (4, 8, 16, 32)
    assert stages(torch.zeros(1, 3, 64, 64, device="meta"))["layer4"].shape == (1, ON_META[name][3], 2, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
def test_features_are_those_of_timms_features_only(name: str) -> None:
    net = timm_network(name)
    keys = list(net.state_dict())
    theirs = timm.create_model(name, features_only=True).eval()
    theirs_keys = set(theirs.state_dict())  # with "stages_0" for "stages.0" in some
    state = {key if key in theirs_keys else key.replace(".", "_", 1): value for key, value in net.state_dict().items()}
    assert theirs.load_state_dict(state, strict=False).missing_keys == []
    stages = stage_extractor(net)
    assert list(stages.channels.values()) == theirs.feature_info.channels()[-4:]
    assert list(stages.strides.values()) == theirs.feature_info.reduction()[-4:] == [4, 8, 16, 32]
    for size in SIZES:
        x = torch.randn(1, 3, *size)
        features = stages(x)
        assert list(features) == list(STAGES)
        for feature, expected in zip(features.values(), theirs(x)[-4:], strict=True):
            assert torch.equal(feature, expected)
    assert list(net.state_dict()) == keys
    assert net(x).shape == (1, 1000)  # it stays whole


@torch.no_grad()
def test_timms_swin_of_many_sizes() -> None:
    net = timm_network("swin_tiny_patch4_window7_224", strict_img_size=False)
    x = torch.randn(1, 3, 96, 128)
    features = stage_extractor(net, ("layer1", "layer4"))(x)
    intermediates = net.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(features["layer1"], intermediates[0])
    assert torch.equal(features["layer4"], intermediates[3])


@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilated_networks_keep_their_stages(output_stride: int) -> None:
    expected = {16: (4, 8, 16, 16), 8: (4, 8, 8, 8)}[output_stride]
    for name in ("resnet18", "convnext_atto", "regnety_002"):
        stages = stage_extractor(timm.create_model(name, output_stride=output_stride))
        assert tuple(stages.strides.values()) == expected, name
    dilation = (False, output_stride == 8, True)
    net = torchvision.models.resnet50(replace_stride_with_dilation=dilation)
    assert tuple(stage_extractor(net).strides.values()) == expected


def test_torchvisions_dilated_mobilenet_has_four_stages() -> None:
    stages = stage_extractor(torchvision.models.mobilenet_v3_large(dilated=True))
    assert list(stages.channels.values()) == [24, 40, 112, 960]
    assert list(stages.strides.values()) == [4, 8, 16, 16]


@pytest.mark.parametrize("name", NETWORKS)
def test_measuring_changes_nothing(name: str) -> None:
    net = NETWORKS[name]().train()
    next(net.children()).eval()
    if hasattr(net, "set_grad_checkpointing"):
        net.set_grad_checkpointing()
    before = copy.deepcopy(net)
    generator = torch.get_rng_state()
    stage_extractor(net)
    assert torch.equal(torch.get_rng_state(), generator)
    for ours, theirs in zip(net.modules(), before.modules(), strict=True):
        assert (type(ours), ours.training) == (type(theirs), theirs.training)
        assert getattr(ours, "grad_checkpointing", None) == getattr(theirs, "grad_checkpointing", None)
    for key, value in before.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("stages", [STAGES, ("layer1", "layer2")])
@pytest.mark.parametrize("name", [*NETWORKS, "timm ghostnet_100"])  # GhostNet runs a block after its last features
def test_every_parameter_gets_a_gradient(name: str, stages: tuple[str, ...]) -> None:
    net = NETWORKS[name]() if name in NETWORKS else timm_network("ghostnet_100")
    extractor = stage_extractor(net, stages).train()
    sum(feature.mean() for feature in extractor(torch.randn(2, 3, 64, 64)).values()).backward()
    assert [key for key, parameter in extractor.named_parameters() if parameter.grad is None] == []
    assert {id(parameter) for parameter in extractor.parameters()} < {id(parameter) for parameter in net.parameters()}


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm resnet18", "timm efficientnet_lite0"])
def test_copies_and_state_dict(name: str) -> None:
    stages = stage_extractor(NETWORKS[name]())
    other = stage_extractor(copy.deepcopy(NETWORKS[name]()).apply(reset))
    x = torch.randn(1, 3, 64, 64)
    expected = stages(x)["layer4"]
    assert not torch.equal(other.eval()(x)["layer4"], expected)
    other.load_state_dict(stages.state_dict())
    assert torch.equal(other(x)["layer4"], expected)
    assert torch.equal(copy.deepcopy(stages)(x)["layer4"], expected)


def reset(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.reset_parameters()


def test_frozen_networks_and_inference_mode() -> None:
    """Which parameters a network of timm uses is found without their gradients."""
    net = timm_network("resnet18")
    expected = [key for key, _ in stage_extractor(net).named_parameters()]
    net.requires_grad_(False)
    with torch.inference_mode():
        stages = stage_extractor(net)
    assert [key for key, _ in stages.named_parameters()] == expected
    assert not any(parameter.requires_grad for parameter in stages.parameters())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm resnet18"])
def test_compiles_and_exports(name: str) -> None:
    stages = stage_extractor(NETWORKS[name]())
    x = torch.randn(1, 3, 64, 64)
    expected = stages(x)
    compiled = torch.compile(stages, backend="eager", fullgraph=True)(x)
    exported = torch.export.export(stages, (x,)).module()(x)
    for key, feature in expected.items():
        torch.testing.assert_close(compiled[key], feature)
        torch.testing.assert_close(exported[key], feature)


# Which modules train with trainable_stages=3, by the start of their parameters' names.
TRAINABLE = {
    "mobilenet_v3_small": tuple(f"features.{i}." for i in range(2, 13)),
    "densenet121": (
        *("features.transition1.", "features.denseblock2.", "features.transition2.", "features.denseblock3."),
        *("features.transition3.", "features.denseblock4.", "features.norm5."),
    ),
    "timm resnet18": ("layer2.", "layer3.", "layer4."),
    "timm regnety_002": ("s2.", "s3.", "s4."),
    "timm efficientnet_lite0": tuple(f"blocks.{i}." for i in range(2, 7)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_freezing(name: str) -> None:
    net = NETWORKS[name]().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = stage_extractor(net)(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fpn = fpn_backbone(net, trainable_stages=3, out_channels=8)
        after = stage_extractor(net)(x)
    for stage, feature in before.items():  # the activations that are part of timm's norms among them
        torch.testing.assert_close(after[stage], feature, rtol=1e-9, atol=1e-9)
    own = {id(parameter): key for key, parameter in net.named_parameters()}
    trainable = {own[id(p)] for p in fpn.body.parameters() if p.requires_grad}
    assert trainable
    assert all(key.startswith(TRAINABLE[name]) for key in trainable)
    assert {key.split(".")[1] for key in trainable if "features" in key} == {
        key.split(".")[1] for key in TRAINABLE[name] if "features" in key
    }
    frozen = [key for key, value in net.named_parameters() if not value.requires_grad]
    buffers = {key: value.clone() for key, value in net.named_buffers()}
    fpn.body.train()(x)
    changed = [key for key, value in net.named_buffers() if not torch.equal(value, buffers[key])]
    assert frozen
    assert changed
    assert all(key.startswith(TRAINABLE[name]) for key in changed)


def test_freezing_keeps_the_activation_of_timms_norms() -> None:
    net = timm_network("regnety_002")
    assert isinstance(net.stem.bn, BatchNormAct2d)
    x = torch.randn(1, 32, 8, 8)
    expected = net.stem.bn(x)
    freeze_stages(net, 4)
    assert isinstance(net.stem.bn, FrozenBatchNormAct2d)
    assert isinstance(net.s1.b1.conv1.bn, BatchNormAct2d)
    torch.testing.assert_close(net.stem.bn.train()(x), expected)
    assert (net.stem.bn(x) >= 0).all()


def test_freezing_is_of_the_network_itself() -> None:
    net = torchvision_network("densenet121")
    freeze_stages(net, 4)
    assert isinstance(net.features.norm0, FrozenBatchNorm2d)
    assert isinstance(net.features.denseblock1.denselayer1.norm1, nn.BatchNorm2d)


@pytest.mark.parametrize(
    "build",
    [
        partial(torchvision.models.DenseNet, 8, (1, 1, 1, 1), 16, drop_rate=0.5),
        lambda: torchvision.models.SwinTransformer(
            [4, 4], 16, [1, 1, 1, 1], [1, 1, 2, 2], [4, 4], dropout=0.5, attention_dropout=0.5
        ),
        partial(timm.create_model, "convnext_atto", drop_path_rate=0.9),
        partial(timm.create_model, "resnet18", drop_path_rate=0.5, drop_block_rate=0.3),
    ],
    ids=["densenet", "swin", "timm convnext", "timm resnet"],
)
@torch.no_grad()
def test_frozen_stages_drop_nothing(build: partial[nn.Module]) -> None:
    torch.manual_seed(0)
    net = randomise_norms(build())  # timm's last norm of a block starts at zero, which hides its branch
    stages = stage_extractor(net).train()
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(stages(x)["layer4"], stages(x)["layer4"])
    freeze_stages(net, 0)
    stages = stage_extractor(net)
    expected = stages.eval()(x)["layer4"]
    assert torch.equal(stages.train()(x)["layer4"], expected)


def test_freezing_where_timm_names_no_module_for_the_stem() -> None:
    net = timm.create_model("tresnet_m")
    freeze_stages(net, 3)
    frozen = {".".join(key.split(".")[:2]) for key, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"body.conv1", "body.layer1"}


def test_freezing_a_network_of_ones_own() -> None:
    """What is its own parameter, no module's, is of the stem."""
    net = own_network(*(nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(4)))
    net.position = nn.Parameter(torch.zeros(1, 3, 1, 1))
    freeze_stages(net, 3)
    frozen = {key for key, parameter in net.named_parameters() if not parameter.requires_grad}
    assert frozen == {"position", "layer1.weight", "layer1.bias"}


def test_freezing_on_meta_and_in_another_dtype() -> None:
    with torch.device("meta"):
        nets = [torchvision.models.mobilenet_v3_small(), timm.create_model("regnety_002")]
    for net in nets:
        freeze_stages(net, 0)
        assert {buffer.device.type for buffer in net.buffers()} == {"meta"}
    net = torchvision_network("mobilenet_v3_small").bfloat16()
    freeze_stages(net, 4)
    assert net.features[0][1].running_var.dtype == torch.bfloat16


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("norm_layer", "message"),
    [
        (Doubled, "Doubled is a BatchNorm with a forward of its own"),
        (partial(nn.BatchNorm2d, track_running_stats=False), "BatchNorm2d without running statistics cannot be frozen"),
    ],
)
def test_norms_that_cannot_be_frozen(norm_layer: type[nn.Module], message: str) -> None:
    net = torchvision.models.resnet18()
    net.layer1[1].bn2 = norm_layer(64)
    with pytest.raises(ValueError, match=message):
        freeze_stages(net, 3)
    assert isinstance(net.bn1, nn.BatchNorm2d)  # nothing is frozen where not all can be
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_networks_that_cannot_be_frozen_by_stages() -> None:
    net = timm.create_model("hrnet_w18_small")
    with pytest.raises(ValueError, match="HighResolutionNet cannot be frozen by stages: stem, stage1, .*stages=5"):
        freeze_stages(net, 3)
    assert all(parameter.requires_grad for parameter in net.parameters())
    freeze_stages(nn.Sequential(nn.Conv2d(3, 8, 3)), 5)
    with pytest.raises(ValueError, match="Sequential cannot be frozen by stages: layer1, layer2, layer3, layer4 are"):
        freeze_stages(nn.Sequential(nn.Conv2d(3, 8, 3)), 4)


def two_stages() -> nn.Module:
    return torchvision.models.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)])


def one_stride() -> nn.Module:
    return torchvision.models.MobileNetV2(inverted_residual_setting=[[1, 16, 1, 1]])


def own_network(*modules: nn.Module) -> nn.Module:
    net = nn.Module()
    for index, module in enumerate(modules, start=1):
        net.add_module(f"layer{index}", module)
    return net


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            torchvision.models.vit_b_16,
            "VisionTransformer has no stage 'layer1', only conv_proj, encoder, heads. Accept",
        ),
        (
            torchvision.models.shufflenet_v2_x0_5,
            "ShuffleNetV2 has no stage 'layer1', only .* RegNet, SwinTransformer; timm",
        ),
        (two_stages, "ConvNeXt has stages at strides 4, 8: a backbone has four, at strides 4, 8, 16 and 32"),
        (one_stride, "MobileNetV2 has stages at strides below 4: a backbone has four, at strides 4, 8, 16 and 32"),
        (
            partial(timm.create_model, "vit_tiny_patch16_224", dynamic_img_size=True),
            "VisionTransformer has stages at strides 16, 16, 16, .*: a backbone has four",
        ),
        (
            partial(timm.create_model, "swin_tiny_patch4_window7_224"),
            r"the 64x64 image .*\(Input height \(64\) doesn't match model \(224\).*strict_img_size=False",
        ),
        (partial(own_network, nn.Conv2d(1, 8, 1)), r"Module does not run on the 64x64 image .*3 channels"),
        (
            partial(own_network, nn.Conv2d(3, 8, 3, stride=2)),
            r"'layer1' of Module gives \(1, 8, 31, 31\) on a 64x64 image, which tells no stride",
        ),
        (partial(own_network, nn.Flatten()), r"'layer1' of Module gives \(1, 12288\) on"),
    ],
)
def test_networks_that_are_not_taken(build: partial[nn.Module], message: str) -> None:
    net = build()
    with pytest.raises(ValueError, match=message):
        stage_extractor(net, ["layer1"])
    assert all(module.training for module in net.modules())


def test_unknown_stages() -> None:
    for net in (torchvision.models.mobilenet_v3_small(), timm.create_model("resnet18")):
        with pytest.raises(ValueError, match="has no stage 'layer5'; did you mean 'layer"):
            stage_extractor(net, ("layer4", "layer5"))
        with pytest.raises(ValueError, match=r"stages=\('layer4', 'layer1'\) must be in the order they run"):
            stage_extractor(net, ("layer4", "layer1"))


def small_swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 1, 1, 1], [1, 1, 2, 2], window_size=[4, 4])


SMALL = {"min_size": 64, "max_size": 96, "fpn_channels": 16, "box_head_channels": 16, "roi_batch_size": 16}


@pytest.mark.parametrize(
    ("build", "trainable_stages"),
    [
        (torchvision.models.mobilenet_v3_large, 5),
        (torchvision.models.mobilenet_v3_large, 3),
        (small_swin, 5),
        (partial(timm.create_model, "resnet18"), 3),
        (partial(timm.create_model, "regnety_002"), 3),
        (partial(timm.create_model, "convnext_atto"), 5),
    ],
)
def test_faster_rcnn(build: partial[nn.Module], trainable_stages: int) -> None:
    torch.manual_seed(0)
    model = faster_rcnn(build(), 3, trainable_stages=trainable_stages, **SMALL)
    assert isinstance(model.backbone, BackboneWithFPN)
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    assert list(model.backbone(torch.rand(2, 3, 64, 96))) == ["0", "1", "2", "3", "pool"]
    targets = [
        {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    losses = model(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert any(not p.requires_grad for p in model.parameters()) == (trainable_stages < 5)
    assert [sorted(prediction) for prediction in model.eval()(images)] == [["boxes", "labels", "scores"]] * 2


@pytest.mark.parametrize(
    ("build", "aspp_rates"),
    [
        (torchvision.models.mobilenet_v3_large, (2, 4)),
        (partial(torchvision.models.mobilenet_v3_large, dilated=True), None),
        (partial(timm.create_model, "resnet18", output_stride=16), None),
    ],
)
def test_deeplabv3plus(build: partial[nn.Module], aspp_rates: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    model = deeplabv3plus(
        build(), 4, aspp_rates=aspp_rates, head_channels=16, low_level_channels=8, aux_head=True, trainable_stages=4
    )
    losses = model(torch.rand(2, 3, 65, 97), torch.randint(0, 4, (2, 65, 97)))
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.eval()(torch.rand(1, 3, 70, 81))["out"].shape == (1, 4, 70, 81)


def test_deeplabv3plus_says_how_other_networks_are_dilated() -> None:
    with pytest.raises(
        ValueError, match="has stride 32, .* timm's take output_stride=16, torchvision's ResNet replace_"
    ):
        deeplabv3plus(torchvision.models.mobilenet_v3_small(), 4)
