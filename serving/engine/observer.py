"""What a dispatcher tells its metrics."""

from serving.engine.requests import Reason


class Observer:
    """Hooks that do nothing; a subclass counts. All calls come from one thread. They must return soon."""

    def accepted(self, images: int) -> None:
        """A request was accepted."""

    def refused(self, reason: Reason) -> None:
        """A request was not accepted."""

    def ended(self, reason: Reason | None, seconds: float) -> None:
        """An accepted request has ended, after ``seconds``; the reason is None if all of its images are finished."""

    def batch(self, images: int) -> None:
        """Images were sent to a worker together."""

    def image(self, queued: float, generated: float) -> None:
        """An image is finished, after seconds in the queue and seconds in a worker."""

    def worker_started(self, seconds: float) -> None:
        """A worker is ready, ``seconds`` after its start."""

    def worker_died(self) -> None:
        """A worker ended that should not have."""
