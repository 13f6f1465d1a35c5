"""One thread that does all work with the model, in the order of the requests.

Requests of several people never run at the same time, so each has the whole machine, and the threads and memory that
the engines keep for their calling thread are created once.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import Any

MAX_JOBS = 32
"""Maximum number of requests that run or wait."""
IDLE = 0.5
"""Seconds after which a reader of events gets control, even if nothing has happened."""
_END = object()


class StoppedError(Exception):
    """A job was stopped by its owner."""


class Job:
    """One request, and the events that it reports. Another thread reads them.

    Attributes:
        result: result of the work, or its error.
    """

    def __init__(self) -> None:
        self.result: Future[Any] = Future()
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._stopped = Event()

    def stop(self) -> None:
        """End the work at its next check, or before it starts."""
        self._stopped.set()

    def check(self) -> None:
        """Called by the work.

        Raises:
            StoppedError: if the job was stopped.
        """
        if self._stopped.is_set():
            raise StoppedError

    def report(self, event: Any) -> None:
        """Called by the work: pass an event to the reader."""
        self._events.put(event)

    def events(self) -> Iterator[Any]:
        """Events until the work ends; None whenever there is none for :data:`IDLE` seconds.

        Raises:
            Exception: the error of the work; :class:`StoppedError` if the job was stopped.
        """
        while True:
            try:
                event = self._events.get(timeout=IDLE)
            except Empty:
                event = None
            if event is _END:
                break
            yield event
        self.result.result()

    def finish(self) -> None:
        """End :meth:`events`."""
        self._events.put(_END)


class Worker:
    """Runs jobs one after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "model")
        self._jobs: list[Job] = []
        self._lock = Lock()

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Queue a job.

        Args:
            work: what to do; it should call :meth:`Job.check` often.

        Raises:
            ValueError: in one line, if too many jobs wait.
        """
        job = Job()
        with self._lock:
            if len(self._jobs) >= MAX_JOBS:
                raise ValueError(f"{len(self._jobs)} requests are waiting for the model; try again later")
            self._jobs.append(job)
        self._pool.submit(self._run, job, work)
        return job

    def ahead(self, job: Job) -> int:
        """Number of jobs that run before this one; 0 if it runs or has ended."""
        with self._lock:
            return self._jobs.index(job) if job in self._jobs else 0

    def close(self) -> None:
        """Stop all jobs, and wait for their ends."""
        with self._lock:
            for job in self._jobs:
                job.stop()
        self._pool.shutdown()

    def _run(self, job: Job, work: Callable[[Job], Any]) -> None:
        try:
            job.check()
            job.result.set_result(work(job))
        except BaseException as error:  # raised again in the thread that reads the events
            job.result.set_exception(error)
        finally:
            with self._lock:
                self._jobs.remove(job)
            job.finish()
