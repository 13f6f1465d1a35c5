"""Bodies of requests: from bytes that anybody may have sent to a JSON object."""

import asyncio
import json
from typing import Any, NoReturn

from fastapi import Request
from starlette.requests import ClientDisconnect

from serving.server.errors import ApiError
from serving.server.options import ServerOptions

BODY = "llamagen.body"
"""Key of a request's :class:`BodyShare` in its ASGI scope."""
MAX_DIGITS = 40
"""Maximum number of digits of an integer; Python refuses to print integers of thousands of digits."""
MAX_VALUES = 5000
"""Maximum number of braces, brackets and commas. Valid requests have a few for their fields, and those in texts of at
most 1,000 characters; an image in base64 has none. Parsing millions of them would take gigabytes of memory."""
LARGE = 2**16
"""Bodies of more bytes are parsed in a thread, so that other requests do not wait."""
NOT_PLAIN = "the body has too many values or is nested too deeply; send a JSON object of plain values"


class BodyBudget:
    """Memory for the bodies of all requests.

    Args:
        max_bytes: maximum size of all bodies together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.used = max_bytes, 0


class BodyShare:
    """Memory for the body of one request. It is kept until the request is answered, because images wait in the queue.

    Args:
        budget: memory of all requests.
    """

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._used = budget, 0

    def grow(self, count: int) -> None:
        """Take memory for more bytes.

        Raises:
            ApiError: with status 503, if all requests together have too many.
        """
        if self._budget.used + count > self._budget.max_bytes:
            raise ApiError(
                503, "the server is receiving too much data; try again later", code="full", headers={"Retry-After": "5"}
            )
        self._budget.used += count
        self._used += count

    def release(self) -> None:
        """Give all memory back."""
        self._budget.used -= self._used
        self._used = 0


async def read_json(request: Request, options: ServerOptions) -> dict[str, Any]:
    """Read the JSON object in the body of a request.

    Raises:
        ApiError: with status 400, 408, 413, 415 or 503 and one sentence, if there is none.
        ClientDisconnect: if the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        given = f"Content-Type {kind!r:.60}" if kind else "no Content-Type"
        raise ApiError(415, f"the body has {given}; send JSON with Content-Type: application/json", "Content-Type")
    body = await read_body(request, options)
    return await asyncio.to_thread(parse_json, body) if len(body) > LARGE else parse_json(body)


async def read_body(request: Request, options: ServerOptions) -> bytes:
    """Read the bytes of the body.

    Raises:
        ApiError: with status 408, 413, 415 or 503 and one sentence.
        ClientDisconnect: if the client left.
    """
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise ApiError(415, f"the body has the encoding {encoding!r:.60}; send it without one", "Content-Encoding")
    share: BodyShare = request.scope[BODY]
    too_large = ApiError(
        413, f"the body is too large; send at most {options.max_body:,} bytes", code="content_too_large"
    )
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and (len(length) > 19 or int(length) > options.max_body):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(options.body_seconds):
            async for part in request.stream():
                if len(body) + len(part) > options.max_body:
                    raise too_large
                share.grow(len(part))
                body += part
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {options.body_seconds:g} seconds; send it faster", code="timeout"
        ) from None
    return bytes(body)


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ApiError: with status 400 and one sentence, if it is not valid, has a key twice, too many values or levels, or
            numbers that are not finite or too long.
    """
    if not body.strip():
        raise _invalid("the body is empty; send a JSON object")
    if sum(map(body.count, (b"{", b"[", b","))) > MAX_VALUES:
        raise _invalid(NOT_PLAIN)
    try:
        content = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_number, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise _invalid(f"the body is not valid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"the body is not valid JSON at character {error.pos}: {error.msg.lower()}") from None
    except RecursionError:
        raise _invalid(NOT_PLAIN) from None
    if not isinstance(content, dict):
        raise _invalid('the body is not a JSON object; send one, such as {"prompt": 1}')
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _invalid(f"the body has the field {key!r:.60} twice; send it once")
        found[key] = value
    return found


def _no_number(text: str) -> NoReturn:
    raise _invalid(f"the body holds {text}, which is not a number of JSON")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _invalid(f"the body holds a number of {len(text)} digits; send at most {MAX_DIGITS}")
    return int(text)


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


__all__ = ["BODY", "BodyBudget", "BodyShare", "ClientDisconnect", "parse_json", "read_body", "read_json"]
