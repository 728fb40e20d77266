"""Pages in a real browser: Debian's chromium, without a window, driven by selenium.

No host but this machine is known to the browser, so that a page which loads anything from elsewhere has an error in its
console.
"""

from __future__ import annotations

import base64
import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver

PHONE = 600  # pixels of width from which on a screen is no phone's

# Pictures that are fetched when they are scrolled to are fetched now; what has no pixels then is broken.
BROKEN_PICTURES = """
    const pictures = [...document.images], done = arguments[0];
    for (const picture of pictures) picture.loading = "eager";
    Promise.allSettled(pictures.map(picture => picture.decode())).then(() => done(
        pictures.filter(picture => !picture.naturalWidth).map(picture => picture.currentSrc || picture.outerHTML)));
"""
# On a phone a page without a viewport tag is laid out for a larger window, which is wider than the one it has.
OVERFLOWS = """
    const page = document.documentElement;
    return page.scrollWidth > page.clientWidth || page.clientWidth > arguments[0];
"""


class Page:
    """A page that is open in the browser; each property looks at it as it is now.

    Args:
        driver: the browser, which has loaded it.
        width: of the window, in pixels.
        height: of the window, in pixels.
    """

    def __init__(self, driver: webdriver.Chrome, width: int, height: int) -> None:
        self.driver = driver
        self.width = width
        self.height = height
        self._console_errors: list[str] = []

    @property
    def console_errors(self) -> list[str]:
        """The console's errors since the page was opened: of scripts, and of files that could not be loaded."""
        entries = self.driver.get_log("browser")  # those since the last call
        self._console_errors += [entry["message"] for entry in entries if entry["level"] == "SEVERE"]
        return list(self._console_errors)

    @property
    def overflows(self) -> bool:
        """Whether the page is wider than the window, so that it must be scrolled sideways."""
        return self.driver.execute_script(OVERFLOWS, self.width)

    @property
    def num_pictures(self) -> int:
        """How many pictures the page has."""
        return self.driver.execute_script("return document.images.length")

    @property
    def broken_pictures(self) -> list[str]:
        """The addresses of pictures that do not show."""
        return self.driver.execute_async_script(BROKEN_PICTURES)

    @property
    def text(self) -> str:
        """The text that is shown."""
        return self.driver.execute_script("return document.body.innerText")

    def screenshot(self, path: str | Path, *, whole_page: bool = False) -> None:
        """Write what the window shows to a PNG file, or the page from top to bottom."""
        options: dict[str, object] = {"format": "png"}
        if whole_page:
            page_height = self.driver.execute_script("return document.documentElement.scrollHeight")
            options |= {
                "captureBeyondViewport": True,
                "clip": {"x": 0, "y": 0, "width": self.width, "height": page_height, "scale": 1},
            }
        picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        Path(path).write_bytes(base64.b64decode(picture))


@contextmanager
def open_page(path_or_url: str | Path, width: int = 1280, height: int = 900, *, dark: bool = False) -> Iterator[Page]:
    """A page in a browser of its own. Without chromium and chromedriver on PATH, the test that asks is skipped.

    Args:
        path_or_url: a file, which is opened without a server; a folder, whose index.html is opened through a server;
            or an address with its scheme, such as one of `serve_folder`.
        width: pixels of the window's width. Below 600 the browser is a phone's.
        height: pixels of the window's height.
        dark: ask the page for dark colours.
    """
    browser, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver_program is None:
        pytest.skip("chromium and chromedriver are not both on PATH; Debian's packages chromium and chromium-driver")
    if not str(path_or_url).startswith(("http:", "https:", "file:")):
        path = Path(path_or_url).resolve(strict=True)
        if path.is_dir():
            with serve_folder(path) as address, open_page(address, width, height, dark=dark) as page:
                yield page
            return
        path_or_url = path.as_uri()

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "headless=new",
        "no-proxy-server",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "disable-dev-shm-usage",  # it is small in containers
        *(["no-sandbox"] if os.geteuid() == 0 else []),  # root has none
    ):
        options.add_argument(f"--{argument}")
    # Both programs are named, so that selenium looks for none, and downloads none.
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_program))
    try:
        # A window has a least width, more than a phone's; the screen that is pretended to be there has none.
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < PHONE}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(str(path_or_url))
        yield Page(driver, width, height)
    finally:
        driver.quit()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serve_folder(folder: str | Path) -> Iterator[str]:
    """The address, "http://127.0.0.1:PORT/", at which a folder is served to this machine."""
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
