"""The names that others build on."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
from torch import nn

import resnest_det
import resnest_det.backbones
import resnest_det.classify
import resnest_det.data
import resnest_det.engine
import resnest_det.evaluation
import resnest_det.layers
import resnest_det.models
import resnest_det.testing
import resnest_det.visualize

ROOMS = [
    resnest_det,
    resnest_det.backbones,
    resnest_det.classify,
    resnest_det.data,
    resnest_det.engine,
    resnest_det.evaluation,
    resnest_det.layers,
    resnest_det.models,
    resnest_det.testing,
    resnest_det.visualize,
]


def test_promised_names() -> None:
    from resnest_det import (
        create_backbone,
        fpn_backbone,
        list_backbones,
        list_weights,
        load_weights,
        resnest50,
        se_resnet50,
        stage_extractor,
    )
    from resnest_det.backbones import (
        Gate,
        Layout,
        Preprocessing,
        PublishedWeights,
        SpatialConv,
        convert_state_dict,
    )
    from resnest_det.classify import load_classifier
    from resnest_det.data import ADE20K, CocoDetection
    from resnest_det.evaluation import CocoMeanAveragePrecision, MeanIoU, evaluate
    from resnest_det.layers import (
        CBAM,
        EfficientChannelAttention,
        SelectiveKernelConv2d,
        SplitAttentionConv2d,
        SqueezeExcitation,
    )
    from resnest_det.models import deeplabv3plus, faster_rcnn
    from resnest_det.testing import check_backbone

    promised = [
        *(create_backbone, fpn_backbone, list_backbones, load_weights, resnest50, stage_extractor),
        *(CocoDetection, CocoMeanAveragePrecision, evaluate, SplitAttentionConv2d, faster_rcnn),
        *(ADE20K, MeanIoU, deeplabv3plus),
        *(se_resnet50, list_weights, convert_state_dict, check_backbone, load_classifier),
        *(Gate, Layout, Preprocessing, PublishedWeights, SpatialConv),
        *(CBAM, EfficientChannelAttention, SelectiveKernelConv2d, SqueezeExcitation),
    ]
    assert all(callable(name) for name in promised)
    assert set(list_backbones()) <= set(resnest_det.__all__)


def public_names(room: ModuleType) -> list[str]:
    """What a package exports; of a single file, which has no list of it, what is defined there."""
    names = [name for name, value in vars(room).items() if getattr(value, "__module__", None) == room.__name__]
    return getattr(room, "__all__", [name for name in names if not name.startswith("_")])


def test_no_public_function_swallows_a_misspelt_argument() -> None:
    checked = 0
    for room in ROOMS:
        for name in public_names(room):
            value = getattr(room, name)
            is_class = inspect.isclass(value) and not getattr(value, "_is_protocol", False)
            if is_class and value.__init__ is nn.Module.__init__:  # it takes **kwargs to refuse them itself
                with pytest.raises(TypeError, match="misspelt"):
                    value(misspelt=1)
            elif is_class or inspect.isfunction(value):
                kinds = [parameter.kind for parameter in inspect.signature(value).parameters.values()]
                assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{room.__name__}.{name}"
                checked += 1
    assert checked > 120
