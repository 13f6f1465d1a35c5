"""Two gloo processes that run several functions one after another, so that they import their modules only once."""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

import main

PATIENCE = 180
"""Seconds after which a function counts as hanging."""
PATIENCE_AFTER_AN_ERROR = 20
"""Seconds that the other rank has if one rank failed, since it may wait for the failed one."""
WORLD_SIZE = 2


def _serve(rank: int, store: Path, connection: Connection) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # Lightning then starts no processes of its own
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args = pickle.loads(request)
            answer = True, function(rank, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


class RankPair:
    """Two ranks of one process group. They start at the first use, and again after an error.

    Args:
        folder: empty folder for the files in which the ranks meet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._starts = 0
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = self.folder / f"store-{self._starts}"
        self._starts += 1
        for rank in range(WORLD_SIZE):
            own, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(own)

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of ``function(rank, *args)`` on each rank. The function must be at the top level of a module.

        Raises:
            AssertionError: if a rank fails, with its traceback, or does not end in time.
        """
        if not self._processes:
            self._start()
        request = pickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(request)
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + PATIENCE
        try:
            while len(answers) < WORLD_SIZE:
                waiting = [c for rank, c in enumerate(self._connections) if rank not in answers]
                ready = wait(waiting, max(0.0, end - time.monotonic()))
                errors = [f"rank {rank}: {text}" for rank, (good, text) in answers.items() if not good]
                assert ready, f"a rank hangs; errors of others: {errors}"
                for rank, connection in enumerate(self._connections):
                    if connection in ready:
                        answers[rank] = _receive(connection)
                        if not answers[rank][0]:
                            end = min(end, time.monotonic() + PATIENCE_AFTER_AN_ERROR)
            errors = [f"rank {rank}: {text}" for rank, (good, text) in answers.items() if not good]
            assert not errors, "\n".join(errors)
        except BaseException:
            self.stop()
            raise
        return [answers[rank][1] for rank in range(WORLD_SIZE)]

    def run_stage(self, arguments: list[str]) -> None:
        """Run ``main.py`` on both ranks, with DDP unless the arguments name another strategy."""
        self.run(_stage, arguments)

    def error_of_stage(self, arguments: list[str]) -> list[str]:
        """Run a command that fails on both ranks, and return the messages of their errors."""
        return self.run(_error_of_stage, arguments)


def _receive(connection: Connection) -> tuple[bool, Any]:
    try:
        answer: tuple[bool, Any] = pickle.loads(connection.recv_bytes())
    except EOFError:
        return False, "the process died"
    return answer


def _stage(rank: int, arguments: list[str]) -> None:
    strategy = [] if any("strategy" in item for item in arguments) else ["--trainer.strategy=ddp"]
    main.main([*arguments, "--trainer.devices=2", *strategy])


def _error_of_stage(rank: int, arguments: list[str]) -> str:
    try:
        _stage(rank, arguments)
    except (ValueError, FloatingPointError) as error:
        return str(error)
    raise AssertionError("the command succeeded")
