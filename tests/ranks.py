"""Functions and commands in several processes, with a time limit.

Importing torch and Lightning takes longer than what most of these processes do. So they are forked from a process that
has imported both (:mod:`multiprocessing`'s forkserver). Only :func:`ended` starts a command as a user does.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only

PATIENCE = 120
"""Seconds after which processes count as hanging and are killed."""

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch", "lightning.pytorch", "command_line", "datamodules.codes", "tests.pipeline"])


def ended(command: list[str], patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. If it hangs, kill the command and all processes that it started.

    Raises:
        subprocess.TimeoutExpired: after ``patience`` seconds.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=patience)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)


def main_ended(arguments: list[str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run ``main.py`` in one process, or in several as ``torchrun`` does, each forked with all imports done.

    Returns:
        The first exit code that is not 0; the output of all ranks.

    Raises:
        AssertionError: if a rank has not ended after :data:`PATIENCE` seconds.
    """
    with TemporaryDirectory() as folder:
        out = Path(folder)
        processes = [
            FORKED.Process(target=_run_main, args=(arguments, {**os.environ, **variables}, out / str(rank)))
            for rank, variables in enumerate(_environments(ranks))
        ]
        codes = _joined(processes)
        output, errors = (
            "".join((out / f"{rank}.{name}").read_text() for rank in range(ranks)) for name in ("out", "err")
        )
    return subprocess.CompletedProcess(["main.py", *arguments], next(filter(None, codes), 0), output, errors)


def two_processes(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run ``main.py`` in two CPU processes, with DDP unless the arguments name another strategy."""
    strategy = [] if any("strategy" in argument for argument in arguments) else ["--trainer.strategy=ddp"]
    return main_ended([*arguments, "--trainer.devices=2", *strategy], ranks=2)


def succeeds(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that a command succeeded; otherwise show the end of its stderr."""
    assert done.returncode == 0, done.stderr[-3000:]


def run_on_ranks(function: Callable[..., Any], out: Path, *args: Any, world_size: int = 2) -> list[Any]:
    """Results of ``function(rank, *args)`` on each rank. The function must be at the top level of a module.

    Raises:
        AssertionError: if a rank fails, or has not ended after :data:`PATIENCE` seconds.
    """
    port = _free_port()
    processes = [
        FORKED.Process(target=_one_rank, args=(function, rank, world_size, port, out, args, dict(os.environ)))
        for rank in range(world_size)
    ]
    assert _joined(processes) == [0] * world_size
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _environments(ranks: int) -> list[dict[str, str]]:
    """Variables of each rank, as ``torchrun`` sets them; none for a single process."""
    if ranks == 1:
        return [{}]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _joined(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Exit codes of processes. All are killed with their own processes when the first one hangs."""
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
        assert None not in codes, f"a process hangs; the exit codes are {codes}"
        return codes
    finally:
        for process in processes:
            if process.exitcode is None and process.pid is not None:
                os.killpg(process.pid, signal.SIGKILL)


def _start(environment: dict[str, str]) -> None:
    os.setsid()  # a group of its own, which can be killed with the processes that it starts
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # Linux's default, which a forked process has lost
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # read when Lightning was imported
    torch.set_num_threads(1)


def _run_main(arguments: list[str], environment: dict[str, str], out: Path) -> None:
    _start(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    sys.argv = ["main.py", *arguments]
    runpy.run_path("main.py", run_name="__main__")


def _one_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    out: Path,
    args: Any,
    environment: dict[str, str],
) -> None:
    _start(environment)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, *args), out / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
