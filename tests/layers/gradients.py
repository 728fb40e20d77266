"""Outputs and gradients of a layer and of its oracle, to be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def output_and_gradients(
    function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The output, then the gradients of x and of the parameters under one fixed weighting of the output."""
    x = x.detach().clone().requires_grad_()
    out = function(x)
    weighting = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return (out.detach(), *torch.autograd.grad((out * weighting).sum(), [x, *parameters]))
