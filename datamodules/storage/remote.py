"""Shards that lie elsewhere, fetched whole into a cache on this machine."""

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from aiohttp import ClientError, ClientTimeout
from tqdm import tqdm

from llamagen.files import atomic_file, sha256_of
from llamagen.full_disk import DiskFullError, full_disk_reported

EXTRAS = ("s3", "gs")
"""Schemes that need a package more, which the extra of the same name installs."""
SCHEMES = ("http", "https", *EXTRAS)
PIPE = "pipe:"
ATTEMPTS = 5
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; doubled before each further one."""
SILENCE = 60.0
"""Seconds without a byte after which a server is taken to be gone."""
THREADS = 16

T = TypeVar("T")


def is_remote(address: str) -> bool:
    """Whether an address is not a path on this machine."""
    return "://" in address or address.startswith(PIPE)


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/llamagen``, or ``~/.cache/llamagen``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamagen"


def check_address(address: str, allow_pipe: bool) -> None:
    """Refuse what cannot be fetched.

    Raises:
        ValueError: if it is a command and these are not allowed, or its scheme is not known.
    """
    if address.startswith(PIPE):
        if not allow_pipe:
            raise ValueError(
                f"{address} would run a command on this machine; if you trust it, set allow_pipe to true, else fetch "
                "the shards by yourself"
            )
    elif "://" in address and address.split("://")[0] not in SCHEMES:
        raise ValueError(f"{address} has an unknown scheme; use one of {', '.join(SCHEMES)}, or a path")


def _file_system(address: str) -> tuple[Any, str]:
    scheme = address.split("://")[0]
    options = {}
    if scheme.startswith("http"):  # a large shard may take its time, but not fall silent
        timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        options["client_kwargs"] = {"trust_env": True, "timeout": timeout}
    try:
        system, path = fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        raise ValueError(
            f'{address} needs a package that is not installed; pip install -c constraints.txt -e ".[{scheme}]"'
        ) from error
    return system, str(path)


def patiently(action: Callable[[], T], address: str) -> T:
    """What ``action`` returns, tried again with growing pauses.

    Raises:
        ValueError: with the address, if it fails to the end.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except DiskFullError:  # no other attempt makes room
            raise
        except (OSError, EOFError, RuntimeError, TimeoutError, subprocess.SubprocessError, ClientError) as error:
            gone = isinstance(error, FileNotFoundError) and getattr(error.__cause__, "status", 404) in (403, 404, 410)
            if gone or attempt == ATTEMPTS - 1:
                said = str(error).splitlines()[0] if str(error) else type(error).__name__
                tried = "" if gone else f" after {ATTEMPTS} attempts"
                raise ValueError(
                    f"{address} cannot be had{tried} ({said}); check the address and the server"
                ) from error
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError


def read_small(address: str) -> bytes:
    """A small file from an address.

    Raises:
        ValueError: with the address, if it cannot be had.
    """
    check_address(address, allow_pipe=False)
    system, path = _file_system(address)
    data: bytes = patiently(lambda: system.cat_file(path), address)
    return data


def check_presence(addresses: Iterable[str]) -> None:
    """See that every shard is there, before training starts.

    Raises:
        ValueError: naming the first address that is not.
    """

    def look(address: str) -> None:
        if not is_remote(address):
            if not os.path.isfile(address):
                raise ValueError(f"shard {address} does not exist; correct the address, or write it")
        elif not address.startswith(PIPE):
            system, path = _file_system(address)
            patiently(lambda: system.info(path), address)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(look, addresses):
            pass


class ShardCache:
    """Files of remote shards on this machine; one that is there is taken for whole and up to date.

    Args:
        folder: where they are kept; None for :func:`default_cache`.
        allow_pipe: let ``pipe:`` addresses run their command.
        max_bytes: drop what was not used for longest when more than this is kept; None keeps all.
    """

    def __init__(
        self, folder: Path | str | None = None, allow_pipe: bool = False, max_bytes: int | None = None
    ) -> None:
        self.folder = Path(folder) if folder is not None else default_cache()
        self.allow_pipe, self.max_bytes = allow_pipe, max_bytes

    def path_of(self, address: str, checksum: str | None = None) -> Path:
        """Where an address is kept; a path on this machine is itself. Another checksum is another file."""
        if not is_remote(address):
            return Path(address)
        name = PurePosixPath(address.split("?")[0]).name if not address.startswith(PIPE) else "pipe.tar"
        digest = hashlib.sha256(f"{address} {checksum}".encode()).hexdigest()[:16]
        return self.folder / "shards" / f"{digest}-{name.removesuffix('.tar')}.tar"

    def fetch(self, address: str, checksum: str | None = None) -> Path:
        """The file of an address on this machine, fetched if need be; it gets its name when it is whole.

        Args:
            address: of the file.
            checksum: SHA-256 that it must have, where that is known.

        Raises:
            ValueError: with the address, if it cannot be had.
        """
        path = self.path_of(address, checksum)
        if not is_remote(address):
            return path
        if path.exists():
            if self.max_bytes is not None:
                os.utime(path)
            return path
        check_address(address, self.allow_pipe)
        with atomic_file(path) as temporary:

            def copy() -> None:
                with full_disk_reported(path, temporary=temporary):
                    self._copy(address, temporary, checksum)

            patiently(copy, address)
        if self.max_bytes is not None:
            self._make_room(path)
        return path

    @staticmethod
    def _copy(address: str, temporary: Path, checksum: str | None) -> None:
        if address.startswith(PIPE):
            with temporary.open("wb") as file:
                subprocess.run(address.removeprefix(PIPE), shell=True, stdout=file, check=True)
            return
        system, path = _file_system(address)
        system.get_file(path, str(temporary))
        size = temporary.stat().st_size
        if (expected := system.info(path).get("size")) not in (None, size):
            raise EOFError(f"{size} of {expected} bytes came")
        if checksum is not None and (found := sha256_of(temporary)) != checksum:
            raise EOFError(f"its SHA-256 is {found[:12]}…, not {checksum[:12]}… as the description of its set says")

    def _make_room(self, newest: Path) -> None:
        sizes = {}
        for path in newest.parent.glob("*.tar"):
            with suppress(FileNotFoundError):  # other processes make room, too
                status = path.stat()
                sizes[path] = status.st_mtime, status.st_size
        total = sum(size for _, size in sizes.values())
        for path in sorted(sizes, key=lambda path: sizes[path]):
            if total <= (self.max_bytes or 0) or path == newest:
                break
            total -= sizes[path][1]
            path.unlink(missing_ok=True)

    def fetch_all(self, addresses: Sequence[str], checksums: Mapping[str, str]) -> list[Path]:
        """The files of many addresses, several at a time, with a progress bar where something has to be fetched.

        Args:
            addresses: of the files.
            checksums: SHA-256 of those of which it is known.

        Raises:
            ValueError: with the first address that cannot be had.
        """
        paths = [self.path_of(address, checksums.get(address)) for address in addresses]
        missing = [
            address for address, path in zip(addresses, paths, strict=True) if is_remote(address) and not path.exists()
        ]
        if missing:
            with ThreadPoolExecutor(THREADS) as pool:
                fetched = pool.map(lambda address: self.fetch(address, checksums.get(address)), missing)
                for _ in tqdm(fetched, "fetching shards", len(missing), unit="shard"):
                    pass
        return paths
