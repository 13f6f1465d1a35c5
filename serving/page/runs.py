"""Requests of each visitor: a generation as updates of the page, and its stop."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from threading import Lock
from typing import NamedTuple

import numpy as np
from PIL import Image

from llamagen.command import fault_of
from serving.engine.requests import Backend, Finished, ReconstructionRequest, Request, RequestError, Ticket
from serving.image_settings import ImageSettings, png_file
from serving.image_store import ImageStore
from serving.page import markup
from serving.page.form import Form, all_settings
from serving.page.generation import Event, GenerationRequest, Progress, Waiting, generation_events
from serving.page.news import News, news
from serving.page.reconstruction import Reconstruction, compare
from serving.page.uploads import to_png

LOGGER = logging.getLogger("serving")


class Update(NamedTuple):
    """New content of the parts of the page; None leaves a part as it is.

    Attributes:
        status: message or progress.
        finished: finished images.
        growing: images that are being generated.
        running: whether the run can be stopped.
    """

    status: str | None = None
    finished: str | None = None
    growing: str | None = None
    running: bool | None = None


class Runs:
    """Runs of all visitors, by session and tab.

    Args:
        backend: generates the images.
        store: finished images.

    Attributes:
        facts: the model of the page.
    """

    def __init__(self, backend: Backend, store: ImageStore) -> None:
        self.backend, self.store, self.facts = backend, store, backend.facts
        self._tickets: dict[tuple[str, str], Ticket] = {}
        self._lock = Lock()

    def stop(self, session: str, tab: str) -> None:
        """Stop the run of one visitor on one tab, if there is one."""
        with self._lock:
            ticket = self._tickets.get((session, tab))
        if ticket is not None:
            ticket.cancel()

    def stop_all(self, session: str) -> None:
        """Stop the runs of a visitor who has left."""
        with self._lock:
            tickets = [ticket for (owner, _), ticket in self._tickets.items() if owner == session]
        for ticket in tickets:
            ticket.cancel()

    def run(self, session: str, tab: str, form: Form, request: GenerationRequest) -> Iterator[Update]:
        """Generate. Closing the iterator stops the run, too.

        Args:
            session: the visitor.
            tab: where the run is shown.
            form: form of the tab, for titles.
            request: what to generate.
        """
        start, downloads = time.monotonic(), dict[int, markup.Download]()
        yield Update(markup.message("Starting."), "", "", True)
        try:
            with closing(self._follow(session, tab, request.to_images(self.facts))) as found:  # type: ignore[type-var]
                for event in generation_events(request, self.facts.grid or 0, found):
                    yield self._update(event, form, request, downloads)
            text = f"Finished {_images(len(downloads))} in {time.monotonic() - start:.1f} s."
            yield Update(markup.message(text), None, "", False)
        except Exception as error:
            text = sentence(error)
            if isinstance(error, RequestError) and error.reason == "cancelled":
                shown = markup.message(f"Stopped after {len(downloads)} of {_images(request.count)}.")
            elif downloads:
                shown = markup.error_message(f"{text}; {len(downloads)} of {_images(request.count)} were finished")
            else:
                shown = markup.error_message(text)
            yield Update(shown, None, "", False)

    def reconstruct(self, session: str, tab: str, image: Image.Image) -> Iterator[Waiting | Reconstruction]:
        """Encode and decode an image.

        Args:
            session: the visitor.
            tab: where the result is shown.
            image: RGB image as the model sees it, see ``serving.page.uploads``.

        Yields:
            The place in the queue when it changes, and the result at last.

        Raises:
            RequestError: if there is no result.
        """
        ahead = 0
        with closing(self._follow(session, tab, ReconstructionRequest(to_png(image)))) as found:  # type: ignore[type-var]
            for each in found:
                for event in each.events:
                    if isinstance(event, Finished):
                        yield compare(image, event.pixels, event.codes)
                if each.ahead not in (0, ahead):
                    yield Waiting(each.ahead)
                ahead = each.ahead

    def _follow(self, session: str, tab: str, request: Request) -> Iterator[News]:
        """Follow a request of a visitor, who may stop it."""
        key, mine = (session, tab), list[Ticket]()

        def started(ticket: Ticket) -> None:
            mine.append(ticket)
            with self._lock:
                self._tickets[key] = ticket

        try:
            yield from news(self.backend, request, started)
        finally:
            with self._lock:
                if mine and self._tickets.get(key) is mine[0]:
                    del self._tickets[key]

    def _update(
        self, event: Event, form: Form, request: GenerationRequest, downloads: dict[int, markup.Download]
    ) -> Update:
        if isinstance(event, Waiting):
            return Update(markup.waiting(event))
        if not isinstance(event, Progress):
            return Update()
        for index, pixels in event.finished.items():
            downloads[index] = self._store(index, pixels, form, request)
        finished = markup.finished([downloads[index] for index in sorted(downloads)]) if event.finished else None
        growing = None
        if event.previews is not None:
            titles = [form.title(request.condition(index)) for index in range(request.count)]
            growing = markup.growing(event.previews, titles, self.facts.resolution or 0)
        return Update(markup.progress(event, request.count), finished, growing)

    def _store(self, index: int, pixels: np.ndarray, form: Form, request: GenerationRequest) -> markup.Download:
        facts, title, image = self.facts, form.title(request.condition(index)), Image.fromarray(pixels)
        inside = ImageSettings(
            facts.name,
            request.kind,
            request.conditions,
            request.images_per_prompt,
            request.seed,
            index,
            request.keep_rows,
            all_settings(facts, request),
        )
        name = self.store.add(png_file(image, inside, title, facts.dtype))
        file = markup.file_name(facts.name, request.seed, index)
        return markup.Download(f"image/{name}.png", file, title, index + 1, image.width)


def sentence(error: Exception) -> str:
    """What a visitor reads about an error. Bugs are logged with their traceback, which visitors never see."""
    if isinstance(error, RequestError):
        return error.message.rstrip(".")
    fault = fault_of(error)
    if fault is None:
        LOGGER.error("a request failed", exc_info=error)
        return "something went wrong; the terminal of the page shows what, and the page goes on working"
    return fault.message.rstrip(".")


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
