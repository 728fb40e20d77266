"""What build.py checks beyond the settings; the scripts' tests run the rest of it."""

from __future__ import annotations

import pytest

from resnest_det import create_backbone
from resnest_det.build import check_batch_size


@pytest.mark.parametrize("name", ["resnest14", "sk_resnet50"])
def test_one_image_a_step_needs_another_norm(name: str) -> None:
    with pytest.raises(ValueError, match="attention normalises .* gives 1: use data.batch_size=2 or more, or"):
        check_batch_size(create_backbone(name), 1)
    check_batch_size(create_backbone(name), 2)
    for norm in ("frozen_bn", "gn"):
        check_batch_size(create_backbone(name, norm=norm), 1)


@pytest.mark.parametrize("name", ["resnet18", "se_resnet18", "cbam_resnet18", "eca_resnet18"])
def test_one_image_a_step_is_enough_without_a_pooled_norm(name: str) -> None:
    check_batch_size(create_backbone(name), 1)
