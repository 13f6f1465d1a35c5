"""Answers while the model is being loaded, so that probes need not wait: ``/health`` with 200, all others with 503.

footgun: this module must not import torch, because ``share_cores`` has to run first.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

RETRY_AFTER = "5"
SECONDS = 5.0
"""Time for which a client may be silent."""
LOAD = {"ready": False, "waiting": 0, "running": 0, "workers": 0, "images_per_second": None}
"""Body of ``/ready``: the fields of :class:`~serving.engine.requests.Load`."""
ERROR = {"message": "the model is being loaded; try again soon", "type": "server_error", "param": None}


@contextmanager
def answered_while_starting(connection: socket.socket) -> Iterator[None]:
    """Answer requests in a thread. Afterwards the socket still listens, and others may accept its connections.

    Args:
        connection: a socket that listens.
    """
    server = _Server(("", 0), _Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = connection
    thread = Thread(target=server.serve_forever, args=(0.02,), name="starting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are no errors."""


class _Handler(BaseHTTPRequestHandler):
    timeout = SECONDS

    def do_GET(self) -> None:
        """Answer, and close the connection."""
        path = self.path.partition("?")[0]
        content: dict[str, Any] = {"error": {**ERROR, "code": "starting"}}
        if path == "/health":
            content = {"status": "ok"}
        elif path == "/ready":
            content = LOAD
        body = json.dumps(content).encode()
        self.send_response(200 if path == "/health" else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if path != "/health":
            self.send_header("Retry-After", RETRY_AFTER)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def version_string(self) -> str:
        """Name no versions."""
        return "llamagen"

    def log_message(self, *arguments: Any) -> None:
        """Log nothing of what clients send."""
