"""How good a model is: the loop over a validation set, and the metrics it feeds."""

from resnest_det.evaluation.coco_map import ClassAveragePrecision, CocoMeanAveragePrecision
from resnest_det.evaluation.miou import ClassIoU, MeanIoU
from resnest_det.evaluation.run import Metric, evaluate
from resnest_det.evaluation.segmentation import SegmentationInference

__all__ = [
    "ClassAveragePrecision",
    "ClassIoU",
    "CocoMeanAveragePrecision",
    "MeanIoU",
    "Metric",
    "SegmentationInference",
    "evaluate",
]
