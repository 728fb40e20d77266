"""What a run folder holds, read: its settings, curves and results, and the names of what is missing."""

from __future__ import annotations

import json
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
        suffix: what the names of the evaluation's files have before their ending, "" of the run's own.
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
        error: the traceback of a run that failed, or None.
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
    error: str | None
    missing: list[str]

    @property
    def name(self) -> str:
        """What the run is called: the name of its folder."""
        return self.folder.resolve().name


def read_run(folder: str | Path, *, suffix: str = "") -> RunRecord:
    """Read a run folder, whatever of it there is; a damaged file counts as missing.

    Args:
        folder: the run folder, or one that --eval-only made.
        suffix: what the names of an evaluation's files have before their ending, such as "_best_instances_val"; "" for
            those of the run itself.

    Raises:
        FileNotFoundError: there is no such folder, or no such evaluation in it.
        ValueError: it is no run folder.
    """
    folder = Path(folder)
    if suffix not in evaluation_suffixes(folder):
        raise FileNotFoundError(
            f"{folder} has no results{suffix}.json; its evaluations are {evaluation_suffixes(folder)}"
        )
    missing: list[str] = []
    config_text, settings, changes = _read_settings(folder, missing)
    records = read_metrics(folder / "metrics.jsonl")
    if not records:
        missing.append("metrics.jsonl, or any record in it: no learning curves")
    measured = _read_json(folder / f"results{suffix}.json", "the results of the best checkpoint", missing) or {}
    results, measured_epoch = measured.get("results", {}), None
    if not suffix:
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
        examples=_read_json(folder / f"examples{suffix}.json", "the best and the worst images", missing),
        starts=_read_starts(folder, suffix, missing),
        error=(folder / "error.txt").read_text() if (folder / "error.txt").exists() and not suffix else None,
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
        if (folder / f"precision_recall{files}.json").exists() or not picture.exists():
            curves = _read_json(folder / f"precision_recall{files}.json", f"precision by recall of {kind}", missing)
        breakdowns[kind] = Breakdown(
            classes=measured.get(table, []),
            errors=_read_json(folder / f"errors{files}.json", f"kinds of errors of {kind}", missing),
            confusion=_read_json(folder / f"confusion_matrix{files}.json", f"the confusion of {kind}", missing),
            precision_recall=curves,
            precision_recall_picture=picture if picture.exists() and curves is None else None,
        )
    return breakdowns


def _read_starts(folder: Path, suffix: str, missing: list[str]) -> list[dict[str, Any]]:
    """The starts of an evaluation by itself, else those of the run."""
    own = folder / f"provenance{suffix}.json"
    file = own if own.exists() else folder / "provenance.json"
    return _read_json(file, "command, versions, device and times", missing) or []


def _read_json(file: Path, what: str, missing: list[str]) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        missing.append(f"{file.name}: {what}")
    except (OSError, ValueError) as error:
        missing.append(f"{file.name} cannot be read ({error}): {what}")
    return None


def _as_toml(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_toml, value))}]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")
