"""Remote shards, downloaded completely into a cache on this machine."""

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
"""Schemes that need another package, which the extra of the same name installs."""
SCHEMES = ("http", "https", *EXTRAS)
PIPE = "pipe:"
ATTEMPTS = 5
FIRST_DELAY = 0.5
"""Seconds before the second attempt; doubled before each further attempt."""
READ_TIMEOUT = 60.0
"""Seconds without data after which a connection fails."""
THREADS = 16

T = TypeVar("T")


def is_remote(address: str) -> bool:
    """Whether an address is a URL or a command, and not a local path."""
    return "://" in address or address.startswith(PIPE)


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/llamagen``, or ``~/.cache/llamagen``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamagen"


def check_address(address: str, allow_pipe: bool) -> None:
    """Check that an address can be downloaded.

    Raises:
        ValueError: if it is a command and commands are not allowed, or its scheme is unknown.
    """
    if address.startswith(PIPE):
        if not allow_pipe:
            raise ValueError(
                f"{address} would run a command on this machine; if you trust it, set allow_pipe to true, otherwise "
                "download the shards yourself"
            )
    elif "://" in address and address.split("://")[0] not in SCHEMES:
        raise ValueError(f"{address} has an unknown scheme; use one of {', '.join(SCHEMES)}, or a path")


def _file_system(address: str) -> tuple[Any, str]:
    scheme = address.split("://")[0]
    options = {}
    if scheme.startswith("http"):  # no limit on the total time of a large shard, only on the time without data
        timeout = ClientTimeout(total=None, sock_connect=READ_TIMEOUT, sock_read=READ_TIMEOUT)
        options["client_kwargs"] = {"trust_env": True, "timeout": timeout}
    try:
        system, path = fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        raise ValueError(
            f'{address} needs a package that is not installed; pip install -c constraints.txt -e ".[{scheme}]"'
        ) from error
    return system, str(path)


def with_retries(action: Callable[[], T], address: str) -> T:
    """Call ``action``. If it fails, repeat it after increasing delays.

    Raises:
        ValueError: with the address, if the last attempt fails.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except DiskFullError:  # another attempt would fail, too
            raise
        except (OSError, EOFError, RuntimeError, TimeoutError, subprocess.SubprocessError, ClientError) as error:
            missing = isinstance(error, FileNotFoundError) and getattr(error.__cause__, "status", 404) in (
                403,
                404,
                410,
            )
            if missing or attempt == ATTEMPTS - 1:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                attempts = "" if missing else f" after {ATTEMPTS} attempts"
                raise ValueError(
                    f"{address} could not be downloaded{attempts} ({reason}); check the address and the server"
                ) from error
            time.sleep(FIRST_DELAY * 2**attempt)
    raise AssertionError


def read_small(address: str) -> bytes:
    """Download a small file.

    Raises:
        ValueError: with the address, if it could not be downloaded.
    """
    check_address(address, allow_pipe=False)
    system, path = _file_system(address)
    data: bytes = with_retries(lambda: system.cat_file(path), address)
    return data


def check_presence(addresses: Iterable[str]) -> None:
    """Check that every shard exists, before training starts.

    Raises:
        ValueError: with the first address that does not exist.
    """

    def check(address: str) -> None:
        if not is_remote(address):
            if not os.path.isfile(address):
                raise ValueError(f"shard {address} does not exist; correct the address, or write it")
        elif not address.startswith(PIPE):
            system, path = _file_system(address)
            with_retries(lambda: system.info(path), address)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(check, addresses):
            pass


class ShardCache:
    """Local copies of remote shards. An existing copy is assumed to be complete and up to date.

    Args:
        folder: folder for the copies; None for :func:`default_cache`.
        allow_pipe: let ``pipe:`` addresses run their command.
        max_bytes: maximum size of the cache, beyond which the least recently used copies are removed; None keeps all.
    """

    def __init__(
        self, folder: Path | str | None = None, allow_pipe: bool = False, max_bytes: int | None = None
    ) -> None:
        self.folder = Path(folder) if folder is not None else default_cache()
        self.allow_pipe, self.max_bytes = allow_pipe, max_bytes

    def path_of(self, address: str, checksum: str | None = None) -> Path:
        """Path of the copy of an address; local paths stay the same. Each checksum has its own copy."""
        if not is_remote(address):
            return Path(address)
        name = PurePosixPath(address.split("?")[0]).name if not address.startswith(PIPE) else "pipe.tar"
        digest = hashlib.sha256(f"{address} {checksum}".encode()).hexdigest()[:16]
        return self.folder / "shards" / f"{digest}-{name.removesuffix('.tar')}.tar"

    def fetch(self, address: str, checksum: str | None = None) -> Path:
        """Download an address, unless there is a copy. The copy gets its name only when it is complete.

        Args:
            address: address or local path of the file.
            checksum: expected SHA-256, if known.

        Returns:
            Path of the copy, or the local path itself.

        Raises:
            ValueError: with the address, if it could not be downloaded.
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

            with_retries(copy, address)
        if self.max_bytes is not None:
            self._evict(path)
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
            raise EOFError(f"received {size} of {expected} bytes")
        if checksum is not None and (actual := sha256_of(temporary)) != checksum:
            raise EOFError(f"its SHA-256 is {actual[:12]}…, but meta.json says {checksum[:12]}…")

    def _evict(self, newest: Path) -> None:
        sizes = {}
        for path in newest.parent.glob("*.tar"):
            with suppress(FileNotFoundError):  # other processes remove copies, too
                status = path.stat()
                sizes[path] = status.st_mtime, status.st_size
        total = sum(size for _, size in sizes.values())
        for path in sorted(sizes, key=lambda path: sizes[path]):
            if total <= (self.max_bytes or 0) or path == newest:
                break
            total -= sizes[path][1]
            path.unlink(missing_ok=True)

    def fetch_all(self, addresses: Sequence[str], checksums: Mapping[str, str]) -> list[Path]:
        """Download many addresses in parallel, with a progress bar if anything is missing.

        Args:
            addresses: addresses or local paths of the files.
            checksums: expected SHA-256 by address, where known.

        Returns:
            Path of each copy, or the local path itself.

        Raises:
            ValueError: with the first address that could not be downloaded.
        """
        paths = [self.path_of(address, checksums.get(address)) for address in addresses]
        missing = [
            address for address, path in zip(addresses, paths, strict=True) if is_remote(address) and not path.exists()
        ]
        if missing:
            with ThreadPoolExecutor(THREADS) as pool:
                downloads = pool.map(lambda address: self.fetch(address, checksums.get(address)), missing)
                for _ in tqdm(downloads, "downloading shards", len(missing), unit="shard"):
                    pass
        return paths
