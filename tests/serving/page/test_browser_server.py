"""The page of a server in a real browser."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser

from llamagen import LlamaGen
from serving.engine.requests import RequestError
from serving.page.local import local_backend
from serving.page.remote import RemoteBackend
from tests.pipeline import Pipeline
from tests.serving.page.conftest import page_of
from tests.serving.page.visitor import Gate, Served, Visitor, an_image, pixels, same
from tests.serving.running_server import Running, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(pipeline: Pipeline) -> Iterator[Running]:
    with running(local_backend(str(pipeline.root / "argen"), batch_size=2)) as found:
        yield found


@pytest.fixture(scope="module")
def served(server: Running) -> Iterator[Served]:
    with page_of(RemoteBackend(server.url)) as found:
        yield found


def test_images_of_a_server_are_those_of_python(visitor: Visitor, model: LlamaGen, tmp_path: Path) -> None:
    visitor.choose("3", "7")
    visitor.fill("Seed", 5)
    visitor.fill("Guidance scale", 2.5)
    visitor.start()
    visitor.wait("Finished 8 images in")
    expected = model.generate([3, 7], images_per_prompt=4, seed=5, guidance_scale=2.5, progress=False)
    assert same(visitor.files(), expected)
    path = an_image(tmp_path)
    visitor.tab("Complete")
    visitor.upload(path, "complete")
    visitor.choose("6", tab="complete")
    visitor.start("complete")
    visitor.wait("Finished 4 images", "complete")
    assert same(visitor.files("complete"), model.complete(path, 2, 6, images_per_prompt=4, progress=False))
    visitor.tab("Reconstruct")
    visitor.upload(path, "reconstruct")
    visitor.start("reconstruct")
    visitor.wait("8 × 8 pixels, 16 codes: PSNR", "reconstruct")
    shown = visitor.page.locator("#reconstruct-results img").evaluate_all("all => all.map(each => each.src)")
    file = visitor.page.evaluate("url => fetch(url).then(r => r.bytes()).then(b => [...b])", shown[1])
    assert np.array_equal(pixels(bytes(file)), model.reconstruct(path))


def test_rows_of_a_server_appear_and_leaving_the_page_stops_them_there(
    browser: Browser, served: Served, gate: Gate, server: Running
) -> None:
    visitor = Visitor(browser, served)
    visitor.choose("4")
    visitor.start()
    assert gate.reached.wait(30)
    visitor.wait("row 1 of 4")
    visitor.page.locator("#generate-growing img").first.wait_for()
    visitor.close()
    assert served.backend.tickets[-1].cancelled.wait(30)
    gate.open.set()
    for _ in range(1000):
        if not server.backend.load().waiting + server.backend.load().running:
            return
        threading.Event().wait(0.02)
    pytest.fail("the server goes on with a request that nobody wants", pytrace=False)


def test_a_full_server_is_a_sentence_on_the_page(
    visitor: Visitor, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise RequestError("full", "64 images wait already; try again later", 1.0)

    visitor.choose("4")
    with monkeypatch.context() as patch:
        patch.setattr(server.backend, "submit", refuse)
        visitor.start()
        assert visitor.wait("images wait") == "64 images wait already; try again later."
    visitor.start()
    visitor.wait("Finished 4 images")
