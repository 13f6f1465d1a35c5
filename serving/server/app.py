"""The HTTP application: OpenAI's images API in front of a backend. ``docs/http_api.md`` is its reference."""

import asyncio
import time
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response

from serving.engine.facts import ModelFacts
from serving.engine.requests import Backend
from serving.image_store import ImageStore
from serving.server.answers import Answer, EventStream, json_answer
from serving.server.body import BODY, BodyBudget, BodyShare, ClientDisconnect, read_json
from serving.server.description import describe, operation
from serving.server.edits import FORM, read_form
from serving.server.errors import ApiError, add_handlers, json_response
from serving.server.fields import Format, GenerationBody, ReconstructionBody, check_fields
from serving.server.generation import Order, generation_order, reconstruction_order
from serving.server.keys import KeyCheck
from serving.server.metrics import Metrics
from serving.server.options import ServerOptions
from serving.server.progress import ClientLeftError, Progress

CLIENT_LEFT = 499
"""Status, in metrics only, of requests whose client left before the response began."""


def build_app(backend: Backend, options: ServerOptions | None = None, metrics: Metrics | None = None) -> FastAPI:
    """Build the application.

    Args:
        backend: generates the images. It is the caller's, who closes it.
        options: limits.
        metrics: those of the backend's dispatcher; None makes new ones.
    """
    options, metrics, facts = options or ServerOptions(), metrics or Metrics(), backend.facts
    metrics.watch(backend)
    store, started = ImageStore(), int(time.time())
    check_key = KeyCheck(options.api_keys)
    app = FastAPI(title="llamagen", docs_url=None, redoc_url=None, redirect_slashes=False)
    add_handlers(app)

    async def answer(order: Order, request: Request) -> Response:
        progress = Progress()
        ticket = backend.submit(order.request, progress, options.timeout)
        link = partial(_link, store, str(request.base_url))
        work = Answer(order, facts, link)
        if order.stream:
            return EventStream(work.events(progress, ticket), ticket)
        return await json_answer(work, progress, ticket, request.receive)

    async def generated(content: dict[str, Any], request: Request, is_edit: bool = False) -> Response:
        body = check_fields(GenerationBody, content)
        make = partial(generation_order, body, facts, options, is_edit)
        # A mask is decoded, which can take long, in a thread.
        masked = is_edit or body.mask is not None
        return await answer(await asyncio.to_thread(make) if masked else make(), request)

    @app.post("/v1/images/generations", **operation(GenerationBody, facts, options))
    async def generate(request: Request) -> Response:
        """Generate images of a class or a text, or complete or inpaint an image."""
        check_key(request.headers.get("authorization"))
        return await generated(await read_json(request, options), request)

    @app.post("/v1/images/edits", **operation(GenerationBody, facts, options, FORM))
    async def edit(request: Request) -> Response:
        """Generate the part of an image again that is transparent in its mask: the files and fields of a form."""
        check_key(request.headers.get("authorization"))
        return await generated(await read_form(request, options), request, is_edit=True)

    @app.post("/v1/images/reconstructions", **operation(ReconstructionBody, facts, options))
    async def reconstruct(request: Request) -> Response:
        """Encode an image as codes, and decode them."""
        check_key(request.headers.get("authorization"))
        body = check_fields(ReconstructionBody, await read_json(request, options))
        return await answer(reconstruction_order(body, facts, options), request)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """The model of this server."""
        check_key(request.headers.get("authorization"))
        return json_response({"object": "list", "data": [_model(facts, started, options)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request) -> Response:
        """The model of this server, by name."""
        check_key(request.headers.get("authorization"))
        if (name := request.path_params["name"]) != facts.name:
            message = f"there is no model {name!r:.60}; this server has {facts.name}"
            raise ApiError(404, message, "model", "model_not_found")
        return json_response(_model(facts, started, options))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """Whether the process is alive."""
        return json_response({"status": "ok"})

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are accepted: status 200 or 503."""
        load = backend.load()
        headers = {} if load.ready else {"Retry-After": "5"}
        return json_response(vars(load), 200 if load.ready else 503, headers)

    @app.get("/metrics")
    async def scrape() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/images/{file}")
    async def image(request: Request) -> Response:
        """An image of an answer with links."""
        name, _, suffix = str(request.path_params["file"]).rpartition(".")
        found = store.get(name)
        if found is None or suffix != _format(found):
            raise ApiError(404, "this image is not kept any more; generate it again", code="not_found")
        headers = {"Cache-Control": "private, max-age=86400, immutable", "X-Content-Type-Options": "nosniff"}
        return Response(found, media_type=f"image/{suffix}", headers=headers)

    describe(app)
    app.add_middleware(_Outer, metrics=metrics, budget=BodyBudget(options.max_bodies))
    return app


class _Outer:
    """Around every request: its memory, its metrics, and the end of those whose client has left."""

    def __init__(self, app: Any, metrics: Metrics, budget: BodyBudget) -> None:
        self._app, self._metrics, self._budget = app, metrics, budget

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), CLIENT_LEFT
        share = scope[BODY] = BodyShare(self._budget)

        async def send_and_note(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except (ClientLeftError, ClientDisconnect):
            if status == CLIENT_LEFT:  # nobody reads it, but the server wants a response
                await send({"type": "http.response.start", "status": CLIENT_LEFT, "headers": []})
                await send({"type": "http.response.body", "body": b""})
        except Exception:
            status = 500  # the framework answers
            raise
        finally:
            share.release()
            self._metrics.response(scope["path"], status, time.monotonic() - begin)


def _model(facts: ModelFacts, started: int, options: ServerOptions) -> dict[str, Any]:
    return {
        "id": facts.name,
        "object": "model",
        "created": started,
        "owned_by": "llamagen",
        "llamagen": facts.to_json(),
        "max_images": options.max_images,
    }


def _link(store: ImageStore, base: str, file: bytes, output_format: Format) -> str:
    """Store a file, and return its address."""
    return f"{base.rstrip('/')}/images/{store.add(file)}.{output_format}"


def _format(file: bytes) -> Format:
    if file.startswith(b"\x89PNG"):
        return "png"
    return "jpeg" if file.startswith(b"\xff\xd8") else "webp"
