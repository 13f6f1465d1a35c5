"""A server with a backend without a model, shared by the tests of a module."""

from collections.abc import Iterator

import httpx
import pytest

from tests.serving.running_server import Running, running


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture
def client(served: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=30) as client:
        yield client
