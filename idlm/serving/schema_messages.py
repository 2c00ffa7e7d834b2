"""The bodies of /v1/messages and its count_tokens, and their translation to a chat request.

Blocks of the history are read leniently, all else strictly.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from idlm.serving.schema import MOST_STOPS, Stop
from idlm.serving.schema_chat import ChatRequest
from idlm.serving.schema_translated import (
    TEXT_OR_LIST,
    Lenient,
    Translated,
    chat_request,
    known_type,
    system_first,
)
from idlm.serving.strict import Boolean, Strict

BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
RESULTS = ("text",)


class TextBlock(Lenient):
    """A text."""

    type: Literal["text"]
    text: str


class ToolUseBlock(Lenient):
    """A tool call of the model."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Result = Annotated[TextBlock, BeforeValidator(lambda block: known_type(block, RESULTS, "content"))]


Texts = Annotated[
    Annotated[str, Tag("[text]")] | Annotated[list[Result], Field(fail_fast=True), Tag("[list]")],
    TEXT_OR_LIST,
]


class ToolResultBlock(Lenient):
    """The result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None


class ThinkingBlock(Lenient):
    """What the model thought in an earlier turn; it is not shown to the model again."""

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[
    Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Discriminator("type")],
    BeforeValidator(lambda block: known_type(block, BLOCKS, "content")),
]
Blocks = Annotated[
    Annotated[str, Tag("[text]")] | Annotated[list[Block], Field(fail_fast=True), Tag("[list]")],
    TEXT_OR_LIST,
]


class Turn(Lenient):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class CustomTool(Strict):
    """A function that the model may call; the fields after `input_schema` have no effect."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Annotated[Literal[False] | None, Boolean] = None


Tool = Annotated[CustomTool, BeforeValidator(lambda tool: known_type(tool, ("custom",), "tool"))]


class PlainChoice(Strict):
    """Whether the model must call a tool."""

    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Strict):
    """The tool that the model must call."""

    type: Literal["tool"]
    name: Annotated[str, Field(min_length=1)]
    disable_parallel_tool_use: bool | None = None


Choice = Annotated[PlainChoice | NamedChoice, Discriminator("type")]


class Thinking(Strict):
    """Whether the model thinks first, if its chat template leaves a choice."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Strict):
    """JSON that obeys a JSON schema."""

    type: Literal["json_schema"]
    body: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    """The form of the output, and how much the model thinks."""

    effort: str | None = None
    format: OutputFormat | None = None


class Metadata(Strict):
    """Who asks; not used."""

    user_id: str | None = None


class Prompt(Strict):
    """What the prompt is made of."""

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    system: Texts | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None
    speed: Literal["standard"] | None = None

    def prompt_fields(self) -> dict[str, Any]:
        """The fields of a chat request that has this prompt."""
        system = [{"role": "system", "content": _joined(self.system)}] if self.system else []
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": system_first([*system, *(one for t in self.messages for one in _turn(t))]),
            "tools": [_chat_tool(tool) for tool in self.tools or ()] or None,
        }
        if self.messages[-1].role == "assistant":  # the model goes on with it
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.thinking is not None:
            on = self.thinking.type != "disabled"
            fields["chat_template_kwargs"] = {"enable_thinking": on}
            if on and self.thinking.budget_tokens is not None:
                fields["thinking_token_budget"] = self.thinking.budget_tokens
        if self.output_config is not None and self.output_config.effort is not None:
            fields["reasoning_effort"] = self.output_config.effort
        return fields | _choice(self.tool_choice)

    def to_chat(self) -> ChatRequest:
        """The same prompt for /v1/chat/completions.

        Raises:
            ApiError: 400: chat refuses a field.
        """
        return chat_request(self.prompt_fields())


class CountRequest(Prompt):
    """The body of /v1/messages/count_tokens."""


class MessagesRequest(Prompt, Translated):
    """The body of /v1/messages, with Anthropic's fields and the extensions of chat requests."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    metadata: Metadata | None = None  # type: ignore[assignment]
    service_tier: Literal["auto", "standard_only"] | None = None  # type: ignore[assignment]
    stream_options: None = None
    container: None = None
    inference_geo: str | None = None

    def to_chat(self) -> ChatRequest:
        """The same request for /v1/chat/completions.

        Raises:
            ApiError: 400: chat refuses a field.
        """
        fields = self.chat_fields() | self.prompt_fields()
        fields.pop("service_tier", None)
        fields |= {"max_completion_tokens": self.max_tokens, "stop": self.stop_sequences}
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "output", "schema": self.output_config.format.body}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return chat_request(fields)


def _joined(texts: Texts | None) -> str:
    return texts if isinstance(texts, str) else "\n".join(block.text for block in texts or ())


def _turn(turn: Turn) -> list[dict[str, Any]]:
    """The chat messages of a turn: results of tools, and then what was said and called."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": _joined(block.content)}
        for block in turn.content
        if isinstance(block, ToolResultBlock)
    ]
    texts = [block.text for block in turn.content if isinstance(block, TextBlock)]
    calls = [_call(block) for block in turn.content if isinstance(block, ToolUseBlock)]
    said: dict[str, Any] = {"role": turn.role, "content": "\n".join(texts)}
    if calls:
        said["tool_calls"] = calls
    return [*results, said] if texts or calls or not results else results


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {
        "id": block.id,
        "type": "function",
        "function": {"name": block.name, "arguments": arguments},
    }


def _chat_tool(tool: CustomTool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _choice(choice: Choice | None) -> dict[str, Any]:
    """`tool_choice` and `parallel_tool_calls` of chat."""
    if choice is None:
        return {}
    if isinstance(choice, NamedChoice):
        named = {"type": "function", "function": {"name": choice.name}}
        fields: dict[str, Any] = {"tool_choice": named}
    else:
        fields = {"tool_choice": "required" if choice.type == "any" else choice.type}
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields
