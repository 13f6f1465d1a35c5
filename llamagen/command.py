"""Error messages and exit codes of commands.

A mistake of the user is reported in one line on stderr, with exit code 2. A fault of the run (values that are not
finite, a full disk, no memory) is one line, too, with exit code 1. Any other error is a bug of this project and keeps
its traceback. ``--traceback`` or ``LLAMAGEN_TRACEBACK=1`` also shows the traceback of mistakes and faults.
"""

import dis
import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

TRACEBACK = "LLAMAGEN_TRACEBACK"
"""Environment variable for tracebacks. Processes started by the command inherit it."""

FLAG = "--traceback"

ROOT = Path(__file__).resolve().parents[1]
OURS = (
    *("llamagen", "lightning_modules", "datamodules", "callbacks", "evaluation", "command_line"),
    *("serving", "benchmarks"),
)
"""Packages whose ``raise`` statements are messages to the user."""

USER_OS_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors of the system that mean a wrong path, if this project raises them."""

LIBRARIES = ("lightning", "jsonargparse", "omegaconf", "webdataset", "transformers", "huggingface_hub")
"""Packages that raise built-in exceptions, such as ValueError, for mistakes of the user."""

FOREIGN_ERRORS = ("omegaconf", "wandb", "huggingface_hub", "jsonargparse", "lightning")
"""Packages whose own exceptions are always messages to the user."""

ADVICE = {
    "wandb": "run `wandb login`, set WANDB_MODE=offline, or leave out configs/logger/wandb.yaml",
}

REWORDED = (
    (
        r"No supported (\w+) backend found!?",
        r"trainer.accelerator is \1, but PyTorch finds none on this machine; set it to auto or cpu",
    ),
    (r"`(val_check_interval|limit_\w+_batches|max_\w+|min_\w+|accumulate_grad_batches)`", r"trainer.\1"),
)
"""Patterns of libraries' messages, and their replacements."""

PATIENCE = 3.0
"""Seconds to wait for the first process of a node to report the same error."""


class Fault(NamedTuple):
    """An error that a user can fix.

    Attributes:
        message: one line.
        status: exit code of the command.
    """

    message: str
    status: int


def run_command(command: Callable[[], object]) -> None:
    """Run a command. If it fails, print the reason and exit.

    Exit codes: 0 for success, 1 for a fault of the run and for a bug, 2 for a mistake of the user, 130 after SIGINT
    (Ctrl-C), 143 after SIGTERM.

    Args:
        command: function that reads its arguments from ``sys.argv``.
    """
    if FLAG in sys.argv:
        sys.argv = [argument for argument in sys.argv if argument != FLAG]
        os.environ[TRACEBACK] = "1"
    try:
        command()
        sys.stdout.flush()
    except SystemExit as end:
        raise SystemExit(_status_of(end)) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except BaseException as error:
        fault = fault_of(error)
        if fault is None or os.environ.get(TRACEBACK, "0") not in ("", "0"):
            traceback.print_exception(error)
        if fault is None or not _reported_by_first_process():
            # A single write call, so that lines of several processes do not mix.
            os.write(2, f"{_error_line(fault)}\n".encode(errors="replace"))
        raise SystemExit(1 if fault is None else fault.status) from None


def _status_of(end: SystemExit) -> object:
    """Exit code of a command that called ``exit``. Where Lightning exits after a signal, use the signal's code."""
    if type(end).__name__ == "SIGTERMException":
        return 128 + signal.SIGTERM
    if end.code == 1 and isinstance(end.__context__, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return end.code


def _reported_by_first_process() -> bool:
    """Whether the first process of the run, which started this one, has ended in the meantime.

    Every process of a run detects the same mistake, but the user should read it only once.
    """
    parent, first = os.getppid(), os.environ.get("LOCAL_RANK", "0") == "0"
    deadline = time.monotonic() + PATIENCE
    while not first and os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.05)
    return not first and os.getppid() != parent


def _error_line(fault: Fault | None) -> str:
    if fault is None:
        return (
            "error: this is a bug of llamagen-lightning, not your mistake; report it in the project's issue tracker "
            "with the command, the lines above and the output of python -m llamagen.environment"
        )
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return f"error: {'' if rank == '0' else f'rank {rank}: '}{fault.message}"


def fault_of(error: BaseException) -> Fault | None:
    """Message and exit code of an error; None if it is a bug of this project.

    Args:
        error: the exception that the command raised.
    """
    message = one_line(_text_of(error)).rstrip(".")
    for pattern, replacement in REWORDED:
        message = re.sub(pattern, replacement, message)
    if isinstance(error, FloatingPointError):
        return Fault(message, 1)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Fault(f"out of memory ({message}); use a smaller batch_size, a smaller model or fewer workers", 1)
    if isinstance(error, OSError):
        return _fault_of_system(error, message)
    if isinstance(error, RuntimeError) and (fault := _fault_of_process(message)):
        return fault
    package = type(error).__module__.partition(".")[0]
    if package in FOREIGN_ERRORS:
        advice = ADVICE.get(package)
        return Fault(f"{package}: {message}; {advice}" if advice else message, 2)
    library_errors = (ValueError, ImportError, TypeError, RuntimeError, NotImplementedError, KeyError)
    origin = _raised_in(error)
    if origin in OURS and isinstance(error, ValueError | ImportError | NotImplementedError):
        return Fault(message, 2)
    if origin in LIBRARIES and isinstance(error, library_errors):
        return Fault(message, 2)
    return None


def _fault_of_system(error: OSError, message: str) -> Fault | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Fault(message, 1)
    if error.errno == errno.EADDRINUSE:
        return Fault(f"{message}; another program uses this port, choose a free one", 2)
    if error.errno == errno.EMFILE:
        return Fault(f"{message}; raise the limit with `ulimit -n`, or use fewer workers", 1)
    if error.filename is not None and error.strerror is not None:
        return Fault(f"{os.fsdecode(error.filename)}: {error.strerror.lower()}; give another path", 2)
    origin = _raised_in(error)
    if origin in OURS and isinstance(error, USER_OS_ERRORS):
        return Fault(message, 2)
    return Fault(message, 1) if origin in (*OURS, "fsspec", "aiohttp", "s3fs", "gcsfs") else None


def _fault_of_process(message: str) -> Fault | None:
    """Faults that torch reports as plain RuntimeErrors: processes that ended, ports in use."""
    if "DataLoader worker" in message and ("killed by signal" in message or "exited unexpectedly" in message):
        return Fault(
            f"{message}; a worker ran out of memory or shared memory: use fewer data.init_args.num_workers, or a "
            "larger /dev/shm",
            1,
        )
    if re.search(r"EADDRINUSE|[Aa]ddress already in use", message):
        return Fault("another run uses the port for the processes of this one; set MASTER_PORT to a free port", 2)
    if re.search(r"Connection (closed|reset) by peer|Broken pipe|gloo|NCCL|TCPStore", message):
        return Fault(f"another process of this run ended or did not answer ({message})", 1)
    return None


def one_line(message: str) -> str:
    """A message without line breaks."""
    return " ".join(message.split())


_WORKER = re.compile(r"Caught (\w+) in .*?\.\s*Original Traceback")


def _text_of(error: BaseException) -> str:
    """Message of an error. For an error of a DataLoader's worker process, the original message."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if _WORKER.match(text):
        last = text.rstrip().splitlines()[-1]
        return last.partition(": ")[2] or last
    return text or type(error).__name__


def _raised_in(error: BaseException) -> str:
    """The package whose ``raise`` statement raised an error; '' if no such statement did, as for a call into C.

    So errors that Python itself raises within our code (in a division or an unpacking) count as bugs.
    """
    if text := _foreign_traceback(error):
        places = re.findall(r'File "([^"]+)", line \d+, in .*(?=\n\s*(\S*))', text)
        return _package_of(places[-1][0]) if places and places[-1][1] == "raise" else ""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return ""
    code = last.tb_frame.f_code
    if code.co_code[last.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return ""
    return _package_of(code.co_filename)


def _foreign_traceback(error: BaseException) -> str:
    """Traceback of a worker process of a DataLoader or a pool, as text; '' for other errors."""
    if _WORKER.match(str(error)):
        return str(error)
    cause = error.__cause__
    return str(cause) if type(cause).__name__ == "_RemoteTraceback" else ""


def _package_of(filename: str) -> str:
    path = Path(filename)
    if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
        return path.relative_to(ROOT).parts[0]
    parts = path.parts
    if "site-packages" in parts:
        return parts[len(parts) - parts[::-1].index("site-packages")]
    return ""
