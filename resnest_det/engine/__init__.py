"""Training: the loop, the optimiser and its schedule, checkpoints and the journal."""

from resnest_det.engine.checkpoint import (
    check_class_names,
    load_checkpoint,
    load_last,
    save_checkpoint,
    trained_class_names,
)
from resnest_det.engine.fit import fit
from resnest_det.engine.interruption import Interrupted
from resnest_det.engine.journal import Journal, new_run_folder, read_metrics
from resnest_det.engine.model_average import ModelAverage
from resnest_det.engine.optim import create_optimizer, create_schedule, describe_trainable, scaled_learning_rate
from resnest_det.engine.parallel import load_whole_state, shard, unsharded
from resnest_det.engine.precise_bn import recompute_batch_norms
from resnest_det.engine.precision import autocast
from resnest_det.engine.random_numbers import seed_random_numbers

__all__ = [
    "Interrupted",
    "Journal",
    "ModelAverage",
    "autocast",
    "check_class_names",
    "create_optimizer",
    "create_schedule",
    "describe_trainable",
    "fit",
    "load_checkpoint",
    "load_last",
    "load_whole_state",
    "new_run_folder",
    "read_metrics",
    "recompute_batch_norms",
    "save_checkpoint",
    "scaled_learning_rate",
    "seed_random_numbers",
    "shard",
    "trained_class_names",
    "unsharded",
]
