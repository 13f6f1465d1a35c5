"""Follows a request to a backend: what has happened since the last look, so that a slow browser gets fewer updates."""

import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import NamedTuple

from serving.engine.requests import Backend, Ended, Event, Finished, Request, Rows, Ticket

IDLE = 0.5
"""Seconds after which a reader gets control, even if nothing has happened."""
LINGER = 0.05
"""Seconds during which events are gathered: images of one batch may be reported one by one."""


class News(NamedTuple):
    """What has happened to a request.

    Attributes:
        events: new events, in their order; none if nothing has happened for :data:`IDLE` seconds.
        ahead: number of images of others that are generated first.
    """

    events: list[Rows | Finished]
    ahead: int


def news(
    backend: Backend, request: Request, started: Callable[[Ticket], object] = lambda ticket: None
) -> Iterator[News]:
    """Submit a request and follow it. Closing the iterator cancels it.

    Args:
        backend: where it is submitted.
        request: what is wanted.
        started: called with the ticket of the accepted request.

    Yields:
        News, at least twice per second.

    Raises:
        RequestError: if the request is not accepted, or ends without all images; ``cancelled`` if it was cancelled.
    """
    queue: SimpleQueue[Event] = SimpleQueue()
    ticket = backend.submit(request, queue.put)
    try:
        started(ticket)
        while True:
            events = _gather(queue)
            yield News([each for each in events if not isinstance(each, Ended)], ticket.ahead)
            if events and isinstance(last := events[-1], Ended):
                if last.error is not None:
                    raise last.error
                return
    finally:
        ticket.cancel()


def _gather(queue: "SimpleQueue[Event]") -> list[Event]:
    found: list[Event] = []
    try:
        found.append(queue.get(timeout=IDLE))
        end = time.monotonic() + LINGER
        while not isinstance(found[-1], Ended):
            found.append(queue.get(timeout=max(end - time.monotonic(), 0)))
    except Empty:
        pass
    return found
