"""SyncBatchNorm beside BatchNorm2d on the joined batch: two processes run every case once, the tests compare."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchFunction
from torch.nn.parallel import DistributedDataParallel

from resnest_det.backbones.resnet import Bottleneck, Stage
from resnest_det.layers import NormLayer, SplitAttentionConv2d, SyncBatchNorm

CHANNELS = 6
LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "no affine": {"affine": False},
    "mean of all batches": {"momentum": None},
    "no running statistics": {"track_running_stats": False},
}
SPLITS = {"3 and 5 images": (3, 5), "no image and 8": (0, 8)}
Case = dict[str, Any]


def joined_batch(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 + 2 * torch.randn(8, CHANNELS, 5, 4, generator=generator, dtype=torch.float64)).to(dtype)


def weighting(shape: torch.Size) -> Tensor:
    """What the outputs are multiplied by before they are summed, for gradients that tell positions apart."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def two_steps(norm: nn.Module, x: Tensor, own: slice) -> Case:
    """The second of two steps on the images `own` of x: output, gradients, buffers."""
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
            norm.bias.copy_(torch.linspace(-1, 3, CHANNELS))
    norm(2 * x[own])
    part = x[own].detach().requires_grad_()
    out = norm(part)
    (out * weighting(x.shape)[own]).sum().backward()
    return {
        "out": out.detach(),
        "input": part.grad,
        "parameters": {name: parameter.grad for name, parameter in norm.named_parameters()},
        "buffers": dict(norm.named_buffers()),
    }


def network(norm_layer: NormLayer, *, checkpoint: bool = False) -> nn.Module:
    """A stem and a stage of one block of split attention."""

    def spatial_conv(channels: int, *, norm_layer: NormLayer, **arguments: int) -> nn.Module:
        return SplitAttentionConv2d(channels, channels, norm_layer=norm_layer, **arguments)

    torch.manual_seed(4)
    block = Bottleneck(
        16,
        4,
        stride=1,
        dilation=1,
        shortcut=None,
        gate=None,
        drop_path=0.0,
        norm_layer=norm_layer,
        width=8,
        groups=1,
        spatial_conv=spatial_conv,
        average_pool=None,
    )
    stage = Stage([block], channels=16, stride=2, checkpoint=checkpoint)
    return nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), norm_layer(16), stage).double()


def network_step(net: nn.Module, own: slice) -> Case:
    """Gradients and buffers of a step on the images `own` of 4; the loss is the mean over them."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    net(images[own]).square().mean().backward()
    net = getattr(net, "module", net)
    return {
        "parameters": {name: parameter.grad for name, parameter in net.named_parameters()},
        "buffers": dict(net.named_buffers()),
    }


def one_of_two(rank: int, folder: Path) -> None:
    """Everything that this process has to say, into folder/RANK.pt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    x = joined_batch()
    results: dict[Any, Any] = {}
    for split, (first, _) in SPLITS.items():
        own = (slice(0, first), slice(first, None))[rank]
        for layer, arguments in LAYERS.items():
            results[layer, split] = two_steps(SyncBatchNorm(CHANNELS, **arguments).double(), x, own)
    own = (slice(0, 3), slice(3, None))[rank]
    channels_last = joined_batch(torch.float32).contiguous(memory_format=torch.channels_last)
    results["nothing"] = two_steps(SyncBatchNorm(CHANNELS).double(), x, slice(0, 0))
    results["channels_last"] = two_steps(SyncBatchNorm(CHANNELS), channels_last, own)
    results["bfloat16"] = two_steps(SyncBatchNorm(CHANNELS), joined_batch(torch.bfloat16), own)
    results["bfloat16 parameters"] = two_steps(SyncBatchNorm(CHANNELS).bfloat16(), joined_batch(torch.bfloat16), own)
    with torch.autocast("cpu", torch.bfloat16):
        results["autocast"] = two_steps(SyncBatchNorm(CHANNELS), joined_batch(torch.bfloat16), own)
    compiled = torch.compile(SyncBatchNorm(CHANNELS).double(), backend="aot_eager")
    results["compiled"] = two_steps(compiled, x, (slice(0, 3), slice(3, None))[rank])
    evaluated = SyncBatchNorm(CHANNELS).double().eval()
    results["eval"] = {"out": evaluated(x[: 1 + rank]).detach(), "buffers": dict(evaluated.named_buffers())}
    try:
        SyncBatchNorm(CHANNELS)(torch.randn(1 - rank, CHANNELS, 1, 1))
    except ValueError as error:
        results["error"] = str(error)
    own = slice(2 * rank, 2 * rank + 2)
    for checkpoint in (False, True):
        net = DistributedDataParallel(network(SyncBatchNorm, checkpoint=checkpoint))
        results["network", checkpoint] = network_step(net, own)
    torch.manual_seed(6 + rank)
    results["one image each"] = network(SyncBatchNorm)(torch.randn(1, 3, 16, 16, dtype=torch.float64)).detach()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Case]:
    """The results of the two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    return first, second


def joined(cases: tuple[Case, Case], key: Any) -> Case:
    """What the processes gave together: images one after the other, gradients of parameters summed, equal buffers."""
    one, other = (case[key] for case in cases)
    assert one["buffers"].keys() == other["buffers"].keys()
    assert all(torch.equal(buffer, other["buffers"][name]) for name, buffer in one["buffers"].items())
    return {
        "out": torch.cat([one["out"], other["out"]]),
        "input": torch.cat([one["input"], other["input"]]),
        "parameters": {name: gradient + other["parameters"][name] for name, gradient in one["parameters"].items()},
        "buffers": one["buffers"],
    }


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layer", LAYERS)
def test_two_processes_equal_batch_norm_on_the_joined_batch(both: tuple[Case, Case], layer: str, split: str) -> None:
    x = joined_batch()
    expected = two_steps(nn.BatchNorm2d(CHANNELS, **LAYERS[layer]).double(), x, slice(None))
    torch.testing.assert_close(joined(both, (layer, split)), expected, rtol=1e-10, atol=1e-12)


def test_channels_last_stays(both: tuple[Case, Case]) -> None:
    expected = two_steps(nn.BatchNorm2d(CHANNELS).double(), joined_batch(), slice(None))
    torch.testing.assert_close(joined(both, "channels_last"), expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    for case in both:
        for name in ("out", "input"):
            assert case["channels_last"][name].is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("case", ["bfloat16", "autocast", "bfloat16 parameters"])
def test_statistics_of_halves_are_taken_in_float32(both: tuple[Case, Case], case: str) -> None:
    got = joined(both, case)
    assert got["out"].dtype == got["input"].dtype == torch.bfloat16
    if case == "bfloat16 parameters":
        assert got["parameters"]["weight"].dtype == got["buffers"]["running_var"].dtype == torch.bfloat16
        return
    # The same values, as float64 from the start: what differs is the rounding of what comes out.
    expected = two_steps(nn.BatchNorm2d(CHANNELS).double(), joined_batch(torch.bfloat16).double(), slice(None))
    assert got["buffers"]["running_mean"].dtype == torch.float32
    torch.testing.assert_close(got["buffers"], expected["buffers"], rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(got["out"], expected["out"], rtol=2**-8, atol=1e-5, check_dtype=False)


def test_compiled_it_is_the_same(both: tuple[Case, Case]) -> None:
    for case in both:
        plain, compiled = case["default", "3 and 5 images"], case["compiled"]
        torch.testing.assert_close(compiled["input"], plain["input"], rtol=1e-12, atol=1e-12)


def test_evaluation_is_each_process_for_itself(both: tuple[Case, Case]) -> None:
    norm = nn.BatchNorm2d(CHANNELS).double().eval()
    for rank, case in enumerate(both):
        assert torch.equal(case["eval"]["out"], norm(joined_batch()[: 1 + rank]).detach())
        assert case["eval"]["buffers"]["num_batches_tracked"] == 0


def test_one_value_on_all_processes_is_refused_on_each(both: tuple[Case, Case]) -> None:
    for case in both:
        assert case["error"].startswith("SyncBatchNorm got 1 value a channel on its 2 processes together, and needs 2")


def test_nothing_on_any_process_is_learnt_from_as_by_batch_norm(both: tuple[Case, Case]) -> None:
    """As in the head of masks where no image has objects."""
    expected = two_steps(nn.BatchNorm2d(CHANNELS).double(), joined_batch(), slice(0, 0))
    assert expected["out"].shape == (0, CHANNELS, 5, 4)
    for case in both:
        torch.testing.assert_close(case["nothing"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_network_under_ddp_equals_the_network_on_the_joined_batch(both: tuple[Case, Case], checkpoint: bool) -> None:
    expected = network_step(network(nn.BatchNorm2d), slice(None))
    for case in both:
        torch.testing.assert_close(case["network", checkpoint], expected, rtol=1e-8, atol=1e-11)


def test_checkpointing_changes_nothing(both: tuple[Case, Case]) -> None:
    for case in both:
        for kind in ("parameters", "buffers"):
            plain, recomputed = case["network", False][kind], case["network", True][kind]
            assert all(torch.equal(value, recomputed[name]) for name, value in plain.items())


def test_attention_behind_a_pool_trains_on_one_image_each(both: tuple[Case, Case]) -> None:
    assert all(case["one image each"].isfinite().all() for case in both)


def test_one_process_has_batch_norm_bit_for_bit() -> None:
    x = joined_batch(torch.float32)
    cases = [two_steps(kind(CHANNELS), x, slice(None)) for kind in (SyncBatchNorm, nn.BatchNorm2d)]
    torch.testing.assert_close(*cases, rtol=0, atol=0)


def test_state_dicts_are_interchangeable() -> None:
    norm = SyncBatchNorm(CHANNELS)
    for other in (nn.BatchNorm2d(CHANNELS), nn.SyncBatchNorm(CHANNELS)):
        assert list(norm.state_dict()) == list(other.state_dict())
        norm.load_state_dict(other.state_dict())


@pytest.mark.parametrize("momentum", [0.2, None])
def test_other_devices_have_torchs_function(momentum: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Recorder:
        @staticmethod
        def apply(*arguments: Any) -> Tensor:
            calls.append(inspect.signature(TorchFunction.forward).bind(None, *arguments).arguments)
            return arguments[0]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("resnest_det.layers.sync_batch_norm.TorchFunction", Recorder)
    norm = SyncBatchNorm(CHANNELS, eps=0.25, momentum=momentum)
    norm.num_batches_tracked += 3
    x = torch.empty(2, CHANNELS, 4, 4, device="meta")
    assert norm(x) is x
    (call,) = calls
    assert all(
        call[name] is own
        for name, own in {
            "input": x,
            "weight": norm.weight,
            "bias": norm.bias,
            "running_mean": norm.running_mean,
            "running_var": norm.running_var,
        }.items()
    )
    assert (call["eps"], call["momentum"], call["world_size"]) == (0.25, momentum or 1 / 4, 2)
    assert norm.num_batches_tracked == 4


def test_features_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        SyncBatchNorm(CHANNELS)(torch.randn(2, CHANNELS, 4))
