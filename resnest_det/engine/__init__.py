"""Training: the loop, the optimiser and its schedule, checkpoints and the journal."""

from resnest_det.engine.checkpoint import check_class_names, load_checkpoint, save_checkpoint
from resnest_det.engine.fit import fit
from resnest_det.engine.journal import Journal, new_run_folder, read_metrics
from resnest_det.engine.optim import create_optimizer, create_schedule

__all__ = [
    "Journal",
    "check_class_names",
    "create_optimizer",
    "create_schedule",
    "fit",
    "load_checkpoint",
    "new_run_folder",
    "read_metrics",
    "save_checkpoint",
]
