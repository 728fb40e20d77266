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

import torch
from PIL import Image
from torch import nn

from resnest_det.backbones import load_weights
from resnest_det.build import (
    build_inference,
    build_mask_set,
    build_optimizer,
    build_segmenter,
    check_batch_size,
    class_colours,
)
from resnest_det.config import Command, SegmentationSettings
from resnest_det.data import MaskFolder, eval_loader, train_loader
from resnest_det.distributed import images_to_device, select_device
from resnest_det.engine import check_class_names, fit, load_checkpoint
from resnest_det.evaluation import MeanIoU, SegmentationInference, evaluate
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
from resnest_det.visualize import compare_segmentations

REPOSITORY = Path(__file__).parent


def main(argv: Sequence[str]) -> int:
    """Run the script; 0, or 2 after a mistake of the user's, which is printed."""
    return run_script(
        SegmentationSettings,
        argv,
        prog="train_seg.py",
        description="Train a segmentation model, evaluate it, and draw what it sees.",
        default_config=REPOSITORY / "configs" / "seg" / "sample.toml",
        train=train,
        evaluate_only=evaluate_only,
    )


def train(command: Command[SegmentationSettings]) -> None:
    """Settings, data, model, fit, mIoU."""
    settings = command.settings
    device = select_device(settings.run.device)
    torch.manual_seed(settings.run.seed)

    train_set, val_set = build_mask_set(settings.data, "train"), build_mask_set(settings.data, "val")
    print(f"settings: {command.config_path}\ntrain: {train_set.summary()}\nval: {val_set.summary()}")
    batches = train_loader(
        train_set,
        batch_size=settings.data.batch_size,
        num_workers=settings.data.num_workers,
        seed=settings.run.seed,
        group_by_aspect=False,  # the crops are square
    )
    model = build_segmenter(settings.model, train_set.num_classes, load_weights=not command.resume)
    model.to(device).to(memory_format=memory_format(settings))
    check_batch_size(model, min(settings.data.batch_size, len(train_set)))
    optimizer, scheduler = build_optimizer(settings.optim, model, len(batches))
    metric = MeanIoU(val_set.class_names)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)
    inference = build_inference(settings.eval)
    measure = partial(evaluate, model, val_batches, metric, predict=inference, device=device)

    with run_folder(command, train_set.class_names) as folder:
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{settings.model.segmenter} on {settings.model.backbone}, {num_parameters / 1e6:.1f} M parameters, "
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
            best_metric="mIoU",
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
    draw(model, inference, val_set, folder / "predictions.png", settings, device)


def evaluate_only(command: Command[SegmentationSettings], checkpoint: Path) -> None:
    """The metric and the pictures of a checkpoint: ours, or any state dict of the same model."""
    settings = command.settings
    device = select_device(settings.run.device)
    val_set = build_mask_set(settings.data, "val")
    model = build_segmenter(settings.model, val_set.num_classes, load_weights=False)
    file = find_checkpoint(checkpoint)
    check_class_names(file, val_set.class_names)
    load_weights(model, file)
    model.to(device).to(memory_format=memory_format(settings))
    print(f"{file}\nval: {val_set.summary()}", flush=True)
    metric = MeanIoU(val_set.class_names)
    val_batches = eval_loader(val_set, batch_size=settings.data.eval_batch_size, num_workers=settings.data.num_workers)
    inference = build_inference(settings.eval)
    results = evaluate(model, val_batches, metric, predict=inference, device=device)
    print(metric.table())
    report_skipped(val_set)
    set_name = "-".join(val_set.folder.parts[-2:])
    picture = write_evaluation(settings, file, set_name, results, metric.per_class())
    draw(model, inference, val_set, picture, settings, device)


def draw(
    model: nn.Module,
    inference: SegmentationInference,
    dataset: MaskFolder,
    path: Path,
    settings: SegmentationSettings,
    device: torch.device,
) -> None:
    """Ground truth beside prediction for images spread over the data set, as one picture."""
    samples = spread_samples(dataset, settings.run.num_pictures)
    if not samples:
        return
    model.eval()
    with torch.inference_mode():
        predictions = [inference(model, images_to_device([image], device))[0] for image, _ in samples.values()]
    images, masks = zip(*samples.values(), strict=True)
    sheet = compare_segmentations(
        images, masks, predictions, dataset.class_names, colours=class_colours(dataset), names=list(samples)
    )
    Image.fromarray(sheet).save(path)
    print(f"pictures: {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
