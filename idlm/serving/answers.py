"""From a `Job` to an HTTP response: whole, or as server-sent events.

When the client disconnects, its samples are aborted.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from msgspec import UNSET, UnsetType
from starlette.types import Receive, Scope, Send

from idlm.engine.request import Logprob
from idlm.serving.errors import ApiError, Expected, as_api_error
from idlm.serving.jobs import Body, Event, Job
from idlm.serving.prompts import Prompts
from idlm.serving.responses import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChoiceDelta,
    ChunkChoice,
    FinishReason,
    Message,
    PromptLogprob,
    PromptLogprobs,
    ToolCall,
    TopLogprob,
    Trace,
    TraceEntry,
    Usage,
)
from idlm.serving.schema_chat import ChatRequest
from idlm.serving.tools import CallParser, Family, ForcedParser, Parser
from idlm.serving.wire import Delta, Finished

T = TypeVar("T")
Entry = Mapping[int, Logprob]
"""Log-probabilities at one position by token id; the sampled token is the first."""
DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0
"""Stands for log 0, as in OpenAI's API; JSON has no infinity."""


class Answer(ABC):
    """Builds the response to one request, whole or in chunks."""

    def __init__(self, job: Job, body: Body, prompts: Prompts) -> None:
        self.job, self.prompts = job, prompts
        self.include_usage, self._continuous = body.include_usage, body.continuous_usage
        self._traced, self._with_ids = body.idlm.trace, bool(body.return_token_ids)
        self._forwards = [0] * len(job.tickets)
        self._begun: set[int] = set()

    @abstractmethod
    def response(self, samples: Sequence[Sequence[Delta]], usage: Usage) -> msgspec.Struct:
        """The whole response; `samples` are the updates of each sample."""

    @abstractmethod
    def chunks(self, index: int, event: Delta | Finished) -> list[msgspec.Struct]:
        """The chunks that an event adds to a stream; the last chunk of a sample has its finish
        reason."""

    @abstractmethod
    def chunk(self, choices: list[Any], usage: Usage | None = None) -> msgspec.Struct:
        """A chunk of a stream; the last one has no choices, but the usage if the request asked for
        it."""

    def begins(self, index: int) -> bool:
        """Whether this is the first call for a sample."""
        first = index not in self._begun
        self._begun.add(index)
        return first

    def shown(self, usage: Usage | None) -> Usage | None | UnsetType:
        """The value of a chunk's field `usage`."""
        if usage is None and self._continuous:
            return self.job.usage_so_far()
        return usage if self.include_usage else UNSET

    def ids(self, *deltas: Delta) -> list[int] | UnsetType:
        """The value of the field `token_ids`."""
        return [token for delta in deltas for token in delta.tokens] if self._with_ids else UNSET

    def prompt_ids(self, index: int) -> list[int] | UnsetType:
        """The value of the field `prompt_token_ids`."""
        return self.job.prompts[index // self.job.samples] if self._with_ids else UNSET

    def prompt_logprobs(self, index: int, top: int | None) -> PromptLogprobs | UnsetType:
        """The value of the field `prompt_logprobs`; `top` is that of the request."""
        entries = self.job.ends[index].prompt_logprobs
        if top is None or entries is None:
            return UNSET
        return [None if entry is None else self._prompt_logprob(entry, top) for entry in entries]

    def _prompt_logprob(self, entry: Entry, top: int) -> dict[str, PromptLogprob]:
        return {
            str(token): PromptLogprob(
                max(found.logprob, LOWEST_LOGPROB), found.rank, self.prompts.token(token)
            )
            for token, found in likeliest(entry, top).items()
        }

    def trace(self, index: int, *events: Delta | Finished) -> Trace | UnsetType:
        """The source of each token in `events`, and the TPF once the sample has finished."""
        if not self._traced:
            return UNSET
        trace = Trace([])
        for event in events:
            if isinstance(event, Finished):
                trace.tpf = event.completion_tokens / max(1, event.forwards)
                continue
            self._forwards[index] += bool(event.tokens)
            for token, source in zip(event.tokens, event.sources or (), strict=True):
                text: Any = source
                trace.trace.append(
                    TraceEntry(self.prompts.token(token), token, text, self._forwards[index])
                )
        return trace


class ChatAnswer(Answer):
    """Builds the response to a chat request."""

    def __init__(
        self, job: Job, body: ChatRequest, prompts: Prompts, family: Family | None
    ) -> None:
        super().__init__(job, body, prompts)
        self._body = body
        self._parsers = [self._parser(family) for _ in job.tickets]

    def _parser(self, family: Family | None) -> Parser | None:
        if family is None:
            return None
        names = {tool.function.name for tool in self._body.tools_in_use}
        if self._body.forced_tool or self._body.tool_choice == "required":
            return ForcedParser(self._body.forced_tool, names)
        return CallParser(family, names, self.prompts.tokenizer.all_special_tokens)

    def response(self, samples: Sequence[Sequence[Delta]], usage: Usage) -> ChatCompletion:
        choices = [self._choice(index, deltas) for index, deltas in enumerate(samples)]
        return ChatCompletion(
            **self.job.head,
            choices=choices,
            usage=usage,
            prompt_token_ids=self.prompt_ids(0),
            prompt_logprobs=self.prompt_logprobs(0, self._body.prompt_logprobs),
        )

    def _choice(self, index: int, deltas: Sequence[Delta]) -> ChatChoice:
        parser, end = self._parsers[index], self.job.ends[index]
        text, calls = "".join(delta.text for delta in deltas), list[ToolCall]()
        if parser is not None:
            text, calls = _split([*parser.push(text), *parser.finish()])
        for call in calls:
            call.index = UNSET
        return ChatChoice(
            index,
            Message(text if text or not calls else None, tool_calls=calls or UNSET),
            reason(end, bool(calls)),
            self._logprobs([entry for delta in deltas for entry in delta.logprobs or ()]),
            self.ids(*deltas),
            self.trace(index, *deltas, end),
        )

    def chunks(self, index: int, event: Delta | Finished) -> list[msgspec.Struct]:
        """The chunk with the role comes first, and has the prompt's ids if they are asked for."""
        first = []
        if self.begins(index):
            first = [self.chunk([ChunkChoice(index, ChoiceDelta("assistant", ""))])]
            first[0].prompt_token_ids = self.prompt_ids(index)
        choices = self._delta(index, event) if isinstance(event, Delta) else self._end(index, event)
        return [*first, *(self.chunk([choice]) for choice in choices)]

    def _delta(self, index: int, event: Delta) -> list[ChunkChoice]:
        """What a step adds: nothing if its text is held back and no log-probabilities, ids or trace
        are due."""
        parser, calls = self._parsers[index], list[ToolCall]()
        text = event.text
        if parser is not None:
            text, calls = _split(parser.push(text))
        logprobs, trace = self._logprobs(event.logprobs or ()), self.trace(index, event)
        delta, ids = _choice_delta(text, calls), self.ids(event)
        choice = ChunkChoice(index, delta, None, logprobs, ids, trace)
        due = logprobs or trace is not UNSET or ids is not UNSET
        return [choice] if text or calls or due else []

    def _end(self, index: int, event: Finished) -> list[ChunkChoice]:
        parser = self._parsers[index]
        text, calls = _split(parser.finish()) if parser is not None else ("", [])
        held = [ChunkChoice(index, _choice_delta(text, calls))] if text or calls else []
        ended = reason(event, bool(parser and parser.calls))
        return [*held, ChunkChoice(index, ChoiceDelta(), ended, idlm=self.trace(index, event))]

    def chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(**self.job.head, choices=choices, usage=self.shown(usage))

    def _logprobs(self, entries: Sequence[Entry]) -> ChatLogprobs | None:
        return (
            ChatLogprobs([self._logprob(entry) for entry in entries])
            if self._body.logprobs and entries
            else None
        )

    def _logprob(self, entry: Entry) -> ChatLogprob:
        """The sampled token is the first of `entry`; `top_logprobs` has it only if it is among
        them."""
        ordered = sorted(entry, key=lambda token: -entry[token].logprob)
        sampled = next(iter(entry))
        shown = (sampled, *ordered[: self._body.top_logprobs or 0])
        chosen, *top = [self._top(token, entry[token]) for token in shown]
        return ChatLogprob(chosen.token, chosen.logprob, chosen.bytes, top)

    def _top(self, token: int, logprob: Logprob) -> TopLogprob:
        value, data = max(logprob.logprob, LOWEST_LOGPROB), self.prompts.token_bytes(token)
        return TopLogprob(self.prompts.token(token), value, list(data))


def _split(pieces: Sequence[str | ToolCall]) -> tuple[str, list[ToolCall]]:
    """Joins the pieces of content; returns the content and the tool calls."""
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, [piece for piece in pieces if isinstance(piece, ToolCall)]


def likeliest(entry: Entry, top: int) -> Entry:
    """The token of an entry, and the `top` likeliest ones: there may be more, for another field."""
    return {
        token: found
        for place, (token, found) in enumerate(entry.items())
        if place == 0 or found.rank <= top
    }


def _choice_delta(text: str, calls: list[ToolCall]) -> ChoiceDelta:
    return ChoiceDelta(content=text or UNSET, tool_calls=calls or UNSET)


def reason(end: Finished, calls: bool = False) -> FinishReason:
    if end.reason == "length":
        return "length"
    return "tool_calls" if calls else "stop"


async def respond(request: Request, answer: Answer, stream: bool) -> Response:
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


async def _collect(answer: Answer) -> msgspec.Struct:
    samples: list[list[Delta]] = [[] for _ in answer.job.tickets]
    async for index, event in answer.job.events():
        if isinstance(event, Delta):
            samples[index].append(event)
    return answer.response(samples, answer.job.usage())


async def _sse(first: Event, events: AsyncIterator[Event], answer: Answer) -> AsyncIterator[bytes]:
    """The events of a stream; an error is the last event."""
    try:
        yield _encode(answer.chunks(*first))
        async for event in events:
            chunks = answer.chunks(*event)
            if chunks:
                yield _encode(chunks)
        if answer.include_usage:
            yield _encode([answer.chunk([], answer.job.usage())])
        yield DONE
    except Expected as error:
        yield _encode([as_api_error(error).body])


def _encode(chunks: Sequence[msgspec.Struct]) -> bytes:
    return b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks)


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
