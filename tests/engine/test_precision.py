from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from resnest_det.engine import autocast
from resnest_det.engine.precision import gradient_scaler

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_are_computed_in_it_and_weights_are_not(precision: Any, dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    with autocast(precision, CPU):
        assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="precision 'fp8' is unknown; choose 'fp32', 'bf16' or 'fp16'"):
        autocast("fp8", CPU)  # type: ignore[arg-type]


def test_only_fp16_is_scaled() -> None:
    assert [gradient_scaler(name, CPU).is_enabled() for name in ("fp32", "bf16", "fp16")] == [False, False, True]
