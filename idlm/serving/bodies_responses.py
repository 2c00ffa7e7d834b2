"""Bodies of responses of /v1/responses, and the events of its streams, in OpenAI's format."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from idlm.serving.responses import ChatLogprob

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    """A text of the model."""

    text: str = ""
    annotations: list[None] = []
    logprobs: list[ChatLogprob] = []


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    """A text that the model thought."""

    text: str = ""


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    """A message of the model."""

    id: str
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class OutputReasoning(msgspec.Struct, tag_field="type", tag="reasoning"):
    """What the model thought before its message."""

    id: str
    status: Status = "in_progress"
    summary: list[None] = []
    content: list[ReasoningText] = []
    encrypted_content: None = None


class OutputCall(msgspec.Struct, tag_field="type", tag="function_call"):
    """A tool call of the model; `arguments` is JSON text."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "in_progress"


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputDetails(msgspec.Struct):
    """Prompt tokens found in the prefix cache; writing to it is free."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    """Tokens of thoughts; drafts that became tokens, and drafts that were rejected."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class ResponsesUsage(msgspec.Struct):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseFailure(msgspec.Struct):
    """Why a stream broke off."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(msgspec.Struct):
    """Why the output is cut."""

    reason: Literal["max_output_tokens"]


class ResponseObject(msgspec.Struct):
    """The response of /v1/responses; fields of the request are repeated."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[OutputItem]
    parallel_tool_calls: bool
    tool_choice: Any
    tools: list[Any]
    text: dict[str, Any]
    reasoning: dict[str, Any]
    object: Literal["response"] = "response"
    completed_at: int | None = None
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = {}
    previous_response_id: None = None
    background: Literal[False] = False
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int = 0
    truncation: Literal["disabled"] = "disabled"
    usage: ResponsesUsage | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ResponseEvent(msgspec.Struct, kw_only=True):
    """An event in the stream; the events of a stream are numbered from 0."""

    sequence_number: int = -1


class WholeEvent(ResponseEvent, kw_only=True):
    """An event with the response as it is now."""

    response: ResponseObject


class Created(WholeEvent, tag_field="type", tag="response.created"):
    """The request is being run."""


class InProgress(WholeEvent, tag_field="type", tag="response.in_progress"):
    """The engine has begun."""


class Completed(WholeEvent, tag_field="type", tag="response.completed"):
    """The end of a stream."""


class Incomplete(WholeEvent, tag_field="type", tag="response.incomplete"):
    """The end of a stream that was cut at its limit."""


class Failed(WholeEvent, tag_field="type", tag="response.failed"):
    """The end of a stream that broke off."""


class ItemEvent(ResponseEvent, kw_only=True):
    """An event about an item of the output."""

    output_index: int


class ItemAdded(ItemEvent, tag_field="type", tag="response.output_item.added"):
    """An item begins."""

    item: OutputItem


class ItemDone(ItemEvent, tag_field="type", tag="response.output_item.done"):
    """An item is whole."""

    item: OutputItem


class PartEvent(ItemEvent, kw_only=True):
    """An event about a part of an item."""

    item_id: str
    content_index: int = 0


class PartAdded(PartEvent, tag_field="type", tag="response.content_part.added"):
    """A part begins."""

    part: OutputText | ReasoningText


class PartDone(PartEvent, tag_field="type", tag="response.content_part.done"):
    """A part is whole."""

    part: OutputText | ReasoningText


class TextDelta(PartEvent, tag_field="type", tag="response.output_text.delta"):
    """More text."""

    delta: str
    logprobs: list[ChatLogprob]


class TextDone(PartEvent, tag_field="type", tag="response.output_text.done"):
    """The whole text of a part."""

    text: str
    logprobs: list[ChatLogprob]


class ReasoningDelta(PartEvent, tag_field="type", tag="response.reasoning_text.delta"):
    """More of a thought."""

    delta: str


class ReasoningDone(PartEvent, tag_field="type", tag="response.reasoning_text.done"):
    """The whole thought."""

    text: str


class ArgumentsEvent(ItemEvent, kw_only=True):
    """An event about the arguments of a call."""

    item_id: str


class ArgumentsDelta(
    ArgumentsEvent, tag_field="type", tag="response.function_call_arguments.delta"
):
    """More of the arguments' JSON text."""

    delta: str


class ArgumentsDone(ArgumentsEvent, tag_field="type", tag="response.function_call_arguments.done"):
    """The whole arguments."""

    name: str
    arguments: str


EVENTS = (
    *(Created, InProgress, Completed, Incomplete, Failed, ItemAdded, ItemDone),
    *(PartAdded, PartDone, TextDelta, TextDone, ReasoningDelta, ReasoningDone),
    *(ArgumentsDelta, ArgumentsDone),
)
"""Every type of event."""
