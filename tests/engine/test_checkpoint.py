from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from resnest_det.engine import check_class_names, load_checkpoint, save_checkpoint
from resnest_det.engine.checkpoint import restore_training_state, training_state


def objects() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()


def test_goes_on_as_if_unbroken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = objects()
    train(*first)
    save_checkpoint(tmp_path / "last.pt", {**training_state(*first), "class_names": {1: "disc"}})
    train(*first)
    second = objects()
    content = load_checkpoint(tmp_path / "last.pt")
    assert content["class_names"] == {1: "disc"}
    restore_training_state(content, *second)
    train(*second)
    assert torch.equal(first[0].weight, second[0].weight)
    assert first[2].get_last_lr() == second[2].get_last_lr()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})

    def full(content: object, stream: object) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_no_file_and_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*last.pt: a run writes its first one"):
        load_checkpoint(tmp_path / "last.pt")
    save_checkpoint(tmp_path / "last.pt", {"x": torch.zeros(100_000)})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:1000])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("no tensors here")
    for read in (load_checkpoint, lambda path: check_class_names(path, {})):
        for name in ("cut.pt", "empty.pt", "text.pt"):
            with pytest.raises(ValueError, match=f"{name} is damaged, or not plain data written by torch.save"):
                read(tmp_path / name)
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt is not a checkpoint of this version \(format 1\)"):
        load_checkpoint(tmp_path / "other.pt")


def test_checkpoint_of_another_model() -> None:
    model, optimizer, scheduler = objects()
    content = training_state(model, optimizer, scheduler)
    with pytest.raises(ValueError, match="(?s)the checkpoint is of another model or optimiser.*size mismatch"):
        restore_training_state(content, nn.Linear(3, 4), optimizer, scheduler)


def test_checkpoint_of_other_classes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "named.pt", {"class_names": {1: "cat", 2: "dog"}})
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "unnamed.pth")
    check_class_names(tmp_path / "named.pt", {1: "cat", 2: "dog"})
    check_class_names(tmp_path / "unnamed.pth", {1: "cat"})
    with pytest.raises(ValueError, match="named.pt was trained on other classes than the data set's: .*'dog'.*'cow'"):
        check_class_names(tmp_path / "named.pt", {1: "cat", 2: "cow"})
