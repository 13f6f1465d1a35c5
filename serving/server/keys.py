"""API keys: ``Authorization: Bearer KEY``."""

import os
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path

from serving.server.errors import ApiError

VARIABLE = "LLAMAGEN_API_KEY"
"""Environment variable with the key, if there is no file."""


def read_keys(path: str | None) -> tuple[str, ...]:
    """Keys of a server, one on each line of a file, or in the environment; none to answer everybody.

    Raises:
        ValueError: in one line, if the file cannot be read, or holds no key or an invalid one.
    """
    if path is None:
        text, place = os.environ.get(VARIABLE, ""), VARIABLE
        if not text:
            return ()
    else:
        place = path
        try:
            text = Path(path).read_text("ascii")
        except (OSError, UnicodeDecodeError) as error:
            reason = "it is not ASCII text" if isinstance(error, UnicodeDecodeError) else str(error.strerror).lower()
            raise ValueError(f"the API keys in {path} cannot be read ({reason}); give another file") from error
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys or any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ValueError(f"{place} holds no valid API key; give one key per line, of ASCII characters without spaces")
    return keys


class KeyCheck:
    """Compares keys in constant time.

    Args:
        keys: valid keys; empty if none is needed.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def __call__(self, authorization: str | None) -> None:
        """Check the header of a request.

        Raises:
            ApiError: with status 401, if the key is missing or wrong.
        """
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("the API key is missing; send the header Authorization: Bearer KEY")
        # Digests have equal lengths, so that neither the length nor a common beginning can be measured.
        digest = sha256(key.strip().encode()).digest()
        if not sum(compare_digest(digest, valid) for valid in self._digests):  # all are compared
            raise _unauthorized("the API key is wrong; ask the operator of the server for one")


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, "Authorization", "invalid_api_key", {"WWW-Authenticate": "Bearer"})
