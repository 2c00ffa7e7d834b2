"""`Connection`: uvicorn's HTTP connection, with bounds on clients that never finish their headers, or never read."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from idlm.serving.errors import ApiError

HEADER_BYTES = 64 * 1024
STATUS = {400: b"400 Bad Request", 408: b"408 Request Timeout", 431: b"431 Request Header Fields Too Large"}


def headers_too_large() -> ApiError:
    """The answer to them."""
    message = f"the headers are larger than {HEADER_BYTES} bytes; send less"
    return ApiError(431, message, headers={"Connection": "close"})


class Connection(HttpToolsProtocol):
    """Closed when there are too many connections, when headers take too long or are too large, and when nobody reads.

    Args:
        header_seconds: to send the headers in.
        stall_seconds: how long a full buffer may wait to be read; the request then counts as left.
        most: connections at once.
    """

    def __init__(self, *, header_seconds: float, stall_seconds: float, most: int, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._header_seconds, self._stall_seconds, self._most = header_seconds, stall_seconds, most
        self._stall: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; its headers have to follow."""
        super().connection_made(transport)
        self._expect_headers()
        if len(self.connections) > self._most:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._headers_done()
        if self._stall is not None:
            self._stall.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came: of headers that are awaited, of the next request on a kept connection, or of a body."""
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_headers()
        self._header_bytes += len(data)
        super().data_received(data)
        if self._timer is not None and self._header_bytes > HEADER_BYTES:
            self._refuse(headers_too_large())

    def on_message_begin(self) -> None:
        """A request begins; it may be one sent before the last was answered."""
        if self._timer is None:
            self._expect_headers()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """All headers are there."""
        self._headers_done()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        self._stall = self.loop.call_later(self._stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        if self._stall is not None:
            self._stall.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse(ApiError(400, msg))

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        late = ApiError(408, f"the headers took more than {self._header_seconds:g} s; send them faster")
        self._timer = self.loop.call_later(self._header_seconds, self._refuse, late)

    def _headers_done(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: ApiError) -> None:
        """Answer what is not a request yet, and close."""
        self._headers_done()
        if self.transport.is_closing():
            return
        body = msgspec.json.encode(error.body)
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (STATUS[error.status_code], len(body)) + body)
        self.transport.close()
