"""Arrays in, pictures out: nothing here reads a file, runs a model or knows a data set."""

from resnest_det.visualize.charts import Limits, line_chart
from resnest_det.visualize.curves import Curve, draw_curves, loss_curves, rate_curve, result_curves
from resnest_det.visualize.detection_plots import draw_confusion_matrix, draw_error_breakdown, draw_precision_recall
from resnest_det.visualize.detections import compare_detections, draw_boxes
from resnest_det.visualize.pictures import DISTINCT_COLOURS, class_colour, contact_sheet
from resnest_det.visualize.segmentation import (
    class_legend,
    compare_segmentations,
    draw_segmentation,
    paint_segmentation,
)

__all__ = [
    "DISTINCT_COLOURS",
    "Curve",
    "Limits",
    "class_colour",
    "class_legend",
    "compare_detections",
    "compare_segmentations",
    "contact_sheet",
    "draw_boxes",
    "draw_confusion_matrix",
    "draw_curves",
    "draw_error_breakdown",
    "draw_precision_recall",
    "draw_segmentation",
    "line_chart",
    "loss_curves",
    "paint_segmentation",
    "rate_curve",
    "result_curves",
]
