"""What the detectors share: how many levels a pyramid has, and the arguments that contradict one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resnest_det import create_backbone, fpn_backbone
from resnest_det.layers import SyncBatchNorm
from resnest_det.models import faster_rcnn, regions
from resnest_det.models.regions import num_levels, without_background


class ThreeLevels(nn.Module):
    """A pyramid of another kind."""

    out_channels = 16

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 16, 3, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        level = self.convolution(x)
        return {str(index): level[..., :: 2**index, :: 2**index] for index in range(3)}


@pytest.mark.parametrize(
    ("arguments", "levels"),
    [
        ({}, 5),
        ({"extra_level": "p6p7"}, 6),
        ({"stages": ("layer2", "layer4"), "extra_level": "p6p7_c5"}, 4),
        ({"stages": ("layer3",)}, 2),
    ],
)
def test_levels_of_a_pyramid(arguments: dict[str, object], levels: int) -> None:
    pyramid = fpn_backbone(create_backbone("resnet18"), out_channels=16, **arguments)
    assert num_levels(pyramid) == len(pyramid(torch.rand(1, 3, 64, 64))) == levels


def test_anchors_of_another_number_of_levels() -> None:
    for backbone in (create_backbone("resnet18"), fpn_backbone(create_backbone("resnet18"))):
        with pytest.raises(ValueError, match="anchor_sizes has 2 sizes and the pyramid has 5 levels: give one a level"):
            faster_rcnn(backbone, 3, anchor_sizes=(32, 64))


def test_a_pyramid_of_another_kind() -> None:
    pyramid = ThreeLevels()
    assert num_levels(pyramid) is None
    model = faster_rcnn(pyramid, 3, anchor_sizes=(8, 16, 32), box_head_channels=16, min_size=64, max_size=64)
    assert model.eval()([torch.rand(3, 64, 64)])[0]["boxes"].shape[1] == 4


def test_without_background() -> None:
    outputs = {"cls_logits": [torch.ones(1, 2, 3), torch.ones(1, 1, 3)], "bbox_regression": [torch.ones(1, 2, 4)]}
    without = without_background(outputs)
    assert [logits.tolist() for logits in without["cls_logits"]] == [
        [[[-torch.inf, 1, 1], [-torch.inf, 1, 1]]],
        [[[-torch.inf, 1, 1]]],
    ]
    assert without["bbox_regression"] is outputs["bbox_regression"]
    assert all((logits == 1).all() for logits in outputs["cls_logits"])


@pytest.mark.parametrize("elsewhere", [False, True], ids=["no process has a region", "another process has"])
def test_mask_head_without_regions(elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are taken together with the others where one has a region, and left alone where none has."""
    monkeypatch.setattr(regions, "any_process", lambda *flags, device: tuple(flag or elsewhere for flag in flags))
    head = regions.make_mask_head(8, 4, "sync_bn")
    norms = [module for module in head.modules() if isinstance(module, SyncBatchNorm)]
    together = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, inputs: together.append(module.training))
    features = head(torch.zeros(0, 8, 14, 14))
    assert features.shape == (0, 4, 14, 14)
    features.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in head.parameters())
    assert together == [elsewhere] * 4
    assert all(norm.training for norm in norms)
    head(torch.rand(2, 8, 14, 14))
    assert together[4:] == [True] * 4
