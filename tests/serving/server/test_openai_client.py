"""The official client of OpenAI talks to the server."""

import base64
import io
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from llamagen import LlamaGen
from serving.engine.dispatcher import Dispatcher
from serving.engine.embedded import EmbeddedEngine
from serving.engine.requests import ImageRequest
from serving.server.options import ServerOptions
from tests.pipeline import Pipeline
from tests.serving.fake_backend import CLASS_FACTS, fake_codes, fake_pixels
from tests.serving.running_server import Running, running


def pixels(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def api(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    request = ImageRequest((5, 5), (0, 1), 7, CLASS_FACTS.settings({"guidance_scale": 4.0}))
    return [fake_pixels(fake_codes(request, position)) for position in range(2)]


EXTRA = {"seed": 7, "guidance_scale": 4}


def test_it_lists_the_model(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["fake"]
    assert api.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError, match="this server has fake"):
        api.models.retrieve("dall-e-3")


def test_it_generates_images_in_base64(api: openai.OpenAI, expected: list[np.ndarray]) -> None:
    answer = api.images.generate(model="fake", prompt="goldfish", n=2, size="16x16", extra_body=EXTRA)  # type: ignore[call-overload]
    for item, wanted in zip(answer.data, expected, strict=True):
        assert np.array_equal(pixels(base64.b64decode(item.b64_json)), wanted)
    assert answer.usage.output_tokens == 32
    assert answer.data[1].seed == 7


def test_it_generates_images_by_url(api: openai.OpenAI, expected: list[np.ndarray]) -> None:
    answer = api.images.generate(prompt="goldfish", n=2, response_format="url", extra_body=EXTRA)
    assert answer.data is not None
    for item, wanted in zip(answer.data, expected, strict=True):
        assert np.array_equal(pixels(httpx.get(str(item.url)).content), wanted)


def test_it_streams_rows_and_images(api: openai.OpenAI, expected: list[np.ndarray]) -> None:
    found = list(api.images.generate(prompt="goldfish", stream=True, extra_body=EXTRA))
    assert isinstance(found[0], ImageGenPartialImageEvent)
    assert isinstance(found[-1], ImageGenCompletedEvent)
    assert np.array_equal(pixels(base64.b64decode(found[-1].b64_json)), expected[0])


def test_it_raises_its_own_errors(api: openai.OpenAI, served: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="there is no class 'goldfsh'; near it are 5") as caught:
        api.images.generate(prompt="goldfsh")
    assert (caught.value.param, caught.value.type) == ("prompt", "invalid_request_error")
    with running(options=ServerOptions(api_keys=("key",))) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert client.with_options(api_key="key").models.list().data


def test_pixels_are_those_of_the_model_in_process(pipeline: Pipeline) -> None:
    model = LlamaGen.from_pretrained(pipeline.root / "argen", batch_size=2)
    wanted = model.generate("7", images_per_prompt=3, seed=11, progress=False, guidance_scale=4.0)
    with running(Dispatcher(lambda: EmbeddedEngine(model))) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)
        extra = {"seed": 11, "guidance_scale": 4}
        answer = client.images.generate(prompt="7", n=2, extra_body=extra)
        stream = list(client.images.generate(prompt="7", stream=True, extra_body={**extra, "index": 2}))
        completion = client.images.generate(
            prompt="3", extra_body={"seed": 1, "image": answer.data[0].b64_json, "keep_rows": 2}
        )
        damaged = {"image": base64.b64encode(b"no image").decode(), "keep_rows": 2}
        with pytest.raises(openai.BadRequestError, match="not a readable JPEG, PNG or WebP image"):
            client.images.generate(prompt="3", extra_body=damaged)
        body = {"image": answer.data[0].b64_json}
        reconstruction = httpx.post(f"{server.url}/v1/images/reconstructions", json=body).json()["data"][0]
    found = [item.b64_json for item in answer.data] + [stream[-1].b64_json]
    for file, image in zip(found, wanted, strict=True):
        assert np.array_equal(pixels(base64.b64decode(file)), np.asarray(image))
    assert [event.row for event in stream[:-1]][-1] == 4
    completed = model.complete(wanted[0], 2, "3", seed=1, progress=False)
    assert np.array_equal(pixels(base64.b64decode(completion.data[0].b64_json)), np.asarray(completed))
    assert reconstruction["codes"] == model.encode(wanted[0])[0].tolist()
