"""A run's report: one HTML file with its results, curves, mistakes, pictures, settings and environment.

It is made of the run folder alone, so that it can be written anew at any time, also of a run that crashed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnest_det.evaluation import ConfusionMatrix, error_meanings
from resnest_det.reports.page import NOTHING, duration, is_picture, number, percent, safe, write_page
from resnest_det.reports.run_record import Breakdown, RunRecord, read_run
from resnest_det.visualize import DISTINCT_COLOURS, Curve, Limits, line_chart, loss_curves, rate_curve, result_curves

_LARGEST_MATRIX = 24  # classes; a larger one is a picture
_HEADLINE = ("AP", "AP50", "AP75", "mask_AP", "mIoU", "mAcc", "aAcc")  # the results that stand above all others
_NUM_CLASS_CURVES = 5  # classes whose precision is drawn beside the mean
_NUM_PAIRS = 10
_STYLES = ("solid", "dashed", "dotted")  # as `line_chart` has them, in CSS
_CLASS_HEADS = {"num_boxes": "objects", "share": "pixels"}


@dataclass(frozen=True)
class LegendEntry:
    """What a line of a chart is called, and how it is drawn."""

    text: str
    colour: int
    style: str


@dataclass(frozen=True)
class Chart:
    """A chart with its title and its legend, as a page has it."""

    title: str
    svg: str
    legend: list[LegendEntry]


def write_run_report(folder: str | Path, *, suffix: str = "") -> Path:
    """Write report{suffix}.html into a run folder, of whatever the folder holds.

    Args:
        folder: the run folder, or one that --eval-only made.
        suffix: what the names of an evaluation's files have before their ending; "" for those of the run itself, of
            several measurements the newest.

    Returns:
        The file: one page that needs no other file, no server and no network.

    Raises as `read_run` does.
    """
    run = read_run(folder, suffix=suffix)
    return write_page(run.folder / f"report{suffix}.html", "run_report.html.jinja", _content(run))


def chart(
    lines: Mapping[str, Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_limits: Limits = None,
    y_limits: Limits = None,
    texts: Mapping[str, str] | None = None,
) -> Chart:
    """A chart as `line_chart` draws it.

    Args:
        lines: as `line_chart` takes them.
        title: what stands above it; must differ from chart to chart of a page.
        x_label: what stands at the horizontal axis.
        y_label: what stands at the vertical axis.
        x_limits: as `line_chart` takes them.
        y_limits: as `line_chart` takes them.
        texts: what the legend calls each line, where that is not its name; a single line has no legend.
    """
    svg = line_chart(lines, title=title, x_label=x_label, y_label=y_label, x_limits=x_limits, y_limits=y_limits)
    names = [(texts or {}).get(name, name) for name in lines]
    legend = [
        LegendEntry(name, index % len(DISTINCT_COLOURS), _STYLES[index // len(DISTINCT_COLOURS) % len(_STYLES)])
        for index, name in enumerate(names)
    ]
    return Chart(title, safe(svg), legend if len(legend) > 1 or texts else [])


def epoch_chart(
    lines: Mapping[str, Curve], *, title: str, y_label: str, texts: Mapping[str, str] | None = None
) -> Chart:
    """A chart over the epochs, from the first on and from 0 or the lowest value; arguments as of `chart`."""
    lowest = min((float(np.nanmin(values, initial=0.0)) for _, values in lines.values()), default=0.0)
    limits: Limits = (lowest, None)
    return chart(lines, title=title, x_label="epoch", y_label=y_label, x_limits=(0, None), y_limits=limits, texts=texts)


def _content(run: RunRecord) -> dict[str, Any]:
    parts = [_part(run, kind, breakdown) for kind, breakdown in run.breakdowns.items()]
    last = run.starts[-1] if run.starts else {}
    content = {
        "run": run,
        "summary": _summary(run),
        "headline": _headline(run),
        "skipped": last.get("skipped", []),
        "warnings": last.get("warnings", []),
        "charts": _curves(run),
        "result_groups": _result_groups(run.results),
        "results_note": _results_note(run),
        "parts": parts,
        "examples": _examples(run.examples, run.folder),
        "describe_start": _describe_start,
    }
    return {**content, "contents": _contents(run, content)}


def _summary(run: RunRecord) -> str:
    """The run in a line, of what is known."""
    words = []
    if run.task:
        model = run.settings.get("model.detector") or run.settings.get("model.segmenter")
        backbone = run.settings.get("model.backbone")
        named = f"{_unquoted(model)} on {_unquoted(backbone)}" if model and backbone else ""
        words += [run.task.capitalize(), named]
    if run.measured_epoch is not None:
        words.append(f"best after epoch {run.measured_epoch:g} of {run.settings.get('optim.epochs', '?')}")
    if run.starts:
        words.append(f"{run.starts[-1]['date'][:16].replace('T', ' ')} UTC")
    return " · ".join(word for word in words if word)


def _headline(run: RunRecord) -> list[tuple[str, str]]:
    """The numbers that stand above all others, and what they are."""
    names = [name for name in _HEADLINE if name in run.results]
    headline = [(name.replace("mask_AP", "mask AP"), number(run.results[name])) for name in names]
    seconds = [start.get("seconds") for start in run.starts if "seconds" in start]
    if seconds and None not in seconds:
        headline.append(("duration", duration(math.fsum(second for second in seconds if second is not None))))
    return headline


def _curves(run: RunRecord) -> list[Chart]:
    charts = []
    losses = {name.removeprefix("loss_"): curve for name, curve in loss_curves(run.records).items()}
    if "loss" in losses:
        losses = {("sum" if name == "loss" and len(losses) > 1 else name): curve for name, curve in losses.items()}
    results = {name: curve for name, curve in result_curves(run.records).items() if name in _HEADLINE}
    if results:
        texts = {}
        for name, (epochs, values) in results.items():
            best = int(np.nanargmax(values)) if np.isfinite(values).any() else 0
            texts[name] = f"{name}: best {number(float(values[best]))} after epoch {epochs[best]:g}"
        charts.append(epoch_chart(results, title="Evaluation", y_label="result", texts=texts))
    if losses:
        charts.append(epoch_chart(losses, title="Losses", y_label="loss"))
        charts.append(epoch_chart({"lr": rate_curve(run.records)}, title="Learning rate", y_label="rate"))
    return charts


def _result_groups(results: Mapping[str, float]) -> list[tuple[str, dict[str, float]]]:
    of_masks = {name.removeprefix("mask_"): value for name, value in results.items() if name.startswith("mask_")}
    others = {name: value for name, value in results.items() if not name.startswith("mask_")}
    groups = [("Boxes" if of_masks else "All classes", others), ("Masks", of_masks)]
    return [(title, values) for title, values in groups if values]


def _results_note(run: RunRecord) -> str:
    if run.measurement is None:
        return "Of an evaluation by itself, with the weights and data that the file's name says."
    if any(breakdown.classes for breakdown in run.breakdowns.values()):
        again = f" The run was measured again: this is measurement {run.measurement}, of results{run.suffix}.json."
        return "Of the best checkpoint, on the validation set." + again * (run.measurement > 1)
    return "Of the best evaluation during training: the folder has no results.json."


def _part(run: RunRecord, kind: str, breakdown: Breakdown) -> dict[str, Any]:
    several = len(run.breakdowns) > 1
    files = f"{'_masks' if kind == 'masks' else ''}{run.suffix}"
    return {
        "anchor": f"-{kind}" if several else "",
        "of_kind": f", {kind}" if several else "",
        **_class_table(breakdown.classes),
        "precision_recall": _precision_recall(breakdown.precision_recall, kind),
        "precision_recall_picture": breakdown.precision_recall_picture,
        "confusion": _confusion(breakdown.confusion, run.folder / f"confusion_matrix{files}.png"),
        "errors": _errors(breakdown.errors),
    }


def _class_table(classes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each class's numbers; a class with nothing to measure is named below the table, in place of a row."""
    names = [name for name in (classes[0] if classes else ()) if name not in ("label", "name")]
    main = names[0] if names else ""
    absent = [row["name"] for row in classes if row[main] == -1]
    rows = []
    for row in classes:
        if row[main] != -1:
            cells = [{"value": row[name], "text": _class_cell(name, row[name])} for name in names]
            rows.append({"name": row["name"], "cells": cells})
    return {
        "class_heads": ["class", *(_CLASS_HEADS.get(name, name) for name in names)],
        "class_rows": rows,
        "class_note": f"Not in the data, and in no mean: {', '.join(absent)}." if absent else "",
    }


def _class_cell(name: str, value: float) -> str:
    if name == "num_boxes":
        return f"{value:d}"
    return percent(value, 2) if name == "share" else number(value)


def _precision_recall(curves: Mapping[str, Any] | None, kind: str) -> Chart | None:
    """The mean of the classes, and the curves of those with the lowest average precision."""
    if curves is None:
        return None
    recalls, precisions = np.array(curves["recalls"]), np.array(curves["precisions"])
    present = np.flatnonzero((precisions >= 0).all(axis=1))
    if not len(present):
        return None
    means = precisions.mean(axis=1)
    lines: dict[str, Curve] = {}
    texts = {}
    if len(present) > 1:
        mean = precisions[present].mean(axis=0)
        lines["mean"], texts["mean"] = (recalls, mean), f"mean of {len(present)} classes: {mean.mean():.3f}"
    for place in sorted(present.tolist(), key=lambda place: means[place])[:_NUM_CLASS_CURVES]:
        key = f"class {place}"  # a class may be called "mean"
        lines[key] = (recalls, precisions[place])
        texts[key] = f"{curves['class_names'][place]}: {means[place]:.3f}"
    which = f"the {_NUM_CLASS_CURVES} lowest classes and the mean" if len(present) > _NUM_CLASS_CURVES else "each class"
    title = f"{kind.capitalize()} at IoU {curves['iou_threshold']:g}: {which}"
    return chart(lines, title=title, x_label="recall", y_label="precision", y_limits=(0, 1.02), texts=texts)


def _confusion(content: Mapping[str, Any] | None, picture: Path) -> dict[str, Any] | None:
    if content is None:
        return None
    names = content["class_names"]
    counts = np.array(content["counts"], dtype=np.int64)
    thresholds = content.get("score_threshold", 0.0), content.get("iou_threshold", 0.5)
    matrix = ConfusionMatrix(tuple(names[:-1]), counts, *thresholds)
    small = len(names) <= _LARGEST_MATRIX
    known = f"Detections scored {thresholds[0]:g} and more, at an IoU of {thresholds[1]:g}. "
    right, missed = int(np.trace(counts[:-1, :-1])), int(counts[:-1, -1].sum())
    wrong, invented = int(counts[:-1, :-1].sum()) - right, int(counts[-1].sum())
    return {
        "note": f"{known if 'score_threshold' in content else ''}Of {right + wrong + missed} objects {right} were "
        f"found, {wrong} found as another class and {missed} missed. Detections where no object is: {invented}.",
        "names": names,
        "rows": [_confusion_row(names, counts, place) for place in range(len(names))] if small else [],
        "picture": picture if not small and is_picture(picture) else None,
        "pairs": matrix.most_confused(_NUM_PAIRS),
    }


def _confusion_row(names: Sequence[str], counts: NDArray[np.int64], row: int) -> dict[str, Any]:
    last = len(names) - 1
    shares = counts[row] / max(counts[row].sum(), 1)
    cells = []
    for column, share in enumerate(shares.tolist()):
        cells.append(
            {
                "text": "" if row == column == last else f"{100 * share:.0f}" if share >= 0.005 else "",
                "count": int(counts[row, column]),
                # The root, so that a few percent can be seen.
                "tint": 0 if row == column == last else round(0.55 * math.sqrt(share), 3),
                "right": row == column != last,
            }
        )
    return {"name": names[row], "cells": cells}


def _errors(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if content is None:
        return None
    meanings = error_meanings(content["foreground_iou"], content["background_iou"])
    effects = {**content["main"], **content["special"]}
    highest = max((effect["delta_ap"] for effect in effects.values()), default=0) or 1.0
    rows = [
        {
            "name": name,
            **effect,
            "share": round(100 * max(effect["delta_ap"], 0) / highest, 1),
            "meaning": meanings.get(name, ""),
        }
        for name, effect in effects.items()
    ]
    return {"AP": content["AP"], "foreground_iou": f"{content['foreground_iou']:g}", "rows": rows}


def _examples(content: Mapping[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    if content is None or not content["images"]:
        return None
    scores = list(content["images"].values())
    groups = [
        (
            title,
            [
                {**example, "pictures": [(text, folder / file) for text, file in example["pictures"].items()]}
                for example in content[group]
            ],
        )
        for group, title in (("worst", "Worst"), ("best", "Best"))
    ]
    return {
        "note": f"By {content['score']}. Of {len(scores)} images the mean is {number(float(np.mean(scores)))} and the "
        f"median {number(float(np.median(scores)))}.",
        "legend": content["legend"],
        "groups": groups,
    }


def _pictures(example: Mapping[str, Any], folder: Path) -> list[tuple[str, Path]]:
    """The captions and files of an example's pictures."""
    return [(title, folder / file) for title, file in example["pictures"].items()]


def _describe_start(start: Mapping[str, Any]) -> list[tuple[str, str]]:
    packages = ", ".join(f"{name} {version}" for name, version in start["packages"].items())
    rows = [
        ("Date", f"{start['date'].replace('T', ' ').removesuffix('+00:00')} UTC"),
        ("Command", start["command"]),
        ("Device", start["device"]),
        ("Processes", str(start["processes"])),
        ("Python", f"{start['python']}, {start['platform']}"),
        ("Packages", packages),
        ("Git commit", start["commit"] or "none: the working folder is in no repository"),
    ]
    if "seconds" in start:
        ended = start["seconds"]
        rows.insert(1, ("Duration", duration(ended) if ended is not None else "not known: the run did not end"))
    return rows


def _contents(run: RunRecord, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The sections of the page, each with its anchor."""
    sections: list[tuple[Any, str, str]] = [
        (run.errors, "error", "Error"),
        (content["warnings"] or content["skipped"], "warnings", "Warnings"),
        (content["charts"], "curves", "Curves"),
        (content["result_groups"], "results", "Results"),
    ]
    for part in content["parts"]:
        named = [
            ("class_rows", "classes", "Classes"),
            ("precision_recall", "precision", "Precision"),
            ("confusion", "confusion", "Confusion"),
            ("errors", "errors", "Errors"),
        ]
        sections += [
            (part[key], f"{anchor}{part['anchor']}", f"{title}{part['of_kind']}") for key, anchor, title in named
        ]
    sections += [
        (content["examples"], "examples", "Images"),
        (run.config_text, "settings", "Settings"),
        (run.starts, "environment", "Environment"),
        (run.missing, "missing", "Missing"),
    ]
    return [(anchor, title) for shown, anchor, title in sections if shown]


def _unquoted(value: str | None) -> str:
    return (value or NOTHING).strip('"')
