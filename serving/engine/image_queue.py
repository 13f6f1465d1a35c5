"""Images that wait for a worker, the oldest first."""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from serving.engine.engine import Work

ALONE_AFTER = 2
"""Deaths of its workers after which an image is generated alone, so that a deadly one takes no others with it."""


@dataclass(eq=False)
class QueuedImage:
    """An image of an accepted request, until it is finished.

    Attributes:
        request: its request; the queue only compares it.
        position: position in its request.
        order: number by which images are served.
        work: what a worker gets, but for the key.
        arrived: when it was accepted, in seconds.
        started: when a worker got it, in seconds.
        deaths: number of workers that died with it.
    """

    request: Any
    position: int
    order: int
    work: Work
    arrived: float
    started: float = 0.0
    deaths: int = 0

    @property
    def is_suspect(self) -> bool:
        """Whether it must be generated alone."""
        return self.deaths >= ALONE_AFTER


_ORDER = attrgetter("order")


class ImageQueue:
    """Images by their order. Not thread-safe."""

    def __init__(self) -> None:
        self._images: list[QueuedImage] = []

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    @property
    def oldest(self) -> QueuedImage:
        """The first image; there must be one."""
        return self._images[0]

    def add(self, images: Iterable[QueuedImage]) -> None:
        """Insert images, also those that come back from a worker that died."""
        for image in images:
            insort(self._images, image, key=_ORDER)

    def remove(self, request: Any) -> None:
        """Remove all images of a request."""
        self._images = [image for image in self._images if image.request is not request]

    def ahead_of(self, order: int) -> int:
        """Number of images before this order."""
        return bisect_left(self._images, order, key=_ORDER)

    def choose(self, count: int, one_group: bool) -> list[QueuedImage]:
        """The next batch, which stays in the queue: the oldest image, and the oldest ones that may join it.

        Args:
            count: maximum number of images.
            one_group: whether images must have the group of the oldest one.
        """
        if not self._images or count < 1:
            return []
        first = self._images[0]
        if first.is_suspect:
            return [first]
        group, chosen = first.work.group, [first]
        for image in self._images[1:]:
            if len(chosen) >= count:
                break
            if not image.is_suspect and (not one_group or image.work.group == group):
                chosen.append(image)
        return chosen

    def take(self, chosen: list[QueuedImage]) -> None:
        """Remove the images of a batch."""
        keys = {image.order for image in chosen}
        self._images = [image for image in self._images if image.order not in keys]
