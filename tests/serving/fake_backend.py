"""A backend without a model: tiny deterministic images, and errors and delays on demand."""

import threading
import time
import zlib
from collections import deque
from dataclasses import asdict, dataclass, field

import numpy as np

from llamagen.sampling import SamplingConfig
from serving.engine.facts import ModelFacts
from serving.engine.requests import (
    Ended,
    Finished,
    ImageRequest,
    Listener,
    Load,
    Request,
    RequestError,
    Rows,
)

GRID, FACTOR, CODES = 4, 4, 32
CLASS_FACTS = ModelFacts(
    name="fake",
    kind="class",
    description="a model of colours",
    dtype="float32",
    device="cpu",
    batch_size=4,
    downsampling=FACTOR,
    codebook_size=CODES,
    resolution=GRID * FACTOR,
    grid=GRID,
    classes=("zero", "one", "two", "three", "tench", "goldfish", "great white shark", "tiger shark", "hen", "cock"),
    sampling=SamplingConfig(guidance_scale=2.0, top_k=16).image_settings(),
)
TEXT_FACTS = ModelFacts(**{**asdict(CLASS_FACTS), "name": "fake-text", "kind": "text", "classes": ()})
TOKENIZER_FACTS = ModelFacts(
    **{**asdict(CLASS_FACTS), "name": "fake-vq", "kind": "tokenizer", "classes": (), "resolution": None, "grid": None}
)
PREVIEW = b"\xff\xd8\xff a JPEG file"


def fake_codes(request: Request, position: int) -> np.ndarray:
    """Codes (GRID, GRID) int64 of an image: a function of all that it depends on."""
    if isinstance(request, ImageRequest):
        index, kept = request.indices[position], (request.image, request.keep_rows, request.mask)
        name = repr((request.conditions[position], request.seed, index, request.settings, kept))
    else:
        name = repr(request.image)
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, CODES, (GRID, GRID))


def fake_pixels(codes: np.ndarray) -> np.ndarray:
    """Pixels (GRID · FACTOR, GRID · FACTOR, 3) uint8 of codes."""
    side = np.ones((FACTOR, FACTOR), np.int64)
    return np.kron(codes[..., None] * (7, 5, 3), side[..., None]).astype(np.uint8)


@dataclass
class FakeTicket:
    """An accepted request.

    Attributes:
        request: the request.
        listener: gets its events.
        deadline: when it is late, in seconds of the monotonic clock; None for never.
        cancelled: set by :meth:`cancel`.
        ended: set when the last event was reported.
    """

    request: Request
    listener: Listener
    deadline: float | None
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    ahead: int = 0

    def cancel(self) -> None:
        """End the request."""
        self.cancelled.set()


class FakeBackend:
    """Answers one request after another, in a thread.

    Args:
        facts: the model that it pretends to have.
        queue: maximum number of images that wait or run.

    Attributes:
        gate: while it is cleared, no row is completed.
        refusals: errors that the next calls of ``submit`` raise, one each.
        failures: errors that end the next requests after their first row, one each.
        tickets: all accepted requests.
    """

    def __init__(self, facts: ModelFacts = CLASS_FACTS, queue: int = 64) -> None:
        self.facts, self.queue = facts, queue
        self.gate = threading.Event()
        self.gate.set()
        self.refusals: deque[Exception] = deque()
        self.failures: deque[RequestError] = deque()
        self.tickets: list[FakeTicket] = []
        self._pending: list[FakeTicket] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="fake backend")
        self._thread.start()

    def submit(self, request: Request, listener: Listener, seconds: float | None = None) -> FakeTicket:
        """Accept a request."""
        with self._changed:
            if self._closed:
                raise RequestError("stopping", "the server is shutting down", 5.0)
            if self.refusals:
                raise self.refusals.popleft()
            ahead = sum(len(each.request) for each in self._pending)
            if ahead + len(request) > self.queue:
                raise RequestError("full", f"{ahead} images wait already", 1.5)
            deadline = None if seconds is None else time.monotonic() + seconds
            ticket = FakeTicket(request, listener, deadline, ahead=ahead)
            self.tickets.append(ticket)
            self._pending.append(ticket)
            self._changed.notify_all()
            return ticket

    def load(self) -> Load:
        """How busy it is."""
        with self._changed:
            images = sum(len(each.request) for each in self._pending)
            return Load(not self._closed, max(images - 1, 0), min(images, 1), 1, 10.0)

    def close(self, seconds: float = 0.0) -> None:
        """Finish accepted requests for some seconds, cancel the others, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._pending, seconds)
            for ticket in self._pending:
                ticket.cancel()
        self._thread.join(10)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if not self._pending:
                    return
                ticket = self._pending[0]
            error = self._answer(ticket)
            with self._changed:
                self._pending.remove(ticket)
                self._changed.notify_all()
            ticket.listener(Ended(error))
            ticket.ended.set()

    def _answer(self, ticket: FakeTicket) -> RequestError | None:
        images = tuple(range(len(ticket.request)))
        for row in range(1, GRID + 1):
            while not (opened := self.gate.wait(0.002)) or ticket.cancelled.is_set():
                if ticket.cancelled.is_set():
                    return RequestError("cancelled", "the request was cancelled")
                if not opened and ticket.deadline is not None and time.monotonic() > ticket.deadline:
                    return RequestError("late", "the request was not finished in time", 1.0)
            if isinstance(ticket.request, ImageRequest):
                previews = tuple(PREVIEW for _ in images) if ticket.request.previews and row < GRID else None
                ticket.listener(Rows(images, row, GRID, previews))
            if self.failures:
                return self.failures.popleft()
        for position in images:
            codes = fake_codes(ticket.request, position)
            ticket.listener(Finished(position, fake_pixels(codes), codes))
        return None
