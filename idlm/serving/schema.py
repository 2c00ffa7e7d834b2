"""Bodies of completions requests, and what they share with those of chat; all are read strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from idlm.errors import InputError
from idlm.models.generation import with_defaults
from idlm.params import MOST_BAD_WORDS, MOST_LOGPROBS, SHOWN, Guide, SamplingParams, Thinking
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError
from idlm.serving.neutral import Neutral, only
from idlm.serving.prompts import Prompts
from idlm.serving.reasoning import Reasoner
from idlm.serving.strict import Strict
from idlm.serving.structured import Structured

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions."""
MOST_STOPS = 16
LONGEST_STOP = 256
LONGEST_SALT = 1024
GUIDE_FIELDS = (
    *("guided_json", "guided_regex", "guided_grammar", "structured_outputs"),
    *("response_format", "tools"),
)
"""Fields that a guide can come from."""
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
    *("include_stop_str_in_output", "skip_special_tokens", "bad_words", "allowed_token_ids"),
)
"""Fields with the meaning that they have in `SamplingParams`, which checks their values."""


class StreamOptions(Strict):
    """Options of a stream; with `include_usage` its last chunk has the token counts, and with
    `continuous_usage_stats` too every other chunk those so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Extras(Strict):
    """Options that only this server has: `trace` reports the source of each token, `windows` also
    what the window of each forward held."""

    trace: bool = False
    windows: bool = False

    @property
    def traced(self) -> bool:
        """Whether the source of each token is reported."""
        return self.trace or self.windows


class Generation(Neutral, Structured):
    """Fields of chat and of completions requests. Null means absent."""

    model: str | None = None
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
    bad_words: Annotated[list[Stop], Field(max_length=MOST_BAD_WORDS)] | None = None
    allowed_token_ids: Ids | None = None
    verification: Literal["coupled", "ratio"] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=LONGEST_SALT)] | None = None
    idlm: Extras = Extras()

    @property
    def top(self) -> int | None:
        """Number of likeliest tokens to report for each token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def prompt_top(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    @property
    def asked_tokens(self) -> int | None:
        """max_tokens of the request; None: what the context leaves."""
        raise NotImplementedError

    @property
    def samples(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream has the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has them."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

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
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(
                400, "prompt_logprobs cannot be streamed; set stream to false", "prompt_logprobs"
            )
        if self.truncate_prompt_tokens == 0:
            raise ApiError(
                400,
                "truncate_prompt_tokens=0 leaves no prompt; use a number of tokens, or -1 for what "
                "fits the context",
                "truncate_prompt_tokens",
            )

    def truncated(self, ids: list[int], context: int) -> list[int]:
        """The last tokens of a prompt, as many as `truncate_prompt_tokens` says; -1: as many as fit
        the context before the output."""
        most = self.truncate_prompt_tokens
        if most is None:
            return ids
        return ids[-(max(1, context - max(1, self.asked_tokens or 1)) if most == -1 else most) :]

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Errors about a setting name the field of the request that it came from."""
        try:
            yield
        except InputError as error:
            error.param = self.origins.get(error.param or "", error.param)
            raise

    @property
    def origins(self) -> dict[str, str]:
        """By the name of a setting, the field of this request that gives it, if that is another."""
        given = (name for name in GUIDE_FIELDS if getattr(self, name, None) is not None)
        return {"guide": next(given, "guide")}

    def form_or_calls(self, guide: Guide | None, prompts: Prompts) -> Guide | None:
        """The guide for a request that may also call tools."""
        return guide

    def thoughts(self, reasoner: Reasoner | None, prompt: Sequence[int]) -> Thinking | None:
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
    wrong = [
        repr(key[:40])
        for key in biases
        if not (key.isascii() and key.isdigit() and len(key) <= LONGEST_KEY)
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise InputError(
            f"logit_bias has keys that are no token ids: {', '.join(wrong[:SHOWN])}{more}; "
            "use for example {'42': -1.5}",
            "logit_bias",
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
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: Annotated[
        Literal[""] | None,
        only("", instead="write the model's own form of a gap into the prompt, with parse_special"),
    ] = None

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
        """The larger of `prompt_logprobs` and, if the prompt is echoed, `logprobs`."""
        echoed = self.logprobs if self.echo else None
        return max((top for top in (echoed, self.prompt_logprobs) if top is not None), default=None)

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
