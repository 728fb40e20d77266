"""Linear layers of oneDNN's matrix product, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resnest_det.layers import linear as module
from resnest_det.layers import plain_layers
from resnest_det.layers.linear import OneDNNLinear


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = [out.detach(), x.grad, *[parameter.grad for parameter in layer.parameters()]]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [15, 16, 100])
def test_is_torchs(bias: bool, rows: int) -> None:
    """It errs from float64 as torch's does in float32."""
    torch.manual_seed(0)
    plain = nn.Linear(70, 33, bias=bias)
    own = OneDNNLinear.like(plain)
    assert own.weight is plain.weight
    assert own.bias is plain.bias
    x = torch.randn(rows, 70)
    found = gradients(own, x)
    expected = gradients(plain.double(), x.double())
    for ours, exact in zip(found, expected, strict=True):
        assert ours is not None
        assert exact is not None
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_only_what_is_wanted_has_a_gradient() -> None:
    layer = OneDNNLinear(8, 4)
    layer.weight.requires_grad_(False)
    x = torch.randn(20, 8)
    out = layer(x)
    out.sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 20.0))
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize(
    "reason", ["few rows", "more dimensions", "float64", "bfloat16", "plain_layers", "no operator", "empty", "none"]
)
def test_where_it_is_of_onednn(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    product = module.onednn_product
    monkeypatch.setattr(module, "onednn_product", lambda *given: taken.append(1) or product(*given))
    layer, x = OneDNNLinear(8, 4), torch.randn(20, 8)
    if reason == "few rows":
        x = x[:15]
    elif reason == "more dimensions":
        x = x.view(2, 10, 8)
    elif reason == "float64":
        layer, x = layer.double(), x.double()
    elif reason == "no operator":
        monkeypatch.setattr(module, "has_onednn_product", lambda: False)
    elif reason == "empty":
        x = x[:0]
    if reason == "bfloat16":
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    elif reason == "plain_layers":
        with plain_layers():
            layer(x)
    else:
        assert layer(x).shape == (*x.shape[:-1], 4)
    assert bool(taken) == (reason == "none")


def test_wrong_features_are_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        OneDNNLinear(8, 4)(torch.randn(20, 7))


def test_like_another_takes_no_random_numbers() -> None:
    linear = nn.Linear(8, 4)
    state = torch.get_rng_state()
    own = OneDNNLinear.like(linear.eval())
    assert torch.equal(torch.get_rng_state(), state)
    assert not own.training
