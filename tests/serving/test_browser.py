"""The page in a real browser: what people do on it, and that they see exactly the images of Python."""

import io
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page
from playwright.sync_api import Error as PlaywrightError
from torch import Tensor

from llamagen import LlamaGen
from serving.image_settings import ImageSettings, png_file
from serving.image_store import ImageStore
from serving.previews import GrowingImages, PreviewBudget
from serving.runs import Runs
from serving.worker import Worker
from tests.pipeline import Pipeline
from tests.serving.chromium import chromium

pytestmark = pytest.mark.slow
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


@pytest.fixture(scope="module")
def served(pipeline: Pipeline) -> Iterator[Served]:
    from serving.server import build_app, build_server, listen

    worker = Worker()
    runs = Runs(LlamaGen.from_pretrained(pipeline.root / "argen", batch_size=2), worker, ImageStore())
    connection = listen("127.0.0.1", 0)
    server = build_server(build_app(runs))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [connection]}, daemon=True)
    thread.start()
    yield Served(f"http://127.0.0.1:{connection.getsockname()[1]}", runs)
    server.should_exit = True
    worker.close()
    thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


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

    def put_back(self, path: Path) -> None:
        """Choose the image whose settings are put back."""
        self.mark()
        self.panel("generate").locator("input[type=file]").set_input_files(path)

    def files(self, tab: str = "generate") -> list[bytes]:
        """PNG files of the finished images."""
        sources = self.page.locator(f"#{tab}-finished img").evaluate_all("all => all.map(each => each.src)")
        return [self.context.request.get(source).body() for source in sources]

    def close(self) -> None:
        self.context.close()
        assert self.elsewhere == []


@pytest.fixture
def visitor(browser: Browser, served: Served) -> Iterator[Visitor]:
    visitor = Visitor(browser, served)
    yield visitor
    visitor.close()


def pixels(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image)


def same(files: list[bytes], images: list[Image.Image]) -> bool:
    return len(files) == len(images) and all(map(np.array_equal, map(pixels, files), images))


class Gate:
    """Holds a generation after its first row."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, update = Gate(), GrowingImages.update

    def held(self: GrowingImages, codes: Tensor, rows: int, budget: PreviewBudget) -> list[bytes]:
        if rows == 2:
            gate.reached.set()
            gate.open.wait(60)
        return update(self, codes, rows, budget)

    monkeypatch.setattr(GrowingImages, "update", held)
    yield gate
    gate.open.set()


def test_generated_images_are_those_of_python_and_the_same_again(visitor: Visitor, model: LlamaGen) -> None:
    visitor.choose("3", "7")
    visitor.fill("Seed", 5)
    visitor.fill("Guidance scale", 2.5)
    visitor.fill("Temperature", 0.9)
    visitor.start()
    visitor.wait("Finished 8 images in")
    expected = model.generate([3, 7], images_per_prompt=4, seed=5, guidance_scale=2.5, temperature=0.9, progress=False)
    files = visitor.files()
    assert same(files, expected)
    visitor.fill("Seed", 6)
    visitor.start()
    visitor.wait("Finished 8 images in")
    assert not same(visitor.files(), expected)
    visitor.fill("Seed", 5)
    visitor.start()
    visitor.wait("Finished 8 images in")
    assert same(visitor.files(), expected)


def test_rows_appear_and_stop_ends_the_run(visitor: Visitor, gate: Gate, served: Served) -> None:
    visitor.choose("4")
    assert visitor.page.locator("#generate-stop").is_disabled()
    visitor.start()
    assert gate.reached.wait(30)
    visitor.wait("row 1 of 4")
    assert visitor.page.locator("#generate-growing img").count() == 2
    assert visitor.page.locator("#generate-status progress").get_attribute("value") == "2"
    with visitor.page.expect_response(lambda response: "gradio_api" in response.url):
        visitor.page.locator("#generate-stop").click()
    jobs = list(served.runs._jobs.values())
    for _ in range(100):  # the answer is sent before the handler ends
        if all(job._stopped.is_set() for job in jobs):
            break
        visitor.page.wait_for_timeout(20)
    gate.open.set()
    assert "Stopped after 0 of 4 images." in visitor.wait("Stopped")
    assert visitor.page.locator("#generate-growing img").count() == 0
    visitor.start()
    visitor.wait("Finished 4 images")


def test_closing_the_page_ends_its_run(browser: Browser, served: Served, gate: Gate) -> None:
    visitor = Visitor(browser, served)
    visitor.choose("4")
    visitor.start()
    assert gate.reached.wait(30)
    (job,) = served.runs._jobs.values()
    visitor.close()
    assert job._stopped.wait(30)
    gate.open.set()


def test_mistakes_are_sentences_and_the_page_goes_on(visitor: Visitor, tmp_path: Path) -> None:
    visitor.start()
    assert visitor.wait("class") == "Choose at least one class."
    visitor.choose("1", "2")
    visitor.fill("Images of each class", 16)
    visitor.start()
    assert visitor.wait("images") == "2 × 16 are 32 images; generate at most 16 at a time."
    visitor.fill("Images of each class", 1)
    visitor.panel("generate").get_by_label("Seed").fill("")
    visitor.start()
    visitor.wait("The seed is empty; enter an integer")
    visitor.fill("Seed", 1)
    visitor.start()
    visitor.wait("Finished 2 images")
    visitor.tab("Reconstruct")
    visitor.start("reconstruct")
    assert visitor.wait("image", "reconstruct") == "There is no image; choose one first."
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    visitor.upload(broken, "reconstruct")
    visitor.start("reconstruct")
    visitor.wait("The file broken.png is not a readable JPEG, PNG or WebP image; choose another file.", "reconstruct")


def test_a_downloaded_image_puts_its_settings_back(visitor: Visitor, model: LlamaGen, tmp_path: Path) -> None:
    visitor.choose("3", "8")
    visitor.fill("Images of each class", 2)
    visitor.fill("Seed", 99)
    visitor.fill("Guidance scale", 3.5)
    visitor.fill("Top-k", 12)
    visitor.start()
    visitor.wait("Finished 4 images")
    files = visitor.files()
    with visitor.page.expect_download() as download:
        visitor.page.get_by_role("link", name="Download image 2, 8").click()
    assert download.value.suggested_filename == "argen_seed99_01.png"
    path = tmp_path / "image.png"
    download.value.save_as(path)
    assert path.read_bytes() == files[1]
    visitor.open()
    visitor.put_back(path)
    visitor.wait("The settings of the image are in the form")
    visitor.start()
    visitor.wait("Finished 4 images")
    assert visitor.files() == files
    settings = ImageSettings("other", "generation", (1,), 1, 0, 0, 0, asdict(model.sampling))
    other = tmp_path / "other.png"
    other.write_bytes(png_file(Image.new("RGB", (8, 8)), settings, "1", "float32"))
    visitor.put_back(other)
    visitor.wait("was generated by the model 'other', not by argen")


def an_image(folder: Path) -> Path:
    levels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = folder / "an_upload.png"
    Image.fromarray(levels).resize((70, 50)).save(path)
    return path


def test_a_reconstruction_has_its_numbers(visitor: Visitor, model: LlamaGen, tmp_path: Path) -> None:
    path = an_image(tmp_path)
    visitor.tab("Reconstruct")
    visitor.upload(path, "reconstruct")
    visitor.start("reconstruct")
    status = visitor.wait("PSNR", "reconstruct")
    assert "8 × 8 pixels, 16 codes: PSNR" in status
    shown = visitor.page.locator("#reconstruct-results img").evaluate_all("all => all.map(each => each.src)")
    files = [visitor.context.request.get(source).body() if "data:" not in source else _data(source) for source in shown]
    original, reconstruction = pixels(files[0]).astype(float), model.reconstruct(path)
    assert np.array_equal(pixels(files[1]), reconstruction)
    psnr = 10 * np.log10(255**2 / np.mean((original - np.asarray(reconstruction)) ** 2))
    assert f"PSNR {psnr:.2f} dB" in status
    difference = np.clip(np.abs(original - np.asarray(reconstruction)) * 4, 0, 255)
    assert np.array_equal(pixels(files[2]), difference)
    different = len(model.encode(path).unique())
    assert f"4 × 4, {different} different of 32" in visitor.page.locator("#reconstruct-results").inner_text()


def _data(source: str) -> bytes:
    import base64

    return base64.b64decode(source.partition(",")[2])


def test_a_completion_is_that_of_python(visitor: Visitor, model: LlamaGen, tmp_path: Path) -> None:
    path = an_image(tmp_path)
    visitor.tab("Complete")
    visitor.upload(path, "complete")
    visitor.page.locator("#complete-cut").get_by_text("2 of 4 rows are kept").wait_for()
    visitor.fill("Rows to keep", 3, "complete")
    visitor.page.locator("#complete-cut").get_by_text("3 of 4 rows are kept").wait_for()
    visitor.choose("6", tab="complete")
    visitor.fill("Seed", 11, "complete")
    visitor.start("complete")
    visitor.wait("Finished 4 images", "complete")
    expected = model.complete(path, 3, 6, images_per_prompt=4, seed=11, progress=False)
    assert same(visitor.files("complete"), expected)


def test_three_people_at_once_get_their_own_images(browser: Browser, served: Served, model: LlamaGen) -> None:
    visitors = [Visitor(browser, served) for _ in range(3)]
    for number, visitor in enumerate(visitors):
        visitor.choose(str(number))
        visitor.fill("Seed", number)
    for visitor in visitors:
        visitor.page.locator("#generate-start").evaluate("button => button.click()")  # returns at once
    for number, visitor in enumerate(visitors):
        visitor.wait("Finished 4 images")
        expected = model.generate(number, images_per_prompt=4, seed=number, progress=False)
        assert same(visitor.files(), expected)
        visitor.close()


def test_the_page_is_usable_by_keyboard_alone(visitor: Visitor, model: LlamaGen) -> None:
    keyboard, focused = visitor.page.keyboard, "document.activeElement"

    def tab_to(condition: str) -> None:
        for _ in range(40):
            if visitor.page.evaluate(f"(() => {{ const at = {focused}; return {condition} }})()"):
                return
            keyboard.press("Tab")
        pytest.fail(f"the keyboard does not reach {condition}", pytrace=False)

    tab_to("at.getAttribute('role') === 'tab'")
    tab_to("at.getAttribute('aria-label') === 'Classes'")
    keyboard.type("7")
    keyboard.press("Enter")
    keyboard.press("Escape")
    tab_to("at.id === 'generate-start'")
    keyboard.press("Enter")
    visitor.wait("Finished 4 images")
    assert same(visitor.files(), model.generate(7, images_per_prompt=4, progress=False))
    tab_to("at.tagName === 'A' && at.hasAttribute('download')")
    with visitor.page.expect_download():
        keyboard.press("Enter")


UNLABELLED = """() => [...document.querySelectorAll('input, textarea, select, button, img, progress')]
  .filter(each => each.checkVisibility() && each.type !== 'file')
  .filter(each => !(each.labels?.length || each.getAttribute('aria-label') || each.innerText?.trim() || each.alt ||
                    each.title || each.getAttribute('aria-labelledby')))
  .map(each => each.outerHTML.slice(0, 200))"""


def test_a_phone_shows_everything_without_horizontal_scrolling(browser: Browser, served: Served) -> None:
    visitor = Visitor(browser, served, NARROW)
    visitor.choose("5")
    visitor.start()
    visitor.wait("Finished 4 images")
    for name in ("Generate", "Complete", "Reconstruct"):
        visitor.tab(name)
        visitor.page.locator(f"#{name.lower()}-start").wait_for()
        width = visitor.page.evaluate("document.documentElement.scrollWidth")
        assert width <= NARROW[0], name
        assert visitor.page.evaluate(UNLABELLED) == [], name
    visitor.close()
