"""Bodies of /v1/chat/completions, and of /tokenize for messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from idlm.chat_template import PromptEncoder
from idlm.engine.guide import calls_grammar, or_calls
from idlm.params import MOST_LOGPROBS, Guide, Thinking
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError
from idlm.serving.neutral import ChatNeutral, Off, only
from idlm.serving.prompts import Prompts
from idlm.serving.reasoning import Reasoner, effort_options
from idlm.serving.schema import Generation
from idlm.serving.schema_tools import AllowedTools, NamedTool, Tool, ToolChoice, arguments_schema
from idlm.serving.strict import Strict, decode
from idlm.serving.structured import Wish, schema_wish
from idlm.serving.tools import family_of

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


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Budget = Annotated[int, Field(ge=0, lt=2**31)]
MOST_CALLS = 16
"""Of a forced `tool_choice`, so that a weak model comes to an end."""


class Conversation(Strict):
    """The input of a chat template."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Scalar] | None = None
    add_special_tokens: Annotated[Off, only(False, instead="the chat template writes them all")] = (
        None
    )

    def encoder(self, prompts: PromptEncoder) -> Callable[[], list[int]]:
        """A function that gives the token ids; the template's input is converted now.

        Raises:
            ApiError: 400: the arguments of a tool call are not a JSON object, or the last message
                is to be both continued and followed by an answer.
        """
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                400,
                "continue_final_message with add_generation_prompt; set one of them to false",
                "continue_final_message",
            )
        opens = bool(self.continue_final_message)
        answers = not opens if self.add_generation_prompt is None else self.add_generation_prompt
        messages, tools = self.template_messages(), self.template_tools()
        return lambda: prompts.chat(messages, tools, answers, self.template_options(prompts), opens)

    def template_options(self, prompts: PromptEncoder) -> dict[str, Any]:
        return dict(self.chat_template_kwargs or {})

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
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    reasoning_effort: Effort | None = None
    thinking_token_budget: Budget | None = None
    thinking_budget: Budget | None = None

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
        if isinstance(self.tool_choice, AllowedTools):
            names = self.tool_choice.names
            return [tool for tool in self.tools or () if tool.function.name in names]
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def forced_tool(self) -> str | None:
        """The name of the function that the model must call."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def forces_tools(self) -> bool:
        """Whether the output is a call, or several."""
        choice = self.tool_choice
        mode = choice.allowed_tools.mode if isinstance(choice, AllowedTools) else choice
        return mode == "required" or isinstance(choice, NamedTool)

    @property
    def single_call(self) -> bool:
        """Whether the output has at most one call."""
        return self.parallel_tool_calls is False

    @property
    def inline_thoughts(self) -> bool:
        """Whether thoughts stay in the content, as they were written; they can also be left out."""
        return self.separate_reasoning is False and self.include_reasoning is not False

    @property
    def thoughts_budget(self) -> int | None:
        """The most tokens of thoughts; None: no limit."""
        first, second = self.thinking_token_budget, self.thinking_budget
        return second if first is None else first

    @property
    def echoed(self) -> str:
        """What the answer begins with: the last message, if the request has `echo` and the
        assistant wrote it."""
        last = self.template_messages()[-1] if self.echo else {}
        return str(last["content"]) if last.get("role") == "assistant" else ""

    def thoughts(self, reasoner: Reasoner | None, prompt: Sequence[int]) -> Thinking | None:
        """The thoughts that the output after `prompt` may begin with.

        Raises:
            ApiError: 400: a budget for thoughts that the server cannot tell from the answer.
        """
        if reasoner is not None:
            return reasoner.thinking(prompt, self.thoughts_budget)
        if self.thoughts_budget is not None:
            raise ApiError(
                400,
                f"a budget of {self.thoughts_budget} thinking tokens, and this server knows no "
                "thoughts of this model; leave it out, or serve it with --reasoning-parser",
                "thinking_token_budget",
            )
        return None

    def template_options(self, prompts: PromptEncoder) -> dict[str, Any]:
        """With those for `reasoning_effort`; the request's own go first."""
        effort = effort_options(self.reasoning_effort, prompts.template_for(bool(self.tools)))
        return effort | super().template_options(prompts)

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
        self._check_tools()

    def _check_tools(self) -> None:
        choice, known = self.tool_choice, {tool.function.name for tool in self.tools or ()}
        if choice not in (None, "none", "auto") and not known:
            raise ApiError(
                400, "tool_choice asks for a tool, and tools names none; add one", "tool_choice"
            )
        asked = choice.names if isinstance(choice, AllowedTools) else [self.forced_tool]
        for name in asked:
            if name is not None and name not in known:
                raise ApiError(
                    400, f"tool_choice names {name!r}, which is not in tools", "tool_choice"
                )

    def form_or_calls(self, guide: Guide | None, prompts: Prompts) -> Guide | None:
        """The guide for a request that may also call tools."""
        if guide is None or self.forces_tools or not self.tools_in_use:
            return guide
        form = family_of(prompts.template_for(True)).form
        names = [tool.function.name for tool in self.tools_in_use]
        return guide if form is None else or_calls(guide, names, self._most_calls, form)

    @property
    def _most_calls(self) -> int:
        return 1 if self.single_call else MOST_CALLS

    def wishes(self) -> Iterator[Wish]:
        """Includes the guide of a forced `tool_choice`. It leaves no content, so that
        `response_format` has no effect."""
        for wish in super().wishes():
            if not (self.forces_tools and wish[2] == "response_format"):
                yield wish
        if self.forces_tools:
            schemas = {
                tool.function.name: arguments_schema(tool.function.name, tool.function.parameters)
                for tool in self.tools_in_use
            }
            if self.forced_tool:
                yield from schema_wish(schemas[self.forced_tool], "tools")
            else:
                yield (
                    "grammar",
                    calls_grammar(schemas, self._most_calls),
                    "tools",
                )


class TokenizeMessages(Conversation):
    """The body of /tokenize for messages."""

    model: str | None = None
    return_token_strs: bool | None = None
