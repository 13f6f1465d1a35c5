"""Dispatchers that end with their test, and the small model."""

import threading
from collections.abc import Callable, Iterator

import pytest

from llamagen import LlamaGen
from serving.engine.dispatcher import Dispatcher
from serving.engine.observer import Observer
from serving.engine.worker import WorkerSource
from tests.pipeline import Pipeline
from tests.serving.engine.scripted import ScriptedEngine

Start = Callable[..., Dispatcher]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts dispatchers. At the end nothing of them is left."""
    before, started = set(threading.enumerate()), list[Dispatcher]()

    def begin(*engines: ScriptedEngine | WorkerSource, queue: int = 16, observer: Observer | None = None) -> Dispatcher:
        sources = [_source(each) if isinstance(each, ScriptedEngine) else each for each in engines]
        started.append(Dispatcher(sources, queue=queue, observer=observer))
        return started[-1]

    yield begin
    for dispatcher in started:
        dispatcher.close()
    left = set(threading.enumerate()) - before
    assert {each.name for each in left} <= {"tqdm_monitor"}  # it serves all bars of a process


def _source(engine: ScriptedEngine) -> WorkerSource:
    return lambda: engine


@pytest.fixture(scope="package")
def model(pipeline: Pipeline) -> LlamaGen:
    """The small class model."""
    return LlamaGen.from_pretrained(pipeline.root / "argen", batch_size=4)
