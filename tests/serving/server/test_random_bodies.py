"""Random bodies, made from the server's own OpenAPI description, are never an error of the server."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from serving.server.app import build_app
from tests.serving.fake_backend import CLASS_FACTS, TEXT_FACTS, FakeBackend

POSTS = ("/v1/images/generations", "/v1/images/reconstructions")
TEXTS = st.text(st.sampled_from("aZ09 _-./\\\"'{}[]:,%\0\n\x7fäλ漢\U0001f600\ud800\u202e"), max_size=20)
"""Footgun: hypothesis would compute tables of all characters first, and write them to the current folder."""
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-20, 20).map(lambda exponent: 10 ** abs(exponent * 3) * (1 if exponent > 0 else -1)),
    st.floats(),
    TEXTS,
    st.sampled_from(["", "\0", "../../etc/passwd", "C:\\x", "%00", "ä" * 2000, "{}", "NaN", "0", "-1", "1e999"]),
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Valid values of the part of JSON Schema that the description uses."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    if "anyOf" in schema:
        return st.one_of([values_of(each) for each in schema["anyOf"]])
    bounds = schema.get("minimum"), schema.get("maximum")
    return {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(*bounds),
        "number": st.floats(*bounds, allow_nan=False, allow_infinity=False),
        "string": TEXTS,
    }[schema["type"]]


def bodies_of(schema: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Bodies: objects of valid and other values, also with other keys; and bytes that are nearly or not at all JSON."""
    fields = {name: values_of(each) for name, each in schema["properties"].items()}
    # Few fields are wrong at a time, so that the later checks are reached, too.
    valid = st.fixed_dictionaries(
        {"prompt": st.sampled_from([1, "goldfish"])},
        optional={name: each for name, each in fields.items() if name != "prompt"},
    )
    broken = st.tuples(valid, st.dictionaries(st.sampled_from(sorted(fields)), JSON_VALUES, max_size=2)).map(
        lambda pair: {**pair[0], **pair[1]}
    )
    foreign = st.dictionaries(st.one_of(TEXTS, st.sampled_from(sorted(fields))), JSON_VALUES, max_size=4)
    encoded = st.one_of(valid, broken, foreign, JSON_VALUES).map(lambda value: json.dumps(value).encode())
    cut = st.tuples(encoded, st.integers(0, 60), st.binary(max_size=4)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + len(parts[2]) :]
    )
    deep = st.tuples(st.sampled_from([b"[", b'{"a":', b'{"prompt":[']), st.integers(1, 5000)).map(
        lambda parts: parts[0] * parts[1]
    )
    return st.one_of(encoded, encoded, cut, deep, st.binary(max_size=50))


class Direct:
    """Calls the application without sockets, in an event loop that stays."""

    def __init__(self, backend: FakeBackend) -> None:
        self.runner = asyncio.Runner()
        # Errors of the server become responses, as over HTTP.
        transport = httpx.ASGITransport(build_app(backend), raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    def call(self, method: str, path: str, content: bytes = b"") -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return self.runner.run(self.client.request(method, path, content=content, headers=headers))


@pytest.fixture
def direct(request: pytest.FixtureRequest) -> Iterator[Direct]:
    backend = FakeBackend(request.param)
    direct = Direct(backend)
    yield direct
    direct.runner.close()
    backend.close()


def check_random_bodies(direct: Direct, count: int) -> None:
    description = direct.call("GET", "/openapi.json").json()
    schemas = {
        path: description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for path in POSTS
    }
    requests = st.one_of([st.tuples(st.just(path), bodies_of(schemas[path])) for path in POSTS])
    statuses: dict[int, int] = {}

    @seed(0)
    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(requests)
    def check(request: tuple[str, bytes]) -> None:
        response = direct.call("POST", *request)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        if response.status_code == 200:
            return
        assert response.status_code in (400, 404), (request, response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"], request
        assert 10 < len(error["message"]) < 700, request
        assert "Traceback" not in response.text
        assert "pydantic" not in response.text

    check()
    assert statuses[200] > count / 100  # the checks are passed, too
    assert statuses[400] > count / 5


@pytest.mark.parametrize("direct", [CLASS_FACTS], indirect=True, ids=["class"])
def test_random_bodies_get_a_4xx_with_one_sentence(direct: Direct) -> None:
    check_random_bodies(direct, 200)


BOTH = pytest.mark.parametrize("direct", [CLASS_FACTS, TEXT_FACTS], indirect=True, ids=["class", "text"])


@pytest.mark.slow
@BOTH
def test_ten_thousand_random_bodies_get_a_4xx_with_one_sentence(direct: Direct) -> None:
    check_random_bodies(direct, 5000)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("characters", [1_000_000, 30_000_000])
def test_a_prompt_of_a_million_characters_is_refused(direct: Direct, characters: int) -> None:
    content = json.dumps({"prompt": "a " * (characters // 2)}).encode()
    response = direct.call("POST", POSTS[0], content)
    assert response.status_code == 400
    assert f"({characters} characters); give" in response.json()["error"]["message"]
