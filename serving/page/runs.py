"""Requests of each visitor: a generation as updates of the page, and its stop."""

import logging
import time
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any, NamedTuple

from llamagen import LlamaGen
from llamagen.command import fault_of
from serving.image_settings import ImageSettings, png_file
from serving.image_store import ImageStore
from serving.page import markup
from serving.page.form import Form, all_settings
from serving.page.generation import Finished, GenerationRequest, Growing, Waiting, generation_events
from serving.page.worker import Job, StoppedError, Worker

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
        model: model of the page.
        worker: its thread.
        store: finished images.
    """

    def __init__(self, model: LlamaGen, worker: Worker, store: ImageStore) -> None:
        self.model, self.worker, self.store = model, worker, store
        self._jobs: dict[tuple[str, str], Job] = {}
        self._lock = Lock()

    def stop(self, session: str, tab: str) -> None:
        """Stop the run of one visitor on one tab, if there is one."""
        with self._lock:
            job = self._jobs.get((session, tab))
        if job is not None:
            job.stop()

    def stop_all(self, session: str) -> None:
        """Stop the runs of a visitor who has left."""
        with self._lock:
            jobs = [job for (owner, _), job in self._jobs.items() if owner == session]
        for job in jobs:
            job.stop()

    def run(self, session: str, tab: str, form: Form, request: GenerationRequest) -> Iterator[Update]:
        """Generate. Closing the iterator stops the run, too.

        Args:
            session: the visitor.
            tab: where the run is shown.
            form: form of the tab, for titles.
            request: what to generate.
        """
        start, downloads = time.monotonic(), list[markup.Download]()
        key, mine = (session, tab), list[Job]()

        def started(job: Job) -> None:
            mine.append(job)
            with self._lock:
                self._jobs[key] = job

        yield Update(markup.message("Starting."), "", "", True)
        try:
            for event in generation_events(self.model, self.worker, request, started):
                yield self._update(event, form, request, downloads)
            text = f"Finished {_images(len(downloads))} in {time.monotonic() - start:.1f} s."
            yield Update(markup.message(text), None, "", False)
        except StoppedError:
            text = f"Stopped after {len(downloads)} of {_images(request.count)}."
            yield Update(markup.message(text), None, "", False)
        except Exception as error:
            yield Update(markup.error_message(sentence(error)), None, "", False)
        finally:
            with self._lock:
                if mine and self._jobs.get(key) is mine[0]:
                    del self._jobs[key]

    def _update(self, event: Any, form: Form, request: GenerationRequest, downloads: list[markup.Download]) -> Update:
        resolution = self.model.resolution
        assert resolution is not None
        if isinstance(event, Waiting):
            return Update(markup.progress(event, request.count))
        if isinstance(event, Growing):
            titles = [form.title(request.condition(event.first + i)) for i in range(event.images)]
            images = None if event.previews is None else markup.growing(event, titles, resolution)
            return Update(markup.progress(event, request.count), growing=images)
        if isinstance(event, Finished):
            downloads += self._store(event, form, request)
            return Update(finished=markup.finished(downloads), growing="")
        return Update()

    def _store(self, event: Finished, form: Form, request: GenerationRequest) -> Iterator[markup.Download]:
        settings = all_settings(self.model, request)
        kind = "generation" if request.image is None else "completion"
        for index, image in enumerate(event.images, event.first):
            title = form.title(request.condition(index))
            inside = ImageSettings(
                self.model.name,
                kind,  # type: ignore[arg-type]
                request.conditions,
                request.images_per_prompt,
                request.seed,
                index,
                request.keep_rows,
                settings,
            )
            name = self.store.add(png_file(image, inside, title, self.model.dtype))
            file = markup.file_name(self.model.name, request.seed, index)
            yield markup.Download(f"image/{name}.png", file, title, index + 1, image.width)


def sentence(error: Exception) -> str:
    """What a visitor reads about an error. Bugs are logged with their traceback, which visitors never see."""
    fault = fault_of(error)
    if fault is None:
        LOGGER.error("a request failed", exc_info=error)
        return "something went wrong; the terminal of the page shows what, and the page goes on working"
    return fault.message.rstrip(".")


def wait_for(worker: Worker, work: Callable[[], Any]) -> Any:
    """Run something short in the thread of the model, and return its result."""
    job = worker.submit(lambda _: work())
    for _ in job.events():
        pass
    return job.result.result()


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
