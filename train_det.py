"""Train a detector on COCO or any data set in COCO's format, evaluate it, and draw what it finds.

python train_det.py                                        the generated sample data, minutes on two CPU cores
python train_det.py configs/det/bccd.toml data.root=DIR    another experiment, with a setting of its own
python train_det.py --resume runs/bccd                     go on with a run that was interrupted
python train_det.py --eval-only runs/bccd                  measure its best checkpoint again
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from resnest_det.backbones import load_weights
from resnest_det.build import build_coco_set, build_detector, build_optimizer, check_batch_size
from resnest_det.config import Command, DetectionSettings
from resnest_det.data import CocoDetection, eval_loader, train_loader
from resnest_det.distributed import images_to_device, select_device
from resnest_det.engine import check_class_names, fit, load_checkpoint
from resnest_det.evaluation import CocoMeanAveragePrecision, evaluate
from resnest_det.experiment import (
    find_checkpoint,
    memory_format,
    report_skipped,
    run_folder,
    run_script,
    spread_samples,
    write_evaluation,
    write_results,
)
from resnest_det.visualize import compare_detections

REPOSITORY = Path(__file__).parent


def main(argv: Sequence[str]) -> int:
    """Run the script; 0, or 2 after a mistake of the user's, which is printed."""
    return run_script(
        DetectionSettings,
        argv,
        prog="train_det.py",
        description="Train a detector, evaluate it, and draw what it finds.",
        default_config=REPOSITORY / "configs" / "det" / "sample.toml",
        train=train,
        evaluate_only=evaluate_only,
    )


def train(command: Command[DetectionSettings]) -> None:
    """Settings, data, detector, fit, mAP."""
    settings = command.settings
    device = select_device(settings.run.device)
    torch.manual_seed(settings.run.seed)

    train_set, val_set = build_coco_set(settings.data, "train"), build_coco_set(settings.data, "val")
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
    model = build_detector(settings.model, train_set.num_classes, load_weights=not command.resume)
    model.to(device).to(memory_format=memory_format(settings))
    check_batch_size(model, min(settings.data.batch_size, len(train_set)))
    optimizer, scheduler = build_optimizer(settings.optim, model, len(batches))
    metric = CocoMeanAveragePrecision(val_set.class_names)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)
    measure = partial(evaluate, model, val_batches, metric, device=device)

    with run_folder(command, train_set.class_names) as folder:
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{settings.model.detector} on {settings.model.backbone}, {num_parameters / 1e6:.1f} M parameters, "
            f"{settings.optim.epochs} epochs of {len(batches)} steps on {device}; run folder {folder}",
            flush=True,
        )
        results = fit(
            model,
            batches,
            optimizer,
            scheduler,
            epochs=settings.optim.epochs,
            device=device,
            run_folder=folder,
            evaluate=measure,
            best_metric="AP",
            evaluate_every=settings.eval.every,
            clip_norm=settings.optim.clip_norm,
            resume=command.resume is not None,
            extra={"class_names": train_set.class_names},
        )

    best = load_checkpoint(folder / "best.pt")
    if command.resume or best["epoch"] < settings.optim.epochs:
        model.load_state_dict(best["model"])
        results = measure()
    print(f"best checkpoint, after epoch {best['epoch']}:\n{metric.table()}")
    write_results(folder / "results.json", settings.eval, results, metric.per_class())
    report_skipped(train_set, val_set)
    draw(model, val_set, folder / "predictions.png", settings.run.num_pictures, device)


def evaluate_only(command: Command[DetectionSettings], checkpoint: Path) -> None:
    """The metric and the pictures of a checkpoint: ours, or any state dict of the same detector."""
    settings = command.settings
    device = select_device(settings.run.device)
    val_set = build_coco_set(settings.data, "val")
    model = build_detector(settings.model, val_set.num_classes, load_weights=False)
    file = find_checkpoint(checkpoint)
    check_class_names(file, val_set.class_names)
    load_weights(model, file)
    model.to(device).to(memory_format=memory_format(settings))
    print(f"{file}\nval: {val_set.summary()}", flush=True)
    metric = CocoMeanAveragePrecision(val_set.class_names)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)
    results = evaluate(model, val_batches, metric, device=device)
    print(metric.table())
    report_skipped(val_set)
    picture = write_evaluation(settings, file, val_set.annotation_file.stem, results, metric.per_class())
    draw(model, val_set, picture, settings.run.num_pictures, device)


def draw(model: nn.Module, dataset: CocoDetection, path: Path, num_pictures: int, device: torch.device) -> None:
    """Ground truth beside prediction for images spread over the data set, as one picture."""
    samples = spread_samples(dataset, num_pictures)
    if not samples:
        return
    model.eval()
    with torch.inference_mode():
        predictions = [model(images_to_device([image], device))[0] for image, _ in samples.values()]
    images, targets = zip(*samples.values(), strict=True)
    sheet = compare_detections(images, targets, predictions, dataset.class_names, names=list(samples))
    Image.fromarray(sheet).save(path)
    print(f"pictures: {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
