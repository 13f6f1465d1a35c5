"""An HTTP server whose answers are written in advance, for a client that must survive all of them."""

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from serving.engine.facts import ModelFacts

JSON, EVENTS = "application/json", "text/event-stream"


class Answer(NamedTuple):
    """An answer.

    Attributes:
        status: its status.
        body: its bytes.
        kind: its content type.
        headers: further headers.
    """

    status: int
    body: bytes
    kind: str = JSON
    headers: Mapping[str, str] = {}


def models(facts: ModelFacts) -> Answer:
    """The list of models of a server of this project."""
    values = {"object": "list", "data": [{"id": facts.name, "object": "model", "llamagen": facts.to_json()}]}
    return Answer(200, json.dumps(values).encode())


def events(*pairs: tuple[str, Any]) -> bytes:
    """Server-sent events: names, and texts or values for JSON."""
    texts = [(name, data if isinstance(data, str) else json.dumps(data)) for name, data in pairs]
    return "".join(f"event: {name}\ndata: {data}\n\n" for name, data in texts).encode()


class ScriptedServer:
    """Serves until :meth:`stop`.

    Attributes:
        answers: answer of each path.
        requests: paths, headers and bodies of all requests.
        port: its port.
        address: its address.
    """

    def __init__(self, answers: dict[str, Answer], port: int = 0) -> None:
        self.answers, self.requests = answers, list[tuple[str, Mapping[str, str], Any]]()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                server.requests.append((self.path, self.headers, json.loads(body) if body else None))
                answer = server.answers.get(self.path, Answer(404, b"nothing", "text/plain"))
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.kind)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)  # HTTP/1.0: the end of the connection is the end of the body

            do_POST = do_GET  # noqa: N815

            def log_message(self, format: str, *values: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.address = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give the port back. Harmless when repeated."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
