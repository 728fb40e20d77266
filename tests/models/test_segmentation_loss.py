"""The losses of segmentation beside torch's, plain loops and segmentation-models-pytorch; masks that count nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor

from resnest_det.models import SegmentationLoss

NUM_CLASSES = 5
WEIGHTS = [0.5, 1.0, 2.0, 0.0, 3.0]
EVERYTHING = {"class_weights": WEIGHTS, "ohem_threshold": 0.7, "ohem_min_kept": 3, "dice_weight": 0.5}


def random_batch(seed: int, classes: int = NUM_CLASSES) -> tuple[Tensor, Tensor]:
    """Logits (3, 5, 6, 7) and masks (3, 6, 7) of the first `classes`, a quarter of their pixels ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, NUM_CLASSES, 6, 7, generator=generator)
    masks = torch.randint(0, classes, (3, 6, 7), generator=generator)
    masks[torch.rand(3, 6, 7, generator=generator) < 0.25] = 255
    return logits.requires_grad_(), masks


def counted_pixels(logits: Tensor, masks: Tensor) -> list[tuple[float, int]]:
    """(minus the logarithm of the true class's probability, class) of each pixel that is not ignored."""
    pixels = []
    for n, y, x in (masks != 255).nonzero().tolist():
        label = int(masks[n, y, x])
        pixels.append((-logits[n, :, y, x].double().log_softmax(0)[label].item(), label))
    return pixels


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_is_torchs(weights: list[float] | None, dtype: torch.dtype) -> None:
    logits, masks = random_batch(0)
    losses = SegmentationLoss(class_weights=weights)(logits, masks.to(dtype))
    expected = F.cross_entropy(logits, masks, None if weights is None else torch.tensor(weights), ignore_index=255)
    assert list(losses) == ["seg"]
    torch.testing.assert_close(losses["seg"], expected)
    torch.testing.assert_close(
        torch.autograd.grad(losses["seg"], logits)[0], torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("min_kept", [1, 12, 10_000], ids=["threshold decides", "least decides", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_hard_pixels_are_those_of_a_plain_sort(seed: int, min_kept: int, weights: list[float] | None) -> None:
    logits, masks = random_batch(seed)
    threshold = 0.001 if min_kept == 12 else 0.4
    pixels = sorted(counted_pixels(logits, masks), reverse=True)
    num_below = sum(hardness > -math.log(threshold) for hardness, _ in pixels)
    num_kept = max(num_below, min(3 * min_kept, len(pixels)))  # three images
    assert {1: num_kept == num_below, 12: num_below < num_kept == 36, 10_000: num_kept == len(pixels)}[min_kept]
    factors = weights or [1.0] * NUM_CLASSES
    total = sum(factors[label] * hardness for hardness, label in pixels[:num_kept])
    expected = total / sum(factors[label] for _, label in pixels[:num_kept])
    criterion = SegmentationLoss(ohem_threshold=threshold, ohem_min_kept=min_kept, class_weights=weights)
    assert criterion(logits, masks)["seg"].item() == pytest.approx(expected, rel=1e-5)


def test_easy_pixels_get_no_gradient() -> None:
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 0, 0] = torch.tensor([9.0, -9.0, 9.0, 0.5])
    logits.requires_grad_()
    masks = torch.zeros(1, 1, 4, dtype=torch.uint8)
    SegmentationLoss(ohem_threshold=0.7, ohem_min_kept=1)(logits, masks)["seg"].backward()
    assert (logits.grad[0].abs().sum(0)[0] > 0).tolist() == [False, True, False, True]


def test_a_nan_is_not_mined_away() -> None:
    logits, masks = random_batch(0)
    logits = logits.detach()
    logits[0, :, 0, 0] = math.nan
    masks[0, 0, 0] = 1
    assert torch.isnan(SegmentationLoss(ohem_threshold=0.7, ohem_min_kept=1)(logits, masks)["seg"])


@pytest.mark.parametrize("classes", [NUM_CLASSES, 3], ids=["all present", "two absent"])
@pytest.mark.parametrize("seed", range(3))
def test_dice_is_a_loop_over_classes(seed: int, classes: int) -> None:
    logits, masks = random_batch(seed, classes)
    probabilities = logits.double().softmax(1)
    counted = masks != 255
    scores = []
    for label in range(NUM_CLASSES):
        truth = (masks == label)[counted].double()
        predicted = probabilities[:, label][counted]
        if truth.sum() > 0:
            scores.append(2 * (predicted * truth).sum() / ((predicted**2).sum() + (truth**2).sum()))
    assert len(scores) == classes
    losses = SegmentationLoss(dice_weight=0.3)(logits, masks)
    assert list(losses) == ["seg", "dice"]
    expected = 0.3 * (1 - sum(scores) / len(scores))
    torch.testing.assert_close(losses["dice"].double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (losses["dice"], expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_dice_of_hard_predictions_is_that_of_segmentation_models() -> None:
    logits, masks = random_batch(0)  # a probability of 0 or 1 is its own square, so that the definitions agree
    hard = 1000 * F.one_hot(logits.argmax(1), NUM_CLASSES).permute(0, 3, 1, 2).float()
    theirs = DiceLoss("multiclass", ignore_index=255)(hard, masks)
    torch.testing.assert_close(SegmentationLoss(dice_weight=1)(hard, masks)["dice"], theirs)


def test_an_absent_class_with_no_probability_at_all_is_no_nan() -> None:
    logits = torch.tensor([[300.0, -300.0, 0.0]]).view(1, 3, 1, 1).requires_grad_()
    losses = SegmentationLoss(dice_weight=1)(logits, torch.zeros(1, 1, 1, dtype=torch.uint8))
    sum(losses.values()).backward()
    assert losses["dice"].item() == 0
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("arguments", [{}, {"class_weights": WEIGHTS}, {"ohem_threshold": 0.7}, EVERYTHING])
def test_all_ignored_is_zero_with_zero_gradients(arguments: dict[str, object]) -> None:
    logits, masks = random_batch(0)
    losses = SegmentationLoss(**arguments)(logits, torch.full_like(masks, 255))
    assert [loss.item() for loss in losses.values()] == [0.0] * len(losses)
    sum(losses.values()).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("ohem_threshold", [None, 0.7])
def test_only_classes_of_no_weight_is_zero(ohem_threshold: float | None) -> None:
    logits, masks = random_batch(0)
    criterion = SegmentationLoss(class_weights=WEIGHTS, ohem_threshold=ohem_threshold)
    loss = criterion(logits, torch.full_like(masks, 3))["seg"]
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("arguments", [{}, EVERYTHING])
def test_one_pixel(arguments: dict[str, object]) -> None:
    logits = torch.zeros(1, NUM_CLASSES, 1, 1)
    losses = SegmentationLoss(**arguments)(logits, torch.ones(1, 1, 1, dtype=torch.uint8))
    assert losses["seg"].item() == pytest.approx(math.log(NUM_CLASSES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32(dtype: torch.dtype) -> None:
    logits, masks = random_batch(0)
    low = logits.detach().to(dtype)
    for name, loss in SegmentationLoss(**EVERYTHING)(low, masks).items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, SegmentationLoss(**EVERYTHING)(low.float(), masks)[name])


def test_class_weights_are_not_in_the_state_dict() -> None:
    assert SegmentationLoss(class_weights=WEIGHTS).state_dict() == {}


def test_another_ignored_value() -> None:
    logits, masks = random_batch(0)
    ours = SegmentationLoss(ignore_index=-1)(logits, masks.masked_fill(masks == 255, -1))["seg"]
    assert torch.equal(ours, SegmentationLoss()(logits, masks)["seg"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "a mask has the value 5, and the model has 5 classes: a pixel is 0 to 4, or 255 where it is ignored"),
        (254, "a mask has the value 254, and the model has 5 classes"),
        (-1, "a mask has the value -1, and the model has 5 classes"),
    ],
)
def test_value_beyond_the_classes(value: int, message: str) -> None:
    logits, masks = random_batch(0)
    masks[1, 2, 3] = value
    with pytest.raises(ValueError, match=message):
        SegmentationLoss()(logits, masks)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(2, 6, 6, dtype=torch.uint8), r"masks of \(2, 6, 6\), torch.uint8, do not belong together"),
        (torch.zeros(3, 6, 7), r"logits of the shape \(3, 5, 6, 7\) and masks of \(3, 6, 7\), torch.float32, do not"),
    ],
    ids=["size", "float"],
)
def test_masks_of_another_form(masks: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationLoss()(random_batch(0)[0], masks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weights": [1.0, -2.0]}, r"class_weights=\[1.0, -2.0\] must not be negative, nor all zero"),
        ({"class_weights": [0.0, 0.0]}, r"class_weights=\[0.0, 0.0\] must not be negative, nor all zero"),
        ({"ohem_threshold": 0.0}, "ohem_threshold=0.0 is a probability: above 0 and at most 1"),
        ({"ohem_threshold": 1.5}, "ohem_threshold=1.5 is a probability: above 0 and at most 1"),
        ({"ohem_min_kept": 0}, "ohem_min_kept=0 must be 1 or more pixels"),
        ({"dice_weight": -0.5}, r"dice_weight=-0.5 must be 0 \(no Dice loss\) or more"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 weights and there are 5 classes: give one a class"),
        ({"ignore_index": 0}, r"ignore_index=0 is the number of a class \(0 to 4\), which would never be learnt"),
        ({"ignore_index": 4}, r"ignore_index=4 is the number of a class \(0 to 4\)"),
    ],
)
def test_arguments_that_contradict_the_classes(arguments: dict[str, object], message: str) -> None:
    logits, masks = random_batch(0)
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(**arguments)(logits, masks)
