"""Commands end with one line and an exit code; a bug of this project keeps its traceback."""

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
from llamagen.command import fault_of, run_command
from llamagen.files import atomic_file
from llamagen.metrics.frechet import FID
from llamagen.models.gpt_config import GPTConfig


def raised(function: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        function()
    return caught.value


def exit_code(function: Callable[[], object]) -> int:
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


def refuse_in_pool() -> None:
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        pool.submit(refuse, 0).result()


def test_mistakes_of_the_user_are_one_line_and_code_2() -> None:
    for function, phrase in (
        (lambda: ImageDataModule("images", image_size=0), "image_size is 0"),
        (lambda: next(iter(DataLoader(Broken(bug=False), num_workers=1))), "dim 30 over n_head 4"),
        (refuse_in_pool, "image_size is 0"),
    ):
        fault = fault_of(raised(function))  # type: ignore[arg-type]
        assert fault is not None
        assert fault.status == 2
        assert phrase in fault.message
        assert "\n" not in fault.message
        assert "Traceback" not in fault.message
    for error, phrase in (
        (
            MisconfigurationException("No supported gpu backend found!"),
            "accelerator is gpu, but PyTorch finds none",
        ),
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


def test_a_wrong_path_detected_by_our_code_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_file(tmp_path):
            pass

    error = raised(write)
    assert isinstance(error, IsADirectoryError)
    assert error.filename is None
    assert fault_of(error) == (f"{tmp_path} is a folder; choose another name for the file", 2)


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


def test_bugs_are_not_reported_as_mistakes() -> None:
    for function in (
        lambda: ShardDataModule.rank.fget(None),  # type: ignore[attr-defined]
        lambda: next(iter(DataLoader(Broken(bug=True), num_workers=1))),
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: fault_of("no error"),  # type: ignore[arg-type]
        lambda: FID.checked_reference(None, (0.0, 0.0, 0.0)),  # type: ignore[arg-type]  # cannot be unpacked
    ):
        assert fault_of(raised(function)) is None  # type: ignore[arg-type]


def test_a_bug_keeps_its_traceback_and_the_message_says_where_to_report_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: [][1]) == 1
    error = capfd.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "IndexError" in error
    assert "report it in the project's issue tracker" in error


def test_the_traceback_of_a_mistake_is_shown_on_request(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(command.TRACEBACK, raising=False)
    assert exit_code(lambda: ImageDataModule("images", image_size=0)) == 2
    assert capfd.readouterr().err == "error: image_size is 0; it must be at least 1\n"
    seen: list[str] = []
    monkeypatch.setattr(sys, "argv", ["main.py", "--traceback", "fit"])
    assert exit_code(lambda: (seen.extend(sys.argv), ImageDataModule("images", image_size=0))) == 2
    assert seen == ["main.py", "fit"]
    assert "Traceback (most recent call last)" in capfd.readouterr().err
    assert os.environ[command.TRACEBACK] == "1"  # for the processes that the run starts


def interrupted_in_lightning() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def test_exit_codes_of_signals() -> None:
    def sigterm() -> None:
        raise SIGTERMException

    def ctrl_c() -> None:
        raise KeyboardInterrupt

    for function, code in ((sigterm, 143), (ctrl_c, 130), (interrupted_in_lightning, 130), (lambda: sys.exit(5), 5)):
        assert exit_code(function) == code


def test_processes_do_not_repeat_the_message_of_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(command.os, "write", lambda _, text: written.append(text))
    monkeypatch.setattr(command, "PATIENCE", 0.1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    parents = iter([7, 7, 1, 1])
    monkeypatch.setattr(command.os, "getppid", lambda: next(parents))
    assert exit_code(lambda: ImageDataModule("images", image_size=0)) == 2
    assert written == []
    monkeypatch.setattr(command.os, "getppid", lambda: 7)  # the first process still runs: it may not have this error
    assert exit_code(lambda: ImageDataModule("images", image_size=0)) == 2
    assert written == [b"error: rank 1: image_size is 0; it must be at least 1\n"]


def test_closed_output_is_not_an_error(tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text("from llamagen.command import run_command\nrun_command(lambda: print('x\\n' * 1_000_000))\n")
    shell = f"{sys.executable} {script} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": "."}
    )
    assert (done.stdout, done.stderr, done.returncode) == ("x\n", "", 141)
