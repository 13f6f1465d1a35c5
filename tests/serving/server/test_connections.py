"""Slow, silent and broken clients on real sockets."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import cast

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from serving.server.connections import LimitedProtocol
from serving.server.options import ServerOptions
from tests.serving.running_server import Running, running, until

POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    """A server whose limits are short."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("header_seconds", "linger_seconds", "stall_seconds"):
            patch.setattr(LimitedProtocol, name, 0.1)
        with running(options=ServerOptions(max_body=1000, body_seconds=0.1)) as server:
            yield server


def answer(server: Running, *parts: bytes) -> str:
    """Send some bytes, one part after each answer, and read until the server closes the connection."""
    with closing(socket.create_connection(("127.0.0.1", server.port), 30)) as connection:
        received = b""
        for part in parts:
            connection.sendall(part)
            received += connection.recv(2**16)
        while more := connection.recv(2**16):
            received += more
    return received.decode()


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (b"GET /health HTTP/1.1\r\nHost:", 408, "the headers did not arrive within 0.1 seconds"),
        (b"", 408, "the headers did not arrive"),
        (POST + b"Content-Length: 100\r\n\r\n{", 408, "the body did not arrive within 0.1 seconds"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{    \r\n", 408, "the body did not arrive"),
        (POST + b"Content-Length: 999999999999\r\n\r\n", 413, "the body is too large; send at most 1,000 bytes"),
        (POST + b"Expect: 100-continue\r\nContent-Length: 1001\r\n\r\n", 413, "too large"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n" + (b"64\r\n" + b" " * 100 + b"\r\n") * 11, 413, "too large"),
        (POST + b"Content-Length: -5\r\n\r\n", 400, "not a valid HTTP request"),
        (POST + b"Content-Length: " + b"9" * 99 + b"\r\n\r\n", 400, "not a valid HTTP request"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "not a valid HTTP request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, "not a valid HTTP request"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_slow_and_broken_requests_are_answered_and_closed(
    impatient: Running, sent: bytes, status: int, message: str
) -> None:
    received = answer(impatient, sent)
    assert received.startswith(f"HTTP/1.1 {status} ")
    assert message in received
    assert received.count("HTTP/1.1 ") == 1


def test_a_second_request_of_a_connection_has_the_same_limit(impatient: Running) -> None:
    received = answer(impatient, HEALTH, b"GET /health HTTP/1.1\r\n")
    assert received.startswith("HTTP/1.1 200 ")
    assert "HTTP/1.1 408 " in received


def test_the_rest_of_a_refused_body_is_discarded_and_the_connection_stays(impatient: Running) -> None:
    body = b" " * 5000
    with httpx.Client(base_url=impatient.url, timeout=30) as client:
        headers = {"Content-Type": "application/json"}
        statuses = [client.post("/v1/images/generations", content=body, headers=headers).status_code for _ in range(3)]
    assert statuses == [413] * 3


def test_a_client_that_does_not_read_is_disconnected(impatient: Running) -> None:
    large = 16 * [b"x" * 2**20]  # more than the buffers of both ends

    async def app(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        for part in large:
            await send({"type": "http.response.body", "body": part, "more_body": True})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b""})  # type: ignore[operator]

    state, own = impatient.server.server_state, impatient.server.config.loaded_app
    impatient.server.config.loaded_app = app
    try:
        with closing(socket.create_connection(("127.0.0.1", impatient.port), 30)) as connection:
            connection.sendall(HEALTH)
            assert connection.recv(1)  # the answer has begun
            until(lambda: not state.tasks and not state.connections)
    finally:
        impatient.server.config.loaded_app = own


class Pipe(asyncio.Transport):
    """A transport whose client reads what a test says. It calls what is due when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.buffered, self.is_aborted = 0, False
        self.due: list[Callable[[], None]] = []

    def call_later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        self.due.append(call)
        return cast(asyncio.TimerHandle, self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.buffered += len(data)

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def abort(self) -> None:
        self.is_aborted = True


def test_a_client_that_has_read_everything_is_not_disconnected_in_the_next_answer() -> None:
    pipe = Pipe()
    config = uvicorn.Config(FastAPI(), lifespan="off", log_config=None)
    protocol = LimitedProtocol(config, ServerState(), {}, _loop=cast(asyncio.AbstractEventLoop, pipe))
    protocol.connection_made(pipe)
    pipe.due.clear()  # the limit for headers

    def check() -> None:
        pipe.due.pop()()

    protocol.transport.write(b"x" * 100)
    protocol.pause_writing()
    pipe.buffered = 0  # it reads all, and gets a larger answer
    protocol.transport.write(b"x" * 200)
    check()
    pipe.buffered = 199
    check()
    assert not pipe.is_aborted
    check()
    assert pipe.is_aborted
    assert pipe.due == []


def test_too_many_connections_are_refused(impatient: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impatient.server.config.http, "max_connections", 0)
    received = answer(impatient, HEALTH)
    assert received.startswith("HTTP/1.1 503 ")
    assert "too many connections" in received
    assert "retry-after: 5" in received


def test_nothing_stays_of_any_of_them(impatient: Running) -> None:
    state = impatient.server.server_state
    until(lambda: not state.tasks and not state.connections)
    assert httpx.get(f"{impatient.url}/health").status_code == 200
    assert impatient.backend.tickets == []
