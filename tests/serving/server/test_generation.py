"""Requests that succeed: what the backend is asked for, and what the client gets."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from llamagen.sampling import IMAGE_SETTINGS, SamplingConfig
from serving.engine.facts import ModelFacts
from serving.engine.requests import ImageRequest, ReconstructionRequest
from serving.image_settings import KEY
from serving.page.image_settings import read_settings
from tests.serving.fake_backend import CLASS_FACTS, TEXT_FACTS, TOKENIZER_FACTS, FakeBackend, fake_codes, fake_pixels
from tests.serving.running_server import Running, running

SETTINGS = SamplingConfig(guidance_scale=2.0, top_k=16)  # the model's


def pixels(item: dict[str, Any]) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) as image:
        return np.asarray(image)


def generate(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/images/generations", json=body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def test_images_of_a_request_have_its_class_seed_and_consecutive_indices(client: httpx.Client) -> None:
    content = generate(client, prompt="goldfish", n=3, seed=7, index=5)
    request = ImageRequest((5, 5, 5), (5, 6, 7), 7, SETTINGS)
    for position, item in enumerate(content["data"]):
        assert np.array_equal(pixels(item), fake_pixels(fake_codes(request, position)))
        assert (item["seed"], item["index"]) == (7, 5 + position)
    assert (content["size"], content["output_format"], content["background"]) == ("16x16", "png", "opaque")
    assert content["usage"] == {
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": 48,
        "total_tokens": 48,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", 4),
        ("guidance_schedule", "cosine"),
        ("guidance_start", 3),
        ("guidance_steps", 7),
        ("guidance_power", 2.5),
        ("temperature", 0.5),
        ("temperature", 0),
        ("top_k", 0),
        ("top_p", 0.9),
    ],
)
def test_each_setting_reaches_the_backend(client: httpx.Client, served: Running, name: str, value: Any) -> None:
    generate(client, prompt=1, **{name: value})
    assert served.backend.tickets[-1].request.settings == replace(SETTINGS, **{name: value})


def test_null_means_not_given_except_for_guidance_steps() -> None:
    facts = replace(CLASS_FACTS, sampling={**CLASS_FACTS.sampling, "guidance_steps": 9})
    with running(FakeBackend(facts)) as server, httpx.Client(base_url=server.url) as client:
        generate(client, prompt=1, top_k=None, n=None, size=None, image=None, stream=None)
        generate(client, prompt=1, guidance_steps=None)
        steps = [ticket.request.settings.guidance_steps for ticket in server.backend.tickets]
    assert steps == [9, None]


def test_without_a_seed_each_request_gets_another_one_which_is_reported(client: httpx.Client, served: Running) -> None:
    seeds = {generate(client, prompt=1)["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert served.backend.tickets[-1].request.seed in seeds


def test_a_text_model_takes_texts_as_they_are() -> None:
    with running(FakeBackend(TEXT_FACTS)) as server, httpx.Client(base_url=server.url) as client:
        generate(client, prompt=" a red fox\nin the snow, 3 Füchse ")
        assert server.backend.tickets[-1].request.conditions == (" a red fox\nin the snow, 3 Füchse ",)


def test_a_class_is_found_by_its_other_name() -> None:
    facts = replace(CLASS_FACTS, class_ids=tuple(f"n{number:08}" for number in range(10)))
    facts = ModelFacts.from_json(json.loads(json.dumps(facts.to_json())))
    with running(FakeBackend(facts)) as server, httpx.Client(base_url=server.url) as client:
        generate(client, prompt="n00000003")
        assert server.backend.tickets[-1].request.conditions == (3,)


def test_an_image_is_completed(client: httpx.Client, served: Running) -> None:
    file = b"a file"
    for text in (base64.b64encode(file).decode(), "data:image/png;base64," + base64.b64encode(file).decode()):
        content = generate(client, prompt=2, image=text, keep_rows=3, n=2, seed=1)
        request = served.backend.tickets[-1].request
        assert request == ImageRequest((2, 2), (0, 1), 1, SETTINGS, file, 3)
        assert (content["usage"]["input_tokens"], content["usage"]["output_tokens"]) == (24, 8)


def test_an_image_is_reconstructed_with_its_codes(client: httpx.Client, served: Running) -> None:
    body = {"image": base64.b64encode(b"a file").decode(), "model": "fake"}
    content = client.post("/v1/images/reconstructions", json=body).json()
    request = ReconstructionRequest(b"a file")
    assert served.backend.tickets[-1].request == request
    assert content["data"][0]["codes"] == fake_codes(request, 0).tolist()
    assert np.array_equal(pixels(content["data"][0]), fake_pixels(fake_codes(request, 0)))
    assert "seed" not in content["data"][0]
    assert (content["usage"]["input_tokens"], content["usage"]["output_tokens"]) == (16, 0)


def test_the_codes_of_a_tokenizer_are_counted() -> None:
    with running(FakeBackend(TOKENIZER_FACTS)) as server, httpx.Client(base_url=server.url) as client:
        content = client.post("/v1/images/reconstructions", json={"image": base64.b64encode(b"a file").decode()}).json()
    assert content["usage"]["total_tokens"] == 16


def test_png_files_hold_their_settings(client: httpx.Client, tmp_path: Path) -> None:
    item = generate(client, prompt="tench", n=2, seed=3, index=1, top_k=5)["data"][1]
    with Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) as image:
        text = json.loads(image.info[KEY])
    expected = {"model": "fake", "kind": "generation", "conditions": [4], "condition": "tench", "seed": 3, "index": 2}
    assert expected.items() <= text.items()
    assert text["images_per_prompt"] == 3  # the first request of the page that has image 2
    assert (text["settings"]["top_k"], text["settings"]["guidance_scale"]) == (5, 2.0)
    file = tmp_path / "image.png"  # the page puts it back
    file.write_bytes(base64.b64decode(item["b64_json"]))
    read = read_settings(file, CLASS_FACTS, "generation")
    assert (read.conditions, read.seed, read.index, read.images_per_prompt) == ((4,), 3, 2, 3)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_images_by_url_have_the_wanted_format(client: httpx.Client, output_format: str) -> None:
    content = generate(client, prompt=1, response_format="url", output_format=output_format)
    url = content["data"][0]["url"]
    response = client.get(url)
    assert response.headers["content-type"] == f"image/{output_format}"
    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.format, image.size) == (output_format.upper(), (16, 16))
    wrong = client.get(url.replace(f".{output_format}", ".gif"))
    assert wrong.status_code == 404


def test_compression_is_the_quality_of_the_file(client: httpx.Client) -> None:
    sizes = [
        len(generate(client, prompt=1, seed=0, output_format="jpeg", output_compression=quality)["data"][0]["b64_json"])
        for quality in (1, 100)
    ]
    assert sizes[0] < sizes[1]


def test_the_model_is_described(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [each["id"] for each in listed] == ["fake"]
    assert client.get("/v1/models/fake").json() == listed[0]
    assert listed[0]["llamagen"] == json.loads(json.dumps(CLASS_FACTS.to_json()))


def test_the_description_lists_every_field_and_our_errors(client: httpx.Client) -> None:
    description = client.get("/openapi.json").json()
    operation = description["paths"]["/v1/images/generations"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(IMAGE_SETTINGS) <= set(schema["properties"])
    assert "window" not in schema["properties"]  # a choice of the server
    assert schema["additionalProperties"] is False
    assert schema["properties"]["n"]["anyOf"][0]["maximum"] == 16
    assert schema["properties"]["seed"]["anyOf"][0]["maximum"] == 2**63 - 1
    assert schema["properties"]["size"]["enum"] == ["auto", None, "16x16"]
    assert {"400", "401", "413", "429", "503", "504"} <= set(operation["responses"])
    assert not any("422" in each["responses"] for path in description["paths"].values() for each in path.values())
    assert client.get("/docs").status_code == 404  # it would load scripts from elsewhere
