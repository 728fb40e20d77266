"""Models measured side by side: order and number of the rounds, and figures that are known otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn

from resnest_det import create_backbone
from resnest_det.deploy import benchmark as module
from resnest_det.deploy.benchmark import (
    Candidate,
    compile_frozen,
    example_images,
    interleaved,
    measure,
    run_inference,
    spread,
    task_of,
    training_step,
)
from resnest_det.deploy.named_models import build_named, is_named, is_ours
from resnest_det.deploy.roofline import Machine
from resnest_det.models import deeplabv3plus, faster_rcnn, mask_rcnn

RESNET18_PARAMETERS = 11_689_512  # torchvision's documentation


def test_rounds_are_interleaved_in_alternating_order() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = interleaved(runs, rounds=3, warm_up=2)
    assert "".join(calls) == "abccbaabccbaabc"
    assert {name: len(own) for name, own in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_each_is_given_its_own_seconds() -> None:
    seconds = interleaved({"short": lambda: None, "long": lambda: time.sleep(0.02)}, rounds=2, warm_up=0)
    assert max(seconds["short"]) < 0.02 <= min(seconds["long"])


@pytest.mark.parametrize(
    ("runs", "rounds", "warm_up", "message"),
    [
        ({}, 1, 0, "runs is empty"),
        ({"a": int}, 0, 0, "rounds=0 must be 1 or more"),
        ({"a": int}, 1, -1, "warm_up=-1 0 or more"),
    ],
)
def test_what_cannot_be_timed(runs: dict[str, Callable[[], object]], rounds: int, warm_up: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interleaved(runs, rounds=rounds, warm_up=warm_up)


def test_cuda_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("record")

        def synchronize(self) -> None:
            told.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 250.0

    def device(own: torch.device) -> nullcontext[None]:
        told.append(str(own))
        return nullcontext()

    fake = SimpleNamespace(Event=Event, synchronize=lambda: told.append("synchronize"), device=device)
    monkeypatch.setattr(module.torch, "cuda", fake)
    runs = {"a": lambda: told.append("run")}
    assert interleaved(runs, rounds=1, warm_up=0, device="cuda:1") == {"a": [0.25]}
    assert told == ["cuda:1", "synchronize", "record", "run", "record", "wait"]


def test_spread() -> None:
    assert spread([0.0302, 0.01, 0.02]) == "20 (10-30)"
    assert spread([0.00125], digits=2) == "1.25 (1.25-1.25)"


SMALL_DETECTOR = {"fpn_channels": 16, "box_head_channels": 16, "min_size": 64, "max_size": 64}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "classification": lambda: create_backbone("resnest14", num_classes=4),
    "dense logits": lambda: nn.Sequential(nn.Conv2d(3, 5, 1)),
    "segmentation": lambda: deeplabv3plus(create_backbone("resnet18", output_stride=16), 3, head_channels=16),
    "detection": lambda: faster_rcnn(create_backbone("resnet18"), 3, **SMALL_DETECTOR),
    "detection with masks": lambda: mask_rcnn(create_backbone("resnet18"), 3, **SMALL_DETECTOR, mask_head_channels=16),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    task = task_of(model)
    assert task == {"dense logits": "classification", "detection with masks": "detection"}.get(name, name)
    images = example_images(task, 2, 64, "channels_last", "cpu")
    training_step(model, task, images)
    used = [key for key, own in model.named_parameters() if own.grad is not None and own.grad.isfinite().all()]
    assert used == [key for key, _ in model.named_parameters()]
    training_step(model, task, images, torch.bfloat16)


def test_the_same_images_in_either_layout() -> None:
    batch = example_images("classification", 2, 8, "channels_last", "cpu")
    assert isinstance(batch, Tensor)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, example_images("segmentation", 2, 8, "NCHW", "cpu"))
    listed = example_images("detection", 2, 8, "channels_last", "cpu")
    assert torch.equal(torch.stack(listed), batch)


def candidate(name: str, model: nn.Module, *, trains: bool = True) -> Candidate:
    return Candidate(name, "NCHW", "classification", model, model, model if trains else None)


def test_measurements() -> None:
    net = create_backbone("resnet18")
    machine = Machine(matmul=1.0, convolution=2.0, copy=float("inf"))  # a multiplication and its addition a second
    plain, alone = measure(
        [candidate("plain", net), candidate("no training", net, trains=False)],
        size=64, batch_size=2, rounds=3, train=True, machine=machine,
    )  # fmt: skip
    assert plain.parameters == RESNET18_PARAMETERS
    # 1.814 GMACs at 224 x 224, of which the classifier's half a million do not change with the size.
    assert plain.gigamacs == pytest.approx((1.814 - 5.12e-4) * (64 / 224) ** 2 + 5.12e-4, rel=1e-3)
    assert plain.least_seconds == pytest.approx(1e9 * plain.gigamacs)
    assert [len(plain.latency), len(plain.batch), len(plain.training_step)] == [3, 3, 3]
    assert plain.images_per_second == 2 / sorted(plain.batch)[1]
    weights = 4 * RESNET18_PARAMETERS
    assert weights < plain.inference_memory < 1.5 * weights
    assert 2 * weights < plain.training_memory < 3 * weights  # with the gradients
    assert (alone.training_step, alone.training_memory) == ([], None)
    assert alone.inference_memory == plain.inference_memory
    assert all(parameter.grad is None for parameter in net.parameters())


def test_what_is_no_module_is_timed_alone() -> None:
    (own,) = measure([Candidate("f", "NCHW", "classification", Tensor.sum, None, None)], size=8, batch_size=1, rounds=1)
    assert len(own.latency) == 1
    assert (own.parameters, own.gigamacs, own.inference_memory, own.least_seconds) == (None, None, None, None)


def test_mistaken_measurements() -> None:
    own = candidate("twice", nn.Conv2d(3, 1, 1))
    with pytest.raises(ValueError, match="two models are called 'twice, NCHW'; name each of them once"):
        measure([own, candidate("other", nn.Conv2d(3, 1, 1)), own], size=8, batch_size=1, rounds=1)
    with pytest.raises(ValueError, match="size=0 and batch_size=1 must both be 1 or more"):
        measure([own], size=0, batch_size=1, rounds=1)


@pytest.mark.slow
def test_a_frozen_network_computes_the_same() -> None:
    net = create_backbone("resnet18", num_classes=4).eval()
    examples = [example_images("classification", number, 32, "NCHW", "cpu") for number in (1, 2)]
    compiled = compile_frozen(net, examples)
    for images in examples:
        torch.testing.assert_close(run_inference(compiled, images), run_inference(net, images), atol=1e-5, rtol=1e-5)
    # Frozen: the weights are in the code, and the module's own are not read.
    before = run_inference(compiled, examples[0])
    with torch.no_grad():
        net.fc.bias += 1.0
    assert torch.equal(run_inference(compiled, examples[0]), before)


class _Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.slow
def test_any_number_of_models_is_compiled() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for size in range(1, 11):
        run_inference(compile_frozen(_Scaled(), [torch.rand(1, 3, size, 8)]), torch.rand(1, 3, size, 8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 10


@pytest.mark.parametrize(
    ("name", "task", "ours"),
    [
        ("resnest14", "classification", True),
        ("fcos:resnet18", "detection", True),
        ("deeplabv3plus:resnet18", "segmentation", True),
        ("timm:resnest14d", "classification", False),
        ("torchvision:resnet18", "classification", False),
        ("torchvision:ssdlite320_mobilenet_v3_large", "detection", False),
        ("torchvision:lraspp_mobilenet_v3_large", "classification", False),
        ("released:resnest50_fast_1s1x64d", "classification", False),
        ("smp:tu-resnest14d", "classification", False),
    ],
)
def test_models_by_name(name: str, task: str, ours: bool) -> None:
    model = build_named(name, size=64)
    assert not model.training
    assert (task_of(model), is_ours(name), is_named(name)) == (task, ours, True)
    if name.startswith("fcos"):
        assert (model.transform.min_size, model.transform.max_size) == ((64,), 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnest51", "resnest_det has no model 'resnest51'; did you mean 'resnest50'?"),
        ("faster_rcnn:resnet19", "resnest_det has no model 'resnet19'; did you mean 'resnet18'?"),
        ("tim:resnest14d", "the model 'tim:resnest14d' begins with 'tim', which is none of faster_rcnn, "),
        ("timm:resnest14x", "timm has no model 'resnest14x'; did you mean 'resnest14d'?"),
        ("torchvision:resnet51", "torchvision has no model 'resnet51'; did you mean 'resnet"),
        ("released:resnest51", "the released package has no model 'resnest51'; did you mean 'resnest50'?"),
        ("smp:tu-resnest14x", "segmentation-models-pytorch builds no encoder 'tu-resnest14x': "),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the next line reads it)
        build_named(name, size=64)
    assert is_named(name) == (":" in name and not name.startswith("tim:"))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("package", "name"),
    [("timm", "timm:resnest14d"), ("resnest", "released:resnest50"), ("segmentation_models_pytorch", "smp:resnet18")],
)
def test_packages_that_are_not_installed(package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"cannot be imported .*; install resnest-det\[oracles\]"):
        build_named(name, size=64)
