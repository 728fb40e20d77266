"""Detectors and segmenters: a backbone, a neck and a head."""

from resnest_det.models.deeplabv3plus import DeepLabV3Plus, deeplabv3plus
from resnest_det.models.faster_rcnn import faster_rcnn
from resnest_det.models.segmentation_loss import SegmentationLoss

__all__ = ["DeepLabV3Plus", "SegmentationLoss", "deeplabv3plus", "faster_rcnn"]
