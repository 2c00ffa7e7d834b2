"""Bodies of responses, in OpenAI's format.

They are msgspec structs because a chunk of a stream must cost microseconds.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from idlm.serving.vllm_metrics import RequestMetrics

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(msgspec.Struct):
    """Prompt tokens found in the prefix cache."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct):
    """Drafts that became tokens, drafts that were verified and rejected, and tokens of thoughts."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """Token counts of a request; a prompt counts once, however many samples it has. The details
    come at the end."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | UnsetType = UNSET
    completion_tokens_details: CompletionDetails | UnsetType = UNSET


class PromptLogprob(msgspec.Struct):
    """A token at a position of the prompt: its log-probability, its rank there, and its text."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By position of the prompt, its token and the likeliest ones by id; null for the first."""


class TraceEntry(msgspec.Struct):
    """A token: its text, its id, its source, and the forward pass that committed it, counted from
    1."""

    token: str
    id: int
    source: Literal["first", "accepted", "corrected", "bonus"]
    forward: int


class TracedToken(msgspec.Struct):
    """A token: its text and its id."""

    token: str
    id: int


class TracedWindow(msgspec.Struct):
    """The window of a forward: the pending token and the drafts that it verified, of which the
    first `accepted` were accepted, and for each of the `outcomes` (numbers of accepted drafts) so
    many MASK rows as `masks`. `position` is that of the pending token in prompt and output;
    `width` counts the window's rows."""

    forward: int
    position: int
    plan: str
    width: int
    pending: TracedToken
    drafts: list[TracedToken]
    accepted: int
    outcomes: list[int]
    masks: int


class Trace(msgspec.Struct):
    """The source of each token of a sample, if asked for the windows of its forwards, and at the
    end its tokens per forward."""

    trace: list[TraceEntry]
    windows: list[TracedWindow] | UnsetType = UNSET
    tpf: float | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """A likely token; `bytes` is its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    """A token with its log-probability, and the likeliest tokens at its position."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a sample, one entry for each token."""

    content: list[ChatLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct):
    """The name of a function, and its arguments as JSON text. In a stream only the first piece of a
    call has the name."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct):
    """A tool call of the model, or in a stream a piece of it. Only pieces have `index`, and only
    the first of a call has its id and type."""

    function: FunctionCall
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    index: int | UnsetType = UNSET


class Message(msgspec.Struct):
    """The message that the model wrote; `content` is null if it only calls tools. Thoughts have two
    names, vLLM's and DeepSeek's."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One sample of a chat completion."""

    index: int
    message: Message
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    idlm: Trace | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Head(msgspec.Struct):
    """Fields that all responses and all chunks have."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Head):
    """The response of /v1/chat/completions, with a choice for each sample."""

    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    metrics: RequestMetrics | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class ChoiceDelta(msgspec.Struct):
    """The part of a message that a chunk adds."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """The part of a sample that a chunk adds."""

    index: int
    delta: ChoiceDelta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None
    idlm: Trace | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Head):
    """An event in the stream of a chat completion."""

    choices: list[ChunkChoice]
    usage: Usage | None | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    metrics: RequestMetrics | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class CompletionLogprobs(msgspec.Struct):
    """Four lists with one entry for each token; the first token of a prompt has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One sample, or the part of it that a chunk adds."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: CompletionLogprobs | None = None
    idlm: Trace | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Head):
    """The response of /v1/completions, and an event in its stream."""

    choices: list[CompletionChoice]
    usage: Usage | None | UnsetType = UNSET
    metrics: RequestMetrics | UnsetType = UNSET
    object: Literal["text_completion"] = "text_completion"


class ModelCard(msgspec.Struct):
    """A model; requests name it by `id`."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "idlm"


class ModelList(msgspec.Struct):
    """The models that this server serves."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokenized(msgspec.Struct):
    """The response of /tokenize: token ids, their count, and the model's context."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    """The response of /detokenize: the text in `prompt`."""

    prompt: str


class Status(msgspec.Struct):
    """The response of /health and of /ready."""

    status: str


class Version(msgspec.Struct):
    """The response of /version: the version of idlm."""

    version: str
