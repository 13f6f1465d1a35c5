"""Download of one file into the hub's cache: resumed where a previous download stopped, and verified.

``huggingface_hub`` 2.4 neither resumes a download of an earlier process nor verifies what it received. So the content
is received here, with its HTTP client, and its name in the cache is given only to the verified file.
"""

import hashlib
import shutil
import time
from errno import ENOSPC
from pathlib import Path
from typing import Any

from llamagen.files import publish_file, sha256_of
from llamagen.full_disk import disk_full_error, full_disk_reported, size_of
from llamagen.hub.address import Address

ATTEMPTS = 3
"""Consecutive attempts without a new byte after which a download fails."""
PAUSE = 1.0
"""Seconds between attempts without a new byte."""
SHA256_DIGITS, SHA1_DIGITS = 64, 40
NOTHING_LEFT = 416
"""Status of an answer to a request for bytes after the end of a file."""
CHUNK = 1 << 20


def receive(address: Address, url: str, etag: str, size: int | None, path: Path) -> None:
    """Download a file, unless it exists.

    Other processes must not download the same file at the same time. What was received before an error is kept next to
    ``path``, and the next call continues there.

    Args:
        address: the file, for messages.
        url: its URL.
        etag: its checksum: SHA-256, git's SHA-1, or SHA-1.
        size: its size in bytes, if known.
        path: name of the complete file.

    Raises:
        ValueError: in one line, if the content does not match size and checksum; nothing is kept.
        DiskFullError: if there is no room for it.
    """
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.incomplete")
    received = size_of(partial)
    if size is not None:
        if received > size:
            partial.unlink()
            received = 0
        if shutil.disk_usage(path.parent).free < size - received:
            raise disk_full_error(path, ENOSPC, size, received)
    with full_disk_reported(path, size, partial):
        _fill(partial, url, etag, size, address)
        found = _checksum(partial, etag)
        if found != etag or size not in (None, size_of(partial)):
            partial.unlink()
            raise ValueError(
                f"{address.given}: the content that was received is not that of the hub (checksum {found[:12]}…, "
                f"expected {etag[:12]}…); run the same command again, and check the proxy if this is repeated"
            )
        publish_file(partial, path)


def _fill(partial: Path, url: str, etag: str, size: int | None, address: Address) -> None:
    """Append the missing bytes to a partial file, with a progress bar.

    Raises:
        ValueError: in one line, if the connection is lost several times without a new byte.
        httpx2.HTTPError: if the server refuses.
    """
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import tqdm

    received, failures = size_of(partial), 0
    name = Path(address.file).name
    progress: Any = tqdm(desc=name, total=size, initial=received, unit="B", unit_scale=True, unit_divisor=1000)
    with progress, partial.open("ab") as file:
        while size is None or received < size:
            before = received
            try:
                received = _request(file, url, received, progress)
                if size is None or received > size:
                    return
                failure: Exception | None = None
            except TransportError as error:
                received, failure = file.tell(), error
            except HfHubHTTPError as error:
                if error.response.status_code != NOTHING_LEFT or size is not None or not received:
                    raise
                file.flush()
                if _checksum(partial, etag) == etag:  # complete, but interrupted before it was given its name
                    return
                received = _start_again(file, progress)
                continue
            failures = 0 if received > before else failures + 1
            if failures == ATTEMPTS:
                of_all = "" if size is None else f" of {size:,}"
                raise ValueError(
                    f"{address.given}: the connection was lost after {received:,}{of_all} bytes "
                    f"({failure or 'it ended'}); run the same command again to resume"
                ) from failure
            if failures:
                time.sleep(PAUSE)


def _request(file: Any, url: str, received: int, progress: Any) -> int:
    """Receive the rest of a file in one request, and return the bytes of it that are there now."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    # footgun: a compressed answer would be stored decompressed, and its range would be of the compressed bytes.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if received:
        headers["Range"] = f"bytes={received}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # The client leaves out the token when it follows a redirect to another host.
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if received and response.status_code != 206:  # the server starts at the beginning
            received = _start_again(file, progress)
        for chunk in response.iter_bytes():  # footgun: chunks of a given size are lost if the connection is
            file.write(chunk)
            received += len(chunk)
            progress.update(len(chunk))
    return received


def _start_again(file: Any, progress: Any) -> int:
    file.truncate(0)
    progress.reset()
    return 0


def _checksum(path: Path, etag: str) -> str:
    """The checksum of a file of the same kind as an ETag; the ETag itself for another kind.

    64 digits are SHA-256, 40 digits git's SHA-1, as on the hub, or the SHA-1 of the content, as on some mirrors.
    """
    if len(etag) == SHA256_DIGITS:
        return sha256_of(path)
    if len(etag) == SHA1_DIGITS:
        of_git = hashlib.sha1(b"blob %d\0" % size_of(path), usedforsecurity=False)
        plain = hashlib.sha1(usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                of_git.update(chunk)
                plain.update(chunk)
        return etag if plain.hexdigest() == etag else of_git.hexdigest()
    return etag
