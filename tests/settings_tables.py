"""The tables of docs/config.md. `python -m tests.settings_tables` writes them anew."""

from __future__ import annotations

from pathlib import Path

from resnest_det.config import DetectionSettings, ExperimentSettings, SegmentationSettings, settings_table
from tests.markdown_tables import between_markers, table

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
TASKS: dict[str, type[ExperimentSettings]] = {"Detection": DetectionSettings, "Segmentation": SegmentationSettings}


def section_tables(task: str) -> str:
    """A heading and a table for each section of a task's settings."""
    settings = TASKS[task]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in settings_table(settings).splitlines()[2:]]
    parts = []
    for section, field in settings.model_fields.items():
        described = [
            [key, default, values(kind, bounds), description]
            for key, kind, default, bounds, description in rows
            if key.startswith(f"`{section}.")
        ]
        parts.append(f"#### {task}: {section}\n\n{field.description}\n")
        parts.append(table(["setting", "default", "values", "what it is"], "llll", described) + "\n")
    return "\n".join(parts)


def values(kind: str, bounds: str) -> str:
    """What a setting may be: its type with its bounds, or its choices."""
    if kind == "string" and bounds:
        return ", ".join(f"`{choice}`" for choice in bounds.split(", "))
    return f"{kind}: {bounds}" if kind.startswith("list") else f"{kind} {bounds}".rstrip()


def renewed(text: str) -> str:
    """The page's text with its tables made anew."""
    for task in TASKS:
        text = between_markers(text, task.lower(), section_tables(task))
    return text


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
