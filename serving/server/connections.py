"""uvicorn with limits of time for slow clients, and a shutdown that finishes what it began."""

import asyncio
import json
import resource
import signal
import socket
import threading
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.engine.requests import Backend

HEADER_SECONDS = 20.0
"""Time for the headers of a request."""
LINGER_SECONDS = 5.0
"""Time in which the rest of a body is discarded after an early error, such as 413. Closing at once would reset the
connection, and the client might lose the error."""
STALL_SECONDS = 30.0
"""Time after which a client is disconnected that reads nothing of what waits for it."""
SPARE_FILES = 128
"""Open files that are kept for other purposes than connections."""


class CountedTransport:
    """A transport that counts what is written to it.

    Args:
        transport: does the work.

    Attributes:
        written: number of bytes.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self.written = transport, 0

    def __getattr__(self, name: str) -> Any:
        """All other methods are those of the transport."""
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send some bytes, or keep them until the client reads."""
        self.written += len(data)
        self._transport.write(data)

    @property
    def sent(self) -> int:
        """Number of bytes that have left this process."""
        return self.written - self._transport.get_write_buffer_size()


class LimitedProtocol(H11Protocol):
    """A connection with limits of time. uvicorn has none for headers, nor for clients that do not read.

    The limits of bodies are those of ``serving/server/body.py``.
    """

    header_seconds, linger_seconds, stall_seconds = HEADER_SECONDS, LINGER_SECONDS, STALL_SECONDS
    max_connections: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers; refuse the connection if there are too many."""
        self._counted = CountedTransport(transport)
        super().connection_made(self._counted)  # type: ignore[arg-type]
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._is_refused = False
        if self.max_connections is not None and len(self.connections) > self.max_connections:
            self._refuse(503, "the server has too many connections; try again later")
            return
        self._start("headers", self.header_seconds, self._headers_are_late)

    def data_received(self, data: bytes) -> None:
        """Wait for headers as long as they are incomplete."""
        if self._is_refused:
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop("headers")
        elif not self.transport.is_closing() and "headers" not in self._timers:
            self._start("headers", self.header_seconds, self._headers_are_late)

    def on_response_complete(self) -> None:
        """Discard the rest of the body for some seconds, and watch whether the client reads."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._start("rest", self.linger_seconds, self._rest_is_late, self.cycle)
        self._watch_writes()

    def pause_writing(self) -> None:
        """Watch whether the client reads."""
        super().pause_writing()
        self._watch_writes()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        super().connection_lost(exc)
        for name in list(self._timers):
            self._stop(name)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        self._refuse(400, "this is not a valid HTTP request")

    def _refuse(self, status: int, message: str) -> None:
        """Answer, if no response has begun, and close when the client has stopped sending."""
        self._stop("headers")
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            kind = "invalid_request_error" if status < 500 else "server_error"
            body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
            retry = [("retry-after", "5")] if status == 503 else []
            headers += [*retry, ("connection", "close")]
            reason = HTTPStatus(status).phrase.encode()
            response = h11.Response(status_code=status, headers=headers, reason=reason)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True  # what the application still sends has no place any more
            self.cycle.message_event.set()
        self._is_refused = True
        self.transport.write_eof()
        self._start("rest", self.linger_seconds, self.transport.close)
        self._watch_writes()

    def _headers_are_late(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._refuse(408, f"the headers did not arrive within {self.header_seconds:g} seconds")

    def _rest_is_late(self, cycle: Any) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def _watch_writes(self) -> None:
        if "reading" not in self._timers and self.transport.get_write_buffer_size():
            self._start("reading", self.stall_seconds, self._check_writes, self._counted.sent)

    def _check_writes(self, before: int) -> None:
        """Disconnect a client that has read nothing of what waited for it. Footgun: the size of the buffer says less.

        A client that has read everything may just get a larger response.
        """
        if self.transport.get_write_buffer_size() and self._counted.sent == before:
            self.transport.abort()
        else:
            self._watch_writes()

    def _start(self, name: str, seconds: float, call: Any, *arguments: Any) -> None:
        def run() -> None:
            del self._timers[name]
            call(*arguments)

        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, run)

    def _stop(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


class DrainingServer(uvicorn.Server):
    """A server that finishes accepted requests after SIGTERM or SIGINT, and ends at once after the second one.

    Until then it answers: ``/ready`` and new requests with status 503, so that load balancers send them elsewhere.

    Args:
        config: configuration of uvicorn.
        backend: is closed at the end.
        seconds: maximum time for accepted requests.

    Attributes:
        signals: number of signals received.
    """

    def __init__(self, config: uvicorn.Config, backend: Backend, seconds: float) -> None:
        super().__init__(config)
        self._backend, self._seconds, self.signals = backend, seconds, 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown, or end it."""
        self.signals += 1
        if self.signals > 1:
            self.force_exit = self.should_exit = True
            return
        # Footgun: uvicorn's own handler closes the port at once, and raises the signal again at the end.
        threading.Thread(target=self._drain, daemon=True, name="shutdown").start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for responses; after a second signal for nothing. Footgun: uvicorn waits for connections even then."""
        ending = asyncio.ensure_future(super().shutdown(sockets))
        while not ending.done() and not self.force_exit:
            await asyncio.wait((ending,), timeout=0.1)
        if self.force_exit:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            if tasks := list(self.server_state.tasks):  # they notice that their client is gone
                await asyncio.wait(tasks, timeout=1.0)
        await ending

    def _drain(self) -> None:
        self._backend.close(self._seconds)
        self.should_exit = True


def build_server(app: Any, backend: Backend, seconds: float) -> DrainingServer:
    """The HTTP server of an application, for ``run(sockets=[…])``.

    Args:
        app: the application.
        backend: its backend, which the server closes.
        seconds: maximum time for accepted requests after a signal.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = None if files == resource.RLIM_INFINITY else max(files - SPARE_FILES, 16)
    protocol = type("Protocol", (LimitedProtocol,), {"max_connections": limit})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="error",  # warnings are about what clients send, which must not fill the log
        access_log=False,
        server_header=False,
        proxy_headers=True,
        timeout_graceful_shutdown=int(STALL_SECONDS) + 5,
    )
    return DrainingServer(config, backend, seconds)


FORCED = 128 + signal.SIGTERM
"""Exit code after the second signal."""
