"""The thread that calls listeners and observers, in the order of the events."""

import logging
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any

LOGGER = logging.getLogger("serving")


class Delivery:
    """Calls functions one after the other, without any lock of their callers."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function soon."""
        self._calls.put((function, arguments))

    def close(self) -> None:
        """Make all calls, then end. Harmless when repeated."""
        self._calls.put(None)
        if current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, arguments = call
            try:
                function(*arguments)
            except Exception:
                LOGGER.exception("a listener raised an error")
