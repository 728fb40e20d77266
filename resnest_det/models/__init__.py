"""Detectors and segmenters: a backbone, a neck and a head."""

from resnest_det.models.faster_rcnn import faster_rcnn

__all__ = ["faster_rcnn"]
