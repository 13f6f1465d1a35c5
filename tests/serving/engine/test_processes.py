"""Worker processes: killed, hanging, orphaned, interrupted, and under many requests that are cancelled."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamagen import LlamaGen
from serving.engine import dispatcher as dispatcher_module
from serving.engine.dispatcher import Dispatcher
from serving.engine.process_worker import ProcessWorker
from serving.engine.requests import ImageRequest, Ticket
from serving.engine.spec import WorkerSpec
from tests.pipeline import Pipeline
from tests.serving.engine.conftest import Start
from tests.serving.engine.scripted import DEADLY, Heard, request, until

SCRIPTED = WorkerSpec("", engine="tests.serving.engine.scripted:hanging_engine")


def worker_pid(dispatcher: Dispatcher) -> int:
    state = dispatcher._slots[0].state
    assert state is not None
    assert isinstance(state.worker, ProcessWorker)
    pid = state.worker.process.pid
    assert pid is not None
    return pid


def has_ended(pid: int) -> bool:
    """Whether a process has ended; it may wait for somebody to collect its exit code."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return not found.stdout.strip() or found.stdout.startswith("Z")


def kilobytes(pid: int) -> int:
    found = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.fixture(scope="module")
def dispatcher(pipeline: Pipeline) -> Iterator[Dispatcher]:
    """The small model in a process."""
    found = Dispatcher(WorkerSpec(str(pipeline.root / "argen"), dtype="float32", batch_size=4), queue=500)
    yield found
    found.close()


@pytest.mark.slow
def test_requests_of_a_worker_that_is_killed_get_the_same_images(dispatcher: Dispatcher, model: LlamaGen) -> None:
    heard = [Heard() for _ in range(20)]
    first = worker_pid(dispatcher)
    os.kill(first, signal.SIGINT)  # as Ctrl-C in a terminal does
    os.kill(first, signal.SIGTERM)
    for seed, each in enumerate(heard):
        dispatcher.submit(ImageRequest((3, 5), (0, 1), seed, model.settings(top_k=5)), each)
    until(lambda: any(each.events for each in heard))
    assert worker_pid(dispatcher) == first
    os.kill(first, signal.SIGKILL)
    for seed, each in enumerate(heard):
        expected = model.generate([3, 5], seed=seed, top_k=5, progress=False)
        assert [np.array_equal(each.finished[k].pixels, np.asarray(expected[k])) for k in (0, 1)] == [True, True]
    assert worker_pid(dispatcher) != first
    assert has_ended(first)


@pytest.mark.slow
def test_cancelled_requests_leave_nothing_in_the_worker(dispatcher: Dispatcher, model: LlamaGen) -> None:
    def cancel_many() -> None:
        tickets, heard = list[Ticket](), [Heard() for _ in range(200)]
        for seed, each in enumerate(heard):
            values = ImageRequest((3, 5), (0, 1), seed, model.settings(top_k=seed % 3), previews=True)
            tickets.append(dispatcher.submit(values, each))
            if seed >= 5:
                tickets[seed - 5].cancel()
        for ticket in tickets:
            ticket.cancel()
        assert all(each.reason in ("cancelled", None) for each in heard)

    cancel_many()
    pid = worker_pid(dispatcher)
    before = kilobytes(pid)
    for _ in range(3):
        cancel_many()
    last = Heard()
    dispatcher.submit(ImageRequest((1,), (0,), 0, model.settings()), last)
    assert last.finished
    load = dispatcher.load()
    assert (load.waiting, load.running, len(dispatcher._active)) == (0, 0, 0)
    assert worker_pid(dispatcher) == pid
    assert kilobytes(pid) - before < 8 * 1024


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed_after_the_deadline(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "PATIENCE", 0.1)
    dispatcher = start(SCRIPTED)
    pid, late, after = worker_pid(dispatcher), Heard(), Heard()
    dispatcher.submit(request(1, 1, DEADLY), late, 2.0)
    assert late.reason == "late"
    dispatcher.submit(request(2), after)
    assert after.finished
    assert has_ended(pid)


@pytest.mark.slow
def test_a_worker_that_hangs_does_not_keep_its_dispatcher_from_closing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "STOP_SECONDS", 0.1)
    dispatcher = start(SCRIPTED)
    pid, heard = worker_pid(dispatcher), Heard()
    dispatcher.submit(request(1, 1, DEADLY), heard)
    until(lambda: dispatcher.load().running)
    dispatcher.close()
    assert heard.reason == "stopping"
    assert has_ended(pid)


@pytest.mark.slow
def test_a_worker_that_does_not_read_does_not_keep_its_dispatcher_from_closing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "STOP_SECONDS", 0.1)
    dispatcher = start(SCRIPTED)
    pid, heard = worker_pid(dispatcher), Heard()
    os.kill(pid, signal.SIGSTOP)
    upload = replace(request(1), image=b"x" * 2**22)  # more than a pipe holds
    dispatcher.submit(upload, heard)
    until(lambda: dispatcher.load().running)
    dispatcher.close()
    assert heard.reason == "stopping"
    assert has_ended(pid)


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_loads_is_an_error_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"was killed .* out of memory; .* a smaller batch size") as caught:
        Dispatcher(WorkerSpec("a model", engine="tests.serving.engine.scripted:killed_engine"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_process_that_cannot_load_its_model_says_why_in_one_line() -> None:
    with pytest.raises(ValueError, match="no_such_model does not exist; give a published name") as caught:
        Dispatcher(WorkerSpec("no_such_model"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_worker_ends_with_the_process_that_started_it() -> None:
    command = [sys.executable, "-m", "tests.serving.engine.parent"]
    root = Path(__file__).parents[3]
    with subprocess.Popen([*command, "wait"], stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not has_ended(pid)
        parent.kill()
    until(lambda: has_ended(pid))
    # A program that forgets to close its dispatcher ends, too.
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60, cwd=root)
    until(lambda: has_ended(int(found.stdout)))
