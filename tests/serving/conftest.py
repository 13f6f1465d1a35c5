"""Models of the page's tests."""

from collections.abc import Iterator

import pytest

from llamagen import LlamaGen
from serving.worker import Worker
from tests.pipeline import Pipeline


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
