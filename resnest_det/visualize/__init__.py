"""Arrays in, pictures out: nothing here reads a file, runs a model or knows a data set."""

from resnest_det.visualize.detections import class_colour, compare_detections, contact_sheet, draw_boxes

__all__ = ["class_colour", "compare_detections", "contact_sheet", "draw_boxes"]
