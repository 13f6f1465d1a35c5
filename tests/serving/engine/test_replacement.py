"""Workers that die, cannot be started or do not stop: nothing is lost without a word, and nothing waits for ever."""

import threading
from collections.abc import Callable, Sequence

import pytest

from serving.engine import dispatcher as dispatcher_module
from serving.engine import slot
from serving.engine.engine import Inbox, Report, Work
from serving.engine.inbox import WorkInbox
from serving.engine.observer import Observer
from serving.engine.requests import RequestError
from serving.engine.worker import ThreadWorker
from tests.serving.engine.conftest import Start
from tests.serving.engine.scripted import DEADLY, SECONDS, DeadError, Heard, ScriptedEngine, request, until


@pytest.fixture(autouse=True)
def no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr(slot, "BACK_OFF", 0.001)


class Deaths(Observer):
    """Counts workers that died."""

    count = 0

    def worker_died(self) -> None:
        self.count += 1


def test_images_of_a_worker_that_died_are_generated_again_before_others(start: Start) -> None:
    class Once(ScriptedEngine):
        def _generate(self, batch: list[Work], inbox: Inbox, report: Callable[[Report], None]) -> None:  # type: ignore[override]
            super()._generate(batch[:1], inbox, report)  # one image is finished
            if len(self.batches) == 1:
                raise DeadError
            super()._generate(batch[1:], inbox, report)

    engine, deaths = Once(capacity=2), Deaths()
    dispatcher = start(engine, observer=deaths)
    engine.gate.clear()
    heard = [Heard() for _ in range(3)]
    for seed, each in enumerate(heard):
        dispatcher.submit(request(seed, 2, top_k=seed), each)
    engine.gate.set()
    for seed, each in enumerate(heard):
        assert {event.pixels[0, 0, 0] for event in each.finished.values()} == {seed}
    assert engine.batches == [[0, 0], [0], [1, 1], [2, 2]]
    dispatcher.close()
    assert deaths.count == 1


def test_an_image_that_kills_its_workers_is_lost_alone(start: Start) -> None:
    engine = ScriptedEngine(capacity=4)
    dispatcher = start(engine)
    engine.gate.clear()
    blocked, good, deadly = Heard(), Heard(), Heard()
    dispatcher.submit(request(0), blocked)
    dispatcher.submit(request(1, 2), good)
    dispatcher.submit(request(2, 1, DEADLY), deadly)
    engine.gate.set()
    assert deadly.reason == "lost"
    assert deadly.error is not None
    assert deadly.error.retry_after is not None
    assert len(good.finished) == 2
    assert blocked.finished


def test_requests_end_as_lost_while_no_worker_can_be_started_and_later_ones_are_answered(start: Start) -> None:
    engine, broken = ScriptedEngine(), threading.Event()

    def build() -> ScriptedEngine:
        if broken.is_set():
            raise ValueError("the disk is gone")
        return engine

    dispatcher = start(build)
    broken.set()
    deadly, waiting = Heard(), Heard()
    engine.gate.clear()
    dispatcher.submit(request(0, 1, DEADLY), deadly)
    dispatcher.submit(request(1), waiting)
    engine.gate.set()
    assert [deadly.reason, waiting.reason] == ["lost", "lost"]
    assert dispatcher.load().ready is False
    with pytest.raises(RequestError) as caught:
        dispatcher.submit(request(2), Heard())
    assert caught.value.reason == "lost"
    assert caught.value.retry_after
    broken.clear()
    until(lambda: dispatcher.load().ready)
    heard = Heard()
    dispatcher.submit(request(3), heard)
    assert heard.finished


def test_an_error_of_the_first_start_is_raised_and_nothing_is_left(start: Start) -> None:
    engine = ScriptedEngine()

    def fail() -> ScriptedEngine:
        raise ValueError("no such model")

    before = threading.active_count()
    with pytest.raises(ValueError, match="no such model"):
        start(engine, fail)
    assert threading.active_count() == before


def test_a_worker_that_does_not_stop_a_late_request_is_killed_and_replaced(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()

    class Hanging(ScriptedEngine):
        def _generate(self, batch: list[Work], inbox: Inbox, report: Callable[[Report], None]) -> None:  # type: ignore[override]
            if batch[0].condition == DEADLY:
                hangs.wait(SECONDS)
                raise DeadError
            super()._generate(batch, inbox, report)

    class Killable(ThreadWorker):
        def kill(self) -> bool:
            hangs.set()
            return True

    monkeypatch.setattr(slot, "start_worker", lambda source, heard, ended, stopped: Killable(source, heard, ended))
    monkeypatch.setattr(dispatcher_module, "PATIENCE", 0.01)
    engine, deaths = Hanging(), Deaths()
    dispatcher = start(engine, observer=deaths)
    late, after = Heard(), Heard()
    ticket = dispatcher.submit(request(1, 1, DEADLY), late)
    assert engine.started.wait(SECONDS)
    ticket.deadline = 0.0  # type: ignore[attr-defined]
    dispatcher.submit(request(2, top_k=5), after)
    assert late.reason == "late"
    assert after.finished
    dispatcher.close()
    assert deaths.count == 1


def test_a_worker_that_does_not_take_its_work_does_not_keep_its_dispatcher_from_closing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = threading.Event()

    class Full(ThreadWorker):
        def send(self, batch: Sequence[Work]) -> None:
            killed.wait(SECONDS)

        def kill(self) -> bool:
            killed.set()
            return True

    monkeypatch.setattr(slot, "start_worker", lambda source, heard, ended, stopped: Full(source, heard, ended))
    monkeypatch.setattr(dispatcher_module, "STOP_SECONDS", 0.01)
    dispatcher, heard = start(ScriptedEngine()), Heard()
    dispatcher.submit(request(1), heard)
    until(lambda: dispatcher.load().running)
    dispatcher.close()
    assert heard.reason == "stopping"


def test_images_of_a_worker_that_died_wait_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "JOIN_SECONDS", SECONDS)
    engine, again = ScriptedEngine(capacity=2), threading.Event()

    def build() -> ScriptedEngine:
        if engine.batches:
            again.wait(SECONDS)
        return engine

    dispatcher = start(build)
    tickets = [dispatcher.submit(request(seed, 1, DEADLY), Heard()) for seed in range(2)]
    until(lambda: engine.batches and not dispatcher.load().workers)
    assert [ticket.ahead for ticket in tickets] == [0, 1]
    again.set()


def test_an_engine_that_exits_is_an_error() -> None:
    def leave() -> ScriptedEngine:
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="the engine was not built: SystemExit"):
        ThreadWorker(leave, lambda report: None, lambda: None)


def test_a_batch_that_is_cancelled_before_it_is_taken_shows_that_the_engine_is_alive() -> None:
    taken = 0

    def note() -> None:
        nonlocal taken
        taken += 1
        if taken == 1:
            inbox.put([Work(5, 1)])
            inbox.cancel([5])
        else:
            inbox.close()

    inbox = WorkInbox(note)
    assert inbox.take(block=True) == []
    assert taken == 2
