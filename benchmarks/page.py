"""How long the page takes: from the command to the page, and from a click to the first rows of an image.

The page of each model is started several times as a new process, and a headless Chromium presses Generate. The GPT-B
has random weights in the published layout. Needs the extra ``benchmark`` and the browser (Debian: ``chromium``).

    make quickstart
    python -m benchmarks.page --out benchmarks/results/page.json
    python -m benchmarks.page --screenshots docs/images      # instead: images of the quickstart's page
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Browser, Page, sync_playwright
from tqdm import tqdm

from benchmarks.readme_stand_ins import save_weights
from benchmarks.timing import machine, spread
from llamagen.files import atomic_file
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "runs/quickstart"
IMAGES = 4
WIDTHS = {1280: 1080, 390: 1500}
"""Width and height of the screenshots."""


@contextmanager
def served(source: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Address of the page of a model, and the seconds of its start: of each stage, and in total."""
    command = [sys.executable, "-m", "serving.page", str(source), "--port", "0"]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        seconds, lines = {}, []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if address := re.match(r"Open (http://\S+)", line):
                seconds["command to page"] = time.perf_counter() - start
                yield address[1], seconds
                return
            if stage := re.match(r"(\w+).*: ([0-9.]+) s$", line):
                seconds[f"stage {stage[1]}"] = float(stage[2])
        raise ValueError(f"{' '.join(command)} ended: {''.join(lines)[-500:]}")
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def browser() -> Iterator[Browser]:
    """Debian's Chromium, without a window."""
    path = shutil.which("chromium")
    if path is None:
        raise ValueError("there is no chromium; install it with apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield found
        found.close()


def open_page(page: Page, address: str) -> None:
    """Open the page and wait for its controls."""
    page.goto(address)
    page.locator("#generate-start").wait_for()


def choose_classes(page: Page, texts: list[str]) -> None:
    """Type each text and choose the first class that it finds."""
    field = page.get_by_label("Classes").first
    for text in texts:
        field.click()
        page.keyboard.type(text)
        page.keyboard.press("Enter")
    page.keyboard.press("Escape")


WATCH = """() => new Promise(resolve => {
  const start = performance.now(), times = {};
  const look = () => {
    const now = (performance.now() - start) / 1000;
    if (document.querySelector("#generate-growing img, #generate-finished img")) times.first ??= now;
    if (document.querySelector("#generate-status")?.innerText.includes("Finished")) resolve({...times, all: now});
  };
  new MutationObserver(look).observe(document.body, {childList: true, subtree: true});
  document.querySelector("#generate-start").click();
})"""
"""Presses Generate and watches the page from inside: a small model's rows are replaced within milliseconds."""


def click_times(page: Page) -> dict[str, float]:
    """Press Generate: seconds until the first rows, and until all images."""
    page.set_default_timeout(300_000)
    times = page.evaluate(WATCH)
    return {"click to first rows": times["first"], f"click to {IMAGES} images": times["all"]}


def measure(source: Path, chromium: Browser, rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles in seconds of the start and of the first click after it."""
    found: dict[str, list[float]] = {}
    for _ in tqdm(range(rounds), desc=source.stem, unit="start"):
        with served(source) as (address, seconds):
            page = chromium.new_page()
            start = time.perf_counter()
            open_page(page, address)
            seconds["opening it in the browser"] = time.perf_counter() - start
            choose_classes(page, ["3"])
            seconds |= click_times(page)
            page.close()
        for name, value in seconds.items():
            found.setdefault(name, []).append(value)
    return {name: spread(values) for name, values in found.items()}


def take_screenshots(folder: Path) -> None:
    """The tab Generate of the quickstart's page with finished images, in each of :data:`WIDTHS`."""
    with served(QUICKSTART) as (address, _), browser() as chromium:
        for width, height in WIDTHS.items():
            page = chromium.new_page(viewport={"width": width, "height": height})
            open_page(page, address)
            choose_classes(page, list("2357"))
            page.get_by_label("Seed").first.fill("21")
            page.locator("#generate-start").click()
            page.locator("#generate-status >> text=Finished").wait_for(timeout=120_000)
            page.wait_for_timeout(500)  # until the focus ring and transitions have gone
            with atomic_file(folder / f"page_{width}.png") as temporary:
                page.screenshot(path=temporary, type="png")
            page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="starts of each page")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="write the record here, as JSON")
    action.add_argument("--screenshots", type=Path, help="write screenshots into this folder, and measure nothing")
    options = parser.parse_args()
    if not QUICKSTART.exists():
        raise ValueError(f"{QUICKSTART} does not exist; run make quickstart first")
    if options.screenshots is not None:
        take_screenshots(options.screenshots)
        return
    with tempfile.TemporaryDirectory() as name, browser() as chromium:
        torch.manual_seed(0)
        published = Path(name) / "c2i_B_384.pt"
        save_weights(published, GPT(GPTConfig(dim=768, n_layer=12, n_head=12, block_size=576)))
        save_weights(Path(name) / "vq_ds16_c2i.pt", VQGAN(VQGANConfig()))
        seconds: dict[str, Any] = {}
        for title, source in {"runs/quickstart": QUICKSTART, "c2i_B_384, random weights": published}.items():
            seconds[title] = measure(source, chromium, options.rounds)
    record = {
        "benchmark": "page",
        "hardware": machine("cpu"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": f"python -m benchmarks.page --rounds {options.rounds} --out {options.out}",
        "seconds": seconds,
    }
    for title, times in seconds.items():
        for each, values in times.items():
            print(f"{title:>28} | {each:<28} | {values['median']:6.2f} s ({values['q1']:.2f} to {values['q3']:.2f})")
    with atomic_file(options.out) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
