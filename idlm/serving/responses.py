"""What the server answers, in OpenAI's shapes; msgspec, since a chunk of a stream has to cost
microseconds."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(msgspec.Struct):
    """Prompt tokens that were in the prefix cache."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct):
    """Drafts that became tokens, and drafts that were looked at and did not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a request; a prompt counts once, however many samples it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TraceEntry(msgspec.Struct):
    """A token, its id, where it came from, and the number of its forward."""

    token: str
    id: int
    source: Literal["first", "accepted", "corrected", "bonus"]
    forward: int


class Trace(msgspec.Struct):
    """The tokens of a sample, and at its end its tokens per forward."""

    trace: list[TraceEntry]
    tpf: float | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """A likely token; `bytes` of its text."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    """A token, and the likeliest in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """One entry a token."""

    content: list[ChatLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct):
    """A function's name and its arguments, JSON as text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that the model asks for; `index` in streams."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | UnsetType = UNSET


class Message(msgspec.Struct):
    """An answer."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One sample."""

    index: int
    message: Message
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    idlm: Trace | UnsetType = UNSET


class Head(msgspec.Struct):
    """What every answer, and every event of a stream, begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Head):
    """Answer of /v1/chat/completions."""

    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChoiceDelta(msgspec.Struct):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """What a chunk adds to a sample."""

    index: int
    delta: ChoiceDelta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None
    idlm: Trace | UnsetType = UNSET


class ChatChunk(Head):
    """An event of a chat stream."""

    choices: list[ChunkChoice]
    usage: Usage | None | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class CompletionLogprobs(msgspec.Struct):
    """Four lists with one entry a token; a prompt's first token has no law, so null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One sample, or what a chunk adds to it."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: CompletionLogprobs | None = None
    idlm: Trace | UnsetType = UNSET


class Completion(Head):
    """Answer of /v1/completions, and an event of its stream."""

    choices: list[CompletionChoice]
    usage: Usage | None | UnsetType = UNSET
    object: Literal["text_completion"] = "text_completion"


class ModelCard(msgspec.Struct):
    """A name that requests can give as `model`."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "idlm"


class ModelList(msgspec.Struct):
    """All of them."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokenized(msgspec.Struct):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    """Answer of /detokenize."""

    prompt: str


class Status(msgspec.Struct):
    """Answer of /health and /ready."""

    status: str


class Version(msgspec.Struct):
    """Answer of /version."""

    version: str
