"""Bodies of /v1/completions, and of /tokenize for a text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from idlm.params import MOST_LOGPROBS
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError
from idlm.serving.protocol import Generation, Ids
from idlm.serving.strict import Strict

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionRequest(Generation):
    """Body of /v1/completions. `prompt` is a text, token ids, or a list of either."""

    prompt: str | Ids | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[Ids], Field(fail_fast=True)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, always as a list."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]
        return prompt  # type: ignore[return-value]

    @property
    def asked_tokens(self) -> int:
        """What `max_tokens` says; 0 only beside echo."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompt_only(self) -> bool:
        """Whether nothing but the prompt is asked for; the engine then makes one token, which is dropped."""
        return bool(self.echo) and self.max_tokens == 0

    def check(self, limits: Limits) -> None:
        """As for every request, and what only completions have.

        Raises:
            ApiError: 400, naming the field.
        """
        super().check(limits)
        if not 1 <= len(self.prompts) <= limits.prompts:
            raise ApiError(400, f"{len(self.prompts)} prompts; send 1 to {limits.prompts}", "prompt")
        if self.best_of not in (None, self.samples):
            raise ApiError(
                400, f"best_of={self.best_of} with n={self.samples}; only best_of = n is supported", "best_of"
            )
        if self.echo and self.stream and (self.logprobs is not None or self.max_tokens == 0):
            raise ApiError(400, "echo with logprobs or max_tokens=0 cannot be streamed; set stream to false", "echo")


class TokenizeText(Strict):
    """Body of /tokenize for a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None
