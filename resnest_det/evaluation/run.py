"""The evaluation loop: a model over a loader into a metric.

It knows neither detection nor segmentation: the metric gets what the model returned and what the loader
gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from resnest_det.distributed import images_to_device, rank


class Metric(Protocol):
    """What `evaluate` asks of a metric."""

    def reset(self) -> None:
        """Forget every image."""

    def update(self, predictions: Any, targets: Any) -> None:
        """Take in one batch: the model's predictions, on the device it made them, and the loader's targets."""

    def merge(self) -> None:
        """Take in what the other processes of the run saw; nothing to do in a single process."""

    def compute(self) -> dict[str, float]:
        """The named numbers over every image taken in."""
        ...


@runtime_checkable
class ImageMetric(Metric, Protocol):
    """A metric that keeps each image's score besides, by the image's name."""

    def update(self, predictions: Any, targets: Any, names: Sequence[str] | None = None) -> None:
        """Take in one batch, and the names of its images; whatever they are, the evaluation goes on."""

    @property
    def image_scores(self) -> Mapping[str, float]:
        """The score of each image that came with a name."""
        ...


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    metric: Metric,
    *,
    predict: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Runs `model` over `loader` in evaluation mode, without gradients, and computes `metric`.

    The metric is reset first and holds the whole evaluation afterwards. The training mode of every module
    is put back as it was, also when the model or the metric raises.

    In a distributed run each process brings its own part of the images, and every process returns the same
    numbers. The parts may differ in length, and one may be empty; a metric may refuse an image that two
    processes saw.

    Args:
        model: called with the images alone. A DistributedDataParallel model is run as the module it wraps.
        loader: yields batches that start with (images, targets), the images uint8 RGB: a list of (3, H, W)
            tensors or one (N, 3, H, W). They reach the model as float32 in [0, 1]. The targets stay where
            they are. A list of strings behind them is taken for the images' names.
        metric: see `Metric`; an `ImageMetric` gets the names too.
        predict: called as predict(model, images), returns the predictions where they take more than one call
            of the model; None: model(images).
        device: where the images go, which is where the model already is; None: the device of the model's
            first parameter.
        progress: show a progress bar on stderr, on the first process only and only in a terminal.

    Returns:
        What `metric.compute()` returned.
    """
    # After a training step, DistributedDataParallel synchronises buffers in the next forward pass, even in
    # evaluation mode, and so would wait for ever for a process that has no batch here.
    network = model.module if isinstance(model, DistributedDataParallel) else model
    if device is None:
        first_parameter = next(network.parameters(), None)
        device = torch.device("cpu") if first_parameter is None else first_parameter.device
    metric.reset()
    image_metric = metric if isinstance(metric, ImageMetric) else None
    # tqdm reads None as "off where stderr is no terminal".
    bar = tqdm(loader, desc="evaluate", leave=False, disable=None if progress and rank() == 0 else True)
    training_modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            for images, targets, *rest in bar:
                if len(images) == 0:  # every image of the batch was unreadable, and skipped
                    continue
                inputs = images_to_device(images, device)
                predictions = network(inputs) if predict is None else predict(network, inputs)
                if image_metric is not None and rest and _are_names(rest[0]):
                    image_metric.update(predictions, targets, rest[0])
                else:
                    metric.update(predictions, targets)
    finally:
        bar.close()
        # Module by module, as train() on the whole would wake up batch norms that were frozen in eval mode.
        for module, was_training in training_modes.items():
            module.training = was_training
    metric.merge()
    return metric.compute()


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(name, str) for name in value)
