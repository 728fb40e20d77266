"""What the training scripts share around the loop: the command line, the run folder, and errors as messages."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from resnest_det.backbones import Stage, load_matching_weights
from resnest_det.config import (
    Command,
    DetectionSettings,
    ExperimentSettings,
    Section,
    SegmentationSettings,
    ineffective_settings,
    parse_command_line,
    with_run_folder,
    write_settings,
)
from resnest_det.data import error_message
from resnest_det.data.files import ImageFiles
from resnest_det.distributed import (
    distributed_session,
    gather_objects,
    images_to_device,
    local_world_size,
    rank,
    select_device,
    to_device,
    world_size,
)
from resnest_det.engine import (
    Interrupted,
    Journal,
    ModelAverage,
    check_class_names,
    describe_trainable,
    load_checkpoint,
    load_last,
    load_whole_state,
    new_run_folder,
    read_metrics,
    recompute_batch_norms,
    shard,
    trained_class_names,
)
from resnest_det.engine.interruption import StopSignals
from resnest_det.engine.journal import Hook, load_hook
from resnest_det.engine.tensorboard import TensorBoard
from resnest_det.layers import describe_norms, norm_warnings, use_triton
from resnest_det.reports import note_end, note_evaluation, note_start, write_run_report
from resnest_det.reports.page import write_whole
from resnest_det.visualize import draw_curves

S = TypeVar("S", bound=ExperimentSettings)
T = TypeVar("T")

_warned: list[str] = []  # what the script warned of since it began, for its report


def run_script(
    cls: type[S],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default_config: Path,
    train: Callable[[Command[S], torch.device], None],
    evaluate_only: Callable[[Command[S], Path, torch.device], None],
) -> int:
    """A training script from its command line to its exit status, as one process or as one of torchrun's.

    Args:
        cls: the script's settings.
        argv: the arguments without the script's name, see `config.parse_command_line`.
        prog: what it is called as: the script's name, or the words of the command that runs it.
        description: what the script does, for `-h`.
        default_config: the configuration used where none is named.
        train: what the script does; it is given the command and this process's device.
        evaluate_only: what it does with --eval-only; it is given the checkpoint or run folder besides.

    Returns:
        0, also where a signal stopped the run, which is saved then; 130 where it stopped the script before there was
        anything to save; or 2 after a mistake of the user's or an error of the machine, which is printed without a
        traceback.
    """
    try:
        command = parse_command_line(cls, argv, prog=prog, description=description, default_config=default_config)
        run = command.settings.run
        with _plain_warnings(), _determinism(run.deterministic), distributed_session(run.device) as device:
            for sentence in ineffective_settings(command.settings):
                warnings.warn(sentence, stacklevel=2)
            try:
                with StopSignals() as stop, stop.at_once():  # until training begins, and again after it
                    if command.eval_only:
                        evaluate_only(command, command.eval_only, device)
                    else:
                        train(command, device)
            except Interrupted as interrupted:
                folder = interrupted.run_folder
                if folder is None or not (folder / "last.pt").exists():
                    print(f"stopped by {interrupted}; there is nothing to resume", file=sys.stderr)
                    return 130
                is_script = prog.endswith(".py")
                if world_size() > 1:
                    module = prog if is_script else f"-m {prog.replace('resnest-det', 'resnest_det')}"
                    called = f"torchrun --nproc-per-node {local_world_size()} {module}"
                else:
                    called = f"python {prog}" if is_script else prog.replace("resnest-det", _own_program(), 1)
                command_line = f"{called} --resume {folder}"
                print(f"stopped by {interrupted}; all of it is saved. To go on: {command_line}", flush=True)
    except (ValueError, OSError, FloatingPointError) as error:
        process = os.environ.get("RANK", "0")
        source = f"process {process}: " if process != "0" else ""
        print(f"{source}error: {error_message(error)}", file=sys.stderr)
        return 2
    return 0


def _own_program() -> str:
    """What the command resnest-det was called as, such as .venv/bin/resnest-det."""
    return sys.argv[0] if Path(sys.argv[0]).name == "resnest-det" else "python -m resnest_det"


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as sentences, without the line of code that they come from; they are noted for the report."""
    former, show = warnings.formatwarning, warnings.showwarning
    warnings.formatwarning = lambda message, *_where, **_more: f"warning: {message}\n"
    _warned.clear()

    def note(message: Warning | str, *where: Any, **more: Any) -> None:
        _warned.append(str(message))
        show(message, *where, **more)

    warnings.showwarning = note
    try:
        yield
    finally:
        warnings.formatwarning, warnings.showwarning = former, show


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Torch's deterministic algorithms, where they are wanted, for the length of the block."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS's sums may differ
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def run_folder(command: Command[S], class_names: dict[int, str]) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """The folder of a run, and the checkpoint to go on from: a new folder with the settings in it, or the resumed one.

    An error within the block leaves its traceback in the folder, in `error.txt`, of another process than the first in
    `error-RANK.txt`; a script prints the message alone.
    Every process sees the same folder.

    Args:
        command: what was asked for.
        class_names: the training set's.

    Raises:
        ValueError: the run to be resumed was trained on other classes, or its checkpoints are damaged; its folder is
            left as it was.
    """
    checkpoint = None
    if command.resume:
        folder = command.resume
        checkpoint = load_last(folder)
        check_class_names(folder / "last.pt", class_names, checkpoint)
    else:
        folder = Path(command.settings.run.dir)
        if rank() == 0:
            folder = new_run_folder(folder)
            write_settings(with_run_folder(command.settings, str(folder)), folder / "config.toml")
        folder = gather_objects(folder)[0]
    if rank() == 0:
        note_start(folder, select_device(command.settings.run.device))
        for file in folder.glob("error-*.txt"):  # of a start with more processes
            number = file.stem.removeprefix("error-")
            if number.isdecimal() and int(number) >= world_size():
                file.unlink(missing_ok=True)
    report = folder / ("error.txt" if rank() == 0 else f"error-{rank()}.txt")
    report.unlink(missing_ok=True)
    try:
        yield folder, checkpoint
    except Interrupted as stop:
        stop.run_folder = folder
        raise
    except Exception:
        report.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
        raise


@contextmanager
def open_journal(command: Command[S], folder: Path) -> Iterator[Journal]:
    """The journal of a run, with the trackers that its settings name, closed at the end; the first process writes it.

    Raises:
        ValueError: run.logger names no function, or TensorBoard is asked for and not installed.
    """
    hooks: list[Hook] = []
    if rank() == 0:
        if command.settings.run.tensorboard:
            hooks.append(TensorBoard(folder))
        if command.settings.run.logger:
            hooks.append(load_hook(command.settings.run.logger, folder))
    journal = Journal(folder, active=rank() == 0, hooks=hooks, profile=command.profile)
    try:
        yield journal
    finally:
        journal.close()


def place_model(
    model: nn.Module, settings: DetectionSettings | SegmentationSettings, device: torch.device
) -> nn.Module:
    """The model on its device, its weights laid out and its backbone compiled as the settings say.

    Raises:
        ValueError: the backbone is to be compiled and its activations to be computed again; or Triton's kernels are
            wanted where nothing would take them.
    """
    if settings.run.compile and settings.model.checkpoint_activations:
        raise ValueError(
            "run.compile=true and model.checkpoint_activations=true do not go together: what is computed again keeps "
            "its statistics apart, which compiled code cannot do; use one of them"
        )
    if settings.run.triton:
        _check_triton(settings, device)
        use_triton(model)
    model.to(device).to(memory_format=torch.channels_last if settings.run.channels_last else torch.contiguous_format)
    if settings.run.compile:
        assert isinstance(model.backbone, nn.Module)
        model.backbone.compile()
    return model


def _check_triton(settings: DetectionSettings | SegmentationSettings, device: torch.device) -> None:
    for is_against, what, fix in (
        (device.type != "cuda", f"the device is {device}", "run.device=cuda"),
        (settings.run.compile, "run.compile=true, which makes kernels itself", "run.compile=false"),
        (
            settings.model.norm not in ("bn", "frozen_bn"),
            f"model.norm={settings.model.norm}, which they do not compute",
            "model.norm=bn or frozen_bn",
        ),
    ):
        if is_against:
            raise ValueError(f"run.triton=true, and {what}: use {fix}, or run.triton=false")


def load_initial_weights(model: nn.Module, init: str, class_names: dict[int, str]) -> None:
    """Give a model what fits of the checkpoint that model.init names, and say what did; without one, nothing.

    The last layers are the checkpoint's only where it says that it was trained on these classes, or says nothing and
    has as many.

    Raises as load_matching_weights does.
    """
    if init:
        source = find_checkpoint(Path(init)) if Path(init).is_dir() else init
        trained = trained_class_names(Path(source))
        found = load_matching_weights(model, source, new_classes=trained not in (None, class_names))
        print(f"{source}\n{found.summary()}")


def average_and_shard(
    model: nn.Module, settings: DetectionSettings | SegmentationSettings, device: torch.device
) -> ModelAverage | None:
    """The moving average of a model's weights, where optim.ema_decay asks for it.

    With run.parallel=fsdp the model and its average are then sharded, by the backbone's stages; the optimiser is made
    afterwards.

    Raises:
        ValueError: run.parallel=fsdp in a single process.
    """
    average = ModelAverage(model, settings.optim.ema_decay) if settings.optim.ema_decay else None
    if settings.run.parallel == "fsdp":
        for whole in (model, average.model) if average else (model,):
            shard(whole, [module for module in whole.modules() if isinstance(module, Stage)], device)
    return average


def describe_model(model: nn.Module, batch_size: int) -> str:
    """What is trained and how it is normalised, for the start of a run; what may hurt is warned of.

    Args:
        model: what is trained.
        batch_size: images of a batch on each process.
    """
    for sentence in norm_warnings(model, batch_size):
        warnings.warn(sentence, stacklevel=2)
    return f"{describe_trainable(model)}\n{describe_norms(model)}"


def precise_statistics(
    model: nn.Module, loader: DataLoader[Any], settings: DetectionSettings | SegmentationSettings, device: torch.device
) -> None:
    """Compute BatchNorm's statistics anew over training batches, where eval.precise_bn asks for it."""
    if settings.eval.precise_bn:
        loader.batch_sampler.set_epoch(settings.optim.epochs)  # type: ignore[union-attr]  # one that is not trained on
        recompute_batch_norms(
            model,
            islice(loader, settings.eval.precise_bn),
            lambda batch: model(images_to_device(batch[0], device), to_device(batch[1], device)),
        )


def load_best(model: nn.Module, folder: Path) -> int:
    """Give a model the weights of a run's best checkpoint, the averaged ones where it has them.

    Returns:
        The epochs after which they were measured.
    """
    best = load_checkpoint(folder / "best.pt")
    load_whole_state(model, best["ema"]["model"] if "ema" in best else best["model"])
    epochs: int = best["epoch"]
    return epochs


def write_curves(folder: Path) -> None:
    """Draw a run's learning curves, as curves.png in its folder."""
    Image.fromarray(draw_curves(read_metrics(folder / "metrics.jsonl"))).save(folder / "curves.png")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that --eval-only means: the file itself, or the best one of a run folder.

    Raises:
        ValueError: the run has none yet.
    """
    if not path.is_dir():
        return path
    best = path / "best.pt"
    if best.exists():
        return best
    if (path / "last.pt").exists():
        raise ValueError(f"{path} has no best.pt: the run was not evaluated yet; name its last.pt, or resume it")
    if (path / "config.toml").exists():
        raise ValueError(f"{path} has no checkpoint: the run ended before it wrote one; begin it anew")
    runs = sorted(folder.parent.name for folder in path.glob("*/best.pt"))
    hint = f"it holds the runs {', '.join(runs)}" if runs else "name a run folder or a checkpoint's file"
    raise ValueError(f"{path} is no run folder: it has no config.toml and no checkpoint; {hint}")


def write_results(
    path: Path, settings: Section, results: dict[str, float], tables: Mapping[str, Iterable[Any]]
) -> Path:
    """Write what was measured, and how, as JSON. Another measurement's file is never replaced.

    Args:
        path: the file; where it holds another measurement, the name gets -2, -3, ... behind it.
        settings: how it was measured, the settings of the evaluation.
        results: numbers by name.
        tables: by name, such as "classes", the metric's dataclass of each class.

    Returns:
        The file that was written.
    """
    content = {
        "results": results,
        "settings": settings.model_dump(mode="json"),
        **{name: [asdict(row) for row in rows] for name, rows in tables.items()},
    }
    text = json.dumps(content, indent=2) + "\n"
    file, number = path, 1
    while file.exists() and file.read_bytes() != text.encode():
        number += 1
        file = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return write_whole(file, text)


def write_evaluation(
    settings: DetectionSettings | SegmentationSettings,
    checkpoint: Path,
    set_name: str,
    results: dict[str, float],
    tables: Mapping[str, Iterable[Any]],
) -> Path:
    """Write what --eval-only measured, as write_results does.

    A run's own folder takes what is measured of it; a file from elsewhere gets a folder of its own. The file is named
    after the checkpoint and `set_name`, the data that it was measured on.

    Returns:
        Where the predictions' picture goes, beside what was written.
    """
    own_folder = Path(settings.run.dir) == checkpoint.parent
    folder = checkpoint.parent if own_folder else new_run_folder(Path(settings.run.dir))
    written = write_results(folder / f"results_{checkpoint.stem}_{set_name}.json", settings.eval, results, tables)
    return written.with_name(f"{written.stem.replace('results', 'predictions', 1)}.png")


def spread_samples(dataset: ImageFiles[T], num_samples: int) -> dict[str, T]:
    """Samples spread over a data set, by the names of their files; those that cannot be read are left out."""
    spread = range(0, len(dataset), max(len(dataset) // max(num_samples, 1), 1))[:num_samples]
    samples = {dataset.file_name(index): dataset.load(index) for index in spread}
    return {name: sample for name, sample in samples.items() if sample is not None}


def save_picture(image: NDArray[np.uint8] | None, path: Path) -> None:
    """Save a picture (H, W, 3), if there is one, and say where it is."""
    if image is not None:
        Image.fromarray(image).save(path)
        print(f"pictures: {path}")


def report_skipped(*datasets: ImageFiles[Any]) -> list[str]:
    """Say how many images could not be read and were skipped, by any process: they are in no figure.

    Returns:
        Their names.
    """
    skipped: list[str] = []
    for dataset in datasets:
        if names := sorted(set(chain.from_iterable(gather_objects(dataset.skipped)))):
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            print(f"{len(names)} of {len(dataset)} images were unreadable and skipped: {shown}")
            skipped += names
    return skipped


@contextmanager
def run_report(
    folder: Path, skipped: Sequence[str], *, suffix: str = "", evaluated_on: torch.device | None = None
) -> Iterator[None]:
    """A block in which the rest of what a report needs is written, and at its end the report.

    It comes when the results are written: an error here is warned of, and costs no more than the report.

    Args:
        folder: the run folder, or where an evaluation's files are.
        skipped: names of the images that could not be read.
        suffix: what the names of the results' files have before their ending.
        evaluated_on: of an evaluation without training, its device.
    """
    with _warned_of("the report"):
        with _warned_of("the best and the worst images"):
            yield
        warned = list(dict.fromkeys(_warned))
        if evaluated_on is None:
            note_end(folder, skipped=skipped, warnings=warned)
        else:
            note_evaluation(folder, evaluated_on, suffix=suffix, skipped=skipped, warnings=warned)
        # That of the run is of its newest measurement, whatever the number in its files' names.
        print(f"report: {write_run_report(folder, suffix=suffix if evaluated_on else '')}")


@contextmanager
def _warned_of(what: str) -> Iterator[None]:
    """A block whose error is a warning that this could not be written."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{what} could not be written; the results are ({type(error).__name__}: {error})", stacklevel=2)
