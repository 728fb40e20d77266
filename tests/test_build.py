"""What build.py checks beyond the settings; the scripts' tests run the rest of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from resnest_det import build, create_backbone
from resnest_det.build import (
    build_coco_metric,
    build_coco_set,
    build_detection_inference,
    build_detector,
    build_segmenter,
    check_batch_size,
)
from resnest_det.config import (
    CocoDataSettings,
    DetectionEvalSettings,
    DetectionSettings,
    DetectorSettings,
    SampleSettings,
    SegmenterSettings,
    ineffective_settings,
)
from resnest_det.evaluation import DetectionInference
from resnest_det.layers import SqueezeExcitation

DETECTORS = get_args(DetectorSettings.model_fields["detector"].annotation)
OTHER_VALUES: dict[str, Any] = {  # of every setting that build_detector reads but the detector: not its default
    "backbone": "resnet34",
    "weights": "imagenet",
    "norm": "gn",
    "hard_sigmoid": True,
    "drop_path": 0.1,
    "checkpoint_activations": True,
    "trainable_stages": 2,
    "fpn_channels": 64,
    "fpn_norm": "gn",
    "pyramid_top": "c5",
    "rpn_convolutions": 2,
    "box_head": "4conv1fc",
    "box_head_channels": 32,
    "box_head_norm": "gn",
    "mask_head_channels": 64,
    "mask_head_norm": "gn",
    "head_norm": "gn",
    "box_loss": "giou",
    "center_sampling_radius": 2.5,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "aspect_ratios": (1.0,),
    "min_size": 640,
    "max_size": 1000,
    "rpn_proposals_train": 30,
    "rpn_proposals_eval": 20,
    "roi_batch_size": 10,
    "candidates_per_level": 50,
    "score_threshold": 0.1,
    "nms_threshold": 0.7,
    "detections_per_image": 5,
}
ARGUMENTS = {"backbone": "name", "checkpoint_activations": "checkpoint"}  # of the builders, where named otherwise
EVALUATION = DetectionEvalSettings(
    short_sides=(64, 96),
    max_side=128,
    flip=True,
    merge="wbf",
    merge_threshold=0.6,
    tile=256,
    tile_overlap=0.3,
    whole_image=True,
    tile_match="iou",
    tile_match_threshold=0.4,
)


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CocoDataSettings:
    monkeypatch.setattr(build, "default_cache_folder", lambda: tmp_path)
    return CocoDataSettings(sample=SampleSettings(num_train=2, num_val=2), short_sides=(64,), max_side=96)


# --- detectors


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_setting_reaches_its_detector_or_is_named_as_ineffective(
    detector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, Any] = {}  # what the builders were called with, by the argument's name

    def recording(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def build_nothing(*arguments: object, **keywords: object) -> nn.Module:
            received.update(inspect.signature(builder).bind(*arguments, **keywords).arguments)
            return nn.Identity()

        return build_nothing

    for name in ("create_backbone", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet", "fcos"):
        monkeypatch.setattr(build, name, recording(getattr(build, name)))

    def changes(**settings: Any) -> dict[str, Any]:
        before = dict(received)
        build_detector(DetectorSettings(detector=detector, **settings), 4)  # type: ignore[arg-type]
        assert received.keys() == (before or received).keys()
        return {
            key: value
            for key, value in received.items()
            if not isinstance(value, nn.Module) and value != before.get(key, ...)
        }

    assert OTHER_VALUES.keys() == DetectorSettings.model_fields.keys() - {"detector", "init"}  # which the script loads
    for name, value in OTHER_VALUES.items():
        changes()
        model = DetectorSettings(detector=detector, **{name: value})  # type: ignore[arg-type]
        sentences = ineffective_settings(DetectionSettings(data=CocoDataSettings(root="x"), model=model))
        if changed := changes(**{name: value}):
            assert changed == {ARGUMENTS.get(name, name): value}
            assert sentences == []
        else:
            (sentence,) = sentences
            assert sentence.startswith(f"model.{name} has no effect with model.")


@pytest.mark.parametrize("detector", DETECTORS)
def test_detectors_are_those_named(detector: str) -> None:
    settings = DetectorSettings(detector=detector, backbone="resnet18", fpn_channels=32)
    with torch.device("meta"):
        model = build_detector(settings, 4)
    kinds = {
        "faster_rcnn": "FasterRCNN",
        "mask_rcnn": "MaskRCNN",
        "cascade_rcnn": "CascadeRCNN",
        "cascade_mask_rcnn": "CascadeRCNN",
        "retinanet": "RetinaNet",
        "fcos": "FCOS",
    }
    assert type(model).__name__ == kinds[detector]
    assert any("mask" in name for name in model.state_dict()) == settings.has_masks == ("mask" in detector)


# --- masks and the metric


def test_masks_are_pixels_to_train_on_and_run_lengths_to_measure_with(sample: CocoDataSettings) -> None:
    for split in ("train", "val"):
        assert "masks" not in build_coco_set(sample, split)[0][1]
    _, trained = build_coco_set(sample, "train", masks=True)[0]
    assert trained["masks"].dtype == torch.uint8
    image, measured = build_coco_set(sample, "val", masks=True)[0]
    assert [mask["size"] for mask in measured["masks"]] == [list(image.shape[1:])] * len(measured["boxes"])


def test_metric_of_a_data_set(sample: CocoDataSettings) -> None:
    dataset = build_coco_set(sample, "val", masks=True)
    _, target = dataset[0]
    found = {key: target[key] for key in ("boxes", "labels", "masks")} | {"scores": torch.ones(len(target["boxes"]))}
    settings = DetectionEvalSettings(max_detections=(2, 50), area_ranges=(1.0, 2.0))
    metric, of_boxes = build_coco_metric(settings, dataset, masks=True), build_coco_metric(settings, dataset)
    for each in (metric, of_boxes):
        each.update([found], [target])
    results = metric.compute()
    assert {"AR2", "AR50", "mask_AP"} <= results.keys()
    assert (results["APs"], results["APm"], results["APl"]) == (-1.0, -1.0, 1.0)  # every object is a large one
    assert "mask_AP" not in of_boxes.compute()
    assert "pycocotools" in metric.table()


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_hard_sigmoid_is_of_the_networks_with_squeeze_and_excitation(task: str) -> None:
    def build_one(backbone: str) -> nn.Module:
        if task == "detection":
            return build_detector(DetectorSettings(backbone=backbone, hard_sigmoid=True, fpn_channels=32), 3)
        return build_segmenter(SegmenterSettings(backbone=backbone, hard_sigmoid=True, head_channels=32), 3)

    gates = [module.gate for module in build_one("se_resnet18").modules() if isinstance(module, SqueezeExcitation)]
    assert gates == ["hard_sigmoid"] * 8
    with pytest.raises(ValueError, match="hard_sigmoid=True is .*, and resnest14 has none"):
        build_one("resnest14")


# --- inference


def test_inference_is_none_where_nothing_is_asked_for() -> None:
    assert build_detection_inference(DetectionEvalSettings(), detections_per_image=100) is None


def test_inference_has_every_setting() -> None:
    inference = build_detection_inference(EVALUATION, detections_per_image=7)
    assert inference is not None
    names = inspect.signature(DetectionInference).parameters.keys() - {"detections_per_image"}
    assert names == DetectionEvalSettings.model_fields.keys() - {
        "every", "precise_bn", "backend", "max_detections", "area_ranges"
    }  # fmt: skip
    for name in names:
        assert getattr(inference, name) == getattr(EVALUATION, name) != getattr(DetectionEvalSettings(), name)
    assert inference.detections_per_image == 0  # every tile has so many
    whole = build_detection_inference(EVALUATION.model_copy(update={"tile": 0}), detections_per_image=7)
    assert whole is not None
    assert whole.detections_per_image == 7


@pytest.mark.parametrize("changes", [{"short_sides": ()}, {"short_sides": (64,), "flip": False}, {"tile": 0}])
def test_inference_without_what_has_no_effect(changes: dict[str, Any]) -> None:
    settings = EVALUATION.model_copy(update=changes)
    experiment = DetectionSettings(data=CocoDataSettings(root="x"), eval=settings)
    sentences = ineffective_settings(experiment)
    assert sentences
    for sentence in sentences:  # each has the default's effect
        name = sentence.partition(" ")[0].removeprefix("eval.")
        settings = settings.model_copy(update={name: getattr(DetectionEvalSettings(), name)})
    assert ineffective_settings(experiment.model_copy(update={"eval": settings})) == []
    assert build_detection_inference(EVALUATION.model_copy(update=changes), detections_per_image=7) is not None


# --- what is checked of backbones


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
