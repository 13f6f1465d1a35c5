"""A command ends in one line and with an exit code that says why; a bug of this project keeps its traceback."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch.distributed import DistNetworkError
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ShardDataModule
from datamodules.images import ImageDataModule
from llamagen import command
from llamagen.command import Fault, fault_of, run_command
from llamagen.models.gpt_config import GPTConfig


def raised(function: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        function()
    return caught.value


def end_of(function: Callable[[], object]) -> int:
    code = raised(lambda: run_command(function)).code  # type: ignore[attr-defined]
    return int(code)


class Broken(Dataset[Any]):
    """Fails in a worker: by a mistake of the user, or by a bug."""

    def __init__(self, bug: bool) -> None:
        self.bug = bug

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return int("seven") if self.bug else GPTConfig(dim=30, n_layer=1, n_head=4)


def refuse(value: int) -> None:
    ImageDataModule("images", image_size=value)


def in_a_pool() -> None:
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        pool.submit(refuse, 0).result()


def test_mistakes_of_the_user_are_one_line_and_code_2() -> None:
    for function, phrase in (
        (lambda: ImageDataModule("images", image_size=0), "image_size is 0"),
        (lambda: next(iter(DataLoader(Broken(bug=False), num_workers=1))), "dim 30 over n_head 4"),
        (in_a_pool, "image_size is 0"),
    ):
        fault = fault_of(raised(function))  # type: ignore[arg-type]
        assert fault is not None
        assert fault.status == 2
        assert phrase in fault.message
        assert "\n" not in fault.message
        assert "Traceback" not in fault.message
    for error, phrase in (
        (MisconfigurationException("No supported gpu backend found!"), "trainer.accelerator is gpu, but there is none"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x: permission denied; give another"),
        (type("UsageError", (Exception,), {"__module__": "wandb.errors"})("No API key"), "run `wandb login`"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "choose a free one"),
        (
            DistNetworkError("The server socket has failed to listen. port: 29500, EADDRINUSE"),
            "set MASTER_PORT to a free",
        ),
    ):
        fault = fault_of(error)
        assert fault is not None
        assert fault.status == 2
        assert phrase in fault.message


def test_faults_of_the_run_are_one_line_and_code_1() -> None:
    for error, phrase in (
        (FloatingPointError("loss not finite\nat step 3"), "loss not finite at step 3"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/last.ckpt"), "No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory."), "use a smaller batch_size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), "a larger /dev/shm"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), "another process of this run ended"),
    ):
        fault = fault_of(error)
        assert fault is not None
        assert fault.status == 1
        assert phrase in fault.message


def test_a_bug_is_no_message_to_the_user() -> None:
    for function in (
        lambda: ShardDataModule.rank.fget(None),  # type: ignore[attr-defined]
        lambda: next(iter(DataLoader(Broken(bug=True), num_workers=1))),
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: fault_of("no error"),  # type: ignore[arg-type]
    ):
        assert fault_of(raised(function)) is None  # type: ignore[arg-type]


def test_a_bug_keeps_its_traceback_and_says_where_to_report_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert end_of(lambda: [][1]) == 1
    error = capfd.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "IndexError" in error
    assert "report it in the project's issue tracker" in error


def test_the_traceback_of_a_mistake_is_shown_if_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(command.TRACEBACK, raising=False)
    assert end_of(lambda: ImageDataModule("images", image_size=0)) == 2
    assert capfd.readouterr().err == "error: image_size is 0; it must be at least 1\n"
    seen: list[str] = []
    monkeypatch.setattr(sys, "argv", ["main.py", "--traceback", "fit"])
    assert end_of(lambda: (seen.extend(sys.argv), ImageDataModule("images", image_size=0))) == 2
    assert seen == ["main.py", "fit"]
    assert "Traceback (most recent call last)" in capfd.readouterr().err
    assert os.environ[command.TRACEBACK] == "1"  # for the processes that the run starts


def interrupted_in_lightning() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def test_exit_codes_tell_of_signals() -> None:
    def sigterm() -> None:
        raise SIGTERMException

    def ctrl_c() -> None:
        raise KeyboardInterrupt

    for function, code in ((sigterm, 143), (ctrl_c, 130), (interrupted_in_lightning, 130), (lambda: sys.exit(5), 5)):
        assert end_of(function) == code


def test_what_the_first_process_of_a_node_says_is_not_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(command.os, "write", lambda _, text: written.append(text))
    monkeypatch.setattr(command, "PATIENCE", 0.1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    parents = iter([7, 7, 1, 1])
    monkeypatch.setattr(command.os, "getppid", lambda: next(parents))
    assert end_of(lambda: ImageDataModule("images", image_size=0)) == 2
    assert written == []
    monkeypatch.setattr(command.os, "getppid", lambda: 7)  # which lives on: it may not know
    assert end_of(lambda: ImageDataModule("images", image_size=0)) == 2
    assert written == [b"error: rank 1: image_size is 0; it must be at least 1\n"]


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text("from llamagen.command import run_command\nrun_command(lambda: print('x\\n' * 1_000_000))\n")
    shell = f"{sys.executable} {script} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": "."}
    )
    assert (done.stdout, done.stderr, done.returncode) == ("x\n", "", 141)


def test_faults_are_tuples_of_message_and_code() -> None:
    assert Fault("broken", 1) == ("broken", 1)
