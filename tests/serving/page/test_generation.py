"""Generation as the page does it, without a browser: the images of Python, progress, stop, several people."""

import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llamagen import LlamaGen
from serving.page.generation import Event, Finished, GenerationRequest, Growing, Waiting, generation_events
from serving.page.worker import MAX_JOBS, Job, StoppedError, Worker


def same(images: list[Image.Image], others: list[Image.Image]) -> bool:
    return len(images) == len(others) and all(map(np.array_equal, images, others))


def finished(events: list[Event]) -> list[Image.Image]:
    """Images in their order."""
    images = []
    for event in events:
        if isinstance(event, Finished):
            assert event.first == len(images)
            images += event.images
    return images


def test_images_are_those_of_python_and_grow_by_rows(model: LlamaGen, worker: Worker) -> None:
    settings: dict[str, Any] = {"guidance_scale": 3.0, "top_k": 20, "temperature": 0.9}
    request = GenerationRequest((3, 7, 1), 1, 5, settings)
    events = list(generation_events(model, worker, request))
    assert same(finished(events), model.generate([3, 7, 1], seed=5, progress=False, **settings))
    rows = [(each.first, each.images, each.row) for each in events if isinstance(each, Growing)]
    assert rows == [(0, 2, 1), (0, 2, 2), (0, 2, 3), (0, 2, 4), (2, 1, 1), (2, 1, 2), (2, 1, 3), (2, 1, 4)]
    assert next(len(each.previews or []) for each in events if isinstance(each, Growing)) == 2
    # The images of a batch come before the rows of the next one.
    assert [type(each) for each in events if each].index(Finished) == 4


def test_a_completion_is_that_of_python(model: LlamaGen, worker: Worker) -> None:
    image = model.generate(4, seed=9, progress=False)[0]
    request = GenerationRequest((3, 7), 2, 5, {"top_k": 20}, image, 2)
    events = list(generation_events(model, worker, request))
    expected = model.complete(image, 2, [3, 7], images_per_prompt=2, seed=5, top_k=20, progress=False)
    assert same(finished(events), expected)
    assert {each.row for each in events if isinstance(each, Growing)} == {2, 3, 4}


def test_the_time_left_is_that_of_the_remaining_rows(model: LlamaGen, worker: Worker) -> None:
    ticks = iter(range(1000))
    events = list(generation_events(model, worker, GenerationRequest((1,), 2, 0), clock=lambda: float(next(ticks))))
    growing = [each for each in events if isinstance(each, Growing)]
    assert growing[-1].seconds_left == 0
    assert growing[0].seconds_left > growing[1].seconds_left > 0


def test_a_stop_ends_the_sampling_within_a_row_and_the_next_request_works(model: LlamaGen, worker: Worker) -> None:
    jobs: list[Job] = []
    events = generation_events(model, worker, GenerationRequest((3,), 16, 5), jobs.append)
    seen = []
    with pytest.raises(StoppedError):  # noqa: PT012
        for event in events:
            seen.append(event)
            if isinstance(event, Finished):
                jobs[0].stop()
    assert jobs[0].result.done()
    # The reader may be some events behind, but not a whole request.
    assert sum(isinstance(each, Finished) for each in seen) < 8
    again = list(generation_events(model, worker, GenerationRequest((3,), 1, 5)))
    assert same(finished(again), model.generate(3, seed=5, progress=False))


def test_closing_the_events_stops_the_job(model: LlamaGen, worker: Worker) -> None:
    jobs: list[Job] = []
    events = generation_events(model, worker, GenerationRequest((3,), 16, 5), jobs.append)
    assert next(events) is not None
    events.close()  # type: ignore[attr-defined]
    with pytest.raises(StoppedError):
        jobs[0].result.result(timeout=60)


def test_requests_of_several_people_wait_for_each_other_and_do_not_mix(model: LlamaGen, worker: Worker) -> None:
    entered, free = threading.Event(), threading.Event()

    def block(job: Job) -> None:
        entered.set()
        free.wait(60)

    blocker = worker.submit(block)
    entered.wait(60)
    readers = [generation_events(model, worker, GenerationRequest((number,), 2, number)) for number in range(3)]
    waiting = [next(each) for each in readers]
    assert waiting == [Waiting(1), Waiting(2), Waiting(3)]
    assert worker.ahead(blocker) == 0
    free.set()
    for number, events in enumerate(readers):
        expected = model.generate(number, images_per_prompt=2, seed=number, progress=False)
        assert same(finished(list(events)), expected)


def test_a_job_that_is_stopped_while_it_waits_never_starts(worker: Worker) -> None:
    free = threading.Event()
    worker.submit(lambda job: free.wait(60))
    started: list[Job] = []
    waiting = worker.submit(started.append)
    waiting.stop()
    free.set()
    with pytest.raises(StoppedError):
        list(waiting.events())
    assert started == []


def test_too_many_requests_are_refused(worker: Worker) -> None:
    free = threading.Event()
    for _ in range(MAX_JOBS):
        worker.submit(lambda job: free.wait(60))
    with pytest.raises(ValueError, match="32 requests are waiting for the model; try again later"):
        worker.submit(lambda job: None)
    free.set()
