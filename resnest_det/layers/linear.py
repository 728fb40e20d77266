"""torch's Linear, by the faster of the two matrix products that torch has on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resnest_det.layers.fused import has_onednn_product, may_fuse, onednn_product

_MANY_ROWS = 16  # from which oneDNN's was the faster one


class OneDNNLinear(nn.Linear):
    """torch's Linear; float32 on the CPU by oneDNN's matrix product, forward and backward.

    torch's own is MKL's, which on processors that are not Intel's takes twice as long. On other devices, traced,
    compiled, under autocast and of few rows it is torch's.

    Shape:
        As of Linear.
    """

    @classmethod
    def like(cls, linear: nn.Linear) -> OneDNNLinear:
        """One with the parameters of another, which they share."""
        with torch.device("meta"):  # neither memory nor random numbers
            own = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        own.weight, own.bias = linear.weight, linear.bias
        return own.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features)."""
        if (
            may_fuse(input)
            and input.ndim == 2
            and len(input) >= _MANY_ROWS
            and input.shape[1] == self.in_features
            and input.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and has_onednn_product()
        ):
            return _Linear.apply(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


class _Linear(Function):
    """`x @ weight.T + bias`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            onednn_product(grad, weight.t()) if wants_x else None,
            onednn_product(grad.t(), x.t()) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )
