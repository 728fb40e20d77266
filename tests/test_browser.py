"""The browser of the tests sees what is wrong with a page."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.browser import open_page

HEAD = (
    "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><link rel=icon href='data:,'>"
)


def test_faults_of_a_page(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        f"{HEAD}<div style='width: 700px; height: 3000px'>wide</div><img loading=lazy src=missing.png>"
        "<img src='https://example.com/elsewhere.png'><script>no_such_function()</script>"
    )
    with open_page(tmp_path, width=390) as page:  # through a server
        assert page.overflows
        missing, elsewhere = page.broken_pictures
        assert missing.endswith("/missing.png")
        assert elsewhere == "https://example.com/elsewhere.png"
        errors = "\n".join(page.console_errors)
        for fault in ("no_such_function is not defined", "missing.png", "elsewhere.png"):
            assert fault in errors


def test_a_page_without_faults(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    file = tmp_path / "page.html"
    file.write_text(
        f"{HEAD}<img src=red.png style='width: 100%; height: 1500px'><p hidden>unseen</p><p id=scheme></p><script>"
        "scheme.textContent = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'</script>"
    )
    with open_page(file, width=390, height=600, dark=True) as page:
        assert not page.overflows
        assert page.broken_pictures == []
        assert page.num_pictures == 1
        assert page.console_errors == []
        assert page.text == "dark"
        for name, whole_page in (("window", False), ("whole", True)):
            page.screenshot(tmp_path / f"{name}.png", whole_page=whole_page)
    assert Image.open(tmp_path / "window.png").size == (390, 600)
    with Image.open(tmp_path / "whole.png") as picture:
        assert picture.width == 390
        assert picture.height > 1500
        assert picture.convert("RGB").getpixel((200, 1400)) == (255, 0, 0)
