"""The conformance kit over every network of the table, and on networks that break each of its rules."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from resnest_det import create_backbone, list_backbones
from resnest_det.backbones import VARIANTS, Stage
from resnest_det.testing import check_backbone

# The first name of each network that is another one even at one block a stage: 101 layers are then the same as 50.
FORMS = list({repr(replace(VARIANTS[name], layers=())): name for name in reversed(list_backbones())}.values())[::-1]
# Those of them that the default run also compiles and exports.
COMPILED = ["resnest14", "se_resnet18", "sk_resnet50", "cbam_resnet18", "eca_resnet18"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Images of 64x64 gain little from more, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "resnet18" else pytest.mark.slow) for name in list_backbones()]
)
def test_every_network_conforms(name: str) -> None:
    check_backbone(create_backbone(name))


def test_every_family_has_its_forms() -> None:
    assert {"resnet18", "resnet50", "resnext50_32x4d", "resnest101", "se_resnext50_32x4d", *COMPILED} < set(FORMS)
    assert len([name for name in FORMS if "fast" in name]) == 7


@pytest.mark.parametrize("name", FORMS)
def test_every_form_conforms_at_one_block_a_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, name, replace(VARIANTS[name], layers=(1, 1, 1, 1)))
    check_backbone(create_backbone(name, num_classes=10), compile=name in COMPILED, export=name in COMPILED)


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm": "gn"},
        {"norm": "frozen_bn"},
        {"norm": "sync_bn"},
        {"output_stride": 8, "num_classes": 1},
        {"drop_path": 0.5, "checkpoint": True},
    ],
    ids=str,
)
def test_every_argument_of_create_backbone_conforms(arguments: dict[str, object]) -> None:
    check_backbone(create_backbone("resnest14", **arguments), compile=False, export="output_stride" in arguments)


# Networks that break a rule: a small one that is sound, and what is done to it.


def convolve(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )


class Small(nn.Module):
    """No ResNet: only the children that the contract asks for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(1)
        self.layer1 = Stage([convolve(8, 8)], channels=8, stride=4, checkpoint=False)
        self.layer2 = Stage([convolve(8, 16)], channels=16, stride=8, checkpoint=False)
        self.layer3 = Stage([convolve(16, 24)], channels=24, stride=16, checkpoint=False)
        self.layer4 = Stage([convolve(24, 32)], channels=32, stride=32, checkpoint=False)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 5)
        self.inplanes = 32

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def in_layer2(module: nn.Module) -> Small:
    """The small network with a module after the convolution of its second stage."""
    net = Small()
    net.layer2.append(module)
    return net


def before_layer2(module: nn.Module) -> Small:
    net = Small()
    net.layer2.insert(0, module)
    return net


def test_a_network_of_ones_own_conforms() -> None:
    check_backbone(Small())
    check_backbone(Small(), sizes=[(32, 48), (96, 33), (1, 1)])


def wrong_order_of_children() -> nn.Module:
    net = Small()
    bn1 = net.bn1
    del net.bn1
    net.bn1 = bn1
    return net


def further_child() -> nn.Module:
    net = Small()
    net.neck = nn.Identity()
    return net


def no_stated_stride() -> nn.Module:
    net = Small()
    del net.layer3.stride
    return net


def inplanes_of_another_stage() -> nn.Module:
    net = Small()
    net.inplanes = 24
    return net


class CallsTwice(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.relu(self.conv1(x)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class WorksBetweenChildren(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x)) * 2))
        return self.fc(self.avgpool(x).flatten(1))


def wrong_channels() -> nn.Module:
    net = Small()
    net.layer2.channels = 18
    return net


def wrong_stride() -> nn.Module:
    net = Small()
    net.layer4.stride = 16
    return net


class OneLogitTooMany(Small):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(super().forward(x), (0, 1))


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x


class WithoutEffect(Unused):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.scale


class InfiniteGradient(Unused):
    def forward(self, x: Tensor) -> Tensor:
        return x + (self.scale - self.scale.detach()).sqrt()


class MovingAverage(nn.Module):
    """Statistics of its own, which freezing knows nothing of."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(1), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.lerp_(x.detach().mean(), 0.5)
        return x + self.average


class OtherWhenFrozen(Unused):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale * (1 if self.scale.requires_grad else 2)


class NeverFrozen(Stage):
    """Takes no notice of requires_grad_(False)."""

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module:
        return self


def stage_that_is_never_frozen() -> nn.Module:
    net = Small()
    net.layer2 = NeverFrozen(list(net.layer2), channels=16, stride=8, checkpoint=False)
    return net


class TrainsBehindOthers(Unused):
    """Has a gradient only where what comes before it has one."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.scale if x.requires_grad else self.scale.detach())


class MeansInMemory(nn.Module):
    """Reads the memory as if it were NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        image, channel, row, _ = x.stride()
        order = x.as_strided(x.shape, (max(image, channel), x[0, 0].numel(), x.shape[3], 1))
        return order * torch.linspace(0.5, 1.5, x.shape[1])[:, None, None].to(x.dtype) + 0 * row


class NeedsContiguous(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


class FlatView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1).view(x.shape)


class SeesTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 2, 3), keepdim=True)


class InFloat32(nn.Module):
    """Has a constant of one type, as have those that forget to take the features' own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, torch.ones(x.shape[1], 1, 1, 1), groups=x.shape[1])


class Coarse(nn.Module):
    """Loses in half precision what it keeps in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1000) - 1000


class Overflows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 1e7) / 1e7


class Overflowing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient / 0 if torch.is_autocast_enabled("cpu") or gradient.dtype == torch.bfloat16 else gradient


class OverflowsUnderAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return Overflowing.apply(self.conv(x))


class CountsCopies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = 0.0

    def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
        other = CountsCopies()
        other.shift = self.shift + 1
        return other

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class NoPickle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.function = lambda x: x * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OtherInPickles(nn.Module):
    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
        return OtherInPickles(self.shift)

    def __reduce__(self) -> tuple[type[nn.Module], tuple[float]]:
        return OtherInPickles, (self.shift + 1,)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class BranchesOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x * 2


class OtherWhenCompiled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.compiler.is_dynamo_compiling() else x


class OtherWhenExported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.compiler.is_exporting() else x


class FixedBatch(nn.Module):
    """Reads the batch as a number of Python, which an export writes down."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), *x.shape[1:])


def message_of(net: nn.Module, *, compile: bool = False, export: bool = False) -> str:
    with pytest.raises(AssertionError) as caught:
        check_backbone(net, compile=compile, export=export)
    return str(caught.value)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (wrong_order_of_children, "names: the children are conv1 relu .* fc bn1; they must be conv1 bn1 relu"),
        (further_child, "names: the children are .* fc neck; they must be"),
        (no_stated_stride, "names: layer3.stride is None; a stage must state it as an integer"),
        (inplanes_of_another_stage, "names: inplanes is 24 and layer4.channels 32; they must be the same"),
        (CallsTwice, "call order: a forward pass called conv1 relu bn1 relu maxpool .*; it must call each child once"),
        (WorksBetweenChildren, r"call order: the children run by hand give other logits: they differ by \d"),
        (
            OneLogitTooMany,
            r"call order: the children run by hand give other logits: their shape is \(2, 5\) and not \(2, 6\)",
        ),
        (wrong_channels, r"shapes: layer2 gives \(2, 16, 8, 8\) for images of 64x64; .* must be \(2, 18, 8, 8\)"),
        (wrong_stride, r"shapes: layer4 gives \(2, 32, 3, 4\) for images of 65x97; .* must be \(2, 32, 5, 7\)"),
        (OneLogitTooMany, r"shapes: logits of 64x64 images are \(2, 6\); they must be \(2, 5\)"),
        (lambda: in_layer2(Infinite()), "shapes: logits of 64x64 images have NaN or infinite values"),
        (lambda: in_layer2(Unused()), "gradients: layer2.1.scale takes no part in the forward pass"),
        (lambda: in_layer2(WithoutEffect()), "gradients: layer2.1.scale has a gradient of zeros"),
        (lambda: in_layer2(InfiniteGradient()), "gradients: layer2.1.scale has a gradient with NaN or infinite"),
        (lambda: in_layer2(OtherWhenFrozen()), r"freezing: with trainable_stages=2, logits changed: they differ by \d"),
        (stage_that_is_never_frozen, "freezing: with trainable_stages=2, layer2.0.0.weight still requires a gradient"),
        (
            lambda: before_layer2(TrainsBehindOthers()),
            "freezing: with trainable_stages=3, layer2.0.scale has no gradient; what is not frozen must have one",
        ),
        (lambda: in_layer2(MovingAverage()), "freezing: with trainable_stages=2, the buffer layer2.1.average changed"),
        (lambda: in_layer2(MeansInMemory()), r"channels_last: channels_last gives other logits: they differ by \d"),
        (lambda: in_layer2(NeedsContiguous()), "channels_last: layer2 of channels_last images has strides"),
        (lambda: in_layer2(FlatView()), "channels_last: raised RuntimeError: view size is not compatible"),
        (lambda: in_layer2(SeesTheBatch()), "single images: images one by one give other logits than as a batch"),
        (lambda: in_layer2(MovingAverage(persistent=False)), "state dict: a network loaded from the file gives other"),
        (lambda: in_layer2(InFloat32()), "half precision: raised RuntimeError: "),
        (lambda: in_layer2(Coarse()), r"half precision: bfloat16 logits are off by \d.* of float32's"),
        (lambda: in_layer2(Overflows()), "half precision: float16 logits have NaN or infinite values"),
        (lambda: in_layer2(OverflowsUnderAutocast()), "half precision: under autocast to bfloat16, .* NaN or infinite"),
        (lambda: in_layer2(CountsCopies()), "copies: copy.deepcopy gives a network of other logits"),
        (lambda: in_layer2(OtherInPickles()), "copies: pickle gives a network of other logits"),
        (lambda: in_layer2(NoPickle()), "copies: raised .*pickle"),
    ],
)
def test_a_broken_rule_is_named(build: Callable[[], nn.Module], expected: str) -> None:
    message = message_of(build())
    assert re.search(f"- {expected}", message), message


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (BranchesOnValues(), "compile: raised "),
        (OtherWhenCompiled(), r"compile: the compiled network gives other logits: they differ by \d"),
    ],
    ids=["branches on values", "other when compiled"],
)
def test_a_network_that_does_not_compile(module: nn.Module, expected: str) -> None:
    net = in_layer2(module)
    check_backbone(net, compile=False, export=False)
    assert re.search(f"- {expected}", message_of(net, compile=True))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (BranchesOnValues(), "export: raised "),
        (FixedBatch(), "export: raised .*batch"),
        (OtherWhenExported(), r"export: the exported network gives other logits: they differ by \d"),
    ],
    ids=["branches on values", "fixed batch", "other when exported"],
)
def test_a_network_that_cannot_be_exported(module: nn.Module, expected: str) -> None:
    net = in_layer2(module)
    check_backbone(net, compile=False, export=False)
    assert re.search(f"- {expected}", message_of(net, export=True))


def test_every_fault_is_listed_and_what_was_raised_is_the_cause() -> None:
    net = in_layer2(nn.Sequential(Unused(), FlatView(), SeesTheBatch()))
    net.layer3.channels = 25
    net.inplanes = 7
    with pytest.raises(AssertionError) as caught:
        check_backbone(net, compile=False, export=False)
    first, *faults = str(caught.value).splitlines()
    assert first == "Small is no conforming backbone:"
    assert [fault.split(":")[0] for fault in faults] == [
        "- names",
        "- shapes",
        "- shapes",
        "- gradients",
        "- channels_last",
        "- single images",
    ]
    cause = caught.value.__cause__
    assert isinstance(cause, ExceptionGroup)
    assert [type(error) for error in cause.exceptions] == [RuntimeError]


def test_a_network_that_does_not_run() -> None:
    net = Small()
    net.fc = nn.Linear(33, 5)
    message = message_of(net)
    assert re.search("Small cannot be checked: .* must classify 64x64 images in eval mode, which raised Run", message)


@pytest.mark.parametrize("sizes", [(), ((64, 64), (0, 3)), ((64,),)])
def test_bad_sizes(sizes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sizes={sizes!r} must be one or more pairs (rows, columns)")):
        check_backbone(Small(), sizes=sizes)


@pytest.mark.parametrize("train", [True, False])
def test_the_network_is_left_as_it_is(train: bool) -> None:
    net = Small().train(train)
    net.layer1.requires_grad_(False)
    net(torch.rand(2, 3, 64, 64)).sum().backward()
    before = copy.deepcopy(net)
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    random_state = torch.get_rng_state()
    with torch.inference_mode():  # the caller's mode is no hindrance
        check_backbone(net)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [(name, m.training) for name, m in net.named_modules()] == [
        (n, m.training) for n, m in before.named_modules()
    ]
    assert repr(net) == repr(before)
    for (name, value), expected in zip(net.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    for (name, parameter), other in zip(net.named_parameters(), before.parameters(), strict=True):
        assert parameter.requires_grad == other.requires_grad
        assert (parameter.grad is None) == (grads[name] is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_what_is_zero_by_design_hides_no_parameter() -> None:
    """As of zero_init gates, and of blocks whose last norm starts at zero."""
    net = Small()
    for stage in (net.layer1, net.layer3):
        nn.init.zeros_(stage[0][1].weight)
    nn.init.zeros_(net.fc.weight)
    check_backbone(net, compile=False, export=False)


def test_a_frozen_network_has_no_gradients_to_check() -> None:
    check_backbone(Small().requires_grad_(False), compile=False, export=False)


def test_a_network_on_another_type_is_checked_in_float32() -> None:
    check_backbone(Small().half(), compile=False, export=False)
