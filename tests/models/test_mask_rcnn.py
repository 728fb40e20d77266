"""Mask R-CNN: what it has beside Faster R-CNN."""

from __future__ import annotations

import pytest
from torch import nn

from resnest_det import create_backbone
from resnest_det.models import mask_rcnn

SMALL = {"fpn_channels": 16, "box_head_channels": 32}


def test_arguments_arrive() -> None:
    model = mask_rcnn(
        create_backbone("resnet18"),
        5,
        rpn_convolutions=3,
        box_head="4conv1fc",
        box_head_norm="gn",
        mask_head_channels=24,
        mask_head_norm="gn",
        anchor_sizes=(8, 16, 32, 64, 128),
        aspect_ratios=(1.0, 2.0),
        rpn_proposals_train=70,
        rpn_proposals_eval=60,
        roi_batch_size=50,
        **SMALL,
    )
    assert len(model.rpn.head.conv) == 3
    assert model.rpn.head.cls_logits.out_channels == 2
    assert model.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))
    assert model.rpn.anchor_generator.aspect_ratios == ((1.0, 2.0),) * 5
    assert model.rpn._pre_nms_top_n == model.rpn._post_nms_top_n == {"training": 70, "testing": 60}
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 50
    assert sum(isinstance(module, nn.GroupNorm) for module in model.roi_heads.box_head.modules()) == 4
    assert sum(isinstance(module, nn.GroupNorm) for module in model.roi_heads.mask_head.modules()) == 4
    assert [head[0].out_channels for head in model.roi_heads.mask_head] == [24] * 4
    assert model.roi_heads.mask_predictor.mask_fcn_logits.weight.shape == (5, 24, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"box_head": "1fc"}, "box_head='1fc' must be '2fc' or '4conv1fc'"),
        ({"box_head_norm": "bn"}, "box_head_norm='bn' needs box_head='4conv1fc'"),
        ({"rpn_convolutions": 0}, "rpn_convolutions=0 must be 1 or more"),
        ({"mask_head_norm": "in"}, "norm 'in' is unknown; choose one of bn"),
        ({"anchor_sizes": (32, 64)}, "anchor_sizes has 2 sizes and the pyramid has 5 levels"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_rcnn(create_backbone("resnet18"), 3, **SMALL, **arguments)
