"""The journal: what it prints and writes, how it resumes, its hooks, TensorBoard, and the profile."""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import resnest_det.engine.journal as journal_module
from resnest_det.engine.journal import Journal, load_hook, read_metrics
from resnest_det.engine.tensorboard import TensorBoard

Record = dict[str, Any]


class Clock:
    """Stands for the module `time`; time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def passes(self, seconds: float, *, first: float | None = None) -> Callable[[int], None]:
        """A callback that lets time pass, another time for the number 0."""

        def go_on(number: int) -> None:
            self.now += first if number == 0 and first is not None else seconds

        return go_on


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(journal_module, "time", clock)
    return clock


def nothing(number: int) -> None:
    pass


def train(
    journal: Journal,
    *,
    epochs: int = 1,
    num_batches: int = 10,
    first_step: int = 0,
    skipped: tuple[int, ...] = (),
    wait: Callable[[int], None] = nothing,
    work: Callable[[int], None] = nothing,
    after_step: Callable[[int], None] = nothing,
    after_epoch: Callable[[int], None] = nothing,
) -> None:
    """A run from `first_step` on as the loop would tell it; a step's losses follow from its number.

    Args:
        skipped: batches of each epoch in which there is nothing to learn from.
        wait: called with the number of each batch, before it is there.
        work: called with the number of each batch, before its step is noted.
        after_step: called with the number of steps done, after each.
        after_epoch: called with the number of epochs done, after each.
    """
    batches = [index for index in range(num_batches) if index not in skipped]
    step = first_step
    for epoch in range(first_step // len(batches), epochs):
        done = step - epoch * len(batches)
        first_batch = batches[done - 1] + 1 if done else 0
        loader = waited_for(range(first_batch, num_batches), wait)
        for index in journal.batches(loader, num_batches, epoch=epoch, epochs=epochs, first_batch=first_batch):
            if index in skipped:
                continue
            work(index)
            step += 1
            losses = {"loss": 3 / step + 0.1, "loss_classifier": 3 / step, "loss_box_reg": 0.1}
            journal.step(step=step, epoch=epoch + (index + 1) / num_batches, lr=0.5 / step, num_images=4, losses=losses)
            after_step(step)
        journal.end_epoch(epoch=epoch + 1, epochs=epochs, lr=0.5 / (step + 1))
        after_epoch(epoch + 1)


def waited_for(numbers: Iterable[int], wait: Callable[[int], None]) -> Iterator[int]:
    for number in numbers:
        wait(number)
        yield number


def comparable(record: Record) -> Record:
    """A record without what differs from run to run."""
    return {k: v for k, v in record.items() if not k.endswith("seconds") and k != "memory_mib"}


def test_what_is_printed_and_written(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path, log_every=4)
    train(journal, num_batches=6, wait=clock.passes(0.25), work=clock.passes(1))
    journal.evaluation({"AP": 0.36, "AP50": 0.6, "AP75": 0.4, "APs": 0.1}, epoch=1, step=6, seconds=2.2, best=True)
    assert capsys.readouterr().out == (
        "epoch 1/1  loss 1.325  classifier 1.225  box_reg 0.100  lr 0.071  8 s  3.2 images/s  "
        "20% of the time waiting for data\n"
        "  evaluation: AP 0.360  AP50 0.600  AP75 0.400  (best so far)  2 s\n"
    )
    first, last, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    names = "kind epoch step lr loss loss_classifier loss_box_reg data_seconds step_seconds memory_mib"
    assert list(first) == list(last) == names.split()
    assert (first["kind"], first["epoch"], first["step"], first["lr"]) == ("train", 4 / 6, 4, 0.125)
    assert first["loss_classifier"] == pytest.approx((3 + 3 / 2 + 1 + 3 / 4) / 4)
    assert (last["epoch"], last["step"], last["lr"]) == (1.0, 6, 0.5 / 6)
    assert last["loss_classifier"] == pytest.approx((3 / 5 + 3 / 6) / 2)
    assert {(record["data_seconds"], record["step_seconds"]) for record in (first, last)} == {(0.25, 1.0)}
    results = {"AP": 0.36, "AP50": 0.6, "AP75": 0.4, "APs": 0.1}
    assert evaluation == {"kind": "eval", "epoch": 1, "step": 6, "seconds": 2.2, **results}


def test_inactive_journal_does_nothing_visible(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[Record] = []
    journal = Journal(tmp_path, log_every=1, active=False, hooks=[seen.append], profile=True)
    steps: list[int] = []
    train(journal, num_batches=12, after_step=steps.append)
    journal.evaluation({"AP": 0.1}, epoch=1, step=12, seconds=1, best=True)
    journal.picture("predictions", np.zeros((2, 2, 3), np.uint8))
    journal.resume(steps=12, evaluated=True, state=journal.state_dict())
    journal.close()
    assert steps == list(range(1, 13))
    assert (seen, list(tmp_path.iterdir()), *capfd.readouterr()) == ([], [], "", "")


EPOCHS, SKIPPED, NUM_STEPS = 3, (2, 6), 15  # of 7 batches each, the last one skipped


def whole_run(journal: Journal, first_step: int = 0, after_step: Callable[[int], None] = nothing) -> None:
    """Epochs that end in the midst of a line, each followed by an evaluation."""

    def evaluate(epoch: int) -> None:
        journal.evaluation({"AP": epoch / 10}, epoch=epoch, step=5 * epoch, seconds=1, best=True)
        after_step(0)

    train(
        journal,
        epochs=EPOCHS,
        num_batches=7,
        first_step=first_step,
        skipped=SKIPPED,
        after_step=after_step,
        after_epoch=evaluate,
    )


class Killed(Exception):
    pass


@pytest.mark.parametrize("saved_at", range(1, NUM_STEPS + 1))
def test_resumed_journal_equals_an_unbroken_one(
    saved_at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed some calls after the checkpoint, evaluations included, so that lines beyond it are there."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole_run(Journal(tmp_path / "whole", log_every=3))
    printed = capsys.readouterr().out
    state = io.BytesIO()
    calls_left = 5
    journal = Journal(tmp_path / "broken", log_every=3)

    def save_then_die(step: int) -> None:
        nonlocal calls_left
        if step == saved_at:
            torch.save(journal.state_dict(), state)
        if state.tell():
            calls_left -= 1
            if calls_left == 0:
                raise Killed

    try:
        whole_run(journal, after_step=save_then_die)
    except Killed:
        pass
    else:
        assert saved_at > NUM_STEPS - 4
    capsys.readouterr()
    state.seek(0)
    journal = Journal(tmp_path / "broken", log_every=3)
    journal.resume(steps=saved_at, evaluated=True, state=torch.load(state, weights_only=True))
    # The checkpoint was made before the epoch's end was noted, even where it was the epoch's last step.
    epoch = (saved_at - 1) // 5
    if saved_at % 5 == 0:
        list(journal.batches([], 7, epoch=epoch, epochs=EPOCHS, first_batch=6))
        journal.end_epoch(epoch=epoch + 1, epochs=EPOCHS, lr=0.5 / (saved_at + 1))
        journal.evaluation({"AP": (epoch + 1) / 10}, epoch=epoch + 1, step=saved_at, seconds=1, best=True)
    whole_run(journal, first_step=saved_at)
    one, other = (
        [comparable(record) for record in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "broken")
    )
    assert one == other

    def without_times(text: str) -> list[str]:
        return [re.sub(r"  \d+ s .*", "", line) for line in text.splitlines()]

    resumed = without_times(capsys.readouterr().out)
    assert resumed == without_times(printed)[-len(resumed) :]
    assert len(resumed) == 2 * (EPOCHS - epoch)


def test_lines_of_an_epoch_whose_last_batch_is_skipped(tmp_path: Path) -> None:
    """What remains of an epoch is written at its end; the next epoch's first line is its own."""
    train(Journal(tmp_path, log_every=4), epochs=2, num_batches=7, skipped=(6,))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [4, 6, 8, 12]
    assert records[1]["loss_classifier"] == pytest.approx((3 / 5 + 3 / 6) / 2)
    assert records[2]["loss_classifier"] == pytest.approx((3 / 7 + 3 / 8) / 2)
    assert records[3]["epoch"] == 1 + 6 / 7


def test_time_is_what_was_spent_before_and_after_the_break(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    states: list[Record] = []
    journal = Journal(tmp_path, log_every=4)

    def save_then_die(step: int) -> None:
        states.append(journal.state_dict())
        if step == 7:
            raise Killed

    with pytest.raises(Killed):
        train(journal, work=clock.passes(1), after_step=save_then_die)
    clock.now += 3600
    journal = Journal(tmp_path, log_every=4)
    journal.resume(steps=6, evaluated=True, state=states[5])
    train(journal, first_step=6, work=clock.passes(2))
    assert "  14 s  2.9 images/s" in capsys.readouterr().out
    assert [record["step_seconds"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1.5, 2]


@pytest.mark.parametrize(("evaluated", "kept"), [(True, ["train", "eval"]), (False, ["train"])])
def test_evaluation_that_is_not_in_the_checkpoint_is_dropped(evaluated: bool, kept: list[str], tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    train(journal)
    state = journal.state_dict()
    journal.evaluation({"AP": 0.1}, epoch=1, step=10, seconds=1, best=True)
    if evaluated:
        state = journal.state_dict()
    train(journal, epochs=2, first_step=10)
    Journal(tmp_path).resume(steps=10, evaluated=evaluated, state=state)
    assert [record["kind"] for record in read_metrics(tmp_path / "metrics.jsonl")] == kept


def test_lines_of_the_checkpoints_step_that_came_after_it(tmp_path: Path) -> None:
    """Back to a checkpoint of an epoch's last step, from before the epoch's end and its evaluation were noted."""
    states: list[Record] = []
    journal = Journal(tmp_path, log_every=4)
    train(journal, after_step=lambda step: states.append(journal.state_dict()))
    journal.evaluation({"AP": 0.1}, epoch=1, step=10, seconds=1, best=True)
    Journal(tmp_path).resume(steps=10, evaluated=True, state=states[-1])
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [4, 8]


def test_resume_without_a_state_goes_by_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 20}\n{"kind": "eval", "step": 20}\n{"kind": "train", "step": 40}\n{"ki')
    Journal(tmp_path).resume(steps=20, evaluated=False, state={})
    assert read_metrics(path) == [{"kind": "train", "step": 20}]
    Journal(tmp_path).resume(steps=0, evaluated=True, state={})
    assert path.read_text() == ""
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("first", "others", "share", "hint"),
    [
        (0, 0.05, None, None),  # 0.45 of 10.45 s
        (0, 0.15, "12%", None),
        (6, 0.05, "39%", None),  # while the workers start
        (0, 1, "47%", "9 of 19 s (47%)"),
        (5, 3, "76%", "27 of 37 s (73%)"),
    ],
)
def test_waiting_for_data(
    first: float,
    others: float,
    share: str | None,
    hint: str | None,
    tmp_path: Path,
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(Journal(tmp_path), epochs=3, wait=clock.passes(others, first=first), work=clock.passes(1))
    out = capsys.readouterr().out
    assert re.findall(r"(\d+%) of the time waiting for data", out) == ([share] * 3 if share else [])
    hints = re.findall(r"hint: after the first batch, (.*?) went by waiting .* from 20% on.*data.num_workers", out)
    assert hints == ([hint] if hint else [])


def test_waiting_of_less_than_a_second_is_not_mentioned(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Journal(tmp_path), wait=clock.passes(0.05), work=clock.passes(0.01))
    assert "waiting" not in capsys.readouterr().out


def test_without_a_terminal_a_line_a_minute(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_peak_memory_mib", lambda: 812.4)
    journal = Journal(tmp_path)
    train(journal, epochs=2, work=clock.passes(25), after_epoch=clock.passes(100))
    lines = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert lines[0] == "  step 3  epoch 0.30  loss 1.1000  lr 0.167  812 MiB  ETA 07:05"  # 75 s for 0.3 of 2 epochs
    assert len(lines) == 7
    assert re.search(r"step 17 .* ETA 01:33$", lines[-2])  # 525 s for 1.7, what came between epochs included


def test_time_left_after_a_resume_goes_by_this_process(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Journal(tmp_path), epochs=2, first_step=10, work=clock.passes(61))
    lines = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert re.search("step 11  epoch 1.10  .* ETA 09:09$", lines[0])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(journal_module, "_peak_memory_mib", lambda: 3.25 * 1024)
    bars: list[tqdm[Any]] = []

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            bars.append(self)

    monkeypatch.setattr(journal_module, "tqdm", Bar)
    train(Journal(tmp_path), epochs=3, first_step=4, work=clock.passes(90))
    assert "ETA" not in capsys.readouterr().out
    assert [bar.initial for bar in bars] == [4, 0, 0]
    assert [bar.n for bar in bars] == [10, 10, 10]
    assert bars[0].postfix == "loss 0.4000  lr 0.05  3.2 GiB  ETA 30:00"
    assert re.search(r"epoch 1/3  40%\|####      \| 4/10 ", terminal.getvalue())


def test_memory_is_the_peak_of_the_process(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux says it in another place")
    train(Journal(tmp_path))
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["memory_mib"] == pytest.approx(peak, rel=0.02)


def test_memory_is_that_of_the_gpu_where_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: [0, 3 * 2**20][index])
    train(Journal(tmp_path))
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["memory_mib"] == 3.0
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: 0)  # a run on the CPU of such a machine
    assert journal_module._peak_memory_mib() > 50


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this machine has no /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot write to .*metrics.jsonl: No space left on device; make room"):
        train(Journal(tmp_path))


class Tracker:
    """A hook that notes all it is told."""

    def __init__(self, fails_at: int = 0) -> None:
        self.records: list[Record] = []
        self.resumed: list[int] = []
        self.closed = 0
        self.fails_at = fails_at

    def __call__(self, record: Record) -> None:
        if len(self.records) + 1 == self.fails_at:
            raise ConnectionError("no route to host")
        self.records.append(record)

    def resume(self, step: int) -> None:
        self.resumed.append(step)

    def close(self) -> None:
        self.closed += 1


def test_hooks_get_every_record_and_picture(tmp_path: Path) -> None:
    tracker, plain = Tracker(), []
    journal = Journal(tmp_path, log_every=4, hooks=[dict.clear, tracker, plain.append])  # each may do what it likes
    train(journal)
    journal.evaluation({"AP": 0.1}, epoch=1, step=10, seconds=1, best=True)
    assert tracker.records == plain == read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in plain] == [4, 8, 10, 10]
    picture = np.zeros((2, 3, 3), np.uint8)
    journal.picture("predictions", picture)
    assert {**plain.pop(), "image": None} == {"kind": "picture", "name": "predictions", "step": 10, "image": None}
    assert tracker.records[-1]["image"] is picture
    assert plain == read_metrics(tmp_path / "metrics.jsonl")
    journal.close()
    journal.close()
    assert tracker.closed == 1


def test_hooks_of_a_resumed_run_get_what_is_new(tmp_path: Path) -> None:
    journal = Journal(tmp_path, log_every=2)
    states: list[Record] = []
    train(journal, after_step=lambda step: states.append(journal.state_dict()))
    tracker = Tracker()
    journal = Journal(tmp_path, log_every=2, hooks=[tracker])
    journal.resume(steps=5, evaluated=True, state=states[4])
    assert (tracker.resumed, tracker.records) == ([5], [])
    train(journal, first_step=5)
    assert [record["step"] for record in tracker.records] == [6, 8, 10]


def test_a_hook_that_fails_does_not_stop_the_run(tmp_path: Path) -> None:
    broken, sound = Tracker(fails_at=2), Tracker()
    journal = Journal(tmp_path, log_every=2, hooks=[broken, sound])
    with pytest.warns(UserWarning, match="hook Tracker failed .*: ConnectionError: no route to host") as caught:
        train(journal)
    journal.close()
    assert len(caught) == 1
    assert (len(broken.records), broken.closed) == (1, 0)
    assert (len(sound.records), sound.closed) == (5, 1)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


@pytest.mark.parametrize("method", ["resume", "close"])
def test_a_hook_that_fails_otherwise(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("not today")

    broken, sound = Tracker(), Tracker()
    monkeypatch.setattr(broken, method, fail)
    journal = Journal(tmp_path, hooks=[broken, sound])
    with warnings.catch_warnings(record=True) as caught:
        journal.resume(steps=0, evaluated=True, state={})
        train(journal)
        journal.close()
    [warning] = caught
    assert re.search("hook Tracker failed .*: RuntimeError: not today", str(warning.message))
    assert len(broken.records) == (0 if method == "resume" else 1)
    assert (len(sound.records), sound.closed) == (1, 1)


HOOKS_MODULE = """
import json

def to_file(run_folder):
    def hook(record):
        with (run_folder / "mine.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\\n")
    return hook

def forgetful(run_folder):
    pass

def offline(run_folder):
    raise ConnectionError("no network")

setting = 3
"""


@pytest.fixture
def hooks_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "hooks_of_a_test.py").write_text(HOOKS_MODULE)
    (folder / "broken_hooks_of_a_test.py").write_text("import a_tracker_that_is_not_installed")
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("hooks_of_a_test", None)


@pytest.mark.usefixtures("hooks_module")
def test_load_hook(tmp_path: Path) -> None:
    journal = Journal(tmp_path, hooks=[load_hook("hooks_of_a_test:to_file", tmp_path)])
    train(journal)
    assert (tmp_path / "mine.jsonl").read_text() == (tmp_path / "metrics.jsonl").read_text() != ""


@pytest.mark.usefixtures("hooks_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hooks_of_a_test", "named 'hooks_of_a_test', expected package.module:function"),
        (":to_file", "named ':to_file', expected package.module:function"),
        ("hooks_of_a_test:to file", "named 'hooks_of_a_test:to file', expected package.module:function"),
        (
            "hooks_of_nobody:x",
            "hooks_of_nobody gave ModuleNotFoundError: No module named 'hooks_of_nobody'.*PYTHONPATH",
        ),
        (
            "broken_hooks_of_a_test:x",
            "ModuleNotFoundError: No module named 'a_tracker_that_is_not_installed'; .*install",
        ),
        ("hooks_of_a_test:wandb", "has no function wandb, but to_file, forgetful, offline"),
        ("hooks_of_a_test:setting", "has no function setting, but to_file"),
        ("hooks_of_a_test:forgetful", "'hooks_of_a_test:forgetful' returned None, expected a hook"),
        ("hooks_of_a_test:offline", "called with the run folder .*, gave ConnectionError: no network"),
    ],
)
def test_load_hook_refuses(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_hook(name, tmp_path)


def test_tensorboard(tmp_path: Path) -> None:
    """A resumed run's points stand there once, and the values are those of metrics.jsonl."""
    board = TensorBoard(tmp_path)
    states: list[Record] = []
    journal = Journal(tmp_path, log_every=2, hooks=[board])
    train(journal, epochs=2, after_step=lambda step: states.append(journal.state_dict()))
    journal.picture("predictions", np.zeros((4, 4, 3), np.uint8))
    board.close()  # as a killed run leaves its file
    journal = Journal(tmp_path, log_every=2, hooks=[TensorBoard(tmp_path)])
    journal.resume(steps=14, evaluated=True, state=states[13])
    train(journal, epochs=2, first_step=14)
    journal.evaluation({"AP": 0.25}, epoch=2, step=20, seconds=1.5, best=True)
    picture = np.full((4, 6, 3), 255, np.uint8)
    journal.picture("predictions", picture)
    journal.close()
    written = EventAccumulator(str(tmp_path)).Reload()
    assert set(written.Tags()["scalars"]) == {
        "lr", "train/loss", "train/loss_classifier", "train/loss_box_reg", "train/data_seconds", "train/step_seconds",
        "train/memory_mib", "eval/AP", "eval/seconds",
    }  # fmt: skip
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(2, 21, 2))
    for tag, name in (("train/loss", "loss"), ("lr", "lr"), ("train/memory_mib", "memory_mib")):
        drawn = written.Scalars(tag)
        assert [point.step for point in drawn] == [record["step"] for record in records]
        np.testing.assert_allclose([point.value for point in drawn], [record[name] for record in records], rtol=1e-6)
    assert [(point.step, point.value) for point in written.Scalars("eval/AP")] == [(20, 0.25)]
    [image] = written.Images("predictions")
    assert (image.step, image.height, image.width) == (20, 4, 6)


def test_tensorboard_writes_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, hooks=[TensorBoard(tmp_path / "board")])
    journal.resume(steps=10, evaluated=True, state={})
    journal.close()
    assert not (tmp_path / "board").exists()


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"cannot be imported \(.*\): pip install 'resnest-det\[tensorboard\]'"):
        TensorBoard(tmp_path)


def num_calls(trace: Path, operation: str) -> int:
    return [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]].count(operation)


@pytest.mark.parametrize(
    ("epochs", "num_batches", "last"),
    [(1, 12, 10), (1, 8, 8), (3, 7, 7), (3, 5, 10), (2, 100, 10)],
)
def test_profile(epochs: int, num_batches: int, last: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps 6 to 10, or as far as their epoch goes; an evaluation is never in it."""
    journal = Journal(tmp_path, profile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(
            journal,
            epochs=epochs,
            num_batches=num_batches,
            work=lambda index: torch.ones(100, 100) @ torch.ones(100, 100),
            after_epoch=lambda epoch: torch.linalg.cholesky_ex(torch.eye(3)),
        )
        journal.close()
    out = capsys.readouterr().out
    trace = tmp_path / "trace.json"
    assert out.count(f"profile of the steps 6 to {last}: {trace}\n") == 1
    assert re.search(rf"operation +calls +CPU ms +share\n(.*\n)*?  aten::mm +{last - 5} +\d+\.\d +\d+\.\d%\n", out)
    assert num_calls(trace, "aten::mm") == last - 5
    assert num_calls(trace, "aten::linalg_cholesky_ex") == 0


@pytest.mark.parametrize("num_steps", [0, 3, 4, 5])
def test_profile_of_too_few_steps(num_steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path, profile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(journal, num_batches=max(num_steps, 1), epochs=min(num_steps, 1))
        journal.close()
        journal.close()
    out = capsys.readouterr().out
    assert out.count(f"no trace, for there were {num_steps} steps, and tracing begins after 5; train for longer") == 1
    assert not (tmp_path / "trace.json").exists()


def test_profile_of_an_interrupted_run(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 8:
            raise Killed

    journal = Journal(tmp_path, profile=True)
    with pytest.raises(Killed):
        train(journal, work=lambda index: torch.ones(9, 9) @ torch.ones(9, 9), after_step=interrupt)
    journal.close()
    assert num_calls(tmp_path / "trace.json", "aten::mm") == 3
