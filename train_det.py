"""Train a detector on COCO or any data set in COCO's format, evaluate it, and draw what it finds.

python train_det.py                                        the generated sample data, minutes on two CPU cores
python train_det.py configs/det/bccd.toml data.root=DIR    another experiment, with a setting of its own
python train_det.py --resume runs/bccd                     go on with a run that was interrupted
python train_det.py --eval-only runs/bccd                  measure its best checkpoint again
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from resnest_det.backbones import load_weights
from resnest_det.build import build_detector, build_optimizer, build_train_set, build_val_set, check_batch_size
from resnest_det.config import (
    Command,
    DetectionSettings,
    ineffective_settings,
    parse_command_line,
    with_run_folder,
    write_settings,
)
from resnest_det.data import CocoDetection, error_message, eval_loader, train_loader
from resnest_det.distributed import images_to_device, select_device
from resnest_det.engine import check_class_names, fit, load_checkpoint, new_run_folder
from resnest_det.evaluation import CocoMeanAveragePrecision, evaluate
from resnest_det.visualize import compare_detections

REPOSITORY = Path(__file__).parent


def main(argv: Sequence[str]) -> int:
    """Run the script; 0, or 2 after a mistake of the user's, which is printed."""
    try:
        command = parse_command_line(
            DetectionSettings,
            argv,
            prog="train_det.py",
            description="Train a detector, evaluate it, and draw what it finds.",
            default_config=REPOSITORY / "configs" / "det" / "sample.toml",
        )
        for sentence in ineffective_settings(command.settings):
            warnings.warn(sentence, stacklevel=1)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("training on several processes is not built yet: start train_det.py without torchrun")
        if command.eval_only:
            evaluate_only(command, command.eval_only)
        else:
            train(command)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error_message(error)}", file=sys.stderr)
        return 2
    return 0


def train(command: Command[DetectionSettings]) -> None:
    """Settings, data, detector, fit, mAP."""
    settings = command.settings
    device = select_device(settings.run.device)
    torch.manual_seed(settings.run.seed)

    train_set, val_set = build_train_set(settings.data), build_val_set(settings.data)
    if train_set.class_names != val_set.class_names:
        raise ValueError(
            f"the training and the validation set have other categories: {train_set.class_names} and "
            f"{val_set.class_names}; give both files the same list of categories"
        )
    print(f"settings: {command.config_path}\ntrain: {train_set.summary()}\nval: {val_set.summary()}")
    batches = train_loader(
        train_set,
        batch_size=settings.data.batch_size,
        num_workers=settings.data.num_workers,
        seed=settings.run.seed,
        group_by_aspect=settings.data.group_by_aspect,
    )
    model = build_detector(settings.model, train_set.num_classes, load_weights=not command.resume).to(device)
    check_batch_size(model, min(settings.data.batch_size, len(train_set)))
    optimizer, scheduler = build_optimizer(settings.optim, model, len(batches))
    metric = CocoMeanAveragePrecision(val_set.class_names)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)

    if command.resume:
        check_class_names(command.resume / "last.pt", train_set.class_names)
    folder = command.resume or new_run_folder(Path(settings.run.dir))
    if not command.resume:
        write_settings(with_run_folder(settings, str(folder)), folder / "config.toml")
    (folder / "error.txt").unlink(missing_ok=True)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{settings.model.detector} on {settings.model.backbone}, {num_parameters / 1e6:.1f} M parameters, "
        f"{settings.optim.epochs} epochs of {len(batches)} steps on {device}; run folder {folder}",
        flush=True,
    )
    try:
        fit(
            model,
            batches,
            optimizer,
            scheduler,
            epochs=settings.optim.epochs,
            device=device,
            run_folder=folder,
            evaluate=partial(evaluate, model, val_batches, metric, device=device),
            best_metric="AP",
            evaluate_every=settings.eval.every,
            clip_norm=settings.optim.clip_norm,
            resume=command.resume is not None,
            extra={"class_names": train_set.class_names},
        )
    except Exception:
        (folder / "error.txt").write_text(traceback.format_exc())  # main prints the message alone
        raise

    best = load_checkpoint(folder / "best.pt")
    if command.resume or best["epoch"] < settings.optim.epochs:
        model.load_state_dict(best["model"])
        evaluate(model, val_batches, metric, device=device)
    print(f"best checkpoint, after epoch {best['epoch']}:\n{metric.table()}")
    report_skipped(train_set, val_set)
    draw(model, val_set, folder / "predictions.png", settings.run.num_pictures, device)


def evaluate_only(command: Command[DetectionSettings], checkpoint: Path) -> None:
    """The metric and the pictures of a checkpoint: ours, or any state dict of the same detector."""
    settings = command.settings
    device = select_device(settings.run.device)
    val_set = build_val_set(settings.data)
    model = build_detector(settings.model, val_set.num_classes, load_weights=False)
    file = checkpoint / "best.pt" if checkpoint.is_dir() else checkpoint
    if checkpoint.is_dir() and not file.exists():
        raise ValueError(f"{checkpoint} has no best.pt: the run was not evaluated yet; name its last.pt, or resume it")
    load_weights(model, file)
    check_class_names(file, val_set.class_names)
    model.to(device)
    print(f"{file}\nval: {val_set.summary()}", flush=True)
    metric = CocoMeanAveragePrecision(val_set.class_names)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)
    results = evaluate(model, val_batches, metric, device=device)
    print(metric.table())
    report_skipped(val_set)
    # A run's own folder takes what is measured of it; a file from elsewhere gets a folder of its own.
    own_folder = Path(settings.run.dir) == file.parent
    folder = file.parent if own_folder else new_run_folder(Path(settings.run.dir))
    # Named after checkpoint and set, so that measuring another one replaces nothing.
    name = f"{file.stem}_{val_set.annotation_file.stem}"
    (folder / f"results_{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(model, val_set, folder / f"predictions_{name}.png", settings.run.num_pictures, device)


def draw(model: nn.Module, dataset: CocoDetection, path: Path, num_pictures: int, device: torch.device) -> None:
    """Ground truth beside prediction for images spread over the data set, as one picture."""
    spread = range(0, len(dataset), max(len(dataset) // max(num_pictures, 1), 1))[:num_pictures]
    samples = {dataset.file_name(index): dataset.load(index) for index in spread}
    read = {name: sample for name, sample in samples.items() if sample is not None}
    if not read:
        return
    model.eval()
    with torch.inference_mode():
        predictions = [model(images_to_device([image], device))[0] for image, _ in read.values()]
    images, targets = zip(*read.values(), strict=True)
    sheet = compare_detections(images, targets, predictions, dataset.class_names, names=list(read))
    Image.fromarray(sheet).save(path)
    print(f"pictures: {path}")


def report_skipped(*datasets: CocoDetection) -> None:
    """Say how many images could not be read, where skipping them was asked for: they are in no figure."""
    for dataset in datasets:
        if names := dataset.skipped:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            print(f"{len(names)} of {len(dataset)} images were unreadable and skipped: {shown}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
