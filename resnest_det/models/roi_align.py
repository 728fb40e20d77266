"""RoIAlign on the CPU: each value as a weighted sum of rows of the feature map.

Paper: He et al., "Mask R-CNN", arXiv 1703.06870.
Reference implementation: torchvision's `roi_align` with aligned=False, and its MultiScaleRoIAlign, whose values and
gradients these are up to rounding. What differs is how they are computed: with the channels last, a position of the
feature map is a row; a bin is the sum of the four rows around each of its samples by their bilinear weights; and
torch's embedding bag sums rows by weights quickly, where `roi_align` visits every channel's plane for each sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import _convert_to_roi_format, _filter_input, _setup_scales

from resnest_det.layers.fused import may_fuse


class RowRoIAlign(MultiScaleRoIAlign):
    """torchvision's MultiScaleRoIAlign, by rows where it is on the CPU in float32 or float64.

    On other devices, traced, compiled, in 16 bits, and without a sampling ratio it is torchvision's. Its arguments are
    torchvision's. What differs: features that are not finite at the border spread to boxes that reach over it, and
    torch.jit.script does not take it.

    Shape:
        A dict of levels, each (N, C, H, W), for each image (M, 4) boxes xyxy in pixels, and the images' sizes, to
        (boxes of all images, C, height, width).
    """

    scales: list[float] | None
    map_levels: Callable[[list[Tensor]], Tensor] | None

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool each box from the level that its size assigns it to."""
        levels = _filter_input(x, self.featmap_names)
        if not (
            self.sampling_ratio > 0
            and levels
            and all(may_fuse(level) and level.dtype in (torch.float32, torch.float64) for level in levels)
        ):
            return super().forward(x, boxes, image_shapes)
        if self.scales is None or self.map_levels is None:
            self.scales, self.map_levels = _setup_scales(
                levels, image_shapes, self.canonical_scale, self.canonical_level
            )
        rois = _convert_to_roi_format(boxes)
        height, width = self.output_size
        out = levels[0].new_zeros(len(rois), height, width, levels[0].shape[1])  # of a box without a level: zeros
        level_of = self.map_levels(boxes) if len(levels) > 1 else rois.new_zeros(len(rois), dtype=torch.int64)
        for index, (level, scale) in enumerate(zip(levels, self.scales, strict=True)):
            (chosen,) = torch.where(level_of == index)
            out[chosen] = _pooled(level, rois[chosen], scale, (height, width), self.sampling_ratio)
        return out.permute(0, 3, 1, 2)


def _pooled(features: Tensor, rois: Tensor, scale: float, output_size: tuple[int, int], sampling_ratio: int) -> Tensor:
    """One level, in the way that is quicker there."""
    is_last = features.is_contiguous(memory_format=torch.channels_last)
    # To lay out a large map anew costs more than a few boxes do.
    if not is_last and len(rois) * output_size[0] * output_size[1] * 16 < features.shape[2:].numel():
        return roi_align(features, rois, output_size, scale, sampling_ratio).permute(0, 2, 3, 1)
    return roi_align_by_rows(features, rois, scale, output_size, sampling_ratio)


def roi_align_by_rows(
    features: Tensor, rois: Tensor, scale: float, output_size: tuple[int, int], sampling_ratio: int
) -> Tensor:
    """torchvision's `roi_align(..., aligned=False)`, with the channels last.

    Args:
        features: (N, C, H, W).
        rois: (M, 5): the image's index, then x1, y1, x2, y2 in pixels of the image.
        scale: of pixels of the features to those of the image.
        output_size: bins in height and in width.
        sampling_ratio: samples of a bin in each direction, 1 or more.

    Returns:
        (M, height, width, C).
    """
    _, channels, height, width = features.shape
    rows = features.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1, channels)
    rois = rois.detach()  # as in the reference, boxes have no gradient
    left, top, right, bottom = (rois[:, 1:] * scale).unbind(1)
    y, y_weights = _samples(top, bottom, output_size[0], sampling_ratio, height)
    x, x_weights = _samples(left, right, output_size[1], sampling_ratio, width)
    image = rois[:, 0].long() * (height * width)
    # (M, bins in height, bins in width, rows of a bin in y, in x)
    indices = image[:, None, None, None, None] + y[:, :, None, :, None] * width + x[:, None, :, None, :]
    weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :] / sampling_ratio**2
    bags = len(rois) * output_size[0] * output_size[1]
    if bags == 0:  # still a function of the features, whose gradient is then zero
        return rows[:0].reshape(len(rois), *output_size, channels)
    out = F.embedding_bag(indices.reshape(bags, -1), rows, per_sample_weights=weights.reshape(bags, -1), mode="sum")
    return out.view(len(rois), *output_size, channels)


def _samples(low: Tensor, high: Tensor, bins: int, sampling_ratio: int, size: int) -> tuple[Tensor, Tensor]:
    """Along one direction, the two positions around each sample and their weights, both (M, bins, 2 * sampling_ratio).

    A sample more than one position outside counts nothing; one closer counts as on the border.
    """
    bin_size = ((high - low).clamp(min=1) / bins)[:, None, None]
    bin_index = torch.arange(bins)[:, None]
    sample_index = torch.arange(sampling_ratio) + 0.5
    at = low[:, None, None] + bin_index * bin_size + sample_index * bin_size / sampling_ratio
    inside = (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    below = at.floor()
    share = at - below
    first = below.long()
    positions = torch.stack([first, (first + 1).clamp(max=size - 1)], dim=-1)
    weights = torch.stack([(1 - share) * inside, share * inside], dim=-1)
    return positions.flatten(2), weights.flatten(2)
