"""`Connection`: an HTTP client so cheap that the server is what is measured.

The pieces of a response get time stamps as they come, and are parsed when it is over.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httptools

LAST_EVENTS = ("response.completed", "response.incomplete", "message_stop")
"""Of streams that have no [DONE]."""


@dataclass
class Answer:
    """A response; times are of `perf_counter`.

    Attributes:
        tokens: the max_tokens of the request.
        status: 0 if the connection ended before a status came.
        complete: whether the response ended as HTTP requires.
    """

    asked: float
    tokens: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    complete: bool = False

    @property
    def first(self) -> float:
        """When the first bytes of the body came."""
        return self.pieces[0][0]

    @property
    def last(self) -> float:
        """When the last bytes of the body came; now, if there are none."""
        return self.pieces[-1][0] if self.pieces else perf_counter()

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    def json(self) -> Any:
        """The body of a response that is not a stream."""
        return json.loads(self.body)

    def events(self) -> list[dict[str, Any]]:
        """The events of a stream, without [DONE]; their names are in their data too.

        Comments, which a router sends while nothing comes, and an event that is cut are none.
        """
        whole = self.body.rpartition(b"\n\n")[0]
        lines = [line[6:] for line in whole.split(b"\n") if line.startswith(b"data: ")]
        return [json.loads(line) for line in lines if line != b"[DONE]"]

    @property
    def streamed(self) -> bool:
        return "event-stream" in self.headers.get("content-type", "")

    @property
    def error(self) -> dict[str, Any] | None:
        """The error that the server reports, by status code or by the last event of a stream.

        Each API has its own event: `response.failed` in /v1/responses, one with `error` in others.
        """
        if self.status != 200:
            return dict(self.json()["error"]) if self.body else None
        last = self.events()[-1:] if self.streamed else []
        for event in last:
            if event.get("type") == "response.failed":
                return dict(event["response"]["error"])
            return dict(event["error"]) if "error" in event else None
        return None

    @property
    def finished(self) -> bool:
        """Whether the response is complete and successful."""
        if self.status != 200 or not self.complete:
            return False
        if not self.streamed or self.body.endswith(b"data: [DONE]\n\n"):
            return True
        return any(event.get("type") in LAST_EVENTS for event in self.events()[-1:])


class Connection(asyncio.Protocol):
    """A connection to the server at `port`, kept open between requests and opened again if
    closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._over: asyncio.Future[None] | None = None
        self._left = False
        self.answer = Answer(0.0)

    async def ask(self, path: str, body: Mapping[str, Any], send: int | None = None) -> Answer:
        """POST, and wait for the end of the response; with `send`, only so many bytes of the
        request.

        Raises:
            ConnectionError: no server listens.
        """
        loop = asyncio.get_running_loop()
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}"
        )
        self._over = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        if self._transport is None:
            self._transport, _ = await loop.create_connection(lambda: self, "127.0.0.1", self._port)
        if self._left:  # closed while it was opened
            self._transport.abort()
        self.answer = Answer(perf_counter(), body.get("max_tokens", 0))
        self._transport.write((head.encode() + b"\r\n\r\n" + content)[:send])
        await self._over
        return self.answer

    def close(self) -> None:
        """Disconnect for good, even in the middle of a response."""
        self._left = True
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._end()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answer.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.answer.pieces.append((perf_counter(), body))

    def on_message_complete(self) -> None:
        self.answer.complete = True
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.abort()
            self._transport = None
        self._end()

    def _end(self) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(None)


async def ask_all(
    port: int, path: str, bodies: Iterable[Mapping[str, Any]], concurrency: int
) -> list[Answer]:
    """Send all requests, `concurrency` at once, over kept connections; answers in order."""
    answers: dict[int, Answer] = {}
    waiting = enumerate(bodies)

    async def client() -> None:
        connection = Connection(port)
        for index, body in waiting:
            answers[index] = await connection.ask(path, body)
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return [answers[index] for index in sorted(answers)]
