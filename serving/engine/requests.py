"""Requests, and the events that report their progress."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from llamagen.sampling import SamplingConfig
from serving.engine.facts import ModelFacts

Reason = Literal["invalid", "full", "stopping", "cancelled", "late", "lost", "failed"]


class RequestError(Exception):
    """A request that is not answered with images.

    Args:
        reason: ``invalid``: an argument is wrong. ``full``: too many images wait. ``stopping``: the server is shutting
            down. ``cancelled``: by its owner. ``late``: not finished in time. ``lost``: its worker died, repeatedly.
            ``failed``: a bug, or values that are not finite.
        message: one sentence for the owner of the request, without a full stop.
        retry_after: seconds after which the same request may succeed; None if it cannot.
    """

    def __init__(self, reason: Reason, message: str, retry_after: float | None = None) -> None:
        super().__init__(reason, message, retry_after)
        self.reason, self.message, self.retry_after = reason, message, retry_after

    def __str__(self) -> str:
        """The message."""
        return self.message


@dataclass(frozen=True)
class ImageRequest:
    """Images to generate, to complete or to inpaint.

    Image k depends on its condition, the seed, its index, the settings, and what is kept of the given image only.

    Attributes:
        conditions: number of the class, or prompt, of each image.
        indices: index of each image; its random numbers depend on seed and index.
        seed: seed of all images, any integer.
        settings: settings of sampling.
        image: file (PNG, JPEG or WebP) of an image to complete or to inpaint; None to generate whole images.
        keep_rows: rows of codes that are kept of ``image``.
        previews: whether :class:`Rows` carry previews.
        mask: numbers, in raster order, of the codes of ``image`` that are generated again, while all others are kept;
            None to keep rows.
    """

    conditions: tuple[int | str, ...]
    indices: tuple[int, ...]
    seed: int
    settings: SamplingConfig
    image: bytes | None = None
    keep_rows: int = 0
    previews: bool = False
    mask: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.conditions)


@dataclass(frozen=True)
class ReconstructionRequest:
    """An image to encode and decode.

    Attributes:
        image: file (PNG, JPEG or WebP). For an autoregressive model it is cropped and resized to its resolution.
    """

    image: bytes

    def __len__(self) -> int:
        """Number of images."""
        return 1


Request = ImageRequest | ReconstructionRequest


@dataclass(frozen=True)
class Rows:
    """Some images of a request have grown. After the loss of a worker they start again with the first row.

    Attributes:
        images: their positions in the request.
        row: number of complete rows of codes.
        rows: number of rows of an image.
        previews: a JPEG file for each of ``images``, the missing rows in grey; None if there is no new preview.
    """

    images: tuple[int, ...]
    row: int
    rows: int
    previews: tuple[bytes, ...] | None = None


@dataclass(frozen=True)
class Finished:
    """An image of a request is finished. Each image is reported once, in any order.

    Attributes:
        image: its position in the request.
        pixels: (H, W, 3) uint8 RGB.
        codes: (h, w) int64.
    """

    image: int
    pixels: np.ndarray
    codes: np.ndarray


@dataclass(frozen=True)
class Ended:
    """The last event of each request, reported once.

    Attributes:
        error: why the request has no, or not all, images; None if all are finished.
    """

    error: RequestError | None = None


Event = Rows | Finished | Ended
Listener = Callable[[Event], None]


class Ticket(Protocol):
    """An accepted request."""

    @property
    def ahead(self) -> int:
        """Number of images that are generated before the first one of this request; 0 if it runs or has ended."""

    def cancel(self) -> None:
        """End the request: at once if it waits, after the current row of codes if it runs. Harmless when repeated."""


@dataclass(frozen=True)
class Load:
    """How busy a backend is.

    Attributes:
        ready: whether it accepts requests and has a worker that is loaded.
        waiting: images in the queue.
        running: images that are being generated.
        workers: workers that are alive.
        images_per_second: rate of the last minutes while workers were busy; None if unknown.
    """

    ready: bool
    waiting: int
    running: int
    workers: int
    images_per_second: float | None = None


class Backend(Protocol):
    """Answers requests. All methods may be called from any thread."""

    facts: ModelFacts

    def submit(self, request: Request, listener: Listener, seconds: float | None = None) -> Ticket:
        """Accept a request.

        Args:
            request: a valid request.
            listener: called with each event from a thread of the backend, which may be the same for all requests. It
                must return soon and raise nothing.
            seconds: time limit from now; then the request ends with reason ``late``.

        Raises:
            RequestError: ``full``, ``stopping``, ``invalid``, or ``lost`` while no worker can be started; then the
                listener is never called.
        """

    def load(self) -> Load:
        """How busy it is now."""

    def close(self, seconds: float = 0.0) -> None:
        """Accept no more requests, finish the accepted ones for at most ``seconds``, end the others, and stop."""
