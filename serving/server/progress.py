"""From the events of a backend's threads to the event loop. What nobody has read is replaced, not accumulated."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

from serving.engine.requests import Ended, Event, Finished, Rows

Result = TypeVar("Result")


class ClientLeftError(Exception):
    """The connection of a client was closed before the answer was complete."""


@dataclass(frozen=True)
class Grown:
    """The newest row of an image.

    Attributes:
        row: number of complete rows of codes.
        rows: number of rows of an image.
        preview: the newest preview that was not taken yet; None if there is none.
    """

    row: int
    rows: int
    preview: bytes | None


@dataclass
class News:
    """What has happened since the last look.

    Attributes:
        grown: the newest row of each image that has grown, by its position in the request.
        finished: images.
        ended: the last event; None while there may be more.
    """

    grown: dict[int, Grown] = field(default_factory=dict)
    finished: list[Finished] = field(default_factory=list)
    ended: Ended | None = None


class Progress:
    """Listener of a request. Build it in the event loop that reads it."""

    def __init__(self) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        self._lock, self._news, self._is_told = Lock(), News(), False

    def __call__(self, event: Event) -> None:
        """Take an event, in any thread."""
        with self._lock:
            if isinstance(event, Rows):
                self._grow(event)
            elif isinstance(event, Finished):
                self._news.finished.append(event)
            else:
                self._news.ended = event
            if self._is_told:
                return
            self._is_told = True
        with suppress(RuntimeError):  # the server has ended, and its event loop is closed
            self._loop.call_soon_threadsafe(self._wake.set)

    def _grow(self, event: Rows) -> None:
        for place, image in enumerate(event.images):
            before = self._news.grown.get(image)
            preview = before.preview if before is not None else None
            if event.previews is not None:
                preview = event.previews[place]
            self._news.grown[image] = Grown(event.row, event.rows, preview)

    async def take(self, seconds: float | None = None) -> News:
        """Wait for news. Empty if there are none within ``seconds``."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return News()
        with self._lock:
            news, self._news, self._is_told = self._news, News(), False
            self._wake.clear()
        return news


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine, and cancel it when the client leaves.

    Args:
        receive: messages of the connection, after the body of the request.
        work: what to run.

    Raises:
        ClientLeftError: if the client left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_client_left(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _client_left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
