"""The tables of docs/recipes.md, from the configurations' headers. `python -m tests.recipes_table` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tests.markdown_tables import between_markers, table

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "recipes.md"
CONFIGS = REPOSITORY / "configs"
DETECTORS = {
    "faster_rcnn": "Faster R-CNN",
    "cascade_rcnn": "Cascade R-CNN",
    "mask_rcnn": "Mask R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
}
BACKBONES = {
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "resnest50": "ResNeSt-50",
    "resnest101": "ResNeSt-101",
    "resnest200": "ResNeSt-200",
}
_FIELD = re.compile(r"^(Command|Data|Duration|Expected|Differs):\s*", re.MULTILINE)


def header(config: Path) -> dict[str, str]:
    """What a configuration's header says, by its fields, and its first sentence under "title"."""
    lines = config.read_text().partition("\n\n")[0].splitlines()
    text = "\n".join(line.removeprefix("#").strip() for line in lines)
    title, *fields = _FIELD.split(text)
    said = {"title": title, **dict(zip(fields[::2], fields[1::2], strict=True))}
    return {field: " ".join(value.split()) for field, value in said.items()}


def coco_table() -> str:
    """Box AP, and mask AP in brackets, published for the detectors of ResNeSt's paper."""
    rows = []
    for detector, name in DETECTORS.items():
        cells = []
        for backbone in BACKBONES:
            configs = list((CONFIGS / "det").glob(f"{detector}_{backbone}_*x.toml"))
            cells.append(_published_ap(configs[0]) if configs else "")
        rows.append([f"{name}, `{detector}_…`", *cells])
    return table(["", *BACKBONES.values()], "lrrrrr", rows)


def _published_ap(config: Path) -> str:
    found = re.match(
        r"box AP ([\d.]+)(?: and mask AP ([\d.]+))? on val2017, published for the detectron2 configuration",
        header(config)["Expected"],
    )
    assert found, config
    schedule = config.stem.rpartition("_")[2]
    return f"{found[1]}{f' ({found[2]})' if found[2] else ''}{'' if schedule == '1x' else f', {schedule}'}"


def expectations(configs: Iterable[Path]) -> str:
    """What is expected of configurations, and how long they take, in their headers' words."""
    rows = []
    for config in configs:
        said = header(config)
        rows.append([f"`{config.parent.name}/{config.stem}`", said["Expected"], said["Duration"]])
    return table(["configuration", "expected", "duration"], "lll", rows)


def tables() -> dict[str, str]:
    """Every table of the page, by the name of its markers; each configuration is in one of them."""
    configs = sorted(CONFIGS.glob("*/*.toml"))
    of_the_paper = {f"{detector}_{backbone}" for detector in DETECTORS for backbone in BACKBONES}
    measured = [config for config in configs if "measured" in header(config)["Expected"]]
    others = [c for c in configs if c not in measured and c.stem.rpartition("_")[0] not in of_the_paper]
    return {
        "measured": expectations(measured),
        "coco": coco_table(),
        "torchvision": expectations(config for config in others if config.parent.name == "det"),
        "ade20k": expectations(config for config in others if config.parent.name == "seg"),
    }


def renewed(page: str) -> str:
    """The page's text with its tables written anew."""
    for name, content in tables().items():
        page = between_markers(page, name, content)
    return page


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
