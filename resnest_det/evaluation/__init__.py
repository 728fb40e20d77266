"""How good a model is: the loop over a validation set, and the metrics it feeds."""

from resnest_det.evaluation.coco_map import ClassAveragePrecision, CocoMeanAveragePrecision
from resnest_det.evaluation.run import Metric, evaluate

__all__ = ["ClassAveragePrecision", "CocoMeanAveragePrecision", "Metric", "evaluate"]
