"""Answers of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from idlm.serving.jobs import Job, admit, room
from idlm.serving.messages import Delta, Finished, Logprob
from idlm.serving.prompts import Prompts
from idlm.serving.protocol_chat import ChatRequest
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
    ToolCall,
    TopLogprob,
    Usage,
)
from idlm.serving.state import the_server
from idlm.serving.stream import LOWEST_LOGPROB, Sample, respond
from idlm.serving.tools import CallParser, Family, ForcedParser, Parser, family_of
from idlm.serving.trace import trace_of


async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation.

    Raises:
        ApiError, InputError, Busy, EngineDown: what became of it instead.
    """
    server = the_server(request)
    engine, limits = server.accept(body), server.config.limits
    family = family_of(server.prompts.template) if body.tools_in_use else None
    messages, tools = body.template_messages(), body.template_tools()
    ids = await server.prompts.in_thread(
        lambda: server.prompts.chat(messages, tools, body.add_generation_prompt, body.chat_template_kwargs)
    )
    keep = {"skip_special_tokens": False} if family and family.special else {}
    asked = body.model_copy(update=keep)
    top = (body.top_logprobs or 0) if body.logprobs else None
    job = admit(
        request,
        body,
        [ids],
        "chatcmpl",
        lambda length: asked.sampling(room(body.asked_tokens, length, engine.context, limits), logprobs=top),
    )
    answer = ChatAnswer(job, body, server.prompts, family)
    return await respond(request, job, answer, bool(body.stream), body.include_usage)


class ChatAnswer:
    """The answer to one chat request, whole or in chunks."""

    def __init__(self, job: Job, body: ChatRequest, prompts: Prompts, family: Family | None) -> None:
        self._job, self._body, self._prompts = job, body, prompts
        self._parsers = [self._parser(family) for _ in job.tickets]
        self._begun: set[int] = set()

    def _parser(self, family: Family | None) -> Parser | None:
        if family is None:
            return None
        names = {tool.function.name for tool in self._body.tools_in_use}
        if self._body.forced_tool or self._body.tool_choice == "required":
            return ForcedParser(self._body.forced_tool, names)
        return CallParser(family, names, self._prompts.tokenizer.all_special_tokens)

    def response(self, samples: Sequence[Sample], usage: Usage) -> ChatCompletion:
        """All of it."""
        choices = [self._choice(index, sample) for index, sample in enumerate(samples)]
        return ChatCompletion(**self._job.head, choices=choices, usage=usage)

    def _choice(self, index: int, sample: Sample) -> ChatChoice:
        parser, end = self._parsers[index], self._job.ends[index]
        text, calls = sample.text, list[ToolCall]()
        if parser is not None:
            text, calls = _parted([*parser.push(text), *parser.finish()])
        for call in calls:
            call.index = UNSET
        return ChatChoice(
            index,
            Message(text if text or not calls else None, tool_calls=calls or UNSET),
            _reason(end, bool(calls)),
            self._logprobs(sample.logprobs),
            trace_of(self._prompts, sample.tokens, sample.trace, end) if self._body.idlm.trace else UNSET,
        )

    def chunks(self, index: int, event: Delta | Finished) -> list[msgspec.Struct]:
        """The role first, then what is new; the last chunk of a sample has its reason to end."""
        chunks: list[msgspec.Struct] = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(self._chunk(ChunkChoice(index, ChoiceDelta("assistant", ""))))
        if isinstance(event, Delta):
            choice = self._delta(index, event)
            return chunks if choice is None else [*chunks, self._chunk(choice)]
        return [*chunks, *self._end(index, event)]

    def _delta(self, index: int, event: Delta) -> ChunkChoice | None:
        """What a step adds; nothing where its text is held and nobody asked for more."""
        parser, calls = self._parsers[index], list[ToolCall]()
        text = event.text
        if parser is not None:
            text, calls = _parted(parser.push(text))
        choice = ChunkChoice(index, _choice_delta(text, calls), logprobs=self._logprobs(event.logprobs or []))
        if self._body.idlm.trace:
            choice.idlm = trace_of(self._prompts, event.tokens, event.trace or [])
        return choice if text or calls or choice.logprobs or choice.idlm is not UNSET else None

    def _end(self, index: int, event: Finished) -> list[msgspec.Struct]:
        parser = self._parsers[index]
        choices = []
        if parser is not None:
            text, calls = _parted(parser.finish())
            if text or calls:
                choices.append(ChunkChoice(index, _choice_delta(text, calls)))
        last = ChunkChoice(index, ChoiceDelta(), _reason(event, bool(parser and parser.calls)))
        if self._body.idlm.trace:
            last.idlm = trace_of(self._prompts, [], [], event)
        return [self._chunk(choice) for choice in [*choices, last]]

    def _chunk(self, *choices: ChunkChoice, usage: Usage | None = None) -> ChatChunk:
        shown: Usage | None | UnsetType = usage if self._body.include_usage else UNSET
        return ChatChunk(**self._job.head, choices=list(choices), usage=shown)

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """The last one."""
        return self._chunk(usage=usage)

    def _logprobs(self, entries: Sequence[Sequence[Logprob]]) -> ChatLogprobs | None:
        if not self._body.logprobs or not entries:
            return None
        return ChatLogprobs([_logprob(entry, self._body.top_logprobs or 0) for entry in entries])


def _parted(pieces: Sequence[str | ToolCall]) -> tuple[str, list[ToolCall]]:
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, [piece for piece in pieces if isinstance(piece, ToolCall)]


def _choice_delta(text: str, calls: list[ToolCall]) -> ChoiceDelta:
    return ChoiceDelta(content=text or UNSET, tool_calls=calls or UNSET)


def _reason(end: Finished, calls: bool) -> FinishReason:
    if end.reason == "length":
        return "length"
    return "tool_calls" if calls else "stop"


def _logprob(entry: Sequence[Logprob], top: int) -> ChatLogprob:
    """An entry's first is the token itself; it is among the likeliest only if it is one of them."""
    likeliest = sorted(entry, key=lambda one: -one.logprob)[:top]
    own, *others = [
        TopLogprob(one.text, max(one.logprob, LOWEST_LOGPROB), list(one.text.encode()))
        for one in (entry[0], *likeliest)
    ]
    return ChatLogprob(own.token, own.logprob, own.bytes, others)
