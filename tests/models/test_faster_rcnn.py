"""Faster R-CNN: torchvision's with the same weights, both heads, and the edge cases of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from resnest_det import create_backbone, fpn_backbone, load_weights
from resnest_det.models import faster_rcnn

SMALL = {"min_size": 64, "max_size": 96, "fpn_channels": 32, "box_head_channels": 32, "roi_batch_size": 32}


def random_detector_weights(model: nn.Module) -> nn.Module:
    """Weights under which an untrained detector finds many boxes of several classes."""
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif key.endswith("bn3.weight"):
            value.fill_(0.1)
        elif key.endswith("cls_score.weight"):
            value.copy_(torch.randn(value.shape, generator=generator))
    return model


@pytest.mark.parametrize("eps", [1e-5, 0.0], ids=["fresh", "as with COCO_V1"])
@pytest.mark.parametrize("training", [False, True])
def test_is_torchvisions_with_resnet50(training: bool, eps: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = _resnet_fpn_extractor(torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d), 5)
    theirs = random_detector_weights(FasterRCNN(body, 91, min_size=128, max_size=192)).train(training)
    torch.save(theirs.state_dict(), tmp_path / "fasterrcnn_resnet50_fpn.pth")
    ours = faster_rcnn(create_backbone("resnet50", norm="frozen_bn"), 91, min_size=128, max_size=192).train(training)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    load_weights(ours, tmp_path / "fasterrcnn_resnet50_fpn.pth")
    overwrite_eps(theirs, eps)  # what torchvision's builder does with its COCO_V1 weights
    for module in ours.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = eps
    images = [torch.rand(3, 96, 128), torch.rand(3, 120, 100)]
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 80]]), "labels": torch.tensor([17])}] * 2
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(1)  # training samples anchors and regions at random
        outputs.append(model(images, targets) if training else model(images))
    if training:
        assert sorted(outputs[0]) == ["loss_box_reg", "loss_classifier", "loss_objectness", "loss_rpn_box_reg"]
        outputs = [[losses] for losses in outputs]
    else:
        assert all(len(prediction["boxes"]) > 10 for prediction in outputs[0])
    for own, released in zip(*outputs, strict=True):
        for key in released:
            torch.testing.assert_close(own[key], released[key], rtol=1e-5, atol=1e-5)


def test_keys_are_those_of_torchvisions_builder() -> None:
    with torch.device("meta"):
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)  # with live BatchNorm
        ours = faster_rcnn(create_backbone("resnet50", norm="bn"), 91)
        frozen = faster_rcnn(create_backbone("resnet50", norm="frozen_bn"), 91)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    without_counters = {key: shape for key, shape in shapes.items() if not key.endswith("num_batches_tracked")}
    assert {key: value.shape for key, value in frozen.state_dict().items()} == without_counters


@pytest.mark.parametrize("name", ["resnest14", "resnet18"])
@pytest.mark.parametrize(("box_head", "norm"), [("2fc", None), ("4conv1fc", None), ("4conv1fc", "bn")])
def test_trains_and_predicts(name: str, box_head: str, norm: str | None) -> None:
    torch.manual_seed(0)
    model = faster_rcnn(create_backbone(name), 4, box_head=box_head, box_head_norm=norm, fpn_norm=norm, **SMALL)
    targets = [
        {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    images = [torch.rand(3, 64, 64), torch.rand(3, 50, 70)]
    losses = model(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    predictions = model.eval()(images)
    for image, prediction in zip(images, predictions, strict=True):
        assert prediction["boxes"].shape == (len(prediction["scores"]), 4)
        assert (prediction["boxes"] >= 0).all()
        assert (prediction["boxes"][:, 2] <= image.shape[2]).all()
        assert ((prediction["labels"] >= 1) & (prediction["labels"] <= 3)).all()


def test_resizes_in_evaluation_and_only_if_asked_in_training() -> None:
    sizes: list[torch.Size] = []
    for resize in (True, False):
        model = faster_rcnn(create_backbone("resnet18"), 2, resize_in_training=resize, **SMALL)
        model.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[2:]))
        target = {"boxes": torch.tensor([[8.0, 8, 20, 20]]), "labels": torch.tensor([1])}
        model([torch.rand(3, 32, 32)] * 2, [target] * 2)
        model.eval()([torch.rand(3, 32, 32)])
    assert [tuple(size) for size in sizes] == [(64, 64), (64, 64), (32, 32), (64, 64)]


def test_arguments_arrive() -> None:
    model = faster_rcnn(
        create_backbone("resnet18"),
        5,
        anchor_sizes=(8, 16, 32, 64, 128),
        aspect_ratios=(1.0, 2.0),
        rpn_proposals_train=70,
        rpn_proposals_eval=60,
        roi_batch_size=50,
        score_threshold=0.2,
        nms_threshold=0.4,
        detections_per_image=30,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
        min_size=(96, 128),
        max_size=256,
    )
    assert model.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))
    assert model.rpn.anchor_generator.aspect_ratios == ((1.0, 2.0),) * 5
    assert model.rpn._pre_nms_top_n == model.rpn._post_nms_top_n == {"training": 70, "testing": 60}
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 50
    assert (model.roi_heads.score_thresh, model.roi_heads.nms_thresh) == (0.2, 0.4)
    assert model.roi_heads.detections_per_img == 30
    assert (model.transform.min_size, model.transform.max_size) == ((96, 128), 256)
    assert (model.transform.image_mean, model.transform.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_takes_a_pyramid_made_already() -> None:
    fpn = fpn_backbone(create_backbone("resnet18"), out_channels=32)
    assert faster_rcnn(fpn, 3).backbone is fpn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 must be 2 or more: the classes and the background"),
        ({"box_head": "1fc"}, "box_head='1fc' must be '2fc' or '4conv1fc'"),
        ({"box_head_norm": "bn"}, "box_head_norm='bn' needs box_head='4conv1fc'"),
        ({"anchor_sizes": (32, 64)}, "anchor_sizes has 2 sizes and the pyramid has 5 levels"),
        ({"trainable_stages": 7}, "trainable_stages=7 must be between 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        faster_rcnn(create_backbone("resnet18"), **{"num_classes": 3, **arguments})


def test_fpn_arguments_contradict_a_pyramid_made_already() -> None:
    with pytest.raises(ValueError, match="fpn_channels and fpn_norm are for a backbone without a pyramid"):
        faster_rcnn(fpn_backbone(create_backbone("resnet18")), 3, fpn_channels=64)


def test_misspelt_argument() -> None:
    with pytest.raises(TypeError, match="num_clases"):
        faster_rcnn(create_backbone("resnet18"), num_clases=3)
