"""Every detector on every kind of backbone, beside torchvision's of the same weights, and the edge cases of a batch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

import resnest_det
from resnest_det import create_backbone, fpn_backbone
from resnest_det.layers import plain_layers
from resnest_det.models import cascade_rcnn, faster_rcnn, fcos, mask_rcnn, retinanet

PAGE = Path(__file__).parents[2] / "docs" / "detectors.md"
NUM_CLASSES = 4

ONE_STAGE = {"min_size": 64, "max_size": 96, "fpn_channels": 64, "score_threshold": 0.0, "detections_per_image": 10}
TWO_STAGES = {
    **ONE_STAGE,
    "box_head_channels": 32,
    "rpn_proposals_train": 50,
    "rpn_proposals_eval": 20,
    "roi_batch_size": 16,
}
DETECTORS = {
    "faster_rcnn": partial(faster_rcnn, **TWO_STAGES),
    "mask_rcnn": partial(mask_rcnn, **TWO_STAGES, mask_head_channels=16),
    "cascade_rcnn": partial(cascade_rcnn, **TWO_STAGES),
    "cascade_mask_rcnn": partial(cascade_rcnn, **TWO_STAGES, masks=True, mask_head_channels=16),
    "retinanet": partial(retinanet, **ONE_STAGE),
    "fcos": partial(fcos, **ONE_STAGE),
}
BACKBONES = {
    "resnest50": partial(create_backbone, "resnest50"),
    "resnet50": partial(create_backbone, "resnet50"),
    "se_resnet50": partial(create_backbone, "se_resnet50"),
    "mobilenet_v3_large": torchvision.models.mobilenet_v3_large,
}
# Of these, the heads run on other backbones by default, and the backbones under other heads.
SLOW = set(product(("mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"), ("resnet50", "se_resnet50")))
every_detector = pytest.mark.parametrize("detector", DETECTORS)


@pytest.fixture(autouse=True)
def _same_weights_each_time() -> None:
    torch.manual_seed(0)


def small_detector(detector: str, backbone: nn.Module | None = None, **arguments: object) -> nn.Module:
    return DETECTORS[detector](backbone or create_backbone("resnet18"), NUM_CLASSES, **arguments)


def head_norms(detector: str, norm: str) -> dict[str, str]:
    """Arguments for the norm in every part but the backbone. FCOS always has GroupNorm in its head."""
    norms = {"fpn_norm": norm}
    if "rcnn" in detector:
        norms |= {"box_head": "4conv1fc", "box_head_norm": norm}
    if "mask" in detector:
        norms |= {"mask_head_norm": norm}
    if detector == "retinanet":
        norms |= {"head_norm": norm}
    return norms


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 64, 64, generator=generator), torch.rand(3, 50, 70, generator=generator)]


def target(image: Tensor, *objects: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Objects of label 2 by their boxes, which their masks fill."""
    masks = torch.zeros(len(objects), *image.shape[1:], dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, objects, strict=True):
        mask[top:bottom, left:right] = 1
    boxes = torch.tensor(objects, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.full((len(objects),), 2), "masks": masks}


def train_step(model: nn.Module, batch: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The losses of a step after which every trainable parameter has a gradient."""
    model.train().zero_grad()
    losses = model(batch, targets)
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    sum(losses.values()).backward()
    trainable = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert [key for key, parameter in trainable.items() if parameter.grad is None] == []
    assert [key for key, parameter in trainable.items() if not torch.isfinite(parameter.grad).all()] == []
    return losses


def check_predictions(predictions: Sequence[Mapping[str, Tensor]], with_masks: bool) -> None:
    for image, prediction in zip(images(), predictions, strict=True):
        num_found = len(prediction["scores"])
        assert 0 < num_found <= 10
        assert prediction["boxes"].shape == (num_found, 4)
        height, width = image.shape[1:]
        assert (prediction["boxes"] >= 0).all()
        assert (prediction["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert ((prediction["labels"] >= 1) & (prediction["labels"] < NUM_CLASSES)).all()
        assert torch.equal(prediction["scores"], prediction["scores"].sort(descending=True).values)
        assert ("masks" in prediction) == with_masks
        if with_masks:
            assert prediction["masks"].shape == (num_found, 1, height, width)
            assert ((prediction["masks"] >= 0) & (prediction["masks"] <= 1)).all()


@pytest.mark.parametrize(
    ("detector", "backbone"),
    [
        pytest.param(detector, backbone, marks=[pytest.mark.slow] if (detector, backbone) in SLOW else [])
        for detector in DETECTORS
        for backbone in BACKBONES
    ],
)
def test_trains_and_predicts(detector: str, backbone: str) -> None:
    model = small_detector(detector, BACKBONES[backbone]())
    first, second = images()
    losses = train_step(model, [first, second], [target(first, (8, 8, 40, 40), (30, 20, 60, 62)), target(second)])
    assert all(loss > 0 for key, loss in losses.items() if not key.endswith(("_2", "_3")))  # to which no box need get
    with torch.inference_mode():
        check_predictions(model.eval()([first, second]), with_masks="mask" in detector)
    losses = train_step(model, [first, second], [target(first), target(second)])
    assert {key for key, loss in losses.items() if loss == 0} == {
        key for key in losses if "box" in key or "mask" in key
    }


@every_detector
def test_frozen_stages(detector: str) -> None:
    net = create_backbone("resnet18")
    net.load_state_dict(net.state_dict())  # no longer random, so that freezing it is no mistake
    model = small_detector(detector, net, trainable_stages=2)
    body = {key: value.clone() for key, value in model.backbone.body.state_dict().items()}
    first, second = images()
    train_step(model, [first, second], [target(first, (8, 8, 40, 40)), target(second)])
    trainable = {key.split(".")[0] for key, p in model.backbone.body.named_parameters() if p.requires_grad}
    assert trainable == {"layer3", "layer4"}
    assert {key.split(".")[0] for key, p in model.backbone.body.named_parameters() if p.grad is not None} == trainable
    changed = {key for key, value in model.backbone.body.state_dict().items() if not torch.equal(value, body[key])}
    assert {key.split(".")[0] for key in changed} == trainable  # the statistics of their norms


@every_detector
def test_group_norm_trains_on_one_image(detector: str) -> None:
    model = small_detector(detector, create_backbone("resnet18", norm="gn"), **head_norms(detector, "gn"))
    expected = {  # 20 in the backbone, 2 a level of the pyramid, 4 a head
        "faster_rcnn": 20 + 8 + 4,
        "mask_rcnn": 20 + 8 + 4 + 4,
        "cascade_rcnn": 20 + 8 + 3 * 4,
        "cascade_mask_rcnn": 20 + 8 + 3 * 4 + 4,
        "retinanet": 20 + 6 + 2 * 4,
        "fcos": 20 + 6 + 2 * 4,
    }
    assert sum(isinstance(module, nn.GroupNorm) for module in model.modules()) == expected[detector]
    image = images()[0]
    train_step(model, [image], [target(image, (8, 8, 40, 40))])
    train_step(model, [image], [target(image)])


@every_detector
def test_batch_norm_in_every_head_without_objects(detector: str) -> None:
    """A mask head then has an empty batch, of which there are no statistics: those that it has must stay."""
    model = small_detector(detector, **head_norms(detector, "bn"))
    train_step(model, images(), [target(image) for image in images()])
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    if "mask" in detector:
        statistics = [module for module in model.roi_heads.mask_head.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(statistics) == 4
        assert all(torch.equal(norm.running_var, torch.ones(16)) for norm in statistics)


@every_detector
def test_finds_nothing(detector: str) -> None:
    model = small_detector(detector, score_threshold=1.0).eval()
    for image, prediction in zip(images(), model(images()), strict=True):
        assert prediction["boxes"].shape == (0, 4)
        assert prediction["labels"].shape == prediction["scores"].shape == (0,)
        assert ("masks" in prediction) == ("mask" in detector)
        if "mask" in detector:
            assert prediction["masks"].shape == (0, 1, *image.shape[1:])


@every_detector
def test_boxes_keep_their_precision_where_the_rest_has_16_bits(detector: str) -> None:
    """bfloat16 knows every fourth number between 512 and 1024; the image is as large as the model resizes it to."""
    model = small_detector(detector, min_size=640, max_size=704).eval()
    anchors: list[Tensor] = []
    owner = model.rpn if hasattr(model, "rpn") else model
    owner.anchor_generator.register_forward_hook(lambda _module, _inputs, outputs: anchors.append(outputs[0]))
    image = torch.rand(3, 640, 704)
    with torch.inference_mode():
        model([image])
        with torch.autocast("cpu", torch.bfloat16):
            found = model([image])[0]
    boxes = found["boxes"]
    assert torch.equal(*anchors)
    assert {found[name].dtype for name in ("boxes", "scores", "masks") if name in found} == {torch.float32}
    assert not torch.equal(boxes, boxes.bfloat16().float())


@every_detector
def test_takes_a_pyramid_made_already(detector: str) -> None:
    levels = {} if "rcnn" in detector else {"stages": ("layer2", "layer3", "layer4"), "extra_level": "p6p7"}
    pyramid = fpn_backbone(create_backbone("resnet18"), out_channels=64, **levels)
    model = DETECTORS[detector](pyramid, NUM_CLASSES, fpn_channels=256)
    assert model.backbone is pyramid
    with torch.inference_mode():
        check_predictions(model.eval()(images()), with_masks="mask" in detector)
    with pytest.raises(ValueError, match=r"for a backbone without a pyramid; this one has out_channels=64"):
        DETECTORS[detector](pyramid, NUM_CLASSES, fpn_channels=32)
    with pytest.raises(ValueError, match=r"for a backbone without a pyramid; this one has out_channels=64"):
        DETECTORS[detector](pyramid, NUM_CLASSES, fpn_channels=256, trainable_stages=3)


@every_detector
def test_resizes_in_evaluation_and_only_if_asked_in_training(detector: str) -> None:
    sizes: list[tuple[int, ...]] = []
    image = torch.rand(3, 32, 32)
    for resize in (True, False):
        model = small_detector(detector, resize_in_training=resize)
        model.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))
        model([image, image], [target(image, (8, 8, 20, 20)), target(image)])
        model.eval()([image])
    assert sizes == [(64, 64), (64, 64), (32, 32), (64, 64)]


@every_detector
def test_common_arguments_arrive(detector: str) -> None:
    model = DETECTORS[detector](
        create_backbone("resnet18"),
        NUM_CLASSES,
        score_threshold=0.2,
        nms_threshold=0.4,
        detections_per_image=30,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
        min_size=(96, 128),
        max_size=256,
    )
    last = model.roi_heads if "rcnn" in detector else model
    assert (last.score_thresh, last.nms_thresh, last.detections_per_img) == (0.2, 0.4, 30)
    assert (model.transform.min_size, model.transform.max_size) == ((96, 128), 256)
    assert (model.transform.image_mean, model.transform.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


@every_detector
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 must be 2 or more: the classes and the background"),
        ({"trainable_stages": 7}, "trainable_stages=7 must be between 0"),
        ({"fpn_norm": "in"}, "norm 'in' is unknown; choose one of bn"),
    ],
)
def test_bad_arguments(detector: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DETECTORS[detector](create_backbone("resnet18"), **{"num_classes": NUM_CLASSES, **arguments})


@every_detector
def test_misspelt_argument(detector: str) -> None:
    with pytest.raises(TypeError, match="num_clases"):
        DETECTORS[detector](create_backbone("resnet18"), num_clases=3)


# --- beside torchvision

TORCHVISION = dict(re.findall(r"^\| `(\w+_resnet50_\w+)` .*?\| `(.+?)` \|", PAGE.read_text(), re.MULTILINE))


def test_the_page_has_every_builder_of_torchvisions() -> None:
    """But Keypoint R-CNN, which is built on fpn_backbone there, with torchvision's own class."""
    builders = {name for name in torchvision.models.list_models(detection) if "_resnet50_" in name}
    assert TORCHVISION.keys() == builders - {"keypointrcnn_resnet50_fpn"}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Our detector as the page has it, and torchvision's, with the same weights, which find many boxes."""
    theirs = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=91, min_size=64, max_size=96)
    ours = eval(TORCHVISION[name], {**vars(resnest_det), **vars(resnest_det.models)})
    ours.transform = theirs.transform
    if any(isinstance(module, FrozenBatchNorm2d) for module in ours.modules()):
        freeze_norms(theirs)  # as torchvision's builder has them with weights
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert few_regions(ours) == few_regions(theirs)
    return ours, theirs


def few_regions(model: nn.Module) -> list[object]:
    """Reduce a detector of two stages to few regions, to be quick. Returns how many there were."""
    if not isinstance(model, detection.FasterRCNN):
        return []
    proposals, heads = model.rpn, model.roi_heads
    before = [proposals._pre_nms_top_n, proposals._post_nms_top_n]
    before += [heads.fg_bg_sampler.batch_size_per_image, heads.detections_per_img]
    proposals._pre_nms_top_n = proposals._post_nms_top_n = {"training": 30, "testing": 15}
    heads.fg_bg_sampler.batch_size_per_image = heads.detections_per_img = 20
    return before


def freeze_norms(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(path, FrozenBatchNorm2d(module.num_features))


def randomise(model: nn.Module) -> None:
    """Weights under which an untrained detector finds many boxes, none of them of label 0."""
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif key.endswith("bn3.weight"):
            value.fill_(0.1)
        elif key.endswith(("cls_score.weight", "_head.cls_logits.weight", "_head.bbox_reg.weight")):
            value.copy_(torch.randn(value.shape, generator=generator))
        elif key.endswith("_head.cls_logits.bias"):
            value.fill_(-3.0).view(-1, 91)[:, 0] = -1000.0


@pytest.mark.parametrize("name", TORCHVISION)
def test_is_torchvisions(name: str) -> None:
    ours, theirs = pair(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    batch = [torch.rand(3, 64, 80), torch.rand(3, 90, 70)]
    targets = [target(batch[0], (5, 5, 40, 50), (30, 20, 70, 60)), target(batch[1], (10, 30, 60, 80))]
    losses = []
    with plain_layers():  # rounding decides the order of nearly equal scores
        with torch.inference_mode():
            found = [model.eval()(batch) for model in (ours, theirs)]
        for model in (ours, theirs):
            torch.manual_seed(1)  # training samples anchors and regions at random
            losses.append(model.train()(batch, targets))
    assert all(len(prediction["boxes"]) > 10 and len(prediction["labels"].unique()) > 1 for prediction in found[0])
    for own, released in zip([*found[0], losses[0]], [*found[1], losses[1]], strict=True):
        assert own.keys() == released.keys()
        for key in released:
            torch.testing.assert_close(own[key], released[key], rtol=1e-5, atol=1e-5)


# --- in several processes


@pytest.mark.slow
def test_several_processes_with_and_without_objects(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(distributed_steps, args=(tmp_path / "store",), nprocs=2)


def distributed_steps(rank: int, store: Path) -> None:
    """Steps in which one of two processes has an object, or none, with statistics taken together in every part."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    first, second = images()
    for detector in DETECTORS:
        torch.manual_seed(0)
        model = small_detector(detector, create_backbone("resnet18", norm="sync_bn"), **head_norms(detector, "sync_bn"))
        parallel = nn.parallel.DistributedDataParallel(model)
        for process_with_object in (0, None, 1):
            objects = [(8, 8, 40, 40)] if rank == process_with_object else []
            train_step(parallel, [first, second], [target(first, *objects), target(second)])
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    torch.distributed.destroy_process_group()
