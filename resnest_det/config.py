"""TOML files and `key=value` overrides → validated settings; what it does not know it refuses.

Each section is a frozen model whose fields state their type, range, unit and default: the one place where a setting is
described. The settings table of docs/config.md, the comments of a written file and the rules quoted in error messages
are all derived from it. Settings are read by the scripts and by `build.py`; no other class sees them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

NormLiteral = Literal["none", "bn", "sync_bn", "gn"]
Number = TypeVar("Number", int, float)

# What may differ between a run and its resumption: where it runs and reads from, and what it leaves behind; never what
# is learnt.
KEYS_FREE_ON_RESUME = frozenset(
    {
        "data.num_workers",
        "data.root",
        "run.checkpoint_minutes",
        "run.checkpoint_steps",
        "run.device",
        "run.keep_last",
        "run.logger",
        "run.num_pictures",
        "run.parallel",
        "run.tensorboard",
    }
)


class SettingsError(ValueError):
    """A mistake in the settings or on the command line; the message lists every mistake found."""


class OtherTaskError(SettingsError):
    """Settings of a detection experiment read as those of segmentation, or the other way round."""


class Section(BaseModel):
    """A table of settings: immutable, without unknown keys, and strict ("yes" is no boolean, 1.5 no integer)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSettings(Section):
    """The run itself: where it is written, on what it runs."""

    dir: str = Field(
        "",
        description='Run folder that everything is written to; "" means runs/NAME, from the config file NAME.toml.',
    )
    seed: int = Field(0, ge=0, description="Seed of the initial weights, the order of the images and augmentation.")
    device: str = Field("auto", description='Device: "auto" (a GPU where there is one), "cpu", "cuda:1", "mps".')
    channels_last: bool = Field(
        False, description="Keep features with the channels last in memory: the faster layout on most machines."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Numbers computed in: float32, or 16 bits where they suffice; fp16 scales its gradients."
    )
    compile: bool = Field(
        False, description="Compile the backbone with torch.compile: a slow first step, then faster ones."
    )
    triton: bool = Field(
        False, description="Run ResNeSt's split attention by Triton kernels, which need a CUDA device."
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="What each of several processes holds: the whole model (DistributedDataParallel), or its shards of "
        "the weights, gradients and optimiser state (FSDP2).",
    )
    deterministic: bool = Field(
        False, description="Use deterministic algorithms on GPUs too, and warn of operations that have none."
    )
    checkpoint_steps: int = Field(0, ge=0, description="Optimiser steps between checkpoints in an epoch; 0 for none.")
    checkpoint_minutes: float = Field(15.0, ge=0, description="Minutes between checkpoints in an epoch; 0 for none.")
    keep_last: int = Field(2, ge=1, description="Checkpoints kept besides the best: last.pt, last-1.pt, and so on.")
    num_pictures: int = Field(
        8,
        ge=0,
        description="Validation images drawn with their predictions at the end; the report has the worst and best.",
    )
    tensorboard: bool = Field(False, description="Write TensorBoard's files too, into the run folder.")
    logger: str = Field(
        "",
        description='Function "package.module:name" that makes a hook for another tracker, see docs/journal.md; "" for '
        "none.",
    )

    @field_validator("parallel")
    @classmethod
    def _fsdp_goes_with(cls, parallel: str, info: ValidationInfo) -> str:
        for key in ("channels_last", "compile"):
            if parallel == "fsdp" and info.data.get(key):
                raise ValueError(f"fsdp does not go with run.{key}=true: use run.{key}=false, or run.parallel=ddp")
        return parallel


class SampleSettings(Section):
    """The generated data set, made on first use."""

    num_train: int = Field(400, ge=1, description="Training images generated.")
    num_val: int = Field(60, ge=1, description="Validation images generated.")
    seed: int = Field(0, ge=0, description="Seed of the generated scenes; the same seed gives the same bytes.")


class SplitSettings(Section):
    """One split of a COCO data set."""

    images: str = Field(description="Folder of the images, relative to data.root or absolute.")
    annotations: str = Field(description="COCO instances JSON, relative to data.root or absolute.")


class TrainSplitSettings(SplitSettings):
    """The training split, by default where COCO 2017 has it."""

    images: str = Field("train2017", description="Folder of the training images, relative to data.root or absolute.")
    annotations: str = Field(
        "annotations/instances_train2017.json",
        description="COCO instances JSON of the training images, relative to data.root or absolute.",
    )


class ValSplitSettings(SplitSettings):
    """The validation split, by default where COCO 2017 has it."""

    images: str = Field("val2017", description="Folder of the validation images, relative to data.root or absolute.")
    annotations: str = Field(
        "annotations/instances_val2017.json",
        description="COCO instances JSON of the validation images, relative to data.root or absolute.",
    )


def _check_root(root: str, info: ValidationInfo) -> str:
    if not root and "sample" in info.data and info.data["sample"] is None:
        raise ValueError("the data set's folder is required: give data.root=FOLDER, or a table [data.sample]")
    return root


def _check_increasing(values: tuple[Number, ...]) -> tuple[Number, ...]:
    if any(later <= earlier for earlier, later in itertools.pairwise(values)):
        raise ValueError("must increase: each number is larger than the one before it")
    return values


class CocoDataSettings(Section):
    """A detection data set in COCO's format, how it is loaded and how it is augmented."""

    # A validator sees the fields above its own only, so `sample` stands before `root`, and `scale_jitter` and
    # `short_sides` before `max_side`.
    sample: SampleSettings | None = Field(
        None, description="Train on the generated data set, written to the cache folder on first use."
    )
    root: str = Field(
        "",
        validate_default=True,
        description="Folder that the paths of both splits are relative to; required unless data.sample is given.",
    )
    train: TrainSplitSettings = Field(TrainSplitSettings(), description="The training split.")
    val: ValSplitSettings = Field(ValSplitSettings(), description="The validation split.")
    batch_size: int = Field(2, ge=1, description="Images a training step, on each process.")
    eval_batch_size: int = Field(1, ge=1, description="Images a step of evaluation, on each process.")
    num_workers: int = Field(2, ge=0, description="Loader processes of each process; 0 loads in the process itself.")
    keep_empty: bool = Field(True, description="Keep training images without boxes, as negatives.")
    on_unreadable: Literal["raise", "skip"] = Field(
        "raise",
        description="An image that cannot be decoded stops the run, or is skipped with a warning (in training, the "
        "next readable one takes its place).",
    )
    scale_jitter: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        strict=False,
        description="Large-scale jitter, in the place of data.short_sides and data.max_side: smallest and largest "
        "factor on data.crop_size, such as [0.1, 2.0]; none given is none.",
    )
    crop_size: int = Field(
        1024, ge=32, description="Side in pixels of the square that large-scale jitter scales to and cuts out."
    )
    short_sides: tuple[Annotated[int, Field(ge=32)], ...] = Field(
        (640, 672, 704, 736, 768, 800),
        min_length=1,
        strict=False,
        description="Training short sides in pixels; one is drawn for each image.",
    )
    max_side: int = Field(
        1333,
        ge=32,
        validate_default=True,
        description="Longest training side in pixels, at least the largest of data.short_sides.",
    )
    hflip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    vflip: float = Field(0.0, ge=0, le=1, description="Probability of a vertical flip.")
    color_jitter: float = Field(
        0.0, ge=0, le=1, description="Strength of the brightness, contrast and saturation jitter; 0 is none."
    )
    mosaic: float = Field(0.0, ge=0, le=1, description="Probability that an image is put together from four.")
    mosaic_side: int = Field(
        0, ge=0, description="Side in pixels of such an image, before it is resized; 0 is the first one's long side."
    )
    copy_paste: float = Field(
        0.0, ge=0, le=1, description="Probability that objects of another image are pasted in; needs masks in the file."
    )
    repeat_threshold: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Images of classes that fewer than this fraction of the images have come more often; 0 for none.",
    )
    group_by_aspect: bool = Field(True, description="Batch landscape with landscape and portrait with portrait.")

    @field_validator("root")
    @classmethod
    def _root_or_sample(cls, root: str, info: ValidationInfo) -> str:
        return _check_root(root, info)

    @field_validator("scale_jitter")
    @classmethod
    def _scale_jitter_rises(cls, scale: tuple[float, ...]) -> tuple[float, ...]:
        if scale and (len(scale) != 2 or scale[0] > scale[1]):
            raise ValueError("must be two factors, the smaller one first, or none")
        return scale

    @field_validator("max_side")
    @classmethod
    def _max_side_holds_short_sides(cls, max_side: int, info: ValidationInfo) -> int:
        largest = max(info.data.get("short_sides", (0,)))
        if max_side < largest and not info.data.get("scale_jitter"):
            raise ValueError(f"must be at least the largest of data.short_sides, which is {largest}")
        return max_side


class MaskSplitSettings(Section):
    """One split of a data set of masks."""

    images: str = Field(description="Folder of the images, relative to data.root or absolute.")
    masks: str = Field(description="Folder of the masks, relative to data.root or absolute.")


class TrainMaskSettings(MaskSplitSettings):
    """The training split of a mask folder."""

    images: str = Field(
        "images/training", description="Folder of the training images, relative to data.root or absolute."
    )
    masks: str = Field("masks/training", description="Folder of the training masks, relative to data.root or absolute.")


class ValMaskSettings(MaskSplitSettings):
    """The validation split of a mask folder."""

    images: str = Field(
        "images/validation", description="Folder of the validation images, relative to data.root or absolute."
    )
    masks: str = Field(
        "masks/validation", description="Folder of the validation masks, relative to data.root or absolute."
    )


class MaskDataSettings(Section):
    """A segmentation data set, how it is loaded and how it is augmented."""

    sample: SampleSettings | None = Field(
        None, description="Train on the generated data set, written to the cache folder on first use."
    )
    root: str = Field(
        "",
        validate_default=True,
        description="Folder of the data set: ADEChallengeData2016, or what the paths of a mask folder are relative to; "
        "required unless data.sample is given.",
    )
    layout: Literal["ade20k", "mask_folder"] = Field(
        "ade20k",
        description="How the data set lies on disk: as ADEChallengeData2016, or as folders of images and masks.",
    )
    classes: str = Field(
        "",
        validate_default=True,
        description="List of the classes, one name a line or as ADE20K's objectInfo150.txt, relative to data.root or "
        'absolute; "" means the 150 of ADE20K. A mask folder needs one.',
    )
    train: TrainMaskSettings = Field(TrainMaskSettings(), description="The training split of a mask folder.")
    val: ValMaskSettings = Field(ValMaskSettings(), description="The validation split of a mask folder.")
    first_class_value: int = Field(0, ge=0, le=65535, description="Value of the first class in a mask folder's masks.")
    ignore_value: int = Field(
        255, ge=-1, le=65535, description="Value in a mask folder's masks of pixels that are not labelled; -1 for none."
    )
    batch_size: int = Field(16, ge=1, description="Images a training step, on each process.")
    eval_batch_size: int = Field(1, ge=1, description="Images a step of evaluation, on each process.")
    num_workers: int = Field(4, ge=0, description="Loader processes of each process; 0 loads in the process itself.")
    on_unreadable: Literal["raise", "skip"] = Field(
        "raise",
        description="An image or mask that cannot be decoded stops the run, or is skipped with a warning (in training, "
        "the next readable one takes its place).",
    )
    base_size: int = Field(
        520, ge=0, description="Short side in pixels that training images are scaled from; 0 is each image's own."
    )
    scale: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.5, 2.0),
        min_length=2,
        max_length=2,
        strict=False,
        description="Smallest and largest factor on data.base_size; one is drawn for each image.",
    )
    crop_size: int = Field(480, ge=1, description="Side in pixels of the square cut from each training image.")
    max_class_ratio: float = Field(
        0.75, gt=0, le=1, description="Cuts of which one class has a larger share are drawn again, ten times at most."
    )
    hflip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    vflip: float = Field(0.0, ge=0, le=1, description="Probability of a vertical flip.")
    color_jitter: float = Field(
        0.0, ge=0, le=1, description="Strength of the brightness, contrast and saturation jitter; 0 is none."
    )

    @field_validator("root")
    @classmethod
    def _root_or_sample(cls, root: str, info: ValidationInfo) -> str:
        return _check_root(root, info)

    @field_validator("classes")
    @classmethod
    def _mask_folder_has_classes(cls, classes: str, info: ValidationInfo) -> str:
        if not classes and info.data.get("layout") == "mask_folder":
            raise ValueError("a mask folder needs the list of its classes: a text file with one name a line")
        return classes

    @field_validator("scale")
    @classmethod
    def _scale_rises(cls, scale: tuple[float, ...]) -> tuple[float, ...]:
        if scale[0] > scale[1]:
            raise ValueError("the first must not be above the second: smallest factor, largest factor")
        return scale


class DetectorSettings(Section):
    """The detector and its backbone.

    One table for all detectors: what the chosen one has no use for is named by `ineffective_settings`, and every
    default is the same whichever is chosen.
    """

    detector: Literal["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "retinanet", "fcos"] = Field(
        "faster_rcnn", description="Detector built on the backbone; mask_rcnn and cascade_mask_rcnn predict masks too."
    )
    backbone: str = Field("resnest50", description="Backbone's name, one of list_backbones().")
    weights: str = Field(
        "",
        description='Backbone\'s weights: "" (random), "imagenet" or another published name, a file\'s path, or a URL.',
    )
    init: str = Field(
        "",
        description="Checkpoint of a whole model to fine-tune, with any number of classes: a file's path, a run folder "
        'or a URL; "" for none.',
    )
    norm: Literal["bn", "frozen_bn", "sync_bn", "gn"] = Field(
        "bn", description="Normalisation layers of the backbone: batch, frozen batch, synchronised batch, group."
    )
    hard_sigmoid: bool = Field(
        False,
        description="Gate of the squeeze-and-excitation networks: relu6(x + 3) / 6, which quantises well, in place "
        "of the sigmoid.",
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="Probability that the last block's branch is dropped.")
    checkpoint_activations: bool = Field(
        False, description="Recompute the backbone's activations in the backward pass: less memory, more time."
    )
    trainable_stages: int = Field(5, ge=0, le=5, description="Backbone stages trained, counted from the last one.")
    fpn_channels: int = Field(256, ge=1, description="Channels of each level of the feature pyramid.")
    fpn_norm: NormLiteral = Field("none", description="Normalisation layers of the feature pyramid.")
    pyramid_top: Literal["p5", "c5"] = Field(
        "p5",
        description="What retinanet and fcos make their two coarsest levels from: the pyramid's level P5, or the "
        "backbone's last stage.",
    )
    rpn_convolutions: int = Field(
        1, ge=1, description="Convolutions of the head that proposes regions; 2 in torchvision's v2."
    )
    box_head: Literal["2fc", "4conv1fc"] = Field(
        "2fc", description="Box head: two fully connected layers, or four convolutions and one such layer."
    )
    box_head_channels: int = Field(1024, ge=1, description="Width of the box head's fully connected layers.")
    box_head_norm: NormLiteral = Field("none", description="Normalisation layers of the box head's convolutions.")
    mask_head_channels: int = Field(256, ge=1, description="Channels of the mask head's convolutions.")
    mask_head_norm: NormLiteral = Field("none", description="Normalisation layers of the mask head's convolutions.")
    head_norm: NormLiteral = Field("none", description="Normalisation layers of retinanet's head.")
    box_loss: Literal["l1", "giou"] = Field(
        "l1", description="Loss of retinanet's boxes: of their encoded differences, or of their overlap."
    )
    center_sampling_radius: float = Field(
        1.5,
        gt=0,
        description="Distance from an object's centre within which fcos trains locations to find it, in strides of "
        "their level.",
    )
    anchor_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (32, 64, 128, 256, 512),
        min_length=5,
        max_length=5,
        strict=False,
        description="Anchor side in pixels, one a pyramid level, finest level first.",
    )
    aspect_ratios: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.5, 1.0, 2.0), min_length=1, strict=False, description="Anchor height over width, at every level."
    )
    min_size: int = Field(800, ge=32, description="Short side in pixels to which evaluation resizes an image.")
    max_size: int = Field(
        1333,
        ge=32,
        validate_default=True,
        description="Longest side in pixels in evaluation, at least model.min_size.",
    )
    rpn_proposals_train: int = Field(2000, ge=1, description="Proposals kept an image in training.")
    rpn_proposals_eval: int = Field(1000, ge=1, description="Proposals kept an image in evaluation.")
    roi_batch_size: int = Field(512, ge=1, description="Regions sampled an image for the box head's loss.")
    candidates_per_level: int = Field(
        1000, ge=1, description="Detections that retinanet and fcos keep at each pyramid level before suppression."
    )
    score_threshold: float = Field(
        0.05, ge=0, le=1, description="Detections scored below this are dropped; torchvision's fcos has 0.2."
    )
    nms_threshold: float = Field(
        0.5,
        ge=0,
        le=1,
        description="IoU above which the lower-scored of two detections of a class is dropped; torchvision's fcos has "
        "0.6.",
    )
    detections_per_image: int = Field(
        100, ge=1, description="Detections kept an image, the best-scored ones; torchvision's retinanet has 300."
    )

    @field_validator("max_size")
    @classmethod
    def _max_size_holds_min_size(cls, max_size: int, info: ValidationInfo) -> int:
        min_size = info.data.get("min_size", 0)
        if max_size < min_size:
            raise ValueError(f"must be at least model.min_size, which is {min_size}")
        return max_size

    @property
    def has_masks(self) -> bool:
        """Whether the detector predicts masks, and so is trained and measured with them."""
        return self.detector in ("mask_rcnn", "cascade_mask_rcnn")

    @property
    def has_proposals(self) -> bool:
        """Whether the detector proposes regions, which its heads then look at: two stages or more."""
        return self.detector not in ("retinanet", "fcos")


class SegmenterSettings(Section):
    """The segmentation model and its backbone."""

    segmenter: Literal["deeplabv3plus"] = Field("deeplabv3plus", description="Segmentation model on the backbone.")
    backbone: str = Field("resnest50", description="Backbone's name, one of list_backbones().")
    weights: str = Field(
        "",
        description='Backbone\'s weights: "" (random), "imagenet" or another published name, a file\'s path, or a URL.',
    )
    init: str = Field(
        "",
        description="Checkpoint of a whole model to fine-tune, with any number of classes: a file's path, a run folder "
        'or a URL; "" for none.',
    )
    norm: Literal["bn", "frozen_bn", "sync_bn", "gn"] = Field(
        "bn", description="Normalisation layers of the backbone: batch, frozen batch, synchronised batch, group."
    )
    hard_sigmoid: bool = Field(
        False,
        description="Gate of the squeeze-and-excitation networks: relu6(x + 3) / 6, which quantises well, in place "
        "of the sigmoid.",
    )
    output_stride: Literal[8, 16, 32] = Field(
        16, description="Image pixels for one step of the backbone's last features; 32 needs model.aspp_rates."
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="Probability that the last block's branch is dropped.")
    checkpoint_activations: bool = Field(
        False, description="Recompute the backbone's activations in the backward pass: less memory, more time."
    )
    trainable_stages: int = Field(5, ge=0, le=5, description="Backbone stages trained, counted from the last one.")
    head_channels: int = Field(
        256, ge=1, description="Channels of the pyramid of dilated convolutions and the decoder."
    )
    low_level_channels: int = Field(48, ge=1, description="Channels that layer1 is projected to for the decoder.")
    aspp_rates: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        strict=False,
        description="Rates of the dilated convolutions; none given means 6, 12, 18 at output stride 16 and 12, 24, 36 "
        "at 8.",
    )
    separable: bool = Field(True, description="Depthwise separable convolutions in the head, or plain ones.")
    head_norm: Literal["bn", "sync_bn", "gn"] = Field("bn", description="Normalisation layers of the head.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout before the classifier.")
    aux_weight: float = Field(
        0.0, ge=0, description="Weight of the loss of an auxiliary head on layer3; 0 builds no such head."
    )
    class_weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (), strict=False, description="Weight of each class in the cross-entropy; none given weighs all alike."
    )
    ohem_threshold: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Only pixels whose own class has a lower probability than this count in the cross-entropy; 0 "
        "counts all.",
    )
    ohem_min_kept: int = Field(
        100_000, ge=1, description="Pixels of an image, the worst ones, that count with ohem_threshold in any case."
    )
    dice_weight: float = Field(0.0, ge=0, description="Weight of the Dice loss, added to the cross-entropy; 0 is none.")


class OptimSettings(Section):
    """The optimiser and the learning rate over time."""

    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="Optimiser.")
    lr: float = Field(0.02, gt=0, description="Learning rate after the warm-up.")
    lr_rule: Literal["none", "linear", "sqrt"] = Field(
        "none",
        description="How optim.lr, meant for optim.lr_batch_size images a step, is scaled to the images of a step over "
        "all processes: not at all, in proportion, or by the root.",
    )
    lr_batch_size: int = Field(16, ge=1, description="Images a step that optim.lr is meant for, with optim.lr_rule.")
    accumulate: int = Field(
        1, ge=1, description="Batches whose gradients are averaged for one optimiser step, on each process."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd.")
    nesterov: bool = Field(False, description="Nesterov's momentum in sgd; needs optim.momentum > 0.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay of all weights but norm layers and biases.")
    norm_weight_decay: float = Field(0.0, ge=0, description="Weight decay of norm layers and biases.")
    clip_norm: float = Field(0.0, ge=0, description="Norm to which the whole gradient is clipped; 0 is no clipping.")
    head_lr_factor: float = Field(
        1.0, gt=0, description="Factor on the learning rate of everything but the backbone, which starts at random."
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor on the learning rate from each of the backbone's blocks to the one before it.",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of the weights' moving average, such as 0.999; it is then what is evaluated. 0 for none.",
    )
    schedule: Literal["multistep", "poly", "cosine", "one_cycle", "constant"] = Field(
        "multistep",
        description="Learning rate after the warm-up: falls in steps, as a power of what remains of the run, as a "
        "cosine, rises and falls, or stays.",
    )
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.667, 0.917),
        strict=False,
        description="Increasing fractions of the run at which multistep multiplies the learning rate by optim.gamma.",
    )
    gamma: float = Field(0.1, gt=0, le=1, description="Factor on the learning rate at each of optim.milestones.")
    poly_power: float = Field(0.9, gt=0, description="Exponent of poly; 1 is a straight line.")
    one_cycle_rise: float = Field(
        0.3, gt=0, lt=1, description="Fraction of the steps after the warm-up in which one_cycle rises."
    )
    one_cycle_start: float = Field(
        0.04, gt=0, le=1, description="Learning rate that one_cycle starts from, as a fraction of optim.lr."
    )
    warmup_steps: int = Field(1000, ge=0, description="Steps over which the learning rate rises to optim.lr.")
    warmup_factor: float = Field(
        0.001, gt=0, le=1, description="First step's learning rate, as a fraction of optim.lr."
    )
    final_lr_factor: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Learning rate at the end of poly, cosine and one_cycle, as a fraction of optim.lr.",
    )
    epochs: int = Field(12, ge=1, description="Passes over the training images.")

    @field_validator("nesterov")
    @classmethod
    def _nesterov_needs_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("needs optim.momentum > 0, which is 0: give a momentum, or optim.nesterov=false")
        return nesterov

    @field_validator("milestones")
    @classmethod
    def _milestones_increase(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        return _check_increasing(milestones)


class SegmentationOptimSettings(OptimSettings):
    """The optimiser and the learning rate over time, by default as ADE20K is trained: 16 images a step, 120 epochs."""

    lr: float = Field(0.01, gt=0, description="Learning rate after the warm-up.")
    head_lr_factor: float = Field(
        10.0, gt=0, description="Factor on the learning rate of everything but the backbone, which starts at random."
    )
    schedule: Literal["multistep", "poly", "cosine", "one_cycle", "constant"] = Field(
        "poly",
        description="Learning rate after the warm-up: falls in steps, as a power of what remains of the run, as a "
        "cosine, rises and falls, or stays.",
    )
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises to optim.lr.")
    epochs: int = Field(120, ge=1, description="Passes over the training images.")


class EvalSettings(Section):
    """When the model is evaluated during training."""

    every: int = Field(1, ge=1, description="Epochs between evaluations; the last epoch is always evaluated.")
    precise_bn: int = Field(
        0,
        ge=0,
        description="Training batches, on each process, over which BatchNorm's statistics are computed anew before an "
        "evaluation; 0 keeps the running ones.",
    )


class DetectionEvalSettings(EvalSettings):
    """When the model is evaluated during training, how it is run on an image, and how it is measured."""

    backend: Literal["pycocotools", "hotcoco"] = Field(
        "pycocotools", description="What computes AP and AR: the reference, or a faster one that is installed apart."
    )
    max_detections: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 10, 100),
        min_length=1,
        strict=False,
        description="Rising numbers of detections of a class in an image that count: each gives a recall, all else is "
        "of the largest.",
    )
    area_ranges: tuple[Annotated[float, Field(gt=0, lt=1e10)], ...] = Field(
        (1024.0, 9216.0),
        min_length=2,
        max_length=2,
        strict=False,
        description="Areas in square pixels up to which an object is small, and up to which it is medium.",
    )
    short_sides: tuple[Annotated[int, Field(ge=32)], ...] = Field(
        (),
        strict=False,
        description="Short sides in pixels that an image is resized to, one pass for each; none given takes "
        "model.min_size.",
    )
    max_side: int = Field(
        0,
        ge=0,
        description="Longest side in pixels in these passes, at least the largest of eval.short_sides; 0 takes "
        "model.max_size in proportion.",
    )
    flip: bool = Field(False, description="See each image's mirror image too, another pass.")
    merge: Literal["nms", "wbf"] = Field(
        "nms",
        description="How several passes become one: the best box of each object is kept, or its boxes are fused; wbf "
        "knows no masks.",
    )
    merge_threshold: float = Field(
        0.5, ge=0, le=1, description="IoU above which two boxes of a class are the same object's in several passes."
    )
    tile: int = Field(0, ge=0, description="Side in pixels of the tiles that images are cut into; 0 runs them whole.")
    tile_overlap: float = Field(0.2, ge=0, lt=1, description="Part of a tile's side that neighbours share.")
    whole_image: bool = Field(False, description="See the whole image too, for what is larger than a tile.")
    tile_match: Literal["ios", "iou"] = Field(
        "ios",
        description="Overlap by which boxes of two tiles are known as one object's: intersection over the lower-scored "
        "one, or over the union.",
    )
    tile_match_threshold: float = Field(
        0.5, ge=0, le=1, description="That overlap above which they are, and only one of them is kept."
    )

    @field_validator("max_side")
    @classmethod
    def _max_side_holds_short_sides(cls, max_side: int, info: ValidationInfo) -> int:
        largest = max(info.data.get("short_sides") or (0,))
        if 0 < max_side < largest:
            raise ValueError(f"must be at least the largest of eval.short_sides, which is {largest}, or 0")
        return max_side

    @field_validator("max_detections")
    @classmethod
    def _max_detections_increase(cls, limits: tuple[int, ...]) -> tuple[int, ...]:
        return _check_increasing(limits)

    @field_validator("area_ranges")
    @classmethod
    def _area_ranges_increase(cls, areas: tuple[float, ...]) -> tuple[float, ...]:
        return _check_increasing(areas)

    @property
    def has_several_passes(self) -> bool:
        """Whether an image, or a tile, is run more than once, so that there is something to merge."""
        return self.flip or len(self.short_sides) > 1


class SegmentationEvalSettings(EvalSettings):
    """When the model is evaluated during training, and how it is run on an image."""

    short_side: int = Field(
        520, ge=0, description="Short side in pixels to which evaluation resizes an image; 0 leaves it as it is."
    )
    max_side: int = Field(
        2048,
        ge=0,
        validate_default=True,
        description="Longest side in pixels in evaluation, at least eval.short_side; 0 is no bound.",
    )
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,),
        min_length=1,
        strict=False,
        description="Factors on that size; the probabilities are averaged over them.",
    )
    flip: bool = Field(False, description="Average over each image and its mirror image.")
    window: int = Field(0, ge=0, description="Side in pixels of sliding windows; 0 runs the whole image at once.")
    window_stride: int = Field(
        0, ge=0, description="Step in pixels from window to window, at most eval.window; 0 is two thirds of it."
    )

    @field_validator("max_side")
    @classmethod
    def _max_side_holds_short_side(cls, max_side: int, info: ValidationInfo) -> int:
        short_side = info.data.get("short_side", 0)
        if 0 < max_side < short_side:
            raise ValueError(f"must be at least eval.short_side, which is {short_side}, or 0")
        return max_side

    @field_validator("window_stride")
    @classmethod
    def _windows_leave_no_gap(cls, stride: int, info: ValidationInfo) -> int:
        window = info.data.get("window", 0)
        if 0 < window < stride:
            raise ValueError(
                f"must be at most eval.window, which is {window}: pixels between windows would not be seen"
            )
        return stride


class ExperimentSettings(Section):
    """What the settings of every task have: a run. `load_settings` gives its folder a name."""

    run: RunSettings = Field(RunSettings(), description="The run: its folder, seed and device.")


class DetectionSettings(ExperimentSettings):
    """All settings of a detection experiment, `train_det.py`."""

    data: CocoDataSettings = Field(description="The data set, its loading and augmentation.")
    model: DetectorSettings = Field(DetectorSettings(), description="The detector and its backbone.")
    optim: OptimSettings = Field(OptimSettings(), description="The optimiser and the learning rate over time.")
    eval: DetectionEvalSettings = Field(
        DetectionEvalSettings(), description="Evaluation during training, and how the model is run and measured."
    )

    @field_validator("eval")
    @classmethod
    def _masks_are_not_fused(cls, evaluation: DetectionEvalSettings, info: ValidationInfo) -> DetectionEvalSettings:
        model = info.data.get("model")
        if model is not None and model.has_masks and evaluation.merge == "wbf" and evaluation.has_several_passes:
            raise ValueError(f"wbf fuses boxes, and model.detector={model.detector} has masks: use eval.merge=nms")
        return evaluation


class SegmentationSettings(ExperimentSettings):
    """All settings of a segmentation experiment, `train_seg.py`."""

    data: MaskDataSettings = Field(description="The data set, its loading and augmentation.")
    model: SegmenterSettings = Field(SegmenterSettings(), description="The segmentation model and its backbone.")
    optim: SegmentationOptimSettings = Field(
        SegmentationOptimSettings(), description="The optimiser and the learning rate over time."
    )
    eval: SegmentationEvalSettings = Field(
        SegmentationEvalSettings(), description="Evaluation during training, and how the model is run on an image."
    )


S = TypeVar("S", bound=ExperimentSettings)


@dataclass(frozen=True)
class Command(Generic[S]):
    """What a training script's command line asks for.

    Attributes:
        settings: the resolved settings, file and overrides together.
        config_path: the file they were read from.
        resume: the run folder to resume, or None.
        eval_only: the checkpoint or run folder to evaluate without training, or None.
        profile: whether a trace of some steps is written.
    """

    settings: S
    config_path: Path
    resume: Path | None
    eval_only: Path | None
    profile: bool = False


def load_settings(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The settings of a TOML file with overrides applied, validated.

    A file that begins with `base = "OTHER.toml"`, relative to itself, has that file's settings where it gives none of
    its own; tables are merged key by key. What neither gives has its default. An empty `run.dir` becomes
    `runs/<file stem>`.

    Args:
        cls: the settings to read, such as DetectionSettings.
        path: the TOML file.
        overrides: `key.sub=value` each. The value is read as TOML (`0.1`, `true`, `[1, 2]`); what is no TOML value,
            and whatever is meant for a string setting, is taken as a string without quotes. Of two for one key the
            last wins.

    Raises:
        SettingsError: the file or a base is missing or is not TOML, a file is its own base, or there are mistakes in
            them or in the overrides; all of these are listed, each with the file that it stands in.
    """
    path = Path(path)
    content: dict[str, Any] = {}
    sources: list[tuple[str, str]] = []  # what sets a dotted key, a file or the command line, in that order
    for file, layer in _read_with_bases(path):
        _merge(content, layer)
        sources += [(key, str(file)) for key, _ in _flatten(layer)]
    keys = _describe_keys(cls)
    mistakes: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            mistakes.append(
                f"{override!r} is not an override: write key=value, such as {_nearest(key, keys)}=...; "
                f"the name of a config file ends in .toml"
            )
        elif key not in keys:
            mistakes.append(_not_a_setting(key, "command line", keys))
        else:
            value = _parse_value(text.strip(), keys[key])
            if _assign(content, key, value):
                sources += [(name, "command line") for name in _keys_at(key, value)]
    _check_task(cls, content, path)
    # An absent section is an empty one, so that what it requires is reported by its own key.
    for name, field in cls.model_fields.items():
        if field.is_required():
            content.setdefault(name, {})
    try:
        settings = cls.model_validate(content)
    except ValidationError as error:
        mistakes += _explain(error, content, keys, sources)
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        lines = "".join(f"\n  {mistake}" for mistake in mistakes)
        files = f"{path} and the overrides" if overrides else str(path)
        raise SettingsError(f"{count} in the settings of {files}:{lines}")
    return settings if settings.run.dir else with_run_folder(settings, f"runs/{path.stem}")


def load_either_settings(path: str | Path, overrides: Sequence[str] = ()) -> DetectionSettings | SegmentationSettings:
    """The settings of a TOML file of either task, as load_settings reads them: of the one that they fit.

    Raises:
        SettingsError: they fit both, or neither; then the mistakes are those of the task that fits better.
    """
    fitting: list[DetectionSettings | SegmentationSettings] = []
    errors: list[SettingsError] = []
    kinds: tuple[type[DetectionSettings | SegmentationSettings], ...] = (DetectionSettings, SegmentationSettings)
    for cls in kinds:
        try:
            fitting.append(load_settings(cls, path, overrides))
        except OtherTaskError:
            continue
        except SettingsError as error:
            errors.append(error)
    if len(fitting) > 1:
        raise SettingsError(
            f"{path} may be for detection or for segmentation; add model.detector=faster_rcnn or "
            f"model.segmenter=deeplabv3plus to it, or as an override"
        )
    if not fitting:
        raise min(errors, key=lambda error: str(error).count("\n"))
    return fitting[0]


def _check_task(cls: type[ExperimentSettings], content: Mapping[str, Any], path: Path) -> None:
    """Refuse an experiment of the other script, of which next to nothing would be known."""
    model = content.get("model")
    for own, other, script in (
        (DetectionSettings, "segmenter", "train_seg.py (train-seg)"),
        (SegmentationSettings, "detector", "train_det.py (train-det)"),
    ):
        if issubclass(cls, own) and isinstance(model, Mapping) and other in model:
            raise OtherTaskError(f"{path} has a model.{other}: it is an experiment of {script}")


def parse_command_line(
    cls: type[S], argv: Sequence[str], *, prog: str, description: str, default_config: str | Path
) -> Command[S]:
    """What the command line of a training script asks for.

    The arguments are, in any order, at most one config file (ending in .toml, or the name of one beside
    `default_config`), any number of `key=value` overrides, and the flags `--print-config` (prints the resolved settings
    as TOML and exits), `--resume RUN_FOLDER`, `--eval-only CHECKPOINT_OR_RUN_FOLDER`, `--init CHECKPOINT` (short for
    `model.init=CHECKPOINT`), `--deterministic` (short for `run.deterministic=true`), `--profile` and `-h`.

    `--resume` reads the run folder's config.toml. A config file or overrides beside it must lead to the same settings,
    save for `KEYS_FREE_ON_RESUME`, whose given values hold; `run.dir` is the resumed folder. `--eval-only` without a
    config file reads the config.toml of the run folder, or the one beside the checkpoint, and any key may be
    overridden; `run.dir` is that folder unless it is overridden.

    Args:
        cls: the settings to read, such as DetectionSettings.
        argv: the arguments without the script's name.
        prog: the script's name, for `-h`.
        description: what the script does, for `-h`.
        default_config: the config file used where neither one nor a run is named; others in its folder are found by
            their names.

    Raises:
        SettingsError: the arguments or the settings are mistaken.
        SystemExit: status 0, after `-h` or `--print-config`.
    """
    shipped = Path(default_config).parent
    parser = _ArgumentParser(
        prog=prog,
        description=description,
        epilog="docs/config.md lists the settings; --print-config shows them as they are resolved.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="CONFIG | KEY=VALUE",
        help=f"a config file, or the name of one in {shipped} (default: {default_config}), and overrides such as "
        f"optim.lr=0.01",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as TOML and exit")
    parser.add_argument("--resume", type=Path, metavar="RUN_FOLDER", help="continue the run of this folder")
    parser.add_argument(
        "--eval-only", type=Path, metavar="CHECKPOINT_OR_RUN_FOLDER", help="evaluate it, without training"
    )
    parser.add_argument("--init", metavar="CHECKPOINT", help="fine-tune it; the same as model.init=CHECKPOINT")
    parser.add_argument("--deterministic", action="store_true", help="the same as run.deterministic=true")
    parser.add_argument("--profile", action="store_true", help="write a trace of some steps into the run folder")
    # Plain parse_args refuses positional arguments that stand on both sides of a flag.
    parsed = parser.parse_intermixed_args(argv)
    resume: Path | None = parsed.resume
    eval_only: Path | None = parsed.eval_only
    found = {argument: _find_config(argument, shipped) for argument in parsed.arguments}
    configs = [path for path in found.values() if path]
    overrides = [argument for argument in parsed.arguments if not found[argument]]
    if parsed.deterministic:
        overrides.append("run.deterministic=true")
    if parsed.init:
        if "://" not in parsed.init and not Path(parsed.init).exists():
            raise SettingsError(f"--init {parsed.init} does not exist; {_found_beside(Path(parsed.init))}")
        overrides.append(f"model.init={parsed.init}")
    if parsed.init and eval_only:
        parser.error("--init begins training from a checkpoint, and --eval-only does not train: leave one of them out")
    if parsed.profile and eval_only:
        parser.error("--profile traces training, and --eval-only does not train: leave one of them out")
    if resume and eval_only:
        parser.error(
            "--resume and --eval-only are both given; --resume continues training, --eval-only does not train: "
            "keep one of them"
        )
    if len(configs) > 1:
        parser.error(f"{len(configs)} config files are given, {', '.join(map(str, configs))}; name one at most")

    for flag, run in (("--resume", resume), ("--eval-only", eval_only)):
        if run and not run.exists():
            raise SettingsError(f"{flag} {run} does not exist; {_found_beside(run)}")
    if resume and not resume.is_dir():
        parser.error(f"--resume {resume} is a file; name its run folder, {resume.parent}")

    if configs:
        config_path = configs[0]
    elif started_from := resume or eval_only:
        config_path = _run_config(started_from)
    else:
        config_path = Path(default_config)
    settings = load_settings(cls, config_path, overrides)
    names_run_folder = any(override.partition("=")[0].strip() == "run.dir" for override in overrides)
    if resume:
        if not names_run_folder or Path(settings.run.dir) == resume:
            settings = with_run_folder(settings, str(resume))
        _check_resumed(settings, with_run_folder(load_settings(cls, _run_config(resume)), str(resume)))
    elif eval_only and not configs and not names_run_folder:
        # The run's own record of its folder is out of date once the folder was moved.
        settings = with_run_folder(settings, str(config_path.parent))
    if parsed.print_config:
        sys.stdout.write(_to_toml(settings))
        parser.exit()
    return Command(settings, config_path, resume, eval_only, parsed.profile)


def write_settings(settings: ExperimentSettings, path: str | Path) -> None:
    """Write settings as TOML with each field's description as a comment; `load_settings` reads them back equal.

    The file is replaced in one step: an interrupted write leaves the old one.

    Args:
        settings: as `load_settings` returns them. Values that are None are left out, as TOML has none.
        path: the file; its folder must exist.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(_to_toml(settings), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def settings_as_data(settings: ExperimentSettings) -> dict[str, Any]:
    """Settings as plain dicts, lists, strings, numbers and booleans, for a checkpoint; `settings_from_data` reads them.

    What is None is left out.
    """
    return settings.model_dump(mode="json", exclude_none=True)


def settings_from_data(content: Mapping[str, Any], source: str) -> DetectionSettings | SegmentationSettings:
    """The settings of which `settings_as_data` made `content`, or which a run's config.toml holds.

    Args:
        content: tables of settings. `model.detector` or `model.segmenter` says of which kind they are.
        source: where they are from, for messages.

    Raises:
        SettingsError: they are of neither kind, or mistaken, such as those of another version.
    """
    model = content.get("model")
    kinds: dict[str, type[DetectionSettings | SegmentationSettings]]
    kinds = {"detector": DetectionSettings, "segmenter": SegmentationSettings}
    for key, cls in kinds.items():
        if isinstance(model, Mapping) and key in model:
            try:
                return cls.model_validate(content)
            except ValidationError as error:
                sources = [(name, source) for name, _ in _flatten(content)]
                mistakes = _explain(error, content, _describe_keys(cls), sources)
                lines = "".join(f"\n  {mistake}" for mistake in mistakes)
                raise SettingsError(f"the settings in {source} do not fit this version:{lines}") from None
    raise SettingsError(f"the settings in {source} name neither a model.detector nor a model.segmenter")


def settings_table(model: type[Section]) -> str:
    """A Markdown table of all settings of `model`: key, type, default, range, description."""
    rows = ["| key | type | default | range | description |", "|---|---|---|---|---|"]
    for key, schema in _describe_keys(model).items():
        if schema["type"] == "object" and schema.get("default", ...) is not None:
            continue  # a section that is always there has no row of its own; its settings do
        if "default" not in schema:
            default = "required"
        else:
            default = "absent" if schema["default"] is None else f"`{_to_toml_value(schema['default'])}`"
        cells = (f"`{key}`", _type_name(schema), default, _range(schema), schema["description"])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def ineffective_settings(settings: ExperimentSettings) -> list[str]:
    """A sentence for each setting that differs from its default and changes nothing, given the others.

    For example "optim.momentum has no effect with optim.optimizer=adamw".
    """
    causes: list[tuple[bool, str, Iterable[str]]] = []
    if isinstance(settings, DetectionSettings | SegmentationSettings):
        causes += _ineffective_in_optim(settings.optim)
        model = settings.model
        norms = _norms(model) if isinstance(model, DetectorSettings) else {model.norm, model.head_norm}
        causes.append((not {"bn", "sync_bn"} & norms, "norms without running statistics", ["eval.precise_bn"]))
    if isinstance(settings, DetectionSettings):
        splits = [f"data.{split}.{key}" for split in ("train", "val") for key in SplitSettings.model_fields]
        causes += _ineffective_in_detector(settings.model)
        causes += _ineffective_in_detection(settings.eval)
        causes += [
            (settings.data.sample is not None, "data.sample", ["data.root", *splits]),
            (settings.data.mosaic == 0, "data.mosaic=0", ["data.mosaic_side"]),
            (not settings.data.scale_jitter, "data.scale_jitter=[]", ["data.crop_size"]),
            (bool(settings.data.scale_jitter), "data.scale_jitter", ["data.short_sides", "data.max_side"]),
        ]
    if isinstance(settings, SegmentationSettings):
        data, model, evaluation = settings.data, settings.model, settings.eval
        splits = [f"data.{split}.{key}" for split in ("train", "val") for key in MaskSplitSettings.model_fields]
        of_folders = [*splits, "data.first_class_value", "data.ignore_value"]
        is_sample = data.sample is not None
        causes += [
            (is_sample, "data.sample", ["data.root", "data.layout", "data.classes", *of_folders]),
            (not is_sample and data.layout == "ade20k", "data.layout=ade20k", of_folders),
            (model.ohem_threshold == 0, "model.ohem_threshold=0", ["model.ohem_min_kept"]),
            (
                model.ohem_min_kept >= data.crop_size**2,
                f"model.ohem_min_kept={model.ohem_min_kept}, all {data.crop_size**2} pixels of a crop and more",
                ["model.ohem_threshold"],
            ),
            (evaluation.window == 0, "eval.window=0", ["eval.window_stride"]),
        ]
    values = dict(_flatten(settings.model_dump(mode="json")))
    defaults = {key: schema.get("default") for key, schema in _describe_keys(type(settings)).items()}
    return [
        f"{key} has no effect with {cause}"
        for holds, cause, keys in causes
        for key in keys
        if holds and values[key] != defaults[key]
    ]


def _ineffective_in_optim(optim: OptimSettings) -> list[tuple[bool, str, Iterable[str]]]:
    schedule = f"optim.schedule={optim.schedule}"
    return [
        (optim.optimizer == "adamw", "optim.optimizer=adamw", ["optim.momentum", "optim.nesterov"]),
        (optim.schedule != "multistep", schedule, ["optim.milestones", "optim.gamma"]),
        (optim.schedule != "poly", schedule, ["optim.poly_power"]),
        (optim.schedule not in ("poly", "cosine", "one_cycle"), schedule, ["optim.final_lr_factor"]),
        (optim.schedule != "one_cycle", schedule, ["optim.one_cycle_rise", "optim.one_cycle_start"]),
        (optim.lr_rule == "none", "optim.lr_rule=none", ["optim.lr_batch_size"]),
        (optim.warmup_steps == 0, "optim.warmup_steps=0", ["optim.warmup_factor"]),
    ]


def _norms(model: DetectorSettings) -> set[str]:
    """The norms of the detector's parts, of those parts that it has."""
    norms: set[str] = {model.norm, model.fpn_norm}
    if model.has_proposals and model.box_head != "2fc":
        norms.add(model.box_head_norm)
    if model.has_masks:
        norms.add(model.mask_head_norm)
    if model.detector == "retinanet":
        norms.add(model.head_norm)
    return norms


def _ineffective_in_detector(model: DetectorSettings) -> list[tuple[bool, str, Iterable[str]]]:
    detector = f"model.detector={model.detector}"
    box_head = ["model.box_head", "model.box_head_channels", "model.box_head_norm"]
    proposals = ["model.rpn_convolutions", "model.rpn_proposals_train", "model.rpn_proposals_eval"]
    return [
        (not model.has_proposals, detector, [*proposals, "model.roi_batch_size", *box_head]),
        (model.has_proposals and model.box_head == "2fc", "model.box_head=2fc", ["model.box_head_norm"]),
        (model.has_proposals, detector, ["model.pyramid_top", "model.candidates_per_level"]),
        (not model.has_masks, detector, ["model.mask_head_channels", "model.mask_head_norm"]),
        (model.detector != "retinanet", detector, ["model.head_norm", "model.box_loss"]),
        (model.detector != "fcos", detector, ["model.center_sampling_radius"]),
        (model.detector == "fcos", detector, ["model.anchor_sizes", "model.aspect_ratios"]),
    ]


def _ineffective_in_detection(evaluation: DetectionEvalSettings) -> list[tuple[bool, str, Iterable[str]]]:
    one_pass = "one pass: eval.flip=false and fewer than two eval.short_sides"
    of_tiles = ["eval.tile_overlap", "eval.whole_image", "eval.tile_match", "eval.tile_match_threshold"]
    return [
        (not evaluation.short_sides, "eval.short_sides=[]", ["eval.max_side"]),
        (not evaluation.has_several_passes, one_pass, ["eval.merge", "eval.merge_threshold"]),
        (evaluation.tile == 0, "eval.tile=0", of_tiles),
    ]


class _ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are raised, as all other mistakes are, instead of printed."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (see {self.prog} -h)")


def shipped_configs(folder: Path) -> dict[str, Path]:
    """The config files of a folder by their names, in alphabetical order."""
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def shipped_experiments(folder: Path) -> dict[str, Path]:
    """The config files below `configs/`, by their names with their folder's before them, such as det/sample."""
    tasks = sorted(task for task in folder.iterdir() if task.is_dir())
    return {f"{task.name}/{name}": file for task in tasks for name, file in shipped_configs(task).items()}


def find_experiment(name: str, folder: Path) -> Path:
    """The config file of a shipped experiment by its name, with or without its folder's before it.

    Args:
        name: such as det/sample, or bccd.
        folder: `configs/`.

    Raises:
        ValueError: there is no such experiment, or one in each folder.
    """
    files = shipped_experiments(folder)
    found = [full for full in files if name in (full, full.partition("/")[2])]
    if not found:
        near = get_close_matches(name, [*files, *(full.partition("/")[2] for full in files)], 1)
        hint = f"did you mean {near[0]}?" if near else "resnest-det configs lists them"
        raise ValueError(f"{name} is not one of the {len(files)} shipped experiments; {hint}")
    if len(found) > 1:
        raise ValueError(f"{name} is in det and in seg; name det/{name} or seg/{name}")
    return files[found[0]]


def _find_config(argument: str, folder: Path) -> Path | None:
    """The config file that a positional argument names: by its path, or, in `folder`, by its name, with or without the
    folder's own name before it; None if it is none.
    """
    if re.match(r"[\w.\s]*=", argument):
        return None
    path = Path(argument)
    if path.suffix == ".toml":
        return path
    shipped = shipped_configs(folder)
    name = argument.removeprefix(f"{folder.name}/")
    if name in shipped:
        return shipped[name]
    if (path / "config.toml").is_file():
        raise SettingsError(
            f"{argument} is a run folder: put --resume or --eval-only before it, or name its config.toml"
        )
    if path.is_dir():
        raise SettingsError(f"{argument} is a folder, not an experiment; a data set's folder is data.root={argument}")
    others = [task for task in folder.parent.iterdir() if task.is_dir() and task != folder]
    for task in others:
        if argument.removeprefix(f"{task.name}/") in shipped_configs(task):
            raise SettingsError(f"{argument} is an experiment of train_{task.name}.py, train-{task.name}")
    if near := get_close_matches(name, shipped, 1):
        raise SettingsError(f"there is no shipped experiment {argument!r}; did you mean {near[0]}?")
    return None


def with_run_folder(settings: S, folder: str) -> S:
    """The settings of a run that is written to `folder`."""
    return settings.model_copy(update={"run": settings.run.model_copy(update={"dir": folder})})


def _run_config(run: Path) -> Path:
    """The config.toml of a run folder, or of the folder that a checkpoint lies in."""
    config = (run if run.is_dir() else run.parent) / "config.toml"
    if not config.is_file():
        raise SettingsError(
            f"{run}: there is no {config}, where a run writes its settings; "
            f"with --eval-only, name the config file that it was trained with"
        )
    return config


def _found_beside(run: Path) -> str:
    """The run folders and checkpoints beside one that does not exist, nearest first."""
    folder = run.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".pt"]
    return f"{folder} has {', '.join(_nearest_first(run.name, names)) or 'no run and no checkpoint'}"


def _check_resumed(given: ExperimentSettings, run: ExperimentSettings) -> None:
    """Refuse to resume `run` with other settings than its own, but for KEYS_FREE_ON_RESUME."""
    old, new = (
        {key: _to_toml_value(value) for key, value in _flatten(settings.model_dump(exclude_none=True))}
        for settings in (run, given)
    )
    differences = [
        f"\n  {key}: the run has {old.get(key, 'none')}, given is {new.get(key, 'none')}"
        for key in dict.fromkeys([*old, *new])
        if key not in KEYS_FREE_ON_RESUME and old.get(key) != new.get(key)
    ]
    if differences:
        raise SettingsError(
            f"resume with other settings: {run.run.dir} was begun with others than those given. Leave them out, or "
            f"start a new run; only {', '.join(sorted(KEYS_FREE_ON_RESUME))} may change:{''.join(differences)}"
        )


def _read_with_bases(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A config file and what it is based on, each with its own content, the last base first."""
    layers: list[tuple[Path, dict[str, Any]]] = []
    base_of: Path | None = None
    while True:
        content = _read_toml(path, base_of)
        base = content.pop("base", None)
        layers.insert(0, (path, content))
        if base is None:
            return layers
        if not isinstance(base, str) or not base.endswith(".toml"):
            raise SettingsError(
                f"base = {_shorten(_to_toml_value(base))} ({path}): must be the name of a config file, relative to "
                f"this one, that ends in .toml"
            )
        base_of, path = path, path.parent / base
        if any(path.resolve() == file.resolve() for file, _ in layers):
            chain = " → ".join(str(file) for file in (*(file for file, _ in reversed(layers)), path))
            raise SettingsError(f"a config file is its own base, {chain}: leave one of these bases out")


def _merge(content: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Put `layer` over `content`: tables are merged key by key, any other value replaces what is there."""
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            _merge(content[key], value)
        else:
            content[key] = value


def _read_toml(path: Path, base_of: Path | None) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = path.parent
        names = [config.name for config in folder.glob("*.toml")]
        if names:
            found = f"{folder} has {', '.join(_nearest_first(path.name, names))}"
        else:
            found = f"{folder} has no .toml file" if folder.is_dir() else f"there is no folder {folder} either"
        role = f", the base of {base_of}" if base_of else ""
        raise SettingsError(f"there is no config file {path}{role}; {found}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"config file {path} cannot be read as UTF-8 text: {error}") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(_explain_syntax(path, text, str(error))) from error


def _explain_syntax(path: Path, text: str, message: str) -> str:
    """tomllib's message with file, line, column and the line itself."""
    lines = text.split("\n")
    place = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    line, column = (int(place[1]), int(place[2])) if place else (len(lines), len(lines[-1]) + 1)
    reason = message[: place.start()] if place else message
    return f"{path}, line {line}, column {column}: {reason}\n  {lines[line - 1]}"


def _parse_value(text: str, schema: Mapping[str, Any]) -> Any:
    """An override's value: TOML where it is TOML, else the text; a string setting takes any text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # Text of several lines may hold further keys, and run.dir=2024 means the name 2024.
    if parsed.keys() != {"value"} or (schema["type"] == "string" and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


def _assign(content: dict[str, Any], key: str, value: Any) -> bool:
    """Set a dotted key, unless the file has a value in place of a table, which is left for validation to report."""
    *tables, name = key.split(".")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            return False
    content[name] = value
    return True


def _explain(
    error: ValidationError,
    content: Mapping[str, Any],
    keys: Mapping[str, Mapping[str, Any]],
    sources: Sequence[tuple[str, str]],
) -> list[str]:
    """A sentence for each mistake: the key, what came and from where, the rule."""
    sentences = []
    for detail in error.errors(include_url=False):
        location = [part for part in detail["loc"] if isinstance(part, str)]
        key = ".".join(map(_quote, location))
        if detail["type"] == "extra_forbidden":
            unknown = _keys_at(key, detail["input"])
            sentences += [_not_a_setting(name, _source(name, sources), keys) for name in unknown]
            continue
        schema = keys[key]
        came = _find(content, location)
        if came is ...:
            came, source = schema.get("default", ...), "default"
        else:
            source = _source(key, sources)
        given = key if came is ... else f"{key} = {_shorten(_to_toml_value(came))} ({source})"
        own = detail["type"] == "value_error"
        sentences.append(f"{given}: {detail['ctx']['error'] if own else _rule(schema, came)}")
    return list(dict.fromkeys(sentences))  # a list with two wrong items is one mistake


def _source(key: str, sources: Sequence[tuple[str, str]]) -> str:
    """Where a key's value was set last, or, of a table, any value in it."""
    return next(source for name, source in reversed(sources) if name == key or name.startswith(f"{key}."))


def _not_a_setting(key: str, source: str, keys: Iterable[str]) -> str:
    if key.rpartition(".")[2] == "base":
        return f"{key} ({source}) is not a setting; a base is named in a config file, above its first table"
    return f"{key} ({source}) is not a setting; did you mean {_nearest(key, keys)}?"


def _find(content: Any, location: Sequence[str]) -> Any:
    """The value at a location of nested tables, or ... where there is none."""
    for name in location:
        if not isinstance(content, dict) or name not in content:
            return ...
        content = content[name]
    return content


@functools.cache
def _describe_keys(cls: type[Section]) -> Mapping[str, dict[str, Any]]:
    """Every dotted key of `cls`, tables too, with its JSON schema: type, default, bounds, description."""
    root = cls.model_json_schema()

    def walk(properties: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, schema in properties.items():
            # A table is a reference, alone or as one of the alternatives "table or none".
            alternatives = [schema, *schema.get("allOf", ()), *schema.get("anyOf", ())]
            reference = next((item["$ref"] for item in alternatives if "$ref" in item), None)
            if reference is None:
                yield prefix + name, schema
            else:
                yield prefix + name, {**schema, "type": "object"}
                yield from walk(root["$defs"][reference.rpartition("/")[2]]["properties"], f"{prefix}{name}.")

    return dict(walk(root["properties"], ""))


def _choices(schema: Mapping[str, Any]) -> list[str]:
    return [str(choice) for choice in ([schema["const"]] if "const" in schema else schema.get("enum", ()))]


def _type_name(schema: Mapping[str, Any]) -> str:
    if schema["type"] == "array":
        return f"list of {_type_name(schema['items'])}s"
    return {"number": "float", "object": "table"}.get(schema["type"], schema["type"])


def _range(schema: Mapping[str, Any]) -> str:
    """What a value may be, beyond its type: "> 0, < 1", "1 or more, each >= 32", the names of a choice, or ""."""
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = ", ".join(f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema)
    if schema["type"] == "array":
        fewest, most = schema.get("minItems", 0), schema.get("maxItems")
        count = f"exactly {fewest}" if fewest == most else f"{fewest} or more"
        return f"{count}, each {_range(schema['items'])}"
    return bounds or ", ".join(_choices(schema))


def _rule(schema: Mapping[str, Any], came: Any) -> str:
    """The rule that a value breaks, from the field's own type and range."""
    choices = _choices(schema)
    if choices:
        nearest = f"; did you mean {_nearest_first(came, choices)[0]}?" if isinstance(came, str) else ""
        return f"must be {'one of ' if len(choices) > 1 else ''}{', '.join(choices)}{nearest}"
    name = _type_name(schema)
    if name == "boolean":
        return "must be a boolean, true or false"
    article = "an" if name == "integer" else "a"
    colon = ":" if schema["type"] == "array" else ""
    return f"must be {article} {name.replace('float', 'finite float')}{colon} {_range(schema)}".rstrip()


def _nearest(key: str, keys: Iterable[str]) -> str:
    """The key nearest to a mistaken one, by the whole name or by its last part.

    So `optim.learning_rate`, `model.lr` and `lr` are all optim.lr.
    """
    last = key.rpartition(".")[2]

    def closeness(candidate: str) -> tuple[float, float]:
        whole = _similarity(key, candidate)
        candidate_last = candidate.rpartition(".")[2]
        abbreviated = candidate_last == _initials(last) or last == _initials(candidate_last)
        return max(whole, 1.0 if abbreviated else _similarity(last, candidate_last)), whole

    # A mistaken key of a table is to be told another key, not that table.
    return max((candidate for candidate in keys if not key.startswith(f"{candidate}.")), key=closeness)


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def _nearest_first(name: str, names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda candidate: (-_similarity(name, candidate), candidate))


def _similarity(one: str, other: str) -> float:
    return SequenceMatcher(None, one.lower(), other.lower()).ratio()


def _flatten(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of nested tables with their values; an empty table is a value."""
    for name, value in tables.items():
        key = prefix + _quote(name)
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _keys_at(key: str, value: Any) -> list[str]:
    """The dotted keys of a value, which may be a table of others."""
    return [name for name, _ in _flatten(value, f"{key}.")] if isinstance(value, dict) and value else [key]


def _to_toml(settings: Section) -> str:
    """The settings as TOML, each with its description as a comment."""
    return "\n".join(_table_lines(settings, "")).strip() + "\n"


def _table_lines(table: Section, name: str) -> Iterator[str]:
    fields = [(key, getattr(table, key), field.description) for key, field in type(table).model_fields.items()]
    for key, value, description in fields:
        if value is not None and not isinstance(value, Section):
            yield f"# {description}"
            yield f"{key} = {_to_toml_value(value)}"
    # In TOML all that follows a table's header is in that table, so that tables come last.
    for key, value, description in fields:
        if isinstance(value, Section):
            yield from ("", f"# {description}", f"[{name}{key}]")
            yield from _table_lines(value, f"{name}{key}.")


def _to_toml_value(value: Any) -> str:
    """A value as TOML on one line (tomli_w breaks lists and knows no inline table outside of one)."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_to_toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_quote(key)} = {_to_toml_value(item)}' for key, item in value.items())}}}"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def _quote(name: str) -> str:
    """A TOML key as it is written: in quotes where it is no bare key, so that "a.b" is not taken for a.b."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _to_toml_value(name)


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
