"""`Guard`: what stands before every route. Keys, the size of headers and body, the time for the body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from idlm.serving.config import Limits
from idlm.serving.connections import HEADER_BYTES, headers_too_large
from idlm.serving.errors import ApiError

OPEN_PATH = "/health"
CLOSE = {"Connection": "close"}
"""For answers given before the whole body was read."""


class Guard:
    """ASGI middleware; every path but /health needs a key where there are keys, also paths that nobody has.

    A request's `scope["state"]["salt"]` is a digest of its key: empty without keys.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], limits: Limits) -> None:
        self.app, self.limits = app, limits
        # equal lengths: a comparison then takes the same time for every guess
        self._keys = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            _check_headers(scope)
            scope.setdefault("state", {})["salt"] = self._admit(scope)
            self._check_declared_length(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, _Body(receive, self.limits).receive, send)

    def _admit(self, scope: Scope) -> bytes:
        """The digest of the request's key.

        Raises:
            ApiError: 401: it has none of ours.
        """
        if not self._keys or scope["path"] == OPEN_PATH:
            return b""
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        known = [hmac.compare_digest(given, one) for one in self._keys]  # all of them, whichever it is
        if scheme.lower() == b"bearer" and any(known):
            return given
        raise ApiError(
            401,
            "no valid API key; send the header 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"} | CLOSE,
        )

    def _check_declared_length(self, scope: Scope) -> None:
        text = _header(scope, b"content-length")
        if text.isdigit() and int(text[:20]) > self.limits.body_bytes:  # what is no number the parser refuses
            raise _too_large(self.limits)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _check_headers(scope: Scope) -> None:
    """Those that came whole; `Connection` refuses what grows too large while it comes."""
    if sum(len(key) + len(value) for key, value in scope["headers"]) > HEADER_BYTES:
        raise headers_too_large()


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body is larger than {limits.body_bytes} bytes; send less", headers=CLOSE)


class _Body:
    """Counts and times a body while it is read; afterwards only tells when the client leaves."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._deadline = monotonic() + limits.body_seconds
        self._bytes = 0
        self._complete = False

    async def receive(self) -> Message:
        """The next message.

        Raises:
            ApiError: 413: too much; 408: too slow; 499, which nobody sees: the client has left.
        """
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - monotonic()):
                message = await self._receive()
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise ApiError(408, f"the body took more than {seconds:g} s; send it faster", headers=CLOSE) from None
        if message["type"] == "http.disconnect":
            raise ApiError(499, "the client has left")
        self._bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._bytes > self._limits.body_bytes:
            raise _too_large(self._limits)
        return message
