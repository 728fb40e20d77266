"""Settings to objects: the only file that knows both. Everything below it takes plain arguments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from resnest_det.backbones import ResNet, create_backbone
from resnest_det.config import (
    CocoDataSettings,
    DetectionEvalSettings,
    DetectorSettings,
    MaskDataSettings,
    OptimSettings,
    SampleSettings,
    SegmentationEvalSettings,
    SegmenterSettings,
)
from resnest_det.data import (
    ADE20K,
    ADE20K_CLASS_NAMES,
    ADE20K_PALETTE,
    CocoDetection,
    CopyPaste,
    DetectionAugmentation,
    MaskFolder,
    Mosaic,
    SegmentationAugmentation,
    read_class_list,
    repeat_factors,
)
from resnest_det.data.sample import SAMPLE_VERSION, default_cache_folder, ensure_sample_dataset
from resnest_det.distributed import world_size
from resnest_det.engine import create_optimizer, create_schedule, scaled_learning_rate
from resnest_det.evaluation import CocoMeanAveragePrecision, DetectionInference, SegmentationInference
from resnest_det.layers import NormName, SelectiveKernelConv2d, SplitAttentionConv2d
from resnest_det.models import cascade_rcnn, deeplabv3plus, faster_rcnn, fcos, mask_rcnn, retinanet

Split = Literal["train", "val"]


def build_coco_set(settings: CocoDataSettings, split: Split, *, masks: bool = False) -> CocoDetection:
    """A split of the detection data set: "train" with its augmentation, "val" as it is in its file.

    Args:
        settings: the data set's.
        split: which of the two.
        masks: give the objects' masks, as pixels to train on, and as run lengths to measure with.

    Raises as CocoDetection and DetectionAugmentation do.
    """
    if settings.sample is not None:
        folder = _sample_folder(settings.sample)
        images, annotations = folder / split, folder / "annotations" / f"instances_{split}.json"
    else:
        root = Path(settings.root).expanduser()
        paths = settings.train if split == "train" else settings.val
        images, annotations = root / paths.images, root / paths.annotations
    if split == "val":
        return CocoDetection(images, annotations, on_unreadable=settings.on_unreadable, masks="rle" if masks else False)
    return CocoDetection(
        images,
        annotations,
        train=True,
        transform=DetectionAugmentation(
            settings.short_sides if not settings.scale_jitter else (),
            settings.max_side,
            horizontal_flip=settings.hflip,
            vertical_flip=settings.vflip,
            color_jitter=settings.color_jitter,
            scale_jitter=settings.scale_jitter or None,  # type: ignore[arg-type]  # two numbers, as the settings check
            crop_size=settings.crop_size if settings.scale_jitter else 0,
        ),
        keep_empty=settings.keep_empty,
        on_unreadable=settings.on_unreadable,
        masks=masks,
        mosaic=Mosaic(settings.mosaic, side=settings.mosaic_side) if settings.mosaic else None,
        copy_paste=CopyPaste(settings.copy_paste) if settings.copy_paste else None,
    )


def build_repeat_factors(settings: CocoDataSettings, dataset: CocoDetection) -> Tensor | None:
    """How often each training image comes, where data.repeat_threshold asks for it."""
    if not settings.repeat_threshold:
        return None
    return repeat_factors(*dataset.label_lists(), settings.repeat_threshold)


def build_mask_set(settings: MaskDataSettings, split: Split) -> MaskFolder:
    """A split of the segmentation data set: "train" with its augmentation, "val" as it is in its files.

    Raises as ADE20K, MaskFolder, read_class_list and SegmentationAugmentation do.
    """
    transform = None
    if split == "train":
        transform = SegmentationAugmentation(
            settings.crop_size,
            base_size=settings.base_size,
            scale=settings.scale,  # type: ignore[arg-type]  # two numbers, as the settings check
            max_class_ratio=settings.max_class_ratio,
            horizontal_flip=settings.hflip,
            vertical_flip=settings.vflip,
            color_jitter=settings.color_jitter,
        )
    if settings.sample is not None:
        root, classes = _sample_folder(settings.sample) / "ade20k", "classes.txt"
    else:
        root, classes = Path(settings.root).expanduser(), settings.classes
    class_names = read_class_list(root / classes) if classes else ADE20K_CLASS_NAMES
    if settings.sample is not None or settings.layout == "ade20k":
        return ADE20K(
            root,
            "training" if split == "train" else "validation",
            transform=transform,
            class_names=class_names,
            on_unreadable=settings.on_unreadable,
        )
    paths = settings.train if split == "train" else settings.val
    return MaskFolder(
        root / paths.images,
        root / paths.masks,
        class_names,
        transform=transform,
        first_class_value=settings.first_class_value,
        ignore_value=None if settings.ignore_value < 0 else settings.ignore_value,
        on_unreadable=settings.on_unreadable,
    )


def class_colours(dataset: MaskFolder) -> dict[int, tuple[int, int, int]] | None:
    """ADE20K's own colours for its 150 classes; None for other classes, which pictures colour by themselves."""
    official = isinstance(dataset, ADE20K) and dataset.num_classes == len(ADE20K_PALETTE)
    return dict(enumerate(ADE20K_PALETTE)) if official else None


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
    net = _build_backbone(settings, load_weights)
    shared: dict[str, Any] = {
        "trainable_stages": settings.trainable_stages,
        "fpn_channels": settings.fpn_channels,
        "fpn_norm": _norm(settings.fpn_norm),
        "min_size": settings.min_size,
        "max_size": settings.max_size,
        "resize_in_training": False,  # the training images come resized by DetectionAugmentation
        "score_threshold": settings.score_threshold,
        "nms_threshold": settings.nms_threshold,
        "detections_per_image": settings.detections_per_image,
    }
    if not settings.has_proposals:
        shared |= {"pyramid_top": settings.pyramid_top, "candidates_per_level": settings.candidates_per_level}
        if settings.detector == "fcos":
            return fcos(net, num_classes, **shared, center_sampling_radius=settings.center_sampling_radius)
        return retinanet(
            net,
            num_classes,
            **shared,
            head_norm=_norm(settings.head_norm),
            box_loss=settings.box_loss,
            anchor_sizes=settings.anchor_sizes,
            aspect_ratios=settings.aspect_ratios,
        )
    shared |= {
        "rpn_convolutions": settings.rpn_convolutions,
        "box_head": settings.box_head,
        "box_head_channels": settings.box_head_channels,
        "box_head_norm": _norm(settings.box_head_norm) if settings.box_head != "2fc" else None,
        "anchor_sizes": settings.anchor_sizes,
        "aspect_ratios": settings.aspect_ratios,
        "rpn_proposals_train": settings.rpn_proposals_train,
        "rpn_proposals_eval": settings.rpn_proposals_eval,
        "roi_batch_size": settings.roi_batch_size,
    }
    if settings.has_masks:
        shared |= {
            "mask_head_channels": settings.mask_head_channels,
            "mask_head_norm": _norm(settings.mask_head_norm),
        }
    if settings.detector in ("cascade_rcnn", "cascade_mask_rcnn"):
        return cascade_rcnn(net, num_classes, **shared, masks=settings.has_masks)
    return (mask_rcnn if settings.has_masks else faster_rcnn)(net, num_classes, **shared)


def build_segmenter(settings: SegmenterSettings, num_classes: int, *, load_weights: bool = True) -> nn.Module:
    """The segmentation model on its backbone.

    Args:
        settings: the model's settings.
        num_classes: of the data set; there is no background beside them.
        load_weights: False where a checkpoint of the whole model is loaded next.

    Raises:
        ValueError: an unknown backbone, weights that do not fit, or an argument out of range.
    """
    net = _build_backbone(settings, load_weights, output_stride=settings.output_stride)
    return deeplabv3plus(
        net,
        num_classes,
        head_channels=settings.head_channels,
        low_level_channels=settings.low_level_channels,
        aspp_rates=settings.aspp_rates or None,
        separable=settings.separable,
        norm=settings.head_norm,
        dropout=settings.dropout,
        aux_head=settings.aux_weight > 0,
        aux_weight=settings.aux_weight,
        trainable_stages=settings.trainable_stages,
        class_weights=settings.class_weights or None,
        ohem_threshold=settings.ohem_threshold or None,
        ohem_min_kept=settings.ohem_min_kept,
        dice_weight=settings.dice_weight,
    )


def build_inference(settings: SegmentationEvalSettings) -> SegmentationInference:
    """How a segmentation model is run on images of any size. Raises as SegmentationInference does."""
    return SegmentationInference(
        short_side=settings.short_side,
        max_side=settings.max_side,
        scales=settings.scales,
        flip=settings.flip,
        window=settings.window,
        stride=settings.window_stride,
    )


def build_coco_metric(
    settings: DetectionEvalSettings, dataset: CocoDetection, *, masks: bool = False
) -> CocoMeanAveragePrecision:
    """COCO's metric of a data set's classes: of boxes, and of masks where they are asked for.

    Raises as CocoMeanAveragePrecision does.
    """
    return CocoMeanAveragePrecision(
        dataset.class_names,
        masks=masks,
        backend=settings.backend,
        max_detections=settings.max_detections,
        area_ranges=settings.area_ranges,
    )


def build_detection_inference(
    settings: DetectionEvalSettings, *, detections_per_image: int
) -> DetectionInference | None:
    """How a detector is run on an image: at several sizes, mirrored, or in tiles; None where the model is just called.

    Args:
        settings: the evaluation's.
        detections_per_image: kept of all that is found in an image, as many as the model keeps of one pass; in tiles,
            the model keeps so many of each, and all of these stay.

    Raises as DetectionInference does.
    """
    if not (settings.short_sides or settings.flip or settings.tile):
        return None
    # What has no effect was warned of, and is left out: DetectionInference refuses it.
    return DetectionInference(
        short_sides=settings.short_sides,
        max_side=settings.max_side if settings.short_sides else 0,
        flip=settings.flip,
        merge=settings.merge if settings.has_several_passes else "nms",
        merge_threshold=settings.merge_threshold,
        tile=settings.tile,
        tile_overlap=settings.tile_overlap,
        whole_image=settings.whole_image and settings.tile > 0,
        tile_match=settings.tile_match,
        tile_match_threshold=settings.tile_match_threshold,
        detections_per_image=0 if settings.tile else detections_per_image,
    )


def check_batch_size(model: nn.Module, num_images: int) -> None:
    """Refuse training steps of one image where a norm of the model's attention needs several.

    Raises:
        ValueError: `num_images` is 1, and the model has split attention or selective kernels with BatchNorm that
            trains.
    """
    pooling = (SplitAttentionConv2d, SelectiveKernelConv2d)
    attention = [module for module in model.modules() if isinstance(module, pooling)]
    if num_images == 1 and any(module.needs_several_images() for module in attention):
        raise ValueError(
            "the backbone's attention normalises pooled features over the images of a step, and data.batch_size or the "
            "training set gives 1: use data.batch_size=2 or more, or model.norm=frozen_bn or gn"
        )


def build_optimizer(
    settings: OptimSettings, model: nn.Module, *, batches_per_epoch: int, batch_size: int
) -> tuple[Optimizer, LRScheduler]:
    """The optimiser of the model and its schedule over the run.

    Args:
        settings: the optimiser's.
        model: what is trained.
        batches_per_epoch: of each process.
        batch_size: images of a batch on each process.

    Raises:
        ValueError: nothing is trainable, or the warm-up takes the whole run.
    """
    lr = settings.lr
    if settings.lr_rule != "none":
        lr = scaled_learning_rate(
            lr,
            batch_size=batch_size * settings.accumulate * world_size(),
            base_batch_size=settings.lr_batch_size,
            rule=settings.lr_rule,
        )
    optimizer = create_optimizer(
        model,
        settings.optimizer,
        lr=lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        norm_weight_decay=settings.norm_weight_decay,
        head_lr_factor=settings.head_lr_factor,
        layer_decay=settings.layer_decay,
    )
    schedule = create_schedule(
        optimizer,
        total_steps=settings.epochs * math.ceil(batches_per_epoch / settings.accumulate),
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        warmup_factor=settings.warmup_factor,
        milestones=settings.milestones,
        gamma=settings.gamma,
        power=settings.poly_power,
        final_factor=settings.final_lr_factor,
        rise=settings.one_cycle_rise,
        initial_factor=settings.one_cycle_start,
    )
    return optimizer, schedule


def _build_backbone(
    settings: DetectorSettings | SegmenterSettings, load_weights: bool, *, output_stride: Literal[8, 16, 32] = 32
) -> ResNet:
    net = create_backbone(
        settings.backbone,
        settings.weights or None if load_weights else None,
        norm=settings.norm,
        output_stride=output_stride,
        drop_path=settings.drop_path,
        checkpoint=settings.checkpoint_activations,
        hard_sigmoid=settings.hard_sigmoid,
        new_classifier=True,  # the models have no use for one
    )
    if not load_weights:
        net.weights_loaded = True  # by the checkpoint, before anything runs: freezing them is no mistake
    return net


def _sample_folder(sample: SampleSettings) -> Path:
    """The folder of the generated data set, which is made where it is not there yet."""
    name = f"sample-v{SAMPLE_VERSION}-{sample.num_train}-{sample.num_val}-{sample.seed}"
    return ensure_sample_dataset(
        default_cache_folder() / name, num_train=sample.num_train, num_val=sample.num_val, seed=sample.seed
    )


def _norm(name: str) -> NormName | None:
    return None if name == "none" else name  # type: ignore[return-value]
