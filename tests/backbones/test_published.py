"""The table of published files against the sources that are installed: torchvision, timm and the released package."""

from __future__ import annotations

import math
import re

import pytest
import timm
import torch
import torchvision
from resnest.torch import ablation as released_fast
from resnest.torch import resnest as released

from resnest_det import create_backbone, list_backbones
from resnest_det.backbones import STAGES
from resnest_det.backbones.published import (
    PUBLISHED,
    Preprocessing,
    PublishedWeights,
    list_weights,
    published_weights,
)
from tests import weights_table

FETCHED = [entry for entry in PUBLISHED if entry.urls]
TORCHVISIONS_HOST = "https://download.pytorch.org/"

# The name in timm of what the table calls (network, name). Recipe A1 is tested at timm's size of testing, the rest at
# its size of training.
TIMM = {
    ("resnet18", "imagenet_a1"): "resnet18.a1_in1k",
    ("resnet34", "imagenet_a1"): "resnet34.a1_in1k",
    ("resnet50", "imagenet_a1"): "resnet50.a1_in1k",
    ("resnet101", "imagenet_a1"): "resnet101.a1_in1k",
    ("resnet152", "imagenet_a1"): "resnet152.a1_in1k",
    ("resnext50_32x4d", "imagenet_a1"): "resnext50_32x4d.a1_in1k",
    ("se_resnet50", "imagenet"): "seresnet50.ra2_in1k",
    ("se_resnet50", "imagenet_a1"): "seresnet50.a1_in1k",
    ("se_resnext50_32x4d", "imagenet"): "seresnext50_32x4d.racm_in1k",
    ("se_resnext50_32x4d", "imagenet_gluon"): "seresnext50_32x4d.gluon_in1k",
    ("se_resnext101_32x4d", "imagenet"): "seresnext101_32x4d.gluon_in1k",
    ("sk_resnet50", "imagenet"): "skresnext50_32x4d.ra_in1k",
    ("resnest14", "imagenet"): "resnest14d.gluon_in1k",
    ("resnest26", "imagenet"): "resnest26d.gluon_in1k",
}
# The published results that no installed package states.
VALUES = {
    # huggingface/pytorch-image-models, its tables of results
    "resnet18/imagenet_a1": 73.158,
    "resnet34/imagenet_a1": 77.918,
    "resnet50/imagenet_a1": 81.214,
    "resnet101/imagenet_a1": 82.322,
    "resnet152/imagenet_a1": 82.732,
    "resnext50_32x4d/imagenet_a1": 81.466,
    "resnest14/imagenet": 75.51,
    "resnest26/imagenet": 78.484,
    "se_resnet50/imagenet": 80.274,
    "se_resnet50/imagenet_a1": 81.102,
    "se_resnext50_32x4d/imagenet": 81.27,
    "se_resnext50_32x4d/imagenet_gluon": 79.91,
    "se_resnext101_32x4d/imagenet": 80.892,
    "sk_resnet50/imagenet": 80.162,
    # zhanghang1989/ResNeSt, README.md; of the fast forms, ablation.md
    "resnest50/imagenet": 81.03,
    "resnest101/imagenet": 82.83,
    "resnest200/imagenet": 83.84,
    "resnest269/imagenet": 84.54,
    "resnest50_fast_1s1x64d/imagenet": 80.33,
    "resnest50_fast_2s1x64d/imagenet": 80.53,
    "resnest50_fast_4s1x64d/imagenet": 80.76,
    "resnest50_fast_1s2x40d/imagenet": 80.59,
    "resnest50_fast_2s2x40d/imagenet": 80.61,
    "resnest50_fast_4s2x40d/imagenet": 81.14,
    "resnest50_fast_1s4x24d/imagenet": 80.99,
    # Jongchan/attention-module, README.md
    "cbam_resnet50/imagenet": 77.622,
    # BangguWu/ECANet, README.md
    "eca_resnet18/imagenet": 70.92,
    "eca_resnet34/imagenet": 74.21,
    "eca_resnet50/imagenet": 77.42,
    "eca_resnet101/imagenet": 78.65,
    "eca_resnet152/imagenet": 78.92,
    # zhanghang1989/ResNeSt, README.md and d2/README.md
    "resnest50/coco_faster_rcnn": 42.33,
    "resnest50/coco_cascade_rcnn": 45.41,
    "resnest50/coco_mask_rcnn": 42.81,
    "resnest50/coco_cascade_mask_rcnn": 46.19,
    "resnest101/coco_faster_rcnn": 44.72,
    "resnest101/coco_cascade_rcnn": 47.50,
    "resnest101/coco_mask_rcnn": 45.75,
    "resnest101/coco_cascade_mask_rcnn": 48.30,
    "resnest200/coco_cascade_rcnn": 49.03,
    # open-mmlab/mmdetection, configs/resnest/metafile.yml
    "resnest50/coco_faster_rcnn_mmdet": 42.0,
    "resnest50/coco_cascade_rcnn_mmdet": 44.5,
    "resnest50/coco_mask_rcnn_mmdet": 42.6,
    "resnest50/coco_cascade_mask_rcnn_mmdet": 45.4,
    "resnest101/coco_faster_rcnn_mmdet": 44.5,
    "resnest101/coco_cascade_rcnn_mmdet": 46.8,
    "resnest101/coco_mask_rcnn_mmdet": 45.2,
    "resnest101/coco_cascade_mask_rcnn_mmdet": 47.7,
    # zhanghang1989/ResNeSt, README.md
    "resnest50/ade20k_deeplabv3": 45.12,
    "resnest101/ade20k_deeplabv3": 46.91,
}
RELEASED_CROPS = {"resnest101": 256, "resnest200": 320, "resnest269": 416}  # the rest at 224


def identify(entry: PublishedWeights) -> str:
    return f"{entry.network}/{entry.name}"


def test_names_are_unique_and_of_known_networks() -> None:
    keys = [(entry.network, entry.name) for entry in PUBLISHED]
    assert len(set(keys)) == len(keys) == 62
    assert {network for network, _ in keys} <= set(list_backbones())
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for _, name in keys)


def test_every_network_of_the_table_has_its_default() -> None:
    # networks whose authors and re-implementers published no file that a ResNet of torchvision's form can take
    without = {
        "se_resnet18", "se_resnet34", "se_resnet101", "se_resnet152", "sk_resnet101", "cbam_resnet18",
        "cbam_resnet34", "cbam_resnet101",
    }  # fmt: skip
    assert {entry.network for entry in PUBLISHED if entry.name == "imagenet"} == set(list_backbones()) - without


@pytest.mark.parametrize("entry", PUBLISHED, ids=identify)
def test_fields_are_sane(entry: PublishedWeights) -> None:
    assert entry.page.startswith("https://")
    assert entry.licence in {"Apache-2.0", "BSD-3-Clause", "MIT"}
    data, metric = {
        "imagenet": ("ImageNet-1k", "top-1"),
        "coco": ("COCO train2017", "box AP"),
        "ade20k": ("ADE20K", "mIoU"),
    }[entry.name.split("_")[0]]
    assert (entry.data, entry.metric) == (data, metric)
    assert (entry.preprocessing is not None) == (metric == "top-1")
    if entry.preprocessing is not None:
        assert 224 <= entry.preprocessing.crop <= entry.preprocessing.resize <= 448


@pytest.mark.parametrize("entry", FETCHED, ids=identify)
def test_addresses_are_of_one_file_that_names_its_hash(entry: PublishedWeights) -> None:
    assert all(re.fullmatch(r"https://[\w./%-]+\.pth", url) for url in entry.urls)
    assert len(set(entry.urls)) == len(entry.urls)
    assert len({url.rsplit("/", 1)[1] for url in entry.urls}) == 1
    assert re.search(r"-([0-9a-f]{8})\.pth$", entry.file_name)[1] == entry.sha256


def test_two_files_do_not_share_a_name() -> None:
    assert len({entry.file_name for entry in PUBLISHED}) == len(PUBLISHED)


def test_files_that_no_program_can_fetch() -> None:
    by_hand = [entry for entry in PUBLISHED if not entry.urls]
    assert {identify(entry): entry.file_name for entry in by_hand} == {
        "cbam_resnet50/imagenet": "RESNET50_CBAM_new_name_wrap.pth",
        "eca_resnet18/imagenet": "eca_resnet18_k3577.pth.tar",
        "eca_resnet34/imagenet": "eca_resnet34_k3357.pth.tar",
        "eca_resnet50/imagenet": "eca_resnet50_k3557.pth.tar",
        "eca_resnet101/imagenet": "eca_resnet101_k3357.pth.tar",
        "eca_resnet152/imagenet": "eca_resnet152_k3357.pth.tar",
        "resnest50/ade20k_deeplabv3": "deeplab_resnest50_ade-2225f09d.pth",  # SHA-1
        "resnest101/ade20k_deeplabv3": "deeplab_resnest101_ade-06ca799c.pth",
    }
    assert all(entry.sha256 == "" for entry in by_hand)


@pytest.mark.parametrize("entry", [e for e in PUBLISHED if e.network.startswith("eca_")], ids=identify)
def test_ecas_files_are_of_the_kernel_sizes_of_our_networks(entry: PublishedWeights) -> None:
    with torch.device("meta"):
        net = create_backbone(entry.network)
    kernels = [net.get_submodule(stage)[0].gate.conv.kernel_size[0] for stage in STAGES]
    assert entry.file_name == f"{entry.network}_k{''.join(map(str, kernels))}.pth.tar"


def test_published_results() -> None:
    of_torchvision = {identify(entry) for entry in FETCHED if entry.urls[0].startswith(TORCHVISIONS_HOST)}
    values = {identify(entry): entry.value for entry in PUBLISHED if identify(entry) not in of_torchvision}
    assert values == VALUES


def test_a_file_has_its_name_on_disk_unquoted() -> None:
    entry = published_weights("resnest101", "coco_faster_rcnn_mmdet")
    assert entry.urls == (  # as configs/resnest/metafile.yml of mmdetection has it
        "https://download.openmmlab.com/mmdetection/v2.0/resnest/"
        "faster_rcnn_s101_fpn_syncbn-backbone%2Bhead_mstrain-range_1x_coco/"
        "faster_rcnn_s101_fpn_syncbn-backbone%2Bhead_mstrain-range_1x_coco_20201006_021058-421517f1.pth",
    )
    assert entry.file_name == (
        "faster_rcnn_s101_fpn_syncbn-backbone+head_mstrain-range_1x_coco_20201006_021058-421517f1.pth"
    )


@pytest.mark.parametrize(("suffix", "version"), [("", "IMAGENET1K_V1"), ("_v2", "IMAGENET1K_V2")])
def test_torchvisions_files_are_those_of_its_enums(suffix: str, version: str) -> None:
    compared = []
    for network in (
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x8d",
    ):
        for weights in torchvision.models.get_model_weights(network):
            if weights.name == version:
                entry = published_weights(network, "imagenet" + suffix)
                test = weights.transforms()
                assert entry.urls == (weights.url,)
                assert entry.value == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
                assert entry.preprocessing == Preprocessing(
                    test.resize_size[0], test.crop_size[0], test.interpolation.value
                )
                compared.append(entry)
    hosted = [entry for entry in FETCHED if entry.urls[0].startswith(TORCHVISIONS_HOST)]
    assert compared == [entry for entry in hosted if entry.name == "imagenet" + suffix]
    assert compared


def test_resnests_files_are_those_of_the_released_package() -> None:
    hashes = {**released._model_sha256, **released_fast._model_sha256}
    addresses = {**released.resnest_model_urls, **released_fast.resnest_model_urls}
    assert len(hashes) == 11
    for network, sha256 in hashes.items():
        entry = published_weights(network)
        assert entry.sha256 == sha256
        assert addresses[network] in entry.urls
        crop = RELEASED_CROPS.get(network, 224)
        assert entry.preprocessing == Preprocessing(crop + 32, crop, "bicubic")


@pytest.mark.parametrize("key", TIMM, ids="/".join)
def test_timms_files_and_evaluations_are_those_of_its_configurations(key: tuple[str, str]) -> None:
    entry = published_weights(*key)
    theirs = timm.models.get_pretrained_cfg(TIMM[key])
    if theirs.url:  # timm's newer versions fetch some files from elsewhere, in another format
        assert theirs.url in entry.urls
    assert entry.licence.lower() == theirs.license
    size, share = theirs.input_size[1], theirs.crop_pct
    if key[1] == "imagenet_a1":
        size, share = theirs.test_input_size[1], theirs.test_crop_pct
    assert entry.preprocessing == Preprocessing(math.floor(size / share), size, theirs.interpolation)


def test_every_file_of_timm_is_compared() -> None:
    of_timm = [entry for entry in FETCHED if "rwightman" in entry.urls[0] or "huggingface" in entry.urls[0]]
    assert {(entry.network, entry.name) for entry in of_timm} == set(TIMM)


def test_lists_one_network_or_all() -> None:
    assert list_weights() == list(PUBLISHED)
    assert [entry.name for entry in list_weights("resnet50")] == ["imagenet", "imagenet_v2", "imagenet_a1"]
    assert list_weights("resnet5") == []


def test_the_default_is_imagenet() -> None:
    entry = published_weights("se_resnet50")
    assert entry.name == "imagenet"
    assert entry.file_name == "seresnet50_ra_224-8efdb4bb.pth"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            "resnest5",
            r"no weights are published for the network 'resnest5'; .* nearest name is 'resnest50'\): resnet18, ",
        ),
        ("sk_resnet101", r"for the network 'sk_resnet101'; use weights=None or a file's path, .*'sk_resnet50'"),
        ("", r"for the network ''"),
    ],
)
def test_a_network_without_files_is_refused(network: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        published_weights(network)


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    message = "resnet50 has no published weights called 'imagenet_v1'; did you mean 'imagenet_v2'?"
    with pytest.raises(ValueError, match=re.escape(f"{message} There are: imagenet, imagenet_v2, imagenet_a1")):
        published_weights("resnet50", "imagenet_v1")


def test_the_table_in_the_docs_is_current() -> None:
    text = weights_table.PAGE.read_text()
    assert weights_table.renewed(text) == text, "run python -m tests.weights_table"


def test_the_table_in_the_docs_tells_what_an_entry_says() -> None:
    rows = weights_table.weights_table().splitlines()
    assert len(rows) == 2 + len(PUBLISHED)
    assert (
        "| `resnest200/imagenet` | ImageNet-1k | top-1 83.84 | 320 of 352, bicubic | `75117900` | Apache-2.0 | "
        "[zhanghang1989/ResNeSt](https://github.com/zhanghang1989/ResNeSt), 4 addresses |"
    ) in rows
    assert (
        "| `resnest50/ade20k_deeplabv3` | ADE20K | mIoU 45.12 |  |  | MIT | "
        "[hangzhang.org](https://hangzhang.org/PyTorch-Encoding/model_zoo/segmentation.html), "
        "by hand: `deeplab_resnest50_ade-2225f09d.pth` |"
    ) in rows
