"""Files and folders that are complete or absent, whatever interrupts their writing.

What is written gets a temporary name in the folder of its final one, is synced to the disk, and is renamed. So a
process that is killed, or a full disk, leaves the file of before (or none), never half a file under a final name.
Temporary names are hidden and end in ``.tmp``, so that no reader takes them for data. Those of processes that no longer
run are removed by the next one that writes into the folder.
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

from llamagen.full_disk import DiskFullError, disk_full, full_disk_number, full_disk_reported, size_of

ABANDONED = 3600.0
"""Seconds without a change after which a temporary file of another machine is taken to be that of a killed process."""
MAX_NAME = 150
"""Bytes of the final name in a temporary one; file systems allow 255 in all."""
TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")
REPLACED = ".replaced.tmp"
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)

_swept: set[tuple[int, Path]] = set()


class PendingFile:
    """A file that is written under a temporary name until it is complete. See :func:`atomic_file`.

    Args:
        path: the final name; its folder is made if it does not exist.
        needed: size of the complete file in bytes, for the message of a full disk, if it is known.
        replaces_folder: a folder of this name is replaced. Otherwise it is refused.

    Attributes:
        temporary: the name to write to; an empty file.

    Raises:
        IsADirectoryError: if there is a folder of this name.
        DiskFullError: if there is no room for the folder.
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
            DiskFullError: if there is no room; nothing is left of the file then.
        """
        with self.discarded_on_error():
            if self.temporary.stat().st_mode != self._mode:  # some libraries write files that others cannot read
                self.temporary.chmod(self._mode)
            _sync(self.temporary)
            _take_place(self.temporary, self.path)

    def discard(self) -> None:
        """Remove what was written."""
        self.temporary.unlink(missing_ok=True)

    @contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Remove what was written if the block fails.

        Raises:
            DiskFullError: if it failed for a full disk.
        """
        try:
            yield
        except BaseException as error:
            written = size_of(self.temporary)
            number = full_disk_number(error, self.path.parent)
            self.discard()
            if number is None or isinstance(error, DiskFullError):
                raise
            raise disk_full(self.path, number, self.needed, written) from error


@contextmanager
def atomic_file(path: Path, needed: int | None = None, replaces_folder: bool = False) -> Iterator[Path]:
    """A temporary name next to ``path`` to write to; synced and renamed to ``path`` at the end, removed on an error.

    Each writer has a name of its own: several processes, also of several machines, may write the same file. The file
    gets the permissions of any new file. A device or pipe is written to directly.

    Args:
        path: the file; its folder is made if it does not exist.
        needed: its size in bytes, for the message of a full disk, if it is known.
        replaces_folder: a folder of this name is replaced. Otherwise it is refused.

    Raises:
        DiskFullError: in one line, if there is no room.
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
    """A temporary folder next to ``path`` to fill; synced and renamed at the end, removed on an error.

    What has the name ``path`` is replaced. A folder cannot be replaced in one step: for a moment the one of before has
    the name :func:`replaced_name`.

    Args:
        path: the folder; the one that it lies in is made if it does not exist.
        needed: its size in bytes, for the message of a full disk, if it is known.

    Raises:
        DiskFullError: in one line, if there is no room.
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
        written, number = size_of(temporary), full_disk_number(error, path.parent)
        remove(temporary)
        if number is None or isinstance(error, DiskFullError):
            raise
        raise disk_full(path, number, needed, written) from error


def publish_folder(temporary: Path, path: Path) -> None:
    """Sync a folder and all that is in it, and give it its final name.

    Args:
        temporary: the folder, in the folder of ``path``.
        path: the name; what has it is replaced.
    """
    for folder, _, names in os.walk(temporary):
        for name in names:
            _sync(Path(folder, name))
        _sync_folder(Path(folder))
    _take_place(temporary, path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there. A folder loses its name first, so it is never half there."""
    if not _is_folder(path):
        path.unlink(missing_ok=True)
        return
    hidden = path if TEMPORARY.fullmatch(path.name) else path.rename(temporary_name(path))
    shutil.rmtree(hidden)


def temporary_name(path: Path) -> Path:
    """A hidden name in the folder of a path, which says which process of which machine uses it."""
    name = os.fsencode(path.name)[:MAX_NAME].decode("utf-8", "ignore")
    return path.with_name(f".{name}.{_machine()}-{os.getpid()}-{uuid4().hex[:8]}.tmp")


def replaced_name(path: Path) -> Path:
    """Where a folder is while another one takes its place. If ``path`` is missing, it is complete and can be used."""
    return path.with_name(f".{path.name}{REPLACED}")


def remove_leftovers(folder: Path, owned: bool = False) -> None:
    """Remove temporary files and folders of processes that no longer run.

    A process of this machine is looked up. Of other machines (or containers) goes what has not changed for
    :data:`ABANDONED` seconds: they may be writing.

    Args:
        folder: where to look; not below.
        owned: nobody but this run writes into the folder: look there also if this process has done so before, and
            remove what names no process, as versions before this module left it.
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
            with suppress(OSError):  # another process removes it, too
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
        with suppress(OSError):  # another process removes it, too
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
    except OSError as error:  # a system that does not open folders
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
    """Whether a process of this machine runs. One that was killed and that nobody has waited for does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        return True
    try:
        state = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in "ZX"


@cache
def _machine() -> str:
    """Which process numbers are meant: this machine, since its start, and the container if there is one."""
    parts = [socket.gethostname()]
    for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            parts.append(os.readlink(name) if name.endswith("pid") else Path(name).read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
