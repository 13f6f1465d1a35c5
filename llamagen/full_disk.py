"""The error of a disk without room, whatever library met it: one line with the path and the bytes needed."""

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
    errno.EFBIG: "it is larger than a file may be here",
}
TEXTS = {  # of libraries that report the system's error in words alone
    errno.ENOSPC: ("No space left on device", "(os error 28)"),
    errno.EDQUOT: ("Disk quota exceeded", "(os error 122)"),
    errno.EFBIG: ("File too large", "(os error 27)"),
}
TORCH_TEXTS = ("PytorchStreamWriter failed", "unexpected pos", "file write failed")
"""Of PyTorch's writer, which hides the reason."""
NO_ROOM = 2**20
"""Free bytes below which a failure of PyTorch's writer, or of a command, is that of a full disk."""


class DiskFullError(OSError):
    """The disk, a quota or the limit of a file's size leaves no room; one line with the path and the bytes needed.

    Args:
        message: the line.
        number: ``errno`` of the reason.
    """

    def __init__(self, message: str, number: int = errno.ENOSPC) -> None:
        super().__init__(message)
        self.errno = number


@contextmanager
def full_disk_reported(path: Path, needed: int | None = None, temporary: Path | None = None) -> Iterator[None]:
    """Errors of the block that are those of a full disk become one line.

    Args:
        path: what is written.
        needed: its size in bytes, if it is known.
        temporary: the name that it has until it is complete, if that is another one.

    Raises:
        DiskFullError: with the path, the bytes needed and those that are free.
    """
    try:
        yield
    except DiskFullError:
        raise
    except BaseException as error:  # one of torch.distributed is no Exception
        number = full_disk_number(error, path.parent)
        if number is None:
            raise
        raise disk_full(path, number, needed, size_of(temporary or path)) from error


def full_disk_number(error: BaseException, folder: Path) -> int | None:
    """``errno`` of a full disk if it is the reason of an error, also where a library hides it; otherwise None.

    Args:
        error: as caught; what it was raised from counts, too.
        folder: where was written.
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
        failures = getattr(each, "failures", None)  # of torch.distributed.checkpoint: an error and its trace by rank
        reasons = [failure[0] for failure in failures.values()] if isinstance(failures, dict) else []
        waiting += [e for e in (each.__cause__, each.__context__, *reasons) if isinstance(e, BaseException)]
    return None


def disk_full(path: Path, number: int, needed: int | None, written: int) -> DiskFullError:
    """The error of a full disk.

    Args:
        path: what was written.
        number: ``errno`` of the reason.
        needed: its size in bytes, if it is known.
        written: how many bytes there was room for.
    """
    size = f"{needed:,} bytes" if needed is not None else f"more than {written:,} bytes"
    remedy = "raise the limit" if number == errno.EFBIG else "make room"
    return DiskFullError(
        f"{path} was not written: {FULL[number]} ({os.strerror(number)}); it needs {size}, and "
        f"{_free(path.parent):,} bytes are free in {path.parent}; {remedy} and run the same command again",
        number,
    )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if it does not exist."""
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
