"""Settings to objects: the only file that knows both. Everything below it takes plain arguments."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from resnest_det.backbones import create_backbone
from resnest_det.config import CocoDataSettings, DetectorSettings, OptimSettings
from resnest_det.data.augment import DetectionAugmentation
from resnest_det.data.coco import CocoDetection
from resnest_det.data.sample import SAMPLE_VERSION, default_cache_folder, ensure_sample_dataset
from resnest_det.engine import create_optimizer, create_schedule
from resnest_det.layers import NormName, SplitAttentionConv2d
from resnest_det.models import faster_rcnn


def build_train_set(settings: CocoDataSettings) -> CocoDetection:
    """The training set with its augmentation. Raises as CocoDetection and DetectionAugmentation do."""
    images, annotations = _paths(settings, "train")
    return CocoDetection(
        images,
        annotations,
        train=True,
        transform=DetectionAugmentation(
            settings.short_sides,
            settings.max_side,
            horizontal_flip=settings.hflip,
            vertical_flip=settings.vflip,
            color_jitter=settings.color_jitter,
        ),
        keep_empty=settings.keep_empty,
        on_unreadable=settings.on_unreadable,
    )


def build_val_set(settings: CocoDataSettings) -> CocoDetection:
    """The validation set, as it is in its file. Raises as CocoDetection does."""
    images, annotations = _paths(settings, "val")
    return CocoDetection(images, annotations, on_unreadable=settings.on_unreadable)


def build_detector(settings: DetectorSettings, num_classes: int, *, load_weights: bool = True) -> nn.Module:
    """The detector on its backbone.

    Args:
        settings: the model's settings.
        num_classes: with the background.
        load_weights: False where a checkpoint of the whole detector is loaded next, so that the backbone's own
            weights would only be read in vain.

    Raises:
        ValueError: an unknown backbone, or weights that do not fit.
    """
    net = create_backbone(
        settings.backbone,
        settings.weights or None if load_weights else None,
        norm=settings.norm,
        drop_path=settings.drop_path,
        checkpoint=settings.checkpoint_activations,
    )
    if not load_weights:
        net.weights_loaded = True  # by the checkpoint, before anything runs: freezing them is no mistake
    return faster_rcnn(
        net,
        num_classes,
        trainable_stages=settings.trainable_stages,
        fpn_channels=settings.fpn_channels,
        fpn_norm=_norm(settings.fpn_norm),
        box_head=settings.box_head,
        box_head_channels=settings.box_head_channels,
        box_head_norm=_norm(settings.box_head_norm) if settings.box_head != "2fc" else None,
        anchor_sizes=settings.anchor_sizes,
        aspect_ratios=settings.aspect_ratios,
        min_size=settings.min_size,
        max_size=settings.max_size,
        resize_in_training=False,  # the training images come resized by DetectionAugmentation
        rpn_proposals_train=settings.rpn_proposals_train,
        rpn_proposals_eval=settings.rpn_proposals_eval,
        roi_batch_size=settings.roi_batch_size,
        score_threshold=settings.score_threshold,
        nms_threshold=settings.nms_threshold,
        detections_per_image=settings.detections_per_image,
    )


def check_batch_size(model: nn.Module, num_images: int) -> None:
    """Refuse training steps of one image where a norm of the model's attention needs several.

    Raises:
        ValueError: `num_images` is 1 and the model has split attention with BatchNorm that trains.
    """
    attention = [module for module in model.modules() if isinstance(module, SplitAttentionConv2d)]
    if num_images == 1 and any(module.needs_several_images() for module in attention):
        raise ValueError(
            "split attention normalises pooled features over the images of a step, and data.batch_size or the "
            "training set gives 1: use data.batch_size=2 or more, or model.norm=frozen_bn or gn"
        )


def build_optimizer(settings: OptimSettings, model: nn.Module, steps_per_epoch: int) -> tuple[Optimizer, LRScheduler]:
    """The optimiser of the model and its schedule over the run.

    Raises:
        ValueError: nothing is trainable, or the warm-up takes the whole run.
    """
    optimizer = create_optimizer(
        model,
        settings.optimizer,
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        norm_weight_decay=settings.norm_weight_decay,
    )
    schedule = create_schedule(
        optimizer,
        total_steps=settings.epochs * steps_per_epoch,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        warmup_factor=settings.warmup_factor,
        milestones=settings.milestones,
        gamma=settings.gamma,
        final_factor=settings.final_lr_factor,
    )
    return optimizer, schedule


def _paths(settings: CocoDataSettings, split: str) -> tuple[Path, Path]:
    """The folder of images and the annotations of a split; the generated set is made where it is not there yet."""
    if settings.sample is not None:
        sample = settings.sample
        name = f"sample-v{SAMPLE_VERSION}-{sample.num_train}-{sample.num_val}-{sample.seed}"
        folder = default_cache_folder() / name
        ensure_sample_dataset(folder, num_train=sample.num_train, num_val=sample.num_val, seed=sample.seed)
        return folder / split, folder / "annotations" / f"instances_{split}.json"
    root = Path(settings.root).expanduser()
    paths = settings.train if split == "train" else settings.val
    return root / paths.images, root / paths.annotations


def _norm(name: str) -> NormName | None:
    return None if name == "none" else name  # type: ignore[return-value]
