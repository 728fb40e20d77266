"""The roofline: how fast a machine multiplies and copies, and the time that these bound a model's pass by from below.

Paper: Williams et al., "Roofline: An Insightful Visual Performance Model", CACM 52(4), 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from resnest_det.deploy.profiling import Operation

_ROUNDS = 7
_MATRIX_SIDE = {"cpu": 1536, "cuda": 8192}
# Channels, kernel and side of the features: those of ResNet's stages, where libraries are at their best.
_CONVOLUTIONS = ((64, 3, 56), (128, 3, 56), (256, 3, 56), (256, 3, 28), (1024, 1, 28))
_CONVOLUTION_IMAGES = {"cpu": 4, "cuda": 64}
_COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far more than any cache holds


@dataclass(frozen=True)
class Machine:
    """What a machine reaches at its best.

    Attributes:
        matmul: FLOP/s of a product of square matrices, which some libraries are slow at where others' convolutions
            are not.
        convolution: FLOP/s of the fastest of several convolutions, in either layout.
        copy: bytes/s read and written by the copy of a large tensor.
    """

    matmul: float
    convolution: float
    copy: float

    @property
    def arithmetic(self) -> float:
        """FLOP/s of the faster of the two."""
        return max(self.matmul, self.convolution)


@torch.no_grad()
def measure_machine(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure a machine's rates, in a few seconds: the best of several rounds each.

    Args:
        device: "cpu", with as many threads as torch has, or a CUDA device.
        dtype: of the matrices and convolutions.
    """
    device = torch.device(device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    side, images = _MATRIX_SIDE[kind], _CONVOLUTION_IMAGES[kind]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    matmul = 2 * side**3 / _least(lambda: torch.mm(left, right, out=product), device)
    convolution = 0.0
    for channels, kernel, size in _CONVOLUTIONS:
        flops = 2 * images * size**2 * channels**2 * kernel**2
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(images, channels, size, size, device=device, dtype=dtype).to(memory_format=layout)
            weight = torch.randn(channels, channels, kernel, kernel, device=device, dtype=dtype).to(
                memory_format=layout
            )
            seconds = _least(lambda x=x, weight=weight: F.conv2d(x, weight, padding="same"), device)  # type: ignore[misc]
            convolution = max(convolution, flops / seconds)
    source = torch.ones(_COPIED_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _least(lambda: target.copy_(source), device)
    return Machine(matmul, convolution, copy)


def least_seconds(operations: Sequence[Operation], machine: Machine) -> float:
    """The time below which a pass cannot go by these rates.

    Each operation takes at least as long as its arithmetic at the machine's best rate, and as long as its tensors at
    its copy bandwidth; whatever stands between the operations counts for nothing. A cache that holds an operation's
    tensors is faster than the copy, so that small images may come below the second of the two.

    Args:
        operations: of the pass, see profiling.count_operations.
        machine: its rates.
    """
    return sum(max(2 * operation.macs / machine.arithmetic, operation.moved / machine.copy) for operation in operations)


def _least(run: Callable[[], object], device: torch.device) -> float:
    """The seconds of the fastest of several rounds."""
    best = float("inf")
    for _ in range(_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
