"""A person at the page in a real browser, and the images that they see."""

import io
import json
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page
from playwright.sync_api import Error as PlaywrightError

from serving.image_settings import KEY
from serving.page.runs import Runs

WIDE, NARROW = (1280, 900), (390, 844)
TIMEOUT = 30_000
"""Milliseconds that a test waits for the page."""


class Served(NamedTuple):
    """A running page.

    Attributes:
        address: its address.
        runs: its runs.
    """

    address: str
    runs: Runs


class Visitor:
    """A person at the page, with cookies and storage of their own. Requests to elsewhere are recorded."""

    def __init__(self, browser: Browser, served: Served, size: tuple[int, int] = WIDE) -> None:
        self.context: BrowserContext = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, accept_downloads=True
        )
        self.context.set_default_timeout(TIMEOUT)
        self.address, self.elsewhere = served.address, list[str]()
        self.context.on("request", lambda request: self._record(request.url))
        self.page: Page = self.context.new_page()
        self.open()

    def open(self) -> None:
        self.page.goto(self.address)
        self.page.locator("#generate-start").wait_for()

    def _record(self, url: str) -> None:
        if not url.startswith((f"{self.address}/", "data:", "blob:")):
            self.elsewhere.append(url)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def panel(self, tab: str) -> Any:
        """Content of a tab."""
        return self.page.get_by_role("tabpanel").filter(has=self.page.locator(f"#{tab}-status"))

    def choose(self, *classes: str, tab: str = "generate") -> None:
        field = self.panel(tab).get_by_label("Classes")
        for each in classes:
            field.click()
            self.page.keyboard.type(each)
            self.page.keyboard.press("Enter")
        self.page.keyboard.press("Escape")

    def fill(self, label: str, value: float, tab: str = "generate") -> None:
        field = self.panel(tab).locator(f"input[type=number][aria-label*='{label}'], label:has-text('{label}') input")
        field.first.fill(str(value))
        self.page.keyboard.press("Tab")

    def start(self, tab: str = "generate") -> None:
        self.mark(tab)
        self.page.locator(f"#{tab}-start").click()

    def mark(self, tab: str = "generate") -> None:
        """Mark the current status as old, so that :meth:`wait` waits for another one."""
        self.page.locator(f"#{tab}-status p").evaluate_all("all => all.forEach(each => each.dataset.old = 1)")

    def wait(self, text: str, tab: str = "generate") -> str:
        """Wait until there is a new status with a text, and return all of it."""
        status = self.page.locator(f"#{tab}-status p:not([data-old])").filter(has_text=re.compile(text))
        try:
            return status.inner_text()
        except PlaywrightError as error:
            shown = self.page.locator(f"#{tab}-status").inner_text()
            raise AssertionError(f"the status is {shown!r}, not {text!r}") from error

    def upload(self, path: Path, tab: str) -> None:
        """Choose the image of a tab."""
        self.panel(tab).locator("input[type=file]").first.set_input_files(path)
        self.panel(tab).get_by_text(path.stem).first.wait_for()

    def put_back(self, path: Path, tab: str = "generate") -> None:
        """Choose the image whose settings are put back."""
        self.mark(tab)
        self.panel(tab).locator("input[type=file]").last.set_input_files(path)

    def files(self, tab: str = "generate") -> list[bytes]:
        """PNG files of the finished images."""
        sources = self.page.locator(f"#{tab}-finished img").evaluate_all("all => all.map(each => each.src)")
        return [self.context.request.get(source).body() for source in sources]

    def close(self) -> None:
        self.context.close()
        assert self.elsewhere == []


class Gate:
    """Holds a generation after its first row."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()


def pixels(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image)


def same(files: list[bytes], images: list[Image.Image]) -> bool:
    return len(files) == len(images) and all(map(np.array_equal, map(pixels, files), images))


def settings_inside(file: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(file)) as image:
        return json.loads(image.text[KEY])["settings"]  # type: ignore[attr-defined]


def an_image(folder: Path) -> Path:
    levels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = folder / "an_upload.png"
    Image.fromarray(levels).resize((70, 50)).save(path)
    return path
