"""From a chat answer to the items and events of /v1/responses."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from time import time
from typing import Any

import msgspec
from msgspec import UnsetType
from msgspec.structs import replace

from idlm.serving.answers import ChatAnswer, TranslatedAnswer, thought
from idlm.serving.bodies_responses import (
    ArgumentsDelta,
    ArgumentsDone,
    Completed,
    Created,
    Failed,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputDetails,
    ItemAdded,
    ItemDone,
    OutputCall,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    ReasoningText,
    ResponseEvent,
    ResponseFailure,
    ResponseObject,
    ResponsesUsage,
    TextDelta,
    TextDone,
    WholeEvent,
)
from idlm.serving.errors import ApiError
from idlm.serving.responses import ChatLogprob, ChunkChoice, Usage
from idlm.serving.schema_responses import ResponsesRequest
from idlm.serving.wire import Delta


class ResponsesAnswer(TranslatedAnswer):
    """Builds the response to a request of /v1/responses."""

    def __init__(self, chat: ChatAnswer, body: ResponsesRequest) -> None:
        super().__init__(chat)
        self._object = _begun(chat, body)
        self._logprobs: list[ChatLogprob] = []  # of text that is held back
        self._call: int | UnsetType | None = None  # the index of the call that is open
        self._numbered = 0

    def response(self, samples: Sequence[Sequence[Delta]], usage: Usage) -> ResponseObject:
        self.run(samples)
        return self._final(usage).response

    def encode(self, chunks: Sequence[msgspec.Struct]) -> bytes:
        for event in chunks:
            assert isinstance(event, ResponseEvent)
            event.sequence_number = self._numbered
            self._numbered += 1
        return super().encode(chunks)

    def last(self) -> bytes:
        return self.encode([self._final(self.job.usage())])

    def failure(self, error: ApiError) -> bytes:
        failed = ResponseFailure("server_error", str(error.detail))
        self._object.status, self._object.error = "failed", failed
        if self._open is not None:
            self._open.status = "incomplete"
        return self.encode([Failed(response=self._object)])

    @property
    def _open(self) -> OutputItem | None:
        """The item that is being written."""
        last = self._object.output[-1] if self._object.output else None
        return last if last is not None and last.status == "in_progress" else None

    @property
    def _at(self) -> int:
        return len(self._object.output) - 1

    def events(self, choice: ChunkChoice) -> Iterator[ResponseEvent]:
        delta = choice.delta
        if delta.role:
            # copies: events are encoded when the whole chunk has been translated
            yield Created(response=replace(self._object, output=[]))
            yield InProgress(response=replace(self._object, output=[]))
        if choice.logprobs is not None:
            self._logprobs += choice.logprobs.content
        if text := thought(delta):
            yield from self._think(text)
        if delta.content:
            yield from self._write(delta.content)
        for call in delta.tool_calls or ():
            if self._call != call.index:
                yield from self._begin(OutputCall(_id("fc"), str(call.id), str(call.function.name)))
                self._call = call.index
            if call.function.arguments:
                yield self._argue(call.function.arguments)
        if choice.finish_reason is not None:
            cut = choice.finish_reason == "length"
            yield from self._close("incomplete" if cut else "completed")

    def _think(self, text: str) -> Iterator[ResponseEvent]:
        if not isinstance(self._open, OutputReasoning):
            yield from self._begin(OutputReasoning(_id("rs"), content=[ReasoningText()]))
        item = self._open
        assert isinstance(item, OutputReasoning)
        item.content[0].text += text
        yield ReasoningDelta(output_index=self._at, item_id=item.id, delta=text)

    def _write(self, text: str) -> Iterator[ResponseEvent]:
        if not isinstance(self._open, OutputMessage):
            yield from self._begin(OutputMessage(_id("msg"), content=[OutputText()]))
        item, logprobs = self._open, self._logprobs
        assert isinstance(item, OutputMessage)
        item.content[0].text += text
        item.content[0].logprobs += logprobs
        self._logprobs = []
        yield TextDelta(output_index=self._at, item_id=item.id, delta=text, logprobs=logprobs)

    def _argue(self, text: str) -> ResponseEvent:
        item = self._open
        assert isinstance(item, OutputCall)
        item.arguments += text
        return ArgumentsDelta(output_index=self._at, item_id=item.id, delta=text)

    def _begin(self, item: OutputItem) -> Iterator[ResponseEvent]:
        """Close the item that is open and begin another; its part begins empty."""
        yield from self._close()
        if not isinstance(item, OutputMessage):
            self._logprobs = []  # of tokens that are no text of a message
        self._object.output.append(item)
        bare = replace(item) if isinstance(item, OutputCall) else replace(item, content=[])
        yield ItemAdded(output_index=self._at, item=bare)
        if not isinstance(item, OutputCall):
            part = type(item.content[0])()
            yield PartAdded(output_index=self._at, item_id=item.id, part=part)

    def _close(self, status: Any = "completed") -> Iterator[ResponseEvent]:
        """The last events of the item that is open."""
        item, self._call = self._open, None
        if item is None:
            return
        at: dict[str, Any] = {"output_index": self._at, "item_id": item.id}
        item.status = status
        if isinstance(item, OutputCall):
            yield ArgumentsDone(**at, name=item.name, arguments=item.arguments)
        else:
            (part,) = item.content
            if isinstance(part, ReasoningText):
                yield ReasoningDone(**at, text=part.text)
            else:
                part.logprobs += self._logprobs
                self._logprobs = []
                yield TextDone(**at, text=part.text, logprobs=part.logprobs)
            yield PartDone(**at, part=part)
        yield ItemDone(output_index=self._at, item=item)

    def _final(self, usage: Usage) -> WholeEvent:
        done = self._object
        done.usage, done.completed_at = _usage(usage), int(time())
        if self.job.ends[0].reason == "length":
            done.status = "incomplete"
            done.incomplete_details = IncompleteDetails("max_output_tokens")
            return Incomplete(response=done)
        done.status = "completed"
        return Completed(response=done)


def _begun(chat: ChatAnswer, body: ResponsesRequest) -> ResponseObject:
    """The response before its first item."""
    echoed = body.model_dump(exclude_none=True, by_alias=True)
    head = chat.job.head
    same = (
        *("instructions", "max_output_tokens", "max_tool_calls", "metadata", "temperature"),
        *("top_p", "top_logprobs", "user", "safety_identifier", "prompt_cache_key"),
    )
    return ResponseObject(
        id=_id("resp"),
        created_at=head["created"],
        model=head["model"],
        status="in_progress",
        output=[],
        parallel_tool_calls=echoed.get("parallel_tool_calls", True),
        tool_choice=echoed.get("tool_choice", "auto"),
        tools=[{"parameters": None, "strict": None} | tool for tool in echoed.get("tools", ())],
        text={"format": {"type": "text"}} | echoed.get("text", {}),
        reasoning={"effort": None, "summary": None} | echoed.get("reasoning", {}),
        **{name: echoed[name] for name in same if name in echoed},
    )


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


def _usage(usage: Usage) -> ResponsesUsage:
    cached, drafts = usage.prompt_tokens_details, usage.completion_tokens_details
    return ResponsesUsage(
        usage.prompt_tokens,
        InputDetails(cached.cached_tokens if cached else 0),
        usage.completion_tokens,
        OutputDetails(
            drafts.reasoning_tokens if drafts else 0,
            drafts.accepted_prediction_tokens if drafts else 0,
            drafts.rejected_prediction_tokens if drafts else 0,
        ),
        usage.total_tokens,
    )
