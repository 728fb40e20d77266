"""Data sets, augmentation and loaders. Images are uint8 RGB tensors (3, H, W); nothing here normalises."""

from resnest_det.data.augment import DetectionAugmentation
from resnest_det.data.coco import CocoDetection
from resnest_det.data.loaders import error_message, eval_loader, train_loader

__all__ = ["CocoDetection", "DetectionAugmentation", "error_message", "eval_loader", "train_loader"]
