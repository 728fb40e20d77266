from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from resnest_det.engine import check_class_names, load_checkpoint, load_last, save_checkpoint
from resnest_det.engine.checkpoint import save_last


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})

    def full(content: object, stream: object) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device; \d+ MiB are free\).*intact"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_limit_on_files_stops_the_write(tmp_path: Path) -> None:
    """As the disk fills up in the middle of torch.save, which wraps the error."""
    save_last(tmp_path, {"step": 1, "x": torch.zeros(10)}, keep=2, replace=False)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, former[1]))
    try:
        with pytest.raises(OSError, match="the checkpoint could not be written .File too large.*last.pt"):
            save_last(tmp_path, {"step": 2, "x": torch.zeros(1_000_000)}, keep=2, replace=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_last(tmp_path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(damage: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_last(tmp_path, {"step": step, "x": torch.full((10_000,), float(step))}, keep=2, replace=False)
    content = bytearray((tmp_path / "last.pt").read_bytes())
    if damage == "cut":
        del content[20_000:]
    else:
        content[20_000:20_100] = bytes(byte ^ 0xFF for byte in content[20_000:20_100])
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.warns(UserWarning, match=r"last.pt is damaged.*goes on from the checkpoint before it"):
        state = load_last(tmp_path)
    assert (state["step"], state["x"][0]) == (1, 1.0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last-1.pt", "last.pt.damaged"]
    save_last(tmp_path, {"step": 2}, keep=2, replace=False)
    assert (load_last(tmp_path)["step"], load_checkpoint(tmp_path / "last-1.pt")["step"]) == (2, 1)


def test_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    for name in ("last.pt", "last-1.pt"):
        (tmp_path / name).write_text("no checkpoint")
    with pytest.raises(ValueError, match="last-1.pt is damaged"):
        load_last(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last-1.pt", "last.pt"]


def test_two_damaged_checkpoints_are_both_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_last(tmp_path, {"step": step}, keep=3, replace=False)
    for name in ("last.pt", "last-1.pt"):
        (tmp_path / name).write_text(name)
    with pytest.warns(UserWarning, match="is damaged"):
        assert load_last(tmp_path)["step"] == 1
    assert (tmp_path / "last.pt.damaged").read_text() == "last.pt"
    assert (tmp_path / "last-1.pt.damaged").read_text() == "last-1.pt"


def test_where_links_are_unknown_the_former_checkpoint_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        save_last(tmp_path, {"step": step}, keep=2, replace=False)
    assert (load_last(tmp_path)["step"], load_checkpoint(tmp_path / "last-1.pt")["step"]) == (3, 2)


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
    with pytest.raises(ValueError, match=r"other.pt is not a checkpoint of this version \(format 2\)"):
        load_checkpoint(tmp_path / "other.pt")


def test_checkpoint_of_other_classes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "named.pt", {"class_names": {1: "cat", 2: "dog"}})
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "unnamed.pth")
    check_class_names(tmp_path / "named.pt", {1: "cat", 2: "dog"})
    check_class_names(tmp_path / "unnamed.pth", {1: "cat"})
    with pytest.raises(ValueError, match="named.pt was trained on other classes than the data set's: .*'dog'.*'cow'"):
        check_class_names(tmp_path / "named.pt", {1: "cat", 2: "cow"})
