"""How many images a second workers generate while they are busy."""

from collections import deque

WINDOW = 120.0
"""Seconds that are remembered."""


class Throughput:
    """Rate of the images of the last two minutes of work. Not thread-safe. Times are in seconds."""

    def __init__(self) -> None:
        self._spans: deque[tuple[float, float, int]] = deque()  # end, seconds, images
        self._seconds, self._images = 0.0, 0

    def add(self, now: float, seconds: float, images: int) -> None:
        """A worker was busy for some seconds and finished some images."""
        self._spans.append((now, seconds, images))
        self._seconds += seconds
        self._images += images
        while len(self._spans) > 1 and self._spans[0][0] < now - WINDOW:
            _, gone, count = self._spans.popleft()
            self._seconds -= gone
            self._images -= count

    def rate(self, workers: int) -> float | None:
        """Images a second of this many busy workers; None if unknown."""
        if not self._images or self._seconds <= 0.0:
            return None
        return self._images / self._seconds * max(workers, 1)
