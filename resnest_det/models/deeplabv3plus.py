"""DeepLabV3+: atrous spatial pyramid pooling on a dilated backbone, and a decoder with its first stage's features.

Paper: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", arXiv 1802.02611; the image pooling, arXiv
1706.05587; the auxiliary head on layer3, Zhao et al., arXiv 1612.01105.
Reference implementations: tensorflow/models `deeplab` (a norm and a ReLU after the depthwise convolution as after the
pointwise one) and detectron2's DeepLab.

What differs:
- the image-pooling branch has a bias and no norm, as detectron2's: BatchNorm over one value a channel and image cannot
  train on one image, and is noise on a few;
- features and logits are resized with align_corners=False, as torchvision's, so that a flipped image gives flipped
  logits and any size works.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_det.backbones import freeze_stages, stage_extractor
from resnest_det.layers import NormLayer, NormName, norm_layer
from resnest_det.layers.fused import conv_norm_relu, may_fuse
from resnest_det.models.segmentation_loss import SegmentationLoss

_ASPP_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # by the stride of layer4; the paper's


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, dilated 3x3 and the pooled image side by side, projected together.

    Args:
        in_channels: channels of the input.
        channels: channels of each branch and of the output.
        rates: dilation of each 3x3.
        separable: whether a 3x3 is a depthwise and a pointwise convolution.
        dropout: probability of dropping a value of the output in training.
        norm_layer: builds a norm from its channels.

    Shape:
        (N, in_channels, H, W) to (N, channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        rates: Sequence[int],
        *,
        separable: bool,
        dropout: float,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        branches = [_conv_norm_relu(in_channels, channels, 1, norm_layer)]
        branches += [_conv3x3_norm_relu(in_channels, channels, rate, separable, norm_layer) for rate in rates]
        self.branches = nn.ModuleList(branches)
        self.pooling = nn.Sequential(_convolution(in_channels, channels, 1, bias=True), nn.ReLU(inplace=True))
        self.project = _conv_norm_relu((len(branches) + 1) * channels, channels, 1, norm_layer)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Run the branches and project them."""
        features = [_run(branch, x) for branch in self.branches]
        pooled = self.pooling(x.mean((2, 3), keepdim=True))  # (N, channels, 1, 1)
        # Not expanded: cat takes an expanded tensor for NCHW, and would turn channels_last features back.
        features.append(torch.zeros_like(features[0]) + pooled)
        return self.dropout(_run(self.project, torch.cat(features, dim=1)))


class DeepLabV3Plus(nn.Module):
    """The model that deeplabv3plus builds: its parts, and how they run.

    Args:
        backbone: images (N, 3, H, W), normalised, to a dict with the features "layer1" and "layer4", and "layer3"
            where there is an aux_head.
        aspp: on layer4.
        low_level: on layer1.
        decoder: on the features of aspp, resized to those of low_level, and theirs side by side.
        classifier: on the decoder's features, to logits.
        aux_head: on layer3, to logits; None for none.
        criterion: the losses of logits and masks.
        aux_weight: factor of the aux_head's losses.
        image_mean: mean of each channel of the images in [0, 1], subtracted by the model.
        image_std: standard deviation of each channel, divided by.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        aspp: nn.Module,
        low_level: nn.Module,
        decoder: nn.Module,
        classifier: nn.Module,
        aux_head: nn.Module | None,
        *,
        criterion: SegmentationLoss,
        aux_weight: float,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.aspp = aspp
        self.low_level = low_level
        self.decoder = decoder
        self.classifier = classifier
        self.aux_head = aux_head
        self.criterion = criterion
        self.aux_weight = aux_weight
        self.register_buffer("image_mean", torch.tensor(image_mean)[:, None, None], persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std)[:, None, None], persistent=False)

    def forward(
        self, images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Logits, or in training with masks the losses.

        Args:
            images: (N, 3, H, W), float in [0, 1], of any size; or a list of (3, H, W), all of one size.
            masks: (N, H, W) or a list of (H, W), uint8 or int64: classes from 0, or the ignored value.

        Returns:
            Without masks "out", logits (N, num_classes, H, W), and in training "aux", the same of an auxiliary head.
            With masks "loss_seg", and "loss_dice" and "loss_aux" where there are such; their sum is the loss.

        Raises:
            ValueError: images or masks of another form, or masks in evaluation.
        """
        images = _image_batch(images)
        if masks is not None and not self.training:
            raise ValueError("masks are for training, and the model is in evaluation: leave them out, or model.train()")
        masks = None if masks is None else _mask_batch(masks, images)
        features = self.backbone((images - self.image_mean) / self.image_std)
        low_level = _run(self.low_level, features["layer1"])
        x = _resize(self.aspp(features["layer4"]), low_level)
        x = _run(self.decoder, torch.cat([x, low_level], dim=1))
        outputs = {"out": _full_size_logits(self.classifier(x), images)}
        if self.aux_head is not None and self.training:
            outputs["aux"] = _full_size_logits(self.aux_head(features["layer3"]), images)
        if masks is None:
            return outputs
        losses = {f"loss_{name}": loss for name, loss in self.criterion(outputs["out"], masks).items()}
        if "aux" in outputs:
            aux_losses = self.criterion(outputs["aux"], masks)
            losses["loss_aux"] = self.aux_weight * torch.stack(list(aux_losses.values())).sum()
        return losses


def deeplabv3plus(
    backbone: nn.Module,
    num_classes: int,
    *,
    head_channels: int = 256,
    low_level_channels: int = 48,
    aspp_rates: Sequence[int] | None = None,
    separable: bool = True,
    norm: NormName = "bn",
    dropout: float = 0.1,
    aux_head: bool = False,
    aux_weight: float = 0.4,
    trainable_stages: int = 5,
    ignore_index: int = 255,
    class_weights: Sequence[float] | None = None,
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 100_000,
    dice_weight: float = 0.0,
    image_mean: Sequence[float] = (0.485, 0.456, 0.406),
    image_std: Sequence[float] = (0.229, 0.224, 0.225),
) -> DeepLabV3Plus:
    """Build DeepLabV3+ on a backbone.

    The model takes float images (N, 3, H, W) in [0, 1] of any size, which it normalises. In training
    `model(images, masks)` returns a dict of losses; otherwise `model(images)` returns {"out": logits (N, num_classes,
    H, W)}.

    Args:
        backbone: a network of create_backbone(..., output_stride=16 or 8), or one of torchvision, timm or your own
            that stage_extractor takes, with aspp_rates where its last stage has another stride; its modules are
            shared, and frozen as asked.
        num_classes: number of classes, 2 or more; there is no background beyond them.
        head_channels: channels of the ASPP and of the decoder.
        low_level_channels: channels that layer1's features are projected to.
        aspp_rates: dilations of the ASPP's 3x3; None is 6, 12, 18 at stride 16 and 12, 24, 36 at stride 8.
        separable: whether the 3x3 of ASPP and decoder are a depthwise and a pointwise convolution.
        norm: norm of the head; that of the backbone is its own.
        dropout: probability of dropping a value of the ASPP's output, and of the auxiliary head's, in [0, 1).
        aux_head: adds, in training, a fully convolutional head on layer3 with the same losses.
        aux_weight: factor of the auxiliary head's losses.
        trainable_stages: how many of the backbone's stages train, from the back, see freeze_stages; 5 is all.
        ignore_index: value of the masks' pixels that count for nothing.
        class_weights: a weight for each class in the cross-entropy, see SegmentationLoss.
        ohem_threshold: counts only pixels whose true class is less probable than this, see SegmentationLoss.
        ohem_min_kept: the least number of pixels an image that ohem_threshold leaves.
        dice_weight: factor of a Dice loss; 0 leaves it out.
        image_mean: mean of each channel of the images in [0, 1], subtracted by the model; ImageNet's, unless the
            backbone was trained with another, as some of timm's were (`pretrained_cfg["mean"]` and `["std"]`).
        image_std: standard deviation of each channel, divided by.

    Raises:
        ValueError: an argument is out of range or contradicts another.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be 2 or more: list what is no object as a class of its own")
    if head_channels < 1 or low_level_channels < 1:
        raise ValueError(
            f"head_channels={head_channels} and low_level_channels={low_level_channels} must both be 1 or more"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
    if aux_weight < 0:
        raise ValueError(f"aux_weight={aux_weight} must be 0 or more")
    criterion = SegmentationLoss(
        ignore_index=ignore_index,
        class_weights=class_weights,
        ohem_threshold=ohem_threshold,
        ohem_min_kept=ohem_min_kept,
        dice_weight=dice_weight,
    )
    criterion.check_classes(num_classes)
    freeze_stages(backbone, trainable_stages)
    stages = stage_extractor(backbone, ("layer1", "layer3", "layer4") if aux_head else ("layer1", "layer4"))
    if aspp_rates is None:
        stride = stages.strides["layer4"]
        if stride not in _ASPP_RATES:
            raise ValueError(
                f"the backbone has stride {stride}, for which the paper has no ASPP rates: build it with "
                f"create_backbone(..., output_stride=16) or 8, or give aspp_rates. Of other networks, timm's "
                f"take output_stride=16, torchvision's ResNet replace_stride_with_dilation, MobileNetV3 dilated=True"
            )
        aspp_rates = _ASPP_RATES[stride]
    if len(aspp_rates) == 0 or min(aspp_rates) < 1:
        raise ValueError(f"aspp_rates={tuple(aspp_rates)} must be dilations, one or several, each 1 or more")

    build_norm = norm_layer(norm)
    aspp = ASPP(
        stages.channels["layer4"],
        head_channels,
        aspp_rates,
        separable=separable,
        dropout=dropout,
        norm_layer=build_norm,
    )
    low_level = _conv_norm_relu(stages.channels["layer1"], low_level_channels, 1, build_norm)
    decoder = nn.Sequential(
        _conv3x3_norm_relu(head_channels + low_level_channels, head_channels, 1, separable, build_norm),
        _conv3x3_norm_relu(head_channels, head_channels, 1, separable, build_norm),
    )
    fcn = _fcn_head(stages.channels["layer3"], num_classes, dropout, build_norm) if aux_head else None
    return DeepLabV3Plus(
        stages,
        aspp,
        low_level,
        decoder,
        _classifier(head_channels, num_classes),
        fcn,
        criterion=criterion,
        aux_weight=aux_weight,
        image_mean=image_mean,
        image_std=image_std,
    )


def _convolution(
    in_channels: int, channels: int, kernel_size: int, *, dilation: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution that keeps the size, with the backbone's initialisation: He by the outputs, biases 0."""
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, channels, kernel_size, 1, padding, dilation, groups, bias)
    # torch counts fan_out over all groups; of a depthwise convolution, fan_in is the number that is meant.
    nn.init.kaiming_normal_(conv.weight, mode="fan_in" if groups > 1 else "fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _conv_norm_relu(
    in_channels: int, channels: int, kernel_size: int, norm_layer: NormLayer, *, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        _convolution(in_channels, channels, kernel_size, dilation=dilation, groups=groups),
        norm_layer(channels),
        nn.ReLU(inplace=True),
    )


def _conv3x3_norm_relu(
    in_channels: int, channels: int, dilation: int, separable: bool, norm_layer: NormLayer
) -> nn.Sequential:
    if not separable:
        return _conv_norm_relu(in_channels, channels, 3, norm_layer, dilation=dilation)
    return nn.Sequential(
        _conv_norm_relu(in_channels, in_channels, 3, norm_layer, dilation=dilation, groups=in_channels),
        _conv_norm_relu(in_channels, channels, 1, norm_layer),
    )


def _run(part: nn.Module, x: Tensor) -> Tensor:
    """Run a part, of which each convolution, norm and ReLU in as few passes as they may take."""
    if type(part) is not nn.Sequential or not may_fuse(x, part):
        return part(x)
    if len(part) == 3 and isinstance(part[0], nn.Conv2d):
        conv, norm, relu = part
        return conv_norm_relu(x, conv, norm, relu)
    for child in part:
        x = _run(child, x)
    return x


def _fcn_head(in_channels: int, num_classes: int, dropout: float, norm_layer: NormLayer) -> nn.Sequential:
    """The auxiliary head, with the layers and names of torchvision's FCNHead."""
    channels = in_channels // 4
    return nn.Sequential(
        *_conv_norm_relu(in_channels, channels, 3, norm_layer),
        nn.Dropout(dropout),
        _classifier(channels, num_classes),
    )


def _classifier(in_channels: int, num_classes: int) -> nn.Conv2d:
    """Features to logits, which start near 0."""
    conv = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """`x` (N, C, h, w) bilinearly at the height and width of `like`."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def _full_size_logits(logits: Tensor, images: Tensor) -> Tensor:
    """Logits at the images' size.

    Under autocast they become float32 before they grow, so no second copy is made. They grow with the channels last in
    memory, whatever the model's layout: resizing and cross-entropy read all the classes of a pixel together.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.contiguous(memory_format=torch.channels_last)
    if may_fuse(logits) and logits.dtype == torch.float32 and not (logits.requires_grad and torch.is_grad_enabled()):
        return _resize_in_large_pages(logits, images)
    return _resize(logits, images)


def _resize_in_large_pages(x: Tensor, like: Tensor) -> Tensor:
    """The same as `_resize` without gradients, channels last, in memory of numpy's.

    For large arrays numpy asks Linux for large pages: of 150 maps of 512 x 512, touching torch's small pages for the
    first time takes three quarters of the resizing.
    """
    images, channels, (height, width) = x.shape[0], x.shape[1], like.shape[2:]
    out = torch.from_numpy(np.empty((images, height, width, channels), np.float32)).permute(0, 3, 1, 2)
    torch.ops.aten.upsample_bilinear2d.out(x, [height, width], False, None, None, out=out)
    return out


def _image_batch(images: Tensor | Sequence[Tensor]) -> Tensor:
    """The images as one tensor (N, 3, H, W), checked."""
    if not isinstance(images, Tensor):
        sizes = sorted({tuple(image.shape) for image in images})
        if len(sizes) > 1:
            raise ValueError(
                f"the images of a batch have different sizes, {', '.join(map(str, sizes))}: train on crops of one "
                f"size, and evaluate with evaluate(..., predict=SegmentationInference())"
            )
        images = torch.stack(list(images)) if sizes else torch.empty(0)
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(
            f"images have the shape {tuple(images.shape)}: they must be (N, 3, H, W), or a list of (3, H, W), and not "
            f"empty"
        )
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: they must be float in [0, 1]; for uint8, images.float() / 255")
    return images


def _mask_batch(masks: Tensor | Sequence[Tensor], images: Tensor) -> Tensor:
    """The masks as one tensor (N, H, W), checked against the images."""
    shapes = [tuple(mask.shape) for mask in masks]
    expected = (images.shape[2], images.shape[3])
    if len(shapes) != len(images):
        raise ValueError(f"there are {len(shapes)} masks for {len(images)} images: give one an image")
    for index, shape in enumerate(shapes):
        if shape != expected:
            raise ValueError(
                f"mask {index} has the shape {shape} and its image is {expected}: a mask is (H, W) at its image's "
                f"size, a class in each pixel"
            )
    batch = masks if isinstance(masks, Tensor) else torch.stack(list(masks))
    if batch.dtype not in (torch.uint8, torch.int64):
        raise ValueError(f"masks are {batch.dtype}: they must be uint8 or int64, a class in each pixel")
    return batch
