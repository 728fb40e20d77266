"""What the site has beside the folder docs/: pages from the repository's top level, and the links to them.

A page is written as the repository shows it. Its links lead to the repository's files, and say so, as in
`[journal.md](journal.md)`. MkDocs knows no file outside docs/, and on the site a page has a title and no file's name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}  # file of the top level: its page
LINK = re.compile(r"\[([^][]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r"^!\[[^][]*\]\((\S+)\)$", re.MULTILINE)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of the top level."""
    for file, page in PAGES.items():
        files.append(File.generated(config, page, content=(REPOSITORY / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Lead the links of a page to the site's pages, and make each picture a link to itself."""
    return PICTURE.sub(r"[\g<0>](\1)", linked_pages(markdown, page.file.src_uri))


def linked_pages(markdown: str, page: str) -> str:
    """The text of a page with links to pages of the site.

    A link to the README leads to the home page. Of a link to any other file that is no page, the text remains.
    """
    sources = {of_site: file for file, of_site in PAGES.items()}
    source = sources.get(page, f"docs/{page}")

    def of_the_site(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if "://" in target or not (REPOSITORY / path).exists():
            return link[0]  # another site's, or a mistake, which MkDocs warns of
        if text in (target, posixpath.basename(target)) and path.endswith(".md"):
            text = title(REPOSITORY / path)
        if path == "README.md":
            path, anchor = "index.md", ""
        elif path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        else:
            return text
        return f"[{text}]({posixpath.relpath(path, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(of_the_site, markdown)


def title(page: Path) -> str:
    """The first heading of a page."""
    heading = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert heading is not None, f"{page} has no heading"
    return heading[1]
