"""`Connection`: one HTTP connection that costs next to nothing, so that the server is what is
measured.

An answer's pieces are stamped as they come and looked at only when it is over.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httptools


@dataclass
class Answer:
    """What came back; times are of `perf_counter`.

    Attributes:
        tokens: that were asked for.
        status: 0: the connection ended before there was one.
        complete: the server ended the answer as HTTP has it.
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
        """When the last bytes of the body came, or nothing did."""
        return self.pieces[-1][0] if self.pieces else perf_counter()

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(piece for _, piece in self.pieces)

    def json(self) -> Any:
        """The body of an answer that is no stream."""
        return json.loads(self.body)

    def events(self) -> list[dict[str, Any]]:
        """The events of a stream, without its [DONE]."""
        lines = (line.removeprefix(b"data: ") for line in self.body.split(b"\n\n") if line)
        return [json.loads(line) for line in lines if line != b"[DONE]"]

    @property
    def error(self) -> dict[str, Any] | None:
        """What the server said went wrong, as a status or as the last event of a stream."""
        if self.status != 200:
            return dict(self.json()["error"]) if self.body else None
        if "event-stream" not in self.headers.get("content-type", ""):
            return None
        events = self.events()
        return dict(events[-1]["error"]) if events and "error" in events[-1] else None

    @property
    def finished(self) -> bool:
        """Whether it is an answer to the end, and no error."""
        if self.status != 200 or not self.complete:
            return False
        stream = "event-stream" in self.headers.get("content-type", "")
        return self.body.endswith(b"data: [DONE]\n\n") if stream else True


class Connection(asyncio.Protocol):
    """A connection to the server at `port`, kept open from request to request; made anew where the
    server closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._over: asyncio.Future[None] | None = None
        self._left = False
        self.answer = Answer(0.0)

    async def ask(self, path: str, body: Mapping[str, Any], send: int | None = None) -> Answer:
        """POST, and wait for the end of the answer; `send` bytes of the request only, where given.

        Raises:
            ConnectionError: nobody listens.
        """
        loop = asyncio.get_running_loop()
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        self._over = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        if self._transport is None:
            self._transport, _ = await loop.create_connection(lambda: self, "127.0.0.1", self._port)
        if self._left:  # while it was made
            self._transport.abort()
        self.answer = Answer(perf_counter(), body.get("max_tokens", 0))
        self._transport.write((head.encode() + b"\r\n\r\n" + content)[:send])
        await self._over
        return self.answer

    def close(self) -> None:
        """Leave, whatever is under way; for good."""
        self._left = True
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def data_received(self, data: bytes) -> None:
        """Of asyncio."""
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio."""
        self._transport = None
        self._end()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of httptools."""
        self.answer.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        """Of httptools."""
        self.answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Of httptools."""
        self.answer.pieces.append((perf_counter(), body))

    def on_message_complete(self) -> None:
        """Of httptools."""
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
    """Ask all, so many at once, over kept connections, the next one taken when one is answered;
    answers in order."""
    answers: dict[int, Answer] = {}
    waiting = enumerate(bodies)

    async def client() -> None:
        connection = Connection(port)
        for number, body in waiting:
            answers[number] = await connection.ask(path, body)
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return [answers[number] for number in sorted(answers)]
