"""What the JSON files of a run folder must have for a report to be made of them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)


class _Start(_Shape):
    date: str
    command: str
    device: str
    processes: int
    python: str
    platform: str
    packages: dict[str, str]
    commit: str | None
    seconds: float | None = None
    skipped: list[str] = []
    warnings: list[str] = []


class _Example(_Shape):
    name: str
    score: float
    note: str
    pictures: dict[str, str]


class _Examples(_Shape):
    score: str
    images: dict[str, float]
    legend: dict[str, list[int]]
    worst: list[_Example]
    best: list[_Example]


class _Results(_Shape):
    results: dict[str, float]
    settings: dict[str, Any] = {}
    classes: list[dict[str, str | int | float]] = []
    mask_classes: list[dict[str, str | int | float]] = []


class _Effect(_Shape):
    delta_ap: float
    count: int


class _Errors(_Shape):
    AP: float
    foreground_iou: float
    background_iou: float
    main: dict[str, _Effect]
    special: dict[str, _Effect]


class _Confusion(_Shape):
    class_names: list[str]
    counts: list[list[int]]
    score_threshold: float = 0.0
    iou_threshold: float = 0.0


class _PrecisionRecall(_Shape):
    class_names: list[str]
    iou_threshold: float
    recalls: list[float]
    precisions: list[list[float]]


_SHAPES: dict[str, TypeAdapter[Any]] = {
    "provenance": TypeAdapter(list[Any]),
    "start": TypeAdapter(_Start),
    "examples": TypeAdapter(_Examples),
    "results": TypeAdapter(_Results),
    "errors": TypeAdapter(_Errors),
    "confusion_matrix": TypeAdapter(_Confusion),
    "precision_recall": TypeAdapter(_PrecisionRecall),
}


def mistake_in(kind: str, content: Any) -> str:
    """What is wrong with the content of a file, in a few words; "" where nothing is.

    Args:
        kind: "start", an entry of provenance.json, or the file's name without suffix and ending.
        content: what json.loads made of it.
    """
    try:
        _SHAPES[kind].validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
    if kind == "results":
        rows = [row for table in ("classes", "mask_classes") for row in content.get(table, [])]
        return next((mistake for row in rows if (mistake := _mistake_in_row(row, rows[0]))), "")
    if kind == "confusion_matrix":
        return _mistake_in_size("counts", content["counts"], len(content["class_names"]), len(content["class_names"]))
    if kind == "precision_recall":
        sizes = len(content["class_names"]), len(content["recalls"])
        return _mistake_in_size("precisions", content["precisions"], *sizes)
    return ""


def _mistake_in_row(row: dict[str, Any], first: dict[str, Any]) -> str:
    measured = {"AP", "num_boxes"} if "num_boxes" in row else {"IoU", "share"}
    if row.keys() != first.keys() or not {"label", "name"} | measured <= row.keys():
        return f"a class has {', '.join(row)}"
    if not isinstance(row["name"], str) or not isinstance(row.get("num_boxes", 0), int):
        return "a class has no string for a name, or no whole number of objects"
    if any(isinstance(value, str) for name, value in row.items() if name != "name"):
        return f"a number of the class {row['name']} is a string"
    return ""


def _mistake_in_size(name: str, rows: list[list[Any]], height: int, width: int) -> str:
    right = len(rows) == height and all(len(row) == width for row in rows)
    return "" if right and height else f"{name} is no table of {height} rows of {width} numbers"
