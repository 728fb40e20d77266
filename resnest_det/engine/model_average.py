"""The exponential moving average of a model's weights, which often scores better than the weights themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnest_det.engine.parallel import load_whole_state, local_tensor


class ModelAverage:
    """A second model whose weights and buffers follow those of the first: average = d x average + (1 - d) x weights.

    The rate d rises as (1 + n) / (10 + n) over n updates up to `decay`, as TensorFlow's ExponentialMovingAverage has it
    (Polyak and Juditsky 1992 is the idea): a short run's average would otherwise be mostly the random start.

    Args:
        model: what is trained, before it is wrapped or sharded.
        decay: highest d, in (0, 1); 0.999 averages over about 1000 steps.

    Raises:
        ValueError: decay outside (0, 1).

    Attributes:
        model: the averaged model, of the same class; where the other is sharded, it must be sharded too.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay={decay} is outside (0, 1); use a value such as 0.999, or 0 for no average")
        self._decay = decay
        self._num_updates = 0
        self._averaged = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True)
        self._averaged.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The averaged model."""
        module: nn.Module = self._averaged.module
        return module

    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self._averaged.update_parameters(model)
        self._num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"model": self.model.state_dict(), "num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(), whose tensors are whole."""
        load_whole_state(self.model, state["model"])
        self._num_updates = state["num_updates"]
        self._averaged.n_averaged.fill_(self._num_updates)

    def _average(self, averages: Sequence[Tensor], weights: Sequence[Tensor], _num_averaged: Tensor | int) -> None:
        decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        own = [[local_tensor(tensor) for tensor in tensors] for tensors in (averages, weights)]
        get_ema_multi_avg_fn(decay)(*own, _num_averaged)
