"""A replica: an actor that holds the model and answers requests for it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from serving.engine.facts import ModelFacts
from serving.engine.requests import Backend, Ended, Event, Load, Request, RequestError


class Replica:
    """Answers requests with a backend of its own actor.

    The backend joins the images of all calls into batches. ``@serve.batch`` is not used: it forms batches by the time
    of arrival, also while the engine is busy, and knows no groups of equal settings (docs/ray.md).

    Args:
        backend: the backend.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def describe(self) -> ModelFacts:
        """Description of the model."""
        return self._backend.facts

    async def load(self) -> Load:
        """How busy this replica is."""
        return self._backend.load()

    async def generate(self, request: Request, seconds: float | None) -> AsyncGenerator[tuple[Event, ...], None]:
        """Answer a request. Events that happened meanwhile are sent together; the last one is :class:`Ended`."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Event] = asyncio.Queue()
        try:
            ticket = self._backend.submit(request, lambda event: _put(loop, arrived, event), seconds)
        except RequestError as error:
            yield (Ended(error),)
            return
        try:
            is_ended = False
            while not is_ended:
                events = [await arrived.get()]
                while not arrived.empty():
                    events.append(arrived.get_nowait())
                is_ended = isinstance(events[-1], Ended)
                yield tuple(events)
        finally:
            ticket.cancel()  # if the caller left; otherwise without effect

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces this replica if it raises."""
        if not self._backend.load().ready:
            raise RuntimeError("the engine of this replica is not ready")

    def close(self) -> None:
        """End the backend, after Ray Serve has waited for the calls in progress."""
        self._backend.close()


def _put(loop: asyncio.AbstractEventLoop, arrived: "asyncio.Queue[Event]", event: Event) -> None:
    with suppress(RuntimeError):  # the loop is closed: the actor ends, and nobody waits
        loop.call_soon_threadsafe(arrived.put_nowait, event)
