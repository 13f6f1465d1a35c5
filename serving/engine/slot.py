"""A place for a worker: starts it, gives it work, and replaces it when it dies."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from threading import Condition, Thread
from typing import Any, Protocol

from serving.engine.engine import Report, Work
from serving.engine.facts import ModelFacts
from serving.engine.image_queue import ImageQueue, QueuedImage
from serving.engine.start import start_worker
from serving.engine.throughput import Throughput
from serving.engine.worker import Worker, WorkerSource

LOGGER = logging.getLogger("serving")

JOIN_SECONDS = 0.01
"""Seconds that an image waits for others to share its batch."""
ATTEMPTS = 3
"""Starts that may fail in a row before requests end as lost."""
BACK_OFF = 1.0
"""Seconds before the second attempt to replace a worker; they double with each further one."""
MAX_BACK_OFF = 30.0
"""Maximum number of seconds between two attempts."""


class State:
    """A worker during its life, and the images that it has. Guarded by the lock of the dispatcher.

    Attributes:
        worker: the worker, once it is ready.
        running: images that were sent and not reported, by key.
        cancels: keys of images that nobody wants any more; the worker is yet to be told.
        is_finishing: whether all codes of the last batch are generated. The worker may then get the next one, and need
            not wait for it.
        has_ended: whether the worker has ended.
        has_finished: whether it has finished an image.
        silent_since: when a running image became late, if the worker has not shown since that it is alive; otherwise
            infinity.
    """

    worker: Worker

    def __init__(self) -> None:
        self.running: dict[int, QueuedImage] = {}
        self.cancels: list[int] = []
        self.is_finishing = self.has_ended = self.has_finished = self._is_alone = False
        self.silent_since = math.inf
        self._busy_since = 0.0

    def choose(self, queue: ImageQueue, now: float) -> tuple[list[QueuedImage], float | None]:
        """The next batch, which stays in the queue; or the seconds after which to ask again, None for any event."""
        if not len(queue) or (self.running and (self._is_alone or queue.oldest.is_suspect)):
            return [], None
        if self.worker.is_continuous:
            return queue.choose(self.worker.capacity - len(self.running), one_group=False), None
        if self.running and not self.is_finishing:
            return [], None
        images = queue.choose(self.worker.capacity, one_group=True)
        seconds = queue.oldest.arrived + JOIN_SECONDS - now
        if len(images) < self.worker.capacity and seconds > 0:
            return [], seconds
        return images, None

    def begin(self, images: Sequence[QueuedImage], keys: Iterator[int], now: float) -> list[Work]:
        """Note that images are sent, and return them as work."""
        if not self.running:
            self._busy_since = now
        self.is_finishing, self._is_alone = False, images[0].is_suspect
        works = []
        for image in images:
            image.started = now
            work = replace(image.work, key=next(keys))
            self.running[work.key] = image
            works.append(work)
        return works

    def finish(self, key: int, now: float, throughput: Throughput | None) -> QueuedImage | None:
        """An image is finished or has failed; None if it was cancelled before."""
        self.has_finished = True
        if (image := self.running.pop(key, None)) is not None and throughput is not None:
            throughput.add(now, now - self._busy_since, 1)
            self._busy_since = now
        return image

    def drop(self, request: Any, is_late: bool) -> None:
        """Cancel the images of a request."""
        keys = [key for key, image in self.running.items() if image.request is request]
        for key in keys:
            del self.running[key]
        self.cancels += keys
        if keys and is_late:
            self.silent_since = min(self.silent_since, time.monotonic())


class Owner(Protocol):
    """What a slot needs of its dispatcher. All but the reports' texts happens under the lock."""

    def next_batch(self, state: State, now: float) -> tuple[list[Work], float | None]:
        """Work for a worker, and otherwise the seconds after which to ask again."""

    def heard(self, state: State, report: Report) -> None:
        """A worker has reported."""

    def worker_started(self, seconds: float) -> None:
        """A worker is ready."""

    def worker_died(self, images: Sequence[QueuedImage]) -> None:
        """A worker has died with images."""

    def given_up(self) -> None:
        """A worker could not be started several times."""


class WorkerSlot:
    """Keeps one worker alive.

    Args:
        changed: the lock of the dispatcher.
        source: the worker.
        owner: the dispatcher.

    Attributes:
        facts: description of the model, once a worker is ready.
        state: the worker that is ready; None while there is none.
        start_error: error of the first start.
        is_settled: whether the first start has succeeded or failed.
        has_given_up: whether the last starts have failed.
        retry_after: seconds until the next start.
    """

    facts: ModelFacts

    def __init__(self, changed: Condition, source: WorkerSource, owner: Owner) -> None:
        self._changed, self._source, self._owner = changed, source, owner
        self.state: State | None = None
        self.start_error: Exception | None = None
        self.is_settled = self.has_given_up = self._stopping = False
        self.retry_after = BACK_OFF
        self._thread = Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        """Start the worker in the background."""
        self._thread.start()

    @property
    def silent_since(self) -> float:
        """See :class:`State`."""
        return math.inf if self.state is None else self.state.silent_since

    def drop(self, request: Any, is_late: bool) -> None:
        """Cancel the images of a request."""
        if self.state is not None:
            self.state.drop(request, is_late)

    def kill_if_silent(self, limit: float) -> None:
        """Kill a worker that has late images and was not heard of since ``limit``; it is replaced."""
        state = self.state
        if state is not None and state.silent_since <= limit:
            state.silent_since = math.inf
            if state.worker.kill():
                LOGGER.error("a worker did not stop a request that is late; it was killed and will be replaced")
            else:
                LOGGER.error("a worker does not stop a request that is late, and cannot be killed")

    def ask_to_stop(self) -> None:
        """End the worker soon, and start no other one."""
        with self._changed:
            self._stopping = True
            worker = None if self.state is None else self.state.worker
            self._changed.notify_all()
        if worker is not None:
            worker.stop()

    def kill(self) -> None:
        """End the worker at once, and start no other one."""
        with self._changed:
            self._stopping = True
            if self.state is not None:
                self.state.worker.kill()
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait until the worker has ended; kill it if it takes longer."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
            # footgun: it hangs in the pipe of a process that does not read.
            if self._thread.is_alive() and (state := self.state) is not None:
                state.worker.kill()
                self._thread.join(5.0)
        state, self.state = self.state, None
        if state is not None and not state.worker.join(seconds):
            state.worker.kill()
            if not state.worker.join(5.0):
                LOGGER.error("a worker does not end")

    def _run(self) -> None:
        deaths = 0
        while (state := self._start()) is not None:
            self._feed(state)
            with self._changed:
                if self._stopping:
                    return
                self.state = None
                images = list(state.running.values())
                state.running.clear()
                LOGGER.error("a worker ended unexpectedly with %d images; it will be replaced", len(images))
                self._owner.worker_died(images)
                self._changed.notify_all()
            state.worker.kill()
            state.worker.join(5.0)
            deaths = 1 if state.has_finished else deaths + 1
            if deaths > 1:
                self._pause(_delay(deaths - 1))

    def _start(self) -> State | None:
        """Start a worker, trying again until it succeeds; None if the slot stops, or the first start fails."""
        failures = 0
        while not self._stopping:
            state, begin = State(), time.monotonic()
            try:
                state.worker = start_worker(
                    self._source, partial(self._heard, state), partial(self._ended, state), lambda: self._stopping
                )
            except Exception as error:
                failures += 1
                if not self._failed(error, failures):
                    return None
                self._pause(self.retry_after)
                continue
            with self._changed:
                self.facts, self.state = state.worker.facts, state
                self.is_settled, self.has_given_up = True, False
                self._owner.worker_started(time.monotonic() - begin)
                self._changed.notify_all()
                if self._stopping:
                    state.worker.stop()
            return state
        return None

    def _failed(self, error: Exception, failures: int) -> bool:
        """A start failed; whether to try again."""
        with self._changed:
            if not self.is_settled or self._stopping:
                self.start_error, self.is_settled = error, True
                self._changed.notify_all()
                return False
            LOGGER.error("a worker could not be started: %s", error)
            self.retry_after = _delay(failures)
            if failures >= ATTEMPTS:
                self.has_given_up = True
                self._owner.given_up()
            return True

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, seconds)

    def _feed(self, state: State) -> None:
        """Give work to a worker until it ends or the slot stops."""
        while True:
            with self._changed:
                while True:
                    if state.has_ended or self._stopping:
                        return
                    works, seconds = self._owner.next_batch(state, time.monotonic())
                    if works or state.cancels:
                        break
                    self._changed.wait(seconds)
                cancels, state.cancels = state.cancels, []
            # Not under the lock: a pipe may be full.
            if cancels:
                state.worker.cancel(cancels)
            if works:
                state.worker.send(works)

    def _heard(self, state: State, report: Report | None) -> None:
        with self._changed:
            state.silent_since = math.inf
            if report is not None and self.state is state:
                self._owner.heard(state, report)

    def _ended(self, state: State) -> None:
        with self._changed:
            state.has_ended = True
            self._changed.notify_all()


def _delay(failures: int) -> float:
    return min(BACK_OFF * 2.0 ** min(failures - 1, 30), MAX_BACK_OFF)
