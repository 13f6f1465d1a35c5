"""Settings of the whole test suite, and the folders that its worker processes share."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from llamagen.hub.published import PUBLISHED
from tests.hub.published_files import small_file
from tests.hub_server import HubServer
from tests.pipeline import CreatedOnce, Pipeline
from tests.text_pipeline import TextPipeline

# They need an environment of their own: `make test-vllm`.
collect_ignore = [] if "LLAMAGEN_VLLM" in os.environ else ["vllm"]


def pytest_configure() -> None:
    """Use one thread: faster for small tensors on shared cores, and sums have a fixed order."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of pytest that all its worker processes share."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache_home(shared_folder: Path) -> Iterator[None]:
    """Keep the user's cache untouched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared_folder / "cache"))
        yield


@pytest.fixture(scope="session")
def pipeline(shared_folder: Path) -> Pipeline:
    """A small run of the four commands, created once; tests only read it."""
    pipeline = Pipeline(shared_folder / "pipeline")
    _create_once(pipeline.root, pipeline.run)
    return pipeline


@pytest.fixture(scope="session")
def text_pipeline(pipeline: Pipeline, shared_folder: Path) -> TextPipeline:
    """A small run from captions to a trained text model, created once; tests only read it."""
    text_pipeline = TextPipeline(shared_folder / "text_pipeline", pipeline)
    _create_once(text_pipeline.root, text_pipeline.run)
    return text_pipeline


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    """The server of :func:`hub`."""
    server = HubServer()
    yield server
    server.stop()


@pytest.fixture
def hub(hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A local server instead of the Hugging Face Hub, empty, with an empty cache; see tests/hub_server.py."""
    hub_server.reset()
    home = tmp_path / "hub_home"
    hub_server.direct_here(home, monkeypatch)
    return hub_server


@pytest.fixture
def published_hub(hub: HubServer) -> HubServer:
    """The hub with a small model under each published name, see tests/hub/published_files.py."""
    for name in PUBLISHED:
        hub.add_published(name, small_file(name))
    return hub


@pytest.fixture(scope="session")
def created_once(shared_folder: Path) -> CreatedOnce:
    """Creates a folder by name, once for all worker processes; tests only read it."""

    def folder(name: str, create: Callable[[Path], object]) -> Path:
        _create_once(shared_folder / name, lambda: create(shared_folder / name))
        return shared_folder / name

    return folder


def _create_once(folder: Path, create: Callable[[], object]) -> None:
    """Create a folder in the first worker process that needs it; the others wait, or try again if that one failed."""
    done = folder.with_suffix(".done")
    with FileLock(folder.with_suffix(".lock"), timeout=120):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            create()
            done.touch()
