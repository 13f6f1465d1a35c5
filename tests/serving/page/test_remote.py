"""A server as the backend of the page: what is sent, and each way in which a server may fail."""

import asyncio
import base64
import io
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.engine.requests import Ended, Event, Finished, ImageRequest, ReconstructionRequest, Request, Rows
from serving.page.event_stream import ServerEvent, server_events
from serving.page.remote import GENERATIONS, MODELS, READY, RECONSTRUCTIONS, RemoteBackend, split
from tests.datamodules.shard_files import assert_one_line
from tests.serving.fake_backend import CLASS_FACTS
from tests.serving.page.scripted_server import EVENTS, JSON, Answer, ScriptedServer, events, models

PIXELS = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
SETTINGS = CLASS_FACTS.settings({"top_k": 7})


def png() -> str:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


ROW = (
    "image_generation.partial_image",
    {"image_index": 0, "row": 1, "rows": 4, "b64_json": base64.b64encode(b"jpeg").decode()},
)
ROW_ALONE = ("image_generation.partial_image", {"image_index": 0, "row": 2, "rows": 4})
COMPLETED = ("image_generation.completed", {"image_index": 0, "b64_json": png()})
GOOD = Answer(200, events(ROW, ROW_ALONE, COMPLETED), EVENTS)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer({MODELS: models(CLASS_FACTS), GENERATIONS: GOOD})
    yield server
    server.stop()


@pytest.fixture
def backend(server: ScriptedServer) -> Iterator[RemoteBackend]:
    backend = RemoteBackend(f"{server.address}/v1/", "a key")
    yield backend
    backend.close()


def request(count: int = 1) -> ImageRequest:
    return ImageRequest(tuple(range(3, 3 + count)), tuple(range(count)), 5, SETTINGS, previews=True)


def answer(backend: RemoteBackend, request: Request) -> list[Event]:
    """All events of a request."""
    queue: SimpleQueue[Event] = SimpleQueue()
    backend.submit(request, queue.put)
    found = [queue.get(timeout=30)]
    while not isinstance(found[-1], Ended):
        found.append(queue.get(timeout=30))
    return found


def refusal(backend: RemoteBackend, wanted: Request | None = None) -> tuple[str, str, float | None]:
    """Reason, message and seconds of the error that ends a request."""
    end = answer(backend, wanted or request())[-1]
    assert isinstance(end, Ended)
    assert end.error is not None
    return end.error.reason, end.error.message, end.error.retry_after


def test_each_condition_is_a_request_with_all_settings(server: ScriptedServer, backend: RemoteBackend) -> None:
    assert backend.facts == CLASS_FACTS
    found = answer(backend, request(2))
    rows = [each for each in found if isinstance(each, Rows) and each.images == (0,)]
    assert rows[:2] == [Rows((0,), 1, 4, (b"jpeg",)), Rows((0,), 2, 4)]
    finished = [each for each in found if isinstance(each, Finished)]
    assert sorted(each.image for each in finished) == [0, 1]
    assert all(np.array_equal(each.pixels, PIXELS) for each in finished)
    assert found[-1] == Ended()
    bodies = [body for path, _, body in server.requests if path == GENERATIONS]
    bodies.sort(key=lambda body: body["index"])  # the requests are sent at the same time
    assert [(body["prompt"], body["index"], body["n"], body["seed"]) for body in bodies] == [(3, 0, 1, 5), (4, 1, 1, 5)]
    assert (bodies[0]["model"], bodies[0]["top_k"], bodies[0]["output_format"]) == ("fake", 7, "png")
    assert bodies[0]["guidance_steps"] is None  # all codes, and not the server's default
    assert "image" not in bodies[0]
    assert all(headers["Authorization"] == "Bearer a key" for _, headers, _ in server.requests)
    completion = replace(request(), image=b"file", keep_rows=2, settings=replace(SETTINGS, guidance_steps=3))
    answer(backend, completion)
    body = server.requests[-1][2]
    assert (body["image"], body["keep_rows"]) == (base64.b64encode(b"file").decode(), 2)
    assert body["guidance_steps"] == 3


def test_images_of_one_condition_share_a_request_up_to_the_limit_of_the_server() -> None:
    wanted = replace(request(), conditions=(1, 1, 1, 2, 2, 2, 2), indices=(0, 1, 2, 3, 4, 6, 7))
    assert split(wanted, 2) == [range(0, 2), range(2, 3), range(3, 5), range(5, 7)]
    assert split(wanted, 9) == [range(0, 3), range(3, 5), range(5, 7)]


def test_a_reconstruction_has_pixels_and_codes(server: ScriptedServer, backend: RemoteBackend) -> None:
    values = f'{{"data": [{{"b64_json": "{png()}", "codes": [[1, 2], [3, 4]]}}]}}'
    server.answers[RECONSTRUCTIONS] = Answer(200, values.encode())
    finished, end = answer(backend, ReconstructionRequest(b"file"))
    assert isinstance(finished, Finished)
    assert np.array_equal(finished.pixels, PIXELS)
    assert finished.codes.tolist() == [[1, 2], [3, 4]]
    assert end == Ended()
    server.answers[RECONSTRUCTIONS] = Answer(200, b'{"data": []}')
    assert refusal(backend, ReconstructionRequest(b"file"))[0] == "failed"


def error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def json_of(message: str, code: str | None = None) -> bytes:
    import json

    return json.dumps(error(message, code)).encode()


UNKNOWN = "the server of this page gave an answer that the page does not understand; their versions may differ"
LOST = "the connection to the server of this page was lost; try again"
HTML = b"<html>Bad gateway</html>"
BROKEN: list[tuple[Answer, tuple[str, str, float | None]]] = [
    (Answer(429, json_of("64 images wait", "full"), JSON, {"Retry-After": "3"}), ("full", "64 images wait", 3.0)),
    (Answer(400, json_of("top_k is -1;\n give  more.", None)), ("invalid", "top_k is -1; give more", None)),
    (Answer(503, json_of("it stops", "stopping")), ("stopping", "it stops", None)),
    (Answer(503, json_of("x", ["code"]), JSON, {"Retry-After": "soon"}), ("lost", "x", None)),  # type: ignore[arg-type]
    (
        Answer(401, json_of("no key")),
        ("failed", "the server does not accept the API key of this page; its owner has to change it", None),
    ),
    (
        Answer(502, HTML, "text/html"),
        ("lost", "the server of this page is not available (status 502); try again later", None),
    ),
    (Answer(200, HTML, "text/html"), ("failed", UNKNOWN, None)),
    (Answer(200, b"[" * 100_000, EVENTS), ("lost", LOST, None)),
    (Answer(200, events(ROW), EVENTS), ("lost", LOST, None)),
    (Answer(200, events(ROW, ("error", error("it died", "lost"))), EVENTS), ("lost", "it died", None)),
    (Answer(200, events(("error", "broken")), EVENTS), ("failed", UNKNOWN, None)),
    (Answer(200, events(("image_generation.completed", {})), EVENTS), ("failed", UNKNOWN, None)),
    (
        Answer(200, events(("image_generation.completed", {**COMPLETED[1], "b64_json": "AAAA"})), EVENTS),
        ("failed", UNKNOWN, None),
    ),
    (
        Answer(200, events(("image_generation.completed", {**COMPLETED[1], "image_index": 1})), EVENTS),
        ("failed", UNKNOWN, None),
    ),
    (Answer(200, events(("image_generation.completed", "[" * 100_000)), EVENTS), ("failed", UNKNOWN, None)),
    (Answer(200, b"event: x\ndata: \xff\n\n", EVENTS), ("failed", UNKNOWN, None)),
    (Answer(200, b"x", EVENTS, {"Content-Encoding": "gzip"}), ("lost", LOST, None)),
]


@pytest.mark.parametrize(("broken", "expected"), BROKEN, ids=range(len(BROKEN)))
def test_a_server_that_fails_is_a_sentence_and_is_used_again(
    server: ScriptedServer,
    backend: RemoteBackend,
    broken: Answer,
    expected: tuple[str, str, float | None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    server.answers[GENERATIONS] = broken
    assert refusal(backend) == expected
    server.answers[GENERATIONS] = GOOD
    assert answer(backend, request())[-1] == Ended()


def test_a_server_that_is_away_is_a_sentence_and_is_used_when_it_is_back(
    server: ScriptedServer, backend: RemoteBackend
) -> None:
    assert not backend.load().ready  # it has no such page
    server.stop()
    assert refusal(backend, request(3))[:2] == ("lost", "the server of this page cannot be reached; try again later")
    assert not backend.load().ready
    again = ScriptedServer(server.answers, server.port)
    assert answer(backend, request(3))[-1] == Ended()
    again.stop()


def test_the_load_is_that_of_the_server(server: ScriptedServer, backend: RemoteBackend) -> None:
    values = b'{"ready": true, "waiting": 3, "running": 2, "workers": 1, "images_per_second": 0.5}'
    server.answers[READY] = Answer(200, values)
    assert (backend.load().ready, backend.load().waiting, backend.load().images_per_second) == (True, 3, 0.5)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Answer(401, b"{}"), "needs an API key; give its key with --api-key-file, or in LLAMAGEN_API_KEY"),
        (Answer(404, HTML), "is not a server of this project"),
        (Answer(200, HTML), "is not a server of this project"),
        (Answer(200, b'{"data": [{"id": "gpt"}]}'), "is not a server of this project"),
        (Answer(200, b'{"data": [{"llamagen": {"name": "x"}}]}'), "is not a server of this project"),
        (Answer(200, b"[1]"), "is not a server of this project"),
    ],
)
def test_another_program_is_refused_at_the_start(server: ScriptedServer, found: Answer, message: str) -> None:
    server.answers[MODELS] = found
    with pytest.raises(ValueError, match=message) as caught:
        RemoteBackend(server.address)
    assert_one_line(caught)


def test_a_wrong_key_is_told_from_a_missing_one(server: ScriptedServer) -> None:
    server.answers[MODELS] = Answer(401, b"{}")
    with pytest.raises(ValueError, match="does not accept this API key; give its key with --api-key-file"):
        RemoteBackend(server.address, "wrong")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "give one such as http://127.0.0.1:8000"),
        ("ftp://a", "is not the address of a server"),
        ("http://", "is not the address of a server"),
        ("http://a:b", "is not an address"),
        ("http://127.0.0.1:1", "cannot be reached .*; start it with python -m serving.server MODEL"),
    ],
)
def test_a_wrong_address_is_one_line(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RemoteBackend(url)
    assert_one_line(caught)


def test_events_are_parsed_wherever_the_connection_cuts_them() -> None:
    text = (
        ': comment\nevent: a\r\ndata: {"x":\ndata:  "é\u2028"}\r\n\r\ndata: b\n\nevent: c\n\ndata: unfinished'.encode()
    )
    expected = [ServerEvent("", "comment"), ServerEvent("a", '{"x":\n "é\u2028"}'), ServerEvent("message", "b")]

    async def parsed(size: int) -> list[ServerEvent]:
        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(text), size):
                yield text[start : start + size]

        return [each async for each in server_events(chunks())]

    for size in (1, 2, 3, 1000):
        assert asyncio.run(parsed(size)) == expected
