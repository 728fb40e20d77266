"""What happens to long runs, happening to short ones: kills, signals, full disks, dead workers, damaged files."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_det
from resnest_det.data.sample import write_sample_dataset
from resnest_det.engine import load_checkpoint
from tests.same_run import check_same_run
from tests.tiny_configs import finish, start, write_detection_config

EPOCHS = 6
ARGUMENTS = [f"optim.epochs={EPOCHS}", "optim.ema_decay=0.9", "run.checkpoint_steps=2", "data.num_workers=1"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sample"
    write_sample_dataset(folder, num_train=16, num_val=4)
    return folder


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def caught_signals(pid: int) -> set[str]:
    """The signals that a process has handlers for."""
    (mask,) = re.findall(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return {number.name for number in signal.Signals if int(mask, 16) >> (number - 1) & 1}


def run_arguments(processes: int, *arguments: str) -> list[str]:
    """24 steps of four images, a checkpoint after every second one."""
    return [*ARGUMENTS, f"data.batch_size={4 // processes}", *arguments]


def whole_run(sample: Path, folder: Path, processes: int, *arguments: str) -> Path:
    """An unbroken run."""
    config = write_detection_config(folder / "whole.toml", sample=sample, run=folder / "whole")
    finish("train_det.py", config, *run_arguments(processes, *arguments), processes=processes)
    return folder / "whole"


def killed_run(sample: Path, folder: Path, processes: int, *arguments: str, step: int, delay: float) -> Path:
    """A run killed so many seconds after that step was saved, then resumed to its end."""
    run = folder / "killed"
    config = write_detection_config(folder / "killed.toml", sample=sample, run=run)
    process = start("train_det.py", config, *run_arguments(processes, *arguments), processes=processes)
    wait_for(run / "last.pt", process)
    while load_checkpoint(run / "last.pt")["step"] < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    time.sleep(delay)
    assert process.poll() is None, "it came to its end before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish("train_det.py", "--resume", run, processes=processes)
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "parallel"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_killed_and_resumed(processes: int, parallel: str, sample: Path, tmp_path: Path) -> None:
    arguments = [f"run.parallel={parallel}"]
    whole = whole_run(sample, tmp_path, processes, *arguments)
    check_same_run(whole, killed_run(sample, tmp_path, processes, *arguments, step=10, delay=0.2))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_ten_random_moments_and_resumed(processes: int, sample: Path, tmp_path: Path) -> None:
    whole = whole_run(sample, tmp_path, processes)
    moments = random.Random(processes)
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        step, delay = moments.randint(1, 20), moments.uniform(0, 0.5)
        check_same_run(whole, killed_run(sample, folder, processes, step=step, delay=delay))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_ends_the_run_with_the_line_that_resumes_it(
    number: signal.Signals, sample: Path, tmp_path: Path
) -> None:
    """As Ctrl-C and schedulers send it: to the loader's workers, too."""
    config = write_detection_config(tmp_path / "det.toml", sample=sample, run=tmp_path / "run")
    process = start("train_det.py", config, "optim.epochs=200", "run.checkpoint_steps=1", "data.num_workers=2")
    wait_for(tmp_path / "run" / "last.pt", process)
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert re.search(rf"stopped by {number.name}.*To go on: python train_det.py --resume {tmp_path / 'run'}", printed)
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "error.txt").exists()
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] >= 1


@pytest.mark.slow
def test_ctrl_c_with_several_processes(sample: Path, tmp_path: Path) -> None:
    """The terminal signals all of them, and torchrun signals its processes once more."""
    config = write_detection_config(tmp_path / "det.toml", sample=sample, run=tmp_path / "run")
    arguments = ["optim.epochs=200", "run.checkpoint_steps=1", "data.num_workers=1", "data.batch_size=2"]
    process = start("train_det.py", config, *arguments, processes=2)
    wait_for(tmp_path / "run" / "last.pt", process)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    line = f"To go on: torchrun --nproc-per-node 2 train_det.py --resume {tmp_path / 'run'}"
    assert printed.count(line) == 1, printed
    finish("train_det.py", "--eval-only", tmp_path / "run" / "last.pt", f"run.dir={tmp_path / 'again'}")


def test_a_signal_before_the_run_begins(sample: Path, tmp_path: Path) -> None:
    config = write_detection_config(tmp_path / "det.toml", sample=sample, run=tmp_path / "run")
    process = start("train_det.py", config, "data.sample={num_train=100000}")
    wait_for(Path(f"/proc/{process.pid}"), process)
    deadline = time.monotonic() + 60
    while "SIGTERM" not in caught_signals(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in printed) == (130, False), printed
    assert "stopped by SIGTERM; there is nothing to resume" in printed


def test_a_dead_worker(sample: Path, tmp_path: Path) -> None:
    config = write_detection_config(tmp_path / "det.toml", sample=sample, run=tmp_path / "run")
    process = start("train_det.py", config, "optim.epochs=200", "run.checkpoint_steps=1", "data.num_workers=1")
    wait_for(tmp_path / "run" / "last.pt", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if "train_det" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2, printed
    assert re.search(r"^error: a process that loads images died .*resume the run$", printed, re.MULTILINE)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] >= 1


def test_an_image_that_is_truncated_in_the_second_epoch(sample: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(sample, tmp_path / "data"))
    config = write_detection_config(tmp_path / "det.toml", sample=data, run=tmp_path / "run")
    process = start("train_det.py", config, "optim.epochs=200", "data.num_workers=1")
    wait_for(tmp_path / "run" / "last.pt", process)
    image = max((data / "train").iterdir())
    image.write_bytes(image.read_bytes()[:500])
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2, printed
    assert re.search(rf"^error: cannot read the image .*{image.name}", printed, re.MULTILINE)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] >= 1
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()


def test_a_full_disk(sample: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it; it comes between two epochs."""
    run = tmp_path / "run"
    config = write_detection_config(tmp_path / "det.toml", sample=sample, run=run)
    assert train_det.main([str(config), "optim.epochs=1"]) == 0
    step = load_checkpoint(run / "last.pt")["step"]
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); import train_det; "
    limited += "sys.exit(train_det.main(sys.argv[1:]))"
    text = (run / "config.toml").read_text().replace("epochs = 1", "epochs = 2")
    (run / "config.toml").write_text(text)
    process = subprocess.run(
        [sys.executable, "-c", limited, "--resume", str(run)],
        capture_output=True,
        text=True,
        cwd=Path(train_det.__file__).parent,
        timeout=120,
    )
    assert process.returncode == 2, process.stdout + process.stderr
    assert "the checkpoint could not be written (File too large" in process.stderr
    assert "Traceback" not in process.stderr
    assert load_checkpoint(run / "last.pt")["step"] == step


def test_a_damaged_last_checkpoint(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write_detection_config(tmp_path / "whole.toml", sample=sample, run=tmp_path / "whole")
    broken = write_detection_config(tmp_path / "broken.toml", sample=sample, run=tmp_path / "broken")
    assert train_det.main([str(whole)]) == 0
    assert train_det.main([str(broken)]) == 0
    last = tmp_path / "broken" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="last.pt is damaged.*goes on from the checkpoint before it"):
        assert train_det.main(["--resume", str(tmp_path / "broken")]) == 0
    assert "resumed after epoch 2 of 3" in capsys.readouterr().out
    check_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_finished_run_says_so(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_detection_config(tmp_path / "det.toml", sample=sample, run=tmp_path / "run")
    assert train_det.main([str(config), "optim.epochs=1"]) == 0
    capsys.readouterr()
    assert train_det.main(["--resume", str(tmp_path / "run")]) == 0
    assert "the run is finished: 1 of 1 epochs" in capsys.readouterr().out
