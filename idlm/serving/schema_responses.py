"""The body of /v1/responses and its translation to a chat request.

Nothing is stored: a request carries its whole conversation. Items of the history are read
leniently, all else strictly.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from idlm.params import MOST_LOGPROBS
from idlm.serving.neutral import only
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

TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
ITEMS = ("message", "function_call", "function_call_output", "reasoning")
LOGPROBS = "message.output_text.logprobs"
NAMES = {
    **{"messages": "input", "prompt": "input"},
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
}
"""By the name of a field of chat, its name here."""


class ItemPart(Lenient):
    """A text of a message or of a tool's output."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str | None = None
    refusal: str | None = None


Part = Annotated[ItemPart, BeforeValidator(lambda part: known_type(part, TEXT_PARTS, "content"))]
Text = Annotated[
    Annotated[str, Tag("[text]")] | Annotated[list[Part], Field(fail_fast=True), Tag("[list]")],
    TEXT_OR_LIST,
]


def joined(text: Text) -> str:
    """A content as one text; each part begins a line, and a refusal counts as its text."""
    if isinstance(text, str):
        return text
    return "\n".join(part.text or part.refusal or "" for part in text)


class MessageItem(Lenient):
    """A message; `type` may be missing."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text


class FunctionCallItem(Lenient):
    """A tool call of the model in the history."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutputItem(Lenient):
    """The result of a tool call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text


class ReasoningItem(Lenient):
    """What the model thought in an earlier turn; it is not shown to the model again."""

    type: Literal["reasoning"]


def _tag(item: object) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return f"[{kind or 'message'}]"


Item = Annotated[
    Annotated[
        Annotated[MessageItem, Tag("[message]")]
        | Annotated[FunctionCallItem, Tag("[function_call]")]
        | Annotated[FunctionOutputItem, Tag("[function_call_output]")]
        | Annotated[ReasoningItem, Tag("[reasoning]")],
        Discriminator(_tag),
    ],
    BeforeValidator(lambda item: known_type(item, ITEMS, "item")),
]


class FunctionTool(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Strict):
    """The function that the model must call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]


FUNCTION = ("function",)
Tool = Annotated[FunctionTool, BeforeValidator(lambda tool: known_type(tool, FUNCTION, "tool"))]
Choice = Annotated[
    FunctionChoice, BeforeValidator(lambda choice: known_type(choice, FUNCTION, "tool_choice"))
]


class TextFormat(Strict):
    """Any text, any JSON object, or JSON that obeys a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    body: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    """The form of the output."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Strict):
    """How much the model thinks; summaries are never made."""

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesStreamOptions(Strict):
    """Random padding of events is not made."""

    include_obfuscation: Annotated[Literal[False] | None, Boolean] = None


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""All but the first belong to items that this server never makes."""


def _stateless(value: object) -> object:
    if value is not None:
        raise ValueError("this server stores nothing; send the whole conversation in input")
    return value


Stored = Annotated[None, BeforeValidator(_stateless)]


Input = Annotated[
    Annotated[str, Tag("[text]")]
    | Annotated[list[Item], Field(min_length=1, fail_fast=True), Tag("[list]")],
    TEXT_OR_LIST,
]


class ResponsesRequest(Translated):
    """The body of /v1/responses, with OpenAI's fields and the extensions of chat requests."""

    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    include: list[Includable] | None = None
    truncation: Annotated[
        Literal["disabled"] | None,
        only("disabled", instead="send fewer items, or truncate_prompt_tokens"),
    ] = None
    background: Annotated[Literal[False] | None, Boolean] = None
    stream_options: ResponsesStreamOptions | None = None  # type: ignore[assignment]
    chat_template_kwargs: dict[str, str | bool | int | float | None] | None = None
    previous_response_id: Stored = None
    conversation: Stored = None
    prompt: Stored = None

    def to_chat(self) -> ChatRequest:
        """The same request for /v1/chat/completions.

        Raises:
            ApiError: 400: chat refuses a field.
        """
        names = {"top_logprobs", "parallel_tool_calls", "chat_template_kwargs"}
        fields = self.chat_fields() | self.model_dump(include=names, exclude_none=True)
        fields.pop("store", None)  # it has no effect: nothing is stored either way
        fields |= {
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": LOGPROBS in (self.include or ()),
            "tools": [_chat_tool(tool) for tool in self.tools or ()] or None,
            "tool_choice": _chat_choice(self.tool_choice),
        }
        if self.text and self.text.format is not None:
            fields["response_format"] = _chat_format(self.text.format)
        if self.text and self.text.verbosity is not None:
            fields["verbosity"] = self.text.verbosity
        if self.reasoning and self.reasoning.effort is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        return chat_request(fields)

    def _messages(self) -> list[dict[str, Any]]:
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            _add(messages, item)
        return system_first(messages)


def _add(messages: list[dict[str, Any]], item: Item) -> None:
    """Append an item to messages of chat; calls belong to the assistant's message before them."""
    if isinstance(item, MessageItem):
        messages.append({"role": item.role, "content": joined(item.content)})
    elif isinstance(item, FunctionOutputItem):
        fields = {"tool_call_id": item.call_id, "content": joined(item.output)}
        messages.append({"role": "tool", **fields})
    elif isinstance(item, FunctionCallItem):
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _chat_choice(choice: str | FunctionChoice | None) -> str | dict[str, Any] | None:
    if isinstance(choice, FunctionChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _chat_format(format: TextFormat) -> dict[str, Any]:
    fields = format.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
    if format.type != "json_schema":
        return {"type": format.type} | fields  # chat refuses fields that do not belong to it
    return {"type": "json_schema", "json_schema": {"name": "output"} | fields}
