"""A worker, seen from the dispatcher, and the one that is a thread of this process."""

import logging
from collections.abc import Callable, Sequence
from threading import Event, Thread
from typing import Protocol

from serving.engine.engine import Engine, FailureReport, ImageReport, Report, Work
from serving.engine.facts import ModelFacts
from serving.engine.inbox import WorkInbox
from serving.engine.spec import WorkerSpec

LOGGER = logging.getLogger("serving")

Heard = Callable[[Report | None], None]
"""Takes the reports of a worker; None says that it is alive and has nothing to do."""
WorkerSource = WorkerSpec | Callable[[], Engine]
"""A process, or what a thread calls first to get its engine."""


class Worker(Protocol):
    """A worker that is ready. Methods may be called from any thread.

    Attributes:
        facts: description of its model.
        capacity: maximum number of images at a time.
        is_continuous: see :class:`~serving.engine.engine.Engine`.
    """

    facts: ModelFacts
    capacity: int
    is_continuous: bool

    def send(self, batch: Sequence[Work]) -> None:
        """Give it a batch. A worker that has died takes it silently."""

    def cancel(self, keys: Sequence[int]) -> None:
        """Nobody wants these images any more."""

    def stop(self) -> None:
        """Ask it to end as soon as possible."""

    def kill(self) -> bool:
        """End it at once, or say that it cannot."""

    def join(self, seconds: float) -> bool:
        """Wait until it has ended; whether it has."""


class ThreadWorker:
    """An engine in a thread of this process. It ends at its next row; nothing can end it at once."""

    def __init__(self, build: Callable[[], Engine], heard: Heard, ended: Callable[[], None]) -> None:
        self._build, self._heard, self._ended = build, heard, ended
        self._inbox, self._ready = WorkInbox(lambda: heard(None)), Event()
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if isinstance(self._error, Exception):
            raise self._error
        if self._error is not None:  # such as SystemExit, which would end the caller's thread without a word
            raise RuntimeError(f"the engine was not built: {self._error!r}") from self._error

    def send(self, batch: Sequence[Work]) -> None:
        """Give it a batch."""
        self._inbox.put(batch)

    def cancel(self, keys: Sequence[int]) -> None:
        """Nobody wants these images any more."""
        self._inbox.cancel(keys)

    def stop(self) -> None:
        """Ask it to end."""
        self._inbox.close()

    def kill(self) -> bool:
        """A thread cannot be killed."""
        return False

    def join(self, seconds: float) -> bool:
        """Wait for its end."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            engine = self._build()
            self.facts, self.capacity, self.is_continuous = engine.facts, engine.capacity, engine.is_continuous
        except BaseException as error:  # raised in the thread that started this one
            self._error = error
            return
        finally:
            self._ready.set()
        try:
            engine.run(self._inbox, self._report)
        except BaseException:
            LOGGER.exception("a worker ended with an error")
        finally:
            self._ended()

    def _report(self, report: Report) -> None:
        self._inbox.forget(finished_keys(report))
        self._heard(report)


def finished_keys(report: Report) -> Sequence[int]:
    """Images that a report finishes."""
    if isinstance(report, ImageReport):
        return (report.key,)
    return report.keys if isinstance(report, FailureReport) else ()
