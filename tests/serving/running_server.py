"""A server in a thread, on the loopback address."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from serving.engine.requests import Backend
from serving.server.app import build_app
from serving.server.connections import DrainingServer, build_server
from serving.server.options import ServerOptions
from serving.start import address, listen
from tests.serving.fake_backend import FakeBackend
from tests.serving.waiting import until as until


@dataclass
class Running:
    """A running server.

    Attributes:
        url: its address.
        backend: its backend.
        server: the server.
    """

    url: str
    backend: Any
    server: DrainingServer

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def running(backend: Backend | None = None, options: ServerOptions | None = None) -> Iterator[Running]:
    """Serve a backend, by default one without a model. At the end both are closed."""
    backend = backend or FakeBackend()
    connection = listen("127.0.0.1", 0, "the server")
    server = build_server(build_app(backend, options), backend, 5.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [connection]}, daemon=True, name="server")
    thread.start()
    try:
        yield Running(address(connection), backend, server)
    finally:
        backend.close()
        server.should_exit = server.force_exit = True
        thread.join(30)
        assert not thread.is_alive()


def send(server: Running, body: dict[str, Any]) -> socket.socket:
    """Send a request for images, and wait until the backend has it. The client leaves by closing the connection."""
    accepted = len(server.backend.tickets)
    content = json.dumps(body).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), 30)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    until(lambda: len(server.backend.tickets) > accepted)
    return connection
