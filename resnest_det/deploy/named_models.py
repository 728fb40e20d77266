"""Models by name, to be measured beside each other: ours, and other packages' where these are installed.

resnest50                    a network of create_backbone, as a classifier
faster_rcnn:resnest50        a detector, or deeplabv3plus, on such a network
timm:resnest50d              timm's network
torchvision:resnet50         torchvision's classifier, detector or segmentation model
released:resnest50           the network of the ResNeSt authors' package
smp:tu-resnest50d            segmentation-models-pytorch's DeepLabV3+ on an encoder
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from resnest_det.backbones import create_backbone, list_backbones
from resnest_det.models import cascade_rcnn, deeplabv3plus, faster_rcnn, fcos, mask_rcnn, retinanet

_NUM_CLASSES = {"detection": 91, "segmentation": 150}  # COCO's with the background, ADE20K's
_DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "faster_rcnn": faster_rcnn,
    "mask_rcnn": mask_rcnn,
    "cascade_rcnn": cascade_rcnn,
    "retinanet": retinanet,
    "fcos": fcos,
}
_RELEASED_MODULES = ("resnest.torch.resnest", "resnest.torch.ablation")


def build_named(name: str, *, size: int) -> nn.Module:
    """A model of random weights by its name, which the module's docstring explains.

    Args:
        name: such as "resnest50", "faster_rcnn:resnest50" or "timm:resnest50d".
        size: side of the images that it will be run on, to which a detector is set, so that it resizes nothing.

    Returns:
        The model, in evaluation mode; is_ours tells whose it is.

    Raises:
        ValueError: there is no such model, or its package is not installed.
    """
    prefix, colon, own = name.partition(":")
    if not colon:
        return _ours(name).eval()
    if prefix in _DETECTORS:
        return _DETECTORS[prefix](_ours(own), _NUM_CLASSES["detection"], min_size=size, max_size=size).eval()
    if prefix == "deeplabv3plus":
        return deeplabv3plus(_ours(own, output_stride=16), _NUM_CLASSES["segmentation"]).eval()
    if prefix in _PEERS:
        return _PEERS[prefix](own, size).eval()
    raise ValueError(
        f"the model {name!r} begins with {prefix!r}, which is none of {', '.join(_PREFIXES)}{_near(prefix, _PREFIXES)}"
    )


def is_named(name: str) -> bool:
    """Whether build_named takes a text for a model's name: a network of ours, or what begins as another's does."""
    prefix, colon, _ = name.partition(":")
    return prefix in _PREFIXES if colon else name in list_backbones()


def is_ours(name: str) -> bool:
    """Whether a name that build_named takes is of one of our models."""
    return name.partition(":")[0] not in _PEERS


def _ours(name: str, *, output_stride: Any = 32) -> nn.Module:
    _check(name, list_backbones(), "resnest_det")
    return create_backbone(name, output_stride=output_stride)


def _timm(name: str, size: int) -> nn.Module:  # noqa: ARG001 (as its neighbours)
    timm = _package("timm", "timm", "oracles")
    _check(name, timm.list_models(), "timm")
    return timm.create_model(name, pretrained=False)


def _torchvision(name: str, size: int) -> nn.Module:
    from torchvision.models import detection, get_model, list_models, segmentation

    _check(name, list_models(), "torchvision")
    if name in list_models(module=detection) and not name.startswith("ssd"):  # an SSD has the one size it is made for
        return get_model(name, weights=None, weights_backbone=None, min_size=size, max_size=size)
    if name in [*list_models(module=detection), *list_models(module=segmentation)]:
        return get_model(name, weights=None, weights_backbone=None)
    return get_model(name, weights=None)


def _released(name: str, size: int) -> nn.Module:  # noqa: ARG001
    _package("resnest", "resnest", "oracles")
    makers = {
        own: maker
        for module in map(importlib.import_module, _RELEASED_MODULES)
        for own, maker in vars(module).items()
        if own.startswith("resnest") and callable(maker)
    }
    _check(name, list(makers), "the released package")
    return makers[name](pretrained=False)


def _smp(name: str, size: int) -> nn.Module:  # noqa: ARG001
    smp = _package("segmentation_models_pytorch", "segmentation-models-pytorch", "oracles")
    try:
        return smp.DeepLabV3Plus(
            name, encoder_weights=None, encoder_output_stride=16, classes=_NUM_CLASSES["segmentation"]
        )
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"segmentation-models-pytorch builds no encoder {name!r}: {error}") from error


_PEERS: dict[str, Callable[[str, int], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "released": _released,
    "smp": _smp,
}
_PREFIXES = (*_DETECTORS, "deeplabv3plus", *_PEERS)


def _package(module: str, package: str, extra: str) -> Any:
    """A module of another package; a ValueError that says how to install it where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{package} cannot be imported ({error}); install resnest-det[{extra}]") from error


def _check(name: str, names: Sequence[str], whose: str) -> None:
    if name not in names:
        raise ValueError(f"{whose} has no model {name!r}{_near(name, names)}")


def _near(name: str, names: Sequence[str]) -> str:
    """The nearest of the names as a question; nothing where there is none."""
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
