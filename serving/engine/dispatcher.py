"""The local backend: a queue of images in front of workers that generate them in batches.

One lock guards the state. Threads: one for each worker (``slot.py``), one that calls listeners (``delivery.py``), and
one that watches the time. Nothing that may take long happens under the lock.
"""

import logging
import math
import time
from collections.abc import Sequence
from itertools import count
from threading import Condition, Thread

from serving.engine.checks import check_request
from serving.engine.delivery import Delivery
from serving.engine.engine import FailureReport, ImageReport, Report, RowsReport, Work
from serving.engine.facts import ModelFacts
from serving.engine.image_queue import ImageQueue, QueuedImage
from serving.engine.observer import Observer
from serving.engine.requests import (
    Ended,
    Finished,
    ImageRequest,
    Listener,
    Load,
    Reason,
    Request,
    RequestError,
    Rows,
    Ticket,
)
from serving.engine.slot import State, WorkerSlot
from serving.engine.throughput import Throughput
from serving.engine.worker import WorkerSource

LOGGER = logging.getLogger("serving")

MAX_DEATHS = 3
"""Number of workers that may die with an image before its request ends as lost."""
PATIENCE = 60.0
"""Seconds after a deadline in which a worker must show that it is alive, or be replaced."""
RETRY = (1.0, 600.0)
"""Bounds of the advice when to try again, in seconds."""
STOP_SECONDS = 20.0
"""Seconds that a worker has to end before it is killed."""


class Accepted:
    """A request until its end, see :class:`~serving.engine.requests.Ticket`."""

    def __init__(
        self, dispatcher: "Dispatcher", request: Request, listener: Listener, now: float, seconds: float | None
    ) -> None:
        self.listener, self.size, self.arrived = listener, len(request), now
        self.deadline = math.inf if seconds is None else now + seconds
        self.images: list[QueuedImage] = []
        self.missing = len(request)
        self.is_running = self.has_ended = False
        self._dispatcher = dispatcher

    @property
    def ahead(self) -> int:
        """Number of images that are generated before the first one of this request."""
        return self._dispatcher.ahead_of(self)

    def cancel(self) -> None:
        """End the request."""
        self._dispatcher.end(self, RequestError("cancelled", "the request was cancelled"))


class Dispatcher:
    """Generates images with workers that it starts, watches and replaces. Returns when all of them are ready.

    Args:
        sources: the workers, one for each device: a :class:`~serving.engine.spec.WorkerSpec` for a process, or a
            function that returns an engine, for a thread of this process. All must have the same model.
        queue: maximum number of images that wait.
        observer: learns what happens, for metrics.

    Attributes:
        facts: description of the model.

    Raises:
        ValueError: in one line, if the model cannot be loaded.
    """

    def __init__(
        self, sources: WorkerSource | Sequence[WorkerSource], *, queue: int = 256, observer: Observer | None = None
    ) -> None:
        self._capacity, self._observer = queue, observer or Observer()
        self._changed = Condition()
        self._queue, self._throughput, self._delivery = ImageQueue(), Throughput(), Delivery()
        self._orders, self._keys = count(), count()
        self._active: set[Accepted] = set()
        self._closing, self._closed, self._close_by = False, False, math.inf
        sources = sources if isinstance(sources, Sequence) else [sources]
        self._slots = [WorkerSlot(self._changed, source, self) for source in sources]
        self._clock = Thread(target=self._watch_time, name="deadlines", daemon=True)
        try:
            for slot in self._slots:
                slot.start()
            with self._changed:
                self._changed.wait_for(lambda: self._start_errors() or all(slot.is_settled for slot in self._slots))
                if errors := self._start_errors():
                    raise errors[0]
        except BaseException:
            self.close()
            raise
        self.facts: ModelFacts = self._slots[0].facts
        self._clock.start()

    def submit(self, request: Request, listener: Listener, seconds: float | None = None) -> Ticket:
        """Accept a request, see :class:`~serving.engine.requests.Backend`."""
        try:
            return self._submit(request, listener, seconds)
        except RequestError as error:
            self._delivery.call(self._observer.refused, error.reason)
            raise

    def _submit(self, request: Request, listener: Listener, seconds: float | None) -> Ticket:
        try:
            request = check_request(request, self.facts)
        except ValueError as error:
            raise RequestError("invalid", str(error)) from error
        if len(request) > self._capacity:
            raise RequestError(
                "invalid", f"the request has {len(request)} images, but only {self._capacity} fit into the queue"
            )
        now = time.monotonic()
        accepted = Accepted(self, request, listener, now, seconds)
        with self._changed:
            if self._closing:
                raise RequestError("stopping", "the server is shutting down; try again soon", RETRY[0])
            if all(slot.has_given_up for slot in self._slots):
                raise _lost(max(slot.retry_after for slot in self._slots))
            if len(self._queue) + len(request) > self._capacity:
                excess = len(self._queue) + len(request) - self._capacity
                raise RequestError(
                    "full", f"{len(self._queue)} images are waiting; try again later", self._seconds_for(excess)
                )
            accepted.images = [
                QueuedImage(accepted, position, next(self._orders), work, now)
                for position, work in enumerate(_works(request))
            ]
            self._queue.add(accepted.images)
            self._active.add(accepted)
            self._delivery.call(self._observer.accepted, len(request))
            self._changed.notify_all()
        return accepted

    def load(self) -> Load:
        """How busy it is now."""
        with self._changed:
            alive = [slot.state for slot in self._slots if slot.state is not None]
            return Load(
                ready=bool(alive) and not self._closing,
                waiting=len(self._queue),
                running=sum(len(state.running) for state in alive),
                workers=len(alive),
                images_per_second=self._throughput.rate(len(alive)),
            )

    def close(self, seconds: float = 0.0) -> None:
        """Finish the accepted requests for at most ``seconds``, end the others, and stop. Harmless when repeated."""
        with self._changed:
            self._closing = True
            self._close_by = min(self._close_by, time.monotonic() + seconds)
            self._changed.notify_all()
            while self._active and (left := self._close_by - time.monotonic()) > 0:
                self._changed.wait(left)
            for accepted in list(self._active):
                self.end(accepted, RequestError("stopping", "the server is shutting down; try again soon", RETRY[0]))
            self._closed = True
            self._changed.notify_all()
        for slot in self._slots:
            slot.ask_to_stop()
        for slot in self._slots:
            slot.join(STOP_SECONDS)
        if self._clock.is_alive():
            self._clock.join()
        self._delivery.close()

    def kill(self) -> None:
        """End all worker processes at once, and start no others: this process is about to end."""
        for slot in self._slots:
            slot.kill()

    def ahead_of(self, accepted: Accepted) -> int:
        """See ``Ticket.ahead``."""
        with self._changed:
            if accepted.is_running or accepted.has_ended:
                return 0
            running = sum(len(slot.state.running) for slot in self._slots if slot.state is not None)
            return running + self._queue.ahead_of(accepted.images[0].order)

    def end(self, accepted: Accepted, error: RequestError | None = None) -> None:
        """End a request, unless it has ended, and drop its images."""
        with self._changed:
            if accepted.has_ended:
                return
            accepted.has_ended = True
            self._active.discard(accepted)
            accepted.images = []
            if error is not None:
                self._queue.remove(accepted)
                for slot in self._slots:
                    slot.drop(accepted, is_late=error.reason == "late")
            self._delivery.call(accepted.listener, Ended(error))
            reason: Reason | None = None if error is None else error.reason
            self._delivery.call(self._observer.ended, reason, time.monotonic() - accepted.arrived)
            self._changed.notify_all()

    # What follows is called by the slots, under the lock.

    def next_batch(self, state: State, now: float) -> tuple[list[Work], float | None]:
        """Work for a worker, and otherwise the number of seconds after which to ask again; None for any event."""
        if self._closed:
            return [], None
        images, seconds = state.choose(self._queue, now)
        if not images:
            return [], seconds
        self._queue.take(images)
        works = state.begin(images, self._keys, now)
        for image in images:
            image.request.is_running = True
        self._delivery.call(self._observer.batch, len(images))
        return works, None

    def heard(self, state: State, report: Report) -> None:
        """A worker has reported."""
        if isinstance(report, RowsReport):
            self._rows(state, report)
        elif isinstance(report, ImageReport):
            self._finish(state, report)
            self._changed.notify_all()
        else:
            self._fail(state, report)
            self._changed.notify_all()

    def worker_started(self, seconds: float) -> None:
        """A worker is ready."""
        self._delivery.call(self._observer.worker_started, seconds)

    def worker_died(self, images: Sequence[QueuedImage]) -> None:
        """A worker has died with images, which other workers generate, or the next one."""
        self._delivery.call(self._observer.worker_died)
        for image in images:
            image.deaths += 1
            if image.deaths >= MAX_DEATHS and not image.request.has_ended:
                LOGGER.error("an image was lost: %d workers died with it", image.deaths)
                self.end(image.request, _lost(RETRY[0]))
        self._queue.add(image for image in images if not image.request.has_ended)
        running = {each.request for slot in self._slots if slot.state for each in slot.state.running.values()}
        for image in images:
            image.request.is_running = image.request in running

    def given_up(self) -> None:
        """A worker could not be started several times. If no other one is left, nobody should wait any longer."""
        if all(slot.has_given_up for slot in self._slots):
            for accepted in list(self._active):
                self.end(accepted, _lost(max(slot.retry_after for slot in self._slots)))

    def _rows(self, state: State, report: RowsReport) -> None:
        rows = self.facts.grid or report.row
        if report.row >= rows:
            state.is_finishing = True
            self._changed.notify_all()
        parts: dict[Accepted, list[tuple[int, int]]] = {}
        for place, key in enumerate(report.keys):
            if (image := state.running.get(key)) is not None:
                parts.setdefault(image.request, []).append((image.position, place))
        for accepted, pairs in parts.items():
            files = report.previews
            previews = None if files is None else tuple(files[place] for _, place in pairs)
            event = Rows(tuple(position for position, _ in pairs), report.row, rows, previews)
            self._delivery.call(accepted.listener, event)

    def _finish(self, state: State, report: ImageReport) -> None:
        now = time.monotonic()
        image = state.finish(report.key, now, self._throughput)
        if image is None:
            return
        accepted: Accepted = image.request
        accepted.missing -= 1
        self._delivery.call(accepted.listener, Finished(image.position, report.pixels, report.codes))
        self._delivery.call(self._observer.image, image.started - image.arrived, now - image.started)
        if not accepted.missing:
            self.end(accepted)

    def _fail(self, state: State, report: FailureReport) -> None:
        for key in report.keys:
            image = state.finish(key, time.monotonic(), None)
            if image is not None:
                self.end(image.request, RequestError("invalid" if report.is_users else "failed", report.message))

    def _start_errors(self) -> list[Exception]:
        return [slot.start_error for slot in self._slots if slot.start_error is not None]

    def _seconds_for(self, images: int) -> float:
        """Estimated seconds until this many images are finished."""
        alive = sum(slot.state is not None for slot in self._slots)
        rate = self._throughput.rate(alive)
        return RETRY[0] if rate is None else min(max(images / rate, RETRY[0]), RETRY[1])

    def _watch_time(self) -> None:
        """End requests that are late, and replace workers that do not stop."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                for accepted in [each for each in self._active if each.deadline <= now]:
                    message = f"the request was not finished in {accepted.deadline - accepted.arrived:g} s"
                    self.end(accepted, RequestError("late", message, self._seconds_for(accepted.size)))
                for slot in self._slots:
                    slot.kill_if_silent(now - PATIENCE)
                times = [each.deadline for each in self._active]
                times += [slot.silent_since + PATIENCE for slot in self._slots]
                soonest = min(times, default=math.inf)
                self._changed.wait(None if soonest == math.inf else max(soonest - now, 0.0))


def _works(request: Request) -> list[Work]:
    if not isinstance(request, ImageRequest):
        return [Work(0, None, image=request.image)]
    return [
        Work(
            0,
            condition,
            request.seed,
            index,
            request.settings,
            request.image,
            request.keep_rows,
            request.previews,
            request.mask,
        )
        for condition, index in zip(request.conditions, request.indices, strict=True)
    ]


def _lost(retry_after: float) -> RequestError:
    return RequestError("lost", "the worker of the request died, and so did its replacements", max(retry_after, 1.0))
