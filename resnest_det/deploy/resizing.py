"""A detector's resizing as an ONNX file has it: to the size that it has in eager mode, at every size of an image.

torchvision's transform resizes an image by a factor and rounds its sides down. In eager mode that is arithmetic of
Python's floats; what it leaves in a trace is arithmetic of float32 tensors, which for about one size in ten comes out
below an integer that the other reaches, or reaches one that the other does not. A resized side is then a pixel off, and
so are the features and the boxes.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx.operators import shape_as_tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform


def resized_as_eager(model: nn.Module) -> nn.Module:
    """A model whose ONNX files resize images as it does itself.

    Args:
        model: any; a transform of a subclass of torchvision's stays.

    Returns:
        A copy that shares the weights; the model itself where it has no such transform.
    """
    transforms = [module for module in model.modules() if type(module) is GeneralizedRCNNTransform]
    if not transforms:
        return model
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    memo |= {id(transform): _Transform(transform) for transform in transforms}
    return deepcopy(model, memo)


class _Transform(GeneralizedRCNNTransform):
    """torchvision's, with sizes in float64 in an ONNX file too, by the same operations in the same order."""

    def __init__(self, transform: GeneralizedRCNNTransform) -> None:
        super().__init__(
            transform.min_size,
            transform.max_size,
            transform.image_mean,
            transform.image_std,
            transform.size_divisible,
            transform.fixed_size,
        )
        self.train(transform.training)

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.training or self.fixed_size is not None or not torch.onnx.is_in_onnx_export():
            return super().resize(image, target)
        sides = shape_as_tensor(image)[-2:]
        # Of one axis, and divided by tensors: the exporter turns constants without axes into float32, and torch divides
        # a number by a tensor by its reciprocal, which rounds once more.
        bounds = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
        scale = (bounds / torch.stack([sides.min(), sides.max()]).double()).amin(0, keepdim=True)
        size: Any = (sides.double() * scale).long()
        return F.interpolate(image[None], [size[0], size[1]], mode="bilinear", align_corners=False)[0], target
