"""TensorBoard as a hook of the journal: scalars and pictures by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes a run's records for `tensorboard --logdir`, as a hook of the journal.

    Every number of a record becomes a scalar under the record's kind, such as train/loss or eval/AP; the learning rate
    is "lr". What is drawn after the checkpoint that a run resumes from is taken back, so that nothing stands there
    twice. Nothing is written before the first record.

    Args:
        folder: where its files go, such as the run folder.

    Raises:
        ValueError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"TensorBoard was asked for and cannot be imported ({error}): pip install 'resnest-det[tensorboard]', "
                f"or leave it out"
            ) from error
        self.folder = folder
        self._new_writer = SummaryWriter
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        """Draw a record: its numbers, or its picture."""
        if self._writer is None:
            self._writer = self._new_writer(str(self.folder), purge_step=self._purge_step)
        kind, step = record["kind"], record["step"]
        if kind == "picture":
            self._writer.add_image(record["name"], record["image"], step, dataformats="HWC")
            return
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("epoch", "step"):
                self._writer.add_scalar("lr" if name == "lr" else f"{kind}/{name}", value, step)

    def resume(self, step: int) -> None:
        """Take back what was drawn after that step, once there is something new to draw."""
        self._purge_step = step + 1

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.close()
