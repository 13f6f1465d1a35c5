"""What visitors read when the server of a page does not answer with images. Operators find more in the log."""

import json
import logging
import math
from typing import Any

import httpx2

from llamagen.command import one_line
from serving.engine.requests import Reason, RequestError

LOGGER = logging.getLogger("serving")
AWAY = {
    "connect": "the server of this page cannot be reached; try again later",
    "silent": "the server of this page does not answer; try again later",
    "lost": "the connection to the server of this page was lost; try again",
}
NOT_UNDERSTOOD = "the server of this page gave an answer that the page does not understand; their versions may differ"
REASONS: dict[int, Reason] = {429: "full", 503: "lost", 502: "lost", 504: "late"}
"""Reasons of refusals by status; ``invalid`` for others from 400 to 499, and ``failed`` for the rest."""
MAX_MESSAGE = 500


def refusal(response: httpx2.Response, content: bytes) -> RequestError:
    """The error of a server that refuses a request, or ends it.

    Args:
        response: its answer.
        content: JSON with a message, as OpenAI's servers give it; anything from another program.
    """
    status = response.status_code
    try:
        error: Any = json.loads(content)["error"]
        message, code = one_line(str(error["message"]))[:MAX_MESSAGE].rstrip("."), error.get("code")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        message, code = "", None
    if status in (401, 403):
        LOGGER.error("the server %s does not accept the API key of this page", response.url)
        return RequestError("failed", "the server does not accept the API key of this page; its owner has to change it")
    if status == 200 and not message:
        return RequestError("failed", NOT_UNDERSTOOD)
    reason: Reason = code if code in ("invalid", "full", "stopping", "late", "lost", "failed") else _reason(status)
    if not message:
        message = f"the server of this page is not available (status {status}); try again later"
    return RequestError(reason, message, _seconds(response.headers.get("retry-after")))


def transport_error(error: httpx2.HTTPError, url: str) -> RequestError:
    """The error of a connection that failed."""
    LOGGER.warning("the server %s: %s", url, one_line(str(error)) or type(error).__name__)
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return RequestError("lost", AWAY["connect"])
    return RequestError("lost", AWAY["silent" if isinstance(error, httpx2.TimeoutException) else "lost"])


def is_json(response: httpx2.Response) -> bool:
    """Whether an answer says that it is JSON."""
    return str(response.headers.get("content-type", "")).startswith("application/json")


def _reason(status: int) -> Reason:
    return REASONS.get(status, "invalid" if 400 <= status < 500 else "failed")


def _seconds(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
