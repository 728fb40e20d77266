"""evaluate(): what the model and the metric see, and what it leaves behind."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnest_det.evaluation import CocoMeanAveragePrecision, MeanIoU, evaluate

Batch = tuple[list[Tensor], list[dict[str, Any]], list[str]]

BOX = torch.tensor([[10.0, 10.0, 60.0, 60.0]])


class FixedDetector(nn.Module):
    """Answers every image with the same boxes; has the parts that evaluation mode and processes act on."""

    def __init__(self, boxes: Tensor) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm2d(3).eval()
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout()
        self.boxes = boxes
        self.seen: list[Tensor] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        assert not self.norm.training
        assert torch.is_inference_mode_enabled()
        self.seen += images
        num_boxes = len(self.boxes)
        return [
            {
                "boxes": self.boxes.clone(),
                "labels": torch.ones(num_boxes, dtype=torch.int64),
                "scores": torch.full((num_boxes,), 0.5),
            }
            for _ in images
        ]


def batches(image_ids: range) -> list[Batch]:
    """One image a batch, of the grey value 51, with one object at BOX."""
    return [
        (
            [torch.full((3, 64, 64), 51, dtype=torch.uint8)],
            [{"image_id": image_id, "boxes": BOX, "labels": torch.tensor([1])}],
            [f"{image_id}.jpg"],
        )
        for image_id in image_ids
    ]


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def cats() -> CocoMeanAveragePrecision:
    return CocoMeanAveragePrecision({1: "cat"})


def test_evaluate_returns_the_metric_and_restores_every_mode() -> None:
    model = FixedDetector(BOX).train()
    model.frozen.eval()
    before = modes(model)
    assert before == [True, False, True, True]
    metric = cats()
    numbers = evaluate(model, batches(range(3)), metric)
    assert numbers["AP"] == pytest.approx(1.0)
    assert numbers == metric.compute()
    assert metric.per_class()[0].num_boxes == 3
    assert modes(model) == before


def test_images_arrive_as_floats_between_0_and_1() -> None:
    model = FixedDetector(BOX)
    evaluate(model, batches(range(1)), cats())
    (image,) = model.seen
    assert image.dtype == torch.float32
    assert torch.equal(image, torch.full((3, 64, 64), 0.2))


def test_evaluate_resets_the_metric_first() -> None:
    metric = cats()
    model = FixedDetector(BOX)
    assert evaluate(model, batches(range(3)), metric) == evaluate(model, batches(range(3)), metric)


def test_a_model_that_finds_nothing() -> None:
    numbers = evaluate(FixedDetector(torch.zeros(0, 4)), batches(range(2)), cats())
    assert list(numbers) == [
        *("AP", "AP50", "AP75", "APs", "APm", "APl"),
        *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
    ]
    assert (numbers["AP"], numbers["AR100"], numbers["APl"]) == (0.0, 0.0, -1.0)


def test_an_error_names_the_image_and_still_restores_the_modes() -> None:
    model = FixedDetector(torch.full((1, 4), float("nan"))).train()
    model.frozen.eval()
    before = modes(model)
    with pytest.raises(ValueError, match="prediction for image 12: boxes holds nan"):
        evaluate(model, batches(range(12, 14)), cats())
    assert modes(model) == before


def test_an_empty_loader() -> None:
    with pytest.raises(ValueError, match="no images to evaluate"):
        evaluate(FixedDetector(BOX), [], cats())


def test_any_model_and_metric() -> None:
    """Segmentation's shape of things: one tensor in, a dict out, targets as one tensor, no names."""

    class Segmenter(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"out": images.mean(dim=1, keepdim=True)}

    class Recorder:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def reset(self) -> None:
            self.calls = ["reset"]

        def update(self, predictions: dict[str, Tensor], targets: Tensor) -> None:
            assert predictions["out"].shape == (2, 1, 8, 8)
            assert targets.dtype == torch.int64
            self.calls.append("update")

        def merge(self) -> None:
            self.calls.append("merge")

        def compute(self) -> dict[str, float]:
            self.calls.append("compute")
            return {"mIoU": 0.25}

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(2):
            yield torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.int64)

    metric = Recorder()
    # The model has no parameters: without a device it runs on the CPU.
    assert evaluate(Segmenter(), loader(), metric) == {"mIoU": 0.25}
    assert metric.calls == ["reset", "update", "update", "merge", "compute"]


class Recorder:
    """Keeps what `evaluate` handed over."""

    def __init__(self) -> None:
        self.predictions: list[Any] = []

    def reset(self) -> None:
        self.predictions = []

    def update(self, predictions: Any, targets: Any) -> None:
        self.predictions.append(predictions)

    def merge(self) -> None:
        """One process."""

    def compute(self) -> dict[str, float]:
        return {}


def test_predict_takes_the_place_of_calling_the_model() -> None:
    model = FixedDetector(BOX).train()
    answers = [object(), object()]
    calls = []

    def predict(given: nn.Module, images: list[Tensor]) -> object:
        assert not given.training
        assert torch.is_inference_mode_enabled()
        calls.append((given, images))
        return answers[len(calls) - 1]

    metric = Recorder()
    evaluate(model, batches(range(2)), metric, predict=predict)
    assert [given for given, _ in calls] == [model, model]
    assert all(torch.equal(images[0], torch.full((3, 64, 64), 0.2)) for _, images in calls)
    assert all(got is answer for got, answer in zip(metric.predictions, answers, strict=True))
    assert model.seen == []
    assert model.training


def test_predictions_stay_where_the_model_made_them() -> None:
    metric = Recorder()
    device = torch.device("meta")
    evaluate(nn.Identity(), batches(range(1)), metric, device=device)
    assert metric.predictions[0][0].device == device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_average_precision_of_predictions_on_a_gpu() -> None:
    numbers = evaluate(FixedDetector(BOX.cuda()).cuda(), batches(range(3)), cats())
    assert numbers["AP"] == pytest.approx(1.0)


def test_images_go_to_the_device_asked_for() -> None:
    model = FixedDetector(BOX)
    evaluate(model, batches(range(1)), cats(), device=torch.device("meta"))
    assert model.seen[0].device.type == "meta"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "progress", "shown"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)],
)
def test_the_progress_bar_is_for_terminals(
    stderr: type[io.StringIO], progress: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stderr()
    monkeypatch.setattr("sys.stderr", stream)
    evaluate(FixedDetector(BOX), batches(range(2)), cats(), progress=progress)
    assert ("evaluate" in stream.getvalue()) == shown


def evaluated(rank: int, folder: str) -> None:
    """One of two processes: the first evaluates no batch, then 1; the second evaluates 4 each time."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model = DistributedDataParallel(FixedDetector(BOX[:rank]))
    results = []
    for num_first in (0, 1):
        image_ids = range(num_first) if rank == 0 else range(1, 5)
        results.append(evaluate(model, batches(image_ids), cats())["AR100"])
    Path(folder, f"{rank}.json").write_text(json.dumps([results, modes(model)]))
    dist.destroy_process_group()


def test_two_processes_with_uneven_parts(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(evaluated, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    recalls, training = first
    # The first process's model finds nothing in its image, the second's finds everything in its 4.
    assert recalls == pytest.approx([1.0, 4 / 5])
    assert training == [True, True, False, True, True]


def test_a_batch_of_skipped_images_is_passed_over() -> None:
    loader = [batches(range(1))[0], ([], [], []), batches(range(1, 2))[0]]
    model = FixedDetector(BOX)
    assert evaluate(model, loader, cats())["AP"] == pytest.approx(1.0)
    assert len(model.seen) == 2


class NamedScores:
    """A metric that notes the names that it is given."""

    def __init__(self) -> None:
        self.image_scores: dict[str, float] = {}

    def reset(self) -> None:
        self.image_scores = {}

    def update(self, predictions: Any, targets: Any, names: list[str] | None = None) -> None:
        self.image_scores |= dict.fromkeys(names or ["unnamed"], float(len(targets)))

    def merge(self) -> None:
        pass

    def compute(self) -> dict[str, float]:
        return {}


def test_a_metric_of_images_gets_their_names() -> None:
    metric = NamedScores()
    evaluate(FixedDetector(BOX), batches(range(2)), metric)
    assert metric.image_scores == {"0.jpg": 1.0, "1.jpg": 1.0}
    # What else a loader may give behind the targets is no name.
    others: tuple[list[Any], ...] = ([], [[]], [[7]], [torch.tensor([7])], [None])
    for rest in others:
        evaluate(FixedDetector(BOX), [(images, targets, *rest) for images, targets, _ in batches(range(2))], metric)
        assert metric.image_scores == {"unnamed": 1.0}


@pytest.mark.parametrize("rest", [["day", "day"], [], ["day"]])
def test_strings_that_are_no_names_leave_the_results_as_they_are(rest: list[str]) -> None:
    images, masks = [torch.zeros(3, 4, 4, dtype=torch.uint8)] * 2, [torch.zeros(4, 4, dtype=torch.int64)] * 2
    metric = MeanIoU({0: "ground"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        numbers = evaluate(_Ground(), [(images, masks, rest)] * 2, metric)
    assert numbers["mIoU"] == 1.0
    assert metric.image_scores == {}
    assert len(caught) == bool(rest)


class _Ground(nn.Module):
    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [torch.zeros(image.shape[1:], dtype=torch.int64) for image in images]
