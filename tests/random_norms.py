"""Norms as of a trained network, for tests that compare two implementations."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def randomise_norms(net: nn.Module) -> nn.Module:
    """Statistics and affine as of a trained network, so that a norm left out or misplaced shows.

    The last norm of a block is small: the features of 269 layers then stay of the order of 1, and an absolute
    difference means something.
    """
    generator = torch.Generator().manual_seed(1)
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            small = 0.1 if name.endswith("bn3") else 1.0
            shape = module.weight.shape
            module.weight.copy_(small * (0.5 + 0.5 * torch.rand(shape, generator=generator)))
            module.bias.copy_(0.1 * small * torch.randn(shape, generator=generator))
            module.running_mean.copy_(0.1 * torch.randn(shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
    return net
