"""RetinaNet: its anchors, the top of its pyramid, its losses, and the background that it never finds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import detection

from resnest_det import create_backbone, fpn_backbone
from resnest_det.models import retinanet

SMALL = {"min_size": 64, "max_size": 96, "fpn_channels": 16}
LEVELS = {"stages": ("layer2", "layer3", "layer4"), "extra_level": "p6p7"}


def test_anchors_of_three_scales_a_level() -> None:
    model = retinanet(create_backbone("resnet18"), 3, **SMALL)
    assert model.anchor_generator.sizes == detection.retinanet._default_anchorgen().sizes
    assert model.anchor_generator.aspect_ratios == ((0.5, 1.0, 2.0),) * 5
    sizes = (8, 16, 32, 64, 128)
    model = retinanet(create_backbone("resnet18"), 3, anchor_sizes=sizes, aspect_ratios=(1.0, 3.0), **SMALL)
    assert model.anchor_generator.sizes == (
        (8, 10, 12), (16, 20, 25), (32, 40, 50), (64, 80, 101), (128, 161, 203),
    )  # fmt: skip
    assert model.anchor_generator.aspect_ratios == ((1.0, 3.0),) * 5
    assert model.head.classification_head.cls_logits.out_channels == 3 * 2 * 3
    assert model.head.regression_head.bbox_reg.out_channels == 3 * 2 * 4


@pytest.mark.parametrize(("pyramid_top", "channels"), [("p5", 16), ("c5", 512)])
def test_top_of_the_pyramid(pyramid_top: str, channels: int) -> None:
    model = retinanet(create_backbone("resnet18"), 3, pyramid_top=pyramid_top, **SMALL)
    assert model.backbone.fpn.extra_blocks.p6.in_channels == channels
    levels = model.backbone(torch.rand(1, 3, 256, 256))
    assert {key: level.shape[2] for key, level in levels.items()} == {"0": 32, "1": 16, "2": 8, "p6": 4, "p7": 2}


def test_other_arguments_arrive() -> None:
    model = retinanet(create_backbone("resnet18"), 3, head_norm="gn", box_loss="giou", candidates_per_level=70, **SMALL)
    assert sum(isinstance(module, nn.GroupNorm) for module in model.head.modules()) == 8
    assert model.topk_candidates == 70
    assert model.head.regression_head._loss_type == "giou"
    assert retinanet(create_backbone("resnet18"), 3, **SMALL).head.regression_head._loss_type == "l1"


def test_never_finds_the_background() -> None:
    """What is left is what torchvision's finds without its detections of label 0."""
    torch.manual_seed(0)
    pyramid = fpn_backbone(create_backbone("resnet18"), out_channels=16, **LEVELS)
    ours = retinanet(pyramid, 3, min_size=64, max_size=96, detections_per_image=10**6, candidates_per_level=10**6)
    ours.eval()
    nn.init.normal_(ours.head.classification_head.cls_logits.weight)
    with torch.no_grad():
        ours.head.classification_head.cls_logits.bias.view(-1, 3).copy_(torch.tensor([9.0, -2.0, -1.0]))
    theirs = detection.RetinaNet(
        pyramid, 3, 64, 96, head=ours.head, detections_per_img=10**6, topk_candidates=10**6
    ).eval()
    assert isinstance(ours, detection.RetinaNet)
    image = torch.rand(3, 64, 64)
    found, with_background = ours([image])[0], theirs([image])[0]
    objects = with_background["labels"] > 0
    assert len(found["labels"].unique()) == 2
    assert 0 < objects.sum() < len(objects)
    for key, value in with_background.items():
        torch.testing.assert_close(found[key], value[objects], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"box_loss": "l2"}, "box_loss='l2' must be 'l1' or 'giou'"),
        ({"pyramid_top": "p4"}, "pyramid_top='p4' must be 'p5' or 'c5'"),
        ({"head_norm": "in"}, "norm 'in' is unknown; choose one of bn"),
        ({"anchor_sizes": (32, 64)}, "anchor_sizes has 2 sizes and the pyramid has 5 levels"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retinanet(create_backbone("resnet18"), 3, **SMALL, **arguments)


def test_a_pyramid_made_already_has_its_top() -> None:
    pyramid = fpn_backbone(create_backbone("resnet18"), out_channels=16, **LEVELS)
    with pytest.raises(ValueError, match="pyramid_top='c5' is for a backbone without a pyramid; this one has out_chan"):
        retinanet(pyramid, 3, pyramid_top="c5")
