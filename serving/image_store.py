"""Finished images, which the browser fetches by names that nobody can guess."""

from collections import OrderedDict
from secrets import token_urlsafe
from threading import Lock

MAX_BYTES = 2**28
"""Maximum size of all images together; the oldest are removed first."""


class ImageStore:
    """Files in memory.

    Args:
        max_bytes: maximum size of all files together.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._lock = Lock()

    def add(self, file: bytes) -> str:
        """Store a file and return its name."""
        name = token_urlsafe(16)
        with self._lock:
            self._files[name] = file
            self._bytes += len(file)
            while self._bytes > self._max_bytes and len(self._files) > 1:
                self._bytes -= len(self._files.popitem(last=False)[1])
        return name

    def get(self, name: str) -> bytes | None:
        """A file; None if there is none of this name, or it was removed."""
        with self._lock:
            return self._files.get(name)
