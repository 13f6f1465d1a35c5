"""Tests with several processes end even if a process hangs."""

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from tests import ranks
from tests.ranks import ended, run_on_ranks


def hang(rank: int) -> None:
    if rank == 1:
        signal.pause()


def fail(rank: int) -> None:
    if rank == 1:
        raise ValueError("a rank fails")


def test_kills_a_hanging_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PATIENCE", 3)
    with pytest.raises(AssertionError):
        run_on_ranks(hang, tmp_path)


def test_a_failing_rank_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_on_ranks(fail, tmp_path)


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
