"""Streams of rows: events, cancellation when the client leaves, and slow readers."""

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from serving.engine.requests import Ended, Finished, ReconstructionRequest, RequestError, Rows
from serving.server import answers
from serving.server.generation import Order
from serving.server.progress import Grown, News, Progress
from tests.serving.fake_backend import CLASS_FACTS, GRID, PREVIEW, FakeBackend, FakeTicket
from tests.serving.running_server import Running, running, send, until
from tests.serving.server.test_invalid_requests import PATH, assert_error


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


class StepBackend(FakeBackend):
    """Reports one row, of the first image, for each call of ``step``."""

    def step(self, row: int) -> None:
        self.tickets[-1].listener(Rows((0,), row, GRID, (PREVIEW,) if self.tickets[-1].request.previews else None))


def test_rows_and_finished_images_are_sent_as_they_come() -> None:
    backend = StepBackend()
    with running(backend) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        backend.gate.clear()
        body = {"prompt": 1, "n": 2, "seed": 3, "stream": True}
        with client.stream("POST", PATH, json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            received = events(response)
            for row in (1, 2):
                backend.step(row)
                name, event = next(received)
                assert (name, event["type"]) == ("image_generation.partial_image",) * 2
                assert (event["image_index"], event["row"], event["rows"]) == (0, row, GRID)
                assert event["partial_image_index"] == row - 1
                assert base64.b64decode(event["b64_json"]) == PREVIEW
                assert event["output_format"] == "jpeg"
            backend.gate.set()
            rest = list(received)
        completed = [event for name, event in rest if name == "image_generation.completed"]
    assert [(event["image_index"], event["seed"], event["index"]) for event in completed] == [(0, 3, 0), (1, 3, 1)]
    whole = httpx.post  # the images of a stream are those of a plain request
    with running() as server:
        data = whole(f"{server.url}{PATH}", json={**body, "stream": False}).json()["data"]
    assert [event["b64_json"] for event in completed] == [item["b64_json"] for item in data]


@pytest.mark.parametrize(("partial_images", "rows"), [(0, []), (1, [2]), (3, [1, 2, 3])])
def test_a_client_can_limit_the_previews(partial_images: int, rows: list[int]) -> None:
    backend = StepBackend()
    with running(backend) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        backend.gate.clear()
        body = {"prompt": 1, "stream": True, "partial_images": partial_images}
        with client.stream("POST", PATH, json=body) as response:
            received = events(response)
            found = []
            for row in range(1, GRID):
                backend.step(row)
                if row in rows:
                    found.append(next(received)[1]["row"])
            backend.tickets[-1].listener(Ended())
            assert list(received) == []
    assert found == rows


def test_an_error_ends_a_stream_as_an_event() -> None:
    with running() as server, httpx.Client(base_url=server.url, timeout=30) as client:
        server.backend.failures.append(RequestError("lost", "the worker died", 2.0))
        with client.stream("POST", PATH, json={"prompt": 1, "stream": True}) as response:
            name, last = list(events(response))[-1]
        assert (name, last["error"]["message"], last["error"]["code"]) == ("error", "the worker died", "lost")
        server.backend.refusals.append(RequestError("full", "wait", 2.0))
        assert_error(client.post(PATH, json={"prompt": 1, "stream": True}), 429, "wait")


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_cancelled_when_its_client_leaves(stream: bool) -> None:
    with running() as server:
        server.backend.gate.clear()
        send(server, {"prompt": 1, "stream": stream}).close()
        [ticket] = server.backend.tickets
        assert ticket.ended.wait(30)
        assert ticket.cancelled.is_set()
        until(lambda: not server.server.server_state.tasks)
        assert server.backend.load().waiting == 0


def test_a_client_that_leaves_while_it_sends_its_body_leaves_nothing_behind(served: Running) -> None:
    def half_a_body() -> Iterator[bytes]:
        yield b'{"prompt": '
        raise ConnectionError

    before = len(served.backend.tickets)
    with pytest.raises(ConnectionError):
        httpx.post(f"{served.url}{PATH}", content=half_a_body(), headers={"Content-Type": "application/json"})
    until(lambda: not served.server.server_state.tasks)
    assert len(served.backend.tickets) == before


def test_nothing_accumulates_for_a_slow_reader() -> None:
    async def read() -> tuple[int, int, int]:
        progress = Progress()
        await asyncio.to_thread(report, progress)
        news = await progress.take()
        return len(news.grown), news.grown[0].row, len(news.finished)

    def report(progress: Progress) -> None:
        for row in range(1000):
            progress(Rows((0, 1), row, 1000, (b"one", b"two")))
        progress(Finished(0, np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.int64)))

    assert asyncio.run(read()) == (2, 999, 1)


def test_a_preview_that_was_not_sent_yet_stays_when_rows_without_one_follow() -> None:
    async def read() -> list[tuple[int, bytes | None]]:
        progress = Progress()
        found = []
        for previews in ((b"one",), None):
            progress(Rows((0,), 1, 9, previews))
        progress(Rows((0,), 2, 9))
        for _ in range(2):
            news = await progress.take()
            found.append((news.grown[0].row, news.grown[0].preview))
            progress(Rows((0,), 3, 9))
        return found

    assert asyncio.run(read()) == [(2, b"one"), (3, None)]


def test_events_after_the_end_of_the_event_loop_are_harmless() -> None:
    async def build() -> Progress:
        return Progress()

    asyncio.run(build())(Ended())


def test_a_stream_without_news_sends_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.server.answers.HEARTBEAT", 0.01)
    with running() as server, httpx.Client(base_url=server.url, timeout=30) as client:
        server.backend.gate.clear()
        with client.stream("POST", PATH, json={"prompt": 1, "stream": True}) as response:
            assert next(response.iter_lines()) == ": waiting"


def test_a_client_that_wants_no_rows_gets_comments_while_they_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Growing(Progress):
        async def take(self, seconds: float | None = None) -> News:
            nonlocal now
            now += 10.0
            return News({0: Grown(1, GRID, None)}, ended=Ended() if now > 60 else None)

    async def read() -> list[bytes]:
        request = ReconstructionRequest(b"")
        answer = answers.Answer(Order(request, partial_images=0, stream=True), CLASS_FACTS, lambda *file: "")
        ticket = FakeTicket(request, lambda event: None, None)
        return [event async for event in answer.events(Growing(), ticket)]

    monkeypatch.setattr(answers.time, "monotonic", lambda: now)
    events = asyncio.run(read())
    monkeypatch.undo()
    assert events == [b": waiting\n\n"] * 3  # after 20, 40 and 60 seconds
