"""The documentation as a site: it builds without a warning, needs nothing from elsewhere, and shows well."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from resnest_det import list_backbones
from tests.browser import PHONE, open_page, serve_folder

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
API = DOCS / "api"

ROOMS = [
    "backbones", "layers", "models", "data", "evaluation", "engine", "predictor", "classify", "attention", "visualize",
    "reports", "testing",
]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path):
    with serve_folder(site) as address:
        yield address


class Elements(HTMLParser):
    """The elements of a page, each its tag and its attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_every_page_is_there(site: Path) -> None:
    pages = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    pages |= {Path("changelog.html"), Path("contributing.html")}
    assert pages <= {page.relative_to(site) for page in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = [
        address
        for page in site.rglob("*.html")
        for tag, attributes in Elements(page).found
        for name in ("src", "srcset", "data", "poster", "href")
        if (address := attributes.get(name)) and (name != "href" or tag == "link")
    ]
    loaded += [
        address
        for sheet in site.rglob("*.css")
        for address in re.findall(r"""(?:url\(|@import)\s*["']?([^"')]+)""", sheet.read_text())
    ]
    assert len(loaded) > 100
    assert [address for address in loaded if re.match(r"(?:https?:)?//", address)] == []


def test_links_between_the_repository_and_its_pages(site: Path) -> None:
    def links(page: str) -> set[str | None]:
        return {attributes.get("href") for tag, attributes in Elements(site / page).found if tag == "a"}

    assert {"architecture.html", "changelog.html"} <= links("contributing.html")
    assert "index.html" in links("weights.html")
    assert "../changelog.html" in links("api/index.html")
    assert "sample.png" in links("index.html")  # a picture, to be seen at its own size


def test_lists_are_lists(site: Path) -> None:
    """A repository's page begins a list without an empty line before it; the site's Markdown does not."""
    for page in site.rglob("*.html"):
        assert not re.search(r"<p>[^<]*(?:<(?!/p>)[^<]*)*\n(?:[-*]|\d+\.) ", page.read_text()), page.name


def described(site: Path) -> set[str]:
    """The names that the API pages describe, with their modules."""
    content = (site / "objects.inv").read_bytes()
    header_end = 0
    for _ in range(4):  # lines of text, then compressed ones
        header_end = content.index(b"\n", header_end) + 1
    return {line.split(" ")[0] for line in zlib.decompress(content[header_end:]).decode().splitlines()}


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_described(site: Path, room: str) -> None:
    module = importlib.import_module(f"resnest_det.{room}")
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", [name for name in defined if not name.startswith("_")])
    assert names
    listed = set(re.findall(r"`(\w+)`", (API / f"{room}.md").read_text()))
    paths = described(site)
    missing = [
        name
        for name in names
        # a function that is named as its file stands in the way of that one, and is described under its full path
        if name not in listed and not {f"{module.__name__}.{name}", f"{module.__name__}.{name}.{name}"} & paths
    ]
    assert not missing, f"docs/api/{room}.md shows what has a docstring; name these in it"


def test_names_of_the_package_are_listed() -> None:
    names = set(importlib.import_module("resnest_det").__all__) - set(list_backbones())
    assert names == set(re.findall(r"`(\w+)`", (API / "index.md").read_text().partition("## Names")[2]))


SHOWN = {  # a page: text that it shows, and its pictures besides the logo in the header and in a phone's menu
    "index.html": ("Two commands", 2),
    "benchmarks.html": ("Blood cells, from random weights", 0),
    "config.html": ("optim.one_cycle_rise", 0),
    "api/evaluation.html": ("weighted_boxes_fusion", 0),
}


@pytest.mark.parametrize("width", [1280, pytest.param(390, marks=pytest.mark.slow)])
def test_pages_in_a_browser(site: Path, address: str, width: int) -> None:
    faults = []
    shown = set()
    pages = sorted(file.relative_to(site).as_posix() for file in site.rglob("*.html"))
    with open_page(address, width) as page:
        for name in pages if width < PHONE else SHOWN:  # every page where room is scarce
            page.driver.get(address + name)
            faults += [f"{name}: broken picture {picture}" for picture in page.broken_pictures]
            if page.overflows:
                faults.append(f"{name} is wider than {width} pixels")
            text, num_pictures = SHOWN.get(name, ("", 0))
            if text in page.text and page.num_pictures >= num_pictures + 2:
                shown.add(name)
        faults += page.console_errors
    assert faults == []
    assert set(SHOWN) <= shown


def test_search_without_a_server(site: Path) -> None:
    with open_page(site / "index.html") as page:
        field = page.driver.find_element("css selector", "input.md-search__input")
        field.send_keys("stochastic depth")
        deadline = time.monotonic() + 20
        while "fidelity.html" not in page.driver.page_source and time.monotonic() < deadline:
            time.sleep(0.1)
        found = page.driver.find_elements("css selector", "a.md-search-result__link")
        assert any("fidelity.html" in str(link.get_attribute("href")) for link in found)
        assert page.console_errors == []


def load(name: str) -> ModuleType:
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_from_the_repository_to_the_site() -> None:
    pytest.importorskip("mkdocs")
    linked_pages = load("hooks").linked_pages
    assert linked_pages("[x](../README.md#more)", "weights.md") == "[x](index.md)"
    assert linked_pages("[x](../../CHANGELOG.md)", "api/index.md") == "[x](../changelog.md)"
    assert linked_pages("[x](docs/config.md#flags)", "contributing.md") == "[x](config.md#flags)"
    assert linked_pages("[config.md](config.md#flags)", "weights.md") == "[Settings](config.md#flags)"
    assert linked_pages("[docs/config.md](docs/config.md)", "contributing.md") == "[Settings](config.md)"
    assert linked_pages("in [a test](../tests/test_site.py)", "weights.md") == "in a test"
    for link in ("[x](https://example.com/a.md)", "[x](no_such_file.md)", "[0](y)"):
        assert linked_pages(link, "weights.md") == link


def test_docstrings_in_markdown() -> None:
    pytest.importorskip("griffe")
    in_markdown = load("docstrings").in_markdown
    assert in_markdown("From (N, radix * C, 1, 1) to (M,).") == "From `(N, radix * C, 1, 1)` to `(M,)`."
    assert in_markdown("`(N, C)` stays, and (a, b) is prose.") == "`(N, C)` stays, and (a, b) is prose."
    assert in_markdown("Of images/<split>/*.jpg.") == "Of `images/<split>/*.jpg`."
    assert in_markdown("The class __background__.") == "The class `__background__`."
    assert in_markdown("One of\n- a\n  long;\n- b.\n\nEnd.") == "One of\n\n- a\n  long;\n- b.\n\nEnd."
    assert in_markdown("Example:\n    >>> f((N, C))") == "Examples:\n    >>> f((N, C))"
