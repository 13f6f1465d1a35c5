"""The engine of a worker: the model and the loop that generates, next to a queue of single images.

A worker is a thread or process with one engine. It receives work through its :class:`Inbox` and reports what happens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llamagen.sampling import SamplingConfig
from serving.engine.facts import ModelFacts


@dataclass(frozen=True)
class Work:
    """One image.

    Attributes:
        key: number of this image in the worker; it is not used again.
        condition: number of the class, or prompt; None to reconstruct ``image``.
        seed: seed of its request.
        index: index of the image.
        settings: settings of sampling; None to reconstruct.
        image: file of an image to complete, to inpaint or to reconstruct.
        keep_rows: rows of codes that are kept of it.
        previews: whether previews are wanted.
        mask: numbers of the codes of ``image`` that are generated again; None to keep rows.
    """

    key: int
    condition: int | str | None
    seed: int = 0
    index: int = 0
    settings: SamplingConfig | None = None
    image: bytes | None = None
    keep_rows: int = 0
    previews: bool = False
    mask: tuple[int, ...] | None = None

    @property
    def group(self) -> tuple[object, ...]:
        """Images of equal groups can be generated in one batch."""
        masked = None if self.mask is None else len(self.mask)
        return self.settings, self.keep_rows if self.image is not None else 0, masked, self.condition is None


@dataclass(frozen=True)
class RowsReport:
    """Images have grown to ``row`` complete rows of codes.

    Attributes:
        keys: the images.
        row: number of complete rows.
        previews: JPEG files of ``keys``; None if there are no new ones.
    """

    keys: tuple[int, ...]
    row: int
    previews: tuple[bytes, ...] | None = None


@dataclass(frozen=True)
class ImageReport:
    """An image is finished.

    Attributes:
        key: the image.
        pixels: (H, W, 3) uint8.
        codes: (h, w) int64.
    """

    key: int
    pixels: np.ndarray
    codes: np.ndarray


@dataclass(frozen=True)
class FailureReport:
    """Images failed, and the engine goes on.

    Attributes:
        keys: the images.
        message: one sentence for the owner of the request, without a full stop.
        is_users: whether the request is to blame, and not the server.
    """

    keys: tuple[int, ...]
    message: str
    is_users: bool


Report = RowsReport | ImageReport | FailureReport


class Inbox(Protocol):
    """Work for an engine."""

    def take(self, block: bool) -> list[Work]:
        """New work; with ``block`` wait for some. Empty without ``block`` if there is none, or once it is closed."""

    def cancelled(self) -> set[int]:
        """Keys of all work that nobody wants any more and that was not reported as finished or failed."""

    @property
    def closed(self) -> bool:
        """Whether the engine should end as soon as possible."""


class Engine(Protocol):
    """A loaded model that generates.

    Attributes:
        facts: description of the model.
        capacity: maximum number of images at a time.
        is_continuous: whether it takes new images while others are running (continuous batching). Otherwise it gets a
            batch of one group, and the next one after all of it is reported.
    """

    facts: ModelFacts
    capacity: int
    is_continuous: bool

    def run(self, inbox: Inbox, report: Callable[[Report], None]) -> None:
        """Work until the inbox is closed.

        Each image that is not cancelled is reported as finished or failed, once. Errors of single images or batches are
        reported as failures; an exception ends the worker, which is then replaced.
        """
