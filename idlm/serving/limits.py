"""Bounds on what clients may use: connections, headers, API keys, bodies, and the engine's
queue."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from idlm.errors import InputError
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError, Busy

HEADER_BYTES = 64 * 1024
STATUS = {
    400: b"400 Bad Request",
    408: b"408 Request Timeout",
    431: b"431 Request Header Fields Too Large",
}
OPEN_PATHS = ("/", "/health", "/ping", "/docs")
OPEN_FOLDERS = ("/docs/", "/ui/")
"""Paths that need no key: those of probes, and the files of the documentation's page and of the
playground, which hold nothing of this server."""
KEY_HEADERS = (b"x-api-key", b"api-key")
"""Headers with a key, besides `Authorization: Bearer`: Anthropic's and Azure's."""
CLOSE = {"Connection": "close"}
"""Header of responses that are sent before the whole body was read."""
WINDOW = 30.0
"""Seconds over which `Quota` measures the rate of finished samples; older ones say nothing about
the load now."""
LONGEST_WAIT = 60


def _headers_too_large() -> ApiError:
    message = f"the headers are larger than {HEADER_BYTES} bytes; send less"
    return ApiError(431, message, headers={"Connection": "close"})


class Connection(HttpToolsProtocol):
    """An HTTP connection with limits.

    It is closed if there are too many connections, if headers take too long or are too large, and
    if the client does not read.

    Args:
        header_seconds: time to send the headers.
        stall_seconds: how long a full output buffer may wait to be read; after that the client
            counts as disconnected.
        most: connections at once.
    """

    def __init__(
        self, *, header_seconds: float, stall_seconds: float, most: int, **uvicorn: Any
    ) -> None:
        super().__init__(**uvicorn)
        self._header_seconds, self._stall_seconds, self._most = header_seconds, stall_seconds, most
        self._stall: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect the headers of the first request."""
        super().connection_made(transport)
        self._expect_headers()
        if len(self.connections) > self._most:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_done()
        if self._stall is not None:
            self._stall.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of headers, of the next request on a kept connection, or of a body."""
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_headers()
        self._header_bytes += len(data)
        super().data_received(data)
        if self._timer is not None and self._header_bytes > HEADER_BYTES:
            self._refuse(_headers_too_large())

    def on_message_begin(self) -> None:
        """Also called for a request that is sent before the last one was answered."""
        if self._timer is None:
            self._expect_headers()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._headers_done()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """The output buffer is full: cut the connection unless the client reads in time."""
        super().pause_writing()
        self._stall = self.loop.call_later(self._stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP."""
        self._refuse(ApiError(400, msg))

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        late = ApiError(
            408, f"the headers took more than {self._header_seconds:g} s; send them faster"
        )
        self._timer = self.loop.call_later(self._header_seconds, self._refuse, late)

    def _headers_done(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: ApiError) -> None:
        """Send an error response and close the connection."""
        self._headers_done()
        if self.transport.is_closing():
            return
        body = msgspec.json.encode(error.body)
        head = (
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head % (STATUS[error.status_code], len(body)) + body)
        self.transport.close()


class AuthAndLimits:
    """ASGI middleware: API keys, and the sizes of headers and bodies.

    If the server has keys, every path but those of `OPEN_PATHS` needs one, even a path without a
    route.
    `scope["state"]["salt"]` is the digest of the request's key, or empty without keys.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], limits: Limits) -> None:
        self.app, self.limits = app, limits
        # digests have equal lengths, so a comparison takes the same time for every guess
        self._keys = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            _check_headers(scope)
            scope.setdefault("state", {})["salt"] = self._admit(scope)
            self._check_declared_length(scope)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self.app(scope, _Body(receive, self.limits).receive, send)

    def _admit(self, scope: Scope) -> bytes:
        """The digest of the request's key.

        Raises:
            ApiError: 401: no key, or one that the server does not have.
        """
        path = scope["path"]
        if not self._keys or path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return b""
        for key in _keys(scope):
            digest = hashlib.sha256(key).digest()
            # a list, since `any` over a generator stops at the first match and so leaks which key
            # it is
            matches = [hmac.compare_digest(digest, valid) for valid in self._keys]
            if any(matches):
                return digest
        raise ApiError(
            401,
            "no valid API key; send the header 'Authorization: Bearer KEY', or 'X-Api-Key: KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"} | CLOSE,
        )

    def _check_declared_length(self, scope: Scope) -> None:
        text = _header(scope, b"content-length")
        # the parser refuses a length that is not a number
        if text.isdigit() and int(text[:20]) > self.limits.body_bytes:
            raise _too_large(self.limits)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _keys(scope: Scope) -> list[bytes]:
    """The keys that a request shows."""
    scheme, _, key = _header(scope, b"authorization").partition(b" ")
    bearer = [key.strip()] if scheme.lower() == b"bearer" else []
    return bearer + [_header(scope, name).strip() for name in KEY_HEADERS]


def _check_headers(scope: Scope) -> None:
    """Headers that came in one piece; `Connection` bounds them while they come."""
    if sum(len(key) + len(value) for key, value in scope["headers"]) > HEADER_BYTES:
        raise _headers_too_large()


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limits.body_bytes} bytes; send less", headers=CLOSE
    )


class _Body:
    """Bounds the size and the time of a body; after its end it only reports that the client
    disconnects."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._deadline = monotonic() + limits.body_seconds
        self._bytes = 0
        self._complete = False

    async def receive(self) -> Message:
        """The next ASGI message.

        Raises:
            ApiError: 413: too large. 408: too slow. 499: the client has disconnected, so only the
                log sees it.
        """
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - monotonic()):
                message = await self._receive()
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise ApiError(
                408, f"the body took more than {seconds:g} s; send it faster", headers=CLOSE
            ) from None
        if message["type"] == "http.disconnect":
            raise ApiError(499, "the client has left")
        self._bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._bytes > self._limits.body_bytes:
            raise _too_large(self._limits)
        return message


class Quota:
    """The room in the engine's queue, in samples and in tokens: the prompt's and max_tokens.

    Attributes:
        samples, tokens: what is in the engine now.
    """

    def __init__(self, limits: Limits) -> None:
        self.most_samples, self.most_tokens = limits.queue_requests, limits.queue_tokens
        self.samples = 0
        self.tokens = 0
        self._returned: deque[tuple[float, int]] = deque(maxlen=256)

    def check(self) -> None:
        """Refuse a request if there is no room for any sample, before its prompt is tokenized.

        Raises:
            Busy: there is no room.
        """
        if self.samples >= self.most_samples:
            raise Busy(self._wait(1, 0))

    def take(self, samples: int, tokens: int) -> None:
        """Reserve room for all samples of a request, or for none.

        Raises:
            Busy: there is not enough room now. InputError: the quota is smaller than the request.
        """
        if samples > self.most_samples or tokens > self.most_tokens:
            raise InputError(
                f"a request of {samples} samples and {tokens} tokens (prompts and max_tokens); "
                f"this server takes {self.most_samples} samples and {self.most_tokens} tokens "
                "at once: lower n or max_tokens"
            )
        more_samples = self.samples + samples - self.most_samples
        more_tokens = self.tokens + tokens - self.most_tokens
        if more_samples > 0 or more_tokens > 0:
            raise Busy(self._wait(more_samples, more_tokens))
        self.samples += samples
        self.tokens += tokens

    def give_back(self, tokens: int) -> None:
        """Free the room of a finished sample that had reserved `tokens`."""
        self.samples -= 1
        self.tokens -= tokens
        self._returned.append((monotonic(), tokens))

    def _wait(self, samples: int, tokens: int) -> int:
        """Seconds until so much is free at the rate of the last `WINDOW` seconds; 1 if there is no
        rate."""
        now = monotonic()
        while self._returned and now - self._returned[0][0] > WINDOW:
            self._returned.popleft()
        if not self._returned:
            return 1
        span = now - self._returned[0][0]
        returned = sum(freed for _, freed in self._returned)
        seconds = span * max(samples / len(self._returned), tokens / returned)
        return min(max(1, math.ceil(seconds)), LONGEST_WAIT)
