"""Faster R-CNN: torchvision's as of its COCO weights, both heads, and its arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from resnest_det import create_backbone, load_weights
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


def test_is_torchvisions_with_the_norms_of_its_coco_weights(tmp_path: Path) -> None:
    """Frozen, and with an eps of 0; from a file. The other forms are in test_detectors.py."""
    torch.manual_seed(0)
    body = _resnet_fpn_extractor(torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d), 5)
    theirs = random_detector_weights(FasterRCNN(body, 91, min_size=128, max_size=192)).eval()
    torch.save(theirs.state_dict(), tmp_path / "fasterrcnn_resnet50_fpn.pth")
    overwrite_eps(theirs, 0.0)  # what torchvision's builder does with its COCO_V1 weights
    ours = faster_rcnn(create_backbone("resnet50", norm="frozen_bn"), 91, min_size=128, max_size=192).eval()
    load_weights(ours, tmp_path / "fasterrcnn_resnet50_fpn.pth")
    for module in ours.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    images = [torch.rand(3, 96, 128), torch.rand(3, 120, 100)]
    with torch.inference_mode():
        found, expected = ours(images), theirs(images)
    assert all(len(prediction["boxes"]) > 10 for prediction in found)
    for own, released in zip(found, expected, strict=True):
        for key in released:
            torch.testing.assert_close(own[key], released[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("box_head", "norm"), [("2fc", None), ("4conv1fc", None), ("4conv1fc", "bn")])
def test_trains_and_predicts(box_head: str, norm: str | None) -> None:
    torch.manual_seed(0)
    model = faster_rcnn(create_backbone("resnest14"), 4, box_head=box_head, box_head_norm=norm, fpn_norm=norm, **SMALL)
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


def test_arguments_arrive() -> None:
    model = faster_rcnn(
        create_backbone("resnet18"),
        5,
        rpn_convolutions=2,
        anchor_sizes=(8, 16, 32, 64, 128),
        aspect_ratios=(1.0, 2.0),
        rpn_proposals_train=70,
        rpn_proposals_eval=60,
        roi_batch_size=50,
        box_head_channels=32,
    )
    assert len(model.rpn.head.conv) == 2
    assert model.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))
    assert model.rpn.anchor_generator.aspect_ratios == ((1.0, 2.0),) * 5
    assert model.rpn._pre_nms_top_n == model.rpn._post_nms_top_n == {"training": 70, "testing": 60}
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"box_head": "1fc"}, "box_head='1fc' must be '2fc' or '4conv1fc'"),
        ({"box_head_norm": "bn"}, "box_head_norm='bn' needs box_head='4conv1fc'"),
        ({"anchor_sizes": (32, 64)}, "anchor_sizes has 2 sizes and the pyramid has 5 levels"),
        ({"rpn_convolutions": 0}, "rpn_convolutions=0 must be 1 or more"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        faster_rcnn(create_backbone("resnet18"), 3, **SMALL, **arguments)
