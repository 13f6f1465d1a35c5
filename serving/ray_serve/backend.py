"""The backend of an ingress: sends the images of a request to replicas, and again if a replica is lost.

Nothing here imports Ray: :class:`Replicas` is the interface to it, ``replicas.py`` its implementation.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Protocol

from serving.engine.checks import check_request
from serving.engine.facts import ModelFacts
from serving.engine.observer import Observer
from serving.engine.requests import (
    Ended,
    Event,
    Listener,
    Load,
    Request,
    RequestError,
    Rows,
)
from serving.ray_serve.parts import images_of, images_per_call, part_of

MAX_LOSSES = 3
"""A request ends with reason ``lost`` if so many replicas died with the same images."""

PAUSES = 0.1, 1.0, 0.0
"""Seconds to wait after each loss, so that the loss becomes known and the same replica is not chosen again."""

ELSEWHERE = ("stopping", "full", "lost")
"""Errors of a replica with which another one may have no trouble."""

POLL_SECONDS = 1.0
"""Time between two questions to the replicas how busy they are."""

PATIENCE = 60.0
"""Seconds without a replica after which requests end with reason ``lost``: a new one may need time to load."""

RETRY_SECONDS = 1.0, 60.0
"""Bounds of ``Retry-After``, in seconds."""

logger = logging.getLogger(__name__)


class ReplicaLost(Exception):  # noqa: N818, an event of normal operation
    """A replica died, or was stopped, before it answered.

    Args:
        reason: what is known.
        replica: its name, if it died.
    """

    def __init__(self, reason: str, replica: str | None = None) -> None:
        super().__init__(reason)
        self.replica = replica


class Replicas(Protocol):
    """The replicas of a model."""

    def generate(self, request: Request, seconds: float | None) -> AsyncGenerator[tuple[Event, ...]]:
        """Send a request to a replica with free capacity, and wait for one if there is none.

        Closing the generator cancels the request. The last event is :class:`Ended`.

        Raises:
            ReplicaLost: if the replica died; the request can be sent again.
        """

    async def loads(self) -> list[Load]:
        """How busy each replica is.

        Raises:
            TimeoutError: if one of them does not answer.
        """


class RayBackend:
    """A :class:`~serving.engine.requests.Backend` whose workers are replicas, on any machine.

    A request is divided into parts of at most a quarter of ``facts.batch_size`` images, one call each. The replica
    joins the images of different calls into batches. An image is a pure function of its request, so the missing images
    of a lost call are sent to another replica, and those already reported are not generated again.

    Args:
        facts: description of the model.
        replicas: the replicas.
        queue: maximum number of images that were accepted and have not begun.
        observer: learns what happens, for metrics. Batches and starts of replicas are not seen here.
        patience: seconds without any replica after which requests end with reason ``lost``.
    """

    def __init__(
        self,
        facts: ModelFacts,
        replicas: Replicas,
        *,
        queue: int,
        observer: Observer | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.facts, self._observer = facts, observer or Observer()
        self._replicas, self._queue, self._patience = replicas, queue, patience
        self._dead: set[str] = set()
        self._tickets: dict[_Ticket, None] = {}  # in order of acceptance
        self._lock = threading.Condition()
        self._closing = False
        self._loads: list[Load] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="ray-backend", daemon=True)
        self._thread.start()

    def submit(self, request: Request, listener: Listener, seconds: float | None = None) -> "_Ticket":
        """Accept a request, see :class:`~serving.engine.requests.Backend`."""
        try:
            return self._accept(request, listener, seconds)
        except RequestError as error:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._observer.refused, error.reason)
            raise

    def _accept(self, request: Request, listener: Listener, seconds: float | None) -> "_Ticket":
        try:
            request = check_request(request, self.facts)
        except ValueError as error:
            raise RequestError("invalid", str(error)) from error
        if len(request) > self._queue:
            raise RequestError(
                "invalid", f"the request has {len(request)} images, but only {self._queue} fit into the queue"
            )
        ticket = _Ticket(self, request, listener, seconds)
        with self._lock:
            if self._closing:
                raise RequestError("stopping", "the server is shutting down", RETRY_SECONDS[0])
            waiting = self._waiting()
            if waiting + len(request) > self._queue:
                raise RequestError(
                    "full",
                    f"{waiting} images wait already, and at most {self._queue} can; try again later",
                    self._retry_after(waiting),
                )
            self._tickets[ticket] = None
            self._loop.call_soon_threadsafe(self._begin, ticket)  # with the lock: never after what ends it
        return ticket

    def load(self) -> Load:
        """How busy it is now. Images are those of this ingress, workers and their rate those of all replicas."""
        with self._lock:
            waiting = self._waiting()
            running = sum(ticket.running for ticket in self._tickets)
            loads = self._loads
        rates = [load.images_per_second for load in loads if load.images_per_second is not None]
        return Load(
            ready=not self._closing and any(load.ready for load in loads),
            waiting=waiting,
            running=running,
            workers=sum(load.workers for load in loads),
            images_per_second=sum(rates) if rates else None,
        )

    def close(self, seconds: float = 0.0) -> None:
        """Accept no more requests, finish the accepted ones for at most ``seconds``, end the others, and stop."""
        with self._lock:
            self._closing = True
            self._lock.wait_for(lambda: not self._tickets, timeout=max(seconds, 0.0))
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(
            self._end_all, RequestError("stopping", "the server is shutting down", RETRY_SECONDS[0])
        )
        with self._lock:
            self._lock.wait_for(lambda: not self._tickets, timeout=5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)

    def ahead(self, ticket: "_Ticket") -> int:
        """Number of images that wait in front of a request."""
        with self._lock:
            if ticket not in self._tickets or ticket.has_begun:
                return 0
            tickets = list(self._tickets)
            return sum(earlier.waiting for earlier in tickets[: tickets.index(ticket)])

    def cancel(self, ticket: "_Ticket") -> None:
        """End a request of an owner who left."""
        with self._lock:
            if ticket not in self._tickets:
                return
        self._loop.call_soon_threadsafe(ticket.end, RequestError("cancelled", "the request was cancelled"))

    def _waiting(self) -> int:
        return sum(ticket.waiting for ticket in self._tickets)

    def _retry_after(self, waiting: int) -> float:
        """Seconds in which the replicas may work off what waits."""
        rate = sum(load.images_per_second or 0.0 for load in self._loads)
        least, greatest = RETRY_SECONDS
        return min(max(math.ceil(waiting / rate), least), greatest) if rate > 0 else least

    # What follows runs in the thread of the loop.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        watch = self._loop.create_task(self._watch())
        try:
            self._loop.run_forever()
        finally:
            watch.cancel()
            self._loop.run_until_complete(asyncio.gather(watch, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _watch(self) -> None:
        """Ask the replicas how busy they are; end all requests if there have been none for too long."""
        seen = time.monotonic()
        while True:
            is_new = True
            try:
                loads = await self._replicas.loads()
            except TimeoutError:  # one of them hangs: until Ray Serve replaces it, what the others said last holds
                loads = self._loads
                is_new = False
            except Exception:
                logger.exception("the replicas did not say how busy they are")
                loads = []
            with self._lock:
                self._loads = loads
            if is_new and any(load.ready for load in loads):
                seen = time.monotonic()
            elif time.monotonic() - seen > self._patience:
                self._end_all(RequestError("lost", "no replica of the model is available", RETRY_SECONDS[1]))
            await asyncio.sleep(POLL_SECONDS)

    def _begin(self, ticket: "_Ticket") -> None:
        self._observer.accepted(len(ticket.request))
        ticket.task = self._loop.create_task(self._answer(ticket))
        ticket.task.add_done_callback(lambda task: self._finish(ticket, task))

    def _end_all(self, error: RequestError) -> None:
        for ticket in list(self._tickets):
            ticket.end(error)

    async def _answer(self, ticket: "_Ticket") -> None:
        """Generate all images of a request."""
        part = images_per_call(self.facts.batch_size)
        positions = range(len(ticket.request))
        async with asyncio.timeout_at(ticket.deadline(self._loop.time())), asyncio.TaskGroup() as calls:
            for begin in range(0, len(positions), part):
                calls.create_task(self._generate(ticket, list(positions[begin : begin + part])))

    async def _generate(self, ticket: "_Ticket", missing: list[int]) -> None:
        """Generate some images of a request, given by their positions, with as many replicas as it takes."""
        for attempt in range(1, MAX_LOSSES + 1):
            try:
                await self._call(ticket, missing)
                return
            except ReplicaLost as lost:
                if lost.replica is not None and lost.replica not in self._dead:  # it may have had several calls
                    self._dead.add(lost.replica)
                    self._observer.worker_died()
                if not missing:  # only the end was lost
                    return
                logger.warning("replica lost with %d images, attempt %d: %s", len(missing), attempt, lost)
                await asyncio.sleep(PAUSES[attempt - 1])
        raise RequestError("lost", f"{MAX_LOSSES} replicas died with this request", RETRY_SECONDS[0])

    async def _call(self, ticket: "_Ticket", missing: list[int]) -> None:
        """One call of a replica. Removes the images that are finished from ``missing``."""
        sent = tuple(missing)
        request = part_of(ticket.request, sent)
        async with aclosing(self._replicas.generate(request, ticket.seconds_left())) as stream:
            async for events in stream:
                for event in events:
                    if isinstance(event, Ended):
                        if event.error is None and not missing:
                            return
                        if event.error is None or event.error.reason in ELSEWHERE:
                            raise ReplicaLost(str(event.error or "it ended without all images"))
                        raise event.error
                    positions = tuple(sent[image] for image in images_of(event))
                    ticket.begin(positions)
                    if isinstance(event, Rows):
                        ticket.listener(replace(event, images=positions))
                    elif positions[0] in missing:  # never report an image twice
                        missing.remove(positions[0])
                        queued, generated = ticket.finish(positions[0])
                        self._observer.image(queued, generated)
                        ticket.listener(replace(event, image=positions[0]))
        raise ReplicaLost("its stream of events ended early")

    def _finish(self, ticket: "_Ticket", task: "asyncio.Task[None]") -> None:
        """Report the end of a request."""
        error = None
        if task.cancelled():
            error = ticket.error or RequestError("cancelled", "the request was cancelled")
        elif (exception := task.exception()) is not None:
            error = _request_error(exception)
        with self._lock:
            del self._tickets[ticket]
            self._lock.notify_all()
        self._observer.ended(None if error is None else error.reason, time.monotonic() - ticket.accepted)
        ticket.listener(Ended(error))


class _Ticket:
    """A request and its state. Positions are those of images in the request."""

    def __init__(self, backend: RayBackend, request: Request, listener: Listener, seconds: float | None) -> None:
        self.request, self.listener = request, listener
        self.accepted = time.monotonic()
        self.begun: dict[int, float] = {}
        self.finished: set[int] = set()
        self.error: RequestError | None = None
        self.task: asyncio.Task[None] | None = None
        self._backend = backend
        self._end = None if seconds is None else self.accepted + seconds

    @property
    def ahead(self) -> int:
        """Number of images that wait in front of it."""
        return self._backend.ahead(self)

    def cancel(self) -> None:
        """End the request. Harmless when repeated."""
        self._backend.cancel(self)

    @property
    def has_begun(self) -> bool:
        return bool(self.begun)

    @property
    def waiting(self) -> int:
        return len(self.request) - len(self.begun)

    @property
    def running(self) -> int:
        return len(self.begun) - len(self.finished)

    def begin(self, positions: tuple[int, ...]) -> None:
        """Images grow in a replica."""
        now = time.monotonic()
        self.begun.update({position: now for position in positions if position not in self.begun})

    def finish(self, position: int) -> tuple[float, float]:
        """An image is finished. Returns its seconds until the first report, and from then on."""
        self.finished.add(position)
        begun = self.begun[position]
        return begun - self.accepted, time.monotonic() - begun

    def seconds_left(self) -> float | None:
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def deadline(self, now: float) -> float | None:
        """End of the request on the clock of the loop."""
        left = self.seconds_left()
        return None if left is None else now + left

    def end(self, error: RequestError) -> None:
        """End the request with an error; only in the thread of the loop."""
        if self.error is None and self.task is not None:
            self.error = error
            self.task.cancel()


def _request_error(exception: BaseException) -> RequestError:
    """Why a request failed, from what its task raised."""
    if isinstance(exception, TimeoutError):
        return RequestError("late", "the images were not finished in time")
    if isinstance(exception, BaseExceptionGroup):  # of the task group
        errors = [error for error in exception.exceptions if isinstance(error, RequestError)]
        if errors:
            return errors[0]
    logger.error("a request failed", exc_info=exception)
    return RequestError("failed", "the server failed to generate the images")
