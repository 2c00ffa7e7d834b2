"""Bodies of /v1/chat/completions, and of /tokenize for messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from idlm.chat_template import PromptEncoder
from idlm.params import MOST_LOGPROBS
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError
from idlm.serving.neutral import ChatNeutral, only
from idlm.serving.schema import Generation, schema_guide
from idlm.serving.strict import Boolean, Strict, decode

Scalar = str | bool | int | float | None


class History(Strict):
    """A part of a conversation. It may have been written by other servers and for other models, so
    fields that are not known here are ignored."""

    model_config = ConfigDict(extra="ignore")


class TextPart(History):
    """A text as a part of a message's content; no other type is supported. OpenAI's responses have
    the other two names."""

    type: Annotated[
        Literal["text", "input_text", "output_text"],
        only("text", "input_text", "output_text", instead="the model reads no other parts"),
    ]
    text: str


Content = str | Annotated[list[TextPart], Field(fail_fast=True)] | None


class AnyMessage(History):
    """Fields that all messages may have. A null `content` is as good as an empty one."""

    name: str | None = None


class PlainMessage(AnyMessage):
    """Instructions, a message of the user, or one of a role that the chat template may know. The
    role "developer" is OpenAI's newer name of "system"."""

    role: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    content: Content


class CalledFunction(History):
    """The name of a called function, and its arguments as JSON text. No text means no arguments."""

    name: str
    arguments: str | dict[str, Any] | None = None


class CallMade(History):
    """A tool call in an earlier message of the assistant."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class AssistantMessage(AnyMessage):
    """An earlier answer. Templates that show thoughts call them `reasoning_content`; `reasoning` is
    vLLM's newer name."""

    role: Literal["assistant"]
    content: Content = None
    reasoning_content: str | None = None
    reasoning: Annotated[str | None, Field(exclude=True)] = None
    function_call: Annotated[None, only(instead="send tool_calls")] = None
    tool_calls: list[CallMade] | None = None


class ToolMessage(AnyMessage):
    """The result of a tool call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str


def _kind(message: object) -> str:
    """The tag of a message's class: its role, or "plain"."""
    role = message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
    return role if role in ("assistant", "tool") else "plain"


Message = Annotated[
    Annotated[PlainMessage, Tag("plain")]
    | Annotated[AssistantMessage, Tag("assistant")]
    | Annotated[ToolMessage, Tag("tool")],
    Discriminator(_kind),
]


class Function(Strict):
    """The function of a tool; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function in `tool_choice`."""

    name: str


class NamedTool(Strict):
    """The tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class PlainFormat(Strict):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


# `BaseModel.schema` exists, hence the alias
class JsonSchema(Strict):
    """A JSON schema in OpenAI's wrapping. The output always obeys it, as if `strict` were true."""

    name: str
    description: str | None = None
    body: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON that obeys a JSON schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainFormat | SchemaFormat, Discriminator("type")]


class Conversation(Strict):
    """The input of a chat template."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Scalar] | None = None

    def encoder(self, prompts: PromptEncoder) -> Callable[[], list[int]]:
        """A function that gives the token ids; the template's input is converted now.

        Raises:
            ApiError: 400: the arguments of a tool call are not a JSON object.
        """
        messages, tools = self.template_messages(), self.template_tools()
        return lambda: prompts.chat(
            messages, tools, self.add_generation_prompt, self.chat_template_kwargs
        )

    def template_messages(self) -> list[dict[str, Any]]:
        """The messages as templates expect them.

        Contents become texts, "developer" becomes "system", and arguments become objects.

        Raises:
            ApiError: 400: the arguments of a tool call are not a JSON object.
        """
        return [_template_message(message) for message in self.messages]

    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools as templates expect them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools] if self.tools else None


def _template_message(message: Message) -> dict[str, Any]:
    fields = message.model_dump(exclude_none=True)
    fields["role"] = "system" if message.role == "developer" else message.role
    content = message.content or ""
    fields["content"] = (
        content if isinstance(content, str) else "\n".join(part.text for part in content)
    )
    if isinstance(message, AssistantMessage) and message.reasoning_content is None:
        fields |= {"reasoning_content": message.reasoning} if message.reasoning else {}
    for call in fields.get("tool_calls", ()):
        call.setdefault("type", "function")
        given = call["function"].get("arguments") or {}
        arguments = decode(given, "tool_calls arguments") if isinstance(given, str) else given
        if not isinstance(arguments, dict):
            raise ApiError(
                400,
                "tool_calls arguments are not a JSON object; send them as they came",
                "messages",
            )
        call["function"]["arguments"] = arguments
    return fields


class ChatRequest(Conversation, ChatNeutral, Generation):
    """The body of /v1/chat/completions, with OpenAI's fields and those of idlm."""

    kind: ClassVar = "chatcmpl"
    """Prefix of the response's id."""
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Annotated[Literal[True] | None, Boolean] = None
    reasoning_effort: None = None

    @property
    def asked_tokens(self) -> int | None:
        """max_completion_tokens, else max_tokens; None: what the context leaves."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def origins(self) -> dict[str, str]:
        """The prompt is made of the messages; some fields have OpenAI's names for chat."""
        named = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            named["max_tokens"] = "max_completion_tokens"
        return super().origins | named

    @property
    def top(self) -> int | None:
        """`top_logprobs` if `logprobs` is set, else None."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def tools_in_use(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def forced_tool(self) -> str | None:
        """The name of the function that the model must call."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    def check(self, limits: Limits) -> None:
        """The checks of every request, and those of chat.

        Raises:
            ApiError: 400, naming the field.
        """
        super().check(limits)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(
                400, "top_logprobs without logprobs; set logprobs to true", "top_logprobs"
            )
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ApiError(
                400, "tool_choice asks for a tool, and tools names none; add one", "tool_choice"
            )
        if self.forced_tool and self.forced_tool not in {
            tool.function.name for tool in self.tools or ()
        }:
            raise ApiError(
                400, f"tool_choice names {self.forced_tool!r}, which is not in tools", "tool_choice"
            )

    def guides(self) -> list[tuple[str, str]]:
        """Includes the guides of `response_format` and of a forced `tool_choice`."""
        guides = super().guides()
        if isinstance(self.response_format, SchemaFormat):
            guides.append(schema_guide(self.response_format.json_schema.body, "response_format"))
        elif self.response_format is not None and self.response_format.type == "json_object":
            guides.append(("json_object", ""))
        if self.tool_choice == "required" or self.forced_tool:
            guides.append(schema_guide(self._calls_schema(), "tools"))
        return guides

    def _calls_schema(self) -> dict[str, Any]:
        """The arguments of the forced function, or a list of calls of any function."""
        parameters = {
            tool.function.name: tool.function.parameters or {"type": "object"}
            for tool in self.tools or ()
        }
        if self.forced_tool:
            return parameters[self.forced_tool]
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": schema},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for name, schema in parameters.items()
        ]
        return {"type": "array", "minItems": 1, "items": {"anyOf": calls}}


class TokenizeMessages(Conversation):
    """The body of /tokenize for messages."""

    model: str | None = None
    return_token_strs: bool | None = None
