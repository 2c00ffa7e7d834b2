"""Bodies of requests, read strictly.

A body that is not JSON or is nested too deep, a value of the wrong type and an unknown field are
answered 400. OpenAI's fields that have no effect here are accepted at the values of this table and
refused at any other:

    field                                                   accepted
    user, safety_identifier, prompt_cache_key, metadata     any value; not used, not logged
    store                                                   false
    service_tier                                            "auto", "default"
    best_of (completions)                                   n
    suffix (completions)                                    null, ""
    modalities (chat)                                       ["text"]
    verbosity (chat)                                        "medium"
    audio, prediction, functions, function_call,
    web_search_options (chat)                               null
    guided_decoding_backend                                 any value; there is one back-end
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request
from pydantic import Field

from idlm.errors import InputError
from idlm.params import MOST_LOGPROBS, Guide, SamplingParams, Thinking, with_defaults
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError
from idlm.serving.prompts import Prompts
from idlm.serving.reasoning import Reasoner
from idlm.serving.strict import Boolean, Strict, decode
from idlm.serving.structured import Structured

SHOWN = 60
"""Characters of a wrong value that an error repeats."""
DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions."""
MOST_STOPS = 16
LONGEST_STOP = 256
LONGEST_KEY = 10
"""Digits of a token id."""

Ids = Annotated[list[int], Field(fail_fast=True)]
Stop = Annotated[str, Field(max_length=LONGEST_STOP)]
SHARED = (
    *(
        "n",
        "min_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
    ),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "verification"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)
"""Fields with the meaning that they have in `SamplingParams`, which checks their values."""


class StrictRequest(Request):
    """A request whose body is read with `decode`."""

    async def json(self) -> Any:
        return decode(await self.body(), "the request body")


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors as a sentence that names the field."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"][1:] if not _is_type(part))
    where, kind = field or "the request body", first["type"]
    if kind == "extra_forbidden":
        return ApiError(
            400,
            f"{where!r} is not supported by this server; leave it out",
            field,
            "unsupported_parameter",
        )
    if kind == "missing":
        return ApiError(
            400,
            f"{where!r} is missing; it is required",
            field or None,
            "missing_required_parameter",
        )
    message = f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    value = repr(first.get("input"))
    shown = value if len(value) <= SHOWN else value[:SHOWN] + "..."
    return ApiError(400, f"{message}, got {shown}", field or None, "invalid_value")


def _is_type(part: object) -> bool:
    """Whether a part of pydantic's location names a member of a union and not a field."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part)


class StreamOptions(Strict):
    """Options of a stream; with `include_usage` its last chunk has the token counts."""

    include_usage: bool | None = None


class Extras(Strict):
    """Options that only this server has: `trace` reports the source of each token."""

    trace: bool = False


class Neutral(Strict):
    """Fields accepted only at values without effect; see the table above."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Annotated[Literal[False] | None, Boolean] = None
    service_tier: Literal["auto", "default"] | None = None


class Generation(Neutral, Structured):
    """Fields of chat and of completions requests. Null means absent."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1024, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    verification: Literal["coupled", "ratio"] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    idlm: Extras = Extras()

    @property
    def top(self) -> int | None:
        """Number of likeliest tokens to report for each token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def prompt_top(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    @property
    def samples(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream has the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self, limits: Limits) -> None:
        """Refuse values that the server's bounds or other fields forbid.

        Raises:
            ApiError: 400, naming the field.
        """
        if not 1 <= self.samples <= limits.n:
            raise ApiError(400, f"n={self.n} is out of range; use 1 <= n <= {limits.n}", "n")
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options without stream; set stream to true", "stream_options"
            )

    def form_or_calls(self, guide: Guide | None, prompts: Prompts) -> Guide | None:
        """The guide for a request that may also call tools."""
        return guide

    def thinking(self, reasoner: Reasoner | None, prompt: Sequence[int]) -> Thinking | None:
        """The thoughts that the output after `prompt` may begin with."""
        return None

    def sampling(
        self, max_tokens: int, guide: Guide | None = None, defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """The request as `SamplingParams`, which raises InputError for wrong values.

        The model's `defaults` stand for the fields that the request does not set.
        """
        shared = {name: getattr(self, name) for name in SHARED}
        fields: dict[str, Any] = {k: value for k, value in shared.items() if value is not None}
        fields |= {"logprobs": self.top, "prompt_logprobs": self.prompt_top, "guide": guide}
        fields |= {"max_tokens": max_tokens, "logit_bias": _token_biases(self.logit_bias or {})}
        return with_defaults(fields, defaults or {})


def _token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) <= LONGEST_KEY):
            raise InputError(
                f"logit_bias key {key[:40]!r} is not a token id; use for example {{'42': -1.5}}"
            )
    return {int(key): bias for key, bias in biases.items()}


class CompletionRequest(Generation):
    """The body of /v1/completions. `prompt` is a text, token ids, or a list of either."""

    kind: ClassVar = "cmpl"
    """Prefix of the response's id."""
    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[Ids], Field(fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, even if there is one."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]
        return prompt  # type: ignore[return-value]

    @property
    def prompt_only(self) -> bool:
        """Whether the response is the prompt alone; the engine makes one token, which is
        dropped."""
        return bool(self.echo) and self.max_tokens == 0

    @property
    def asked_tokens(self) -> int:
        """max_tokens for the engine: 1 for the prompt alone, else the request's or the default."""
        return (
            1
            if self.prompt_only
            else DEFAULT_MAX_TOKENS
            if self.max_tokens is None
            else self.max_tokens
        )

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompt_top(self) -> int | None:
        """As `top` if the prompt is echoed."""
        return self.logprobs if self.echo else None

    def check(self, limits: Limits) -> None:
        """The checks of every request, and those of completions.

        Raises:
            ApiError: 400, naming the field.
        """
        super().check(limits)
        if not 1 <= len(self.prompts) <= limits.prompts:
            raise ApiError(
                400, f"{len(self.prompts)} prompts; send 1 to {limits.prompts}", "prompt"
            )
        if self.best_of not in (None, self.samples):
            raise ApiError(
                400,
                f"best_of={self.best_of} with n={self.samples}; only best_of = n is supported",
                "best_of",
            )
        if self.echo and self.stream and (self.logprobs is not None or self.max_tokens == 0):
            raise ApiError(
                400,
                "echo with logprobs or max_tokens=0 cannot be streamed; set stream to false",
                "echo",
            )


class TokenizeText(Strict):
    """The body of /tokenize for a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """The body of /detokenize: token ids to convert to text."""

    model: str | None = None
    tokens: Ids
