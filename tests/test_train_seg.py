"""train_seg.py end to end, as a user runs it: on a tiny generated set, and with each mistake it must explain."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_seg
from resnest_det.config import SegmentationSettings, load_settings
from resnest_det.data.sample import write_sample_dataset
from resnest_det.engine import load_checkpoint, read_metrics
from tests.reports.pages import read_page
from tests.tiny_configs import REPOSITORY, write_segmentation_config

FOUR = ["mIoU", "mAcc", "aAcc", "fwIoU"]
ONE_EPOCH = ["optim.epochs=1", "optim.warmup_steps=1"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sample"
    write_sample_dataset(folder, num_train=12, num_val=4)
    return folder / "ade20k"


@pytest.fixture
def config(sample: Path, tmp_path: Path) -> Path:
    """A configuration of a few seconds."""
    return write_segmentation_config(tmp_path / "tiny.toml", sample=sample, run=tmp_path / "run")


def explained(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the script prints about a mistake, having exited with 2."""
    assert train_seg.main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


def copied(sample: Path, folder: Path) -> Path:
    return Path(shutil.copytree(sample, folder))


def test_trains_evaluates_draws_and_measures_again(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train_seg.main([str(config)]) == 0
    printed = capsys.readouterr().out
    assert "epoch 3/3" in printed
    assert re.search(r"0 disc +[-0-9.]+", printed)
    assert sorted(file.name for file in run.iterdir()) == [
        "best.pt",
        "config.toml",
        "curves.png",
        "examples",
        "examples.json",
        "last-1.pt",
        "last.pt",
        "metrics.jsonl",
        "predictions.png",
        "provenance.json",
        "report.html",
        "results.json",
    ]
    with Image.open(run / "predictions.png") as picture:
        assert picture.width > 200
    records = read_metrics(run / "metrics.jsonl")
    trained = next(record for record in records if record["kind"] == "train")
    assert trained["loss"] == pytest.approx(trained["loss_seg"] + trained["loss_aux"] + trained["loss_dice"])
    evaluations = [record for record in records if record["kind"] == "eval"]
    assert [record["epoch"] for record in evaluations] == [1, 2, 3]
    assert all(0 <= evaluations[0][name] <= 1 for name in FOUR)
    assert load_settings(SegmentationSettings, run / "config.toml").model.backbone == "resnet18"
    assert load_checkpoint(run / "best.pt")["class_names"][0] == "disc"

    table = printed[printed.index("    mIoU") : printed.index("pictures:")]
    assert train_seg.main(["--eval-only", str(run)]) == 0
    assert table in capsys.readouterr().out
    assert (run / "predictions_best_images-validation.png").exists()
    page = read_page(run / "report.html")
    assert page.tables["All classes"][0] == FOUR
    assert len(page.alternatives) == 6  # two images, each with its ground truth and its prediction
    assert read_page(run / "report_best_images-validation.html").tables == page.tables
    measured = json.loads((run / "results_best_images-validation.json").read_text())
    assert measured["results"] == load_checkpoint(run / "best.pt")["results"]
    assert measured["classes"][0]["name"] == "disc"
    # The same weights looked at in another way are another measurement, beside the first.
    assert train_seg.main(["--eval-only", str(run), "eval.flip=true", "eval.scales=[0.75, 1.0]", "eval.window=48"]) == 0
    other = json.loads((run / "results_best_images-validation-2.json").read_text())
    assert (other["settings"]["flip"], measured["settings"]["flip"]) == (True, False)
    assert other["results"] != measured["results"]
    assert json.loads((run / "results_best_images-validation.json").read_text()) == measured
    assert (run / "predictions_best_images-validation-2.png").exists()
    assert read_page(run / "report_best_images-validation-2.html").tables["All classes"] != page.tables["All classes"]


def test_a_resumed_run_equals_an_unbroken_one(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_seg.main([str(config), "data.num_workers=2"]) == 0
    whole = load_checkpoint(tmp_path / "run" / "last.pt")

    real_evaluate = train_seg.evaluate
    calls = []

    def evaluate_then_die(*arguments: object, **options: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real_evaluate(*arguments, **options)

    monkeypatch.setattr(train_seg, "evaluate", evaluate_then_die)
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train_seg.main([str(config), f"run.dir={broken}"])
    monkeypatch.setattr(train_seg, "evaluate", real_evaluate)
    assert load_checkpoint(broken / "last.pt")["epoch"] == 2
    capsys.readouterr()
    assert train_seg.main(["--resume", str(broken)]) == 0
    assert "resumed after epoch 2 of 3" in capsys.readouterr().out
    resumed = load_checkpoint(broken / "last.pt")
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    assert whole["results"] == resumed["results"]


def test_a_mask_folder(config: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Anyone's folders, with a list of classes, palette masks and an ignored value of their own."""
    folders = tmp_path / "mine"
    (folders / "classes.txt").parent.mkdir()
    (folders / "classes.txt").write_text("thing\nground\n")
    for split in ("training", "validation"):
        shutil.copytree(sample / "images" / split, folders / "images" / split)
        (folders / "masks" / split).mkdir(parents=True)
        for path in sorted((sample / "annotations" / split).iterdir()):
            values = np.asarray(Image.open(path))
            mask = Image.fromarray(np.where(values == 0, 9, np.where(values <= 6, 1, 2)).astype(np.uint8))
            mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
            mask.save(folders / "masks" / split / path.name)
    own = ["data.layout=mask_folder", f"data.root={folders}", "data.first_class_value=1", "data.ignore_value=9"]
    assert train_seg.main([str(config), *own, *ONE_EPOCH]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"0 thing .*\n +1 ground ", printed)
    message = explained(capsys, config, *own[:2], *ONE_EPOCH)
    assert "holds values that are no class: 2" in message
    assert "the 2 classes are 0..1 and 255 is ignored" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone=resnst50", "backbone 'resnst50' is unknown; did you mean 'resnest50'"),
        ("data.root=/nowhere", "/nowhere/classes.txt does not exist"),
        ("data.classes=none.txt", "none.txt does not exist"),
        ("optim.learning_rate=1", "did you mean optim.lr?"),
        ("optim.warmup_steps=1000", "warmup_steps=1000 must be fewer than the run's 9 steps"),
        ("run.device=cuda:99", "device 'cuda:99' is not on this machine"),
        ("model.weights=none.pth", "weights='none.pth' is neither 'imagenet' nor the path of a file"),
        ("model.output_stride=32", "the backbone has stride 32, for which the paper has no ASPP rates"),
        ("model.class_weights=[1, 2]", "class_weights has 2 weights and there are 10 classes"),
        ("eval.max_side=63", "eval.max_side = 63 (command line): must be at least eval.short_side, which is 64"),
    ],
)
def test_mistakes_are_explained_before_training(
    override: str, message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in explained(capsys, config, override)
    assert not (tmp_path / "run").exists()


def test_steps_of_one_image_are_refused_where_attention_needs_several(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = explained(capsys, config, "model.backbone=resnest14", "data.batch_size=1")
    assert "use data.batch_size=2 or more, or model.norm=frozen_bn or gn" in message
    assert not (tmp_path / "run").exists()


def test_other_classes_than_the_checkpoints(
    config: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_seg.main([str(config), *ONE_EPOCH]) == 0
    other = tmp_path / "classes.txt"
    names = [line.split("\t")[-1] for line in (sample / "classes.txt").read_text().splitlines()[1:]]
    other.write_text("\n".join(["moon", *names[1:]]) + "\n")
    message = explained(capsys, "--eval-only", tmp_path / "run", f"data.classes={other}")
    assert "10 and 10 classes, 1 labels differ (0 is 'disc' and 'moon')" in message
    message = explained(capsys, "--resume", tmp_path / "run", f"data.classes={other}")
    assert 'data.classes: the run has "classes.txt", given is' in message
    other.write_text("\n".join(names[:9]) + "\n")
    message = explained(capsys, "--eval-only", tmp_path / "run", f"data.classes={other}")
    assert "10 and 9 classes, 1 labels differ (9 is 'ripples' and None)" in message


def test_a_broken_mask_is_named_or_skipped(
    config: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = copied(sample, tmp_path / "damaged")
    mask = min((data / "annotations" / "training").iterdir())
    mask.write_bytes(mask.read_bytes()[:60])
    short = [*ONE_EPOCH, f"data.root={data}"]
    assert mask.name in explained(capsys, config, *short, "data.num_workers=1")
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()
    with pytest.warns(UserWarning, match=f"skipped: .*{mask.name}"):
        assert train_seg.main([str(config), *short, "data.on_unreadable=skip", f"run.dir={tmp_path / 'skip'}"]) == 0
    assert f"1 of 12 images were unreadable and skipped: {mask.stem}" in capsys.readouterr().out


def test_a_value_beyond_the_classes_stops_with_the_file(
    config: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = copied(sample, tmp_path / "damaged")
    mask = min((data / "annotations" / "training").iterdir())
    Image.fromarray(np.full_like(np.asarray(Image.open(mask)), 77)).save(mask)
    message = explained(capsys, config, *ONE_EPOCH, f"data.root={data}")
    assert mask.name in message
    assert "77" in message


def test_images_without_a_label_train_to_nothing(config: Path, sample: Path, tmp_path: Path) -> None:
    """All masks ignored: losses are 0, weights stay finite, and the metric says that there was nothing to measure."""
    data = copied(sample, tmp_path / "blank")
    for mask in (data / "annotations" / "training").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(mask)))).save(mask)
    assert train_seg.main([str(config), *ONE_EPOCH, f"data.root={data}"]) == 0
    losses = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert losses
    assert set(losses) == {0.0}
    weights = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())


# --- the shipped configurations

CONFIGS = sorted((REPOSITORY / "configs" / "seg").glob("*.toml"))


def test_number_of_configurations() -> None:
    assert len(CONFIGS) == 7


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_builds(path: Path) -> None:
    from resnest_det.build import build_inference, build_optimizer, build_segmenter

    settings = load_settings(SegmentationSettings, path, ["data.root=x", "run.device=cpu"])
    with torch.device("meta"):
        model = build_segmenter(settings.model, 10 if path.stem == "sample" else 150, load_weights=False)
    build_optimizer(settings.optim, model, batches_per_epoch=100, batch_size=2)
    build_inference(settings.eval)
    header = path.read_text().split("\n\n")[0]
    assert all(word in header for word in ("# Command:", "# Data:", "# Duration:", "# Expected:"))
    assert f"configs/seg/{path.name}" in header or path.stem == "sample"


def test_pictures_have_the_colours_of_ade20k_for_its_classes(sample: Path) -> None:
    from resnest_det.build import class_colours
    from resnest_det.data import ADE20K, ADE20K_PALETTE

    assert class_colours(ADE20K(sample, "validation")) == dict(enumerate(ADE20K_PALETTE))
    assert class_colours(ADE20K(sample, "validation", class_names=["a", "b"])) is None


# --- real data, where it is at hand


def test_ade20k_samples(real_data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real photos with 150 classes: the ADE20K recipe, in small, and its figures at the photos' own sizes."""
    arguments = [
        str(REPOSITORY / "configs" / "seg" / "deeplabv3plus_resnet50.toml"),
        f"data.root={real_data('ade20k_samples') / 'ADEChallengeData2016'}",
        f"run.dir={tmp_path / 'run'}",
        *("model.backbone=resnet18", "model.weights=", "model.output_stride=16", "model.aspp_rates=[6, 12, 18]"),
        *("data.batch_size=2", "data.base_size=128", "data.crop_size=96", "data.num_workers=0"),
        *("eval.short_side=128", "optim.epochs=2"),
    ]
    assert train_seg.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "150 classes" in printed
    assert "absent" in printed
    (evaluation,) = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval"]
    assert all(0 <= evaluation[name] <= 1 for name in FOUR)
