from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from resnest_det import create_backbone
from resnest_det.layers import (
    SplitAttentionConv2d,
    SyncBatchNorm,
    describe_norms,
    group_norm,
    norm_layer,
    norm_warnings,
)
from resnest_det.layers.norm import uses_batch_statistics


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were one of two processes."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)


def body_and_head() -> nn.Module:
    net = nn.Module()
    net.body = nn.Sequential(FrozenBatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    net.neck = nn.Conv2d(4, 4, 1)
    net.head = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4))
    return net


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bn", nn.BatchNorm2d), ("frozen_bn", FrozenBatchNorm2d), ("sync_bn", SyncBatchNorm), ("gn", nn.GroupNorm)],
)
def test_each_name_builds_its_layer(name: str, kind: type[nn.Module]) -> None:
    layer = norm_layer(name)(64)
    assert type(layer) is kind
    assert layer.eval()(torch.randn(1, 64, 4, 4)).shape == (1, 64, 4, 4)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (40, 8), (30, 2), (7, 1)])
def test_group_norm_takes_any_width(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def test_unknown_norm() -> None:
    with pytest.raises(ValueError, match="norm 'batch' is unknown; choose one of bn, frozen_bn, sync_bn, gn"):
        norm_layer("batch")


@pytest.mark.parametrize("kind", [SyncBatchNorm, nn.SyncBatchNorm])
def test_synchronised_norms_share_with_other_processes(kind: type[nn.Module], two_processes: None) -> None:
    assert not uses_batch_statistics(kind(4))
    assert uses_batch_statistics(nn.BatchNorm2d(4))


@pytest.mark.parametrize("kind", [SyncBatchNorm, nn.SyncBatchNorm])
def test_alone_synchronised_norms_have_their_own_batch(kind: type[nn.Module]) -> None:
    assert uses_batch_statistics(kind(4))
    assert not uses_batch_statistics(kind(4).eval())


def test_norms_are_described_by_kind_and_place() -> None:
    net = body_and_head()
    assert describe_norms(net) == (
        "norms: 1 FrozenBatchNorm2d (body; frozen), 3 BatchNorm2d (body 2, head 1), 1 GroupNorm (head), "
        "1 LayerNorm (head)"
    )
    net.body.requires_grad_(False)
    assert "3 BatchNorm2d (body 2, head 1)," in describe_norms(net), "their statistics are still live"
    net.body.eval()
    assert "3 BatchNorm2d (body 2, head 1; 2 frozen)," in describe_norms(net)


def test_norms_of_networks_are_all_found() -> None:
    net = create_backbone("resnet50", norm="sync_bn")
    assert describe_norms(net) == "norms: 53 SyncBatchNorm (bn1 1, layer1 10, layer2 13, layer3 19, layer4 10)"
    assert describe_norms(nn.Linear(2, 2)) == "norms: none"
    assert describe_norms(nn.BatchNorm2d(2)) == "norms: 1 BatchNorm2d (the model itself)"


def test_few_images_are_warned_about() -> None:
    net = body_and_head()
    (warning,) = norm_warnings(net, 2)
    assert warning == (
        "the statistics of 3 BatchNorm2d come from 2 images of one process; with fewer than 4, networks train to worse "
        "results: use 4 or more, or norm='frozen_bn' or 'gn'"
    )
    assert "come from 1 image of one process;" in norm_warnings(net, 1)[0]
    assert norm_warnings(net, 4) == []


@pytest.mark.parametrize("norm", ["frozen_bn", "gn"])
def test_norms_without_batch_statistics_are_not_warned_about(norm: str) -> None:
    assert norm_warnings(create_backbone("resnest14", norm=norm), 1) == []


def test_norms_in_evaluation_are_not_warned_about() -> None:
    assert norm_warnings(create_backbone("resnest14").eval(), 1) == []


def test_synchronised_norms_count_the_images_of_all_processes(two_processes: None) -> None:
    net = nn.Sequential(nn.BatchNorm2d(4), SyncBatchNorm(4), nn.SyncBatchNorm(4))
    assert norm_warnings(net, 1) == [
        "the statistics of 1 BatchNorm2d come from 1 image of one process; with fewer than 4, networks train to worse "
        "results: use 4 or more, or norm='sync_bn', 'frozen_bn' or 'gn'",
        "the statistics of 2 SyncBatchNorm come from 2 images of all processes together; with fewer than 4, networks "
        "train to worse results: use 4 or more, or norm='frozen_bn' or 'gn'",
    ]
    (warning,) = norm_warnings(net, 2)
    assert warning.startswith("the statistics of 1 BatchNorm2d come from 2 images of one process")


def test_synchronised_norms_alone_are_warned_about() -> None:
    (warning,) = norm_warnings(nn.Sequential(SyncBatchNorm(4)), 3)
    assert warning.startswith("the statistics of 1 SyncBatchNorm come from 3 images of all processes together; with")


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
@pytest.mark.parametrize("name", ["resnest14", "sk_resnet50"])
def test_norms_behind_the_pool_are_warned_about(name: str, norm: str) -> None:
    net = create_backbone(name, norm=norm)
    blocks = sum(len(net.get_submodule(f"layer{number}")) for number in (1, 2, 3, 4))
    _, pooled = norm_warnings(net, 2)
    scope = "one process" if norm == "bn" else "all processes together"
    assert pooled.startswith(f"{blocks} of these norms are the attention's own, behind its pool")
    assert pooled.endswith(
        f"of 2 images of {scope}, normalising leaves little more than which value is larger; use 4 or more, or "
        "norm='frozen_bn' or 'gn'"
    )
    assert norm_warnings(net, 4) == []


def test_pooled_features_of_two_images_keep_only_their_order() -> None:
    torch.manual_seed(0)
    bn1 = SplitAttentionConv2d(8, 8).bn1
    pooled = 100 * torch.randn(2, 32, 1, 1)
    torch.testing.assert_close(bn1(pooled).detach(), (pooled - pooled.mean(0)).sign(), rtol=0, atol=1e-3)
