"""Models of the page's tests, and the page in a browser.

The server and the browser end with each module: the browser's event loop must not run during other tests.
"""

import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser
from torch import Tensor

from llamagen import LlamaGen
from serving.engine.previews import GrowingImages, PreviewBudget
from serving.image_store import ImageStore
from serving.page.runs import Runs
from serving.page.worker import Worker
from tests.pipeline import Pipeline
from tests.serving.page.chromium import chromium
from tests.serving.page.visitor import Gate, Served, Visitor


@pytest.fixture(scope="package")
def model(pipeline: Pipeline) -> LlamaGen:
    """The small class model, with small batches, as on the page."""
    return LlamaGen.from_pretrained(pipeline.root / "argen", batch_size=2)


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A thread for the model."""
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def served(pipeline: Pipeline) -> Iterator[Served]:
    from serving.page.app import build_app, build_server, listen, upload_folder

    worker = Worker()
    runs = Runs(LlamaGen.from_pretrained(pipeline.root / "argen", batch_size=2), worker, ImageStore())
    connection = listen("127.0.0.1", 0)
    with upload_folder():
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


@pytest.fixture
def visitor(browser: Browser, served: Served) -> Iterator[Visitor]:
    visitor = Visitor(browser, served)
    yield visitor
    visitor.close()


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
