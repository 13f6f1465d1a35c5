"""Functions and commands in several gloo processes, with a time limit."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 180
"""Seconds after which processes count as hanging and are killed."""


def ended(command: list[str], patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. If it hangs, kill the command and all processes that it started.

    Raises:
        subprocess.TimeoutExpired: after :data:`PATIENCE` seconds.
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


def two_processes(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run ``main.py`` in two CPU processes with DDP."""
    return ended([sys.executable, "main.py", *arguments, "--trainer.devices=2", "--trainer.strategy=ddp"])


def succeeds(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that a command succeeded; otherwise show the end of its stderr."""
    assert done.returncode == 0, done.stderr[-3000:]


def _one_rank(function: Callable[..., Any], rank: int, world_size: int, port: int, out: Path, args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, *args), out / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_on_ranks(function: Callable[..., Any], out: Path, *args: Any, world_size: int = 2) -> list[Any]:
    """Results of ``function(rank, *args)`` on each rank. The function must be at the top level of a module.

    Raises:
        AssertionError: if a rank fails, or has not ended after :data:`PATIENCE` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_one_rank, args=(function, rank, world_size, port, out, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        assert [process.exitcode for process in processes] == [0] * world_size
    finally:
        for process in processes:
            process.kill()
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
