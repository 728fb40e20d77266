from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.metaformer import MetaFormer
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim import lr_scheduler
from torchvision.models import ConvNeXt, SwinTransformer, densenet121, mobilenet_v2
from torchvision.models.convnext import CNBlockConfig

from resnest_det import create_backbone, fpn_backbone, stage_extractor
from resnest_det.engine import create_optimizer, create_schedule
from resnest_det.engine.optim import (
    describe_trainable,
    layer_depths,
    learning_rate_factor,
    parameter_groups,
    scaled_learning_rate,
)
from resnest_det.models import deeplabv3plus, faster_rcnn


def factors(total: int = 100, **arguments: object) -> list[float]:
    return [learning_rate_factor(step, total_steps=total, **arguments) for step in range(total + 1)]


def groups(net: nn.Module, **arguments: float) -> list[dict[str, Any]]:
    return parameter_groups(net, **{"lr": 0.1, "weight_decay": 1e-4, "norm_weight_decay": 0.0, **arguments})


def settings_by_name(model: nn.Module, found: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each of a model's trainable parameters, each of which is in one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings = [
        (names[parameter], (group["lr"], group["weight_decay"])) for group in found for parameter in group["params"]
    ]
    assert len(settings) == len(dict(settings)) == sum(p.requires_grad for p in model.parameters())
    return dict(settings)


def layer_sizes(backbone: nn.Module) -> list[int]:
    """The number of parameters in each layer of a backbone's network."""
    sizes: Counter[int] = Counter()
    for parameter, depth in layer_depths(backbone).items():
        sizes[depth] += parameter.numel()
    return [sizes[depth] for depth in range(max(sizes) + 1)]


def rates_of(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], num_steps: int) -> list[float]:
    """The learning rate before each step, of a run at 1 under a scheduler, and after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(num_steps):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def detector() -> nn.Module:
    return faster_rcnn(create_backbone("resnest26"), num_classes=3, fpn_channels=32)


def test_norms_and_biases_are_apart() -> None:
    net = create_backbone("resnest14")
    weights, rest = groups(net)
    assert (weights["weight_decay"], rest["weight_decay"]) == (1e-4, 0.0)
    assert all(p.ndim > 1 for p in weights["params"])
    assert all(p.ndim == 1 for p in rest["params"])
    both = {id(p) for p in [*weights["params"], *rest["params"]]}
    assert both == {id(p) for p in net.parameters()}
    assert len(both) == len(weights["params"]) + len(rest["params"])


def test_frozen_parameters_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    assert [len(group["params"]) for group in groups(net)] == [1, 1]
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter: every one is frozen"):
        groups(net)


def test_head_has_a_learning_rate_of_its_own() -> None:
    net = nn.Module()
    net.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net.backbone_like = nn.Linear(4, 2)  # a name that only begins as the body's does
    found = groups(net, head_lr_factor=10.0, weight_decay=0.5, norm_weight_decay=0.25)
    assert [group["lr"] for group in found] == [0.1, 0.1, 1.0, 1.0]
    assert [group["weight_decay"] for group in found] == [0.5, 0.25, 0.5, 0.25]
    conv, norm = net.backbone
    expected = [
        [conv.weight],
        [conv.bias, norm.weight, norm.bias],
        [net.backbone_like.weight],
        [net.backbone_like.bias],
    ]
    for group, parameters in zip(found, expected, strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in parameters}
    optimizer = create_optimizer(net, "sgd", lr=0.1, head_lr_factor=10.0)
    schedule = create_schedule(optimizer, total_steps=10, schedule="poly", power=1.0)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.05, 0.05, 0.5, 0.5])


def test_one_rate_has_the_groups_that_it_always_had() -> None:
    """Weights and the rest, in the order of the modules: a checkpoint holds the state of its optimiser by place."""
    model = detector()
    small = [parameter.ndim == 1 for parameter in model.parameters()]
    parameters = list(model.parameters())
    weights, rest = groups(model, weight_decay=0.5, norm_weight_decay=0.5)  # not merged, though they decay alike
    assert [id(p) for p in weights["params"]] == [id(p) for p, s in zip(parameters, small, strict=True) if not s]
    assert [id(p) for p in rest["params"]] == [id(p) for p, s in zip(parameters, small, strict=True) if s]


def test_parameters_of_one_dimension_do_not_decay() -> None:
    net = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    decays = {name: decay for name, (_, decay) in settings_by_name(net, groups(net)).items()}
    assert decays["stages.0.blocks.0.gamma"] == 0.0  # LayerScale
    assert decays["stages.0.blocks.0.conv_dw.weight"] == 1e-4


@pytest.mark.parametrize("head_lr_factor", [1.0, 10.0])
def test_layer_decay_of_a_detector(head_lr_factor: float) -> None:
    model = detector()
    found = settings_by_name(model, groups(model, lr=1.0, layer_decay=0.5, head_lr_factor=head_lr_factor))
    blocks = [f"backbone.body.layer{stage}.{block}." for stage in (1, 2, 3, 4) for block in (0, 1)]
    for name, (lr, _) in found.items():
        if name.startswith(("backbone.body.conv1.", "backbone.body.bn1.")):
            assert lr == 0.5**9, name
        elif name.startswith("backbone.body."):
            (depth,) = (depth for depth, block in enumerate(blocks, start=1) if name.startswith(block))
            assert lr == 0.5 ** (9 - depth), name
        else:  # the pyramid is in `backbone`
            assert lr == (1.0 if name.startswith("backbone.fpn.") else head_lr_factor), name


def test_layer_decay_of_a_segmenter() -> None:
    """Its extractor ends at layer4, with no pyramid around it; the run's own rate is that of the first group."""
    model = deeplabv3plus(create_backbone("resnest14", output_stride=16), num_classes=2)
    found = groups(model, lr=1.0, layer_decay=0.5)
    assert [group["lr"] for group in found[::2]] == [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert [group["lr"] for group in found[1::2]] == [group["lr"] for group in found[::2]]
    rates = settings_by_name(model, found)
    assert rates["backbone.layer4.0.conv1.weight"] == (0.5, 1e-4)
    assert rates["backbone.conv1.0.weight"] == (0.03125, 1e-4)
    assert rates["backbone.bn1.weight"] == (0.03125, 0.0)
    assert {lr for name, (lr, _) in rates.items() if not name.startswith("backbone.")} == {1.0}


@pytest.mark.parametrize("name", ["resnest14d", "convnext_atto"])
def test_layer_decay_against_timm(name: str) -> None:
    """timm counts the classifier as the last layer, at the full rate, as we do all that follows the network."""
    net = timm.create_model(name, num_classes=2)
    theirs = param_groups_layer_decay(net, weight_decay=1e-4, layer_decay=0.75)
    expected = settings_by_name(net, [{**group, "lr": group["lr_scale"]} for group in theirs])
    model = nn.Module()
    model.backbone = fpn_backbone(net, out_channels=8)
    found = settings_by_name(model, groups(model, lr=1.0, layer_decay=0.75))
    prefix = "backbone.body.levels.net."
    body = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    assert body == {key: value for key, value in expected.items() if not key.startswith(("fc.", "head."))}
    assert {lr for key, (lr, _) in found.items() if not key.startswith(prefix)} == {1.0}


def test_torchvisions_networks_have_the_layers_of_timms() -> None:
    depths, dims = (1, 2, 3, 1), (8, 16, 24, 32)
    config = [
        CNBlockConfig(width, after, depth) for width, after, depth in zip(dims, [*dims[1:], None], depths, strict=True)
    ]
    convnext = ConvNeXt(config)
    timms_convnext = timm.create_model("convnext_atto", depths=depths, dims=dims, conv_mlp=False)
    sizes = layer_sizes(stage_extractor(convnext))
    assert sizes == layer_sizes(stage_extractor(timms_convnext))
    assert len(sizes) == 1 + sum(depths)

    heads = [1, 2, 2, 4]
    swin = SwinTransformer([4, 4], embed_dim=8, depths=list(depths), num_heads=heads, window_size=[7, 7])
    timms_swin = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=8, depths=depths, num_heads=heads, strict_img_size=False
    )
    sizes = layer_sizes(stage_extractor(swin))
    assert sizes == layer_sizes(stage_extractor(timms_swin))
    assert len(sizes) == 1 + sum(depths)


def test_layers_of_torchvisions_other_networks() -> None:
    mobilenet = stage_extractor(mobilenet_v2(width_mult=0.25))
    depths = {name: layer_depths(mobilenet)[parameter] for name, parameter in mobilenet.named_parameters()}
    assert depths["stem.1.conv.0.0.weight"] == 0  # a block before stride 4
    assert depths["layer1.0.conv.0.0.weight"] == 1
    assert depths["layer4.3.conv.0.0.weight"] == 16
    assert depths["layer4.4.0.weight"] == max(depths.values()) == 17  # the last 1x1 convolution

    densenet = stage_extractor(densenet121())
    depths = {name: layer_depths(densenet)[parameter] for name, parameter in densenet.named_parameters()}
    assert depths["layer1.1.denselayer6.conv1.weight"] == 6
    assert depths["layer2.0.conv.weight"] == depths["layer2.1.denselayer1.conv1.weight"] == 7  # the transition
    assert depths["layer2.1.denselayer2.conv1.weight"] == 8
    assert depths["layer4.2.weight"] == max(depths.values()) == 59  # the norm at the end


def test_layers_of_a_network_of_ones_own() -> None:
    """Its stages have their own names; one is a list of blocks, one a block, one a convolution and its norm."""
    net = nn.Sequential()
    net.add_module("patches", nn.Conv2d(3, 4, 4, 4))
    net.add_module("first", nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(2))))
    net.add_module("pool", nn.MaxPool2d(2))  # no layer, as it learns nothing
    net.add_module("second", nn.Conv2d(4, 4, 1))
    net.add_module("third", nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    net.position = nn.Parameter(torch.zeros(4, 1, 1))
    backbone = stage_extractor(net, ("first", "third"))
    names = {parameter: name for name, parameter in net.named_parameters()}
    depths = {names[parameter]: depth for parameter, depth in layer_depths(backbone).items()}
    layers = [{key for key in depths if depths[key] == depth} for depth in range(5)]
    assert layers == [
        {"patches.weight", "patches.bias"},
        {"first.0.0.weight", "first.0.0.bias"},
        {"first.1.0.weight", "first.1.0.bias"},
        {"second.weight", "second.bias"},
        {"third.0.weight", "third.0.bias", "third.1.weight", "third.1.bias"},
    ]
    holder = nn.Module()
    holder.layer1 = nn.Linear(2, 2)
    holder.position = nn.Parameter(torch.zeros(2))
    assert [layer_depths(holder)[p] for p in (holder.position, holder.layer1.weight)] == [0, 1]


def test_frozen_stages_keep_the_places_of_the_groups() -> None:
    model = detector()
    whole = groups(model, layer_decay=0.9)
    model.backbone.body.conv1.requires_grad_(False)
    model.backbone.body.layer1.requires_grad_(False)
    rest = groups(model, layer_decay=0.9)
    assert [group["lr"] for group in rest] == [group["lr"] for group in whole]
    sizes = [len(group["params"]) for group in rest]
    assert sizes[:-6] == [len(group["params"]) for group in whole][:-6]
    assert sizes[-6:] == [0, 0, 0, 0, 0, 2]  # of layer1's two blocks nothing, of the stem its norm


def test_layer_decay_trains_and_follows_the_schedule() -> None:
    model = nn.Module()
    model.backbone = stage_extractor(create_backbone("resnest14"))
    model.head = nn.Linear(2, 2)
    optimizer = create_optimizer(model, "sgd", lr=1.0, momentum=0.0, weight_decay=0.0, layer_decay=0.5)
    schedule = create_schedule(optimizer, total_steps=10, schedule="poly", power=1.0)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == 0.5
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: float((before[name] - p.detach()).mean()) for name, p in model.named_parameters()}
    assert moved["head.weight"] == pytest.approx(0.5)
    assert moved["backbone.layer4.0.conv1.weight"] == pytest.approx(0.25)
    assert moved["backbone.conv1.0.weight"] == pytest.approx(0.5**6)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, math.nan])
def test_layer_decay_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=rf"layer_decay={value} must be above 0 and at most 1"):
        create_optimizer(nn.Linear(2, 2), "sgd", lr=0.1, layer_decay=value)


def test_layer_decay_needs_a_network_with_layers() -> None:
    with pytest.raises(ValueError, match=r"layer_decay=0.9 needs a model with a child `backbone`.*Sequential has 0"):
        groups(nn.Sequential(nn.Linear(2, 2)), layer_decay=0.9)
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layers are known, and Sequential has no child layer1: take"):
        groups(model, layer_decay=0.9)
    model.backbone = MetaFormer(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4))
    with pytest.raises(ValueError, match="does not say what the layers of its MetaFormer are: use layer_decay=1"):
        groups(model, layer_decay=0.9)


def test_head_factor_needs_a_backbone() -> None:
    with pytest.raises(
        ValueError, match=r"head_lr_factor=10.0 needs a model with a child `backbone`.*Sequential has 0"
    ):
        groups(nn.Sequential(nn.Linear(2, 2)), head_lr_factor=10.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers(name: str) -> None:
    net = nn.Linear(2, 1)
    optimizer = create_optimizer(net, name, lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.01)
    assert type(optimizer).__name__.lower() == name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    if name == "sgd":
        assert optimizer.defaults["momentum"] == 0.5
        assert optimizer.defaults["nesterov"] is True


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="optimizer 'adam' is unknown; choose 'sgd' or 'adamw'"):
        create_optimizer(nn.Linear(1, 1), "adam", lr=0.1)
    with pytest.raises(ValueError, match="schedule 'step' is unknown"):
        learning_rate_factor(0, total_steps=10, schedule="step")


STEPS = 50


@pytest.mark.parametrize(
    ("arguments", "theirs"),
    [
        (
            {"schedule": "multistep", "milestones": (0.6, 0.9), "gamma": 0.2},
            lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [30, 45], gamma=0.2),
        ),
        (
            {"schedule": "cosine", "final_factor": 0.1},
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0.1),
        ),
        (
            {"schedule": "poly", "power": 0.9},
            lambda optimizer: lr_scheduler.PolynomialLR(optimizer, STEPS, power=0.9),
        ),
        # OneCycleLR is at the end of its run at the last step, and we after it; it counts its rise from 1.
        (
            {"schedule": "one_cycle", "final_factor": 0.001},
            lambda optimizer: lr_scheduler.OneCycleLR(
                optimizer, 1.0, STEPS + 1, pct_start=(0.3 * STEPS + 1) / (STEPS + 1), final_div_factor=40
            ),
        ),
        (
            {"schedule": "one_cycle", "rise": 0.5, "initial_factor": 0.1},
            lambda optimizer: lr_scheduler.OneCycleLR(
                optimizer,
                1.0,
                STEPS + 1,
                pct_start=(0.5 * STEPS + 1) / (STEPS + 1),
                div_factor=10,
                final_div_factor=math.inf,
            ),
        ),
        (
            {"schedule": "constant", "warmup_steps": 10, "warmup_factor": 0.2},
            lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.2, total_iters=10),
        ),
        (
            {"schedule": "multistep", "milestones": (0.5,), "warmup_steps": 10, "warmup_factor": 0.2},
            lambda optimizer: lr_scheduler.ChainedScheduler(
                [lr_scheduler.LinearLR(optimizer, 0.2, total_iters=10), lr_scheduler.MultiStepLR(optimizer, [25])]
            ),
        ),
        (
            {"schedule": "cosine", "warmup_steps": 10, "warmup_factor": 0.2},
            lambda optimizer: lr_scheduler.SequentialLR(
                optimizer,
                [
                    lr_scheduler.LinearLR(optimizer, 0.2, total_iters=10),
                    lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 10),
                ],
                milestones=[10],
            ),
        ),
    ],
)
def test_schedules_against_torch(
    arguments: dict[str, Any], theirs: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
) -> None:
    ours = rates_of(lambda optimizer: create_schedule(optimizer, total_steps=STEPS, **arguments), STEPS)
    assert ours == pytest.approx(rates_of(theirs, STEPS), rel=1e-9, abs=1e-12)


def test_one_cycle_after_a_warm_up() -> None:
    """The warm-up ends where the rise begins; the rise takes its fraction of what is left."""
    values = factors(schedule="one_cycle", warmup_steps=20, warmup_factor=0.5, rise=0.25, initial_factor=0.1)
    assert values[:21] == pytest.approx([0.1 * (0.5 + 0.5 * step / 20) for step in range(21)])
    assert values[20:41] == sorted(values[20:41])
    assert values[30] == pytest.approx(0.55)
    assert values[40] == 1.0
    assert values[40:] == sorted(values[40:], reverse=True)
    assert values[70] == pytest.approx(0.5)
    assert values[100] == 0.0


def test_one_cycle_leaves_the_momentum_alone() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    schedule = create_schedule(optimizer, total_steps=10, schedule="one_cycle")
    for _ in range(10):
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rise": 0.0}, "rise=0.0 must be between 0 and 1"),
        ({"rise": 1.0}, "rise=1.0 must be between 0 and 1"),
        ({"initial_factor": 0.0}, "initial_factor=0.0 must be above 0 and at most 1"),
        ({"initial_factor": 25.0}, "initial_factor=25.0 must be above 0 and at most 1"),
        ({"milestones": (60000, 80000)}, r"milestones=\(60000, 80000\) must be increasing fractions of the run"),
        ({"milestones": (0.9, 0.6)}, r"milestones=\(0.9, 0.6\) must be increasing fractions of the run"),
    ],
)
def test_schedule_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=message):
        create_schedule(optimizer, total_steps=100_000, schedule="one_cycle", **arguments)


@pytest.mark.parametrize(
    ("rule", "batch_size", "expected"),
    [("linear", 64, 0.08), ("linear", 2, 0.0025), ("sqrt", 64, 0.04), ("sqrt", 16, 0.02)],
)
def test_learning_rate_scaled_to_the_batch(rule: Any, batch_size: int, expected: float) -> None:
    assert scaled_learning_rate(0.02, batch_size=batch_size, base_batch_size=16, rule=rule) == pytest.approx(expected)


def test_learning_rate_scaled_by_wrong_arguments() -> None:
    with pytest.raises(
        ValueError, match="the rule 'cubic' for the learning rate is unknown; choose 'linear' or 'sqrt'"
    ):
        scaled_learning_rate(0.02, batch_size=16, base_batch_size=16, rule="cubic")
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        scaled_learning_rate(0.02, batch_size=0, base_batch_size=16, rule="linear")
    with pytest.raises(ValueError, match="base_batch_size=-16 must be at least 1"):
        scaled_learning_rate(0.02, batch_size=16, base_batch_size=-16, rule="sqrt")


def test_what_of_a_detector_is_frozen() -> None:
    net = create_backbone("resnest14")
    net.weights_loaded = True
    model = faster_rcnn(net, num_classes=3, trainable_stages=3)
    text = describe_trainable(model)
    # bn1 is FrozenBatchNorm2d by now, without parameters, and goes unnamed.
    stem = 3 * 3 * 3 * 32 + 3 * 3 * 32 * 32 + 3 * 3 * 32 * 64
    layer1 = 64 * 64 + 3 * 3 * 32 * 128 + 64 * 32 + 32 + 32 * 128 + 128 + 64 * 256 + 64 * 256
    assert text.endswith(
        f" tensors; frozen: backbone.body.conv1, backbone.body.layer1 ({(stem + layer1) / 1000:.1f} k)"
    )
    numbers = [p.numel() for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    assert text.startswith(
        f"trained: {sum(numbers) / 1e6:.1f} M of {total / 1e6:.1f} M parameters, in {len(numbers)} tensors;"
    )


def test_names_of_what_is_frozen() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)), nn.Linear(1, 1))
    total = 9 + 12 + 4 + 2
    assert describe_trainable(net) == f"trained: {total} of {total} parameters, in 8 tensors; frozen: nothing"
    net[0].bias.requires_grad_(False)
    net[1].requires_grad_(False)
    assert describe_trainable(net) == f"trained: 8 of {total} parameters, in 3 tensors; frozen: 0.bias, 1 (19)"
    net[1][2].weight.requires_grad_(True)
    assert describe_trainable(net).endswith("; frozen: 0.bias, 1.0, 1.2.bias (16)")
    net.requires_grad_(False)
    assert describe_trainable(net) == f"trained: 0 of {total} parameters, in 0 tensors; frozen: everything ({total})"


def test_names_of_much_that_is_frozen() -> None:
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(11)))
    for layer in net:
        layer.bias.requires_grad_(False)
    assert describe_trainable(net).endswith(
        "; frozen: " + ", ".join(f"{i}.bias" for i in range(8)) + " and 3 more (11)"
    )


def test_multistep() -> None:
    values = factors(schedule="multistep", milestones=(0.6, 0.9), gamma=0.1)
    assert values[:60] == [1.0] * 60
    assert values[60:90] == pytest.approx([0.1] * 30)
    assert values[90:] == pytest.approx([0.01] * 11)


def test_poly() -> None:
    values = factors(schedule="poly", power=0.9, final_factor=0.01)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.01 + 0.99 * 0.5**0.9)
    assert values[100] == pytest.approx(0.01)
    assert factors(schedule="poly", power=1.0)[25] == pytest.approx(0.75)


def test_cosine() -> None:
    values = factors(schedule="cosine", final_factor=0.2)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.6)
    assert values[100] == pytest.approx(0.2)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "constant"])
def test_warm_up_is_linear_and_ends_on_the_schedule(schedule: str) -> None:
    values = factors(schedule=schedule, warmup_steps=10, warmup_factor=0.1)
    assert values[:11] == pytest.approx([0.1 + 0.09 * step for step in range(11)])


def test_schedule_of_an_optimiser_and_back_from_its_state() -> None:
    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        return optimizer, create_schedule(optimizer, total_steps=20, schedule="cosine", warmup_steps=5)

    optimizer, schedule = build()
    seen = []
    for _ in range(20):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(
        [2 * learning_rate_factor(s, total_steps=20, schedule="cosine", warmup_steps=5) for s in range(20)]
    )
    assert math.isclose(max(seen), 2.0)

    optimizer, schedule = build()
    for _ in range(7):
        optimizer.step()
        schedule.step()
    other_optimizer, other = build()
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(schedule.state_dict())
    other_optimizer.step()
    other.step()
    assert other_optimizer.param_groups[0]["lr"] == pytest.approx(seen[8])


def test_warm_up_longer_than_the_run() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="warmup_steps=100 must be fewer than the run's 100 steps"):
        create_schedule(optimizer, total_steps=100, schedule="constant", warmup_steps=100)
