"""What a request that fails is answered: an OpenAI error body, whatever went wrong and wherever."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from fastapi import HTTPException, Response
from starlette.exceptions import HTTPException as AnyHTTPException

from idlm.errors import InputError

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "client_gone",
    500: "server_error",
    503: "service_unavailable",
}
"""Error types by status; all others are "invalid_request_error"."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong; `param` is the field of the request that caused it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success, and of an error event in a stream."""

    error: ErrorDetail


class Busy(Exception):
    """The queue is full; `retry_after` says in how many whole seconds (at least 1) it may have
    room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after} s")
        self.retry_after = retry_after


class EngineDown(Exception):
    """There is no engine for this now; the message says why."""


class ApiError(HTTPException):
    """A request that ends with this status and message."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    @property
    def body(self) -> ErrorBody:
        """As the client sees it."""
        kind = TYPES.get(self.status_code, "invalid_request_error")
        return ErrorBody(ErrorDetail(str(self.detail), kind, self.param, self.code))

    def response(self) -> Response:
        """The whole answer."""
        content = msgspec.json.encode(self.body)
        return Response(content, self.status_code, self.headers, media_type="application/json")


Expected = (AnyHTTPException, InputError, Busy, EngineDown)
"""Exceptions that are answers; any other one is a bug, and a 500."""


def as_api_error(error: Exception) -> ApiError:
    """The answer to one of `Expected`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AnyHTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, Busy):
        return ApiError(
            429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)}
        )
    if isinstance(error, EngineDown):
        return ApiError(503, str(error), code="engine_down", headers={"Retry-After": "1"})
    return ApiError(400, str(error))
