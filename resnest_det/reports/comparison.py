"""Runs side by side: their results, settings, classes, kinds of errors and learning curves.

Runs that differ in their seeds, and besides only in where they ran, are one experiment, of which the mean and the
spread are given.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnest_det.config import KEYS_FREE_ON_RESUME
from resnest_det.reports.page import write_page
from resnest_det.reports.run_record import RunRecord, read_run
from resnest_det.reports.run_report import Chart, epoch_chart
from resnest_det.visualize import Curve, loss_curves, result_curves

_OF_EACH_RUN = ("run.seed", "run.dir")
_OF_ONE_EXPERIMENT = KEYS_FREE_ON_RESUME.union(_OF_EACH_RUN)  # what may differ among its runs
_SHOWN_RESULTS = 6  # in the terminal, of boxes, of masks and of a segmentation
_LONGEST_VALUE = 32  # characters of a setting in the terminal


@dataclass(frozen=True)
class Spread:
    """A number over the runs of an experiment: their mean, and the sample's standard deviation, None of one run."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Experiment:
    """One or more runs of the same settings and the same git commit, each of another seed.

    Attributes:
        name: the first run's, the shortest that tells it from the others.
        runs: at least one.
        results: numbers by name, of those that all of its runs have.
        classes: by "boxes" and "masks", or "classes": AP or IoU by the class's name; -1 with nothing to measure.
        errors: by "boxes" and "masks": what each kind of error costs, by its name.
    """

    name: str
    runs: list[RunRecord]
    results: dict[str, Spread]
    classes: dict[str, dict[str, Spread]]
    errors: dict[str, dict[str, Spread]]

    @property
    def title(self) -> str:
        """The name, and how many runs there are if there are several."""
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"


@dataclass(frozen=True)
class Comparison:
    """Experiments beside the first of them.

    Attributes:
        experiments: two or more, or one of several runs.
        settings: the settings that differ, by key: each experiment's, as TOML, None where it has none.
        notes: a sentence for everything that cannot be compared, or only with care.
        same_data: whether all were measured on the same images; differences are given only then.
    """

    experiments: list[Experiment]
    settings: dict[str, list[str | None]]
    notes: list[str]
    same_data: bool

    def change(self, spread: Spread | None, first: Spread | None) -> float | None:
        """The difference to the first experiment, None where there is none to give."""
        if not self.same_data or spread is None or first is None or -1 in (spread.mean, first.mean):
            return None
        return spread.mean - first.mean

    def table(self) -> str:
        """All but the curves as aligned text."""
        blocks = [*(f"note: {sentence}" for sentence in self.notes)]
        for title, names in _result_groups(self.experiments):
            shown = names[:_SHOWN_RESULTS]
            blocks.append(self._result_table(title, shown))
        if self.settings:
            blocks.append(self._settings_table())
        kinds = dict.fromkeys(kind for experiment in self.experiments for kind in experiment.classes)
        for kind in kinds:
            what = "IoU" if kind == "classes" else f"AP of {kind}"
            blocks.append(self._row_table(f"{what} by class", [one.classes.get(kind, {}) for one in self.experiments]))
        for kind in dict.fromkeys(kind for experiment in self.experiments for kind in experiment.errors):
            title = f"rise in AP without an error, {kind}"
            blocks.append(self._row_table(title, [one.errors.get(kind, {}) for one in self.experiments]))
        return "\n\n".join(block for block in blocks if block)

    def _result_table(self, title: str, names: Sequence[str]) -> str:
        """An experiment a row, its difference below it."""
        first = self.experiments[0]
        labels = [experiment.title for experiment in self.experiments]
        width = max(len(label) for label in [title, *labels, "  difference"])
        lines = [f"{title:<{width}}" + "".join(f"{name.removeprefix('mask_'):>9}" for name in names)]
        for experiment, label in zip(self.experiments, labels, strict=True):
            spreads = [experiment.results.get(name) for name in names]
            lines.append(f"{label:<{width}}" + "".join(f"{_number(_mean(spread)):>9}" for spread in spreads))
            if len(experiment.runs) > 1:
                deviations = [f"{_number(spread.deviation if spread else None):>9}" for spread in spreads]
                lines.append(f"{'  deviation':<{width}}" + "".join(deviations))
            if experiment is not first and self.same_data:
                changes = [
                    self.change(spread, first.results.get(name)) for name, spread in zip(names, spreads, strict=True)
                ]
                lines.append(f"{'  difference':<{width}}" + "".join(f"{_difference(change):>9}" for change in changes))
        return "\n".join(lines)

    def _settings_table(self) -> str:
        rows = [["setting", *(experiment.name for experiment in self.experiments)]]
        rows += [[key, *(_shortened(value) for value in values)] for key, values in self.settings.items()]
        return _aligned(rows, align_right=False)

    def _row_table(self, title: str, columns: Sequence[Mapping[str, Spread]]) -> str:
        """A name a row, an experiment a column, with its difference in brackets."""
        names = dict.fromkeys(name for column in columns for name in column)
        if not names:
            return ""
        rows = [[title, *(experiment.name for experiment in self.experiments)]]
        for name in names:
            cells = []
            for column in columns:
                change = self.change(column.get(name), columns[0].get(name)) if column is not columns[0] else None
                cells.append(
                    _number(_mean(column.get(name))) + (f" ({_difference(change)})" if change is not None else "")
                )
            rows.append([name, *cells])
        return _aligned(rows, align_right=True)


def compare_runs(folders: Sequence[str | Path]) -> Comparison:
    """Read runs and put them side by side, in the order in which they are given.

    Args:
        folders: the run folders; two or more.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: fewer than two runs, one given twice, no run folder, or runs of different tasks.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} run is given, expected two or more; name the folders of the runs to compare")
    runs = [read_run(folder) for folder in folders]
    resolved = [run.folder.resolve() for run in runs]
    if repeated := [run for place, run in enumerate(runs) if run.folder.resolve() in resolved[:place]]:
        raise ValueError(f"{repeated[0].folder} is given twice; a run counts once")
    tasks = {run.task: run for run in reversed(runs)}
    if len(tasks) > 1:
        named = " and ".join(f"{run.folder} is of {task or 'a task that nothing tells'}" for task, run in tasks.items())
        raise ValueError(f"runs of different tasks have no result in common: {named}; compare runs of one task")
    groups, apart = _grouped(runs)
    names = _names([group[0] for group in groups])
    experiments = [_experiment(name, group) for name, group in zip(names, groups, strict=True)]
    notes, same_data = _notes(runs)
    return Comparison(experiments, _different_settings(experiments), apart + notes, same_data)


def write_comparison(path: str | Path, comparison: Comparison) -> Path:
    """Write a comparison as one HTML file, which needs no other file, no server and no network."""
    return write_page(Path(path), "comparison.html.jinja", _content(comparison))


def _grouped(runs: Sequence[RunRecord]) -> tuple[list[list[RunRecord]], list[str]]:
    """The runs of each experiment, and a sentence for each run that stands apart from others of its settings."""
    groups: list[list[RunRecord]] = []
    notes = []
    for run in runs:
        alike = [group for group in groups if run.settings and _settings_of(group[0]) == _settings_of(run)]
        reasons = [(group, _why_apart(run, group)) for group in alike]
        if fitting := next((group for group, reason in reasons if not reason), None):
            fitting.append(run)
            continue
        groups.append([run])
        if reasons:
            notes.append(f"{run.folder} is no further seed, and stands apart: {reasons[0][1]}")
    return groups, notes


def _settings_of(run: RunRecord) -> dict[str, str]:
    """Those that make a run's experiment."""
    return {key: value for key, value in run.settings.items() if key not in _OF_ONE_EXPERIMENT}


def _why_apart(run: RunRecord, group: Sequence[RunRecord]) -> str:
    """Why a run is not one of an experiment's seeds, though its settings are the same; "" where it is."""
    for other in group:
        commits, expected = _commits(run), _commits(other)
        if commits and expected and commits != expected:
            named = " and ".join(", ".join(sorted(both)) for both in (commits, expected))
            return f"its git commit differs from that of {other.folder}: {named}"
        contents, others = _validation_contents(run), _validation_contents(other)
        if contents and others and contents != others:
            return f"its validation set differs from that of {other.folder}"
    key = "run.seed"
    if same := [other for other in group if run.settings.get(key) == other.settings.get(key)]:
        return f"its settings and its seed, {run.settings.get(key, 'not known')}, are those of {same[0].folder}"
    return ""


def _commits(run: RunRecord) -> set[str]:
    """What its starts ran, where it is known."""
    return {start["commit"] for start in run.starts if start["commit"]}


def _experiment(name: str, runs: list[RunRecord]) -> Experiment:
    kinds = [kind for kind in runs[0].breakdowns if all(kind in run.breakdowns for run in runs)]
    classes = {kind: _spreads([_class_results(run, kind) for run in runs]) for kind in kinds}
    errors = {kind: _spreads([_error_costs(run, kind) for run in runs]) for kind in kinds}
    return Experiment(
        name=name,
        runs=runs,
        results=_spreads([run.results for run in runs]),
        classes={kind: spreads for kind, spreads in classes.items() if spreads},
        errors={kind: spreads for kind, spreads in errors.items() if spreads},
    )


def _class_results(run: RunRecord, kind: str) -> dict[str, float]:
    measure = "IoU" if kind == "classes" else "AP"
    return {row["name"]: row[measure] for row in run.breakdowns[kind].classes}


def _error_costs(run: RunRecord, kind: str) -> dict[str, float]:
    errors = run.breakdowns[kind].errors or {"main": {}, "special": {}}
    return {name: effect["delta_ap"] for name, effect in {**errors["main"], **errors["special"]}.items()}


def _spreads(columns: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """The mean and spread of each number that all columns have."""
    spreads = {}
    for name in columns[0]:
        values = [column[name] for column in columns if name in column]
        if len(values) == len(columns):
            absent = -1 in values
            deviation = statistics.stdev(values) if len(values) > 1 and not absent else None
            spreads[name] = Spread(-1.0 if absent else statistics.fmean(values), deviation)
    return spreads


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """The last parts of the folders' paths, as few as tell them apart."""
    paths = [run.folder.resolve() for run in runs]
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _different_settings(experiments: Sequence[Experiment]) -> dict[str, list[str | None]]:
    columns = [experiment.runs[0].settings for experiment in experiments]
    within = {  # what differs between the seeds of an experiment tells no experiments apart
        key
        for experiment in experiments
        for key in _OF_ONE_EXPERIMENT
        if len({run.settings.get(key) for run in experiment.runs}) > 1
    }
    keys = dict.fromkeys(key for column in columns for key in column if key not in within.union(_OF_EACH_RUN))
    rows = {key: [column.get(key) for column in columns] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _notes(runs: Sequence[RunRecord]) -> tuple[list[str], bool]:
    """What is to be said of the comparison, and whether the runs were measured on the same images."""
    notes = []
    for run in runs:
        if not run.results:
            notes.append(f"{run.folder} has no results: it was not evaluated yet")
        elif not any(breakdown.classes for breakdown in run.breakdowns.values()):
            notes.append(f"{run.folder} has no results.json; its numbers are those of its best evaluation in training")
        elif run.measurement != 1:
            notes.append(f"{run.folder} was measured again: its numbers are those of results{run.suffix}.json")
        if not run.settings:
            notes.append(f"{run.folder} has no settings that can be read: which of them differ is not known")
    same_data = True
    measured = [(run, contents) for run in runs if (contents := _validation_contents(run))]
    for run, contents in measured[1:]:
        first, expected = measured[0]
        if contents != expected:
            same_data = False
            what = "classes" if [row[0] for row in contents] != [row[0] for row in expected] else "images"
            notes.append(
                f"{run.folder} was measured on other {what} than {first.folder}: their results are of different "
                f"validation sets, and no differences are given"
            )
    validation_sets = [_validation_settings(run) for run in runs]
    for run, own in zip(runs, validation_sets, strict=True):
        if not _validation_contents(run) and any(other != own for other in validation_sets):
            same_data = False
            notes.append(f"what {run.folder} was measured on is not known: no differences are given")
    for run in runs[1:]:
        if different := sorted(
            key
            for key, value in runs[0].evaluation.items()
            if run.evaluation.get(key, value) != value and key != "every"
        ):
            named = ", ".join(f"eval.{key}" for key in different)
            notes.append(f"{run.folder} was measured in another way than {runs[0].folder}: {named}")
    return notes, same_data


def _validation_contents(run: RunRecord) -> list[tuple[str, float]]:
    """The classes, and how much of each there is in the validation set."""
    for breakdown in run.breakdowns.values():
        if breakdown.classes:
            return [
                (row["name"], row["num_boxes"] if "num_boxes" in row else row["share"]) for row in breakdown.classes
            ]
    return []


def _validation_settings(run: RunRecord) -> dict[str, str]:
    """The settings that say what the validation set is."""
    return {key: value for key, value in run.settings.items() if re.match(r"data\.(root|val|sample)\b", key)}


def _result_groups(experiments: Sequence[Experiment]) -> list[tuple[str, list[str]]]:
    """The names of the results, those of masks apart, each group with its title."""
    names = dict.fromkeys(name for experiment in experiments for name in experiment.results)
    of_masks = [name for name in names if name.startswith("mask_")]
    others = [name for name in names if name not in of_masks]
    groups = [("boxes" if of_masks else "all classes", others), ("masks", of_masks)]
    return [(title, group) for title, group in groups if group]


def _content(comparison: Comparison) -> dict[str, Any]:
    experiments = comparison.experiments
    kinds = dict.fromkeys(kind for experiment in experiments for kind in experiment.classes)
    error_kinds = dict.fromkeys(kind for experiment in experiments for kind in experiment.errors)
    return {
        "comparison": comparison,
        "names": [experiment.name for experiment in experiments],
        "titles": [experiment.title for experiment in experiments],
        "folders": [[str(run.folder) for run in experiment.runs] for experiment in experiments],
        "result_tables": [
            (title.capitalize(), _rows(comparison, [one.results for one in experiments], names))
            for title, names in _result_groups(experiments)
        ],
        "class_tables": [
            (
                "IoU of each class" if kind == "classes" else f"AP of each class, {kind}",
                _rows(comparison, [one.classes.get(kind, {}) for one in experiments]),
            )
            for kind in kinds
        ],
        "error_tables": [
            (f"Kinds of errors, {kind}", _rows(comparison, [one.errors.get(kind, {}) for one in experiments]))
            for kind in error_kinds
        ],
        "charts": _charts(comparison),
    }


def _rows(
    comparison: Comparison,
    columns: Sequence[Mapping[str, Spread]],
    names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """A row for each name, with a cell for each experiment: its number and its difference to the first."""
    rows = []
    for name in names or dict.fromkeys(name for column in columns for name in column):
        first = columns[0].get(name)
        cells = []
        for place, column in enumerate(columns):
            spread = column.get(name)
            change = comparison.change(spread, first) if place else None
            cells.append({"spread": spread, "change": change})
        rows.append({"name": name.removeprefix("mask_"), "cells": cells})
    return rows


def _charts(comparison: Comparison) -> list[Chart]:
    """The first result and the loss over the epochs: each experiment a line, the mean of its runs."""
    experiments = comparison.experiments
    of_seeds = ", mean of the seeds" if any(len(one.runs) > 1 for one in experiments) else ""
    charts = []
    for title, curves_of in (("{name} on the validation set", result_curves), ("Loss", loss_curves)):
        curves = [[curves_of(run.records) for run in one.runs] for one in experiments]
        names = dict.fromkeys(name for runs in curves for curve in runs for name in curve)
        name = next(iter(names), "")
        lines = {}
        for experiment, runs in zip(experiments, curves, strict=True):
            if present := [curve[name] for curve in runs if name in curve]:
                lines[experiment.title] = _mean_curve(present)
        if lines:
            texts = {line: line for line in lines}  # a legend for a single line too
            charts.append(epoch_chart(lines, title=title.format(name=name) + of_seeds, y_label=name, texts=texts))
    return charts


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of curves, at the epochs of the shortest."""
    shortest = min(curves, key=lambda curve: len(curve[0]))
    epochs = shortest[0]
    values = [np.interp(epochs, *curve) for curve in curves]
    return epochs, np.mean(values, axis=0)


def _mean(spread: Spread | None) -> float | None:
    return None if spread is None else spread.mean


def _number(value: float | None) -> str:
    """As the tables of the metrics have it."""
    return "-" if value is None or value == -1 else f"{value:.3f}"


def _difference(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _shortened(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 1]}…"


def _aligned(rows: Sequence[Sequence[str]], *, align_right: bool) -> str:
    """Rows as text in columns, the first of which begins at the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [
            cell.rjust(width) if align_right else cell.ljust(width)
            for cell, width in zip(others, widths[1:], strict=True)
        ]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
