"""Atomic files and folders: complete or absent, even if a process is killed or the disk is full.

A file is written under a temporary name in its final folder, synced to disk, and renamed. An interrupted write leaves
the previous file or none, never half a file under its final name. Temporary names are hidden and end in ``.tmp``, so
that no reader takes them for data. Leftovers of dead processes are removed by the next process that writes into the
folder.

footgun: never write elsewhere and move the file. A move between file systems is a copy, which can stop halfway.
"""

import errno
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

from llamagen.full_disk import DiskFullError, disk_full_error, full_disk_errno, full_disk_reported, size_of

ABANDONED = 3600.0
"""Seconds without a change after which a temporary file of another machine counts as abandoned."""
MAX_NAME = 150
"""Maximum bytes of the final name in a temporary name; file systems allow 255 bytes in total."""
TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")
REPLACED = ".replaced.tmp"
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)

_swept: set[tuple[int, Path]] = set()


class PendingFile:
    """A file that has a temporary name until it is complete, for writers without a ``with`` block.

    See also :func:`atomic_file`.

    Args:
        path: final name; its folder is created if it does not exist.
        needed: size of the complete file in bytes, for the message of a full disk, if known.
        replaces_folder: replace a folder of this name; otherwise raise an error.

    Attributes:
        temporary: path to write to; an empty file at first.

    Raises:
        IsADirectoryError: if there is a folder of this name.
        DiskFullError: if the disk is full.
    """

    def __init__(self, path: Path, needed: int | None = None, replaces_folder: bool = False) -> None:
        self.path, self.needed = path, needed
        if _is_folder(path) and not replaces_folder:
            raise IsADirectoryError(f"{path} is a folder; choose another name for the file")
        self.temporary = temporary_name(path)
        with full_disk_reported(path, needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            self.temporary.touch(exist_ok=False)
            self._mode = self.temporary.stat().st_mode

    def publish(self) -> None:
        """Sync the file and give it its final name.

        Raises:
            DiskFullError: if the disk is full; the temporary file is removed.
        """
        with self.discarded_on_error():
            if self.temporary.stat().st_mode != self._mode:  # some libraries restrict the permissions to the owner
                self.temporary.chmod(self._mode)
            _sync(self.temporary)
            _take_place(self.temporary, self.path)

    def discard(self) -> None:
        """Remove the temporary file."""
        self.temporary.unlink(missing_ok=True)

    @contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Remove the temporary file if the block fails.

        Raises:
            DiskFullError: if the disk is full.
        """
        try:
            yield
        except BaseException as error:
            written = size_of(self.temporary)
            number = full_disk_errno(error, self.path.parent)
            self.discard()
            if number is None or isinstance(error, DiskFullError):
                raise
            raise disk_full_error(self.path, number, self.needed, written) from error


@contextmanager
def atomic_file(path: Path, needed: int | None = None, replaces_folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` to write to; at the end sync the file and rename it to ``path``.

    On an error the temporary file is removed. Each writer has its own temporary name, so several processes, even on
    several machines, may write the same file. The file has the usual permissions of new files. Devices and pipes are
    written to directly.

    Args:
        path: the file; its folder is created if it does not exist.
        needed: its size in bytes, for the message of a full disk, if known.
        replaces_folder: replace a folder of this name; otherwise raise an error.

    Raises:
        DiskFullError: in one line, if the disk is full.
        IsADirectoryError: if there is a folder of this name.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    pending = PendingFile(path, needed, replaces_folder)
    with pending.discarded_on_error():
        yield pending.temporary
    pending.publish()


@contextmanager
def atomic_folder(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary folder next to ``path`` to fill; at the end sync and rename it, on an error remove it.

    An existing ``path`` is replaced. File systems cannot replace a folder in one step: for a moment ``path`` does not
    exist, and the old folder has the name :func:`replaced_name`.

    Args:
        path: the folder; its parent is created if it does not exist.
        needed: its size in bytes, for the message of a full disk, if known.

    Raises:
        DiskFullError: in one line, if the disk is full.
    """
    temporary = temporary_name(path)
    with full_disk_reported(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, path)
    except BaseException as error:
        written, number = size_of(temporary), full_disk_errno(error, path.parent)
        remove(temporary)
        if number is None or isinstance(error, DiskFullError):
            raise
        raise disk_full_error(path, number, needed, written) from error


def publish_file(temporary: Path, path: Path) -> None:
    """Sync a file, and rename it.

    Args:
        temporary: the file, in the same folder as ``path``.
        path: final name; an existing file is replaced.
    """
    _sync(temporary)
    _take_place(temporary, path)


def publish_folder(temporary: Path, path: Path) -> None:
    """Sync a folder with its content, and rename it.

    Args:
        temporary: the folder, in the same parent as ``path``.
        path: final name; an existing file or folder is replaced.
    """
    for folder, _, names in os.walk(temporary):
        for name in names:
            _sync(Path(folder, name))
        _sync_folder(Path(folder))
    _take_place(temporary, path)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it exists. A folder is renamed first, so that no process reads half of it."""
    if not _is_folder(path):
        path.unlink(missing_ok=True)
        return
    hidden = path if TEMPORARY.fullmatch(path.name) else path.rename(temporary_name(path))
    shutil.rmtree(hidden)


def temporary_name(path: Path) -> Path:
    """A hidden name in the folder of ``path`` that identifies this process and its machine."""
    name = os.fsencode(path.name)[:MAX_NAME].decode("utf-8", "ignore")
    return path.with_name(f".{name}.{_machine()}-{os.getpid()}-{uuid4().hex[:8]}.tmp")


def replaced_name(path: Path) -> Path:
    """Name of an old folder while a new one replaces it. It is complete, and valid if ``path`` does not exist."""
    return path.with_name(f".{path.name}{REPLACED}")


def remove_leftovers(folder: Path, owned: bool = False) -> None:
    """Remove temporary files and folders of processes that no longer run.

    On this machine, the process table tells which processes run. Files of other machines (or containers) are removed
    only if they have not changed for :data:`ABANDONED` seconds, because their processes may still be writing.

    Args:
        folder: folder to clean, without its subfolders.
        owned: whether only this run writes into the folder. If so, clean it even if this process has already done so,
            and also remove temporary names without a process id, which older versions of this project left.
    """
    key = os.getpid(), folder.absolute()
    if (key in _swept and not owned) or not folder.is_dir():
        return
    _swept.add(key)
    for entry in list(os.scandir(folder)):
        path = folder / entry.name
        if entry.name.endswith(REPLACED) and entry.name.startswith("."):
            if folder.joinpath(entry.name.removeprefix(".").removesuffix(REPLACED)).exists():
                shutil.rmtree(path, ignore_errors=True)
        elif _is_abandoned(path) or (owned and _is_unnamed(path)):
            with suppress(OSError):  # another process may remove it at the same time
                remove(path)


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _take_place(temporary: Path, path: Path) -> None:
    if _is_folder(path) or (_is_folder(temporary) and (path.exists() or path.is_symlink())):
        old = replaced_name(path)
        remove(old)
        path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            old.rename(path)
            raise
        _sync_folder(path.parent)
        with suppress(OSError):  # another process may remove it at the same time
            remove(old)
    else:
        temporary.replace(path)
        _sync_folder(path.parent)


def _sync(path: Path) -> None:
    with path.open("rb+" if os.access(path, os.W_OK) else "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:  # some systems cannot open folders
        if error.errno not in UNSUPPORTED:
            raise
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _is_unnamed(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp" and TEMPORARY.fullmatch(path.name) is None


def _is_abandoned(path: Path) -> bool:
    match = TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    if match[1] == _machine():
        return not _runs(int(match[2]))
    try:
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        return time.time() - max(file.stat().st_mtime for file in files) > ABANDONED
    except OSError:
        return False


def _runs(process: int) -> bool:
    """Whether a process of this machine runs. Zombies, whose parent has not waited for them yet, do not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to another user
        return True
    try:
        state = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in "ZX"


@cache
def _machine() -> str:
    """Identify the process table: this machine since its last boot, and the container if there is one."""
    parts = [socket.gethostname()]
    for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            parts.append(os.readlink(name) if name.endswith("pid") else Path(name).read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
