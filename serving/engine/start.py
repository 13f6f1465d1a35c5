"""Starts a worker of any kind."""

from collections.abc import Callable

from serving.engine.process_worker import ProcessWorker
from serving.engine.spec import WorkerSpec
from serving.engine.worker import Heard, ThreadWorker, Worker, WorkerSource


def start_worker(source: WorkerSource, heard: Heard, ended: Callable[[], None], stopped: Callable[[], bool]) -> Worker:
    """Start a worker, and wait until it is ready.

    Args:
        source: what to start.
        heard: called from a thread of the worker.
        ended: called once, after the last report.
        stopped: says that nobody waits for it any more.

    Raises:
        ValueError: in one line, if its engine cannot be loaded, or its process ended before it was ready.
    """
    if isinstance(source, WorkerSpec):
        return ProcessWorker(source, heard, ended, stopped)
    return ThreadWorker(source, heard, ended)
