"""Time of MeanIoU beside torchmetrics' MulticlassJaccardIndex: `python -m tests.benchmarks.mean_iou`.

One image's label map against its mask, 683x512 pixels and 150 classes, taken in and computed, on the CPU. The
ways are interleaved, so that a slow spell of the machine meets all of them. Prints a Markdown table of medians
with (lowest-highest), and fails where the ways disagree or MeanIoU is not as fast as required.

MeanIoU gets the mask as data sets yield it, in bytes, and once in the int64 that torchmetrics needs, which is
converted beforehand. MeanIoU always checks the labels and computes all of its numbers; torchmetrics computes
mIoU, and checks labels unless told not to.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from resnest_det.evaluation import MeanIoU

HEIGHT, WIDTH, NUM_CLASSES, IGNORED = 512, 683, 150, 255
REQUIRED = 5  # times faster than torchmetrics as it comes
TORCHMETRICS = "MulticlassJaccardIndex"


def label_maps(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A prediction (H, W) int64 that is right in most places, and a mask (H, W) uint8 of patches, some ignored."""
    generator = torch.Generator().manual_seed(seed)

    def patches(num_values: int, rows: int, columns: int) -> Tensor:
        values = torch.randint(0, num_values, (1, 1, rows, columns), generator=generator).float()
        return F.interpolate(values, size=(HEIGHT, WIDTH))[0, 0].long()

    mask = patches(NUM_CLASSES, 16, 20)
    prediction = torch.where(patches(4, 60, 80) == 0, patches(NUM_CLASSES, 60, 80), mask)
    mask[patches(10, 16, 20) == 0] = IGNORED
    return prediction, mask.to(torch.uint8)


def ways() -> dict[str, Callable[[], float]]:
    """Each a function from nothing to the mIoU."""
    prediction, mask = label_maps()
    long_mask = mask.long()
    ours = MeanIoU({label: str(label) for label in range(NUM_CLASSES)}, ignore_index=IGNORED)
    checked = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORED)
    unchecked = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORED, validate_args=False)

    def by_ours(target: Tensor) -> float:
        ours.reset()
        ours.update(prediction[None], target[None])
        return ours.compute()["mIoU"]

    def by_torchmetrics(metric: MulticlassJaccardIndex) -> float:
        metric.reset()
        metric.update(prediction[None], long_mask[None])
        return float(metric.compute())

    return {
        "MeanIoU": lambda: by_ours(mask),
        "MeanIoU, int64 mask": lambda: by_ours(long_mask),
        TORCHMETRICS: lambda: by_torchmetrics(checked),
        f"{TORCHMETRICS}(validate_args=False)": lambda: by_torchmetrics(unchecked),
    }


def spread(values: list[float], digits: int) -> str:
    """Median (lowest-highest)."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=101, help="runs of each way")
    repeats: int = parser.parse_args().repeats
    methods = ways()
    values = {name: method() for name, method in methods.items()}  # which also warms up
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"{WIDTH}x{HEIGHT} pixels, {NUM_CLASSES} classes, {torch.get_num_threads()} threads; median of {repeats} "
        f"(lowest-highest)\n\n| way | ms | times MeanIoU's | mIoU |\n|---|---|---|---|"
    )
    for name, times in seconds.items():
        milliseconds = spread([1000 * second for second in times], 2)
        print(f"| {name} | {milliseconds} | {median[name] / median['MeanIoU']:.1f} | {values[name]:.6f} |")
    # torchmetrics divides in float32.
    assert max(values.values()) - min(values.values()) < 1e-6, f"the ways disagree: {values}"
    ratio = median[TORCHMETRICS] / median["MeanIoU"]
    assert ratio >= REQUIRED, f"{ratio:.1f} times faster than torchmetrics, not the {REQUIRED} required"


if __name__ == "__main__":
    main()
