"""The loop on a toy model: what it writes, what it returns, how it resumes and how it stops."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnest_det import engine
from resnest_det.engine import (
    Interrupted,
    Journal,
    ModelAverage,
    create_schedule,
    fit,
    load_checkpoint,
    load_last,
    new_run_folder,
    read_metrics,
)
from tests.same_run import check_same_state, read_lines

fit_module = sys.modules["resnest_det.engine.fit"]  # as an attribute of its package, the name is the function's


class Toy(nn.Module):
    """Mean of an image's pixels to a number; dropout makes it depend on torch's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        assert self.training
        assert all(image.dtype == torch.float32 and image.max() <= 1 for image in images)
        self.seen += len(images)
        means = torch.stack([image.mean((1, 2)) for image in images])
        wanted = torch.stack([target["value"] for target in targets])
        error = self.scale(self.dropout(means))[:, 0] - wanted
        return {"loss_square": error.square().mean(), "loss_size": 0.01 * self.scale.weight.square().sum()}


class Batches:
    """A loader of 5 batches whose order depends on the epoch."""

    def __init__(self, bad: tuple[int, int] | None = None) -> None:
        self.batch_sampler = self
        self.epoch, self.first_batch = -1, 0
        self.bad = bad

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.first_batch, 5):
            generator = torch.Generator().manual_seed(100 * self.epoch + index)
            images = [torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=generator) for _ in range(2)]
            value = math.nan if (self.epoch, index) == self.bad else 0.5
            yield images, [{"value": torch.tensor(value)}] * 2, [f"{self.epoch}-{index}-{i}.jpg" for i in range(2)]


class Scores:
    """An evaluation whose results are prescribed."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.calls = 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.calls += 1
        return {"AP": self.values[self.calls - 1], "AP50": 1.0}


def of_weights(model: nn.Module) -> dict[str, float]:
    """An evaluation that depends on the weights alone."""
    return {"AP": model.scale.weight.sum().item()}


def run(
    folder: Path,
    *,
    epochs: int = 4,
    resume: bool = False,
    batches: Batches | None = None,
    ema_decay: float = 0.0,
    **arguments: Any,
) -> Any:
    torch.manual_seed(0)
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = create_schedule(optimizer, total_steps=20, schedule="cosine", warmup_steps=3)
    arguments.setdefault("evaluate", Scores(0.1, 0.3, 0.2, 0.25))
    average = ModelAverage(model, ema_decay) if ema_decay else None
    folder.mkdir(exist_ok=True)
    journal = Journal(folder)
    results = fit(
        model,
        batches or Batches(),
        optimizer,
        scheduler,
        epochs=epochs,
        device=torch.device("cpu"),
        run_folder=folder,
        journal=journal,
        best_metric="AP",
        average=average,
        resume_from=load_last(folder) if resume else None,
        extra={"class_names": {1: "disc"}},
        **arguments,
    )
    journal.close()
    return model, results


def test_writes_the_run_folder(tmp_path: Path) -> None:
    model, results = run(tmp_path)
    assert results == {"AP": 0.25, "AP50": 1.0}
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["best.pt", "last-1.pt", "last.pt", "metrics.jsonl"]
    assert load_checkpoint(tmp_path / "last-1.pt")["step"] == 15
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
    values = [0.1, 0.3, 0.2, 0.25]
    whole, results = run(tmp_path / "whole")

    def stop(model: nn.Module) -> dict[str, float]:
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
        check_same_state(load_checkpoint(tmp_path / "whole" / name), load_checkpoint(tmp_path / "broken" / name))
    assert read_lines(tmp_path / "whole") == read_lines(tmp_path / "broken")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stopped_at", [1, 2, 4, 5, 6, 9, 10])
def test_a_signal_ends_the_step_and_what_is_resumed_equals_an_unbroken_run(
    stopped_at: int, accumulate: int, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"ema_decay": 0.9, "accumulate": accumulate, "evaluate": of_weights}
    whole, results = run(tmp_path / "whole", **arguments)
    calls = itertools.count(1)

    class Signalled(Batches):
        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                if next(calls) == stopped_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    with pytest.raises(Interrupted, match=r"SIGTERM after step \d+"):
        run(tmp_path / "broken", batches=Signalled(), **arguments)
    resumed, resumed_results = run(tmp_path / "broken", resume=True, **arguments)
    assert resumed_results == results
    check_same_state(whole.state_dict(), resumed.state_dict())
    for name in ("last.pt", "best.pt"):
        check_same_state(load_checkpoint(tmp_path / "whole" / name), load_checkpoint(tmp_path / "broken" / name))
    assert read_lines(tmp_path / "whole") == read_lines(tmp_path / "broken")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_evaluation_at_once(number: signal.Signals, tmp_path: Path) -> None:
    def signalled(model: nn.Module) -> dict[str, float]:
        os.kill(os.getpid(), number)
        raise AssertionError("the evaluation went on")

    with pytest.raises(Interrupted, match=number.name):
        run(tmp_path, evaluate=signalled)
    assert load_checkpoint(tmp_path / "last.pt")["evaluated"] is False
    scores = Scores(0.1, 0.2, 0.3, 0.4)
    run(tmp_path, resume=True, evaluate=scores)
    assert scores.calls == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_checkpoints_within_an_epoch(tmp_path: Path) -> None:
    seen = []

    class Watched(Batches):
        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                if (tmp_path / "last.pt").exists():
                    seen.append(load_checkpoint(tmp_path / "last.pt")["step"])
                yield batch

    run(tmp_path, batches=Watched(), epochs=1, checkpoint_steps=2)
    assert seen == [2, 2, 4]  # before the third, fourth and fifth batch
    seen.clear()
    (tmp_path / "last.pt").unlink()
    run(tmp_path, batches=Watched(), epochs=1, checkpoint_minutes=1e-9)
    assert seen == [1, 2, 3, 4]


def test_keeps_as_many_checkpoints_as_asked_for(tmp_path: Path) -> None:
    run(tmp_path, keep_last=3)
    kept = {path.name: load_checkpoint(path)["step"] for path in tmp_path.glob("last*.pt")}
    assert kept == {"last.pt": 20, "last-1.pt": 15, "last-2.pt": 10}
    run(tmp_path / "one", keep_last=1)
    assert [path.name for path in (tmp_path / "one").glob("last*.pt")] == ["last.pt"]


def test_accumulated_batches_make_one_step_of_their_joint_gradient(tmp_path: Path) -> None:
    model, _ = run(tmp_path, epochs=1, accumulate=2, evaluate=of_weights)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3  # of two, two and one of the five batches
    torch.manual_seed(0)
    plain = Toy()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    scheduler = create_schedule(optimizer, total_steps=20, schedule="cosine", warmup_steps=3)
    loader = Batches()
    loader.set_epoch(0)
    for group in ([0, 1], [2, 3], [4]):
        optimizer.zero_grad()
        for index in group:
            images, targets, _ = list(loader)[index]
            losses = plain([image / 255 for image in images], targets)
            (sum(losses.values()) / len(group)).backward()
        optimizer.step()
        scheduler.step()
    assert torch.allclose(model.scale.weight, plain.scale.weight, atol=1e-6)


def test_the_average_is_evaluated_and_kept_beside_the_weights(tmp_path: Path) -> None:
    evaluated = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        evaluated.append(model.scale.weight.clone())
        return {"AP": 0.1}

    model, _ = run(tmp_path, ema_decay=0.9, evaluate=evaluate)
    content = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(content["model"]["scale.weight"], model.scale.weight)
    assert torch.equal(content["ema"]["model"]["scale.weight"], evaluated[-1])
    assert not torch.equal(evaluated[-1], model.scale.weight)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_train(precision: Any, tmp_path: Path) -> None:
    full, _ = run(tmp_path / "full", evaluate=of_weights)
    half, _ = run(tmp_path / "half", evaluate=of_weights, precision=precision)
    assert half.scale.weight.dtype == torch.float32
    difference = (half.scale.weight - full.scale.weight).abs().max()
    assert 0 < difference < 0.05


def test_a_dead_worker_is_named(tmp_path: Path) -> None:
    class Dying(Batches):
        def __iter__(self) -> Iterator[Any]:
            yield from itertools.islice(super().__iter__(), 2)
            raise RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. ")

    with pytest.raises(ChildProcessError, match=r"a process that loads images died .*pid 123.*resume the run"):
        run(tmp_path, batches=Dying(), checkpoint_steps=1)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


def test_an_evaluation_noted_and_not_saved_is_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the line in metrics.jsonl and the checkpoint."""
    real_save = fit_module.save_last

    def save(folder: Path, content: dict[str, Any], **arguments: Any) -> None:
        if content["epoch"] == 2 and content["evaluated"]:
            raise Stop
        real_save(folder, content, **arguments)

    monkeypatch.setattr(fit_module, "save_last", save)
    with pytest.raises(Stop):
        run(tmp_path)
    monkeypatch.setattr(fit_module, "save_last", real_save)
    run(tmp_path, resume=True, evaluate=Scores(0.3, 0.2, 0.25))
    evaluations = [r["epoch"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "eval"]
    assert evaluations == [1, 2, 3, 4]


def test_resume_on_data_of_another_size(tmp_path: Path) -> None:
    run(tmp_path)
    batches = Batches()
    batches.__class__ = type("Fewer", (Batches,), {"__len__": lambda self: 3})
    with pytest.raises(ValueError, match="the run had 5 steps an epoch and there are 3 now"):
        run(tmp_path, resume=True, batches=batches)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, results = run(tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    scores = Scores()
    resumed, resumed_results = run(tmp_path, resume=True, evaluate=scores)
    assert (scores.calls, resumed_results) == (0, results)
    assert torch.equal(model.scale.weight, resumed.scale.weight)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert "the run is finished: 4 of 4 epochs, best AP 0.300" in capsys.readouterr().out


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*last.pt"):
        run(tmp_path, resume=True)


def test_non_finite_loss_names_the_images_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"loss is not finite.*loss_square=nan.*2-3-0.jpg, 2-3-1.jpg"):
        run(tmp_path, batches=Batches(bad=(2, 3)))
    content = load_checkpoint(tmp_path / "last.pt")
    assert content["epoch"] == 2
    assert all(torch.isfinite(value).all() for value in content["model"].values())


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_non_finite_gradients_of_a_finite_loss(
    clip_norm: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            journal=Journal(tmp_path),
            evaluate=Scores(0.1),
            best_metric="AP",
            clip_norm=clip_norm,
            checkpoint_steps=1,
        )
    assert model.root == 0
    assert not (tmp_path / "last.pt").exists()


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    free, _ = run(tmp_path / "free", evaluate=Scores(0, 0, 0, 0))
    clipped, _ = run(tmp_path / "clipped", evaluate=Scores(0, 0, 0, 0), clip_norm=1e-6)
    torch.manual_seed(0)
    start = Toy()
    assert (clipped.scale.weight - start.scale.weight).abs().max() < 1e-4
    assert (free.scale.weight - start.scale.weight).abs().max() > 1e-2


def test_run_folders_are_never_reused(tmp_path: Path) -> None:
    first = new_run_folder(tmp_path / "runs" / "a")
    assert new_run_folder(tmp_path / "runs" / "a") == first  # empty, so nothing is lost
    (first / "last.pt").touch()
    second = new_run_folder(tmp_path / "runs" / "a")
    assert second.name == "a-2"
    (second / "last.pt").touch()
    assert new_run_folder(tmp_path / "runs" / "a").name == "a-3"


def test_the_engine_knows_no_task() -> None:
    sources = sorted(Path(engine.__file__).parent.glob("*.py"))
    assert len(sources) == 12
    for source in sources:
        found = re.findall(r"(?i)detect\w*|segment\w*|coco|ade20k|miou|mask\w*|box\w*", source.read_text())
        assert not found, f"{source.name} names {found}"
