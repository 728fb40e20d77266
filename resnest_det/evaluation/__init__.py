"""How good a model is: the loop over a validation set, the metrics it feeds, and what keeps them below 1."""

from resnest_det.evaluation.box_fusion import non_maximum_suppression, weighted_boxes_fusion
from resnest_det.evaluation.coco_map import ClassAveragePrecision, CocoMeanAveragePrecision
from resnest_det.evaluation.coco_results import read_coco_results, write_coco_results
from resnest_det.evaluation.detection_errors import (
    ConfusionMatrix,
    ErrorBreakdown,
    ImageF1,
    PrecisionRecall,
    confusion_matrix,
    error_breakdown,
    error_meanings,
    image_f1_scores,
    precision_recall,
)
from resnest_det.evaluation.detection_inference import DetectionInference
from resnest_det.evaluation.image_boxes import ImageBoxes
from resnest_det.evaluation.miou import ClassIoU, MeanIoU
from resnest_det.evaluation.run import ImageMetric, Metric, evaluate
from resnest_det.evaluation.segmentation import SegmentationInference

__all__ = [
    "ClassAveragePrecision",
    "ClassIoU",
    "CocoMeanAveragePrecision",
    "ConfusionMatrix",
    "DetectionInference",
    "ErrorBreakdown",
    "ImageBoxes",
    "ImageF1",
    "ImageMetric",
    "MeanIoU",
    "Metric",
    "PrecisionRecall",
    "SegmentationInference",
    "confusion_matrix",
    "error_breakdown",
    "error_meanings",
    "evaluate",
    "image_f1_scores",
    "non_maximum_suppression",
    "precision_recall",
    "read_coco_results",
    "weighted_boxes_fusion",
    "write_coco_results",
]
