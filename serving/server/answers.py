"""Answers to requests for images: one JSON object, or a stream of server-sent events."""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Response
from PIL import Image

from serving.engine.facts import ModelFacts
from serving.engine.requests import Finished, ImageRequest, Ticket
from serving.image_settings import png_file
from serving.server.errors import ApiError
from serving.server.generation import Order
from serving.server.progress import ClientLeftError, Grown, Progress, while_connected

QUEUE_LOOK = 1.0
"""Seconds between two comments in a stream about the place in the queue."""
HEARTBEAT = 15.0
"""Seconds without an event after which a stream sends a comment, so that no proxy takes it for dead."""


class Answer:
    """What an answer is made from.

    Args:
        order: the request.
        facts: the model.
        link: stores a file of a format and returns its address.
    """

    def __init__(self, order: Order, facts: ModelFacts, link: Callable[[bytes, str], str]) -> None:
        self.order, self.facts, self._link = order, facts, link
        self._kind = "image_edit" if order.is_edit else "image_generation"
        self._created = int(time.time())

    async def json(self, progress: Progress) -> bytes:
        """Wait for all images.

        Returns:
            The body of the response.

        Raises:
            RequestError: if the request has failed.
        """
        items: dict[int, asyncio.Future[dict[str, Any]]] = {}
        while True:
            news = await progress.take()
            for image in news.finished:  # while others are being generated
                items[image.image] = asyncio.ensure_future(asyncio.to_thread(self._item, image))
            if news.ended is None:
                continue
            if news.ended.error is not None:
                raise news.ended.error
            data = [await items[position] for position in range(len(self.order.request))]
            content = {"created": self._created, "data": data, **self._common(), "usage": self._usage(data)}
            return (await asyncio.to_thread(json.dumps, content)).encode()

    async def events(self, progress: Progress, ticket: Ticket) -> AsyncIterator[bytes]:
        """Server-sent events, until all images are finished or the request has failed.

        While others are generated first, comments say how many: ``: ahead 12``. Clients ignore what they do not know.
        """
        partials: dict[int, int] = {}
        ahead, spoken = 0, time.monotonic()
        while True:
            before, ahead = ahead, ticket.ahead
            if ahead or before:
                yield f": ahead {ahead}\n\n".encode()
                spoken = time.monotonic()
            silence = time.monotonic() - spoken
            news = await progress.take(QUEUE_LOOK if ahead else max(HEARTBEAT - silence, 0.0))
            for position, grown in news.grown.items():
                count = partials.get(position, 0)
                if self._is_due(grown, count):
                    partials[position] = count + 1
                    yield _event(f"{self._kind}.partial_image", self._partial(position, grown, count))
                    spoken = time.monotonic()
            for image in news.finished:
                item = await asyncio.to_thread(self._item, image)
                yield _event(f"{self._kind}.completed", self._completed(image.image, item))
                spoken = time.monotonic()
            if news.ended is not None:
                if (error := news.ended.error) is not None:
                    yield _event("error", {"type": "error", **ApiError.from_request_error(error).content()})
                return
            # Not only without news: the client may want none of the rows.
            if time.monotonic() - spoken >= HEARTBEAT:
                yield b": waiting\n\n"
                spoken = time.monotonic()

    def _is_due(self, grown: Grown, count: int) -> bool:
        """Whether a row is sent: all of them, or as many previews as the client wants, evenly spaced."""
        wanted = self.order.partial_images
        if wanted is None:
            return True
        return grown.preview is not None and min(wanted, grown.row * (wanted + 1) // grown.rows) > count

    def _partial(self, position: int, grown: Grown, count: int) -> dict[str, Any]:
        return {
            "b64_json": None if grown.preview is None else base64.b64encode(grown.preview).decode(),
            "partial_image_index": count,
            "image_index": position,
            "row": grown.row,
            "rows": grown.rows,
            "created_at": self._created,
            **self._common(),
            "output_format": "jpeg",
        }

    def _completed(self, position: int, item: dict[str, Any]) -> dict[str, Any]:
        return {
            **item,
            "image_index": position,
            "created_at": self._created,
            **self._common(),
            "usage": self._usage([item]),
        }

    def _common(self) -> dict[str, Any]:
        size = self.facts.resolution
        return {
            "output_format": self.order.output_format,
            "size": "auto" if size is None else f"{size}x{size}",
            "quality": "auto",
            "background": "opaque",
        }

    def _usage(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Codes: those kept of given images, and those of the generated ones. Words of a prompt are not counted."""
        grid, request = self.facts.grid or 0, self.order.request
        if isinstance(request, ImageRequest):
            known = request.keep_rows * grid if request.mask is None else grid * grid - len(request.mask)
            kept = known * len(items)
            made = grid * grid * len(items) - kept
        else:  # images of a tokenizer have different sizes
            kept, made = sum(len(row) for item in items for row in item["codes"]), 0
        return {
            "input_tokens": kept,
            "input_tokens_details": {"image_tokens": kept, "text_tokens": 0},
            "output_tokens": made,
            "total_tokens": kept + made,
        }

    def _item(self, image: Finished) -> dict[str, Any]:
        """An element of ``data``. Takes milliseconds, so call it in a thread."""
        request, order = self.order.request, self.order
        file = encode_image(image, order, self.facts)
        item: dict[str, Any] = (
            {"url": self._link(file, order.output_format)}
            if order.as_url
            else {"b64_json": base64.b64encode(file).decode()}
        )
        if isinstance(request, ImageRequest):
            return {**item, "seed": request.seed, "index": request.indices[image.image]}
        return {**item, "codes": image.codes.tolist()}


class EventStream(Response):
    """A response of server-sent events. The ticket is cancelled when the client leaves.

    Args:
        events: the events.
        ticket: the request.
    """

    def __init__(self, events: AsyncIterator[bytes], ticket: Ticket) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(b"", 200, headers, "text/event-stream")
        del self.headers["content-length"]
        self._events, self._ticket = events, ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events. A client that reads slowly stops the loop here, and newer rows replace older ones."""

        async def send_events() -> None:
            async with aclosing(self._events) as events:  # type: ignore[type-var]  # a generator
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await while_connected(receive, send_events())
        except ClientLeftError:
            pass
        finally:
            self._ticket.cancel()


async def json_answer(answer: Answer, progress: Progress, ticket: Ticket, receive: Any) -> Response:
    """Wait for all images of a request.

    Raises:
        RequestError: if the request has failed.
        ClientLeftError: if the client left; the request is cancelled.
    """
    try:
        body = await while_connected(receive, answer.json(progress))
    finally:
        ticket.cancel()
    return Response(body, media_type="application/json")


def encode_image(image: Finished, order: Order, facts: ModelFacts) -> bytes:
    """File of an image. PNG files of generated images hold their settings."""
    pillow = Image.fromarray(image.pixels)
    settings = order.settings(facts, image.image)
    if order.output_format == "png" and settings is not None:
        condition = settings.conditions[0]
        title = condition if isinstance(condition, str) else facts.class_names.names[condition]
        return png_file(pillow, settings, title, facts.dtype)
    buffer = io.BytesIO()
    options = {} if order.output_format == "png" else {"quality": order.quality}
    pillow.save(buffer, order.output_format, **options)
    return buffer.getvalue()


def _event(name: str, content: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **content})}\n\n".encode()
