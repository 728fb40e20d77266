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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from resnest_det.backbones import load_weights
from resnest_det.build import (
    build_coco_metric,
    build_coco_set,
    build_detection_inference,
    build_detector,
    build_optimizer,
    build_repeat_factors,
    check_batch_size,
)
from resnest_det.config import Command, DetectionSettings, settings_as_data
from resnest_det.data import CocoDetection, eval_loader, once_per_machine, train_loader
from resnest_det.distributed import describe_processes, images_to_device, rank
from resnest_det.engine import autocast, check_class_names, fit, seed_random_numbers, unsharded
from resnest_det.evaluation import (
    CocoMeanAveragePrecision,
    DetectionInference,
    evaluate,
    write_coco_results,
)
from resnest_det.experiment import (
    average_and_shard,
    describe_model,
    find_checkpoint,
    load_best,
    load_initial_weights,
    open_journal,
    place_model,
    precise_statistics,
    report_skipped,
    run_folder,
    run_report,
    run_script,
    save_picture,
    spread_samples,
    write_curves,
    write_evaluation,
    write_results,
)
from resnest_det.reports import class_tables, detection_examples, write_detection_report, write_examples
from resnest_det.visualize import compare_detections

REPOSITORY = Path(__file__).parent


def main(argv: Sequence[str], *, prog: str = "train_det.py") -> int:
    """Run the script; 0, or 2 after a mistake of the user's, which is printed."""
    return run_script(
        DetectionSettings,
        argv,
        prog=prog,
        description="Train a detector, evaluate it, and draw what it finds.",
        default_config=REPOSITORY / "configs" / "det" / "sample.toml",
        train=train,
        evaluate_only=evaluate_only,
    )


def train(command: Command[DetectionSettings], device: torch.device) -> None:
    """Settings, data, detector, fit, mAP."""
    settings = command.settings
    seed_random_numbers(settings.run.seed)

    masks = settings.model.has_masks
    train_set = once_per_machine(partial(build_coco_set, settings.data, "train", masks=masks))
    val_set = once_per_machine(partial(build_coco_set, settings.data, "val", masks=masks))
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
        repeat_factors=build_repeat_factors(settings.data, train_set),
    )
    init = "" if command.resume else settings.model.init
    model = build_detector(settings.model, train_set.num_classes, load_weights=not (command.resume or init))
    load_initial_weights(model, init, train_set.class_names)
    place_model(model, settings, device)
    average = average_and_shard(model, settings, device)
    batch_size = batches.batch_sampler.batch_size  # type: ignore[union-attr]  # of a small data set less than asked for
    check_batch_size(model, batch_size)
    optimizer, scheduler = build_optimizer(settings.optim, model, batches_per_epoch=len(batches), batch_size=batch_size)
    metric = build_coco_metric(settings.eval, val_set, masks=masks)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)
    inference = build_detection_inference(settings.eval, detections_per_image=settings.model.detections_per_image)
    measure = partial(evaluate, loader=val_batches, metric=metric, predict=inference, device=device)
    picture = partial(draw, inference=inference, dataset=val_set, num_pictures=settings.run.num_pictures, device=device)

    with (
        run_folder(command, train_set.class_names) as (folder, checkpoint),
        open_journal(command, folder) as journal,
    ):
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{settings.model.detector} on {settings.model.backbone}, {num_parameters / 1e6:.1f} M parameters, "
            f"{settings.optim.epochs} epochs of {len(batches)} batches on {describe_processes(device)}\n"
            f"{describe_model(model, batch_size)}\nrun folder {folder}",
            flush=True,
        )
        if rank() > 0:
            seed_random_numbers(settings.run.seed + rank())  # the weights are alike, what is drawn in training is not

        def measure_in_training(trained: nn.Module) -> dict[str, float]:
            precise_statistics(trained, batches, settings, device)
            results = measure(trained)
            if journal.wants_pictures and (sheet := picture(trained)) is not None:
                journal.picture("predictions", sheet)
            return results

        results = fit(
            model,
            batches,
            optimizer,
            scheduler,
            epochs=settings.optim.epochs,
            device=device,
            run_folder=folder,
            journal=journal,
            evaluate=measure_in_training,
            best_metric="AP",
            evaluate_every=settings.eval.every,
            average=average,
            precision=settings.run.precision,
            accumulate=settings.optim.accumulate,
            clip_norm=settings.optim.clip_norm,
            checkpoint_steps=settings.run.checkpoint_steps,
            checkpoint_minutes=settings.run.checkpoint_minutes,
            keep_last=settings.run.keep_last,
            resume_from=checkpoint,
            extra={"class_names": train_set.class_names, "settings": settings_as_data(settings)},
        )

        epoch = load_best(model, folder)
        with unsharded(model):
            if command.resume or epoch < settings.optim.epochs:
                with autocast(settings.run.precision, device):
                    results = measure(model)
            sheet = picture(model) if rank() == 0 else None
        print(f"best checkpoint, after epoch {epoch}:\n{metric.table()}")
        skipped = report_skipped(train_set, val_set)
        if rank() == 0:
            write_curves(folder)
            save_picture(sheet, folder / "predictions.png")
            written = write_results(folder / "results.json", settings.eval, results, class_tables(metric, masks=masks))
            suffix = written.stem.removeprefix("results")
            report(metric, val_set, folder, masks=masks, suffix=suffix)
            with run_report(folder, skipped, suffix=suffix):
                examples = detection_examples(metric, val_set, settings.run.num_pictures, masks=masks)
                write_examples(folder, examples, suffix=suffix)


def evaluate_only(command: Command[DetectionSettings], checkpoint: Path, device: torch.device) -> None:
    """The metric and the pictures of a checkpoint: ours, or any state dict of the same detector."""
    settings = command.settings
    masks = settings.model.has_masks
    val_set = once_per_machine(partial(build_coco_set, settings.data, "val", masks=masks))
    model = build_detector(settings.model, val_set.num_classes, load_weights=False)
    file = find_checkpoint(checkpoint)
    check_class_names(file, val_set.class_names)
    load_weights(model, file)
    place_model(model, settings, device)
    print(f"{file}\nval: {val_set.summary()}", flush=True)
    metric = build_coco_metric(settings.eval, val_set, masks=masks)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)
    inference = build_detection_inference(settings.eval, detections_per_image=settings.model.detections_per_image)
    with autocast(settings.run.precision, device):
        results = evaluate(model, val_batches, metric, predict=inference, device=device)
    print(metric.table())
    skipped = report_skipped(val_set)
    if rank() == 0:
        tables = class_tables(metric, masks=masks)
        picture = write_evaluation(settings, file, val_set.annotation_file.stem, results, tables)
        save_picture(draw(model, inference, val_set, settings.run.num_pictures, device), picture)
        folder, suffix = picture.parent, picture.stem.removeprefix("predictions")
        report(metric, val_set, folder, masks=masks, suffix=suffix)
        with run_report(folder, skipped, suffix=suffix, evaluated_on=device):
            examples = detection_examples(metric, val_set, settings.run.num_pictures, masks=masks)
            write_examples(folder, examples, suffix=suffix)


def report(
    metric: CocoMeanAveragePrecision, dataset: CocoDetection, folder: Path, *, masks: bool, suffix: str = ""
) -> None:
    """Write the detections in COCO's format, what is wrong with them, and pictures of that."""
    write_coco_results(folder / f"detections{suffix}.json", metric.results_json(dataset.category_ids))
    print(write_detection_report(folder, metric, suffix=suffix))
    if masks:
        print(write_detection_report(folder, metric, masks=True, suffix=f"_masks{suffix}"))


def draw(
    model: nn.Module,
    inference: DetectionInference | None,
    dataset: CocoDetection,
    num_pictures: int,
    device: torch.device,
) -> NDArray[np.uint8] | None:
    """Ground truth beside prediction for images spread over the data set, as one picture; None where there are none."""
    samples = spread_samples(dataset, num_pictures)
    if not samples:
        return None
    model.eval()
    with torch.inference_mode():
        images = [images_to_device([image], device) for image, _ in samples.values()]
        predictions = [(model(image) if inference is None else inference(model, image))[0] for image in images]
    pixels, targets = zip(*samples.values(), strict=True)
    return compare_detections(pixels, targets, predictions, dataset.class_names, names=list(samples))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
