"""The backend of an ingress with a stand-in for the replicas: no request is lost or answered twice."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

import numpy as np
import pytest

from llamagen.sampling import SamplingConfig
from serving.engine.observer import Observer
from serving.engine.requests import Ended, Event, Finished, ImageRequest, Load, Request, RequestError, Rows
from serving.ray_serve import backend as backend_module
from serving.ray_serve.backend import RayBackend, ReplicaLost
from serving.ray_serve.replica import Replica
from serving.server.metrics import Metrics
from tests.serving.fake_backend import CLASS_FACTS, FakeBackend, fake_codes

READY = Load(ready=True, waiting=0, running=0, workers=1, images_per_second=2.0)
FACTS = replace(CLASS_FACTS, batch_size=16)  # up to 4 images a call
LOST = "lost"
WAIT = "wait"


def images(count: int) -> ImageRequest:
    return ImageRequest(tuple(range(count)), tuple(range(10, 10 + count)), 3, SamplingConfig())


def finished(request: Request, position: int) -> Finished:
    return Finished(position, np.zeros((16, 16, 3), np.uint8), fake_codes(request, position))


class Script:
    """Replicas whose calls report what is written: numbers of images, rows of all images, the end, or a loss."""

    def __init__(self, *calls: tuple[object, ...]) -> None:
        self.calls = list(calls)
        self.sent: list[ImageRequest] = []
        self.seconds: list[float | None] = []
        self.closed = threading.Semaphore(0)
        self.available = [READY]

    async def generate(self, request: Request, seconds: float | None) -> AsyncGenerator[tuple[Event, ...], None]:
        assert isinstance(request, ImageRequest)
        self.sent.append(request)
        self.seconds.append(seconds)
        try:
            for step in self.calls.pop(0) if self.calls else ("all", None):
                if step == LOST:
                    raise ReplicaLost("killed", "replica 1")
                if step == WAIT:
                    await asyncio.sleep(60)
                if step == "all":
                    yield tuple(finished(request, position) for position in range(len(request)))
                elif isinstance(step, int):
                    yield (finished(request, step),)
                elif isinstance(step, Rows):
                    yield (step,)
                else:
                    assert step is None or isinstance(step, RequestError)
                    yield (Ended(step),)
        finally:
            self.closed.release()

    async def loads(self) -> list[Load]:
        return self.available


class Owner:
    """Keeps the events of a request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.begun = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.begun.set()
        if isinstance(event, Ended):
            self.ended.set()

    @property
    def images(self) -> list[int]:
        return [event.image for event in self.events if isinstance(event, Finished)]

    def end(self) -> RequestError | None:
        """The error of the only last event."""
        assert self.ended.wait(10)
        assert [isinstance(event, Ended) for event in self.events] == [False] * (len(self.events) - 1) + [True]
        last = self.events[-1]
        assert isinstance(last, Ended)
        return last.error


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(backend_module, "POLL_SECONDS", 0.01)


backends: list[RayBackend] = []


def build(script: Script, queue: int = 64, patience: float = 60.0, observer: Observer | None = None) -> RayBackend:
    backends.append(RayBackend(FACTS, script, queue=queue, patience=patience, observer=observer))
    return backends[-1]


@pytest.fixture(autouse=True)
def close_all() -> Iterator[None]:
    yield
    while backends:
        backends.pop().close()


def reason(error: RequestError | None) -> str | None:
    return error and error.reason


def test_a_request_is_divided_into_calls_and_each_image_is_reported_once() -> None:
    script, owner, request = Script(), Owner(), images(6)
    build(script).submit(request, owner)
    assert owner.end() is None
    assert [len(call) for call in script.sent] == [4, 2]
    assert sorted(owner.images) == list(range(6))
    for event in owner.events:
        if isinstance(event, Finished):
            assert (event.codes == fake_codes(request, event.image)).all()


def test_only_missing_images_of_a_lost_replica_are_sent_again() -> None:
    rows = Rows((0, 2, 3), 1, 4)
    script, owner, request = Script((rows, 1, 2, LOST), (replace(rows, images=(1,)), "all", None)), Owner(), images(4)
    build(script).submit(request, owner)
    assert owner.end() is None
    assert [call.indices for call in script.sent] == [(10, 11, 12, 13), (10, 13)]
    assert owner.images == [1, 2, 0, 3]
    assert [event.images for event in owner.events if isinstance(event, Rows)] == [(0, 2, 3), (3,)]


def test_an_image_that_a_replica_reports_twice_is_answered_once() -> None:
    owner = Owner()
    build(Script((0, 0, 1, None))).submit(images(2), owner)
    assert owner.end() is None
    assert owner.images == [0, 1]


@pytest.mark.parametrize(
    "last", [(), (None,), (RequestError("stopping", "it stops"),), (RequestError("lost", "its worker died"),)]
)
def test_a_replica_that_stops_early_counts_as_lost(last: tuple[object, ...]) -> None:
    owner = Owner()
    build(Script((0, *last))).submit(images(2), owner)
    assert owner.end() is None
    assert owner.images == [0, 1]


def test_a_loss_after_the_last_image_changes_nothing() -> None:
    script, owner = Script(("all", LOST)), Owner()
    build(script).submit(images(2), owner)
    assert owner.end() is None
    assert len(script.sent) == 1


def test_metrics_learn_of_requests_images_and_lost_replicas() -> None:
    script, owner, metrics = Script((0, LOST), (LOST,), ("all", None), ("all", None)), Owner(), Metrics()
    backend = build(script, queue=8, observer=metrics)
    backend.submit(images(6), owner)
    assert owner.end() is None
    with pytest.raises(RequestError):
        backend.submit(images(9), owner)
    backend.close()  # after which all was counted
    lines = metrics.text().decode().splitlines()
    for line in (
        "llamagen_images_accepted_total 6.0",
        'llamagen_requests_refused_total{reason="invalid"} 1.0',
        'llamagen_requests_ended_total{reason="finished"} 1.0',
        "llamagen_images_total 6.0",
        "llamagen_queue_seconds_count 6.0",
        "llamagen_workers_died_total 1.0",
    ):
        assert line in lines


def test_a_request_that_three_replicas_died_with_is_lost() -> None:
    script, owner = Script((LOST,), (LOST,), (LOST,)), Owner()
    build(script).submit(images(1), owner)
    assert reason(owner.end()) == "lost"
    assert len(script.sent) == 3


def test_the_error_of_a_replica_reaches_the_owner_and_ends_the_other_calls() -> None:
    script, owner = Script((RequestError("failed", "values are not finite"),), (WAIT,)), Owner()
    build(script).submit(images(6), owner)
    error = owner.end()
    assert error is not None
    assert (error.reason, error.message) == ("failed", "values are not finite")
    assert script.closed.acquire(timeout=5)
    assert script.closed.acquire(timeout=5)


def test_a_full_queue_refuses_at_once_and_accepts_again_when_images_have_begun() -> None:
    script, first, second = Script((WAIT,), (0, WAIT)), Owner(), Owner()
    backend = build(script, queue=4)
    ticket = backend.submit(images(3), first)
    with pytest.raises(RequestError) as refused:
        backend.submit(images(2), second)
    assert refused.value.reason == "full"
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1
    later = backend.submit(images(1), second)
    assert second.begun.wait(5)
    assert (ticket.ahead, later.ahead) == (0, 0)
    assert backend.load().waiting == 3
    backend.submit(images(1), second)
    assert second.events


def test_requests_say_how_many_images_wait_in_front_of_them() -> None:
    backend = build(Script((WAIT,), (WAIT,)))
    backend.submit(images(3), Owner())
    assert backend.submit(images(1), Owner()).ahead == 3


def test_a_late_request_ends_and_its_call_is_cancelled() -> None:
    script, owner = Script((WAIT,)), Owner()
    build(script).submit(images(1), owner, seconds=0.2)
    assert reason(owner.end()) == "late"
    assert script.closed.acquire(timeout=5)
    assert script.seconds[0] is not None
    assert 0 <= script.seconds[0] <= 0.2


def test_a_cancelled_request_ends_once_and_its_call_is_cancelled() -> None:
    script, owner = Script((Rows((0,), 1, 4), WAIT)), Owner()
    backend = build(script)
    ticket = backend.submit(images(1), owner)
    assert owner.begun.wait(5)
    ticket.cancel()
    ticket.cancel()
    assert reason(owner.end()) == "cancelled"
    assert script.closed.acquire(timeout=5)
    ticket.cancel()
    assert backend.load().running == 0


def test_closing_finishes_what_was_accepted_and_ends_the_rest() -> None:
    script, done, stuck = Script(("all", None), (WAIT,)), Owner(), Owner()
    backend = build(script)
    backend.submit(images(1), done)
    assert done.end() is None
    backend.submit(images(1), stuck)
    backend.close(0.05)
    assert reason(stuck.end()) == "stopping"
    with pytest.raises(RequestError, match="shutting down"):
        backend.submit(images(1), Owner())
    assert not backend.load().ready


def test_requests_do_not_wait_for_ever_if_no_replica_is_left() -> None:
    script, owner = Script((WAIT,)), Owner()
    script.available = []
    backend = build(script, patience=0.02)
    backend.submit(images(1), owner)
    assert reason(owner.end()) == "lost"
    assert not backend.load().ready


def test_a_replica_answers_with_all_events_and_cancels_when_the_call_is_closed() -> None:
    fake = FakeBackend()
    replica = Replica(fake)
    request = images(2)

    async def whole() -> list[Event]:
        return [event async for events in replica.generate(request, None) for event in events]

    async def begun() -> None:
        stream = replica.generate(request, None)
        await anext(stream)
        await stream.aclose()

    events = asyncio.run(whole())
    assert [event.row for event in events if isinstance(event, Rows)] == [1, 2, 3, 4]
    assert [event.image for event in events if isinstance(event, Finished)] == [0, 1]
    assert events[-1] == Ended()
    fake.failures.append(RequestError("failed", "a bug"))
    asyncio.run(begun())
    assert fake.tickets[-1].cancelled.is_set()
    fake.refusals.append(RequestError("full", "no place", 1.0))
    refused = asyncio.run(whole())
    assert isinstance(refused[0], Ended)
    assert reason(refused[0].error) == "full"
    replica.close()
    with pytest.raises(RuntimeError, match="not ready"):
        replica.check_health()
