"""Settings of the whole test suite."""

from collections.abc import Iterator

import pytest
import torch

from tests.pipeline import Pipeline
from tests.text_pipeline import TextPipeline


def pytest_configure() -> None:
    """Use one thread: faster for small tensors on shared cores, and sums have a fixed order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache untouched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A small run of the four commands, created once; tests only read it."""
    pipeline = Pipeline(tmp_path_factory.mktemp("pipeline"))
    pipeline.run()
    return pipeline


@pytest.fixture(scope="session")
def text_pipeline(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> TextPipeline:
    """A small run from captions to a trained text model, created once; tests only read it."""
    text_pipeline = TextPipeline(tmp_path_factory.mktemp("text_pipeline"), pipeline)
    text_pipeline.run()
    return text_pipeline
