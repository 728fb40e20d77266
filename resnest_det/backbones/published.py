"""The table of published weights: which file is for which network, where it is, and what it scores.

Every line is from the publisher's own page or code; nothing here has been measured by this project. What has no
address here cannot be fetched by a program: it is downloaded in a browser from its page, and then found under its
file name or loaded by its path.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote


@dataclass(frozen=True)
class Preprocessing:
    """How a classifier's published accuracy was measured: the image's short side is resized, the centre is cropped.

    Pixels are then scaled to [0, 1] and normalised with ImageNet's mean and standard deviation, for every file of
    the table.
    """

    resize: int  # the short side, in pixels
    crop: int  # the side of the centre square, in pixels
    interpolation: Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class PublishedWeights:
    """A published file and what is known of it."""

    network: str  # a name of list_backbones()
    name: str  # "imagenet" is the network's default
    urls: tuple[str, ...]  # addresses of the same file, in the order they are tried; () where no program can fetch it
    sha256: str  # how the file's SHA-256 begins, in hex digits; "" only where urls is ()
    page: str  # where it is published, for people
    licence: str  # SPDX identifier
    data: str  # what the file was trained on
    metric: str  # "top-1", "box AP" or "mIoU", on the data set's validation images
    value: float  # percent, as published
    preprocessing: Preprocessing | None  # of its evaluation as a classifier; None for detectors and segmentation models
    file_name: str  # its name on disk; "" where none is known


def list_weights(network: str = "") -> list[PublishedWeights]:
    """The published weights that load_weights finds by name.

    Args:
        network: a name of list_backbones(); "" lists those of all networks.

    Returns:
        The entries of the table in its order; none where nothing is published for `network`.
    """
    return [entry for entry in PUBLISHED if network in ("", entry.network)]


def published_weights(network: str, name: str = "imagenet") -> PublishedWeights:
    """The published weights of a network by their name.

    Args:
        network: a name of list_backbones().
        name: the file's name in the table; "imagenet" is the network's default.

    Raises:
        ValueError: nothing is published for `network`, or nothing under this name.
    """
    names = {entry.name: entry for entry in PUBLISHED if entry.network == network}
    if name in names:
        return names[name]
    if not names:
        networks = list(dict.fromkeys(entry.network for entry in PUBLISHED))
        raise ValueError(
            f"no weights are published for the network {network!r}; use weights=None or a file's path, or one of the "
            f"networks that have some (the nearest name is {_nearest(network, networks)!r}): {', '.join(networks)}"
        )
    raise ValueError(
        f"{network} has no published weights called {name!r}; did you mean {_nearest(name, names)!r}? "
        f"There are: {', '.join(names)}"
    )


def _nearest(name: str, choices: Iterable[str]) -> str:
    return difflib.get_close_matches(name, choices, n=1, cutoff=0)[0]


def _file_name(url: str) -> str:
    return unquote(url.rsplit("/", 1)[1])


def _sha256(url: str) -> str:
    """What a file's name says of its SHA-256: torch.hub's convention, {name}-{first digits}.pth."""
    return _file_name(url).removesuffix(".pth").rsplit("-", 1)[1]


def _classifier(
    network: str,
    name: str,
    value: float,
    urls: tuple[str, ...],
    preprocessing: Preprocessing,
    *,
    page: str,
    licence: str,
) -> PublishedWeights:
    return PublishedWeights(
        network=network,
        name=name,
        urls=urls,
        sha256=_sha256(urls[0]),
        page=page,
        licence=licence,
        data="ImageNet-1k",
        metric="top-1",
        value=value,
        preprocessing=preprocessing,
        file_name=_file_name(urls[0]),
    )


def _torchvision(network: str, name: str, file: str, value: float, preprocessing: Preprocessing) -> PublishedWeights:
    return _classifier(
        network,
        name,
        value,
        (f"https://download.pytorch.org/models/{file}",),
        preprocessing,
        page=f"https://docs.pytorch.org/vision/stable/models/generated/torchvision.models.{network}.html",
        licence="BSD-3-Clause",
    )


def _timm(network: str, name: str, release: str, file: str, value: float, test: Preprocessing) -> PublishedWeights:
    return _classifier(network, name, value, _timm_urls(release, file), test, page=_TIMM_PAGE, licence="Apache-2.0")


def _timm_urls(release: str, file: str) -> tuple[str, ...]:
    """Both addresses of a file in timm's releases: the repository has moved from one owner to the other."""
    address = "https://github.com/{}/pytorch-image-models/releases/download/{}/{}"
    return tuple(address.format(owner, release, file) for owner in ("huggingface", "rwightman"))


def _gluon(network: str, name: str, file: str, value: float) -> PublishedWeights:
    page = "https://github.com/rwightman/pytorch-pretrained-gluonresnet"
    url = f"{page}/releases/download/v0.1/{file}"
    return _classifier(network, name, value, (url,), _TIMM_224, page=page, licence="Apache-2.0")


def _resnest(network: str, sha256: str, value: float, crop: int, *, in_timm: bool = False) -> PublishedWeights:
    file = f"{network}-{sha256}.pth"
    urls = (
        f"https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1/{file}",
        f"https://s3.us-west-1.wasabisys.com/resnest/torch/{file}",
        *(_timm_urls("v0.1-resnest", file) if in_timm else ()),
    )
    test = Preprocessing(crop + 32, crop, "bicubic")
    page = "https://github.com/zhanghang1989/ResNeSt"
    return _classifier(network, "imagenet", value, urls, test, page=page, licence="Apache-2.0")


def _by_hand(network: str, file: str, value: float, page: str) -> PublishedWeights:
    return PublishedWeights(
        network=network,
        name="imagenet",
        urls=(),
        sha256="",
        page=page,
        licence="MIT",
        data="ImageNet-1k",
        metric="top-1",
        value=value,
        preprocessing=_BILINEAR_256,
        file_name=file,
    )


def _detector(network: str, name: str, url: str, box_ap: float, page: str) -> PublishedWeights:
    return PublishedWeights(
        network=network,
        name=name,
        urls=(url,),
        sha256=_sha256(url),
        page=page,
        licence="Apache-2.0",
        data="COCO train2017",
        metric="box AP",
        value=box_ap,
        preprocessing=None,
        file_name=_file_name(url),
    )


def _detectron2(network: str, name: str, file: str, box_ap: float) -> PublishedWeights:
    url = f"https://s3.us-west-1.wasabisys.com/resnest/detectron/{file}"
    return _detector(network, name, url, box_ap, "https://github.com/zhanghang1989/ResNeSt/tree/master/d2")


def _mmdetection(network: str, detector: str, schedule: str, version: str, box_ap: float) -> PublishedWeights:
    depth = network.removeprefix("resnest")
    experiment = f"{detector}_s{depth}_fpn_syncbn-backbone%2Bhead_{schedule}_coco"
    url = f"https://download.openmmlab.com/mmdetection/v2.0/resnest/{experiment}/{experiment}_{version}.pth"
    page = "https://github.com/open-mmlab/mmdetection/tree/main/configs/resnest"
    return _detector(network, f"coco_{detector}_mmdet", url, box_ap, page)


def _encoding(network: str, file: str, miou: float) -> PublishedWeights:
    page = "https://hangzhang.org/PyTorch-Encoding/model_zoo/segmentation.html"
    return PublishedWeights(
        network=network,
        name="ade20k_deeplabv3",
        urls=(),
        sha256="",
        page=page,
        licence="MIT",
        data="ADE20K",
        metric="mIoU",
        value=miou,
        preprocessing=None,
        file_name=file,
    )


_TIMM_PAGE = "https://github.com/huggingface/pytorch-image-models"
_CBAM_PAGE = "https://github.com/Jongchan/attention-module"
_ECA_PAGE = "https://github.com/BangguWu/ECANet"

_BILINEAR_256 = Preprocessing(256, 224, "bilinear")  # torchvision's V1, and what most ImageNet code does
_BILINEAR_232 = Preprocessing(232, 224, "bilinear")  # torchvision's V2
_TIMM_224 = Preprocessing(256, 224, "bicubic")
_TIMM_288 = Preprocessing(288, 288, "bicubic")

PUBLISHED: tuple[PublishedWeights, ...] = (
    # torchvision's IMAGENET1K_V1, which published detection results start from, and IMAGENET1K_V2, its longer recipe.
    _torchvision("resnet18", "imagenet", "resnet18-f37072fd.pth", 69.758, _BILINEAR_256),
    _torchvision("resnet34", "imagenet", "resnet34-b627a593.pth", 73.314, _BILINEAR_256),
    _torchvision("resnet50", "imagenet", "resnet50-0676ba61.pth", 76.130, _BILINEAR_256),
    _torchvision("resnet50", "imagenet_v2", "resnet50-11ad3fa6.pth", 80.858, _BILINEAR_232),
    _torchvision("resnet101", "imagenet", "resnet101-63fe2227.pth", 77.374, _BILINEAR_256),
    _torchvision("resnet101", "imagenet_v2", "resnet101-cd907fc2.pth", 81.886, _BILINEAR_232),
    _torchvision("resnet152", "imagenet", "resnet152-394f9c45.pth", 78.312, _BILINEAR_256),
    _torchvision("resnet152", "imagenet_v2", "resnet152-f82ba261.pth", 82.284, _BILINEAR_232),
    _torchvision("resnext50_32x4d", "imagenet", "resnext50_32x4d-7cdf4587.pth", 77.618, _BILINEAR_256),
    _torchvision("resnext50_32x4d", "imagenet_v2", "resnext50_32x4d-1a0047aa.pth", 81.198, _BILINEAR_232),
    _torchvision("resnext101_32x8d", "imagenet", "resnext101_32x8d-8ba56ff5.pth", 79.312, _BILINEAR_256),
    _torchvision("resnext101_32x8d", "imagenet_v2", "resnext101_32x8d-110c445d.pth", 82.834, _BILINEAR_232),
    # timm's recipe A1 (arXiv 2110.00476), as timm's results table measures it.
    _timm("resnet18", "imagenet_a1", "v0.1-rsb-weights", "resnet18_a1_0-d63eafa0.pth", 73.158, _TIMM_288),
    _timm("resnet34", "imagenet_a1", "v0.1-rsb-weights", "resnet34_a1_0-46f8f793.pth", 77.918, _TIMM_288),
    _timm("resnet50", "imagenet_a1", "v0.1-rsb-weights", "resnet50_a1_0-14fe96d1.pth", 81.214, _TIMM_288),
    _timm("resnet101", "imagenet_a1", "v0.1-rsb-weights", "resnet101_a1_0-cdcb52a9.pth", 82.322, _TIMM_288),
    _timm("resnet152", "imagenet_a1", "v0.1-rsb-weights", "resnet152_a1_0-2eee8a7a.pth", 82.732, _TIMM_288),
    _timm("resnext50_32x4d", "imagenet_a1", "v0.1-rsb-weights", "resnext50_32x4d_a1_0-b5a91a1d.pth", 81.466, _TIMM_288),
    # ResNeSt's authors published these two for Gluon only (75.75 and 78.68 there). The files are timm's conversions,
    # and the figures those of timm's results table, for these files.
    _timm("resnest14", "imagenet", "v0.1-weights", "gluon_resnest14-9c8fe254.pth", 75.510, _BILINEAR_256),
    _timm("resnest26", "imagenet", "v0.1-weights", "gluon_resnest26-50eb607c.pth", 78.484, _BILINEAR_256),
    # ResNeSt's released files and their figures. The released evaluation (scripts/torch/verify.py) resizes the centre
    # square of crop / (crop + 32) of the short side to the crop, bicubic: the bilinear filter that it chooses for crops
    # under 320 is never used. timm has resnest50 and resnest101 bilinear, and resnest101 at a crop of 256 from 292.
    _resnest("resnest50", "528c19ca", 81.03, 224, in_timm=True),
    _resnest("resnest101", "22405ba7", 82.83, 256, in_timm=True),
    _resnest("resnest200", "75117900", 83.84, 320, in_timm=True),
    _resnest("resnest269", "0cc87c48", 84.54, 416, in_timm=True),
    _resnest("resnest50_fast_1s1x64d", "d8fbf808", 80.33, 224),
    _resnest("resnest50_fast_2s1x64d", "44938639", 80.53, 224),
    _resnest("resnest50_fast_4s1x64d", "f74f3fc3", 80.76, 224),
    _resnest("resnest50_fast_1s2x40d", "32830b84", 80.59, 224),
    _resnest("resnest50_fast_2s2x40d", "9d126481", 80.61, 224),
    _resnest("resnest50_fast_4s2x40d", "41d14ed0", 81.14, 224, in_timm=True),
    _resnest("resnest50_fast_1s4x24d", "d4a4f76f", 80.99, 224, in_timm=True),
    # The authors' SE networks are Caffe's: a stride in the first 1x1, another function. So timm's and Gluon's, with
    # timm's figures at the size of training; timm also tests se_resnet50 (81.28) and se_resnext50_32x4d (82.20) at 288.
    _timm("se_resnet50", "imagenet", "v0.1-weights", "seresnet50_ra_224-8efdb4bb.pth", 80.274, _TIMM_224),
    _timm("se_resnet50", "imagenet_a1", "v0.1-rsb-weights", "seresnet50_a1_0-ffa00869.pth", 81.102, _TIMM_288),
    _timm("se_resnext50_32x4d", "imagenet", "v0.1-weights", "seresnext50_32x4d_racm-a304a460.pth", 81.27, _TIMM_224),
    _gluon("se_resnext50_32x4d", "imagenet_gluon", "gluon_seresnext50_32x4d-90cf2d6e.pth", 79.910),
    _gluon("se_resnext101_32x4d", "imagenet", "gluon_seresnext101_32x4d-cf52900d.pth", 80.892),
    # timm's name for SKNet-50 is skresnext50_32x4d. The authors' own files are Caffe's.
    _timm("sk_resnet50", "imagenet", "v0.1-weights", "skresnext50_ra-f40e40bf.pth", 80.162, _TIMM_224),
    # Behind pages made for browsers, without a hash: CBAM's on Dropbox, ECA's on Google Drive and Baidu. ECA's README
    # names its files without an ending; .pth.tar is that of main.py's checkpoints, and of what its users load. Its
    # first 77.48 for eca_resnet50 was of an earlier file.
    _by_hand("cbam_resnet50", "RESNET50_CBAM_new_name_wrap.pth", 77.622, _CBAM_PAGE),
    _by_hand("eca_resnet18", "eca_resnet18_k3577.pth.tar", 70.92, _ECA_PAGE),
    _by_hand("eca_resnet34", "eca_resnet34_k3357.pth.tar", 74.21, _ECA_PAGE),
    _by_hand("eca_resnet50", "eca_resnet50_k3557.pth.tar", 77.42, _ECA_PAGE),
    _by_hand("eca_resnet101", "eca_resnet101_k3357.pth.tar", 78.65, _ECA_PAGE),
    _by_hand("eca_resnet152", "eca_resnet152_k3357.pth.tar", 78.92, _ECA_PAGE),
    # ResNeSt's detectors for detectron2 (d2/README.md). That the digits in their names begin the SHA-256 is how the
    # same authors name their classifiers' files; for these no page says so. Where it does not hold, a file loads by its
    # path, which checks no hash.
    _detectron2(
        "resnest50", "coco_faster_rcnn", "faster_rcnn_ResNeSt_50_FPN_syncbn_range-scale_1x-ad123c0b.pth", 42.33
    ),
    _detectron2(
        "resnest50",
        "coco_cascade_rcnn",
        "faster_cascade_rcnn_ResNeSt_50_FPN_syncbn_range-scale-1x-e9955232.pth",
        45.41,
    ),
    _detectron2("resnest50", "coco_mask_rcnn", "mask_rcnn_ResNeSt_50_FPN_syncBN_1x-f442d863.pth", 42.81),
    _detectron2(
        "resnest50", "coco_cascade_mask_rcnn", "mask_cascade_rcnn_ResNeSt_50_FPN_syncBN_1x-c58bd325.pth", 46.19
    ),
    _detectron2(
        "resnest101", "coco_faster_rcnn", "faster_rcnn_ResNeSt_101_FPN_syncbn_range-scale_1x-d8f284b6.pth", 44.72
    ),
    _detectron2(
        "resnest101",
        "coco_cascade_rcnn",
        "faster_cascade_rcnn_ResNeSt_101_FPN_syncbn_range-scale_1x-3627ef78.pth",
        47.50,
    ),
    _detectron2("resnest101", "coco_mask_rcnn", "mask_rcnn_ResNeSt_101_FPN_syncBN_1x-528502c6.pth", 45.75),
    _detectron2(
        "resnest101", "coco_cascade_mask_rcnn", "mask_cascade_rcnn_ResNeSt_101_FPN_syncBN_1x-62448b9c.pth", 48.30
    ),
    _detectron2(
        "resnest200",
        "coco_cascade_rcnn",
        "faster_cascade_rcnn_ResNeSt_200_FPN_syncbn_range-scale_1x-1be2a87e.pth",
        49.03,
    ),
    # mmdetection's (configs/resnest/metafile.yml); its publish_model.py puts the SHA-256 into the names.
    _mmdetection("resnest50", "faster_rcnn", "mstrain-range_1x", "20200926_125502-20289c16", 42.0),
    _mmdetection("resnest50", "cascade_rcnn", "mstrain-range_1x", "20201122_213640-763cc7b5", 44.5),
    _mmdetection("resnest50", "mask_rcnn", "mstrain_1x", "20200926_125503-8a2c3d47", 42.6),
    _mmdetection("resnest50", "cascade_mask_rcnn", "mstrain_1x", "20201122_104428-99eca4c7", 45.4),
    _mmdetection("resnest101", "faster_rcnn", "mstrain-range_1x", "20201006_021058-421517f1", 44.5),
    _mmdetection("resnest101", "cascade_rcnn", "mstrain-range_1x", "20201005_113242-b9459f8f", 46.8),
    _mmdetection("resnest101", "mask_rcnn", "mstrain_1x", "20201005_215831-af60cdf9", 45.2),
    _mmdetection("resnest101", "cascade_mask_rcnn", "mstrain_1x", "20201005_113243-42607475", 47.7),
    # PyTorch-Encoding publishes zip archives with these files in them; the digits in their names begin the SHA-1
    # (encoding/models/model_store.py). Tested at several scales.
    _encoding("resnest50", "deeplab_resnest50_ade-2225f09d.pth", 45.12),
    _encoding("resnest101", "deeplab_resnest101_ade-06ca799c.pth", 46.91),
)
