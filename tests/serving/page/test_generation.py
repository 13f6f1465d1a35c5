"""Requests of the page, without a browser or a model: what is asked of a backend, progress, stop, the queue."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from serving.engine.requests import Finished, ImageRequest, ReconstructionRequest, RequestError, Rows, Ticket
from serving.page.generation import GenerationRequest, Progress, Waiting, generation_events
from serving.page.news import News, news
from serving.page.reconstruction import Reconstruction
from serving.page.runs import Runs
from tests.serving.fake_backend import CLASS_FACTS, FakeBackend, fake_codes, fake_pixels

PIXELS = np.zeros((8, 8, 3), np.uint8)
CODES = np.zeros((4, 4), np.int64)


def test_a_request_asks_for_image_k_of_the_seed_as_python_does() -> None:
    request = GenerationRequest((3, 7), 2, 5, {"top_k": 9}, b"file", 2).to_images(CLASS_FACTS)
    settings = CLASS_FACTS.settings({"top_k": 9})
    assert request == ImageRequest((3, 7, 3, 7), (0, 1, 2, 3), 5, settings, b"file", 2, previews=True)
    assert settings.image_settings() == {**CLASS_FACTS.sampling, "top_k": 9}


def progress(*found: News, count: int = 4, kept: int = 0, clock: Callable[[], float] = lambda: 0.0) -> list[Progress]:
    request = GenerationRequest((1,), count, 0, keep_rows=kept)
    events = list(generation_events(request, 4, found, clock))
    assert all(isinstance(each, Progress) for each in events)
    return events  # type: ignore[return-value]


def test_images_of_several_batches_grow_and_finish_in_any_order() -> None:
    first, second, third, fourth = progress(
        News([Rows((0, 1), 1, 4, (b"a", b"b"))], 0),
        News([Rows((0, 1), 2, 4), Rows((3,), 1, 4, (b"d",)), Rows((0, 1), 3, 4, (b"A", b"B"))], 0),
        News([Finished(1, PIXELS, CODES), Rows((3,), 2, 4)], 0),
        News([Finished(0, PIXELS, CODES), Finished(3, PIXELS, CODES)], 0),
    )
    assert (first.growing, first.row, first.done, first.previews) == ((0, 1), 1, 2, {0: b"a", 1: b"b"})
    assert (second.growing, second.done) == ((0, 1, 3), 7)
    assert second.previews == {0: b"A", 1: b"B", 3: b"d"}
    assert (third.growing, third.row, third.done) == ((0, 3), 2, 9)
    assert third.previews == {0: b"A", 3: b"d"}
    assert [list(each.finished) for each in (first, second, third, fourth)] == [[], [], [1], [0, 3]]
    assert (fourth.growing, fourth.previews) == ((), {})


def test_rows_begin_again_after_the_loss_of_a_worker() -> None:
    again = progress(News([Rows((0,), 3, 4)], 0), News([Rows((0,), 1, 4)], 0), count=1)[-1]
    assert (again.row, again.done) == (1, 1)


def test_the_time_left_is_that_of_the_remaining_rows_without_the_time_in_the_queue() -> None:
    seconds = iter([0.0, 100.0, 106.0, 112.0])
    rows = [News([Rows((0, 1), row, 4)], 0) for row in (2, 3)]
    request = GenerationRequest((1,), 2, 0, keep_rows=1)
    waiting, *events = generation_events(request, 4, [News([], 3), *rows], lambda: next(seconds))
    assert waiting == Waiting(3)
    left = [each.seconds_left for each in events if isinstance(each, Progress)]
    assert left == [6 / 2 * 4, 12 / 4 * 2]


def test_the_place_in_the_queue_is_reported_when_it_changes() -> None:
    request = GenerationRequest((1,), 1, 0)
    places = [News([], ahead) for ahead in (2, 2, 1, 0)]
    assert list(generation_events(request, 4, places)) == [Waiting(2), None, Waiting(1), None]


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    backend = FakeBackend()
    yield backend
    backend.gate.set()
    backend.close()


def test_news_are_gathered_so_that_a_slow_reader_gets_fewer(backend: FakeBackend) -> None:
    found = news(backend, GenerationRequest((1,), 2, 0).to_images(backend.facts))
    first = next(found)
    assert backend.tickets[0].ended.wait(30)
    others = list(found)
    assert len(others) <= 1
    assert sum(len(each.events) for each in (first, *others)) == 4 + 2


@pytest.mark.parametrize("end", ["closed", "stopped"])
def test_who_leaves_or_stops_cancels_the_request(backend: FakeBackend, end: str) -> None:
    backend.gate.clear()
    tickets: list[Ticket] = []
    found = news(backend, GenerationRequest((1,), 2, 0).to_images(backend.facts), tickets.append)
    assert next(found) == News([], 0)
    if end == "closed":
        found.close()  # type: ignore[attr-defined]
    else:
        tickets[0].cancel()
        with pytest.raises(RequestError, match="cancelled"):
            list(found)
    assert backend.tickets[0].ended.wait(30)


def run(runs: Runs, request: GenerationRequest, session: str = "me") -> list[str]:
    """All statuses of a run."""
    from serving.page.form import Form

    updates = list(runs.run(session, "generate", Form(runs.facts, "generation"), request))
    assert updates[-1].running is False
    return [each.status for each in updates if each.status is not None]


def test_errors_of_a_backend_are_sentences_and_the_page_goes_on(backend: FakeBackend, runs: Runs) -> None:
    request = GenerationRequest((1,), 2, 0)
    backend.refusals.append(RequestError("full", "64 images wait already; try again later", 1.5))
    assert run(runs, request)[-1] == '<p class="error" role="alert">64 images wait already; try again later.</p>'
    backend.failures.append(RequestError("lost", "the worker <b> died", 1.0))
    assert run(runs, request)[-1] == '<p class="error" role="alert">The worker &lt;b&gt; died.</p>'
    assert "Finished 2 images in" in run(runs, request)[-1]
    assert runs._tickets == {}


@pytest.fixture
def runs(backend: FakeBackend) -> Runs:
    from serving.image_store import ImageStore

    return Runs(backend, ImageStore())


def test_a_visitor_reads_how_many_images_are_ahead(backend: FakeBackend, runs: Runs) -> None:
    backend.gate.clear()
    other = threading.Thread(target=run, args=(runs, GenerationRequest((1,), 3, 0), "other"), daemon=True)
    other.start()
    while not backend.tickets:
        threading.Event().wait(0.001)
    reader = iter(runs.reconstruct("me", "reconstruct", Image.new("RGB", (16, 16))))
    assert next(reader) == Waiting(3)
    backend.gate.set()
    (result,) = reader
    assert isinstance(result, Reconstruction)
    assert isinstance(request := backend.tickets[1].request, ReconstructionRequest)
    assert np.array_equal(result.reconstruction, fake_pixels(fake_codes(request, 0)))
    other.join(30)
