"""Tests with several processes end even if a process hangs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ranks
from tests.ranks import ended, run_on_ranks

CHILD = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(1000)"


def hang(rank: int) -> None:
    if rank == 1:
        time.sleep(1000)


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


def test_kills_a_hanging_command_and_its_subprocesses(tmp_path: Path) -> None:
    child = [sys.executable, "-c", CHILD, str(tmp_path / "pid")]
    parent = f"import subprocess; subprocess.run({child!r})"
    with pytest.raises(subprocess.TimeoutExpired):
        ended([sys.executable, "-c", parent], patience=5)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the process of the hanging command still runs")
