"""FCOS: its pyramid, its arguments, and the background that it never finds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import detection

from resnest_det import create_backbone, fpn_backbone
from resnest_det.models import fcos

SMALL = {"min_size": 64, "max_size": 96, "fpn_channels": 64}
LEVELS = {"stages": ("layer2", "layer3", "layer4"), "extra_level": "p6p7"}


@pytest.mark.parametrize(("pyramid_top", "channels"), [("p5", 64), ("c5", 512)])
def test_arguments_arrive(pyramid_top: str, channels: int) -> None:
    model = fcos(
        create_backbone("resnet18"),
        3,
        pyramid_top=pyramid_top,
        center_sampling_radius=2.5,
        candidates_per_level=70,
        **SMALL,
    )
    assert model.backbone.fpn.extra_blocks.p6.in_channels == channels
    assert (model.center_sampling_radius, model.topk_candidates) == (2.5, 70)
    assert model.head.classification_head.cls_logits.weight.shape == (3, 64, 3, 3)


def test_never_finds_the_background() -> None:
    """What is left is what torchvision's finds without its detections of label 0."""
    torch.manual_seed(0)
    pyramid = fpn_backbone(create_backbone("resnet18"), out_channels=64, **LEVELS)
    ours = fcos(pyramid, 3, min_size=64, max_size=96, detections_per_image=10**6, candidates_per_level=10**6).eval()
    nn.init.normal_(ours.head.classification_head.cls_logits.weight)
    with torch.no_grad():
        ours.head.classification_head.cls_logits.bias.copy_(torch.tensor([9.0, -1.0, -1.0]))
    theirs = detection.FCOS(pyramid, 3, 64, 96, head=ours.head, detections_per_img=10**6, topk_candidates=10**6).eval()
    assert isinstance(ours, detection.FCOS)
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
        ({"pyramid_top": "p4"}, "pyramid_top='p4' must be 'p5' or 'c5'"),
        ({"fpn_channels": 48}, "fpn_channels=48 must be a multiple of 32: the head normalises them in as many groups"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fcos(create_backbone("resnet18"), 3, **{**SMALL, **arguments})


@pytest.mark.parametrize(
    ("pyramid", "arguments", "message"),
    [
        ({"out_channels": 64, "extra_level": "p6p7"}, {}, "the pyramid has 6 levels and FCOS needs 5, of the"),
        ({"out_channels": 48, **LEVELS}, {}, "fpn_channels=48 must be a multiple of 32"),
        ({"out_channels": 64, **LEVELS}, {"pyramid_top": "c5"}, "pyramid_top='c5' is for a backbone without a pyramid"),
    ],
)
def test_a_pyramid_that_does_not_fit(pyramid: dict[str, object], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fcos(fpn_backbone(create_backbone("resnet18"), **pyramid), 3, **arguments)
