"""SegmentationInference: images of any size, whole and in windows, at scales and mirrored."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnest_det.evaluation.segmentation as segmentation
from resnest_det.evaluation import MeanIoU, SegmentationInference, evaluate


class Pointwise(nn.Module):
    """A 1x1 convolution, for which the surroundings of a pixel do not matter; remembers what it was shown."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(3, num_classes, 1)
        with torch.no_grad():
            self.classifier.weight.normal_(std=4.0, generator=torch.Generator().manual_seed(0))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.shapes.append(tuple(images.shape))
        return {"out": self.classifier(images)}


class LeftToRight(Pointwise):
    """Sees more than a pixel, and not the same to its left as to its right; its logits are half as large."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = super().forward(images)["out"]
        return {"out": F.avg_pool2d(logits + logits.roll(1, dims=-1), 2, ceil_mode=True)}


class ByColumn(nn.Module):
    """Logits that are the columns' numbers within what the model is shown, for all but class 0."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        count, _, height, width = images.shape
        columns = torch.arange(float(width)).expand(count, 1, height, width)
        return {"out": torch.cat([torch.zeros_like(columns), columns], dim=1)}


class Answers(nn.Module):
    """Answers anything with the same."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer


def image_of(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def whole(model: nn.Module, image: Tensor) -> Tensor:
    """The plain way: one pass, the logits resized to the image."""
    logits = model(image[None])["out"]
    return F.interpolate(logits, size=image.shape[1:], mode="bilinear", align_corners=False)[0]


@pytest.fixture
def model() -> Pointwise:
    return Pointwise().eval()


@pytest.fixture
def one_sided() -> LeftToRight:
    return LeftToRight().eval()


# --- one pass ---


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (33, 47)])
def test_without_arguments_the_model_sees_each_image_as_it_is(size: tuple[int, int], one_sided: LeftToRight) -> None:
    image = image_of(*size)
    (label_map,) = SegmentationInference()(one_sided, [image])
    assert one_sided.shapes == [(1, 3, *size)]
    assert label_map.dtype == torch.int64
    assert torch.equal(label_map, whole(one_sided, image).argmax(dim=0))


def test_images_of_several_sizes_keep_their_order_and_equal_ones_are_one_batch(model: Pointwise) -> None:
    images = [image_of(6, 4, seed=0), image_of(5, 8, seed=1), image_of(6, 4, seed=2)]
    label_maps = SegmentationInference()(model, images)
    assert model.shapes == [(2, 3, 6, 4), (1, 3, 5, 8)]
    for image, label_map in zip(images, label_maps, strict=True):
        assert torch.equal(label_map, whole(model, image).argmax(dim=0))


def test_a_tensor_of_images(model: Pointwise) -> None:
    images = torch.stack([image_of(6, 4, seed=0), image_of(6, 4, seed=1)])
    label_maps = SegmentationInference()(model, images)
    assert model.shapes == [(2, 3, 6, 4)]
    assert torch.equal(torch.stack(label_maps), model(images)["out"].argmax(dim=1))


def test_no_images(model: Pointwise) -> None:
    assert SegmentationInference()(model, []) == []


@pytest.mark.parametrize(
    ("short_side", "max_side", "seen"),
    [
        (0, 0, (30, 61)),
        (60, 0, (60, 122)),
        (15, 0, (15, 30)),
        (60, 100, (49, 100)),
        (0, 30, (15, 30)),
        (0, 100, (30, 61)),  # a limit does not enlarge
    ],
)
def test_the_size_the_model_sees(short_side: int, max_side: int, seen: tuple[int, int], model: Pointwise) -> None:
    (label_map,) = SegmentationInference(short_side=short_side, max_side=max_side)(model, [image_of(30, 61)])
    assert model.shapes == [(1, 3, *seen)]
    assert label_map.shape == (30, 61)


def test_resizing_is_bilinear_without_smoothing(model: Pointwise) -> None:
    image = image_of(30, 61)
    shrunk = F.interpolate(image[None], size=(15, 30), mode="bilinear", align_corners=False, antialias=False)
    logits = F.interpolate(model(shrunk)["out"], size=(30, 61), mode="bilinear", align_corners=False)
    (label_map,) = SegmentationInference(short_side=15)(model, [image])
    assert torch.equal(label_map, logits[0].argmax(dim=0))


# --- several passes ---


def test_scores_are_the_mean_of_the_probabilities_of_all_passes(one_sided: LeftToRight) -> None:
    image = image_of(20, 31)
    expected = []
    for size in [(10, 16), (20, 31), (35, 54)]:
        resized = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        for seen, turned_back in [(resized, False), (resized.flip(-1), True)]:
            logits = F.interpolate(one_sided(seen[None])["out"], size=(20, 31), mode="bilinear", align_corners=False)[0]
            expected.append((logits.flip(-1) if turned_back else logits).softmax(dim=0))
    one_sided.shapes.clear()
    predict = SegmentationInference(scales=(0.5, 1.0, 1.75), flip=True)
    scores = predict.scores(one_sided, image)
    assert one_sided.shapes == [(1, 3, *size) for size in [(10, 16), (20, 31), (35, 54)] for _ in range(2)]
    assert torch.allclose(scores, torch.stack(expected).mean(dim=0), rtol=0, atol=1e-6)
    assert torch.equal(predict(one_sided, [image])[0], scores.argmax(dim=0))


def test_scales_are_relative_to_the_short_side(model: Pointwise) -> None:
    SegmentationInference(short_side=20, max_side=30, scales=(0.5, 2.0))(model, [image_of(10, 10)])
    assert model.shapes == [(1, 3, 10, 10), (1, 3, 40, 40)]


def test_a_scale_leaves_at_least_one_pixel(model: Pointwise) -> None:
    (label_map,) = SegmentationInference(scales=(0.1,))(model, [image_of(1, 4)])
    assert model.shapes == [(1, 3, 1, 1)]
    assert label_map.shape == (1, 4)


def test_with_flip_a_mirrored_image_gets_the_mirrored_answer(one_sided: LeftToRight) -> None:
    image = image_of(9, 12)
    predict = SegmentationInference(flip=True)
    scores, mirrored = predict.scores(one_sided, image), predict.scores(one_sided, image.flip(-1))
    assert torch.allclose(mirrored.flip(-1), scores, rtol=0, atol=1e-6)
    alone = SegmentationInference().scores(one_sided, image.flip(-1)).flip(-1)
    assert not torch.allclose(alone, scores, rtol=0, atol=1e-2), "the model should tell left from right"


def test_scores_are_probabilities_in_one_pass_too(model: Pointwise) -> None:
    image = image_of(70, 90)  # more rows than are added at once
    scores = SegmentationInference().scores(model, image)
    assert torch.allclose(scores, whole(model, image).softmax(dim=0), rtol=0, atol=1e-6)


def test_nothing_is_written_into_what_the_model_returned() -> None:
    answer = torch.randn(1, 4, 8, 8)
    before = answer.clone()
    for predict in (SegmentationInference(flip=True), SegmentationInference(scales=(0.5, 1.0))):
        predict(Answers({"out": answer}).eval(), [image_of(8, 8)])
    assert torch.equal(answer, before)


# --- windows ---


@pytest.mark.parametrize("window", [31, 40])
def test_a_window_that_covers_the_image_is_the_whole_image(window: int, one_sided: LeftToRight) -> None:
    image = image_of(20, 31)
    windowed = SegmentationInference(window=window).scores(one_sided, image)
    assert torch.equal(windowed, SegmentationInference().scores(one_sided, image))


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((20, 31), 8, 0),
        ((20, 31), 8, 8),
        ((20, 31), 7, 1),
        ((8, 31), 8, 5),
        ((5, 31), 8, 6),
        ((31, 5), 8, 6),
        ((3, 4), 1, 1),
    ],
)
def test_windows_of_a_pointwise_model_are_the_whole_image(
    size: tuple[int, int], window: int, stride: int, model: Pointwise
) -> None:
    image = image_of(*size)
    scores = SegmentationInference(window=window, stride=stride).scores(model, image)
    shown = (min(window, size[0]), min(window, size[1]))
    assert {shape[2:] for shape in model.shapes} == {shown}
    assert max(shape[0] for shape in model.shapes) <= 8
    assert torch.allclose(scores, whole(model, image).softmax(dim=0), rtol=0, atol=1e-5)


def test_the_number_of_windows(model: Pointwise) -> None:
    # Two thirds of 9 are 6. Rows from 0 and 6 and, at the border, 11; columns from 0, 6, 12, 18 and 22.
    SegmentationInference(window=9)(model, [image_of(20, 31)])
    assert [shape[0] for shape in model.shapes] == [8, 7]
    model.shapes.clear()
    # A last window that ends at the border by itself is not run twice.
    SegmentationInference(window=10, stride=10)(model, [image_of(20, 30)])
    assert [shape[0] for shape in model.shapes] == [6]


def test_windows_of_several_images_of_one_size(model: Pointwise) -> None:
    images = [image_of(12, 20, seed=seed) for seed in range(3)]
    label_maps = SegmentationInference(window=8, stride=4)(model, images)
    # 2 x 4 windows of 3 images, where 2 windows of every image come at once.
    assert [shape[0] for shape in model.shapes] == [6, 6, 6, 6]
    for image, label_map in zip(images, label_maps, strict=True):
        assert torch.equal(label_map, whole(model, image).argmax(dim=0))


def test_overlapping_windows_count_less_towards_their_border() -> None:
    scores = SegmentationInference(window=6, stride=4).scores(ByColumn().eval(), torch.zeros(3, 6, 10))
    logits = (scores[1] / scores[0]).log()
    # Columns 4 and 5 are the last two of the first window and the first two of the second. In the third row
    # both windows weigh the columns by their distance from the border, 2 and 1, then 1 and 2.
    expected = [0, 1, 2, 3, (2 * 4 + 1 * 0) / 3, (1 * 5 + 2 * 1) / 3, 2, 3, 4, 5]
    assert logits[2].tolist() == pytest.approx(expected, abs=1e-5)
    # The first row lies on the border of both: they count alike.
    assert logits[0, 4:6].tolist() == pytest.approx([2, 3], abs=1e-5)


def test_windows_of_a_model_with_smaller_logits(one_sided: LeftToRight) -> None:
    (label_map,) = SegmentationInference(window=8)(one_sided, [image_of(11, 14)])
    assert label_map.shape == (11, 14)


def test_windows_scales_and_flip_together(model: Pointwise) -> None:
    image = image_of(20, 31)
    options: dict[str, Any] = {"scales": (0.5, 1.5), "flip": True, "short_side": 24}
    windowed = SegmentationInference(window=10, **options).scores(model, image)
    assert max(max(shape[2:]) for shape in model.shapes) == 10
    assert torch.allclose(windowed, SegmentationInference(**options).scores(model, image), rtol=0, atol=1e-5)


# --- through evaluate ---


@pytest.mark.parametrize(
    "predict",
    [
        SegmentationInference(),
        SegmentationInference(window=8, stride=5),
        SegmentationInference(scales=(1.0, 2.0), flip=True),
    ],
)
def test_evaluate_on_images_of_several_sizes(predict: SegmentationInference, model: Pointwise) -> None:
    sizes = [(12, 20), (7, 9), (12, 20), (1, 1)]
    images = [(image_of(*size, seed=seed) * 255).byte() for seed, size in enumerate(sizes)]
    label_maps = predict(model, [image.float() / 255 for image in images])
    masks = [label_map.to(torch.uint8) for label_map in label_maps]
    names = [f"{index}.png" for index in range(len(images))]
    loader = [(images[:3], masks[:3], names[:3]), (images[3:], masks[3:], names[3:])]
    metric = MeanIoU({label: str(label) for label in range(5)})
    assert evaluate(model.train(), loader, metric, predict=predict) == {
        "mIoU": 1.0,
        "mAcc": 1.0,
        "aAcc": 1.0,
        "fwIoU": 1.0,
    }
    assert model.training
    wrong = masks[0].clone()
    wrong[0, 0] = (wrong[0, 0] + 1) % 5
    numbers = evaluate(model, [([images[0]], [wrong], names[:1])], metric, predict=predict)
    assert numbers["aAcc"] == 239 / 240


@pytest.mark.parametrize("num_classes", [16, 17, 40])
def test_many_classes_are_compared_as_one(num_classes: int) -> None:
    """Labels come from a few classes at a time; they are those of the logits of all, ties going to the first."""
    torch.manual_seed(0)
    logits = torch.randn(1, num_classes, 5, 7).round(decimals=1)
    image = torch.rand(3, 11, 13)
    (labels,) = SegmentationInference()(Answers({"out": logits}).eval(), [image])
    full = F.interpolate(logits, size=(11, 13), mode="bilinear", align_corners=False)[0]
    assert torch.equal(labels, full.argmax(0))


def test_the_docstring_example() -> None:
    results = doctest.testmod(segmentation, extraglobs={"SegmentationInference": SegmentationInference})
    assert results.attempted > 0
    assert results.failed == 0


def test_no_gradients_are_kept(model: Pointwise) -> None:
    predict = SegmentationInference(flip=True)
    assert not predict.scores(model, image_of(4, 4)).requires_grad


# --- mistakes ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, r"scales is empty; give at least one"),
        ({"scales": (1.0, 0.0)}, r"scales has 0\.0; a scale is a finite factor above 0"),
        ({"scales": (-0.5,)}, r"scales has -0\.5"),
        ({"scales": (float("nan"),)}, r"scales has nan"),
        ({"scales": (float("inf"),)}, r"scales has inf"),
        ({"short_side": -1}, r"short_side=-1 is negative; give a number of pixels, or 0"),
        ({"max_side": -2}, r"max_side=-2 is negative"),
        ({"window": -3}, r"window=-3 is negative"),
        ({"window": 8, "stride": -4}, r"stride=-4 is negative"),
        ({"short_side": 600, "max_side": 500}, r"short_side=600 is above max_side=500"),
        ({"stride": 4}, r"stride=4 has no effect without window"),
        ({"window": 8, "stride": 9}, r"stride=9 is above window=8 .* give at most 8"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationInference(**options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"image 0 is uint8 \(3, 4, 4\); .* divided by 255"),
        (torch.zeros(4, 4), r"image 0 is float32 \(4, 4\); an image is float \(3, H, W\)"),
        (torch.zeros(3, 0, 4), r"image 0 is float32 \(3, 0, 4\); .* at least one pixel"),
    ],
)
def test_wrong_images(image: Tensor, message: str, model: Pointwise) -> None:
    predict = SegmentationInference()
    with pytest.raises(ValueError, match=message):
        predict(model, [image])
    with pytest.raises(ValueError, match=message):
        predict.scores(model, image)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(1, 5, 4, 4), r"the model returned Tensor \(1, 5, 4, 4\); .* a dict with the logits 'out'"),
        ({"loss_seg": torch.zeros(())}, r"the model returned \{'loss_seg': Tensor \(\)\}"),
        ({"out": torch.zeros(5, 4, 4)}, r"returned \{'out': Tensor \(5, 4, 4\)\}"),
        ({"out": torch.zeros(2, 5, 4, 4)}, r"returned \{'out': Tensor \(2, 5, 4, 4\)\}; .* here with N = 1"),
        ([{}], r"the model returned list"),
        ({"out": torch.full((1, 5, 4, 4), torch.nan)}, r"logits hold NaN; .* did the training diverge"),
    ],
)
def test_wrong_answers(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationInference()(Answers(answer).eval(), [image_of(4, 4)])


def test_a_model_in_training_mode(model: Pointwise) -> None:
    with pytest.raises(ValueError, match=r"in training mode, .* call eval\(\)"):
        SegmentationInference()(model.train(), [image_of(4, 4)])
