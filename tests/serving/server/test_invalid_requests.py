"""Invalid requests: always a 4xx with one sentence that says what to give, in OpenAI's shape."""

import base64
import json
import sys
from typing import Any

import httpx
import pytest

from serving.server.fields import GenerationBody, ReconstructionBody, what_to_give
from serving.server.options import ServerOptions
from tests.serving.fake_backend import TEXT_FACTS, TOKENIZER_FACTS, FakeBackend
from tests.serving.running_server import Running, running

PATH = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}


def assert_error(response: httpx.Response, status: int, message: str = "", param: str | None = None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1000
    assert param is None or error["param"] == param


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": 1, **fields}


PNG = base64.b64encode(b"a file").decode()
WRONG_FIELDS = [
    ({}, "prompt", "the field prompt is missing; give a class name"),
    (body(prompt=None), "prompt", "prompt is null; give a class name"),
    (body(prompt=[1]), "prompt", "prompt is a list; give"),
    (body(prompt=True), "prompt", "prompt is true; give"),
    (body(prompt=1.0), "prompt", "prompt is 1.0; give"),
    (body(prompt=10), "prompt", "class 10 was requested, but the model has classes 0 to 9"),
    (body(prompt=-1), "prompt", "class -1 was requested"),
    (body(prompt=10**39), "prompt", "was requested, but the model has classes 0 to 9"),
    (body(prompt="goldfsh"), "prompt", "there is no class 'goldfsh'; near it are 5 (goldfish)"),
    (body(prompt="shark"), "prompt", "fits 2 classes: 6 (great white shark), 7 (tiger shark)"),
    (body(prompt=""), "prompt", "there is no class ''"),
    (body(prompt="\0"), "prompt", "there is no class '\\x00'"),
    (body(prompt="../../etc/passwd"), "prompt", "there is no class '../../etc/passwd'"),
    (body(prompt="a b " * 20), "prompt", "prompt has 80 characters; give the name"),
    (body(prompt="x" * 1_000_000), "prompt", "(1000000 characters); give"),
    (body(promt="x"), "promt", "there is no field 'promt'; did you mean prompt?"),
    (body(window=4), "window", "there is no field 'window'"),  # a choice of the server
    (body(**{"x\n\0": 1}), None, "there is no field 'x\\n\\x00'; the fields are model, "),
    (body(n=0), "n", "n is 0; give an integer from 1"),
    (body(n=17), "n", "n is 17; give an integer from 1 to 16"),
    (body(n="2"), "n", "n is '2'; give an integer"),
    (body(n=2.0), "n", "n is 2.0; give an integer"),
    (body(n=True), "n", "n is true; give an integer"),
    (body(size="1024x1024"), "size", "size is '1024x1024'; give auto or 16x16"),
    (body(seed=2**63), "seed", "give an integer of 64 bits"),
    (body(seed="7"), "seed", "seed is '7'; give an integer"),
    (body(index=-1), "index", "index is -1; give an integer from 0"),
    (body(index=2**31 - 1, n=2), "index", "give at most 2147483646 with n = 2"),
    (body(stream="true"), "stream", "stream is 'true'; give true or false"),
    (body(stream=True, response_format="url"), "response_format", "give response_format b64_json"),
    (body(partial_images=2), "partial_images", "needs a stream"),
    (body(response_format="file"), "response_format", "is 'file'; give b64_json or url"),
    (body(output_format="gif"), "output_format", "is 'gif'; give png, jpeg or webp"),
    (body(output_compression=50), "output_compression", "for jpeg and webp"),
    (body(quality="hd"), "quality", "quality is 'hd'; give auto"),
    (body(background="transparent"), "background", "give auto or opaque"),
    (body(style="vivid"), "style", "give natural"),
    (body(guidance_scale=-1), "guidance_scale", "guidance_scale is -1; give a number from 0 to 100"),
    (body(guidance_scale=10**30), "guidance_scale", "give a number from 0 to 100"),
    (body(guidance_scale="4"), "guidance_scale", "is '4'; give a number"),
    (body(guidance_schedule="sine"), "guidance_schedule", "give constant, linear, cosine or power_cosine"),
    (body(guidance_power=0), "guidance_power", "give a number from 0.01"),
    (body(temperature=1e-9), "temperature", "temperature is 1e-09; give 0, or a number from 0.001 to 10"),
    (body(top_k=-1), "top_k", "top_k is -1; give an integer from 0"),
    (body(top_p=0), "top_p", "top_p is 0; give a number from 0.0001 to 1"),
    (body(top_p={"a": []}), "top_p", "top_p is an object; give a number"),
    (body(keep_rows=1), "keep_rows", "needs an image"),
    (body(image=PNG), "keep_rows", "keep_rows is missing; give an integer from 0 to 4"),
    (body(image=PNG, keep_rows=5), "keep_rows", "keep_rows is 5; give an integer from 0 to 4"),
    (body(mask=PNG), "mask", "mask needs an image"),
    (body(image=PNG, mask=PNG, keep_rows=1), "keep_rows", "keep_rows cannot be combined with a mask"),
    (
        body(image=PNG, mask=PNG),
        "mask",
        "fake generates in raster order only here, so it cannot inpaint; give keep_rows",
    ),
    (body(image="???", keep_rows=1), "image", "image is not valid base64"),
    (body(image="ä", keep_rows=1), "image", "image is not valid base64"),
    (body(image="data:image/png;base64,", keep_rows=1), "image", "image is empty"),
    (body(image="/etc/passwd!", keep_rows=1), "image", "image is not valid base64"),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG_FIELDS, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named_with_what_to_give(
    client: httpx.Client, fields: dict[str, Any], param: str | None, message: str
) -> None:
    assert_error(client.post(PATH, json=fields), 400, message, param)


def test_an_unknown_model_is_not_found(client: httpx.Client) -> None:
    assert_error(client.post(PATH, json=body(model="gpt-image-1")), 404, "this server has fake", "model")
    assert_error(client.get("/v1/models/gpt-image-1"), 404, "this server has fake", "model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty; send a JSON object"),
        (b" \n", "the body is empty"),
        (b"{", "not valid JSON at character 1"),
        (b"\xff\xfe{}", "not valid UTF-8 at byte 0"),
        (b'{"prompt": "\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"prompt": "\\ud800"}', "prompt is '\\ud800'; give a class name"),
        (b'{"\\ud800": 1, "prompt": 1}', "there is no field '\\ud800'"),
        (b'{"prompt": 1, "prompt": 2}', "the field 'prompt' twice"),
        (b'{"prompt": 1, "top_p": NaN}', "holds NaN, which is not a number"),
        (b'{"prompt": 1, "top_p": -Infinity}', "holds -Infinity"),
        (b'{"prompt": 1, "top_p": 1e999}', "top_p is inf; give a number"),
        (b'{"prompt": 1, "seed": ' + b"9" * 5000 + b"}", "a number of 5000 digits; send at most 40"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 4000, ""),  # its message depends on Python's limit
        (b'{"a": [' + b"[]," * 2500 + b"1]}", "the body has too many values"),
        (b"{" + b'"a": 1, ' * 6000 + b'"prompt": 1}', "the body has too many values"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "prompt is a list; give"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"\0\0\0", "not valid JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_that_is_not_a_plain_json_object_is_refused(client: httpx.Client, content: bytes, message: str) -> None:
    assert_error(client.post(PATH, content=content, headers=JSON), 400, message)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_content_types_are_refused(client: httpx.Client, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    assert_error(client.post(PATH, content=b'{"prompt": 1}', headers=headers), 415, "Content-Type: application/json")


def test_compressed_bodies_are_refused(client: httpx.Client) -> None:
    headers = {**JSON, "Content-Encoding": "gzip"}
    assert_error(client.post(PATH, content=b"x", headers=headers), 415, "send it without one")


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/", 404, "there is nothing at '/'"),
        ("GET", "/v1/images/generations/", 404, "there is nothing at"),
        ("GET", "/images/../../etc/passwd", 404, "there is nothing at"),
        ("GET", "/images/%2e%2e%2f%00%ff", 404, ""),
        ("GET", "/images/x.png", 404, "not kept any more"),
        ("GET", "/" + "x" * 9000, 404, "there is nothing at"),
        ("GET", PATH, 405, "does not take GET; it takes POST"),
        ("DELETE", "/v1/models", 405, "does not take DELETE; it takes GET"),
        ("OPTIONS", PATH, 405, "does not take OPTIONS"),
    ],
)
def test_other_paths_and_methods_get_the_same_shape(
    client: httpx.Client, method: str, path: str, status: int, message: str
) -> None:
    assert_error(client.request(method, path), status, message)


def test_the_kind_of_the_model_decides_what_a_prompt_is() -> None:
    with running(FakeBackend(TEXT_FACTS)) as server, httpx.Client(base_url=server.url) as client:
        assert_error(client.post(PATH, json={"prompt": 207}), 400, "this model generates images of texts", "prompt")
        assert_error(client.post(PATH, json={"prompt": " \n"}), 400, "prompt is empty", "prompt")
        assert_error(client.post(PATH, json={"prompt": "a\0b"}), 400, "control characters", "prompt")
        assert_error(client.post(PATH, json={"prompt": "x" * 1001}), 400, "(1001 characters)", "prompt")
    with running(FakeBackend(TOKENIZER_FACTS)) as server, httpx.Client(base_url=server.url) as client:
        assert_error(client.post(PATH, json={"prompt": 1}), 400, "is a tokenizer, which generates no images", "model")
        assert client.post("/v1/images/reconstructions", json={"image": PNG}).status_code == 200


def test_a_server_of_several_processes_keeps_no_images() -> None:
    with running(options=ServerOptions(has_urls=False)) as server, httpx.Client(base_url=server.url) as client:
        assert_error(client.post(PATH, json=body(response_format="url")), 400, "stores no images", "response_format")


def test_a_bug_shows_no_traceback_to_the_client(served: Running, client: httpx.Client) -> None:
    served.backend.refusals.append(ZeroDivisionError("secret"))
    response = client.post(PATH, json=body())
    assert_error(response, 500, "the server failed; its log has the reason")
    assert "secret" not in response.text


@pytest.mark.parametrize("kind", [GenerationBody, ReconstructionBody])
def test_every_field_says_what_to_give(kind: Any) -> None:
    for name, field in kind.model_fields.items():
        what, _, meaning = str(field.description).partition(": ")
        assert what == what_to_give(kind, name)
        assert all((what, meaning)), name


def test_huge_integers_can_be_printed_in_messages() -> None:
    assert sys.get_int_max_str_digits() > 40
    assert json.loads("1" * 40)
