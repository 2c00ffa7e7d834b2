"""From a chat answer to the blocks and events of /v1/messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import msgspec
from msgspec import UnsetType

from idlm.serving.answers import ChatAnswer, TranslatedAnswer, thought
from idlm.serving.bodies_messages import (
    BlockDelta,
    BlockStart,
    BlockStop,
    Content,
    InputPiece,
    MessageDelta,
    MessageObject,
    MessageStart,
    MessageStop,
    MessagesUsage,
    Ping,
    Stopped,
    StopReason,
    TextContent,
    TextPiece,
    ThinkingContent,
    ThinkingPiece,
    ToolUseContent,
)
from idlm.serving.errors import ApiError
from idlm.serving.responses import ChunkChoice, Usage
from idlm.serving.wire import Delta


class MessagesAnswer(TranslatedAnswer):
    """Builds the response to a request of /v1/messages."""

    def __init__(self, chat: ChatAnswer) -> None:
        super().__init__(chat)
        head = chat.job.head
        usage = MessagesUsage(sum(map(len, chat.job.prompts)), 0)
        id = f"msg_{head['id'].rpartition('-')[2]}"
        self._message = MessageObject(id, head["model"], [], usage)
        self._open = False
        self._call: int | UnsetType | None = None  # the index of the call that is open
        self._arguments = ""
        self._calls = False

    def response(self, samples: Sequence[Sequence[Delta]], usage: Usage) -> MessageObject:
        self.run(samples)
        message, end = self._message, self._stopped()
        message.usage = _usage(usage)
        message.stop_reason, message.stop_sequence = end.stop_reason, end.stop_sequence
        return message

    def last(self) -> bytes:
        usage = _usage(self.job.usage())
        return self.encode([MessageDelta(self._stopped(), usage), MessageStop()])

    def failure(self, error: ApiError) -> bytes:
        return self.encode([error.messages_body])

    @property
    def _at(self) -> int:
        return len(self._message.content) - 1

    def events(self, choice: ChunkChoice) -> Iterator[msgspec.Struct]:
        delta = choice.delta
        if delta.role:
            # a copy: events are encoded when the whole chunk has been translated
            yield MessageStart(msgspec.structs.replace(self._message, content=[]))
            yield Ping()
        if text := thought(delta):
            yield from self._think(text)
        if delta.content:
            yield from self._write(delta.content)
        for call in delta.tool_calls or ():
            if self._call != call.index:
                yield from self._begin(ToolUseContent(str(call.id), str(call.function.name)))
                self._call, self._calls = call.index, True
            if call.function.arguments:
                self._arguments += call.function.arguments
                yield BlockDelta(self._at, InputPiece(call.function.arguments))
        if choice.finish_reason is not None:
            yield from self._close()

    def _think(self, text: str) -> Iterator[msgspec.Struct]:
        block = self._message.content[-1] if self._open else None
        if not isinstance(block, ThinkingContent):
            block = ThinkingContent()
            yield from self._begin(block)
        block.thinking += text
        yield BlockDelta(self._at, ThinkingPiece(text))

    def _write(self, text: str) -> Iterator[msgspec.Struct]:
        block = self._message.content[-1] if self._open else None
        if not isinstance(block, TextContent):
            block = TextContent()
            yield from self._begin(block)
        block.text += text
        yield BlockDelta(self._at, TextPiece(text))

    def _begin(self, block: Content) -> Iterator[msgspec.Struct]:
        """Close the block that is open and begin another."""
        yield from self._close()
        self._message.content.append(block)
        self._open = True
        yield BlockStart(self._at, msgspec.structs.replace(block))

    def _close(self) -> Iterator[msgspec.Struct]:
        if not self._open:
            return
        block = self._message.content[-1]
        if isinstance(block, ToolUseContent):
            block.input = _object(self._arguments)
        self._open, self._call, self._arguments = False, None, ""
        yield BlockStop(self._at)

    def _stopped(self) -> Stopped:
        end = self.job.ends[0]
        if end.reason == "length":
            return Stopped("max_tokens", None)
        reason: StopReason = "tool_use" if self._calls else "end_turn"
        if isinstance(end.stop, str) and not self._calls:
            return Stopped("stop_sequence", end.stop)
        return Stopped(reason, None)


def _object(arguments: str) -> dict[str, object]:
    """The input of a call; of one that was cut there is nothing to use."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _usage(usage: Usage) -> MessagesUsage:
    details = usage.prompt_tokens_details
    cached = details.cached_tokens if details else 0
    return MessagesUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)
