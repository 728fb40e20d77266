"""The loop on a toy model: what it writes, what it returns, how it resumes and how it stops."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnest_det import engine
from resnest_det.engine import create_schedule, fit, load_checkpoint, new_run_folder, read_metrics
from resnest_det.engine.journal import Journal

fit_module = sys.modules["resnest_det.engine.fit"]  # as an attribute of its package, the name is the function's


class Toy(nn.Module):
    """Mean of an image's pixels to a number; dropout makes it depend on torch's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.3)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        assert self.training
        assert all(image.dtype == torch.float32 and image.max() <= 1 for image in images)
        means = torch.stack([image.mean((1, 2)) for image in images])
        wanted = torch.stack([target["value"] for target in targets])
        error = self.scale(self.dropout(means))[:, 0] - wanted
        return {"loss_square": error.square().mean(), "loss_size": 0.01 * self.scale.weight.square().sum()}


class Batches:
    """A loader of 5 batches whose order depends on the epoch."""

    def __init__(self, bad: tuple[int, int] | None = None, skipped: tuple[int, int] | None = None) -> None:
        self.batch_sampler = self
        self.epoch = -1
        self.bad, self.skipped = bad, skipped

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        for index in range(5):
            if (self.epoch, index) == self.skipped:
                yield [], [], []
                continue
            generator = torch.Generator().manual_seed(100 * self.epoch + index)
            images = [torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=generator) for _ in range(2)]
            value = math.nan if (self.epoch, index) == self.bad else 0.5
            yield images, [{"value": torch.tensor(value)}] * 2, [f"{self.epoch}-{index}-{i}.jpg" for i in range(2)]


class Scores:
    """An evaluation whose results are prescribed."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.calls = 0

    def __call__(self) -> dict[str, float]:
        self.calls += 1
        return {"AP": self.values[self.calls - 1], "AP50": 1.0}


def run(
    folder: Path, *, epochs: int = 4, resume: bool = False, batches: Batches | None = None, **arguments: Any
) -> Any:
    torch.manual_seed(0)
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = create_schedule(optimizer, total_steps=20, schedule="cosine", warmup_steps=3)
    arguments.setdefault("evaluate", Scores(0.1, 0.3, 0.2, 0.25))
    results = fit(
        model,
        batches or Batches(),
        optimizer,
        scheduler,
        epochs=epochs,
        device=torch.device("cpu"),
        run_folder=folder,
        best_metric="AP",
        resume=resume,
        extra={"class_names": {1: "disc"}},
        **arguments,
    )
    return model, results


def test_writes_the_run_folder(tmp_path: Path) -> None:
    model, results = run(tmp_path)
    assert results == {"AP": 0.25, "AP50": 1.0}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.pt", "last.pt", "metrics.jsonl"]
    last, best = load_checkpoint(tmp_path / "last.pt"), load_checkpoint(tmp_path / "best.pt")
    assert (last["epoch"], last["step"], last["best"], last["results"]["AP"]) == (4, 20, 0.3, 0.25)
    assert (best["epoch"], best["step"], best["best"], best["results"]["AP"]) == (2, 10, 0.3, 0.3)
    assert last["class_names"] == {1: "disc"}
    assert torch.equal(last["model"]["scale.weight"], model.scale.weight)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["epoch"], r["step"], r["AP"]) for r in records if r["kind"] == "eval"] == [
        (1, 5, 0.1),
        (2, 10, 0.3),
        (3, 15, 0.2),
        (4, 20, 0.25),
    ]
    trains = [r for r in records if r["kind"] == "train"]
    assert [train["step"] for train in trains] == [5, 10, 15, 20]
    train = trains[-1]
    assert train["loss"] == pytest.approx(train["loss_square"] + train["loss_size"])


def test_evaluates_when_due_and_at_the_end(tmp_path: Path) -> None:
    scores = Scores(0.1, 0.2)
    run(tmp_path, evaluate=scores, evaluate_every=3)
    evaluations = [r["epoch"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "eval"]
    assert evaluations == [3, 4]


class Stop(Exception):
    pass


@pytest.mark.parametrize("broken_at", [1, 2, 3, 4])
def test_a_resumed_run_equals_an_unbroken_one(broken_at: int, tmp_path: Path) -> None:
    """Stopped in the evaluation after an epoch, and so before that epoch's results were known."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    values = [0.1, 0.3, 0.2, 0.25]
    whole, results = run(tmp_path / "whole")

    def stop() -> dict[str, float]:
        stop.calls += 1
        if stop.calls == broken_at:
            raise Stop
        return {"AP": values[stop.calls - 1], "AP50": 1.0}

    stop.calls = 0
    with pytest.raises(Stop):
        run(tmp_path / "broken", evaluate=stop)
    rest = Scores(*values[broken_at - 1 :])
    resumed, resumed_results = run(tmp_path / "broken", resume=True, evaluate=rest)
    assert rest.calls == len(values) - broken_at + 1
    assert resumed_results == results
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(tmp_path / run_name / name) for run_name in ("whole", "broken"))
        assert torch.equal(one["rng"], other["rng"])
        assert {k: one[k] for k in ("epoch", "step", "best", "results")} == {
            k: other[k] for k in ("epoch", "step", "best", "results")
        }
    one, other = (
        [{**r, "seconds": 0} for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "broken")
    )
    assert one == other


def test_an_evaluation_noted_and_not_saved_is_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the line in metrics.jsonl and the checkpoint."""
    real_save = fit_module.save_checkpoint

    def save(path: Path, content: dict[str, Any]) -> None:
        if content["epoch"] == 2 and content["evaluated"]:
            raise Stop
        real_save(path, content)

    monkeypatch.setattr(fit_module, "save_checkpoint", save)
    with pytest.raises(Stop):
        run(tmp_path)
    monkeypatch.setattr(fit_module, "save_checkpoint", real_save)
    run(tmp_path, resume=True, evaluate=Scores(0.3, 0.2, 0.25))
    evaluations = [r["epoch"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "eval"]
    assert evaluations == [1, 2, 3, 4]


def test_resume_on_data_of_another_size(tmp_path: Path) -> None:
    run(tmp_path)
    batches = Batches()
    batches.__class__ = type("Fewer", (Batches,), {"__len__": lambda self: 3})
    with pytest.raises(ValueError, match="the run had 5 steps an epoch and the data now make 3"):
        run(tmp_path, resume=True, batches=batches)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    model, results = run(tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    scores = Scores()
    resumed, resumed_results = run(tmp_path, resume=True, evaluate=scores)
    assert (scores.calls, resumed_results) == (0, results)
    assert torch.equal(model.scale.weight, resumed.scale.weight)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*last.pt"):
        run(tmp_path, resume=True)


def test_non_finite_loss_names_the_images_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"loss is not finite.*loss_square=nan.*2-3-0.jpg, 2-3-1.jpg"):
        run(tmp_path, batches=Batches(bad=(2, 3)))
    content = load_checkpoint(tmp_path / "last.pt")
    assert content["epoch"] == 2
    assert all(torch.isfinite(value).all() for value in content["model"].values())


def test_non_finite_gradients_where_they_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()
    model.register_parameter("root", nn.Parameter(torch.zeros(())))
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda i, t: {**forward(i, t), "loss_root": model.root.sqrt()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="gradients are not finite .*0-0-0.jpg, 0-0-1.jpg"):
        fit(
            model,
            Batches(),
            optimizer,
            create_schedule(optimizer, total_steps=20, schedule="constant"),
            epochs=1,
            device=torch.device("cpu"),
            run_folder=tmp_path,
            evaluate=Scores(0.1),
            best_metric="AP",
            clip_norm=1.0,
        )
    assert model.root == 0


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    (tmp_path / "free").mkdir()
    (tmp_path / "clipped").mkdir()
    free, _ = run(tmp_path / "free", evaluate=Scores(0, 0, 0, 0))
    clipped, _ = run(tmp_path / "clipped", evaluate=Scores(0, 0, 0, 0), clip_norm=1e-6)
    torch.manual_seed(0)
    start = Toy()
    assert (clipped.scale.weight - start.scale.weight).abs().max() < 1e-4
    assert (free.scale.weight - start.scale.weight).abs().max() > 1e-2


def test_a_batch_of_skipped_images_is_passed_over(tmp_path: Path) -> None:
    run(tmp_path, batches=Batches(skipped=(1, 2)))
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 19


def test_run_folders_are_never_reused(tmp_path: Path) -> None:
    first = new_run_folder(tmp_path / "runs" / "a")
    assert new_run_folder(tmp_path / "runs" / "a") == first  # empty, so nothing is lost
    (first / "last.pt").touch()
    second = new_run_folder(tmp_path / "runs" / "a")
    assert second.name == "a-2"
    (second / "last.pt").touch()
    assert new_run_folder(tmp_path / "runs" / "a").name == "a-3"


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 20}\n{"kind": "train", "step": 40}\n{"kind": "tra')
    Journal(tmp_path, keep_steps=20)
    assert read_metrics(path) == [{"kind": "train", "step": 20}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_the_engine_knows_no_task() -> None:
    sources = sorted(Path(engine.__file__).parent.glob("*.py"))
    assert len(sources) == 5
    for source in sources:
        found = re.findall(r"(?i)detect\w*|segment\w*|coco|ade20k|miou|mask\w*|box\w*", source.read_text())
        assert not found, f"{source.name} names {found}"
