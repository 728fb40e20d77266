"""Data sets, augmentation and loaders. Images are uint8 RGB tensors (3, H, W); nothing here normalises."""

from resnest_det.data.ade20k import ADE20K, ADE20K_CLASS_NAMES, ADE20K_PALETTE
from resnest_det.data.augment import DetectionAugmentation, SegmentationAugmentation
from resnest_det.data.class_list import read_class_list
from resnest_det.data.coco import CocoDetection, CocoTargets, read_coco_targets
from resnest_det.data.loaders import error_message, eval_loader, repeat_factors, train_loader
from resnest_det.data.mask_folder import MaskFolder
from resnest_det.data.mixing import CopyPaste, Mosaic
from resnest_det.data.sharing import once_per_machine

__all__ = [
    "ADE20K",
    "ADE20K_CLASS_NAMES",
    "ADE20K_PALETTE",
    "CocoDetection",
    "CocoTargets",
    "CopyPaste",
    "DetectionAugmentation",
    "MaskFolder",
    "Mosaic",
    "SegmentationAugmentation",
    "error_message",
    "eval_loader",
    "once_per_machine",
    "read_class_list",
    "read_coco_targets",
    "repeat_factors",
    "train_loader",
]
