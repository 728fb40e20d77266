"""Folded norms: nothing is left of them, and the outputs are the model's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from resnest_det import create_backbone, stage_extractor
from resnest_det.deploy import fold_batch_norms
from resnest_det.models import deeplabv3plus, faster_rcnn, fcos, retinanet
from tests.random_norms import randomise_norms

NETWORKS = ["resnest14", "resnest50_fast_4s2x40d", "sk_resnet50", "cbam_resnet18", "se_resnet18", "eca_resnet18"]


def num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)) for module in model.modules())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "sync_bn"])
def test_networks(name: str, norm: str) -> None:
    torch.manual_seed(0)
    net = randomise_norms(create_backbone(name, num_classes=5, norm=norm))
    before = copy.deepcopy(net.state_dict())
    folded = fold_batch_norms(net)
    assert num_norms(folded) == 0
    assert not folded.training
    assert net.training
    torch.testing.assert_close(net.state_dict(), before)
    x = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        expected, out = net.eval()(x), folded(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_models_and_what_others_made() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 3, 96, 96)
    for build in (
        lambda: deeplabv3plus(create_backbone("resnest14", output_stride=16), 5),
        lambda: stage_extractor(create_backbone("resnest14")),
        lambda: torchvision.models.resnet18(),
        lambda: torchvision.models.mobilenet_v3_small(),
    ):
        model = randomise_norms(build()).eval()
        folded = fold_batch_norms(model)
        assert num_norms(folded) == 0
        with torch.no_grad():
            torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [faster_rcnn, retinanet, fcos])
def test_detectors_have_no_norm_left(build: object) -> None:
    model = build(create_backbone("resnest14"), 5)  # type: ignore[operator]
    assert num_norms(model) > 0
    assert num_norms(fold_batch_norms(model)) == 0


def test_group_norm_and_norms_without_a_convolution_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.BatchNorm2d(4))
    assert num_norms(fold_batch_norms(model)) == 2


class ReadTwice(nn.Module):
    """A convolution whose output is read beside the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x + self.norm(x)


class RunTwice(nn.Module):
    """One convolution in front of two norms, as heads that are shared by the levels of a pyramid have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
        self.first = nn.Sequential(self.conv, self.norms[0])
        self.second = nn.Sequential(self.conv, self.norms[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Untraceable(nn.Module):
    """What it does depends on the values that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else self.norm(x)


class Pruned(nn.Sequential):
    """A convolution whose weight is computed anew in every call."""

    def __init__(self) -> None:
        conv = nn.Conv2d(3, 4, 1)
        nn.utils.prune.l1_unstructured(conv, "weight", amount=0.5)
        super().__init__(conv, nn.BatchNorm2d(4))
        with torch.no_grad():  # a weight with a history cannot be copied
            self(torch.rand(2, 3, 4, 4))


class OptionalShortcut(nn.Module):
    """What it computes depends on whether an argument is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        return self.norm(self.conv(x)) + (x if shortcut is None else shortcut)


@pytest.mark.parametrize("kind", [ReadTwice, RunTwice, Untraceable, Pruned, OptionalShortcut])
def test_norms_whose_convolution_does_more_stay(kind: type[nn.Module]) -> None:
    model = randomise_norms(kind()).eval()
    folded = fold_batch_norms(model)
    assert num_norms(folded) == num_norms(model)
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(folded(x), model(x))


def test_a_folded_copy_can_be_trained_on_and_keeps_what_is_frozen() -> None:
    conv = nn.Conv2d(3, 4, 1).requires_grad_(False)
    folded = fold_batch_norms(nn.Sequential(conv, nn.BatchNorm2d(4)))
    assert [parameter.requires_grad for parameter in folded.parameters()] == [False, False]


def test_two_convolutions_with_one_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    randomise_norms(model).eval()
    x = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(fold_batch_norms(model)(x), model(x), rtol=1e-5, atol=1e-5)
