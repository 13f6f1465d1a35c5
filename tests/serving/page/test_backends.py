"""The page on a model of its own, and on a server: the same images as in Python, bit for bit."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llamagen import LlamaGen
from serving.engine.dispatcher import Dispatcher
from serving.engine.facts import ModelFacts
from serving.engine.requests import RequestError
from serving.image_store import ImageStore
from serving.page.form import Form
from serving.page.generation import GenerationRequest
from serving.page.news import news
from serving.page.reconstruction import Reconstruction
from serving.page.remote import RemoteBackend
from serving.page.runs import Runs
from serving.page.uploads import read_upload, to_png
from serving.server.options import ServerOptions
from tests.serving.fake_backend import FakeBackend
from tests.serving.page.visitor import an_image, same
from tests.serving.running_server import running


@pytest.fixture(params=["local", "remote"])
def runs(request: pytest.FixtureRequest, backend: Dispatcher) -> Iterator[Runs]:
    if request.param == "local":
        yield Runs(backend, ImageStore())
        return
    with running(backend, ServerOptions(api_keys=("a-key",))) as server:
        remote = RemoteBackend(server.url, "a-key")
        yield Runs(remote, ImageStore())
        remote.close()


def files(runs: Runs, request: GenerationRequest) -> list[bytes]:
    """PNG files of a run, in the order of the images."""
    form = Form(runs.facts, "generation")
    updates = list(runs.run("me", "generate", form, request))
    assert f"Finished {request.count} images" in str(updates[-1].status)
    shown = [each.finished for each in updates if each.finished][-1]
    names = [part.partition(".png")[0] for part in shown.split('<img src="image/')[1:]]
    return [runs.store.get(name) or b"" for name in names]


def test_images_are_those_of_python(runs: Runs, model: LlamaGen, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"guidance_scale": 3.0, "top_k": 20, "temperature": 0.9, "guidance_steps": None}
    found = files(runs, GenerationRequest((3, 7, 1), 1, 5, settings))
    assert same(found, model.generate([3, 7, 1], seed=5, progress=False, **settings))
    with Image.open(io.BytesIO(found[1])) as image:
        assert '"index": 1' in image.info["llamagen"]
    upload = read_upload(str(an_image(tmp_path)), runs.facts)
    found = files(runs, GenerationRequest((3, 7), 2, 5, {"top_k": 20}, to_png(upload), 2))
    expected = model.complete(upload, 2, [3, 7], images_per_prompt=2, seed=5, top_k=20, progress=False)
    assert same(found, expected)
    *_, result = runs.reconstruct("me", "reconstruct", upload)
    assert isinstance(result, Reconstruction)
    assert np.array_equal(result.reconstruction, model.reconstruct(upload))
    assert np.array_equal(result.codes, model.encode(upload)[0])
    assert runs.facts == ModelFacts.from_model(model)


def test_who_stops_a_request_to_a_server_ends_it_there() -> None:
    fake = FakeBackend()
    fake.gate.clear()
    with running(fake) as server:
        remote = RemoteBackend(server.url)
        reader = news(remote, GenerationRequest((1, 2, 3), 1, 0).to_images(remote.facts))
        next(reader)
        while len(fake.tickets) < 3:
            next(reader)
        assert sorted(each.request.indices for each in fake.tickets) == [(0,), (1,), (2,)]  # type: ignore[union-attr]
        reader.close()  # type: ignore[attr-defined]
        assert all(ticket.ended.wait(30) for ticket in fake.tickets)  # although no row is completed
        remote.close()


def test_a_server_that_is_full_or_stops_is_a_sentence_and_the_next_request_works() -> None:
    fake = FakeBackend()
    with running(fake) as server:
        remote = RemoteBackend(server.url)
        request = GenerationRequest((1,), 2, 0).to_images(remote.facts)
        fake.refusals.append(RequestError("full", "64 images wait already", 2.0))
        with pytest.raises(RequestError, match="64 images wait already") as caught:
            list(news(remote, request))
        assert (caught.value.reason, caught.value.retry_after) == ("full", 2.0)
        fake.failures.append(RequestError("lost", "its worker died 3 times", 1.0))
        with pytest.raises(RequestError, match="its worker died 3 times") as caught:
            list(news(remote, request))
        assert caught.value.reason == "lost"
        assert [each for part in news(remote, request) for each in part.events]
        fake.gate.clear()
        first, second = news(remote, request), news(remote, request)
        next(first)
        while next(second).ahead != 2:
            pass
        fake.gate.set()
        assert list(first)[-1].events
        assert list(second)[-1].events
        assert remote.load().ready
        remote.close()
