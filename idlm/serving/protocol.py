"""What chat and completions requests have in common, and the smaller requests; strict, see `Strict`.

OpenAI's fields that say nothing here, or whose default is all we do, are taken at that value and refused at any other:

    field                                                   taken
    user, safety_identifier, prompt_cache_key, metadata     any value; never used, never logged
    store                                                   false
    service_tier                                            "auto", "default"
    best_of (completions)                                   n
    suffix (completions)                                    null, ""
    parallel_tool_calls (chat)                              true
    modalities (chat)                                       ["text"]
    verbosity (chat)                                        "medium"
    audio, prediction, functions, function_call,
    reasoning_effort, web_search_options (chat)             null
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from idlm.errors import InputError
from idlm.params import SamplingParams
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError
from idlm.serving.messages import Guide
from idlm.serving.strict import Boolean, Strict, check_shape, decode

MOST_STOPS = 16
LONGEST_STOP = 256
LONGEST_KEY = 10
"""Digits of a token id."""

Ids = Annotated[list[int], Field(fail_fast=True)]
Stop = Annotated[str, Field(max_length=LONGEST_STOP)]
SHARED = (
    *("n", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "verification"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)
"""Fields that mean what they mean in `SamplingParams`, which checks their values."""


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None


class Extras(Strict):
    """What only this server has: `trace` adds where each token came from."""

    trace: bool = False


class Neutral(Strict):
    """Fields taken only where they change nothing; see the table above."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Annotated[Literal[False] | None, Boolean] = None
    service_tier: Literal["auto", "default"] | None = None


class Generation(Neutral):
    """Fields of both kinds of request. Null is as good as absent everywhere."""

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
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    idlm: Extras = Extras()

    @property
    def samples(self) -> int:
        """How many of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self, limits: Limits) -> None:
        """Refuse what the server's bounds or other fields forbid.

        Raises:
            ApiError: 400, naming the field.
        """
        if not 1 <= self.samples <= limits.n:
            raise ApiError(400, f"n={self.n} is out of range; use 1 <= n <= {limits.n}", "n")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options without stream; set stream to true", "stream_options")

    def sampling(
        self, max_tokens: int, logprobs: int | None = None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """As `SamplingParams`, whose errors it raises."""
        given = {name: getattr(self, name) for name in SHARED}
        fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        fields |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        return SamplingParams(max_tokens=max_tokens, logit_bias=_token_biases(self.logit_bias or {}), **fields)

    def guides(self) -> list[Guide]:
        """Every guide the request names."""
        guides = []
        if self.guided_json is not None:
            guides.append(schema_guide(self.guided_json, "guided_json"))
        if self.guided_regex is not None:
            guides.append(Guide("regex", self.guided_regex))
        if self.guided_grammar is not None:
            guides.append(Guide("grammar", self.guided_grammar))
        return guides


def _token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) <= LONGEST_KEY):
            raise InputError(f"logit_bias key {key[:40]!r} is not a token id; use for example {{'42': -1.5}}")
    return {int(key): bias for key, bias in biases.items()}


def schema_guide(schema: str | dict[str, Any], what: str) -> Guide:
    """A guide for a JSON schema, given as an object or as its text."""
    value = decode(schema, what) if isinstance(schema, str) else schema
    if not isinstance(value, dict):
        raise ApiError(400, f"{what} is not a JSON object; give a JSON schema", what)
    check_shape(value, what)
    return Guide("json_schema", json.dumps(value, ensure_ascii=False))


def the_guide(guides: list[Guide], limits: Limits) -> Guide | None:
    """The one guide of a request, if it has any.

    Raises:
        ApiError: 400: more than one, or one that is too long.
    """
    if len(guides) > 1:
        raise ApiError(400, "more than one of response_format, guided_* and a forced tool_choice; use one")
    for guide in guides:
        if len(guide.text.encode()) > limits.schema_bytes:
            raise ApiError(400, f"a {guide.kind} of more than {limits.schema_bytes} bytes; give a shorter one")
    return guides[0] if guides else None


class DetokenizeRequest(Strict):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Ids
