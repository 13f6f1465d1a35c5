"""Server-sent events from the bytes of an answer."""

from collections.abc import AsyncIterator
from typing import NamedTuple


class ServerEvent(NamedTuple):
    """An event.

    Attributes:
        name: its name; ``message`` if it has none; empty for a comment.
        data: its text.
    """

    name: str
    data: str


async def server_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[ServerEvent]:
    """Parse server-sent events (HTML standard, section 9.2) whose lines end with LF or CR LF.

    Args:
        chunks: bytes as they arrive, cut anywhere.

    Raises:
        UnicodeDecodeError: if they are not UTF-8.
    """
    name, data = "", list[str]()
    async for line in _lines(chunks):
        if not line:
            if data:
                yield ServerEvent(name or "message", "\n".join(data))
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif not field:
            yield ServerEvent("", value)


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Lines without their ends. footgun: ``str.splitlines`` also splits at U+2028, which JSON may contain."""
    parts: list[bytes] = []  # of a line: images of megabytes come in many chunks
    async for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts).removesuffix(b"\r").decode()
            parts = [other]
