"""Data sets, augmentation and loaders. Images are uint8 RGB tensors (3, H, W); nothing here normalises."""

from resnest_det.data.ade20k import ADE20K, ADE20K_CLASS_NAMES, ADE20K_PALETTE
from resnest_det.data.augment import DetectionAugmentation, SegmentationAugmentation
from resnest_det.data.class_list import read_class_list
from resnest_det.data.coco import CocoDetection
from resnest_det.data.loaders import error_message, eval_loader, train_loader
from resnest_det.data.mask_folder import MaskFolder

__all__ = [
    "ADE20K",
    "ADE20K_CLASS_NAMES",
    "ADE20K_PALETTE",
    "CocoDetection",
    "DetectionAugmentation",
    "MaskFolder",
    "SegmentationAugmentation",
    "error_message",
    "eval_loader",
    "read_class_list",
    "train_loader",
]
