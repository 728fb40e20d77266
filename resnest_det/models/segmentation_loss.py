"""Losses of semantic segmentation: cross-entropy with class weights and hard pixels, and Dice.

Papers: online hard example mining, Shrivastava et al., arXiv 1604.03540; the Dice loss with squares in its
denominator, Milletari et al., "V-Net", arXiv 1606.04797.
Reference implementation of the mining: mmsegmentation's `OHEMPixelSampler` (a threshold, and a least number of pixels
for each image of the batch).

What differs: the loss is the mean over the kept pixels, where mmsegmentation divides by all of them; and Dice is
averaged over the classes that the batch's masks have, as an absent class has nothing to overlap with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_det.distributed import mean_tensor_over_processes


class SegmentationLoss(nn.Module):
    """Cross-entropy, and Dice where it is asked for, over the pixels that are not ignored.

    In a run of several processes, the cross-entropy of each is divided by the mean number of pixels that they have: the
    mean over the processes is then the loss of all their pixels, however unevenly these are ignored. Dice is of each
    process's own pixels.

    Args:
        ignore_index: value of the masks' pixels that count for nothing; not the number of a class.
        class_weights: a weight for each class in the cross-entropy, not negative; None weighs all alike. The loss is
            the weighted mean: divided by the sum of its pixels' weights.
        ohem_threshold: in (0, 1]: only pixels whose true class has a lower probability than this count in the
            cross-entropy; None counts all.
        ohem_min_kept: with ohem_threshold, the least number of pixels that count, times the images of the batch on
            this process: where fewer are below the threshold, the hardest are taken.
        dice_weight: factor of the Dice loss; 0 leaves it out.

    Raises:
        ValueError: an argument is out of range.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        ohem_threshold: float | None = None,
        ohem_min_kept: int = 100_000,
        dice_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if class_weights is not None and not (all(weight >= 0 for weight in class_weights) and any(class_weights)):
            raise ValueError(f"class_weights={list(class_weights)} must not be negative, nor all zero")
        if ohem_threshold is not None and not 0 < ohem_threshold <= 1:
            raise ValueError(f"ohem_threshold={ohem_threshold} is a probability: above 0 and at most 1, or None")
        if ohem_min_kept < 1:
            raise ValueError(f"ohem_min_kept={ohem_min_kept} must be 1 or more pixels")
        if dice_weight < 0:
            raise ValueError(f"dice_weight={dice_weight} must be 0 (no Dice loss) or more")
        self.ignore_index = ignore_index
        self.ohem_threshold = ohem_threshold
        self.ohem_min_kept = ohem_min_kept
        self.dice_weight = dice_weight
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def check_classes(self, num_classes: int) -> None:
        """Refuse a number of classes that the arguments contradict.

        Raises:
            ValueError: ignore_index is the number of a class, or class_weights has another length.
        """
        if 0 <= self.ignore_index < num_classes:
            raise ValueError(
                f"ignore_index={self.ignore_index} is the number of a class (0 to {num_classes - 1}), which would "
                f"never be learnt: give the ignored pixels another value, such as 255 or -1"
            )
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ValueError(
                f"class_weights has {len(self.class_weights)} weights and there are {num_classes} classes: "
                f"give one a class"
            )

    def forward(self, logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """The losses of a batch, in float32.

        Args:
            logits: (N, K, H, W).
            masks: (N, H, W), integers: 0 to K - 1, or ignore_index.

        Returns:
            "seg", the cross-entropy, and with dice_weight "dice", times its weight. Where every pixel is ignored,
            they are 0, and so are their gradients.

        Raises:
            ValueError: masks of another form than the logits, a value that is no class, or arguments that contradict
                the number of classes.
        """
        if logits.ndim != 4 or masks.shape != (len(logits), *logits.shape[2:]) or masks.is_floating_point():
            raise ValueError(
                f"logits of the shape {tuple(logits.shape)} and masks of {tuple(masks.shape)}, {masks.dtype}, do not "
                f"belong together: they must be (N, K, H, W) and (N, H, W), the masks of integers"
            )
        num_classes = logits.shape[1]
        self.check_classes(num_classes)
        logits = logits.float()  # from bfloat16, a sum over a batch's pixels would keep two or three digits
        masks = masks.long()
        counted = masks != self.ignore_index
        labels = masks[counted]
        if len(labels) == 0:
            nothing = logits.sum() * 0  # connected to every parameter, as DistributedDataParallel needs
            self._share(nothing.detach())  # the other processes wait for this one's part
            return {"seg": nothing, "dice": nothing} if self.dice_weight else {"seg": nothing}
        # Out of range, CUDA would abort the process with a message that names nothing.
        lowest, highest = torch.stack(labels.aminmax()).tolist()
        if lowest < 0 or highest >= num_classes:
            raise ValueError(
                f"a mask has the value {lowest if lowest < 0 else highest}, and the model has {num_classes} classes: "
                f"a pixel is 0 to {num_classes - 1}, or {self.ignore_index} where it is ignored; map the masks' values "
                f"to classes, or raise num_classes"
            )
        losses = {"seg": self._cross_entropy(logits, masks, counted)}
        if self.dice_weight:
            losses["dice"] = self.dice_weight * _dice(logits, masks, counted, labels)
        return losses

    def _cross_entropy(self, logits: Tensor, masks: Tensor, counted: Tensor) -> Tensor:
        if self.ohem_threshold is not None:
            masks = masks.masked_fill(~self._hard(logits.detach(), masks, counted), self.ignore_index)
        total = F.cross_entropy(
            *_pixels(logits, masks), self.class_weights, ignore_index=self.ignore_index, reduction="sum"
        )
        kept = masks[masks != self.ignore_index]
        if self.class_weights is None:
            return total / self._share(total.new_tensor(len(kept)))
        # Where all the batch's classes have weight 0, so is the total.
        return total / self._share(self.class_weights[kept].sum()).clamp(min=torch.finfo(torch.float32).tiny)

    def _share(self, weight: Tensor) -> Tensor:
        """The mean of the processes' weights of pixels: divided by it, their losses have the joint loss as mean."""
        return mean_tensor_over_processes(weight) if self.training else weight

    def _hard(self, logits: Tensor, masks: Tensor, counted: Tensor) -> Tensor:
        """Which pixels (N, H, W) OHEM keeps: those below the threshold, and at least the hardest ohem_min_kept."""
        assert self.ohem_threshold is not None
        # Minus the logarithm of the true class's probability: hard is high.
        hardness = F.cross_entropy(*_pixels(logits, masks), ignore_index=self.ignore_index, reduction="none")
        hardness = hardness.view(masks.shape)
        pixels = hardness[counted]
        least = min(self.ohem_min_kept * len(masks), len(pixels))
        hardest = pixels.kthvalue(len(pixels) - least + 1).values
        easy = (hardness <= -math.log(self.ohem_threshold)) & (hardness < hardest)
        return counted & ~easy  # a NaN is not easy either: it stays, and shows in the loss


def _pixels(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and masks as cross_entropy is quickest on: (N * H * W, K) and (N * H * W,) where that takes no copy."""
    if logits.is_contiguous(memory_format=torch.channels_last):
        return logits.permute(0, 2, 3, 1).flatten(0, 2), masks.flatten()
    return logits, masks


def _dice(logits: Tensor, masks: Tensor, counted: Tensor, labels: Tensor) -> Tensor:
    """1 - the mean of 2 sum(p g) / (sum(p^2) + sum(g^2)) over the classes that the masks have.

    p is a class's probability and g is 1 where it is true, 0 elsewhere; the sums run over the batch's counted pixels.
    """
    num_classes = logits.shape[1]
    probabilities = logits.softmax(dim=1)
    of_true_class = probabilities.gather(1, masks.masked_fill(~counted, 0)[:, None])[:, 0][counted]
    overlaps = torch.zeros(num_classes, device=logits.device).index_add(0, labels, of_true_class)
    squares = (probabilities.square() * counted[:, None]).sum((0, 2, 3))
    pixels = labels.bincount(minlength=num_classes)
    present = pixels > 0  # taken out before the division: an absent class may have 0 / 0
    return 1 - (2 * overlaps[present] / (squares[present] + pixels[present])).mean()
