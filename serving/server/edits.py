"""Forms of ``POST /v1/images/edits``: files and fields as OpenAI's clients send them → the fields of a generation."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serving.server.body import read_body
from serving.server.errors import ApiError
from serving.server.fields import GenerationBody
from serving.server.options import ServerOptions

FORM = "multipart/form-data"
FILES = ("image", "mask")
TEXTS = ("model", "prompt", "size", "user")
"""Fields that are never numbers."""
MAX_FIELDS = 2 * len(GenerationBody.model_fields)
PART = 2**18
MAX_TEXT = 2**14
"""Maximum number of bytes of a field that is not a file."""


async def read_form(request: Request, options: ServerOptions) -> dict[str, Any]:
    """Read a form with an image.

    Returns:
        The fields of :class:`~serving.server.fields.GenerationBody`, not checked.

    Raises:
        ApiError: with status 400, 408, 413, 415 or 503 and one sentence, if there is none.
        ClientDisconnect: if the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != FORM:
        given = f"Content-Type {kind!r:.60}" if kind else "no Content-Type"
        raise ApiError(415, f"the body has {given}; send a form with Content-Type: {FORM}", "Content-Type")
    body = await read_body(request, options)

    async def parts() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), PART):
            yield body[start : start + PART]
            await asyncio.sleep(0)  # other requests do not wait

    content: dict[str, Any] = {}
    parser = MultiPartParser(
        request.headers, parts(), max_files=len(FILES), max_fields=MAX_FIELDS, max_part_size=MAX_TEXT
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError, LookupError) as error:
        reason = getattr(error, "message", "") or "its parts cannot be read"
        raise ApiError(400, f"the form is not valid: {reason.rstrip('.')}; send files and fields") from None
    try:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")  # clients send lists of images so
            if name in content:
                raise ApiError(400, f"the form has the field {name!r:.60} twice; send it once", name[:60])
            if isinstance(value, UploadFile):
                content[name] = base64.b64encode(await value.read()).decode()
            else:
                content[name] = value if name in TEXTS else _value(value)
    finally:
        await form.close()
    if content.get("image") is None:
        raise ApiError(400, "the field image is missing; give a file, the image to edit", "image", "missing_field")
    return content


def _value(text: str) -> Any:
    """Value of a field: a number, true, false or null, or else the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, list | dict | str) else value
