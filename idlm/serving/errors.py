"""Failed requests: every one is answered with the error body of its API."""

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
    """Why a request failed; `param` is the field of the request that caused it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every failed response, and of an error event in a stream."""

    error: ErrorDetail


ANTHROPIC_TYPES = TYPES | {500: "api_error", 503: "overloaded_error"}
"""Error types of Anthropic's API by status; all others are "invalid_request_error"."""
MESSAGES_PATH = "/v1/messages"


class MessagesErrorDetail(msgspec.Struct, frozen=True):
    """Why a request to /v1/messages failed."""

    type: str
    message: str


class MessagesError(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """The body of a failed response of /v1/messages, and of an error event in its stream."""

    error: MessagesErrorDetail


class Busy(Exception):
    """The queue is full. `retry_after`: whole seconds (at least 1) until it may have room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after} s")
        self.retry_after = retry_after


class EngineDown(Exception):
    """No engine takes requests now; the message says why."""


class ApiError(HTTPException):
    """A failed request with its status code and message."""

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
        """The error body; its `type` follows from the status code."""
        kind = TYPES.get(self.status_code, "invalid_request_error")
        return ErrorBody(ErrorDetail(str(self.detail), kind, self.param, self.code))

    @property
    def messages_body(self) -> MessagesError:
        """The error body of Anthropic's API."""
        kind = ANTHROPIC_TYPES.get(self.status_code, "invalid_request_error")
        return MessagesError(MessagesErrorDetail(kind, str(self.detail)))

    def response(self, path: str) -> Response:
        """The response in the form of the API that the path belongs to."""
        anthropic = path == MESSAGES_PATH or path.startswith(MESSAGES_PATH + "/")
        content = msgspec.json.encode(self.messages_body if anthropic else self.body)
        return Response(content, self.status_code, self.headers, media_type="application/json")


Expected = (AnyHTTPException, InputError, Busy, EngineDown)
"""Exceptions with a status code of their own; any other exception is a bug and answered 500."""


def as_api_error(error: Exception) -> ApiError:
    """The status code and message of an exception of `Expected`."""
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
    if isinstance(error, InputError):
        code = error.code or ("invalid_value" if error.param else None)
        return ApiError(400, str(error), error.param, code)
    raise TypeError(f"no answer to {error!r}")
