"""An engine without a model, whose batches run when a test says so."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamagen.sampling import SamplingConfig
from serving.engine.engine import FailureReport, ImageReport, Inbox, Report, RowsReport, Work
from serving.engine.facts import ModelFacts
from serving.engine.requests import Ended, Event, Finished, ImageRequest, RequestError, Rows
from serving.engine.spec import WorkerSpec
from tests.serving.waiting import until as until

FACTS = ModelFacts(
    name="scripted",
    kind="class",
    description="no model",
    dtype="float32",
    device="cpu",
    batch_size=4,
    downsampling=2,
    codebook_size=16,
    resolution=8,
    grid=4,
    classes=tuple(map(str, range(10))),
    sampling={},
)
DEADLY, BAD, BROKEN = 7, 8, 9
"""Classes that end the worker, that the engine calls invalid, and that fail."""
SECONDS = 30.0
"""Limit of waiting, which no test reaches."""


class DeadError(Exception):
    """Ends a worker."""


class ScriptedEngine:
    """Generates the images of a batch row by row. The value of each pixel is that of the seed.

    Attributes:
        batches: seeds of each batch that was started.
        gate: batches wait for it before each row.
        started: set when a batch has started.
    """

    def __init__(self, capacity: int = 4, is_continuous: bool = False) -> None:
        self.facts, self.capacity, self.is_continuous = FACTS, capacity, is_continuous
        self.batches: list[list[int]] = []
        self.gate, self.started = threading.Event(), threading.Event()
        self.gate.set()

    def run(self, inbox: Inbox, report: Callable[[Report], None]) -> None:
        while batch := inbox.take(block=True):
            self.batches.append([work.seed for work in batch])
            self.started.set()
            self._generate(batch, inbox, report)

    def _generate(self, batch: Sequence[Work], inbox: Inbox, report: Callable[[Report], None]) -> None:
        for row in range(1, 5):
            while not self.gate.wait(0.005) and not inbox.closed:
                if {work.key for work in batch} <= inbox.cancelled():
                    break
            if inbox.closed or {work.key for work in batch} <= inbox.cancelled():
                return
            if any(work.condition == DEADLY for work in batch):
                raise DeadError
            report(RowsReport(tuple(work.key for work in batch), row))
        cancelled = inbox.cancelled()
        for work in batch:
            if work.condition in (BAD, BROKEN):
                report(FailureReport((work.key,), "no such thing", work.condition == BAD))
            elif work.key not in cancelled:
                pixels = np.full((8, 8, 3), work.seed % 256, np.uint8)
                report(ImageReport(work.key, pixels, np.full((4, 4), work.index)))


def request(seed: int, count: int = 1, condition: int = 1, **settings: Any) -> ImageRequest:
    return ImageRequest((condition,) * count, tuple(range(count)), seed, SamplingConfig(**settings))


@dataclass
class Heard:
    """A listener that remembers the events of one request."""

    events: list[Event] = field(default_factory=list)
    has_ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        assert not self.has_ended.is_set()
        self.events.append(event)
        if isinstance(event, Ended):
            self.has_ended.set()

    @property
    def error(self) -> RequestError | None:
        """Wait for the end."""
        assert self.has_ended.wait(SECONDS)
        last = self.events[-1]
        assert isinstance(last, Ended)
        return last.error

    @property
    def reason(self) -> str | None:
        return None if self.error is None else self.error.reason

    @property
    def rows(self) -> list[int]:
        return [event.row for event in self.events if isinstance(event, Rows)]

    @property
    def finished(self) -> dict[int, Finished]:
        """Finished images by their positions, none of which comes twice."""
        assert self.error is None
        found = [event for event in self.events if isinstance(event, Finished)]
        images = {event.image: event for event in found}
        assert len(images) == len(found)
        return images


def hanging_engine(spec: WorkerSpec) -> ScriptedEngine:
    """An engine, for a worker process, that never ends a batch whose first image is deadly."""

    class Hanging(ScriptedEngine):
        def _generate(self, batch: Sequence[Work], inbox: Inbox, report: Callable[[Report], None]) -> None:
            if batch[0].condition == DEADLY:
                threading.Event().wait()
            super()._generate(batch, inbox, report)

    return Hanging()


def killed_engine(spec: WorkerSpec) -> ScriptedEngine:
    """Ends its process while it loads, as a machine without memory does."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
