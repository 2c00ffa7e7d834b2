"""Sends the response to a `Job`: whole, or as server-sent events.

When the client disconnects, its samples are aborted.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from idlm.serving.errors import ApiError, Expected, as_api_error
from idlm.serving.jobs import Event, Job
from idlm.serving.responses import Usage
from idlm.serving.wire import Delta, Finished

T = TypeVar("T")


class Streamable(ABC):
    """The response to one request, whole or in chunks; `respond` sends it."""

    job: Job

    @abstractmethod
    def response(self, samples: Sequence[Sequence[Delta]], usage: Usage) -> msgspec.Struct:
        """The whole response; `samples` are the updates of each sample."""

    @abstractmethod
    def chunks(self, index: int, event: Delta | Finished) -> Sequence[msgspec.Struct]:
        """The chunks that an event adds to a stream."""

    @abstractmethod
    def encode(self, chunks: Sequence[msgspec.Struct]) -> bytes:
        """Chunks as server-sent events, in the API's own framing."""

    @abstractmethod
    def last(self) -> bytes:
        """The end of a stream; all samples have finished."""

    @abstractmethod
    def failure(self, error: ApiError) -> bytes:
        """The end of a stream that an error breaks off."""


async def respond(request: Request, answer: Streamable, stream: bool) -> Response:
    """Run an answer's job to its end, or begin to stream it.

    Raises:
        ApiError, InputError, EngineDown: the job failed before any byte was sent.
    """
    job = answer.job
    try:
        if not stream:
            return as_json(await _unless_gone(request, _collect(answer)))
        events = job.events()
        # before the response begins: an early refusal gets a status code, not an event
        first = await _unless_gone(request, anext(events))
    except BaseException:
        job.cancel()
        raise
    return _EventStream(job, _sse(first, events, answer))


def as_json(value: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def named_event(event: msgspec.Struct) -> bytes:
    """A server-sent event with the name that is the tag of its type."""
    name = str(event.__struct_config__.tag).encode()
    return b"event: " + name + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await `work` while the client is connected. The body must have been read.

    Raises:
        ApiError: 499: the client has disconnected, so only the log sees it.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has left")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(answer: Streamable) -> msgspec.Struct:
    samples: list[list[Delta]] = [[] for _ in answer.job.tickets]
    async for index, event in answer.job.events():
        if isinstance(event, Delta):
            samples[index].append(event)
    return answer.response(samples, answer.job.usage())


async def _sse(
    first: Event, events: AsyncIterator[Event], answer: Streamable
) -> AsyncIterator[bytes]:
    """The events of a stream; an error is the last event."""
    try:
        yield answer.encode(answer.chunks(*first))
        async for event in events:
            chunks = answer.chunks(*event)
            if chunks:
                yield answer.encode(chunks)
        yield answer.last()
    except Expected as error:
        yield answer.failure(as_api_error(error))


class _EventStream(StreamingResponse):
    """Cancels its job at the end, even if the client disconnects before the first byte."""

    def __init__(self, job: Job, content: AsyncIterator[bytes]) -> None:
        super().__init__(
            content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()
