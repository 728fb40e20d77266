"""The blocks of a page of the documentation, and their commands run as a new user would, only smaller.

A `Sandbox` is a new user's folder. In it, /data and whatever photo, run folder or file of weights a page speaks of are
stand-ins made of the generated data set, and a training command gets settings that make it last seconds. Everything
else of a command is run as it stands on the page.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

import train_det
import train_seg
from resnest_det import cli, create_backbone
from resnest_det.build import build_detector
from resnest_det.config import DetectionSettings, parse_command_line
from resnest_det.data.sample import write_sample_dataset
from tests.tiny_configs import REPOSITORY

_FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])-(?![\w-])|(?<!\w)nan(?!\w)|-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")

# What makes a run short. A test of seconds changes the sizes of things, never what is done.
_SHORT_RUN = [
    "run.device=cpu", "run.num_pictures=1", "data.num_workers=0", "optim.epochs=1", "optim.warmup_steps=1",
    "eval.precise_bn=0",
]  # fmt: skip
_RESUMABLE = "run.checkpoint_steps=1"  # else a run so short has no checkpoint but that of its end
_SHORT_TRAINING = {
    "train-det": [
        *_SHORT_RUN, "data.short_sides=[64]", "data.max_side=96", "data.batch_size=4", "data.eval_batch_size=4",
        "data.crop_size=64", "model.anchor_sizes=[8, 16, 32, 64, 128]", "model.min_size=64", "model.max_size=96",
        "model.rpn_proposals_train=50", "model.rpn_proposals_eval=20", "model.roi_batch_size=16",
        "model.score_threshold=0.0", "eval.every=1",
    ],
    "train-seg": [
        *_SHORT_RUN, "data.batch_size=4", "data.eval_batch_size=2", "data.base_size=64", "data.crop_size=64",
        "eval.short_side=64",
    ],
}  # fmt: skip
_SMALL_MODEL = {
    "train-det": [
        "model.backbone=resnest14", "model.weights=", "model.fpn_channels=16", "model.box_head_channels=16",
        "model.mask_head_channels=16",
    ],
    "train-seg": ["model.backbone=resnet18", "model.weights=", "model.head_channels=16"],
}  # fmt: skip
_SMALL_SAMPLE = ["data.sample.num_train=12", "data.sample.num_val=4"]
_SCRIPTS = {"train_det.py": "train-det", "train_seg.py": "train-seg"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: what its fence says it is, its text, and the line that it begins on."""

    kind: str
    text: str
    line: int


@dataclass(frozen=True)
class Result:
    """What a command ended with, and what it printed, stdout and stderr together."""

    status: int
    printed: str


def read_blocks(page: str) -> list[Block]:
    """Every fenced block of a page, in order.

    Raises:
        AssertionError: a fence is not closed, or one is not understood.
    """
    blocks = [
        Block(found[2], textwrap.dedent(found[3]), page.count("\n", 0, found.start()) + 1)
        for found in _FENCE.finditer(page)
    ]
    assert len(re.findall(r"^ *```", page, re.MULTILINE)) == 2 * len(blocks), "a fence is not closed"
    return blocks


def read_commands(text: str) -> list[str]:
    """The commands of a block, one each: a line that ends in a backslash goes on in the next, comments are left out."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def read_console(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a block of kind `console`, which stand behind "$ ", and the lines shown under each."""
    shown: list[tuple[str, list[str]]] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.startswith("$ "):
            shown.append((line.removeprefix("$ "), []))
        else:
            shown[-1][1].append(line)
    return shown


def shapes(printed: str) -> set[str]:
    """The lines of what was printed, without what differs from run to run.

    That is numbers, or the dashes in their places, and spaces; and of an epoch's line, the remark on loading that it
    may end in.
    """
    lines = {_shape(line) for line in printed.splitlines()}
    return lines | {line.removesuffix(" #% of the time waiting for data") for line in lines}


def line_pattern(shown: str) -> re.Pattern[str]:
    """What finds a line that a page shows among `shapes`; its "..." stands for any text."""
    return re.compile(re.escape(_shape(shown)).replace(re.escape("..."), ".*"))


def _shape(line: str) -> str:
    return re.sub(r"\s+", " ", _NUMBER.sub("#", line)).strip()


@dataclass(frozen=True)
class StandIns:
    """What stands in for a user's data and weights; made once, and only read.

    `data` stands for /data. Its sets are the generated one in other clothes; those of cells have classes of their own.
    """

    folder: Path

    @property
    def data(self) -> Path:
        """What stands for /data."""
        return self.folder / "data"

    def make(self) -> StandIns:
        """Write the data."""
        sample = self.folder / "sample"
        write_sample_dataset(sample, num_train=12, num_val=4)
        names = {"train": "train2017", "val": "val2017"}
        for name in ("coco", "cells", "mine"):
            for split, usual in names.items():
                _link(sample / split, self.data / name / usual)
                _link(sample / "annotations" / f"instances_{split}.json", self._annotations(name, usual))
        _rename_classes(self.data / "cells" / "annotations")
        mine, bccd = self.data / "mine", self.data / "bccd"
        for split, masks in (("train", "training"), ("val", "validation")):
            _link(sample / split, mine / split)
            _link(sample / "annotations" / f"instances_{split}.json", mine / "annotations" / f"{split}.json")
            _link(sample / "ade20k" / "images" / masks, mine / "images" / split)
            _index_masks(sample / "ade20k" / "annotations" / masks, mine / "masks" / split)
            for image in (sample / split).iterdir():
                _link(image, bccd / "JPEGImages" / image.name)
            annotations = sample / "annotations" / f"instances_{split}.json"
            for name in (split, "test") if split == "val" else (split,):
                _link(annotations, bccd / "annotations_coco" / f"instances_{name}.json")
        table = (sample / "ade20k" / "classes.txt").read_text().splitlines()
        (mine / "classes.txt").write_text("\n".join(line.split("\t")[-1] for line in table[1:]) + "\n")
        for part in ("images", "annotations"):
            _link(sample / "ade20k" / part, self.data / "ADEChallengeData2016" / part)
        return self

    def _annotations(self, name: str, usual: str) -> Path:
        return self.data / name / "annotations" / f"instances_{usual}.json"

    @cache  # noqa: B019  # lives as long as the tests
    def run(self, task: str) -> Path:
        """A finished run: "train-det", or "train-seg"."""
        root, config = {
            "train-det": ("coco", "configs/det/faster_rcnn_resnest50_1x.toml"),
            "train-seg": ("ADEChallengeData2016", "configs/seg/deeplabv3plus_resnest50.toml"),
        }[task]
        folder = self.folder / task
        words = [str(REPOSITORY / config), f"data.root={self.data / root}", f"run.dir={folder}"]
        done = in_process(lambda: _main(task)([*words, *_SMALL_MODEL[task], *_SHORT_TRAINING[task], _RESUMABLE]))
        assert done.status == 0, done.printed
        return folder

    @cache  # noqa: B019
    def demo(self, recipe: str) -> Result:
        """The commands of `make demo`, run in a folder of their own."""
        folder = self.folder / "demo"
        folder.mkdir()
        commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
        sandbox = Sandbox(folder, self)
        with chdir(folder):
            results = [sandbox.run(command) for command in commands]
        return Result(max(done.status for done in results), "".join(done.printed for done in results))

    @cache  # noqa: B019
    def weights(self, backbone: str) -> Path:
        """A file of random weights of a network."""
        path = self.folder / f"{backbone}.pth"
        torch.save(create_backbone(backbone).state_dict(), path)
        return path


class Sandbox:
    """A new user's folder: a clone's configurations, photos, and what a page's commands leave there.

    Args:
        folder: an empty folder; commands run in it.
        stand_ins: the data and weights.
        resumes: whether runs are going to be resumed: then they leave what can be.
        site: the folder of an unpacked wheel, for the folder of a user without a clone: `resnest-det` is that wheel's.
    """

    def __init__(self, folder: Path, stand_ins: StandIns, *, resumes: bool = False, site: Path | None = None) -> None:
        self.folder, self.resumes, self.site = folder, resumes, site
        self._stand_ins = stand_ins
        photos = sorted((stand_ins.data / "coco" / "val2017").iterdir())
        shutil.copy(photos[0], folder / "photo.jpg")
        shutil.copytree(stand_ins.data / "coco" / "val2017", folder / "photos")
        _write_video(folder / "clip.mp4", photos[:2])
        if site is None:
            shutil.copytree(REPOSITORY / "configs", folder / "configs")

    def rewritten(self, text: str) -> str:
        """A text in which /data is the stand-ins' folder."""
        return re.sub(r"(?<![\w./])/data(?=/)", str(self._stand_ins.data), text)

    def has(self, path: str) -> bool:
        """Whether a text is the path of a file or folder that is there."""
        return "/" in path and (self.folder / self.rewritten(path)).exists()

    def run(self, command: str, *, mistaken: bool = False) -> Result:
        """Run a command of a page.

        Args:
            command: as it stands there.
            mistaken: the page shows the error it ends in: what it says is left as it is, and only the rest made short.
        """
        words = shlex.split(self.rewritten(command), comments=True)
        output = None
        if ">" in words:
            *words, _, output = words
        program = words[0].removeprefix(".venv/bin/")
        if program not in _PROGRAMS:
            raise AssertionError(f"{command}: how to run {program} is not known")
        done = _PROGRAMS[program](self, words[1:], mistaken)
        printed = done.printed.replace(str(self._stand_ins.data), "/data").replace(str(self.folder), ".")
        if output:
            (self.folder / output).write_text(printed)
        return Result(done.status, printed)

    def _command(self, words: list[str], mistaken: bool) -> Result:
        """`resnest-det`."""
        if words[0] in _SCRIPTS.values():
            words = self._shortened(words[0], words[1:], mistaken)
        else:
            words = words if mistaken else self._supplied(words)
        if self.site:
            command = [sys.executable, "-m", "resnest_det", *words]
            return _program(command, self.folder, PYTHONPATH=str(self.site))
        return in_process(lambda: cli.main(words))

    def _python(self, words: list[str], mistaken: bool) -> Result:
        """`python`: a script of the repository, a module, or a line of code."""
        if words[0] in _SCRIPTS:
            assert not self.site, f"{words[0]} is a clone's"
            task = _SCRIPTS[words[0]]
            _, *words = self._shortened(task, words[1:], mistaken)
            return in_process(lambda: _main(task)(words))
        if words[:2] == ["-m", "resnest_det"]:
            return self._command(words[2:], mistaken)
        if words[:2] == ["-m", "venv"]:
            words.insert(2, "--without-pip")  # which takes most of the time
        return _program([sys.executable, *words], self.folder, PYTHONPATH=str(REPOSITORY))

    def _torchrun(self, words: list[str], mistaken: bool) -> Result:
        """`torchrun`: two processes, however many are asked for."""
        (place,) = [place for place, word in enumerate(words) if word in _SCRIPTS]
        launcher = " ".join(words[:place])
        assert re.fullmatch(r"--nproc-per-node[ =]\d+", launcher), launcher
        _, *rest = self._shortened(_SCRIPTS[words[place]], words[place + 1 :], mistaken)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        return _program([*launch, str(REPOSITORY / words[place]), *rest, "data.batch_size=2"], self.folder)

    def _make(self, words: list[str], mistaken: bool) -> Result:
        """`make`: the recipe of the demo; the other targets must be there, and check or install this very code."""
        (target,) = words
        recipe = re.search(rf"^{target}:.*\n((?:\t.+\n)*)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert recipe, f"the Makefile has no target {target}"
        if target != "demo":
            return Result(0, "")
        done = self._stand_ins.demo(recipe[1])
        _copy_runs(self._stand_ins.folder / "demo" / "runs", self.folder / "runs")
        return done

    def _pip(self, words: list[str], mistaken: bool) -> Result:
        """`pip install`: would change the environment of the tests. tests/test_wheel.py tries what is installed."""
        install, *requirements = words
        assert install == "install"
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        for requirement in requirements:
            form = re.fullmatch(r"(?:\.|resnest-det|(?:.*/)?resnest_det-[\w.*-]+\.whl)(?:\[([\w,-]+)\])?", requirement)
            assert form, f"{requirement} is neither this package nor its wheel"
            assert {*(form[1] or "").split(",")} - {""} <= project["optional-dependencies"].keys(), requirement
        return Result(0, "")

    def _tensorboard(self, words: list[str], mistaken: bool) -> Result:
        """`tensorboard` serves until it is stopped."""
        assert words[0] == "--logdir"
        assert list((self.folder / words[1]).rglob("events.out.tfevents*")), f"nothing to show in {words[1]}"
        return Result(0, "")

    def _shortened(self, task: str, words: list[str], mistaken: bool) -> list[str]:
        """A training command with what makes it short, and stand-ins for the runs and weights that it names."""
        words = self._supplied(words, task)
        if {"-h", "--print-config"} & {*words}:
            return [task, *words]
        if "--resume" in words:
            _interrupt(self.folder / words[words.index("--resume") + 1])
            return [task, *words]
        if "--eval-only" in words:
            given = {word.partition("=")[0] for word in words}
            smaller = {"eval.short_sides": "[64, 80]", "eval.tile": "64", "eval.window": "64"}
            return [task, *words, *(f"{key}={value}" for key, value in smaller.items() if key in given)]
        if mistaken:
            return [task, *_SHORT_TRAINING[task], *_SMALL_MODEL[task], *words]
        config = next((word for word in words if "=" not in word and not word.startswith("-")), "sample")
        model = _SMALL_SAMPLE if Path(config).stem.startswith("sample") else _SMALL_MODEL[task]
        words += [*model, *_SHORT_TRAINING[task], *([_RESUMABLE] if self.resumes else [])]
        if "--init" in words and "://" in words[(place := words.index("--init")) + 1]:
            words[place + 1] = self._published_detector(words[:place] + words[place + 2 :])
        return [task, *words]

    def _published_detector(self, words: list[str]) -> str:
        """A file of the detector that the words describe, of random weights, with COCO's number of classes."""
        default = REPOSITORY / "configs" / "det" / "sample.toml"
        command = parse_command_line(DetectionSettings, words, prog="", description="", default_config=default)
        path = self.folder / "published.pth"
        torch.save(build_detector(command.settings.model, 91, load_weights=False).state_dict(), path)
        return str(path)

    def _supplied(self, words: list[str], task: str = "") -> list[str]:
        """The words, once the run folders that they name are there, with files for published weights, on the CPU."""
        words = list(words)
        for place, word in enumerate(words):
            before = words[place - 1]
            if re.match(r"runs/\w", word) and not (self.folder / word).exists():
                run = self.folder.joinpath(*Path(word).parts[:2])
                finished = self._stand_ins.run(task or ("train-seg" if "seg" in word else "train-det"))
                _copy_runs(finished, run)
            elif before == "--weights" and not (self.folder / word).exists():
                words[place] = str(self._stand_ins.weights(words[words.index("--backbone") + 1]))
            elif before == "--device":
                words[place] = "cpu"
        return words


_PROGRAMS: dict[str, Callable[[Sandbox, list[str], bool], Result]] = {
    "resnest-det": Sandbox._command,
    "python": Sandbox._python,
    "python3": Sandbox._python,
    "torchrun": Sandbox._torchrun,
    "make": Sandbox._make,
    "pip": Sandbox._pip,
    "tensorboard": Sandbox._tensorboard,
}


def in_process(call: Callable[[], int]) -> Result:
    """A call of a program's main function, as if it were a program: to import torch again takes seconds."""
    stream = io.StringIO()
    with redirect_stdout(stream), redirect_stderr(stream), _printed_warnings():
        try:
            status = call()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return Result(status, stream.getvalue())


@contextmanager
def _printed_warnings() -> Iterator[None]:
    """Warnings to stderr, as outside pytest, which collects them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_where: print(f"warning: {message}", file=sys.stderr)
        yield


def _program(command: Sequence[str], folder: Path, **variables: str) -> Result:
    """A program in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return Result(done.returncode, done.stdout)


def _main(task: str) -> Callable[[Sequence[str]], int]:
    return train_det.main if task == "train-det" else train_seg.main


def _interrupt(run: Path) -> None:
    """Make a finished run one that broke off before its end."""
    (run / "last.pt").unlink()
    shutil.copy(run / "last-1.pt", run / "last.pt")


def _copy_runs(source: Path, folder: Path) -> None:
    """Copy run folders; their checkpoints, which are replaced and never written into, are linked."""

    def copy(file: str, to: str) -> None:
        (os.link if file.endswith(".pt") else shutil.copy)(file, to)

    shutil.copytree(source, folder, copy_function=copy)


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def _rename_classes(annotations: Path) -> None:
    """Give a set's files other class names, the files that were links becoming files of their own."""
    for file in annotations.iterdir():
        content = json.loads(file.read_text())
        for category in content["categories"]:
            category["name"] += " cell"
        file.unlink()
        file.write_text(json.dumps(content))


def _index_masks(masks: Path, folder: Path) -> None:
    """ADE20K's masks, 0 other and classes from 1, as those of a mask folder: classes from 0, and 255 ignored."""
    folder.mkdir(parents=True)
    for file in masks.iterdir():
        Image.fromarray(np.asarray(Image.open(file)) - np.uint8(1)).save(folder / file.name)


def _write_video(path: Path, photos: Sequence[Path]) -> None:
    """A video of a few frames."""
    frames = [cv2.resize(cv2.imread(str(photo)), (96, 64)) for photo in photos]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5, (96, 64))
    for frame in frames * 2:
        writer.write(frame)
    writer.release()
