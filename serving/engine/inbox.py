"""The inbox of an engine: one thread puts work in, and the engine takes it out."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from threading import Condition

from serving.engine.engine import Work


class WorkInbox:
    """Work for the engine of a thread or process, see :class:`~serving.engine.engine.Inbox`.

    Args:
        taken: called in the engine's thread whenever it has nothing to do, so that it is known to be alive.
    """

    def __init__(self, taken: Callable[[], object] = lambda: None) -> None:
        self._taken = taken
        self._changed = Condition()
        self._batches: deque[Sequence[Work]] = deque()
        self._cancelled: set[int] = set()
        self._seen: set[int] = set()  # cancelled keys that the engine has read
        self._closed = False

    def put(self, batch: Sequence[Work]) -> None:
        """Add a batch; a later one is taken after it."""
        with self._changed:
            self._batches.append(batch)
            self._changed.notify_all()

    def cancel(self, keys: Iterable[int]) -> None:
        """Nobody wants these images any more."""
        with self._changed:
            unwanted = set(keys)
            waiting = {work.key for batch in self._batches for work in batch}
            if unwanted & waiting:
                self._batches = deque([work for work in each if work.key not in unwanted] for each in self._batches)
            # footgun: those that were not taken must not count as seen, or they would be forgotten before they are.
            self._cancelled |= unwanted - waiting

    def forget(self, keys: Iterable[int]) -> None:
        """The engine has reported these images as finished or failed."""
        with self._changed:
            self._cancelled.difference_update(keys)

    def close(self) -> None:
        """Ask the engine to end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, block: bool) -> list[Work]:
        """The next batch, without the images that were cancelled in the meantime."""
        with self._changed:
            # An engine that has read that a key is cancelled ends its image before it asks for more work.
            self._cancelled -= self._seen
            self._seen.clear()
        while True:
            if block:  # also after a batch that was cancelled before it was taken
                self._taken()
            with self._changed:
                if block and not self._batches:
                    self._changed.wait_for(lambda: self._closed or self._batches)
                if self._closed:
                    return []
                while self._batches:
                    if batch := self._batches.popleft():
                        return list(batch)
                if not block:
                    return []

    def cancelled(self) -> set[int]:
        """Keys of all work that nobody wants any more and that was not reported as finished or failed."""
        with self._changed:
            self._seen |= self._cancelled
            return set(self._cancelled)

    @property
    def closed(self) -> bool:
        """Whether the engine should end as soon as possible."""
        return self._closed
