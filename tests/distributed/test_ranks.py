"""Tests with several processes end even if a process hangs."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import main
from tests import ranks
from tests.forked_ranks import forked_ranks
from tests.ranks import ended, run_on_ranks


def hang(rank: int) -> None:
    if rank == 1:
        signal.pause()


def fail(rank: int) -> None:
    if rank == 1:
        raise ValueError("a rank fails")


def test_kills_a_hanging_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PATIENCE", 10)
    with pytest.raises(AssertionError):
        run_on_ranks(hang, tmp_path)


def test_a_failing_rank_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_on_ranks(fail, tmp_path)


def test_kills_hanging_forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "main", lambda arguments: signal.pause())
    with pytest.raises(subprocess.TimeoutExpired):
        forked_ranks([], patience=1)


def test_forked_ranks_have_the_exit_code_of_a_rank_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("0", "1"):
        monkeypatch.setattr(main, "main", lambda arguments: sys.exit(5 * (os.environ["LOCAL_RANK"] == wrong)))  # noqa: B023
        assert forked_ranks([]).returncode == 5
    monkeypatch.setattr(main, "main", lambda arguments: os.kill(os.getpid(), signal.SIGKILL))
    assert forked_ranks([]).returncode == -signal.SIGKILL


def test_kills_a_hanging_command_and_its_subprocesses(tmp_path: Path) -> None:
    # The subprocess holds the write end of a pipe, so the read end is at its end when the subprocess has ended.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(subprocess.TimeoutExpired):
        ended(["sh", "-c", f"(echo started; exec sleep 1000) > {pipe}; true"], patience=2)
    assert os.read(reading, 100) == b"started\n"
    os.set_blocking(reading, True)
    assert select.select([reading], [], [], 60)[0], "the process of the hanging command still runs"
    assert os.read(reading, 100) == b""
    os.close(reading)
