"""The numbers a model computes in: float32, or 16 bits where they suffice."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

PrecisionName = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: PrecisionName, device: torch.device) -> AbstractContextManager[object]:
    """A block in which torch computes in `precision` what is safe in it: convolutions and matrix products.

    Weights stay float32, and so do sums and losses (Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740).

    Args:
        precision: "fp32" changes nothing; "bf16" has float32's range; "fp16" has not, and needs a gradient_scaler to
            train.
        device: where the model is.

    Raises:
        ValueError: no such precision, or the GPU has no bf16.
    """
    if precision == "fp32":
        return nullcontext()
    if precision not in _DTYPES:
        raise ValueError(f"precision {precision!r} is unknown; choose 'fp32', 'bf16' or 'fp16'")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"precision bf16: {name} does not compute in bfloat16; use fp16 or fp32")
    return torch.autocast(device.type, _DTYPES[precision])


def gradient_scaler(precision: PrecisionName, device: torch.device) -> torch.amp.GradScaler:
    """What keeps small gradients of fp16 from vanishing, a factor on the loss that adapts; for others it does nothing.

    A step whose gradients overflow is left out, and the factor halved; after 2000 steps without it is doubled. It
    starts at 1024, lower than torch's, so that a run does not begin with steps left out.
    """
    return torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=precision == "fp16")
