"""Commands and functions in new processes that import nothing: they are forked from one that has imported the project.

Importing PyTorch and Lightning takes longer than most commands of the tests. The server process is started once for
each process of pytest. It has no threads and has not trained, so its children may do both.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

import main
from llamagen.command import run_command
from tests.ranks import PATIENCE

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["command_line", __name__])


def forked_command(arguments: list[str], ranks: int = 1, strategy: str = "ddp") -> subprocess.CompletedProcess[str]:
    """Run ``main.py`` as in a shell, or on several ranks as ``torchrun`` starts them: Lightning starts no process.

    Args:
        arguments: arguments of the command.
        ranks: number of processes.
        strategy: the trainer's strategy for several ranks.

    Returns:
        Exit code and output of all processes, see :func:`forked_ranks`.
    """
    more = [f"--trainer.devices={ranks}", f"--trainer.strategy={strategy}"] if ranks > 1 else []
    return forked_ranks(_command, [*arguments, *more], ranks=ranks)


def _command(arguments: list[str]) -> None:
    sys.argv = ["main.py", *arguments]
    run_command(main.main)


def forked_module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m name arguments``; for the result see :func:`forked_ranks`."""
    return forked_ranks(_module, name, arguments, ranks=1)


def _module(name: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def forked_ranks(function: Callable[..., object], *args: Any, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Call ``function(*args)`` in new processes with the environment of the ranks of a run.

    As soon as one fails, the others are killed.

    Args:
        function: a function at the top level of a module.
        args: its arguments.
        ranks: number of processes.

    Returns:
        The exit code of the first process that failed, 0 if none did, and the output of all.

    Raises:
        subprocess.TimeoutExpired: if a process has not ended after :data:`~tests.ranks.PATIENCE` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    end = time.monotonic() + PATIENCE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            SERVER.Process(target=_one_rank, args=(function, args, rank, ranks, port, dict(os.environ), folder))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        status = 0
        try:
            while running := [process for process in processes if process.exitcode is None]:
                if not wait([process.sentinel for process in running], max(0.0, end - time.monotonic())):
                    raise subprocess.TimeoutExpired(str(args), PATIENCE)
                if status := next((each.exitcode for each in processes if each.exitcode), 0):
                    break
        finally:
            for process in processes:
                process.kill()
                process.join()
        output, errors = ((folder / each).read_text(errors="replace") for each in ("stdout", "stderr"))
        return subprocess.CompletedProcess(args, status, output, errors)


def _one_rank(
    function: Callable[..., object],
    args: Any,
    rank: int,
    ranks: int,
    port: int,
    environment: dict[str, str],
    folder: Path,
) -> None:
    os.setsid()  # a signal to the process group must not reach pytest
    os.environ.clear()
    os.environ.update(environment)
    if ranks > 1:
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0, "LOCAL_RANK": rank}
        os.environ.update({key: str(value) for key, value in {**variables, "WORLD_SIZE": ranks}.items()})
        rank_zero_only.rank = rank  # Lightning reads it from the environment when it is imported
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), number)
    function(*args)
