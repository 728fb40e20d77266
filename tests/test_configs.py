"""The shipped configurations of detection: each builds, states its number, and differs from the others as it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnest_det.build import build_detection_inference, build_detector, build_optimizer
from resnest_det.config import DetectionSettings, ineffective_settings, load_settings
from tests.tiny_configs import REPOSITORY

CONFIGS = REPOSITORY / "configs" / "det"

# COCO val2017, box AP and mask AP in percent, published with ResNeSt for detectron2: the ResNets are the control.
PUBLISHED = {
    "faster_rcnn_resnet50_1x": ["39.25"],
    "faster_rcnn_resnet101_1x": ["41.37"],
    "faster_rcnn_resnest50_1x": ["42.33"],
    "faster_rcnn_resnest101_1x": ["44.72"],
    "cascade_rcnn_resnet50_1x": ["42.52"],
    "cascade_rcnn_resnet101_1x": ["44.03"],
    "cascade_rcnn_resnest50_1x": ["45.41"],
    "cascade_rcnn_resnest101_1x": ["47.50"],
    "cascade_rcnn_resnest200_1x": ["49.03"],
    "mask_rcnn_resnet50_1x": ["39.97", "36.05"],
    "mask_rcnn_resnet101_1x": ["41.78", "37.51"],
    "mask_rcnn_resnest50_1x": ["42.81", "38.14"],
    "mask_rcnn_resnest101_1x": ["45.75", "40.65"],
    "cascade_mask_rcnn_resnet50_1x": ["43.06", "37.19"],
    "cascade_mask_rcnn_resnet101_1x": ["44.79", "38.52"],
    "cascade_mask_rcnn_resnest50_1x": ["46.19", "39.55"],
    "cascade_mask_rcnn_resnest101_1x": ["48.30", "41.56"],
    "cascade_mask_rcnn_resnest200_3x": ["50.54", "44.21"],
}
OTHERS = ["sample", "sample_mask_rcnn", "sample_cascade_rcnn", "bccd", "retinanet_resnet50", "fcos_resnet50"]


def load(name: str) -> DetectionSettings:
    root = [] if name.startswith("sample") else ["data.root=x"]
    return load_settings(DetectionSettings, CONFIGS / f"{name}.toml", ["run.device=cpu", *root])


def header(path: Path) -> str:
    return path.read_text().partition("\n\n")[0]


def differences(name: str, other: str) -> set[str]:
    """The settings in which two configurations differ, as section.setting."""
    one, two = load(name).model_dump(), load(other).model_dump()
    return {f"{section}.{key}" for section, keys in one.items() for key in keys if keys[key] != two[section][key]}


def test_number_of_configurations() -> None:
    assert (len(PUBLISHED), len(OTHERS)) == (18, 6)
    assert {path.stem for path in CONFIGS.glob("*.toml")} == {*PUBLISHED, *OTHERS}
    assert [path.name for path in (CONFIGS / "presets").iterdir()] == ["resnest_tricks.toml"]


@pytest.mark.parametrize("name", [*PUBLISHED, *OTHERS])
def test_every_configuration_builds(name: str) -> None:
    settings = load(name)
    assert ineffective_settings(settings) == []
    with torch.device("meta"):
        model = build_detector(settings.model, 4, load_weights=False)
    build_optimizer(settings.optim, model, batches_per_epoch=100, batch_size=2)
    assert build_detection_inference(settings.eval, detections_per_image=100) is None
    stated = header(CONFIGS / f"{name}.toml")
    assert all(word in stated for word in ("# Command:", "# Data:", "# Duration:", "# Expected:"))
    assert f"configs/det/{name}.toml" in stated or name == "sample"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_results_differ_in_detector_and_backbone_alone(name: str) -> None:
    settings = load(name)
    detector, backbone, schedule = name.rsplit("_", 2)
    assert (settings.model.detector, settings.model.backbone) == (detector, backbone)
    expected = f"# Expected: box AP {' and mask AP '.join(PUBLISHED[name])} on val2017, published"
    assert expected in header(CONFIGS / f"{name}.toml")
    may_differ = {"run.dir", "model.detector", "model.backbone"}
    if len(PUBLISHED[name]) == 2:
        assert settings.model.mask_head_norm == "sync_bn"
        may_differ |= {"model.mask_head_norm"}
    if schedule == "3x":
        may_differ |= {"data.short_sides", "data.max_side", "optim.milestones", "optim.epochs"}
    assert differences(name, "faster_rcnn_resnet50_1x") <= may_differ


@pytest.mark.parametrize(
    ("name", "num_steps", "milestones"),
    [
        ("faster_rcnn_resnest50_1x", 90_000, [60_000, 80_000]),
        ("cascade_mask_rcnn_resnest200_3x", 270_000, [240_000, 255_000]),
    ],
)
def test_the_preset_is_the_published_recipe(name: str, num_steps: int, milestones: list[int]) -> None:
    settings = load(name)
    data, model, optim = settings.data, settings.model, settings.optim
    assert (model.norm, model.fpn_norm, model.box_head_norm, model.box_head) == (*["sync_bn"] * 3, "4conv1fc")
    assert (model.trainable_stages, settings.eval.precise_bn) == (3, 200)  # of five: the stem and layer1 are frozen
    assert (data.batch_size, optim.lr, min(data.short_sides)) == (16, 0.02, 640)
    num_images = 117_266  # of train2017, with boxes
    assert optim.epochs * num_images / data.batch_size == pytest.approx(num_steps, rel=0.03)
    assert [fraction * num_steps for fraction in optim.milestones] == pytest.approx(milestones, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "average_precision", "thresholds"),
    [("retinanet_resnet50", "36.4", (0.05, 0.5, 300)), ("fcos_resnet50", "39.2", (0.2, 0.6, 100))],
)
def test_one_stage_detectors_have_torchvisions_recipe(
    name: str, average_precision: str, thresholds: tuple[float, float, int]
) -> None:
    model, optim = load(name).model, load(name).optim
    assert f"# Expected: box AP {average_precision} on val2017" in header(CONFIGS / f"{name}.toml")
    assert (model.score_threshold, model.nms_threshold, model.detections_per_image) == thresholds
    assert [optim.epochs * fraction for fraction in optim.milestones] == pytest.approx([16, 22], abs=0.01)


@pytest.mark.parametrize("name", ["sample_mask_rcnn", "sample_cascade_rcnn"])
def test_samples_have_the_budget_of_the_sample(name: str) -> None:
    assert differences(name, "sample") <= {"run.dir", "model.detector", "model.mask_head_channels"}
