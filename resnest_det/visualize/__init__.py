"""Arrays in, pictures out: nothing here reads a file, runs a model or knows a data set."""

from resnest_det.visualize.curves import draw_curves
from resnest_det.visualize.detection_plots import draw_confusion_matrix, draw_error_breakdown, draw_precision_recall
from resnest_det.visualize.detections import compare_detections, draw_boxes
from resnest_det.visualize.pictures import class_colour, contact_sheet
from resnest_det.visualize.segmentation import class_legend, compare_segmentations, paint_segmentation

__all__ = [
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
    "paint_segmentation",
]
