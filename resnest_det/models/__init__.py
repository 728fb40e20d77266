"""Detectors and segmenters: a backbone, a neck and a head."""

from resnest_det.models.cascade_rcnn import CascadeRCNN, cascade_rcnn
from resnest_det.models.deeplabv3plus import DeepLabV3Plus, deeplabv3plus
from resnest_det.models.faster_rcnn import faster_rcnn
from resnest_det.models.fcos import fcos
from resnest_det.models.mask_rcnn import mask_rcnn
from resnest_det.models.retinanet import retinanet
from resnest_det.models.roi_align import RowRoIAlign
from resnest_det.models.segmentation_loss import SegmentationLoss

__all__ = [
    "CascadeRCNN",
    "DeepLabV3Plus",
    "RowRoIAlign",
    "SegmentationLoss",
    "cascade_rcnn",
    "deeplabv3plus",
    "faster_rcnn",
    "fcos",
    "mask_rcnn",
    "retinanet",
]
