"""From a `Job` to an HTTP response: collected, or as server-sent events; a client that leaves ends its samples."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from idlm.serving.errors import ApiError, Expected, as_api_error
from idlm.serving.jobs import Event, Job
from idlm.serving.messages import Delta, Finished, Logprob, TokenTrace
from idlm.serving.responses import Usage

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0
"""OpenAI's number for a token that cannot come out; JSON has no infinity."""


@dataclass
class Sample:
    """One sample, collected."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[Logprob]] = field(default_factory=list)
    trace: list[TokenTrace] = field(default_factory=list)

    def take(self, delta: Delta) -> None:
        """Add what a step brought."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs or []
        self.trace += delta.trace or []


class Answer(Protocol):
    """The shape of one kind of answer."""

    def response(self, samples: Sequence[Sample], usage: Usage) -> msgspec.Struct:
        """All of it."""

    def chunks(self, index: int, event: Delta | Finished) -> list[msgspec.Struct]:
        """What an event adds to a stream, in one write."""

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The last chunk."""


async def respond(request: Request, job: Job, answer: Answer, stream: bool, include_usage: bool) -> Response:
    """Run a job to its end, or begin to stream it.

    Raises:
        ApiError, InputError, EngineDown: what ended it before anything was sent.
    """
    try:
        if not stream:
            return as_json(await unless_gone(request, _collect(job, answer)))
        events = job.events()
        first = await unless_gone(request, anext(events))  # an early refusal is a status, and no event in a stream
    except BaseException:
        job.cancel()
        raise
    return _EventStream(job, _sse(first, events, job, answer, include_usage))


def as_json(value: msgspec.Struct, status: int = 200) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for work while the client does; the body must have been read.

    Raises:
        ApiError: 499, which nobody sees: the client has left.
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


async def _collect(job: Job, answer: Answer) -> msgspec.Struct:
    samples = [Sample() for _ in job.tickets]
    async for index, event in job.events():
        if isinstance(event, Delta):
            samples[index].take(event)
    return answer.response(samples, job.usage())


async def _sse(
    first: Event, events: AsyncIterator[Event], job: Job, answer: Answer, include_usage: bool
) -> AsyncIterator[bytes]:
    """The events of a stream; an error is one more event, and the last."""
    try:
        yield _encode(answer.chunks(*first))
        async for event in events:
            chunks = answer.chunks(*event)
            if chunks:
                yield _encode(chunks)
        if include_usage:
            yield _encode([answer.usage_chunk(job.usage())])
        yield DONE
    except Expected as error:
        yield _encode([as_api_error(error).body])


def _encode(chunks: Sequence[msgspec.Struct]) -> bytes:
    return b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks)


class _EventStream(StreamingResponse):
    """Ends its job in any case, also if the client left before the first byte."""

    def __init__(self, job: Job, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()
