"""A worker that is a process of its own: it may be killed, and its Python threads do not slow down the front."""

import atexit
import logging
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from threading import Lock, Thread
from typing import Any

from serving.engine.engine import Work
from serving.engine.spec import WorkerSpec
from serving.engine.worker import Heard
from serving.engine.worker_process import Cancel, Ready, StartFailure, Stop, run_worker

LOGGER = logging.getLogger("serving")


class ProcessWorker:
    """A worker process, see :class:`~serving.engine.worker.Worker`.

    Args:
        spec: what it loads.
        heard: called with its reports, in a thread of this object.
        ended: called once, after the last report.
        stopped: says that nobody waits for it any more.

    Raises:
        ValueError: in one line, if it cannot load its engine, or ended before it was ready.
        RuntimeError: if it is no longer needed.
    """

    def __init__(
        self, spec: WorkerSpec, heard: Heard, ended: Callable[[], None], stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self._heard, self._ended, self._lock = heard, ended, Lock()
        self._threads: list[Thread] = []
        # A fork would share locks and threads of torch. footgun: the process must not be a daemon of multiprocessing,
        # which may not start processes of its own (an engine may); so it is killed at exit here.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=run_worker, args=(theirs, spec), name="engine")
        self.process.start()
        theirs.close()  # so that the connection ends with the process
        atexit.register(self.kill)
        try:
            ready = self._wait_until_ready(spec, stopped)
        except BaseException:
            self.kill()
            self.join(5.0)
            raise
        self.facts, self.capacity, self.is_continuous = ready.facts, ready.capacity, ready.is_continuous
        self._begin(self._read, "reports")

    def send(self, batch: Sequence[Work]) -> None:
        """Give it a batch."""
        self._send(batch)

    def cancel(self, keys: Sequence[int]) -> None:
        """Nobody wants these images any more."""
        self._send(Cancel(tuple(keys)))

    def stop(self) -> None:
        """Ask it to end."""
        # In a thread: the pipe of a process that hangs may be full.
        self._begin(lambda: self._send(Stop()), "stop")

    def kill(self) -> bool:
        """End it at once."""
        self.process.kill()
        return True

    def join(self, seconds: float) -> bool:
        """Wait for its end."""
        if not wait([self.process.sentinel], seconds):
            return False
        self.process.join()
        atexit.unregister(self.kill)
        for thread in self._threads:
            thread.join(seconds)
        return True

    def _begin(self, call: Callable[[], None], name: str) -> None:
        thread = Thread(target=call, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _send(self, message: Any) -> None:
        try:
            with self._lock:
                self._connection.send(message)
        except OSError:  # it has died, which the reader notices
            pass

    def _wait_until_ready(self, spec: WorkerSpec, stopped: Callable[[], bool]) -> Ready:
        while True:
            message = self._receive(0.2)
            if isinstance(message, Ready):
                return message
            if isinstance(message, StartFailure):
                raise ValueError(message.message)
            if isinstance(message, EOFError):
                self.process.join(5.0)  # the pipe may end some time before the process
                raise ValueError(_early_end(spec, self.process.exitcode))
            if stopped():
                raise RuntimeError("the worker is no longer needed")

    def _receive(self, seconds: float | None) -> Any:
        """The next message; None after ``seconds`` without one, an ``EOFError`` if there are no more."""
        # The process may have left its end of the pipe to one that it started, so its own end counts, too.
        ready = wait([self._connection, self.process.sentinel], seconds)
        try:
            if self._connection in ready or self._connection.poll():
                return self._connection.recv()
        except (EOFError, OSError):
            return EOFError()
        return EOFError() if ready else None

    def _read(self) -> None:
        while not isinstance(message := self._receive(None), EOFError):
            self._heard(message)
        self._ended()


def _early_end(spec: WorkerSpec, code: int | None) -> str:
    """Why there is no worker."""
    if code == -signal.SIGKILL:
        return (
            f"the worker of {spec.source} was killed while it was starting: it may have run out of memory; choose a "
            "smaller model or a smaller batch size"
        )
    return f"the worker of {spec.source} ended while it was starting (exit code {code}); see the lines above"
