"""Generates images through a backend, and reports how they grow."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.engine.facts import ModelFacts
from serving.engine.requests import Finished, ImageRequest, Rows
from serving.image_settings import Kind
from serving.page.news import News

MAX_IMAGES = 16
"""Maximum number of images of one request."""


@dataclass(frozen=True)
class GenerationRequest:
    """Arguments of ``LlamaGen.generate``, ``LlamaGen.complete`` or ``LlamaGen.inpaint``.

    Attributes:
        conditions: classes or prompts.
        images_per_prompt: images of each condition.
        seed: seed of all images.
        settings: :data:`~llamagen.sampling.config.IMAGE_SETTINGS`.
        image: file of an image to complete or to inpaint; None to generate whole images.
        keep_rows: rows of codes that are kept of it.
        mask: numbers of the codes of ``image`` that are generated again; None to keep rows.
    """

    conditions: tuple[int | str, ...]
    images_per_prompt: int
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    image: bytes | None = None
    keep_rows: int = 0
    mask: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.conditions) * self.images_per_prompt

    @property
    def kind(self) -> Kind:
        """What is made."""
        if self.image is None:
            return "generation"
        return "completion" if self.mask is None else "inpainting"

    def kept_rows(self, rows: int) -> int:
        """How many of ``rows`` rows of codes are known at the start; of a mask, as many codes as these rows have."""
        return self.keep_rows if self.mask is None else (rows * rows - len(self.mask)) // rows

    def condition(self, index: int) -> int | str:
        """Condition of an image."""
        return self.conditions[index % len(self.conditions)]

    def to_images(self, facts: ModelFacts) -> ImageRequest:
        """The same request for a backend.

        Raises:
            ValueError: in one line, if a setting is invalid.
        """
        return ImageRequest(
            tuple(map(self.condition, range(self.count))),
            tuple(range(self.count)),
            self.seed,
            facts.settings(self.settings),
            self.image,
            self.keep_rows,
            previews=True,
            mask=self.mask,
        )


@dataclass(frozen=True)
class Waiting:
    """No image of the request is being generated yet.

    Attributes:
        ahead: number of images of others that are generated first.
    """

    ahead: int


@dataclass(frozen=True)
class Progress:
    """Images have grown.

    Attributes:
        growing: the images that are being generated, in ascending order.
        row: number of complete rows of codes of the last one of them; 0 if there is none.
        rows: number of rows of an image.
        done: number of complete rows of all images of the request.
        seconds_left: estimate for all images of the request.
        previews: JPEG files of images that are being generated; None if there are no new ones.
        finished: pixels (H, W, 3) uint8 of images that are newly finished.
    """

    growing: tuple[int, ...]
    row: int
    rows: int
    done: int
    seconds_left: float
    previews: dict[int, bytes] | None
    finished: dict[int, np.ndarray]


Event = Waiting | Progress | None


def generation_events(
    request: GenerationRequest,
    rows: int,
    found: Iterable[News],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """Follow a generation.

    Args:
        request: what is generated.
        rows: number of rows of codes of an image.
        found: news of it.
        clock: seconds, for the time left.

    Yields:
        Events; None, at least twice per second, if there is none.
    """
    state, ahead = _Images(request, rows, clock), 0
    for each in found:
        if each.events:
            yield state.update(each.events)
        elif each.ahead != ahead:
            ahead = each.ahead
            state.wait()
            yield Waiting(ahead) if ahead else None
        else:
            yield None


class _Images:
    """All images of a request: how far they are."""

    def __init__(self, request: GenerationRequest, rows: int, clock: Callable[[], float]) -> None:
        self._rows, self._kept, self._clock, self._start = rows, request.kept_rows(rows), clock, clock()
        self._complete = [self._kept] * request.count
        self._growing, self._previews = set[int](), dict[int, bytes]()

    def wait(self) -> None:
        """The images still wait for others, so their time begins now."""
        self._start = self._clock()

    def update(self, events: list[Rows | Finished]) -> Progress:
        """Apply events, in their order."""
        finished, is_new = dict[int, np.ndarray](), False
        for event in events:
            if isinstance(event, Rows):
                self._growing |= set(event.images)
                for image in event.images:
                    self._complete[image] = event.row
                if event.previews is not None:
                    self._previews |= dict(zip(event.images, event.previews, strict=True))
                    is_new = True
            else:
                self._complete[event.image] = self._rows
                self._growing.discard(event.image)
                self._previews.pop(event.image, None)
                finished[event.image] = event.pixels
        growing = tuple(sorted(self._growing))
        done, kept = sum(self._complete), len(self._complete) * self._kept
        per_row = (self._clock() - self._start) / max(done - kept, 1)
        return Progress(
            growing,
            self._complete[growing[-1]] if growing else 0,
            self._rows,
            done,
            per_row * (len(self._complete) * self._rows - done),
            dict(sorted(self._previews.items())) if is_new or finished else None,
            finished,
        )
