"""RoIAlign by rows, against torchvision's."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torchvision.ops import MultiScaleRoIAlign, roi_align

from resnest_det.layers import plain_layers
from resnest_det.models import RowRoIAlign
from resnest_det.models import roi_align as module
from resnest_det.models.roi_align import roi_align_by_rows

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("sampling_ratio", [1, 2, 3])
@pytest.mark.parametrize("output_size", [(7, 7), (3, 5)])
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_rows_give_what_torchvision_gives(sampling_ratio: int, output_size: tuple[int, int], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, 12, 15, generator=generator, dtype=torch.float64)
    # Inside, over each border, far outside, without extent, and turned inside out.
    corners = torch.rand(200, 4, generator=generator, dtype=torch.float64) * 30 / scale - 8 / scale
    corners[:10, 2:] = corners[:10, :2]
    corners[10:12] = torch.tensor([[0, 0, 15, 12], [-1, -1, 16, 13]]) / scale
    rois = torch.cat([torch.arange(200)[:, None] % 2, corners], 1)
    expected = roi_align(features, rois, output_size, scale, sampling_ratio)
    own = roi_align_by_rows(features, rois, scale, output_size, sampling_ratio)
    torch.testing.assert_close(own.permute(0, 3, 1, 2), expected, rtol=1e-10, atol=1e-10)


def scene(*names: str, layout: torch.memory_format = torch.contiguous_format, boxes: int = 60) -> tuple:
    torch.manual_seed(0)
    features = {name: torch.randn(2, 8, 64 // 2**index, 64 // 2**index) for index, name in enumerate(names)}
    features["pool"] = torch.randn(2, 8, 4, 4)
    features = {name: level.contiguous(memory_format=layout) for name, level in features.items()}
    corners = torch.rand(2, boxes, 2) * 200
    found = [torch.cat([low, low + size], 1) for low, size in zip(corners, torch.rand(2, boxes, 1) * 250, strict=True)]
    return features, found, [(256, 256), (256, 250)]


@pytest.mark.parametrize("levels", [["0"], ["0", "1", "2"]])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("boxes", [1, 60])
def test_levels_as_torchvision_chooses_them(levels: list[str], layout: torch.memory_format, boxes: int) -> None:
    features, found, sizes = scene(*levels, layout=layout, boxes=boxes)
    found[1] = found[1][:0]
    own = RowRoIAlign(levels, 7, 2)(features, found, sizes)
    expected = MultiScaleRoIAlign(levels, 7, 2)(features, found, sizes)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_torchvisions(layout: torch.memory_format) -> None:
    features, found, sizes = scene("0", "1", layout=layout)
    names = ["0", "1"]

    def gradients(pool: MultiScaleRoIAlign) -> list[Tensor]:
        levels = {name: level.double().requires_grad_() for name, level in features.items()}
        boxes = [box.double().requires_grad_() for box in found]
        out = pool(levels, boxes, sizes)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        assert all(box.grad is None for box in boxes)
        return [grad for name in names if (grad := levels[name].grad) is not None]

    own, expected = gradients(RowRoIAlign(names, 7, 2)), gradients(MultiScaleRoIAlign(names, 7, 2))
    assert len(own) == len(expected) == 2
    for ours, theirs in zip(own, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_level_without_boxes_has_a_gradient_of_zeros() -> None:
    features, found, sizes = scene("0", "1")
    levels = {name: level.requires_grad_() for name, level in features.items()}
    small = [box[:3, :2].repeat(1, 2) + torch.tensor([0.0, 0, 9, 9]) for box in found]
    RowRoIAlign(["0", "1"], 7, 2)(levels, small, sizes).sum().backward()
    assert levels["0"].grad.abs().sum() > 0  # type: ignore[union-attr]
    assert levels["1"].grad.abs().sum() == 0  # type: ignore[union-attr]


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0.3, 0.6, 4.2, 3.9], [0, -2.0, 1.0, 9.0, 2.5]], dtype=torch.float64)
    assert gradcheck(lambda features: roi_align_by_rows(features, rois, 1.0, (2, 2), 2), features)


def test_no_boxes() -> None:
    pooler = RowRoIAlign(["0"], 7, 2)
    out = pooler({"0": torch.randn(1, 8, 16, 16)}, [torch.zeros(0, 4)], [(64, 64)])
    assert out.shape == (0, 8, 7, 7)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("reason", ["plain_layers", "no sampling ratio", "bfloat16", "traced"])
def test_what_torchvision_does_itself(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("taken by rows")

    monkeypatch.setattr(module, "_pooled", refuse)
    features, found, sizes = scene("0", layout=torch.channels_last)
    pool = RowRoIAlign(["0"], 7, 0 if reason == "no sampling ratio" else 2)
    if reason == "traced":
        torch.jit.trace(lambda level: pool({"0": level}, found, sizes), features["0"], check_trace=False)
        return
    with pytest.raises(AssertionError, match="taken by rows"):
        RowRoIAlign(["0"], 7, 2)(features, found, sizes)
    if reason == "bfloat16":
        features = {name: level.bfloat16() for name, level in features.items()}
    autocast = torch.autocast("cpu", enabled=reason == "bfloat16")
    with autocast, plain_layers() if reason == "plain_layers" else nullcontext():
        pool(features, found, sizes)


def test_a_copy_and_its_words() -> None:
    pool = RowRoIAlign(["0", "1"], 7, 2)
    assert "featmap_names=['0', '1']" in repr(copy.deepcopy(pool))
