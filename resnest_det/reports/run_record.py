"""What a run folder holds, read: its settings, curves and results, and the names of what is missing."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from resnest_det.config import (
    Section,
    SettingsError,
    settings_from_data,
)
from resnest_det.engine import read_metrics
from resnest_det.reports.page import is_picture
from resnest_det.reports.run_shapes import mistake_in

Task = Literal["detection", "segmentation"]

_NOT_RESULTS = ("kind", "epoch", "step", "seconds")  # of a record of evaluation
_KINDS = {"boxes": ("", "classes"), "masks": ("_masks", "mask_classes")}  # their files' suffix, and their table's name


@dataclass(frozen=True)
class Change:
    """A setting that differs from its default, both as TOML; a required setting has no default."""

    key: str
    value: str
    default: str | None


@dataclass(frozen=True)
class Breakdown:
    """What is known of one kind of object, "boxes" or "masks" of a detector, or of a segmentation's classes.

    Attributes:
        classes: each class's results, as results.json has them.
        errors: as errors.json has them.
        confusion: as confusion_matrix.json has it.
        precision_recall: as precision_recall.json has it.
        precision_recall_picture: the same as a picture, where a run has no more than that.
    """

    classes: list[dict[str, Any]]
    errors: dict[str, Any] | None
    confusion: dict[str, Any] | None
    precision_recall: dict[str, Any] | None
    precision_recall_picture: Path | None


@dataclass(frozen=True)
class RunRecord:
    """A run, or one evaluation of it.

    Attributes:
        folder: the run folder.
        suffix: what the names of the evaluation's files have before their ending; of the run's own "", "-2", "-3", ...
        task: "detection" or "segmentation"; None where nothing tells.
        config_text: config.toml, or None.
        settings: every setting by its dotted key, as TOML; empty without a config.toml.
        changes: those that differ from their defaults; None where the settings are none of this version's.
        records: the lines of metrics.jsonl.
        results: numbers by name; empty where nothing was measured.
        measured_epoch: the epochs after which they were measured, where it is known.
        evaluation: the settings with which they were measured.
        breakdowns: by "boxes" and "masks", or by "classes".
        examples: the best and the worst images, as examples.json has them.
        starts: as provenance.json has them, oldest first.
        errors: the tracebacks of a run that failed, by the files that have them, one a process.
        missing: a sentence for everything that is not there and could be.
    """

    folder: Path
    suffix: str
    task: Task | None
    config_text: str | None
    settings: dict[str, str]
    changes: list[Change] | None
    records: list[dict[str, Any]]
    results: dict[str, float]
    measured_epoch: float | None
    evaluation: dict[str, Any]
    breakdowns: dict[str, Breakdown]
    examples: dict[str, Any] | None
    starts: list[dict[str, Any]]
    errors: dict[str, str]
    missing: list[str]

    @property
    def name(self) -> str:
        """What the run is called: the name of its folder."""
        return self.folder.resolve().name

    @property
    def measurement(self) -> int | None:
        """Which of the run's own measurements it is, from 1; None of an evaluation by itself."""
        return _measurement(self.suffix)


def read_run(folder: str | Path, *, suffix: str = "") -> RunRecord:
    """Read a run folder, whatever of it there is; a damaged file counts as missing.

    Args:
        folder: the run folder, or one that --eval-only made.
        suffix: what the names of an evaluation's files have before their ending, such as "_best_instances_val"; "" for
            those of the run itself, of several measurements the newest: that with the highest number, such as "-2".

    Raises:
        FileNotFoundError: there is no such folder, or no such evaluation in it.
        ValueError: it is no run folder.
    """
    folder = Path(folder)
    suffixes = evaluation_suffixes(folder)
    own = [known for known in suffixes if _measurement(known)]
    if suffix not in suffixes and (suffix or not own):
        named = ", ".join(f'"{known}"' + " (the run itself)" * (not known) for known in suffixes)
        raise FileNotFoundError(
            f"{folder} has no results{suffix}.json; give the suffix of an evaluation that is there: {named}"
        )
    newest = max(own, key=lambda known: _measurement(known) or 0, default="")
    suffix = suffix or newest
    missing: list[str] = []
    config_text, settings, changes = _read_settings(folder, missing)
    records = _read_records(folder / "metrics.jsonl", missing)
    if not records:
        missing.append("metrics.jsonl, or any record in it: no learning curves")
    measured = _read_json(folder, "results", suffix, "the results of the best checkpoint", missing) or {}
    results, measured_epoch = measured.get("results", {}), None
    if suffix == newest and own:
        best = _best_evaluation(records)
        measured_epoch = best.get("epoch")
        results = results or {name: number for name, number in best.items() if name not in _NOT_RESULTS}
    task = _task(settings, results)
    return RunRecord(
        folder=folder,
        suffix=suffix,
        task=task,
        config_text=config_text,
        settings=settings,
        changes=changes,
        records=records,
        results=results,
        measured_epoch=measured_epoch,
        evaluation=measured.get("settings", {}),
        breakdowns=_read_breakdowns(folder, suffix, task, measured, missing),
        examples=_read_examples(folder, suffix, missing),
        starts=_read_starts(folder, suffix, missing),
        errors=_read_errors(folder, missing) if suffix == newest and own else {},
        missing=missing,
    )


def evaluation_suffixes(folder: str | Path) -> list[str]:
    """What the names of each evaluation's files in a folder have before their ending; "" first, where it is a run's.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no run folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a run folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}; name the folder that a run was written to, such as runs/sample")
    suffixes = {file.stem.removeprefix("results") for file in folder.glob("results*.json")}
    if any((folder / name).exists() for name in ("config.toml", "metrics.jsonl")):
        suffixes.add("")
    if not suffixes:
        raise ValueError(
            f"{folder} is no run folder: it has neither config.toml nor metrics.jsonl nor results.json; name the "
            f"folder that a run was written to"
        )
    return sorted(suffixes)


def flat_settings(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested tables of settings by their dotted keys, each value as TOML."""
    flat: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = _as_toml(value)
    return flat


def _read_settings(folder: Path, missing: list[str]) -> tuple[str | None, dict[str, str], list[Change] | None]:
    file = folder / "config.toml"
    if not file.exists():
        missing.append("config.toml: no settings")
        return None, {}, None
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        missing.append(f"config.toml cannot be read ({error}): the settings are shown as they are")
        return text, {}, None
    try:
        settings = settings_from_data(content, str(file))
    except SettingsError:
        missing.append("config.toml is of another version: its defaults are not known")
        return text, flat_settings(content), None
    data = settings.model_dump(mode="json", exclude_none=True)
    return text, flat_settings(data), list(_changes(settings, ""))


def _changes(section: Section, prefix: str) -> Iterator[Change]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        default = None if field.is_required() else field.get_default()
        if isinstance(value, Section) and (field.is_required() or default is not None):
            yield from _changes(value, f"{prefix}{name}.")
        elif isinstance(value, Section):  # a table that is absent by default
            for key, item in flat_settings(value.model_dump(mode="json", exclude_none=True)).items():
                yield Change(f"{prefix}{name}.{key}", item, None)
        elif field.is_required() or value != default:
            yield Change(f"{prefix}{name}", _as_toml(value), None if default is None else _as_toml(default))


def _best_evaluation(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The record whose first result is the highest, the first of equal ones; {} where there is none."""
    evaluations = [record for record in records if record["kind"] == "eval" and record.keys() - set(_NOT_RESULTS)]
    name = next((name for record in evaluations for name in record if name not in _NOT_RESULTS), "")
    return max(evaluations, key=lambda record: record.get(name, -1), default={})


def _task(settings: Mapping[str, str], results: Mapping[str, float]) -> Task | None:
    if "model.detector" in settings or "AP" in results:
        return "detection"
    return "segmentation" if "model.segmenter" in settings or "mIoU" in results else None


def _read_breakdowns(
    folder: Path, suffix: str, task: Task | None, measured: Mapping[str, Any], missing: list[str]
) -> dict[str, Breakdown]:
    if task != "detection":
        return {"classes": Breakdown(measured.get("classes", []), None, None, None, None)}
    breakdowns = {}
    for kind, (of_kind, table) in _KINDS.items():
        if kind == "masks" and table not in measured:
            continue
        files = f"{of_kind}{suffix}"
        picture = folder / f"precision_recall{files}.png"
        curves = None
        if (folder / f"precision_recall{files}.json").exists() or not is_picture(picture):
            curves = _read_json(folder, "precision_recall", files, f"precision by recall of {kind}", missing)
        breakdowns[kind] = Breakdown(
            classes=measured.get(table, []),
            errors=_read_json(folder, "errors", files, f"kinds of errors of {kind}", missing),
            confusion=_read_json(folder, "confusion_matrix", files, f"the confusion of {kind}", missing),
            precision_recall=curves,
            precision_recall_picture=picture if curves is None and is_picture(picture) else None,
        )
    return breakdowns


def _read_starts(folder: Path, suffix: str, missing: list[str]) -> list[dict[str, Any]]:
    """The starts of an evaluation by itself, else those of the run."""
    own = suffix if (folder / f"provenance{suffix}.json").exists() else ""
    starts = _read_json(folder, "provenance", own, "command, versions, device and times", missing) or []
    whole = []
    for number, start in enumerate(starts, start=1):
        if mistake := mistake_in("start", start):
            missing.append(f"provenance{own}.json: start {number} cannot be read ({mistake})")
        else:
            whole.append(start)
    return whole


def _read_examples(folder: Path, suffix: str, missing: list[str]) -> dict[str, Any] | None:
    """The best and the worst images, with those of their pictures that can be read."""
    examples: dict[str, Any] | None = _read_json(folder, "examples", suffix, "the best and the worst images", missing)
    for example in [*examples["worst"], *examples["best"]] if examples else ():
        for title, file in list(example["pictures"].items()):
            if not is_picture(folder / file):
                missing.append(f"{file}, or a picture in it")
                del example["pictures"][title]
    return examples


def _read_errors(folder: Path, missing: list[str]) -> dict[str, str]:
    """The tracebacks of each process that left one, the first process's first."""
    numbers = {}
    for file in folder.glob("error*.txt"):
        if named := re.fullmatch(r"error(?:-(\d+))?\.txt", file.name):
            numbers[int(named[1] or 0)] = file
    errors = {}
    for _, file in sorted(numbers.items()):
        try:
            errors[file.name] = file.read_text(encoding="utf-8", errors="replace").strip() or "no traceback was written"
        except OSError as error:
            missing.append(f"{file.name} cannot be read ({error}): why the run failed")
    return errors


def _read_records(file: Path, missing: list[str]) -> list[dict[str, Any]]:
    try:
        records: list[Any] = read_metrics(file)
    except (OSError, ValueError) as error:
        missing.append(f"{file.name} cannot be read ({error})")
        return []
    whole = [record for record in records if isinstance(record, dict) and _is_record(record)]
    if len(whole) < len(records):
        missing.append(f"{file.name}: {len(records) - len(whole)} of its lines are no records")
    return whole


def _is_record(record: Mapping[str, Any]) -> bool:
    numbers = [record.get(name) for name in ("epoch", "step", *(["lr"] if record.get("kind") == "train" else []))]
    return isinstance(record.get("kind"), str) and all(isinstance(number, int | float) for number in numbers)


def _measurement(suffix: str) -> int | None:
    """Which of a run's own measurements a suffix is of, from 1; None where it is of an evaluation by itself."""
    if not suffix:
        return 1
    return int(suffix[1:]) if re.fullmatch(r"-[0-9]+", suffix) else None


def _read_json(folder: Path, kind: str, suffix: str, what: str, missing: list[str]) -> Any:
    """The content of KIND{suffix}.json; None, with a sentence in `missing`, of one that is not there or damaged."""
    file = folder / f"{kind}{suffix}.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"{file.name}: {what}")
        return None
    except (OSError, ValueError) as error:
        missing.append(f"{file.name} cannot be read ({error}): {what}")
        return None
    if mistake := mistake_in(kind, content):
        missing.append(f"{file.name} cannot be read ({mistake}): {what}")
        return None
    return content


def _as_toml(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_toml, value))}]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")
