"""Bodies of responses of /v1/messages, and the events of its streams, in Anthropic's format."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextContent(msgspec.Struct, tag_field="type", tag="text"):
    """A text of the model."""

    text: str = ""


class ThinkingContent(msgspec.Struct, tag_field="type", tag="thinking"):
    """What the model thought before; it is not signed."""

    thinking: str = ""
    signature: str = ""


class ToolUseContent(msgspec.Struct, tag_field="type", tag="tool_use"):
    """A tool call of the model."""

    id: str
    name: str
    input: dict[str, Any] = {}


Content = TextContent | ThinkingContent | ToolUseContent


class MessagesUsage(msgspec.Struct):
    """Token counts; the prompt has the sum of the three input counts."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class MessageObject(msgspec.Struct, tag_field="type", tag="message"):
    """The response of /v1/messages."""

    id: str
    model: str
    content: list[Content]
    usage: MessagesUsage
    role: Literal["assistant"] = "assistant"
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


class TokenCount(msgspec.Struct):
    """The response of /v1/messages/count_tokens."""

    input_tokens: int


class TextPiece(msgspec.Struct, tag_field="type", tag="text_delta"):
    """More text."""

    text: str


class ThinkingPiece(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    """More of a thought."""

    thinking: str


class InputPiece(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    """More of the JSON text of a call's input."""

    partial_json: str


class MessageStart(msgspec.Struct, tag_field="type", tag="message_start"):
    """The first event; the message is empty."""

    message: MessageObject


class Ping(msgspec.Struct, tag_field="type", tag="ping"):
    """Says nothing."""


class BlockStart(msgspec.Struct, tag_field="type", tag="content_block_start"):
    """A block begins; it is empty."""

    index: int
    content_block: Content


class BlockDelta(msgspec.Struct, tag_field="type", tag="content_block_delta"):
    """A block grows."""

    index: int
    delta: TextPiece | ThinkingPiece | InputPiece


class BlockStop(msgspec.Struct, tag_field="type", tag="content_block_stop"):
    """A block is whole."""

    index: int


class Stopped(msgspec.Struct):
    """Why the model stopped."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag_field="type", tag="message_delta"):
    """The end of a message, with all its tokens counted."""

    delta: Stopped
    usage: MessagesUsage


class MessageStop(msgspec.Struct, tag_field="type", tag="message_stop"):
    """The last event."""


EVENTS = (MessageStart, Ping, BlockStart, BlockDelta, BlockStop, MessageDelta, MessageStop)
"""Every type of event besides the error."""
