"""The tables of docs/backbones.md. `python -m tests.backbone_table` writes them anew."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnest_det import create_backbone, list_backbones, list_weights
from resnest_det.backbones import STAGES, ResNet
from tests.markdown_tables import between_markers, table

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"

TORCHVISION = "torchvision"
RELEASED_CODE = "released code"
ABLATION = "ResNeSt, ablation.md"
SKNET = "SKNet, README.md"
ECANET = "ECANet, README.md"


@dataclass(frozen=True)
class PublishedCount:
    """Parameters and multiply-adds of a network as someone else states them, digits and all."""

    network: str
    source: str
    parameters: str  # in units of `parameter_unit`
    macs: str  # in units of `mac_unit`
    size: int = 224  # rows and columns of the image
    parameter_unit: float = 1e6
    mac_unit: float = 1e9


def _torchvision_counts() -> list[PublishedCount]:
    counts = []
    for name in list_backbones("resn"):
        if name in torchvision.models.list_models():
            meta = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].meta
            counts.append(PublishedCount(name, TORCHVISION, f"{meta['num_params'] / 1e6}", f"{meta['_ops']}"))
    return counts


def _ecanet_count(name: str, parameters: str, macs: str) -> PublishedCount:
    return PublishedCount(name, ECANET, parameters, macs, parameter_unit=2**20, mac_unit=2**30)


PUBLISHED_COUNTS = (
    *_torchvision_counts(),
    # Counted from the released ResNeSt code (tests/test_docs.py does so anew), at the size that each network's accuracy
    # is published for.
    PublishedCount("resnest14", RELEASED_CODE, "10.611688", "2.75"),
    PublishedCount("resnest26", RELEASED_CODE, "17.069448", "3.62"),
    PublishedCount("resnest50", RELEASED_CODE, "27.483240", "5.37"),
    PublishedCount("resnest101", RELEASED_CODE, "48.275016", "13.32", 256),
    PublishedCount("resnest200", RELEASED_CODE, "70.201544", "35.52", 320),
    PublishedCount("resnest269", RELEASED_CODE, "110.929480", "77.35", 416),
    PublishedCount("resnest50_fast_1s1x64d", ABLATION, "26.3", "4.34"),
    PublishedCount("resnest50_fast_2s1x64d", ABLATION, "27.5", "4.34"),
    PublishedCount("resnest50_fast_4s1x64d", ABLATION, "31.9", "4.35"),
    PublishedCount("resnest50_fast_1s2x40d", ABLATION, "25.9", "4.38"),
    PublishedCount("resnest50_fast_2s2x40d", ABLATION, "26.9", "4.38"),
    PublishedCount("resnest50_fast_4s2x40d", ABLATION, "30.4", "4.41"),
    PublishedCount("resnest50_fast_1s4x24d", ABLATION, "25.7", "4.42"),
    PublishedCount("sk_resnet50", SKNET, "27.5", "4.47"),
    PublishedCount("sk_resnet101", SKNET, "48.9", "8.46"),
    _ecanet_count("eca_resnet18", "11.15", "1.70"),
    _ecanet_count("eca_resnet34", "20.79", "3.43"),
    _ecanet_count("eca_resnet50", "24.37", "3.86"),
    _ecanet_count("eca_resnet101", "42.49", "7.35"),
    _ecanet_count("eca_resnet152", "57.41", "10.83"),
)


@cache
def network(name: str) -> ResNet:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return create_backbone(name).eval()


def num_parameters(name: str) -> int:
    """Parameters of a network with a classifier of 1000."""
    return sum(parameter.numel() for parameter in network(name).parameters())


@cache
def num_macs(name: str, size: int = 224) -> int:
    """Multiply-adds of a network for one image of `size` x `size`."""
    return count_macs(network(name), size)


def count_macs(net: nn.Module, size: int) -> int:
    """Multiply-adds of the convolutions and linear layers of a network on meta, for one image of `size` x `size`."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


def same_digits(published: str, count: float) -> str:
    """`count` with as many decimals as `published` has."""
    decimals = len(published.partition(".")[2])
    return f"{count:.{decimals}f}"


def network_row(name: str) -> list[str]:
    """Parameters, multiply-adds, channels, and the accuracy of the published ImageNet weights."""
    stages = [network(name).get_submodule(stage) for stage in STAGES]
    assert [stage.stride for stage in stages] == [4, 8, 16, 32]
    channels = ", ".join(str(stage.channels) for stage in stages)
    accuracies = ", ".join(f"{w.name} {w.value:.2f}" for w in list_weights(name) if w.metric == "top-1")
    return [name, f"{num_parameters(name):,}", f"{num_macs(name) / 1e9:.2f}", channels, accuracies]


def count_row(count: PublishedCount) -> list[str]:
    """What a source says, and what ours is in the same units and digits."""
    return [
        count.network,
        count.source,
        str(count.size),
        count.parameters,
        same_digits(count.parameters, num_parameters(count.network) / count.parameter_unit),
        count.macs,
        same_digits(count.macs, num_macs(count.network, count.size) / count.mac_unit),
    ]


def networks_table() -> str:
    """One line a network."""
    header = ["network", "parameters", "GMACs", "channels", "ImageNet weights, top-1"]
    return table(header, "lrrll", map(network_row, list_backbones()))


def counts_table() -> str:
    """One line a published count."""
    header = ["network", "source", "size", "parameters, M", "ours", "GMACs", "ours"]
    return table(header, "llrrrrr", map(count_row, PUBLISHED_COUNTS))


def renewed(text: str) -> str:
    """The page's text with its two tables computed anew."""
    return between_markers(between_markers(text, "networks", networks_table()), "counts", counts_table())


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
