from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from resnest_det.layers import group_norm, norm_layer


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bn", nn.BatchNorm2d), ("frozen_bn", FrozenBatchNorm2d), ("sync_bn", nn.SyncBatchNorm), ("gn", nn.GroupNorm)],
)
def test_each_name_builds_its_layer(name: str, kind: type[nn.Module]) -> None:
    layer = norm_layer(name)(64)
    assert type(layer) is kind
    assert layer.eval()(torch.randn(1, 64, 4, 4)).shape == (1, 64, 4, 4)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (40, 8), (30, 2), (7, 1)])
def test_group_norm_takes_any_width(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def test_unknown_norm() -> None:
    with pytest.raises(ValueError, match="norm 'batch' is unknown; choose one of bn, frozen_bn, sync_bn, gn"):
        norm_layer("batch")
