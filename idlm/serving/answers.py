"""From a `Job` to an HTTP response: whole, or as server-sent events.

When the client disconnects, its samples are aborted.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
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
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    Message,
    ToolCall,
    TopLogprob,
    Trace,
    TraceEntry,
    Usage,
)
from idlm.serving.schema import CompletionRequest
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
        self.include_usage, self._traced = body.include_usage, body.idlm.trace
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
        return usage if self.include_usage else UNSET

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
        metrics = self.job.metrics()
        return ChatCompletion(**self.job.head, choices=choices, usage=usage, metrics=metrics)

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
            _reason(end, bool(calls)),
            self._logprobs([entry for delta in deltas for entry in delta.logprobs or ()]),
            self.trace(index, *deltas, end),
        )

    def chunks(self, index: int, event: Delta | Finished) -> list[msgspec.Struct]:
        """The chunk with the role comes first."""
        choices = [ChunkChoice(index, ChoiceDelta("assistant", ""))] if self.begins(index) else []
        choices += (
            self._delta(index, event) if isinstance(event, Delta) else self._end(index, event)
        )
        return [self.chunk([choice]) for choice in choices]

    def _delta(self, index: int, event: Delta) -> list[ChunkChoice]:
        """What a step adds: nothing if its text is held back and no log-probabilities or trace are
        due."""
        parser, calls = self._parsers[index], list[ToolCall]()
        text = event.text
        if parser is not None:
            text, calls = _split(parser.push(text))
        logprobs, trace = self._logprobs(event.logprobs or ()), self.trace(index, event)
        choice = ChunkChoice(index, _choice_delta(text, calls), logprobs=logprobs, idlm=trace)
        return [choice] if text or calls or logprobs or trace is not UNSET else []

    def _end(self, index: int, event: Finished) -> list[ChunkChoice]:
        parser = self._parsers[index]
        text, calls = _split(parser.finish()) if parser is not None else ("", [])
        held = [ChunkChoice(index, _choice_delta(text, calls))] if text or calls else []
        reason = _reason(event, bool(parser and parser.calls))
        return [*held, ChunkChoice(index, ChoiceDelta(), reason, idlm=self.trace(index, event))]

    def chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        metrics = UNSET if usage is None else self.job.metrics()
        return ChatChunk(**self.job.head, choices=choices, usage=self.shown(usage), metrics=metrics)

    def _logprobs(self, entries: Sequence[Entry]) -> ChatLogprobs | None:
        return (
            ChatLogprobs([self._logprob(entry) for entry in entries])
            if self._body.logprobs and entries
            else None
        )

    def _logprob(self, entry: Entry) -> ChatLogprob:
        """The sampled token is the first of `entry`; `top_logprobs` has it only if it is among
        them."""
        likeliest = sorted(entry, key=lambda token: -entry[token].logprob)[
            : self._body.top_logprobs or 0
        ]
        sampled = next(iter(entry))
        chosen, *top = [self._top(token, entry[token]) for token in (sampled, *likeliest)]
        return ChatLogprob(chosen.token, chosen.logprob, chosen.bytes, top)

    def _top(self, token: int, logprob: Logprob) -> TopLogprob:
        text = self.prompts.token(token)
        data = list(self.prompts.token_bytes(token))
        return TopLogprob(text, max(logprob.logprob, LOWEST_LOGPROB), data)


def _split(pieces: Sequence[str | ToolCall]) -> tuple[str, list[ToolCall]]:
    """Joins the pieces of content; returns the content and the tool calls."""
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, [piece for piece in pieces if isinstance(piece, ToolCall)]


def _choice_delta(text: str, calls: list[ToolCall]) -> ChoiceDelta:
    return ChoiceDelta(content=text or UNSET, tool_calls=calls or UNSET)


def _reason(end: Finished, calls: bool = False) -> FinishReason:
    if end.reason == "length":
        return "length"
    return "tool_calls" if calls else "stop"


class CompletionAnswer(Answer):
    """Builds the response to a completions request. Choice i * n + k is sample k of prompt i."""

    def __init__(
        self, job: Job, body: CompletionRequest, prompts: Prompts, ids: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(job, body, prompts)
        self._body, self._ids = body, ids
        samples = range(len(job.tickets) if body.logprobs is not None else 0)
        self._offsets = [self._output_offsets(index) for index in samples]

    def response(self, samples: Sequence[Sequence[Delta]], usage: Usage) -> Completion:
        if self._body.prompt_only:
            samples = [() for _ in samples]
            usage.total_tokens, usage.completion_tokens = usage.prompt_tokens, 0
        choices = [self._choice(index, deltas) for index, deltas in enumerate(samples)]
        metrics = self.job.metrics()
        return Completion(**self.job.head, choices=choices, usage=usage, metrics=metrics)

    def _choice(self, index: int, deltas: Sequence[Delta]) -> CompletionChoice:
        end = self.job.ends[index]
        shown = None
        if self._body.logprobs is not None:
            shown = CompletionLogprobs([], [], [], [])
            number = index // self.job.samples
            is_text = isinstance(self._body.prompts[number], str)
            offsets = self.prompts.offsets(skip_special_tokens=is_text)  # as in `_echoed`
            self._show(shown, end.prompt_logprobs or (), offsets, self._ids[number])
            output = [entry for delta in deltas for entry in delta.logprobs or ()]
            self._show(shown, output, self._offsets[index])
        return CompletionChoice(
            index,
            self._echoed(index) + "".join(delta.text for delta in deltas),
            "length" if self._body.prompt_only else _reason(end),
            shown,
            self.trace(index, *deltas, end),
        )

    def _output_offsets(self, index: int) -> Callable[[int], int]:
        skip = self._body.skip_special_tokens is not False
        return self.prompts.offsets(len(self._echoed(index)), skip)

    def _echoed(self, index: int) -> str:
        """The prompt's text if the request has `echo`, else ""."""
        if not self._body.echo:
            return ""
        prompt = self._body.prompts[index // self.job.samples]
        return prompt if isinstance(prompt, str) else self.prompts.decode(prompt)

    def chunks(self, index: int, event: Delta | Finished) -> list[msgspec.Struct]:
        """No chunk if a step's text is held back and no log-probabilities or trace are due."""
        choice = CompletionChoice(index, self._echoed(index) if self.begins(index) else "")
        choice.idlm = self.trace(index, event)
        if isinstance(event, Finished):
            choice.finish_reason = _reason(event)
            return [self.chunk([choice])]
        choice.text += event.text
        if self._body.logprobs is not None:
            choice.logprobs = CompletionLogprobs([], [], [], [])
            self._show(choice.logprobs, event.logprobs or (), self._offsets[index])
        has_content = choice.text or choice.logprobs is not None or choice.idlm is not UNSET
        return [self.chunk([choice])] if has_content else []

    def chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        metrics = UNSET if usage is None else self.job.metrics()
        return Completion(
            **self.job.head, choices=choices, usage=self.shown(usage), metrics=metrics
        )

    def _show(
        self,
        shown: CompletionLogprobs,
        entries: Sequence[Entry | None],
        offset: Callable[[int], int],
        ids: Sequence[int] = (),
    ) -> None:
        """Append to OpenAI's four lists, one entry for each token.

        Args:
            entries: None for the first token of a prompt, which has no law.
            offset: of the next token.
            ids: the tokens of a prompt, which name those without entry.
        """
        for place, entry in enumerate(entries):
            token = ids[place] if entry is None else next(iter(entry))
            shown.tokens.append(self.prompts.token(token))
            shown.text_offset.append(offset(token))
            shown.token_logprobs.append(
                None if entry is None else max(entry[token].logprob, LOWEST_LOGPROB)
            )
            shown.top_logprobs.append(None if entry is None else self._by_text(entry))

    def _by_text(self, entries: Entry) -> dict[str, float]:
        """If two tokens have the same text, the likelier one's log-probability is shown."""
        rising = sorted(entries.items(), key=lambda pair: pair[1].logprob)
        return {
            self.prompts.token(token): max(entry.logprob, LOWEST_LOGPROB) for token, entry in rising
        }


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
