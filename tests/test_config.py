"""Settings: what a file and overrides become, and the message for every mistake."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError

from resnest_det.config import (
    KEYS_FREE_ON_RESUME,
    CocoDataSettings,
    Command,
    DetectionSettings,
    SampleSettings,
    Section,
    SegmentationSettings,
    SettingsError,
    SplitSettings,
    ineffective_settings,
    load_settings,
    parse_command_line,
    settings_as_data,
    settings_from_data,
    settings_table,
    write_settings,
)
from tests import settings_tables

DOCS = Path(__file__).parents[1] / "docs" / "config.md"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text('[data]\nroot = "coco"\n[optim]\nlr = 0.01\n')
    return path


@pytest.fixture
def run_folder(config: Path, tmp_path: Path) -> Path:
    """A run of `config` whose folder was moved after the run, as its config.toml does not know."""
    folder = tmp_path / "moved" / "first"
    folder.mkdir(parents=True)
    write_settings(load_settings(DetectionSettings, config, ["run.dir=runs/first"]), folder / "config.toml")
    return folder


@pytest.fixture
def parse(config: Path) -> Callable[..., Command[DetectionSettings]]:
    def parse_arguments(*arguments: object) -> Command[DetectionSettings]:
        return parse_command_line(
            DetectionSettings,
            [str(argument) for argument in arguments],
            prog="train_det.py",
            description="Train a detector.",
            default_config=config,
        )

    return parse_arguments


def load(path: Path, *overrides: str) -> DetectionSettings:
    return load_settings(DetectionSettings, path, overrides)


def mistakes(path: Path, *overrides: str) -> list[str]:
    """The lines of the error's message, without the heading."""
    with pytest.raises(SettingsError) as caught:
        load(path, *overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    """`model` and every settings model below it."""
    found = {model}
    for field in model.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= models(kind)
    return found


# Reading


def test_file_and_defaults(config: Path) -> None:
    settings = load(config)
    assert settings.optim.lr == 0.01
    assert settings.optim.epochs == 12
    assert settings.data.train.annotations == "annotations/instances_train2017.json"
    assert settings.data.val.images == "val2017"
    assert settings.data.short_sides == (640, 672, 704, 736, 768, 800)
    assert settings.data.sample is None


def test_split_given_in_part_keeps_its_own_defaults(config: Path) -> None:
    settings = load(config, "data.train.images=a", "data.val.images=b")
    assert settings.data.train.annotations == "annotations/instances_train2017.json"
    assert settings.data.val.annotations == "annotations/instances_val2017.json"


def test_run_folder_is_named_after_the_file(config: Path) -> None:
    assert load(config).run.dir == "runs/tiny"
    assert load(config, "run.dir=elsewhere").run.dir == "elsewhere"


def test_settings_are_frozen(config: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(config).optim.lr = 1.0


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("data.root=../coco", "data", "root", "../coco"),
        ('data.root="../my coco"', "data", "root", "../my coco"),
        ("data.root=../my coco", "data", "root", "../my coco"),
        ("data.root=a=b", "data", "root", "a=b"),
        ("run.dir=2024", "run", "dir", "2024"),
        ("run.dir=2024-01-02", "run", "dir", "2024-01-02"),
        ("run.dir=true", "run", "dir", "true"),
        ("model.weights=", "model", "weights", ""),
        ("model.weights=1\nlr = 2", "model", "weights", "1\nlr = 2"),
        ("data.short_sides=[640, 672]", "data", "short_sides", (640, 672)),
        ("model.aspect_ratios=[1, 2.5]", "model", "aspect_ratios", (1.0, 2.5)),
        ("optim.lr=1e-3", "optim", "lr", 0.001),
        ("optim.lr=1", "optim", "lr", 1.0),
        (" optim.epochs = 3 ", "optim", "epochs", 3),
        ("data.keep_empty=false", "data", "keep_empty", False),
        ("optim.optimizer=adamw", "optim", "optimizer", "adamw"),
        ("data.sample.num_train=4", "data", "sample", SampleSettings(num_train=4)),
        ("data.sample={seed = 3}", "data", "sample", SampleSettings(seed=3)),
    ],
)
def test_override(config: Path, override: str, section: str, name: str, value: object) -> None:
    read = getattr(getattr(load(config, override), section), name)
    assert read == value
    assert type(read) is type(value)


def test_last_override_of_a_key_wins(config: Path) -> None:
    assert load(config, "optim.lr=1.0", "optim.lr=2.0").optim.lr == 2.0


# Mistakes


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lr=0", "optim.lr = 0 (command line): must be a finite float > 0"),
        ("optim.lr=inf", "optim.lr = inf (command line): must be a finite float > 0"),
        ("optim.lr=nan", "optim.lr = nan (command line): must be a finite float > 0"),
        ("optim.lr=fast", 'optim.lr = "fast" (command line): must be a finite float > 0'),
        ("optim.lr={start = 1}", "optim.lr = {start = 1} (command line): must be a finite float > 0"),
        ("optim.lr=true", "optim.lr = true (command line): must be a finite float > 0"),
        ("optim.momentum=1", "optim.momentum = 1 (command line): must be a finite float >= 0, < 1"),
        ("optim.gamma=0.0", "optim.gamma = 0.0 (command line): must be a finite float > 0, <= 1"),
        ("optim.epochs=1.5", "optim.epochs = 1.5 (command line): must be an integer >= 1"),
        ("optim.epochs=3.0", "optim.epochs = 3.0 (command line): must be an integer >= 1"),
        ("optim.epochs=true", "optim.epochs = true (command line): must be an integer >= 1"),
        ("run.seed=-1", "run.seed = -1 (command line): must be an integer >= 0"),
        ("model.trainable_stages=6", "model.trainable_stages = 6 (command line): must be an integer >= 0, <= 5"),
        ("data.keep_empty=yes", 'data.keep_empty = "yes" (command line): must be a boolean, true or false'),
        ("data.keep_empty=1", "data.keep_empty = 1 (command line): must be a boolean, true or false"),
        ("data.hflip=1.1", "data.hflip = 1.1 (command line): must be a finite float >= 0, <= 1"),
        (
            "model.norm=BN",
            'model.norm = "BN" (command line): must be one of bn, frozen_bn, sync_bn, gn; did you mean bn?',
        ),
        (
            "model.detector=mask-rcnn",
            'model.detector = "mask-rcnn" (command line): must be one of faster_rcnn, mask_rcnn, cascade_rcnn, '
            "cascade_mask_rcnn, retinanet, fcos; did you mean mask_rcnn?",
        ),
        ("data.sample=true", "data.sample = true (command line): must be a table"),
        ("data.train=images", 'data.train = "images" (command line): must be a table'),
        (
            "data.short_sides=640",
            "data.short_sides = 640 (command line): must be a list of integers: 1 or more, each >= 32",
        ),
        (
            "data.short_sides=[]",
            "data.short_sides = [] (command line): must be a list of integers: 1 or more, each >= 32",
        ),
        (
            "data.short_sides=[31, 640.0]",
            "data.short_sides = [31, 640.0] (command line): must be a list of integers: 1 or more, each >= 32",
        ),
        (
            "model.anchor_sizes=[32, 64]",
            "model.anchor_sizes = [32, 64] (command line): must be a list of integers: exactly 5, each >= 1",
        ),
        (
            "model.aspect_ratios=[0]",
            "model.aspect_ratios = [0] (command line): must be a list of finite floats: 1 or more, each > 0",
        ),
        (
            "optim.milestones=[0.9, 0.5]",
            "optim.milestones = [0.9, 0.5] (command line): must increase: each number is larger than the one before it",
        ),
        (
            "optim.milestones=[0.5, 1.0]",
            "optim.milestones = [0.5, 1.0] (command line): must be a list of finite floats: 0 or more, each > 0, < 1",
        ),
        (
            "data.max_side=799",
            "data.max_side = 799 (command line): must be at least the largest of data.short_sides, which is 800",
        ),
        (
            "data.short_sides=[2000, 700]",
            "data.max_side = 1333 (default): must be at least the largest of data.short_sides, which is 2000",
        ),
        ("model.min_size=1400", "model.max_size = 1333 (default): must be at least model.min_size, which is 1400"),
        ("model.rpn_convolutions=0", "model.rpn_convolutions = 0 (command line): must be an integer >= 1"),
        (
            "model.center_sampling_radius=0",
            "model.center_sampling_radius = 0 (command line): must be a finite float > 0",
        ),
        (
            "model.pyramid_top=p6",
            'model.pyramid_top = "p6" (command line): must be one of p5, c5; did you mean p5?',
        ),
        (
            "eval.max_detections=[100, 10, 1]",
            "eval.max_detections = [100, 10, 1] (command line): must increase: each number is larger than the one "
            "before it",
        ),
        (
            "eval.max_detections=[0]",
            "eval.max_detections = [0] (command line): must be a list of integers: 1 or more, each >= 1",
        ),
        (
            "eval.area_ranges=[1024, 1024]",
            "eval.area_ranges = [1024, 1024] (command line): must increase: each number is larger than the one "
            "before it",
        ),
        (
            "eval.backend=hot_coco",
            'eval.backend = "hot_coco" (command line): must be one of pycocotools, hotcoco; did you mean hotcoco?',
        ),
        ("eval.tile_overlap=1", "eval.tile_overlap = 1 (command line): must be a finite float >= 0, < 1"),
        (
            "eval={short_sides = [640, 800], max_side = 799}",
            "eval.max_side = 799 (command line): must be at least the largest of eval.short_sides, which is 800, or 0",
        ),
        (
            "eval.area_ranges=[1, 1e10]",
            "eval.area_ranges = [1, 10000000000.0] (command line): must be a list of finite floats: exactly 2, "
            "each > 0, < 1e+10",
        ),
        (
            "eval.short_sides=[16]",
            "eval.short_sides = [16] (command line): must be a list of integers: 0 or more, each >= 32",
        ),
        (
            "data.root=",
            'data.root = "" (command line): the data set\'s folder is required: give data.root=FOLDER, '
            "or a table [data.sample]",
        ),
    ],
)
def test_mistaken_value(config: Path, override: str, sentence: str) -> None:
    assert mistakes(config, override) == [sentence]


def test_nesterov_needs_momentum(config: Path) -> None:
    assert mistakes(config, "optim.nesterov=true", "optim.momentum=0") == [
        "optim.nesterov = true (command line): needs optim.momentum > 0, which is 0: "
        "give a momentum, or optim.nesterov=false"
    ]


def test_masks_are_not_fused(config: Path) -> None:
    fused = ["eval.merge=wbf", "eval.flip=true"]
    assert mistakes(config, "model.detector=mask_rcnn", *fused) == [
        'eval = {merge = "wbf", flip = true} (command line): wbf fuses boxes, and model.detector=mask_rcnn has masks: '
        "use eval.merge=nms"
    ]
    assert load(config, "model.detector=cascade_rcnn", *fused).eval.merge == "wbf"
    assert load(config, "model.detector=mask_rcnn", "eval.merge=wbf").eval.merge == "wbf"  # of one pass, so not merged


def test_long_value_is_shortened(config: Path) -> None:
    (sentence,) = mistakes(config, f"optim.epochs={'x' * 1000}")
    assert sentence == f'optim.epochs = "{"x" * 76}... (command line): must be an integer >= 1'


@pytest.mark.parametrize(
    ("mistaken", "meant"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("lr", "optim.lr"),
        ("model.lr", "optim.lr"),
        ("optimizer.lr", "optim.lr"),
        ("optim.wd", "optim.weight_decay"),
        ("data.batchsize", "data.batch_size"),
        ("modle.backbone", "model.backbone"),
        ("model.epochs", "optim.epochs"),
        ("data.sampel", "data.sample"),
        ("data.sample.num_trian", "data.sample.num_train"),
        ("data.sample.x", "data.sample.seed"),
    ],
)
def test_unknown_key_names_the_nearest(config: Path, tmp_path: Path, mistaken: str, meant: str) -> None:
    assert mistakes(config, f"{mistaken}=1") == [f"{mistaken} (command line) is not a setting; did you mean {meant}?"]
    path = tmp_path / "mistaken.toml"
    path.write_text(f'data.root = "coco"\n{mistaken} = 1\n')
    assert f"{mistaken} ({path}) is not a setting; did you mean {meant}?" in mistakes(path)


def test_unknown_table_is_reported_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "mistaken.toml"
    path.write_text('data.root = "coco"\n"optim.lr" = 1\n[solver]\nlr = 0.1\nepochs = 2\n[extra]\n')
    assert mistakes(path) == [
        f'"optim.lr" ({path}) is not a setting; did you mean optim.lr?',
        f"solver.lr ({path}) is not a setting; did you mean optim.lr?",
        f"solver.epochs ({path}) is not a setting; did you mean optim.epochs?",
        f"extra ({path}) is not a setting; did you mean data.train?",
    ]


def test_all_mistakes_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "mistaken.toml"
    path.write_text("optim = 3\n[data]\nhflip = 2\nbatch = 4\n[model]\nbackbone = 50\n")
    with pytest.raises(SettingsError) as caught:
        load(path, "lr", "=3", "optim.lr=1", "eval.every=0", "run.sede=1")
    assert str(caught.value).splitlines() == [
        f"9 mistakes in the settings of {path} and the overrides:",
        "  'lr' is not an override: write key=value, such as optim.lr=...; the name of a config file ends in .toml",
        "  '=3' is not an override: write key=value, such as run=...; the name of a config file ends in .toml",
        "  run.sede (command line) is not a setting; did you mean run.seed?",
        '  data.root = "" (default): the data set\'s folder is required: give data.root=FOLDER, '
        "or a table [data.sample]",
        f"  data.hflip = 2 ({path}): must be a finite float >= 0, <= 1",
        f"  data.batch ({path}) is not a setting; did you mean data.batch_size?",
        f"  model.backbone = 50 ({path}): must be a string",
        f"  optim = 3 ({path}): must be a table",
        "  eval.every = 0 (command line): must be an integer >= 1",
    ]


def test_an_empty_file_lacks_a_data_set(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    with pytest.raises(
        SettingsError, match=r"^1 mistake in the settings of \S+empty.toml:\n  data.root = \"\" \(default\)"
    ):
        load(path)
    assert load(path, "data.sample={}").data.sample == SampleSettings()


def test_required_field_without_default() -> None:
    with pytest.raises(ValidationError, match="annotations"):
        SplitSettings(images="a")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlr 0.1\n", "line 2, column 4: Expected '=' after a key in a key/value pair\n  lr 0.1"),
        ("[optim]\nlr = 0.1\nlr = 0.2\n", "line 3, column 9: Cannot overwrite a value\n  lr = 0.2"),
        ("a = [1,\n  2", "line 2, column 4: Unclosed array (at end of document)\n    2"),
    ],
)
def test_toml_syntax_error_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(path)
    assert str(caught.value) == f"{path}, {message}"


def test_missing_file_names_the_files_there_are(tmp_path: Path) -> None:
    for name in ("alpha.toml", "resnest50_1x.toml", "resnet50_3x.toml", "note.txt"):
        (tmp_path / name).touch()
    with pytest.raises(SettingsError) as caught:
        load(tmp_path / "resnest50_2x.toml")
    assert str(caught.value) == (
        f"there is no config file {tmp_path}/resnest50_2x.toml; "
        f"{tmp_path} has resnest50_1x.toml, resnet50_3x.toml, alpha.toml"
    )


def test_missing_file_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"no config file {tmp_path}/a.toml; {tmp_path} has no .toml file$"):
        load(tmp_path / "a.toml")
    with pytest.raises(
        SettingsError, match=f"no config file {tmp_path}/b/a.toml; there is no folder {tmp_path}/b either$"
    ):
        load(tmp_path / "b" / "a.toml")


def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b'[data]\nroot = "\xe9"\n')
    with pytest.raises(SettingsError, match=r"latin\.toml cannot be read as UTF-8 text: .*0xe9"):
        load(path)
    with pytest.raises(SettingsError, match=f"config file {tmp_path} cannot be read as UTF-8 text: .*directory"):
        load(tmp_path)


# Files based on others


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_is_laid_over_its_bases(tmp_path: Path) -> None:
    write(
        tmp_path / "first.toml",
        'data = { root = "coco", batch_size = 16, short_sides = [640, 800], train = { images = "a" } }\n'
        "[optim]\nlr = 0.1\nepochs = 36\n",
    )
    write(tmp_path / "below" / "second.toml", 'base = "../first.toml"\n[optim]\nlr = 0.2\nmomentum = 0.8\n')
    third = write(
        tmp_path / "third.toml",
        'base = "below/second.toml"\n[data]\nshort_sides = [64]\ntrain.annotations = "b"\n[optim]\nmomentum = 0.7\n',
    )
    settings = load(third, "data.batch_size=8")
    assert (settings.optim.epochs, settings.optim.lr, settings.optim.momentum) == (36, 0.2, 0.7)
    assert (settings.data.root, settings.data.batch_size, settings.data.short_sides) == ("coco", 8, (64,))
    assert (settings.data.train.images, settings.data.train.annotations) == ("a", "b")
    assert settings.optim.weight_decay == 1e-4  # which no file gives
    assert settings.run.dir == "runs/third"


def test_written_settings_have_no_base(tmp_path: Path, config: Path) -> None:
    settings = load(write(tmp_path / "below" / "more.toml", f'base = "{config}"\n[optim]\nepochs = 2\n'))
    write_settings(settings, tmp_path / "config.toml")
    assert "base" not in tomllib.loads((tmp_path / "config.toml").read_text())
    assert load(tmp_path / "config.toml") == settings


def test_mistakes_name_the_file_that_they_stand_in(tmp_path: Path) -> None:
    base = write(
        tmp_path / "base.toml",
        '[data]\nroot = "coco"\nhflip = 2\nvflip = 2\nbatch = 1\n[solver]\n"optim.lr" = 1\n[optim]\nlr = 1\n',
    )
    path = write(
        tmp_path / "mine.toml",
        'base = "base.toml"\noptim = 3\n[data]\nvflip = 3\nbase = "a.toml"\n[model]\nbackbone = 50\n[solver]\nlr = 1\n',
    )
    assert mistakes(path, "eval.every=0", "base=a.toml") == [
        "base (command line) is not a setting; a base is named in a config file, above its first table",
        f"data.hflip = 2 ({base}): must be a finite float >= 0, <= 1",
        f"data.vflip = 3 ({path}): must be a finite float >= 0, <= 1",
        f"data.batch ({base}) is not a setting; did you mean data.batch_size?",
        f"data.base ({path}) is not a setting; a base is named in a config file, above its first table",
        f"model.backbone = 50 ({path}): must be a string",
        f"optim = 3 ({path}): must be a table",
        "eval.every = 0 (command line): must be an integer >= 1",
        f'solver."optim.lr" ({base}) is not a setting; did you mean optim.lr?',
        f"solver.lr ({path}) is not a setting; did you mean optim.lr?",
    ]


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "tricks.toml", "")
    path = write(tmp_path / "below" / "mine.toml", 'base = "../trick.toml"\n')
    with pytest.raises(SettingsError) as caught:
        load(path)
    folder = tmp_path / "below" / ".."
    assert str(caught.value) == (
        f"there is no config file {folder}/trick.toml, the base of {path}; {folder} has tricks.toml"
    )


def test_a_file_that_is_its_own_base(tmp_path: Path) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    write(first, 'base = "second.toml"\n')
    write(second, 'base = "first.toml"\n')
    with pytest.raises(SettingsError) as caught:
        load(first)
    assert str(caught.value) == (
        f"a config file is its own base, {first} → {second} → {first}: leave one of these bases out"
    )


@pytest.mark.parametrize("value", ["3", '""', '"tricks"', '["a.toml", "b.toml"]'])
def test_a_base_is_one_config_file(tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "mine.toml", f"base = {value}\n")
    with pytest.raises(SettingsError) as caught:
        load(path)
    assert str(caught.value) == (
        f"base = {value} ({path}): must be the name of a config file, relative to this one, that ends in .toml"
    )


# Writing


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.sample.num_train=4", "optim.lr=1e-7", "optim.milestones=[]", "run.dir=a b", "model.norm=gn"],
        ['data.root="quote \\" back\\\\slash \\n line, é"', "data.short_sides=[64]", "data.keep_empty=false"],
    ],
)
def test_written_settings_read_back_equal(config: Path, tmp_path: Path, overrides: list[str]) -> None:
    settings = load(config, *overrides)
    write_settings(settings, tmp_path / "config.toml")
    assert load(tmp_path / "config.toml") == settings


def test_written_settings_carry_every_description(config: Path, tmp_path: Path) -> None:
    write_settings(load(config, "data.sample={}"), tmp_path / "config.toml")
    lines = (tmp_path / "config.toml").read_text().splitlines()
    position = lines.index("lr = 0.01")
    assert lines[position - 1] == "# Learning rate after the warm-up."
    assert lines[lines.index("[data.sample]") - 1].startswith("# Train on the generated data set")
    for previous, line in itertools.pairwise(lines):
        assert previous.startswith("# ") or line.startswith("# ") or not line, line


def test_interrupted_write_leaves_the_old_file(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    path.write_text("old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_settings(load(config), path)
    assert path.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.toml", "tiny.toml"]


# The command line


def test_without_arguments_the_default_config_is_read(parse: Callable[..., Command], config: Path) -> None:
    assert parse() == Command(load(config), config, None, None)


@pytest.mark.parametrize("config_place", [0, 1, 2])
def test_arguments_come_in_any_order(parse: Callable[..., Command], tmp_path: Path, config_place: int) -> None:
    other = tmp_path / "other=1.toml"
    other.write_text('data.root = "other"\n')
    arguments: list[object] = ["optim.lr=0.5", "data.train.annotations=x.toml"]
    arguments.insert(config_place, other)
    command = parse(*arguments)
    assert command.config_path == other
    assert command.settings == load(other, "optim.lr=0.5", "data.train.annotations=x.toml")


def test_print_config_prints_toml_that_reads_back(
    parse: Callable[..., Command], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("optim.lr=0.5", "--print-config", "run.seed=3")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert tomllib.loads(printed)["optim"]["lr"] == 0.5
    (tmp_path / "printed.toml").write_text(printed)
    assert load(tmp_path / "printed.toml") == load(config, "optim.lr=0.5", "run.seed=3")


def test_help_shows_the_flags(parse: Callable[..., Command], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("-h")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for text in ("train_det.py", "Train a detector.", "--print-config", "--resume", "--eval-only", "KEY=VALUE"):
        assert text in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resum", "x"], r"unrecognized arguments: --resum \(see train_det.py -h\)"),
        (["--resume"], r"argument --resume: expected one argument \(see train_det.py -h\)"),
        (["a.toml", "b.toml"], "2 config files are given, a.toml, b.toml; name one at most"),
        (["--resume", "a", "--eval-only", "b"], "--resume and --eval-only are both given; .*: keep one of them"),
        (["lr", "optim.lr=-1"], r"'lr' is not an override: (.|\n)*optim.lr = -1 \(command line\)"),
    ],
)
def test_mistaken_command_line_is_raised(
    parse: Callable[..., Command], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(*arguments)
    assert capsys.readouterr() == ("", "")


# Resuming


def test_resume_needs_nothing_else(parse: Callable[..., Command], config: Path, run_folder: Path) -> None:
    command = parse("--resume", run_folder)
    assert command == Command(load(config, f"run.dir={run_folder}"), run_folder / "config.toml", run_folder, None)


def test_resume_with_the_same_config_and_free_keys(
    parse: Callable[..., Command], config: Path, run_folder: Path
) -> None:
    free = ["run.device=cpu", "data.num_workers=0", "data.root=/moved/coco", "run.checkpoint_steps=7"]
    free += ["run.checkpoint_minutes=0.5", "run.keep_last=3", "run.logger=a:b", "run.num_pictures=1"]
    free += ["run.tensorboard=true", "run.parallel=fsdp"]
    assert {override.partition("=")[0] for override in free} == KEYS_FREE_ON_RESUME
    for arguments in (free, [config, *free], ["optim.lr=0.01", *free, f"run.dir={run_folder}"]):
        command = parse("--resume", run_folder, *arguments)
        assert command.settings == load(config, *free, f"run.dir={run_folder}")
        assert command.config_path == (config if config in arguments else run_folder / "config.toml")


def test_resume_with_other_settings_lists_them(parse: Callable[..., Command], run_folder: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        parse("optim.lr=0.5", "--resume", run_folder, "data.sample.num_train=4", "run.dir=b", "data.num_workers=0")
    heading, *lines = str(caught.value).splitlines()
    assert heading == (
        f"resume with other settings: {run_folder} was begun with others than those given. Leave them out, or start "
        f"a new run; only data.num_workers, data.root, run.checkpoint_minutes, run.checkpoint_steps, run.device, "
        f"run.keep_last, run.logger, run.num_pictures, run.parallel, run.tensorboard may change:"
    )
    assert lines == [
        f'  run.dir: the run has "{run_folder}", given is "b"',
        "  optim.lr: the run has 0.01, given is 0.5",
        "  data.sample.num_train: the run has none, given is 4",
        "  data.sample.num_val: the run has none, given is 60",
        "  data.sample.seed: the run has none, given is 0",
    ]


def test_resume_with_another_config_file(parse: Callable[..., Command], tmp_path: Path, run_folder: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('data.root = "elsewhere"\noptim.epochs = 3\n')
    with pytest.raises(SettingsError) as caught:
        parse(other, "--resume", run_folder)
    assert str(caught.value).splitlines()[1:] == [
        "  optim.lr: the run has 0.01, given is 0.02",
        "  optim.epochs: the run has 12, given is 3",
    ]


@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_run_that_does_not_exist(parse: Callable[..., Command], config: Path, run_folder: Path, flag: str) -> None:
    for name in ("frist", "zebra"):
        (run_folder.parent / name).mkdir()
    (run_folder.parent / "note.txt").touch()
    with pytest.raises(SettingsError) as caught:
        parse(flag, run_folder.parent / "firts", config)
    parent = run_folder.parent
    assert str(caught.value) == f"{flag} {parent}/firts does not exist; {parent} has first, frist, zebra"
    with pytest.raises(SettingsError, match=f"{flag} {parent}/no/a does not exist; there is no folder {parent}/no"):
        parse(flag, parent / "no" / "a")
    with pytest.raises(SettingsError, match=f"a does not exist; {parent}/zebra has no run and no checkpoint"):
        parse(flag, parent / "zebra" / "a")


@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_folder_without_config(parse: Callable[..., Command], tmp_path: Path, flag: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(flag, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: there is no {tmp_path}/config.toml, where a run writes its settings; "
        f"with --eval-only, name the config file that it was trained with"
    )


def test_resume_of_a_checkpoint_names_its_folder(parse: Callable[..., Command], run_folder: Path) -> None:
    (run_folder / "last.pt").touch()
    with pytest.raises(SettingsError, match=f"last.pt is a file; name its run folder, {run_folder}"):
        parse("--resume", run_folder / "last.pt")


# Evaluation only


@pytest.mark.parametrize("name", ["", "best.pt"])
def test_eval_only_reads_the_run(parse: Callable[..., Command], config: Path, run_folder: Path, name: str) -> None:
    (run_folder / "best.pt").touch()
    command = parse("--eval-only", run_folder / name, "data.val.annotations=mine.json", "optim.lr=3")
    assert command == Command(
        load(config, "data.val.annotations=mine.json", "optim.lr=3", f"run.dir={run_folder}"),
        run_folder / "config.toml",
        None,
        run_folder / name,
    )
    assert parse("--eval-only", run_folder, "run.dir=mine").settings.run.dir == "mine"


def test_eval_only_with_a_config_file(parse: Callable[..., Command], tmp_path: Path, run_folder: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('data.root = "elsewhere"\n')
    checkpoint = tmp_path / "downloaded.pt"
    checkpoint.touch()
    for evaluated in (checkpoint, run_folder):
        assert parse(other, "--eval-only", evaluated) == Command(load(other), other, None, evaluated)


# Settings without effect


@pytest.mark.parametrize(
    ("overrides", "sentences"),
    [
        ([], []),
        (["optim.optimizer=adamw", "optim.schedule=cosine", "optim.warmup_steps=0"], []),
        (
            ["optim.optimizer=adamw", "optim.momentum=0.8", "optim.nesterov=true"],
            [
                "optim.momentum has no effect with optim.optimizer=adamw",
                "optim.nesterov has no effect with optim.optimizer=adamw",
            ],
        ),
        (
            ["optim.schedule=cosine", "optim.milestones=[0.5]", "optim.gamma=0.5", "optim.final_lr_factor=0.1"],
            [
                "optim.milestones has no effect with optim.schedule=cosine",
                "optim.gamma has no effect with optim.schedule=cosine",
            ],
        ),
        (["optim.final_lr_factor=0.1"], ["optim.final_lr_factor has no effect with optim.schedule=multistep"]),
        (
            ["optim.warmup_steps=0", "optim.warmup_factor=0.1"],
            ["optim.warmup_factor has no effect with optim.warmup_steps=0"],
        ),
        (["model.box_head_norm=gn"], ["model.box_head_norm has no effect with model.box_head=2fc"]),
        (["model.box_head_norm=gn", "model.box_head=4conv1fc"], []),
        (
            ["model.detector=retinanet", "model.box_head=4conv1fc", "model.box_head_norm=gn", "model.head_norm=gn"],
            [
                "model.box_head has no effect with model.detector=retinanet",
                "model.box_head_norm has no effect with model.detector=retinanet",
            ],
        ),
        (["model.head_norm=gn"], ["model.head_norm has no effect with model.detector=faster_rcnn"]),
        (
            ["model.norm=gn", "model.box_head_norm=bn", "eval.precise_bn=5"],
            [
                "eval.precise_bn has no effect with norms without running statistics",
                "model.box_head_norm has no effect with model.box_head=2fc",
            ],
        ),
        (["model.norm=gn", "model.detector=mask_rcnn", "model.mask_head_norm=bn", "eval.precise_bn=5"], []),
        (["model.norm=gn", "model.detector=retinanet", "model.head_norm=sync_bn", "eval.precise_bn=5"], []),
        (
            ["model.norm=gn", "model.detector=fcos", "model.head_norm=sync_bn", "eval.precise_bn=5"],
            [
                "eval.precise_bn has no effect with norms without running statistics",
                "model.head_norm has no effect with model.detector=fcos",
            ],
        ),
        (
            ["eval.merge=wbf", "eval.merge_threshold=0.6"],
            [
                "eval.merge has no effect with one pass: eval.flip=false and fewer than two eval.short_sides",
                "eval.merge_threshold has no effect with one pass: eval.flip=false and fewer than two eval.short_sides",
            ],
        ),
        (["eval.merge=wbf", "eval.merge_threshold=0.6", "eval.flip=true"], []),
        (["eval.flip=true", "eval.tile_overlap=0.5"], ["eval.tile_overlap has no effect with eval.tile=0"]),
        (["eval.max_side=900"], ["eval.max_side has no effect with eval.short_sides=[]"]),
        (["eval.max_side=900", "eval.short_sides=[640]"], []),
        (["eval.tile=512", "eval.tile_overlap=0.5", "eval.whole_image=true", "eval.tile_match=iou"], []),
        (
            ["data.sample={}", "data.val.images=mine"],
            ["data.root has no effect with data.sample", "data.val.images has no effect with data.sample"],
        ),
        (["data.sample={}", "data.root="], []),
    ],
)
def test_ineffective_settings(config: Path, overrides: list[str], sentences: list[str]) -> None:
    assert ineffective_settings(load(config, *overrides)) == sentences


# The models and their table


@pytest.mark.parametrize("root", [DetectionSettings, SegmentationSettings])
def test_every_field_has_a_description(root: type[BaseModel]) -> None:
    found = models(root)
    assert len(found) == 9
    for model in found:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert field.description.endswith("."), f"{model.__name__}.{name}"


def test_settings_table_rows() -> None:
    rows = settings_table(DetectionSettings).splitlines()
    assert rows[0] == "| key | type | default | range | description |"
    assert "| `optim.lr` | float | `0.02` | > 0 | Learning rate after the warm-up. |" in rows
    assert "| `data.sample` | table | absent |  | " in "\n".join(rows)
    assert (
        "| `model.anchor_sizes` | list of integers | `[32, 64, 128, 256, 512]` | exactly 5, each >= 1 |"
        in "\n".join(rows)
    )
    assert settings_table(SplitSettings).count("| required |") == 2


@pytest.mark.parametrize("root", [DetectionSettings, SegmentationSettings])
def test_settings_table_covers_every_setting(root: type[Section]) -> None:
    sections = [model for model in models(root) if model is not root]
    # The two splits are rows by their settings only; data.sample, which may be absent, has a row of its own.
    expected = sum(len(model.model_fields) for model in sections) - len(["data.train", "data.val"])
    assert settings_table(root).count("\n| `") == expected


def test_documented_tables_are_the_models() -> None:
    page = DOCS.read_text()
    assert settings_tables.renewed(page) == page, "python -m tests.settings_tables renews them"


def test_documented_files_are_valid(tmp_path: Path) -> None:
    presets = DOCS.parents[1] / "configs" / "det" / "presets"
    shutil.copytree(presets, tmp_path / "configs" / "det" / "presets")
    blocks = re.findall(r"^```toml\n# (\S+)\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    example, longer, mine = (write(tmp_path / name, text) for name, text in blocks)
    assert load(example).data.root == "../coco"
    assert load(longer) == load(example, "optim.epochs=36", "run.dir=runs/longer")
    assert load(mine, "data.root=x").model.box_head == "4conv1fc"


def test_documented_mistakes_are_the_real_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("configs/det/example.toml")
    path.parent.mkdir(parents=True)
    path.write_text('data.root = "coco"\noptim.epochs = 0\n')
    with pytest.raises(SettingsError) as caught:
        load(path, "optim.learning_rate=0.1", "data.keep_empty=yes")
    assert f"```text\n{caught.value}\n```" in DOCS.read_text()


SEGMENTATION = 'data.root = "ade"\n'


def load_segmentation(tmp_path: Path, *overrides: str) -> SegmentationSettings:
    path = tmp_path / "tiny.toml"
    path.write_text(SEGMENTATION)
    return load_settings(SegmentationSettings, path, overrides)


def test_segmentation_has_defaults_of_its_own(tmp_path: Path) -> None:
    settings = load_segmentation(tmp_path)
    assert (settings.optim.lr, settings.optim.head_lr_factor, settings.optim.schedule) == (0.01, 10.0, "poly")
    assert (settings.data.layout, settings.data.ignore_value, settings.model.output_stride) == ("ade20k", 255, 16)
    assert (settings.eval.scales, settings.eval.every) == ((1.0,), 1)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.root=", 'data.root = "" (command line): the data set\'s folder is required'),
        ("data.layout=mask_folder", 'data.classes = ""*: a mask folder needs the list of its classes'),
        ("data.layout=ade", "must be one of ade20k, mask_folder; did you mean ade20k?"),
        ("data.scale=[2.0, 0.5]", "the first must not be above the second"),
        ("data.scale=[1.0]", "data.scale = [1.0] (command line): must be a list of finite floats: exactly 2, each > 0"),
        ("data.crop_size=0", "data.crop_size = 0 (command line): must be an integer >= 1"),
        ("model.output_stride=4", "model.output_stride = 4 (command line): must be one of 8, 16, 32"),
        ("model.class_weights=[1, -1]", "model.class_weights"),
        ("model.head_norm=frozen_bn", "must be one of bn, sync_bn, gn"),
        ("eval.scales=[]", "eval.scales = [] (command line): must be a list of finite floats: 1 or more, each > 0"),
        (
            "eval.max_side=500",
            "eval.max_side = 500 (command line): must be at least eval.short_side, which is 520, or 0",
        ),
        ("eval={window=64, window_stride=65}", "window_stride = 65*must be at most eval.window, which is 64"),
        (
            "run={channels_last=true, parallel='fsdp'}",
            "fsdp does not go with run.channels_last=true: use run.channels_last=f",
        ),
        ("run={compile=true, parallel='fsdp'}", "fsdp does not go with run.compile=true: use run.compile=false, or"),
        ("optim.poly_power=0", "optim.poly_power = 0 (command line): must be a finite float > 0"),
    ],
)
def test_mistakes_of_segmentation_settings(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_segmentation(tmp_path, override)
    assert re.search(".*".join(map(re.escape, sentence.split("*"))), str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("overrides", "sentences"),
    [
        ([], []),
        (["model.ohem_min_kept=5"], ["model.ohem_min_kept has no effect with model.ohem_threshold=0"]),
        (["eval.window_stride=5"], ["eval.window_stride has no effect with eval.window=0"]),
        (
            ["model.ohem_threshold=0.7", "data.crop_size=96"],
            ["model.ohem_threshold has no effect with model.ohem_min_kept=100000, all 9216 pixels of a crop and more"],
        ),
        (["model.ohem_threshold=0.7"], []),
        (["data.ignore_value=0"], ["data.ignore_value has no effect with data.layout=ade20k"]),
        (["data.layout=mask_folder", "data.classes=c.txt", "data.ignore_value=0", "data.train.masks=m"], []),
        (
            ["data.sample={}", "data.val.masks=m"],
            ["data.root has no effect with data.sample", "data.val.masks has no effect with data.sample"],
        ),
        (
            ["optim.poly_power=2", "optim.schedule=cosine"],
            ["optim.poly_power has no effect with optim.schedule=cosine"],
        ),
        (["optim.final_lr_factor=0.1"], []),
    ],
)
def test_ineffective_segmentation_settings(tmp_path: Path, overrides: list[str], sentences: list[str]) -> None:
    assert ineffective_settings(load_segmentation(tmp_path, *overrides)) == sentences


def test_settings_can_be_made_in_python() -> None:
    settings = DetectionSettings(data=CocoDataSettings(sample=SampleSettings(num_train=4)))
    assert settings.data.sample == SampleSettings(num_train=4, num_val=60, seed=0)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        CocoDataSettings(root="coco", batchsize=3)  # type: ignore[call-arg]


def test_the_flag_for_determinism_is_a_setting(parse: Callable[..., Command], config: Path) -> None:
    assert parse(config, "--deterministic").settings == load(config, "run.deterministic=true")
    assert parse(config, "--profile") == Command(load(config), config, None, None, profile=True)
    with pytest.raises(SettingsError, match="--profile traces training, and --eval-only does not train"):
        parse(config, "--profile", "--eval-only", config.parent)


def test_the_flag_for_fine_tuning_is_a_setting(parse: Callable[..., Command], config: Path) -> None:
    checkpoint = config.with_name("coco.pt")
    checkpoint.touch()
    for source in (checkpoint, config.parent, "https://example.org/coco.pt"):
        assert parse(config, "--init", source).settings == load(config, f"model.init={source}")
    with pytest.raises(SettingsError, match="--init begins training from a checkpoint, and --eval-only does not train"):
        parse(config, "--init", checkpoint, "--eval-only", config.parent)
    with pytest.raises(SettingsError, match=r"--init .*/cocoa.pt does not exist; .* has coco.pt"):
        parse(config, "--init", config.with_name("cocoa.pt"))


@pytest.mark.parametrize("value", ["[0.5]", "[2.0, 0.1]"])
def test_scale_jitter_is_two_rising_factors(value: str, config: Path) -> None:
    with pytest.raises(SettingsError, match=r"data.scale_jitter = .*must be two factors, the smaller one first"):
        load(config, f"data.scale_jitter={value}")


def test_config_by_name(parse: Callable[..., Command], config: Path) -> None:
    other = config.with_name("other.toml")
    other.write_text('[data]\nroot = "elsewhere"\n')
    command = parse("other", "optim.lr=0.5")
    assert command.config_path == other
    assert (command.settings.data.root, command.settings.optim.lr) == ("elsewhere", 0.5)
    assert command.settings.run.dir == "runs/other"
    assert parse(f"{config.parent.name}/other").config_path == other
    with pytest.raises(SettingsError, match="there is no shipped experiment 'othr'; did you mean other"):
        parse("othr")


@pytest.mark.parametrize("cls", [DetectionSettings, SegmentationSettings])
def test_settings_as_data(cls: type[DetectionSettings | SegmentationSettings], config: Path) -> None:
    """They survive a checkpoint, which holds plain data only."""
    settings = load_settings(cls, config, ["optim.epochs=7"])
    file = io.BytesIO()
    torch.save(settings_as_data(settings), file)
    file.seek(0)
    assert settings_from_data(torch.load(file, weights_only=True), "last.pt") == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "the settings in last.pt name neither a model.detector nor a model.segmenter"),
        (
            {"eval": {"evry": 1}},
            r"the settings in last.pt do not fit this version:\n  eval.evry \(last.pt\) .* mean eval.every",
        ),
        ({"optim": {"epochs": 0}}, r"optim.epochs = 0 \(last.pt\): must be"),
    ],
)
def test_mistaken_settings_in_data(config: Path, change: dict[str, Any], message: str) -> None:
    content = settings_as_data(load_settings(DetectionSettings, config)) | change
    with pytest.raises(SettingsError, match=message):
        settings_from_data(content, "last.pt")


def test_of_the_other_script(parse: Callable[..., Command], config: Path, run_folder: Path) -> None:
    other = config.with_name("seg.toml")
    other.write_text('[model]\nsegmenter = "deeplabv3plus"\n')
    with pytest.raises(SettingsError, match=r"seg.toml has a model.segmenter: it is an experiment of train_seg.py"):
        parse(other)
    other.write_text('[model]\ndetector = "fcos"\n')
    with pytest.raises(SettingsError, match=r"seg.toml has a model.detector: it is an experiment of train_det.py"):
        load_settings(SegmentationSettings, other)
    with pytest.raises(SettingsError, match=f"{run_folder} is a run folder: put --resume or --eval-only before it"):
        parse(run_folder)
    with pytest.raises(SettingsError, match=f"{config.parent} is a folder, not an experiment; .* data.root="):
        parse(config.parent)
