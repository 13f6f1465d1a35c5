"""``main.py`` in two processes with DDP that are forked from the test process.

A new process needs seconds to import PyTorch and Lightning; a forked one has them. As with Lightning's launcher, the
first rank is the parent of the other one. Lightning itself starts none, because the variables that launchers set are
set. For a test of the launch, use :func:`tests.ranks.two_processes`.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

import main
from llamagen.command import run_command
from tests.ranks import PATIENCE

WORLD_SIZE = 2


def forked_ranks(arguments: list[str], patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run ``main.py`` in two CPU processes with DDP. If they hang, kill them.

    Returns:
        Exit code of the first rank, or of the second one if the first one succeeded, and the output of both.

    Raises:
        subprocess.TimeoutExpired: after ``patience`` seconds.
    """
    arguments = [*arguments, f"--trainer.devices={WORLD_SIZE}", "--trainer.strategy=ddp"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        ends, held = os.pipe()  # read until all processes that hold it have ended
        first = os.fork()
        if first == 0:
            os.setsid()
            rank = 0 if os.fork() else 1
            _run(arguments, rank, port, Path(folder))
        os.close(held)
        in_time = select.select([ends], [], [], patience)[0]
        os.close(ends)
        if not in_time:
            os.killpg(first, signal.SIGKILL)
        _, status = os.waitpid(first, 0)
        if not in_time:
            raise subprocess.TimeoutExpired(arguments, patience)
        texts = {path.name: path.read_text() for path in Path(folder).iterdir()}
    code = os.waitstatus_to_exitcode(status) or int(texts.get("code1", -signal.SIGKILL))
    output, errors = ("".join(texts.get(f"{name}{rank}", "") for rank in range(WORLD_SIZE)) for name in ("out", "err"))
    return subprocess.CompletedProcess(arguments, code, output, errors)


def _run(arguments: list[str], rank: int, port: int, folder: Path) -> None:
    """Run ``main.py`` as a rank, and end the process."""
    code: Any = 1
    try:
        sys.stdout, sys.stderr = (
            _redirected(number, folder / f"{name}{rank}") for number, name in ((1, "out"), (2, "err"))
        )
        warnings.showwarning = _print_warning  # pytest records warnings
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD_SIZE)}
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        os.environ.pop("PL_GLOBAL_SEED", None)
        rank_zero_only.rank = rank
        torch.set_num_threads(1)
        run_command(lambda: main.main(arguments))
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        (folder / f"code{rank}").write_text(str(code))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirected(descriptor: int, path: Path) -> Any:
    """A stream to a file, which also gets what is written to the descriptor."""
    file = path.open("w", buffering=1)
    os.dup2(file.fileno(), descriptor)
    return file


def _print_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)
