"""Train a segmentation model on ADE20K or any folder of images and masks, evaluate it, and draw what it sees.

python train_seg.py                                    the generated sample data, minutes on two CPU cores
python train_seg.py CONFIG.toml data.root=DIR          another experiment of configs/seg, with a setting of its own
python train_seg.py --resume runs/sample_seg           go on with a run that was interrupted
python train_seg.py --eval-only runs/sample_seg        measure its best checkpoint again
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnest_det.backbones import load_weights
from resnest_det.build import (
    build_inference,
    build_mask_set,
    build_optimizer,
    build_segmenter,
    check_batch_size,
    class_colours,
)
from resnest_det.config import Command, RunSettings, SegmentationSettings, settings_as_data
from resnest_det.data import MaskFolder, eval_loader, once_per_machine, train_loader
from resnest_det.distributed import describe_processes, images_to_device, rank
from resnest_det.engine import autocast, check_class_names, fit, seed_random_numbers, unsharded
from resnest_det.evaluation import MeanIoU, SegmentationInference, evaluate
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
from resnest_det.reports import Examples, segmentation_examples, write_examples
from resnest_det.visualize import compare_segmentations

REPOSITORY = Path(__file__).parent


def main(argv: Sequence[str], *, prog: str = "train_seg.py") -> int:
    """Run the script; 0, or 2 after a mistake of the user's, which is printed."""
    return run_script(
        SegmentationSettings,
        argv,
        prog=prog,
        description="Train a segmentation model, evaluate it, and draw what it sees.",
        default_config=REPOSITORY / "configs" / "seg" / "sample.toml",
        train=train,
        evaluate_only=evaluate_only,
    )


def train(command: Command[SegmentationSettings], device: torch.device) -> None:
    """Settings, data, model, fit, mIoU."""
    settings = command.settings
    seed_random_numbers(settings.run.seed)

    train_set = once_per_machine(partial(build_mask_set, settings.data, "train"))
    val_set = once_per_machine(partial(build_mask_set, settings.data, "val"))
    print(f"settings: {command.config_path}\ntrain: {train_set.summary()}\nval: {val_set.summary()}")
    batches = train_loader(
        train_set,
        batch_size=settings.data.batch_size,
        num_workers=settings.data.num_workers,
        seed=settings.run.seed,
        group_by_aspect=False,  # the crops are square
    )
    init = "" if command.resume else settings.model.init
    model = build_segmenter(settings.model, train_set.num_classes, load_weights=not (command.resume or init))
    load_initial_weights(model, init, train_set.class_names)
    place_model(model, settings, device)
    average = average_and_shard(model, settings, device)
    batch_size = batches.batch_sampler.batch_size  # type: ignore[union-attr]  # of a small data set less than asked for
    check_batch_size(model, batch_size)
    optimizer, scheduler = build_optimizer(settings.optim, model, batches_per_epoch=len(batches), batch_size=batch_size)
    metric = MeanIoU(val_set.class_names)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)
    inference = build_inference(settings.eval)
    measure = partial(evaluate, loader=val_batches, metric=metric, predict=inference, device=device)
    picture = partial(draw, inference=inference, dataset=val_set, num_pictures=settings.run.num_pictures, device=device)

    with (
        run_folder(command, train_set.class_names) as (folder, checkpoint),
        open_journal(command, folder) as journal,
    ):
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{settings.model.segmenter} on {settings.model.backbone}, {num_parameters / 1e6:.1f} M parameters, "
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
            best_metric="mIoU",
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
            print(f"best checkpoint, after epoch {epoch}:\n{metric.table()}")
            skipped = report_skipped(train_set, val_set)
            if rank() == 0:
                written = write_results(
                    folder / "results.json", settings.eval, results, {"classes": metric.per_class()}
                )
                suffix = written.stem.removeprefix("results")
                write_curves(folder)
                save_picture(picture(model), folder / "predictions.png")
                with run_report(folder, skipped, suffix=suffix):
                    examples = find_examples(model, inference, metric, val_set, settings.run, device)
                    write_examples(folder, examples, suffix=suffix)


def evaluate_only(command: Command[SegmentationSettings], checkpoint: Path, device: torch.device) -> None:
    """The metric and the pictures of a checkpoint: ours, or any state dict of the same model."""
    settings = command.settings
    val_set = once_per_machine(partial(build_mask_set, settings.data, "val"))
    model = build_segmenter(settings.model, val_set.num_classes, load_weights=False)
    file = find_checkpoint(checkpoint)
    check_class_names(file, val_set.class_names)
    load_weights(model, file)
    place_model(model, settings, device)
    print(f"{file}\nval: {val_set.summary()}", flush=True)
    metric = MeanIoU(val_set.class_names)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)
    inference = build_inference(settings.eval)
    with autocast(settings.run.precision, device):
        results = evaluate(model, val_batches, metric, predict=inference, device=device)
    print(metric.table())
    skipped = report_skipped(val_set)
    if rank() == 0:
        picture = write_evaluation(
            settings, file, "-".join(val_set.folder.parts[-2:]), results, {"classes": metric.per_class()}
        )
        save_picture(draw(model, inference, val_set, settings.run.num_pictures, device), picture)
        folder, suffix = picture.parent, picture.stem.removeprefix("predictions")
        with run_report(folder, skipped, suffix=suffix, evaluated_on=device):
            examples = find_examples(model, inference, metric, val_set, settings.run, device)
            write_examples(folder, examples, suffix=suffix)


def draw(
    model: nn.Module, inference: SegmentationInference, dataset: MaskFolder, num_pictures: int, device: torch.device
) -> NDArray[np.uint8] | None:
    """Ground truth beside prediction for images spread over the data set, as one picture; None where there are none."""
    samples = spread_samples(dataset, num_pictures)
    if not samples:
        return None
    model.eval()
    with torch.inference_mode():
        predictions = [inference(model, images_to_device([image], device))[0] for image, _ in samples.values()]
    images, masks = zip(*samples.values(), strict=True)
    return compare_segmentations(
        images, masks, predictions, dataset.class_names, colours=class_colours(dataset), names=list(samples)
    )


def find_examples(
    model: nn.Module,
    inference: SegmentationInference,
    metric: MeanIoU,
    dataset: MaskFolder,
    settings: RunSettings,
    device: torch.device,
) -> Examples:
    """The images that went worst and best, and what the model sees in them."""
    model.eval()

    def predict(image: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(settings.precision, device):
            return inference(model, images_to_device([image], device))[0]

    return segmentation_examples(
        metric.image_scores, dataset, predict, settings.num_pictures, colours=class_colours(dataset)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
