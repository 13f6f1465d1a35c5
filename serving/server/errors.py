"""Errors in the shape of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``."""

import json
import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from serving.engine.requests import RequestError

LOG = logging.getLogger("serving.server")
STATUS = {
    "invalid": 400,
    "full": 429,
    "stopping": 503,
    "cancelled": 503,
    "lost": 503,
    "late": 504,
    "failed": 500,
}
"""HTTP status of each reason of a ``RequestError``. A request that its client cancelled has no client any more."""
RETRY_AFTER = 5.0
"""Seconds for ``Retry-After`` where the backend names none."""


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: one sentence for the client.
        param: field of the request that is wrong.
        code: what happened, for programs.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @classmethod
    def from_request_error(cls, error: RequestError) -> "ApiError":
        """The answer to a request that the backend refused or did not finish."""
        status = STATUS[error.reason]
        headers = {}
        if status in (429, 503, 504):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or RETRY_AFTER)))
        if error.reason == "stopping":
            headers["Connection"] = "close"
        message = error.message
        if error.reason == "failed":
            LOG.error("a request failed: %s", error.message)
        return cls(status, message, None, error.reason, headers)

    def content(self) -> dict[str, Any]:
        """The body of the response."""
        return {
            "error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code},
        }

    def response(self) -> Response:
        """The response."""
        return json_response(self.content(), self.status, self.headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with a JSON body, in ASCII: texts of clients may hold characters that UTF-8 cannot encode."""
    return Response(json.dumps(content), status, dict(headers or {}), "application/json")


def add_handlers(app: FastAPI) -> None:
    """Answer all errors of an application in the same shape."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return ApiError.from_request_error(error).response()

    @app.exception_handler(HTTPException)
    async def of_framework(request: Request, error: HTTPException) -> Response:
        path = repr(request.url.path)[:80]
        if error.status_code == 404:
            message = f"there is nothing at {path}; /openapi.json lists what there is"
        elif error.status_code == 405:
            message = f"{path} does not take {request.method[:20]}; it takes {(error.headers or {}).get('Allow', '')}"
        else:
            message = HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, message, code=_code(error.status_code), headers=error.headers).response()

    # The framework logs the traceback, and the client gets none.
    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log has the reason", code="failed").response()


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def _code(status: int) -> str:
    return HTTPStatus(status).phrase.lower().replace(" ", "_")
