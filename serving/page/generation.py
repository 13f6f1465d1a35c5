"""Generates images as a job of the worker, and reports how they grow."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from llamagen import LlamaGen
from serving.engine.previews import GrowingImages, PreviewBudget
from serving.page.worker import Job, Worker

MAX_IMAGES = 16
"""Maximum number of images of one request."""


@dataclass(frozen=True)
class GenerationRequest:
    """Arguments of ``LlamaGen.generate``, or of ``LlamaGen.complete``.

    Attributes:
        conditions: classes or prompts.
        images_per_prompt: images of each condition.
        seed: seed of all images.
        settings: fields of ``SamplingConfig``.
        image: image to complete; None to generate whole images.
        keep_rows: rows of codes that are kept of it.
    """

    conditions: tuple[int | str, ...]
    images_per_prompt: int
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    image: Image.Image | None = None
    keep_rows: int = 0

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.conditions) * self.images_per_prompt

    def condition(self, index: int) -> int | str:
        """Condition of an image."""
        return self.conditions[index % len(self.conditions)]


@dataclass(frozen=True)
class Waiting:
    """The job has not started.

    Attributes:
        ahead: number of jobs before it.
    """

    ahead: int


@dataclass(frozen=True)
class Growing:
    """A row of some images is complete.

    Attributes:
        first: index of the first of these images.
        images: number of these images.
        row: number of complete rows of codes.
        rows: number of rows of an image.
        seconds_left: estimate for all images of the request.
        previews: JPEG files; None if the last ones are still good enough.
    """

    first: int
    images: int
    row: int
    rows: int
    seconds_left: float
    previews: list[bytes] | None


@dataclass(frozen=True)
class Finished:
    """Some images are finished.

    Attributes:
        first: index of the first of them.
        images: the images.
    """

    first: int
    images: list[Image.Image]


Event = Waiting | Growing | Finished | None


def generation_events(
    model: LlamaGen,
    worker: Worker,
    request: GenerationRequest,
    started: Callable[[Job], object] = lambda job: None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """Generate images. Closing the iterator stops the generation within a row.

    Args:
        model: an autoregressive model.
        worker: thread of the model.
        request: what to generate.
        started: called with the job when it is queued; ``job.stop()`` stops it.
        clock: seconds, for previews and the time left.

    Yields:
        Events; None, at least twice per second, if there is none.

    Raises:
        StoppedError: if the job was stopped.
        ValueError: in one line, if an argument is invalid, or too many jobs wait.
    """
    job = worker.submit(partial(_generate, model, request, clock))
    started(job)
    ahead = 0
    try:
        with closing(job.events()) as events:  # type: ignore[type-var]  # a generator, which has close()
            for event in events:
                if event is None and (now_ahead := worker.ahead(job)) != ahead:
                    ahead = now_ahead
                    event = Waiting(ahead) if ahead else None
                yield event
    finally:
        job.stop()


def _generate(model: LlamaGen, request: GenerationRequest, clock: Callable[[], float], job: Job) -> None:
    gpt = model.gpt
    assert gpt is not None
    rows = gpt.config.grid_size
    budget, start = PreviewBudget(clock), clock()
    generated = rows - request.keep_rows  # of an image
    batches = -(-request.count // model.batch_size)
    growing: dict[int, GrowingImages] = {}  # of the current batch, by the index of its first image

    def on_row(codes: Tensor, count: int, first: int) -> None:
        job.check()
        row = count // rows
        if first not in growing:
            growing.clear()
            growing[first] = GrowingImages(model, [request.image] * len(codes), request.keep_rows)
        previews = growing[first].update(codes, row, budget) if row < rows else []
        done = first // model.batch_size * generated + max(row - request.keep_rows, 0)
        left = (clock() - start) / max(done, 1) * (batches * generated - done)
        job.report(Growing(first, len(codes), row, rows, left, previews or None))

    def on_images(images: list[Image.Image], first: int) -> None:
        job.report(Finished(first, images))

    arguments: dict[str, Any] = dict(
        images_per_prompt=request.images_per_prompt,
        seed=request.seed,
        progress=False,
        on_row=on_row,
        on_images=on_images,
        **request.settings,
    )
    if request.image is None:
        model.generate(request.conditions, **arguments)
    else:
        model.complete(request.image, request.keep_rows, list(request.conditions), **arguments)
