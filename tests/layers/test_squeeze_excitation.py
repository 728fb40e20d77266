"""SqueezeExcitation against a plain loop, timm's and torchvision's modules."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from timm.layers import SEModule, SqueezeExcite
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import SqueezeExcitation as TorchvisionSqueezeExcitation

from resnest_det.layers import SqueezeExcitation
from tests.layers.gradients import output_and_gradients

SHAPES = [
    ((3, 24), 1),
    ((3, 24, 5), 1),
    ((3, 24, 5, 4), 1),
    ((3, 24, 2, 3, 4), 1),
    ((3, 24), -1),
    ((3, 7, 24), -1),
    ((3, 5, 4, 24), -1),
]


def plain_squeeze_excitation(layer: SqueezeExcitation, x: Tensor) -> Tensor:
    """The paper's formulas, sample by sample and group by group."""
    groups = layer.fc1.groups
    samples = []
    for sample in x.movedim(layer.channel_dim, 1):
        channels = len(sample)
        means = torch.stack([sample[c].mean() for c in range(channels)])
        logits = []
        for group in range(groups):
            own = slice(group * channels // groups, (group + 1) * channels // groups)
            hidden = len(layer.fc1.weight) // groups
            rows = slice(group * hidden, (group + 1) * hidden)
            inner = (layer.fc1.weight[rows, :, 0, 0] @ means[own] + layer.fc1.bias[rows]).clamp(min=0)
            logits.append(layer.fc2.weight[own, :, 0, 0] @ inner + layer.fc2.bias[own])
        z = torch.cat(logits)
        # torch's own hard sigmoid, whose derivative holds 1/6 in float32; its values are tested below.
        scale = F.hardsigmoid(z) if layer.gate == "hard_sigmoid" else 1 / (1 + torch.exp(-z))
        scaled = torch.stack([sample[c] * scale[c] for c in range(channels)])
        samples.append(sample + scaled if layer.residual else scaled)
    return torch.stack(samples).movedim(1, layer.channel_dim)


@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"reduction": 4},
        {"reduction": 4, "groups": 3},
        {"hidden_channels": 5, "gate": "hard_sigmoid"},
        {"hidden_channels": lambda channels: channels // 3, "residual": True, "groups": 2},
    ],
    ids=["plain", "groups", "hard", "residual"],
)
def test_equals_the_plain_formulas(shape: tuple[int, ...], channel_dim: int, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = SqueezeExcitation(24, channel_dim=channel_dim, **arguments).double()
    x = torch.randn(shape, dtype=torch.float64)
    parameters = list(layer.parameters())
    expected = output_and_gradients(lambda x: plain_squeeze_excitation(layer, x), x, parameters)
    torch.testing.assert_close(output_and_gradients(layer, x, parameters), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SqueezeExcitation(64), SEModule(64, rd_divisor=1)),
        (SqueezeExcitation(64, reduction=4), SqueezeExcite(64, rd_ratio=1 / 4, rd_divisor=1)),
        (SqueezeExcitation(64, hidden_channels=12), SEModule(64, rd_channels=12)),
        (SqueezeExcitation(64, gate="hard_sigmoid"), SEModule(64, rd_divisor=1, gate_layer="hard_sigmoid")),
        (SqueezeExcitation(64), TorchvisionSqueezeExcitation(64, 4)),
        # The form and the width of MobileNetV3's blocks.
        (
            SqueezeExcitation(64, reduction=4, gate="hard_sigmoid"),
            TorchvisionSqueezeExcitation(64, 16, scale_activation=nn.Hardsigmoid),
        ),
    ],
    ids=["timm", "timm-4", "timm-width", "timm-hard", "torchvision", "torchvision-mobilenet"],
)
def test_equals_timm_and_torchvision_by_name(ours: SqueezeExcitation, theirs: nn.Module) -> None:
    torch.manual_seed(0)
    ours.double().load_state_dict(theirs.double().state_dict())
    x = 3 * torch.randn(2, 64, 5, 7, dtype=torch.float64)
    expected = output_and_gradients(theirs, x, [theirs.get_parameter(name) for name, _ in ours.named_parameters()])
    got = output_and_gradients(ours, x, list(ours.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_rule_gives_the_widths_of_timm() -> None:
    def multiple_of_8(channels: int) -> int:
        return max(8, int(channels / 16 + 4) // 8 * 8)

    for channels in (16, 64, 72, 200, 256, 264, 330, 2048):
        layer = SqueezeExcitation(channels, hidden_channels=multiple_of_8)
        assert layer.fc1.out_channels == SEModule(channels).fc1.out_channels


@pytest.mark.parametrize(("channels", "reduction", "width"), [(64, 16, 4), (64, 2.5, 25), (30, 16, 1), (8, 16, 1)])
def test_width_by_reduction(channels: int, reduction: float, width: int) -> None:
    assert SqueezeExcitation(channels, reduction=reduction).fc1.out_channels == width


def test_hard_sigmoid_is_a_line_between_0_and_1() -> None:
    layer = SqueezeExcitation(5, gate="hard_sigmoid", zero_init=True)
    with torch.no_grad():
        layer.fc2.bias.copy_(torch.tensor([-4.0, -3.0, 1.5, 3.0, 7.0]))
    torch.testing.assert_close(layer(torch.ones(1, 5)), torch.tensor([[0.0, 0.0, 0.75, 1.0, 1.0]]))


@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
def test_zero_init_starts_at_one_half(gate: Any) -> None:
    x = torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(SqueezeExcitation(32, gate=gate, zero_init=True)(x), 0.5 * x)
    torch.testing.assert_close(SqueezeExcitation(32, gate=gate, zero_init=True, residual=True)(x), 1.5 * x)


def test_zero_init_learns() -> None:
    torch.manual_seed(0)
    layer = SqueezeExcitation(32, zero_init=True)
    layer(torch.randn(4, 32, 4, 4)).square().sum().backward()
    assert layer.fc2.weight.grad.any()
    assert layer.fc2.bias.grad.any()


def test_no_constant_weight_stands_for_the_gate() -> None:
    """BatchNorm folds into its convolution exactly; SE, whose scale is another for each image, does not."""
    torch.manual_seed(0)
    conv, norm, attention = nn.Conv2d(8, 16, 3).eval(), nn.BatchNorm2d(16).eval(), SqueezeExcitation(16, reduction=1)
    first, second = torch.randn(2, 1, 8, 6, 6)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    torch.testing.assert_close(fuse_conv_bn_eval(conv, norm)(second), norm(conv(second)))
    scale = (attention(conv(first)) / conv(first)).mean((0, 2, 3))
    folded = (conv.weight * scale[:, None, None, None], conv.bias * scale)
    torch.testing.assert_close(F.conv2d(first, *folded), attention(conv(first)))
    off = (F.conv2d(second, *folded) - attention(conv(second))).abs().max()
    assert off > 0.01


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # of the exporter itself
@pytest.mark.parametrize(("gate", "operator"), [("sigmoid", "Sigmoid"), ("hard_sigmoid", "HardSigmoid")])
def test_the_gate_is_one_operator_in_onnx(gate: Any, operator: str) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layer, x = SqueezeExcitation(32, gate=gate).eval(), torch.randn(2, 32, 9, 6)
    layer.fc2.bias.data.uniform_(-4, 4)  # beyond both ends of the line
    file = io.BytesIO()
    torch.onnx.export(layer, (x,), file, dynamo=False, opset_version=17)
    operators = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert [name for name in operators if "Sigmoid" in name] == [operator]
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), layer(x).detach())


def test_children() -> None:
    assert [name for name, _ in SqueezeExcitation(32).named_children()] == ["fc1", "relu", "fc2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels=0 and groups=1 must both be 1 or more"),
        ({"groups": 0}, "channels=32 and groups=0 must both be 1 or more"),
        ({"reduction": 0}, "reduction=0 must be above 0"),
        ({"hidden_channels": 0}, "hidden_channels gives 0 for channels=32; it must be an integer of 1"),
        (
            {"hidden_channels": lambda channels: channels / 4},
            "hidden_channels gives 8.0 for channels=32; it must be an int",
        ),
        ({"hidden_channels": lambda channels: channels - 40}, "hidden_channels gives -8 for channels=32"),
        ({"gate": "tanh"}, "gate='tanh' is unknown; choose 'sigmoid' or 'hard_sigmoid'"),
        ({"groups": 3, "hidden_channels": 6}, "groups=3 must divide channels=32 and the hidden width 6"),
        ({"groups": 4}, "groups=4 must divide channels=32 and the hidden width 2, which hidden_channels sets"),
        ({"channel_dim": 2}, r"channel_dim=2 must be 1, as in \(N, C, H, W\), or -1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SqueezeExcitation(**{"channels": 32, **arguments})


@pytest.mark.parametrize(
    ("channel_dim", "shape", "message"),
    [
        (1, (32,), r"x of shape \(32,\) must have channels=32 in dimension 1 behind a batch dimension"),
        (-1, (32,), r"x of shape \(32,\) must have channels=32 in dimension -1 behind a batch dimension"),
        (1, (2, 7, 32), r"x of shape \(2, 7, 32\) .* channel_dim=-1 takes \(N, \.\.\., C\)"),
        (-1, (2, 32, 7), r"x of shape \(2, 32, 7\) .* channel_dim=1 takes \(N, C, \.\.\.\)"),
    ],
)
def test_wrong_input(channel_dim: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SqueezeExcitation(32, channel_dim=channel_dim)(torch.randn(shape))
