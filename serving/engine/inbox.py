"""The inbox of an engine: one thread puts work in, and the engine takes it out."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from threading import Condition

from serving.engine.engine import Work


class WorkInbox:
    """Work for the engine of a thread or process, see :class:`~serving.engine.engine.Inbox`.

    Args:
        taken: called in the engine's thread whenever it asks for work, so that it is known to be alive.
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
            self._cancelled.update(keys)

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
        self._taken()
        with self._changed:
            # An engine that has read that a key is cancelled ends its image before it asks for more work.
            self._cancelled -= self._seen
            self._seen.clear()
            while not self._closed:
                while self._batches:
                    batch = self._batches.popleft()
                    wanted = [work for work in batch if work.key not in self._cancelled]
                    self._cancelled.difference_update(work.key for work in batch)
                    if wanted:
                        return wanted
                if not block:
                    break
                self._changed.wait()
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
