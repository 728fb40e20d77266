"""Train a detector on COCO or any data set in COCO's format, evaluate it, and draw what it finds.

python train_det.py                                        the generated sample data, minutes on two CPU cores
python train_det.py configs/det/bccd.toml data.root=DIR    another experiment, with a setting of its own
python train_det.py --resume runs/bccd                     go on with a run that was interrupted
python train_det.py --eval-only runs/bccd                  measure its best checkpoint again
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from resnest_det.backbones import load_weights
from resnest_det.build import build_detector, build_optimizer, build_train_set, build_val_set
from resnest_det.config import Command, DetectionSettings, ineffective_settings, parse_command_line, write_settings
from resnest_det.data import CocoDetection, error_message, eval_loader, train_loader
from resnest_det.distributed import images_to_device, select_device
from resnest_det.engine import fit, load_checkpoint, new_run_folder
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
    print(f"train: {train_set.summary()}\nval: {val_set.summary()}")
    batches = train_loader(
        train_set,
        batch_size=settings.data.batch_size,
        num_workers=settings.data.num_workers,
        seed=settings.run.seed,
        group_by_aspect=settings.data.group_by_aspect,
    )
    model = build_detector(settings.model, train_set.num_classes, load_weights=not command.resume).to(device)
    optimizer, scheduler = build_optimizer(settings.optim, model, len(batches))
    metric = CocoMeanAveragePrecision(val_set.class_names)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)

    folder = command.resume or new_run_folder(Path(settings.run.dir))
    write_settings(settings, folder / "config.toml")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{settings.model.detector} on {settings.model.backbone}, {num_parameters / 1e6:.1f} M parameters, "
        f"{settings.optim.epochs} epochs of {len(batches)} steps on {device}; run folder {folder}",
        flush=True,
    )
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

    best = load_checkpoint(folder / "best.pt")
    if command.resume or best["epoch"] < settings.optim.epochs:
        model.load_state_dict(best["model"])
        evaluate(model, val_batches, metric, device=device)
    print(f"best checkpoint, after epoch {best['epoch']}:\n{metric.table()}")
    draw(model, val_set, folder / "predictions.png", settings.run.num_pictures, device)
    report_skipped(train_set, val_set)


def evaluate_only(command: Command[DetectionSettings], checkpoint: Path) -> None:
    """The metric and the pictures of a checkpoint: ours, or any state dict of the same detector."""
    settings = command.settings
    device = select_device(settings.run.device)
    val_set = build_val_set(settings.data)
    model = build_detector(settings.model, val_set.num_classes, load_weights=False)
    file = checkpoint / "best.pt" if checkpoint.is_dir() else checkpoint
    load_weights(model, file)
    model.to(device)
    print(f"{file}\nval: {val_set.summary()}", flush=True)
    metric = CocoMeanAveragePrecision(val_set.class_names)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)
    evaluate(model, val_batches, metric, device=device)
    print(metric.table())
    folder = Path(settings.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    draw(model, val_set, folder / "predictions.png", settings.run.num_pictures, device)
    report_skipped(val_set)


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
    """Say which images could not be read, where skipping them was asked for."""
    for name in [name for dataset in datasets for name in dataset.skipped]:
        print(f"skipped, unreadable: {name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
