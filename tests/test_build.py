"""What build.py checks beyond the settings; the scripts' tests run the rest of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnest_det import create_backbone
from resnest_det.build import build_detector, build_segmenter, check_batch_size
from resnest_det.config import DetectorSettings, SegmenterSettings


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


@pytest.mark.parametrize(("with_classifier", "warning"), [(True, "its classifier has 5 classes"), (False, "it has no")])
def test_a_models_backbone_needs_no_classifier(with_classifier: bool, warning: str, tmp_path: Path) -> None:
    net = create_backbone("resnet18", num_classes=5)
    state = {key: value for key, value in net.state_dict().items() if with_classifier or not key.startswith("fc.")}
    torch.save(state, tmp_path / "trunk.pth")
    weights = str(tmp_path / "trunk.pth")
    with pytest.warns(UserWarning, match=warning):
        detector = build_detector(DetectorSettings(backbone="resnet18", weights=weights), 3)
    assert torch.equal(detector.backbone.body.conv1.weight, net.conv1.weight)
    with pytest.warns(UserWarning, match=warning):
        segmenter = build_segmenter(SegmenterSettings(backbone="resnet18", weights=weights), 3)
    assert torch.equal(segmenter.backbone.conv1.weight, net.conv1.weight)
