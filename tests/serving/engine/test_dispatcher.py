"""Batches, limits, cancellation, deadlines and the end of a dispatcher, with an engine without a model."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from serving.engine import slot
from serving.engine.dispatcher import Dispatcher
from serving.engine.engine import Inbox, Report, RowsReport
from serving.engine.observer import Observer
from serving.engine.requests import Ended, ImageRequest, ReconstructionRequest, RequestError, Rows
from tests.serving.engine.conftest import Start
from tests.serving.engine.scripted import BAD, BROKEN, SECONDS, Heard, ScriptedEngine, request, until


def submit(dispatcher: Dispatcher, *arguments: Any, seconds: float | None = None, **settings: Any) -> Heard:
    heard = Heard()
    dispatcher.submit(request(*arguments, **settings), heard, seconds)
    return heard


def block(dispatcher: Dispatcher, engine: ScriptedEngine) -> Heard:
    """Submit a request, and hold it before its first row."""
    engine.gate.clear()
    heard = submit(dispatcher, 99)
    assert engine.started.wait(SECONDS)
    return heard


def test_the_oldest_image_is_first_and_images_of_its_settings_join_it(start: Start) -> None:
    engine = ScriptedEngine(capacity=4)
    dispatcher = start(engine)
    first = block(dispatcher, engine)
    others = [
        submit(dispatcher, 1, 2),
        submit(dispatcher, 2, 1, top_k=5),
        submit(dispatcher, 3, 2),
        submit(dispatcher, 4),
    ]
    engine.gate.set()
    assert [len(each.finished) for each in (first, *others)] == [1, 2, 1, 2, 1]
    assert engine.batches == [[99], [1, 1, 3, 3], [2], [4]]
    assert all(event.pixels[0, 0, 0] == 3 and event.codes[0, 0] == k for k, event in others[2].finished.items())
    assert others[0].rows == [1, 2, 3, 4]
    assert next(event.images for event in others[0].events if isinstance(event, Rows)) == (0, 1)


def test_an_image_waits_shortly_for_others_to_share_its_batch(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "JOIN_SECONDS", SECONDS)
    engine = ScriptedEngine(capacity=3)
    dispatcher = start(engine)
    heard = [submit(dispatcher, seed) for seed in range(3)]
    assert all(each.finished for each in heard)
    assert engine.batches == [[0, 1, 2]]


def test_a_worker_gets_the_next_batch_while_it_decodes_the_last_one(start: Start) -> None:
    class Ahead(ScriptedEngine):
        def run(self, inbox: Inbox, report: Callable[[Report], None]) -> None:
            batch = inbox.take(block=True)
            report(RowsReport((batch[0].key,), 3))
            self.early = inbox.take(block=False)
            report(RowsReport((batch[0].key,), 4))
            following = inbox.take(block=True)  # never returns if the dispatcher waits for the image
            self._generate([*batch, *following], inbox, report)
            super().run(inbox, report)

    engine = Ahead(capacity=1)
    dispatcher = start(engine)
    first, second = submit(dispatcher, 1), submit(dispatcher, 2)
    assert first.finished
    assert second.finished
    assert engine.early == []


def test_a_request_that_is_cancelled_while_it_waits_never_starts(start: Start) -> None:
    engine = ScriptedEngine()
    dispatcher = start(engine)
    running, waiting = block(dispatcher, engine), Heard()
    ticket = dispatcher.submit(request(1, 2, top_k=5), waiting)
    assert ticket.ahead == 1
    ticket.cancel()
    ticket.cancel()
    assert waiting.reason == "cancelled"
    assert waiting.events == [Ended(waiting.error)]
    assert ticket.ahead == 0
    engine.gate.set()
    assert running.finished
    assert engine.batches == [[99]]


def test_a_running_request_stops_at_a_row_and_others_of_its_batch_go_on(start: Start) -> None:
    engine = ScriptedEngine()
    dispatcher = start(engine)
    engine.gate.clear()
    heard = [Heard() for _ in range(3)]
    tickets = [dispatcher.submit(request(seed, top_k=min(seed, 1)), each) for seed, each in enumerate(heard)]
    assert engine.started.wait(SECONDS)
    tickets[0].cancel()  # nothing opens the gate: the engine stops because nobody wants its batch
    until(lambda: len(engine.batches) == 2)
    tickets[1].cancel()
    assert [each.reason for each in heard[:2]] == ["cancelled", "cancelled"]
    engine.gate.set()
    assert heard[2].finished
    assert engine.batches == [[0], [1, 2]]


def test_too_many_images_are_refused_at_once_with_a_time(start: Start) -> None:
    engine = ScriptedEngine()
    dispatcher = start(engine, queue=4)
    block(dispatcher, engine)
    submit(dispatcher, 1, 3)
    with pytest.raises(RequestError) as caught:
        submit(dispatcher, 2, 2)
    assert caught.value.reason == "full"
    assert str(caught.value) == "3 images are waiting; try again later"
    assert caught.value.retry_after is not None
    assert caught.value.retry_after >= 1
    last = submit(dispatcher, 3, 1)  # the queue itself is not harmed
    with pytest.raises(RequestError, match="5 images, but only 4 fit into the queue") as caught:
        submit(dispatcher, 4, 5)
    assert caught.value.reason == "invalid"
    engine.gate.set()
    assert last.finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditions": ("eleven",)}, "there is no class 'eleven'"),
        ({"conditions": (10,)}, "class 10 was requested, but the model has classes 0 to 9"),
        ({"conditions": (), "indices": ()}, "there are no images"),
        ({"indices": (0, 1)}, "2 indices for 1 images"),
        ({"indices": (-1,)}, "index is -1"),
        ({"indices": (2**62 + 1,)}, "index is .*at most"),
        ({"seed": True}, "seed is True; it must be an integer"),
        ({"keep_rows": 2}, "keep_rows is 2, but there is no image"),
        ({"keep_rows": 5, "image": b"x"}, "keep_rows is 5; it must be at most 4"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(start: Start, change: dict[str, Any], message: str) -> None:
    values = {"conditions": (1,), "indices": (0,), "seed": 0, "settings": request(0).settings, **change}
    with pytest.raises(RequestError, match=message) as caught:
        start(ScriptedEngine()).submit(ImageRequest(**values), Heard())
    assert caught.value.reason == "invalid"
    assert "\n" not in str(caught.value)


def test_a_late_request_ends_whether_it_waits_or_runs(start: Start) -> None:
    engine = ScriptedEngine()
    dispatcher = start(engine)
    engine.gate.clear()
    running = Heard()
    ticket = dispatcher.submit(request(1), running, 600)
    assert engine.started.wait(SECONDS)
    ticket.deadline = ticket.arrived  # type: ignore[attr-defined]
    waiting = submit(dispatcher, 2, top_k=5, seconds=0.0)
    assert waiting.reason == "late"
    assert str(waiting.error) == "the request was not finished in 0 s"
    assert running.reason == "late"
    engine.gate.set()
    assert submit(dispatcher, 3).finished
    assert engine.batches == [[1], [3]]


def test_closing_finishes_what_was_accepted_and_refuses_the_rest(start: Start) -> None:
    engine = ScriptedEngine()
    dispatcher = start(engine)
    accepted = [block(dispatcher, engine), submit(dispatcher, 1, top_k=5)]
    closing = threading.Thread(target=dispatcher.close, args=(SECONDS,))
    closing.start()
    until(lambda: not dispatcher.load().ready)
    with pytest.raises(RequestError) as caught:
        submit(dispatcher, 2)
    assert caught.value.reason == "stopping"
    assert caught.value.retry_after
    engine.gate.set()
    closing.join(SECONDS)
    assert [len(each.finished) for each in accepted] == [1, 1]


def test_a_second_close_ends_what_the_first_one_waits_for(start: Start) -> None:
    engine = ScriptedEngine()
    dispatcher = start(engine)
    heard = [block(dispatcher, engine), submit(dispatcher, 1, top_k=5)]
    closing = threading.Thread(target=dispatcher.close, args=(SECONDS,))
    closing.start()
    dispatcher.close(0)
    closing.join(SECONDS)
    assert [each.reason for each in heard] == ["stopping", "stopping"]


def test_an_engine_with_continuous_batching_gets_images_while_others_run(start: Start) -> None:
    engine = ScriptedEngine(capacity=3, is_continuous=True)
    dispatcher = start(engine)
    heard = [block(dispatcher, engine), submit(dispatcher, 1, top_k=5), submit(dispatcher, 2, 2, top_p=0.5)]
    until(lambda: dispatcher.load().running == 3)
    assert dispatcher.load().waiting == 1
    engine.gate.set()
    assert [len(each.finished) for each in heard] == [1, 1, 2]


def test_two_workers_share_the_queue(start: Start) -> None:
    engines = [ScriptedEngine(capacity=1), ScriptedEngine(capacity=1)]
    dispatcher = start(*engines)
    for engine in engines:
        engine.gate.clear()
    heard = submit(dispatcher, 1, 3)
    assert all(engine.started.wait(SECONDS) for engine in engines)
    load = dispatcher.load()
    assert (load.workers, load.running, load.waiting) == (2, 2, 1)
    for engine in engines:
        engine.gate.set()
    assert len(heard.finished) == 3


@pytest.mark.parametrize(("condition", "reason"), [(BAD, "invalid"), (BROKEN, "failed")])
def test_a_failed_image_ends_its_request_only(start: Start, condition: int, reason: str) -> None:
    engine = ScriptedEngine()
    dispatcher = start(engine)
    first = block(dispatcher, engine)
    good, bad = submit(dispatcher, 1), submit(dispatcher, 2, 2, condition)
    engine.gate.set()
    assert bad.reason == reason
    assert str(bad.error) == "no such thing"
    assert good.finished
    assert first.finished


def test_a_reconstruction_is_a_request_like_others(start: Start) -> None:
    heard = Heard()
    start(ScriptedEngine()).submit(ReconstructionRequest(b"file"), heard)
    assert list(heard.finished) == [0]


def test_an_observer_learns_what_happens_and_errors_of_listeners_harm_nobody(start: Start) -> None:
    calls: list[tuple[Any, ...]] = []

    class Recorder(Observer):
        def __getattribute__(self, name: str) -> Any:
            return lambda *values: calls.append((name, *values))

    def fail(event: object) -> None:
        raise RuntimeError

    dispatcher = start(ScriptedEngine(), queue=4, observer=Recorder())
    dispatcher.submit(request(1), fail)
    heard = submit(dispatcher, 2, 2)
    assert heard.finished
    with pytest.raises(RequestError):
        submit(dispatcher, 3, 9)
    dispatcher.close()
    names = [call[0] for call in calls]
    assert names.count("image") == 3
    assert all(0 <= seconds < SECONDS for call in calls if call[0] == "image" for seconds in call[1:])
    assert ("accepted", 2) in calls
    assert ("refused", "invalid") in calls
    assert sorted(call[1] for call in calls if call[0] == "batch") in ([1, 2], [3])
    assert [call[1] for call in calls if call[0] == "ended"] == [None, None]
    assert names.count("worker_started") == 1
    assert "worker_died" not in names


def test_two_hundred_clients_that_leave_leave_nothing_behind(start: Start) -> None:
    engine = ScriptedEngine()
    dispatcher = start(engine, queue=500)
    threads = threading.active_count()
    blocked, heard = block(dispatcher, engine), list[Heard]()
    tickets = []
    for seed in range(200):
        heard.append(Heard())
        tickets.append(dispatcher.submit(request(seed, 1 + seed % 2, top_k=seed % 3), heard[-1]))
        if seed >= 20:  # some while they wait, some while they run
            tickets[seed - 20].cancel()
        if seed == 100:
            engine.gate.set()
    for ticket in tickets:
        ticket.cancel()
    assert all(each.reason in ("cancelled", None) for each in heard)
    assert blocked.error is None
    assert submit(dispatcher, 1, 4).finished
    load = dispatcher.load()
    assert (load.waiting, load.running) == (0, 0)
    assert threading.active_count() == threads
    assert dispatcher._active == set()
    state = dispatcher._slots[0].state
    assert state is not None
    assert state.cancels == []
    until(lambda: state.worker._inbox._cancelled == set())  # type: ignore[attr-defined]
