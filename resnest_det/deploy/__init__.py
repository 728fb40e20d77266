"""From a trained model to one that is deployed."""

from resnest_det.deploy.folding import fold_batch_norms
from resnest_det.deploy.inference import optimize_for_inference

__all__ = ["fold_batch_norms", "optimize_for_inference"]
