"""One error for a full disk, whichever library detects it: one line with the path and the bytes needed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CalledProcessError

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit of the file size is exceeded",
}
TEXTS = {  # messages of libraries that do not pass on errno
    errno.ENOSPC: ("No space left on device", "(os error 28)"),
    errno.EDQUOT: ("Disk quota exceeded", "(os error 122)"),
    errno.EFBIG: ("File too large", "(os error 27)"),
}
TORCH_TEXTS = ("PytorchStreamWriter failed", "unexpected pos", "file write failed")
"""Messages of PyTorch's writer, which does not give the reason."""
NO_ROOM = 2**20
"""Free bytes below which a failure of PyTorch's writer, or of a command, counts as a full disk."""


class DiskFullError(OSError):
    """Disk, quota or file size limit exceeded; the message is one line with the path and the bytes needed.

    Args:
        message: the line.
        number: ``errno`` of the cause.
    """

    def __init__(self, message: str, number: int = errno.ENOSPC) -> None:
        super().__init__(message)
        self.errno = number


@contextmanager
def full_disk_reported(path: Path, needed: int | None = None, temporary: Path | None = None) -> Iterator[None]:
    """Convert errors of a full disk within the block to :class:`DiskFullError`.

    Args:
        path: the file or folder that is written.
        needed: its size in bytes, if known.
        temporary: its path until it is complete, if that differs from ``path``.

    Raises:
        DiskFullError: with the path, the bytes needed and the bytes free.
    """
    try:
        yield
    except DiskFullError:
        raise
    except BaseException as error:  # CheckpointException of torch.distributed is no Exception
        number = full_disk_errno(error, path.parent)
        if number is None:
            raise
        raise disk_full_error(path, number, needed, size_of(temporary or path)) from error


def full_disk_errno(error: BaseException, folder: Path) -> int | None:
    """``errno`` if an error was caused by a full disk, even if a library hides the cause; otherwise None.

    Args:
        error: the exception. Its causes and contexts are searched, too.
        folder: folder of the file that was written.
    """
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, OSError) and each.errno in FULL:
            return each.errno
        text = str(each)
        for number, texts in TEXTS.items():
            if any(part in text for part in texts):
                return number
        hidden = isinstance(each, RuntimeError) and any(part in text for part in TORCH_TEXTS)
        if (hidden or isinstance(each, CalledProcessError)) and _free(folder) < NO_ROOM:
            return errno.ENOSPC
        failures = getattr(each, "failures", None)  # torch.distributed.checkpoint: (error, traceback) by rank
        reasons = [failure[0] for failure in failures.values()] if isinstance(failures, dict) else []
        waiting += [e for e in (each.__cause__, each.__context__, *reasons) if isinstance(e, BaseException)]
    return None


def disk_full_error(path: Path, number: int, needed: int | None, written: int) -> DiskFullError:
    """Build the error of a full disk.

    Args:
        path: the file or folder that was written.
        number: ``errno`` of the cause.
        needed: its size in bytes, if known.
        written: bytes that were written before the error.
    """
    size = f"{needed:,} bytes" if needed is not None else f"more than {written:,} bytes"
    remedy = "raise the limit" if number == errno.EFBIG else "free some space"
    return DiskFullError(
        f"{path} was not written: {FULL[number]} ({os.strerror(number)}); it needs {size}, and "
        f"{_free(path.parent):,} bytes are free in {path.parent}; {remedy} and run the same command again",
        number,
    )


def size_of(path: Path) -> int:
    """Size in bytes of a file, or of all files in a folder; 0 if it does not exist."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    except OSError:
        return 0


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
