"""DeepLabV3+: on every network of the table, beside other implementations, and the edge cases of a batch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.deeplabv3 import decoder as smp
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import FCN, DeepLabV3
from torchvision.models.segmentation import deeplabv3 as torchvision_deeplabv3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FrozenBatchNorm2d

from resnest_det import create_backbone, list_backbones
from resnest_det.layers import plain_layers
from resnest_det.models import DeepLabV3Plus, SegmentationLoss, deeplabv3plus
from resnest_det.models.deeplabv3plus import ASPP
from tests.random_norms import randomise_norms

# One of each form; the rest of the table differs from these in its number of blocks.
FORMS = ["resnet18", "resnet50", "resnext50_32x4d", "resnest14", "resnest50_fast_1s4x24d", "resnest50_fast_4s2x40d"]
SMALL = {"head_channels": 16, "low_level_channels": 8}


def small_model(backbone: str = "resnet18", output_stride: int = 16, **arguments: object) -> DeepLabV3Plus:
    torch.manual_seed(0)
    net = create_backbone(backbone, output_stride=output_stride)
    return deeplabv3plus(net, **{"num_classes": 5, **SMALL, **arguments})


def random_masks(*shape: int, num_classes: int = 5) -> Tensor:
    """Masks of every class, with some ignored pixels."""
    masks = torch.randint(0, num_classes, shape, dtype=torch.uint8)
    return masks.masked_fill(torch.rand(shape) < 0.1, 255)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(
    "name", [name if name in FORMS else pytest.param(name, marks=pytest.mark.slow) for name in list_backbones()]
)
def test_every_backbone_at_any_size(name: str, output_stride: int) -> None:
    model = small_model(name, output_stride, aux_head=True)
    losses = model([torch.rand(3, 33, 47)] * 2, list(random_masks(2, 33, 47)))
    assert list(losses) == ["loss_seg", "loss_aux"]
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    head = [(key, p) for key, p in model.named_parameters() if not key.startswith("backbone")]
    assert [key for key, p in head if not p.grad.any()] == []
    model.eval()
    with torch.inference_mode():
        for size in ((33, 47), (1, 1), (1, 70)):
            outputs = model(torch.rand(1, 3, *size))
            assert list(outputs) == ["out"]
            assert outputs["out"].shape == (1, 5, *size)
            assert torch.isfinite(outputs["out"]).all()


def branch_norm_as_bias(norm: nn.BatchNorm2d, bias: Tensor) -> None:
    """Make a norm add `bias` and change nothing else."""
    norm.running_var.fill_(1 - norm.eps)
    norm.bias.data.copy_(bias)


@pytest.mark.parametrize("theirs", ["torchvision", "segmentation-models-pytorch"])
def test_plain_aspp_is_that_of_others(theirs: str) -> None:
    torch.manual_seed(0)
    ours = ASPP(12, 8, (6, 12, 18), separable=False, dropout=0.1, norm_layer=nn.BatchNorm2d)
    randomise_norms(ours).eval()
    nn.init.normal_(ours.pooling[0].bias)
    if theirs == "torchvision":
        other = torchvision_deeplabv3.ASPP(12, [6, 12, 18], 8)
    else:
        other = smp.ASPP(12, 8, (6, 12, 18), separable=False, dropout=0.1)
    for branch, released in zip(ours.branches, other.convs[:4], strict=True):
        released.load_state_dict(branch.state_dict())
    other.convs[4][1].weight.data.copy_(ours.pooling[0].weight)
    branch_norm_as_bias(other.convs[4][2], ours.pooling[0].bias)
    other.project.load_state_dict(ours.project.state_dict())
    x = torch.randn(2, 12, 21, 30)
    torch.testing.assert_close(ours(x), other.eval()(x), rtol=1e-5, atol=1e-5)


def test_separable_branch_is_that_of_segmentation_models() -> None:
    torch.manual_seed(0)
    ours = ASPP(12, 8, (6, 12), separable=True, dropout=0.1, norm_layer=nn.BatchNorm2d)
    (depthwise, inner_norm, _), (pointwise, norm, _) = randomise_norms(ours).branches[2]
    # Theirs has neither norm nor ReLU between the two: without negative values the ReLU changes nothing.
    branch_norm_as_bias(inner_norm, torch.zeros(12))
    inner_norm.weight.data.fill_(1)
    inner_norm.running_mean.zero_()
    depthwise.weight.data.abs_()
    other = smp.ASPPSeparableConv(12, 8, 12)
    other[0][0].load_state_dict(depthwise.state_dict())
    other[0][1].load_state_dict(pointwise.state_dict())
    other[1].load_state_dict(norm.state_dict())
    x = torch.rand(2, 12, 21, 30)
    torch.testing.assert_close(ours.eval().branches[2](x), other.eval()(x), rtol=1e-5, atol=1e-5)


def plain_forward(model: DeepLabV3Plus, images: Tensor, rates: tuple[int, ...], separable: bool) -> Tensor:
    """The paper's figure in functions, from the state dict; the backbone is tested elsewhere."""
    state = model.state_dict()

    def conv_norm_relu(x: Tensor, key: str, **arguments: int) -> Tensor:
        x = F.conv2d(x, state[f"{key}.0.weight"], **arguments)
        norm = [state[f"{key}.1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *norm).relu()

    def conv3x3(x: Tensor, key: str, rate: int) -> Tensor:
        if not separable:
            return conv_norm_relu(x, key, padding=rate, dilation=rate)
        x = conv_norm_relu(x, f"{key}.0", padding=rate, dilation=rate, groups=x.shape[1])
        return conv_norm_relu(x, f"{key}.1")

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    features = model.backbone((images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    x = features["layer4"]
    size = x.shape[2:]
    pooled = F.conv2d(F.adaptive_avg_pool2d(x, 1), state["aspp.pooling.0.weight"], state["aspp.pooling.0.bias"]).relu()
    branches = [conv_norm_relu(x, "aspp.branches.0")]
    branches += [conv3x3(x, f"aspp.branches.{i}", rate) for i, rate in enumerate(rates, 1)]
    branches += [pooled.repeat(1, 1, *size)]
    x = conv_norm_relu(torch.cat(branches, 1), "aspp.project")
    low_level = conv_norm_relu(features["layer1"], "low_level")
    x = torch.cat([F.interpolate(x, low_level.shape[2:], mode="bilinear"), low_level], 1)
    x = conv3x3(conv3x3(x, "decoder.0", 1), "decoder.1", 1)
    x = F.conv2d(x, state["classifier.weight"], state["classifier.bias"])
    return F.interpolate(x, images.shape[2:], mode="bilinear")


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize(
    ("output_stride", "given", "rates"),
    [(16, None, (6, 12, 18)), (8, None, (12, 24, 36)), (8, (2, 3), (2, 3)), (32, (1, 2, 4, 6), (1, 2, 4, 6))],
)
def test_is_the_papers_figure(
    output_stride: int, given: tuple[int, ...] | None, rates: tuple[int, ...], separable: bool
) -> None:
    model = small_model("resnest14", output_stride, aspp_rates=given, separable=separable)
    randomise_norms(model).eval()
    nn.init.normal_(model.classifier.weight)
    images = torch.rand(2, 3, 161, 130)
    with torch.inference_mode():
        ours, plain = model(images)["out"], plain_forward(model, images, rates, separable)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_aux_head_is_torchvisions() -> None:
    model = small_model(aux_head=True)
    theirs = FCNHead(256, 5)
    theirs.load_state_dict(model.aux_head.state_dict())
    x = torch.randn(2, 256, 6, 7)
    assert torch.equal(model.eval().aux_head(x), theirs.eval()(x))


def test_outputs_and_losses_of_training() -> None:
    criterion = {"class_weights": [1.0, 2.0, 3.0, 4.0, 5.0], "ohem_threshold": 0.3, "ohem_min_kept": 50}
    model = small_model(aux_head=True, aux_weight=0.3, dice_weight=0.5, norm="gn", dropout=0.0, **criterion)
    images, masks = torch.rand(2, 3, 40, 50), random_masks(2, 40, 50)
    outputs, losses = model(images), model(images, masks)
    assert list(outputs) == ["out", "aux"]
    assert {output.shape for output in outputs.values()} == {(2, 5, 40, 50)}
    expected, aux = (SegmentationLoss(dice_weight=0.5, **criterion)(outputs[key], masks) for key in ("out", "aux"))
    torch.testing.assert_close(
        losses,
        {
            "loss_seg": expected["seg"],
            "loss_dice": expected["dice"],
            "loss_aux": 0.3 * (aux["seg"] + aux["dice"]),
        },
    )


def test_ignored_value_and_all_ignored() -> None:
    model = small_model(aux_head=True, ignore_index=77, dice_weight=1.0)
    losses = model(torch.rand(2, 3, 32, 32), torch.full((2, 32, 32), 77, dtype=torch.uint8))
    sum(losses.values()).backward()
    assert [loss.item() for loss in losses.values()] == [0, 0, 0]
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("output_stride", [8, 16])
def test_one_image_trains_with_batch_norm(output_stride: int) -> None:
    model = small_model("resnet18", output_stride, aux_head=True)
    losses = model(torch.rand(1, 3, 33, 47), random_masks(1, 33, 47))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_normalises_its_input() -> None:
    plain = small_model(image_mean=(0, 0, 0), image_std=(1, 1, 1)).eval()
    model = small_model(image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7)).eval()
    assert [key for key in model.state_dict() if "image" in key] == []
    plain.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, 32, 32)
    normalised = (images - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    torch.testing.assert_close(model(images)["out"], plain(normalised)["out"])


def test_a_list_is_a_batch() -> None:
    model = small_model().eval()
    images = torch.rand(2, 3, 32, 40)
    assert torch.equal(model(list(images))["out"], model(images)["out"])


@pytest.mark.parametrize("name", ["resnet18", "resnest14"])
def test_channels_last(name: str) -> None:
    model = randomise_norms(small_model(name)).eval()
    images = torch.rand(2, 3, 48, 64)
    expected = model(images)["out"]
    layouts = []
    for part in (model.low_level, model.aspp.project, model.decoder, model.classifier):
        part.register_forward_pre_hook(
            lambda module, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(list(images))["out"], expected, rtol=1e-5, atol=1e-5)
    assert layouts == [True] * 4  # nowhere on the way did the features turn back


def test_parts_of_another_length() -> None:
    model = deeplabv3plus(create_backbone("resnet18", output_stride=16), 3).eval()
    conv, norm, relu = model.low_level
    model.low_level = nn.Sequential(conv, norm, relu, nn.Dropout(), nn.Sequential()).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        longer = model(x)["out"]
        model.low_level = nn.Sequential(conv, norm, relu)
        torch.testing.assert_close(longer, model(x)["out"], rtol=1e-5, atol=1e-5)
        model.low_level = nn.Sequential(conv, norm)
        assert model(x)["out"].shape == longer.shape


def test_logits_without_gradients_are_those_with() -> None:
    torch.manual_seed(0)
    model = deeplabv3plus(create_backbone("resnest14", output_stride=16), 7).eval()
    images = torch.rand(2, 3, 75, 100)
    with plain_layers():
        expected = model(images)["out"]
        with torch.no_grad():
            assert torch.equal(model(images)["out"], expected)
    with torch.no_grad():
        out = model(images)["out"]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_autocast() -> None:
    model = small_model(aux_head=True, dropout=0.0, norm="gn")
    images, masks = torch.rand(2, 3, 48, 64), random_masks(2, 48, 64)
    exact = model(images, masks)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, losses = model(images), model(images, masks)
    assert {output.dtype for output in outputs.values()} == {torch.float32}
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.01)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_exports() -> None:
    model = small_model("resnest14").eval()
    images = torch.rand(1, 3, 65, 50)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))


def test_initialisation() -> None:
    model = small_model("resnet50", head_channels=256, num_classes=150, aux_head=True)
    depthwise, pointwise = (layer[0] for layer in model.aspp.branches[1])
    stds = {  # He: sqrt(2 / (outputs of a channel))
        depthwise: math.sqrt(2 / 9),
        pointwise: math.sqrt(2 / 256),
        model.aspp.pooling[0]: math.sqrt(2 / 256),
        model.aux_head[0]: math.sqrt(2 / (256 * 9)),
        model.aux_head[-1]: 0.01,
        model.classifier: 0.01,
    }
    for layer, std in stds.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
    assert not any(layer.bias.any() for layer in (model.aspp.pooling[0], model.classifier, model.aux_head[-1]))


def test_names_of_the_parts() -> None:
    children = [name for name, _ in small_model(aux_head=True).named_children()]
    assert children == ["backbone", "aspp", "low_level", "decoder", "classifier", "aux_head", "criterion"]


def test_arguments_arrive() -> None:
    model = small_model("resnet18", norm="gn", dropout=0.25, aux_head=True, separable=False)
    head = [part for name, part in model.named_children() if name != "backbone"]
    assert {module.p for part in head for module in part.modules() if isinstance(module, nn.Dropout)} == {0.25}
    assert not any(isinstance(module, nn.BatchNorm2d) for part in head for module in part.modules())
    assert model.low_level[0].weight.shape == (8, 64, 1, 1)
    assert model.decoder[0][0].weight.shape == (16, 24, 3, 3)


def test_frozen_stages_stay_as_they_are() -> None:
    net = create_backbone("resnet18", output_stride=16)
    net.weights_loaded = True
    model = deeplabv3plus(net, 5, trainable_stages=2, **SMALL)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    losses = model(torch.rand(2, 3, 32, 32), random_masks(2, 32, 32))
    sum(losses.values()).backward()
    assert isinstance(model.backbone["bn1"], FrozenBatchNorm2d)
    assert {key.split(".")[0] for key, p in model.backbone.named_parameters() if p.grad is not None} == {
        "layer3",
        "layer4",
    }
    changed = {key.split(".")[0] for key, value in model.backbone.state_dict().items() if (value != before[key]).any()}
    assert changed == {"layer3", "layer4"}  # their running statistics


@pytest.mark.parametrize("name", ["resnet18", "resnest14"])
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("model_type", [DeepLabV3, FCN])
def test_torchvisions_models_take_our_backbones(name: str, output_stride: int, model_type: type[nn.Module]) -> None:
    net = create_backbone(name, output_stride=output_stride)
    backbone = IntermediateLayerGetter(net, {"layer4": "out", "layer3": "aux"})
    head = (DeepLabHead if model_type is DeepLabV3 else FCNHead)(net.layer4.channels, 5)
    model = model_type(backbone, head, FCNHead(net.layer3.channels, 5))
    outputs = model(torch.rand(2, 3, 33, 47))
    assert {key: output.shape for key, output in outputs.items()} == dict.fromkeys(("out", "aux"), (2, 5, 33, 47))
    sum(output.square().mean() for output in outputs.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 must be 2 or more: list what is no object as a class of its own"),
        ({"head_channels": 0}, "head_channels=0 and low_level_channels=8 must both be 1 or more"),
        ({"low_level_channels": -1}, "head_channels=16 and low_level_channels=-1 must both be 1 or more"),
        ({"aspp_rates": ()}, r"aspp_rates=\(\) must be dilations, one or several, each 1 or more"),
        ({"aspp_rates": (6, 0)}, r"aspp_rates=\(6, 0\) must be dilations"),
        ({"norm": "ln"}, "norm 'ln' is unknown; choose one of bn"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"aux_weight": -1}, "aux_weight=-1 must be 0 or more"),
        ({"trainable_stages": 6}, "trainable_stages=6 must be between 0"),
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 weights and there are 5 classes"),
        ({"num_classes": 300}, r"ignore_index=255 is the number of a class \(0 to 299\)"),
        ({"ohem_threshold": 2.0}, "ohem_threshold=2.0 is a probability"),
        ({"output_stride": 32}, r"stride 32, for which .* create_backbone\(..., output_stride=16\) or 8"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**arguments)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            [torch.rand(3, 32, 32), torch.rand(3, 32, 48)],
            r"different sizes, \(3, 32, 32\), \(3, 32, 48\): train on crops of one size, and evaluate with "
            r"evaluate\(..., predict=SegmentationInference\(\)\)",
        ),
        ([], r"images have the shape \(0,\): they must be \(N, 3, H, W\), or a list of \(3, H, W\)"),
        (torch.rand(3, 32, 32), r"images have the shape \(3, 32, 32\): they must be"),
        (torch.rand(1, 1, 32, 32), r"images have the shape \(1, 1, 32, 32\): they must be"),
        (torch.rand(2, 4, 32, 32), r"images have the shape \(2, 4, 32, 32\): they must be"),
        (torch.rand(1, 3, 0, 32), r"images have the shape \(1, 3, 0, 32\): they must be .* not empty"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"images are torch.uint8: .* images.float\(\) / 255"),
    ],
    ids=["sizes", "none", "one", "grey", "RGBA", "empty", "uint8"],
)
def test_bad_images(images: Tensor | list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model().eval()(images)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(1, 32, 40), "there are 1 masks for 2 images: give one an image"),
        (torch.zeros(2, 40, 32), r"mask 0 has the shape \(40, 32\) and its image is \(32, 40\)"),
        ([torch.zeros(32, 40), torch.zeros(16, 20)], r"mask 1 has the shape \(16, 20\) and its image is \(32, 40\)"),
        (torch.zeros(2, 3, 32, 40), r"mask 0 has the shape \(3, 32, 40\) and its image is \(32, 40\): a mask is"),
        (torch.zeros(2, 32, 40), "masks are torch.float32: they must be uint8 or int64"),
        (torch.full((2, 32, 40), 5), "a mask has the value 5, and the model has 5 classes"),
    ],
    ids=["number", "turned", "size", "RGB", "float", "beyond the classes"],
)
def test_bad_masks(masks: Tensor | list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model()(torch.rand(2, 3, 32, 40), masks)


def test_masks_in_evaluation() -> None:
    with pytest.raises(ValueError, match=r"masks are for training, .* leave them out, or model.train\(\)"):
        small_model().eval()(torch.rand(2, 3, 32, 40), random_masks(2, 32, 40))


def test_misspelt_argument() -> None:
    with pytest.raises(TypeError, match="num_clases"):
        small_model(num_clases=5)
