"""A chat's partner behind a URL: any server with OpenAI's API, through OpenAI's own client."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    AuthenticationError,
    NotFoundError,
    OpenAI,
    PermissionDeniedError,
)
from openai.types import Model

from idlm.errors import InputError
from idlm.models.sources import first_line
from idlm.params import SamplingParams
from idlm.ui.partner import ContextFull, End, Message, Piece, check_room

OWNER, AR_SUFFIX = "idlm", ":ar"
"""By which our own server is known: who owns its models, and the name of the one without drafts."""
TOO_LONG = re.compile(r"context|a prompt (has|of) [0-9]+", re.IGNORECASE)
"""How servers say that a conversation is too long; there is no code for it that all of them use."""
STANDARD = ("stop", "presence_penalty", "frequency_penalty", "seed", "logit_bias")
EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "verification")
"""Fields sent only where they differ from the defaults: the first are OpenAI's, the second vLLM's
and ours."""
SHOWN = 10


class RemotePartner:
    """A model of a server.

    Args:
        url: where the API is, with its /v1.
        key: for servers that need one.
        model: its name there; None: the server's only one, or the first of an idlm server.

    Raises:
        InputError: it cannot be reached, does not take the key, or has no such model.
    """

    def __init__(
        self, url: str, key: str | None, model: str | None, params: SamplingParams
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise InputError(
                f"--url {url!r} is no URL of a server; write for example http://127.0.0.1:8000/v1"
            )
        self._url, self._params = url, params
        self._client = OpenAI(base_url=url, api_key=key or "none")
        self._fields = request_fields(params)
        cards = {card.id: card for card in self._models()}
        self.name = _choose(model, cards, url)
        card = cards.get(self.name)
        self.traced = card is not None and card.owned_by == OWNER
        self._ar = (
            next((id for id in cards if id.endswith(AR_SUFFIX)), None) if self.traced else None
        )
        self.drafts = self._ar is not None
        self._context: int | None = getattr(card, "max_model_len", None) if self.traced else None

    def _models(self) -> list[Model]:
        """What the server has; nothing where it does not say."""
        try:
            with self._one_line():
                return list(self._client.models.list())
        except InputError as error:
            if isinstance(error.__cause__, NotFoundError):
                return []
            raise

    def answer(self, messages: Sequence[Message], drafting: bool) -> Iterator[Piece | End]:
        """See `Partner`."""
        with self._one_line():
            if self._context is not None:
                check_room(self._count(messages), self._params.max_tokens, self._context)
            yield from self._stream(messages, self.name if drafting else self._ar or self.name)

    def _count(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation; only our own server is asked."""
        root = str(self._client.base_url).rstrip("/").removesuffix("/v1")
        body = {"messages": list(messages)}
        return int(
            self._client.post(f"{root}/tokenize", body=body, cast_to=dict[str, Any])["count"]
        )

    def _stream(self, messages: Sequence[Message], model: str) -> Iterator[Piece | End]:
        fields: dict[str, Any] = {"model": model, "messages": list(messages), **self._fields}
        if self.traced:
            fields["extra_body"] = fields["extra_body"] | {"idlm": {"trace": True}}
        reason = tokens = tpf = None
        options: Any = {"include_usage": True}
        with self._client.chat.completions.create(
            stream=True, stream_options=options, **fields
        ) as chunks:
            for chunk in chunks:
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                for choice in chunk.choices:
                    reason = choice.finish_reason or reason
                    tpf = _trace(choice).get("tpf", tpf)
                    yield _piece(choice)
        yield End(reason, tokens, tpf)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Makes the client's errors ours."""
        try:
            yield
        except APIStatusError as error:
            raise _refused(error, self._url) from error
        except APIConnectionError as error:
            reason = error.__cause__ or error
            raise InputError(
                f"{self._url} cannot be reached ({reason}); is a server running there?"
            ) from error
        except APIError as error:
            raise InputError(f"{self._url} broke the answer off: {error.message}") from error
        except InputError:
            raise
        # the HTTP library under the client raises its own kinds, and what came may be no JSON
        except Exception as error:
            raise InputError(
                f"{self._url} gave no answer of OpenAI's API ({first_line(error)}); check the URL"
            ) from error


def request_fields(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters as fields of a request.

    Raises:
        InputError: there is no field for one that was given.
    """
    if params.banned_tokens:
        raise InputError(
            "--banned-token cannot be sent to a server; use --logit-bias TOKEN_ID=-100"
        )
    default = SamplingParams()

    def given(names: Sequence[str]) -> dict[str, Any]:
        return {
            name: getattr(params, name)
            for name in names
            if getattr(params, name) != getattr(default, name)
        }

    always = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
    }
    return {**always, **given(STANDARD), "extra_body": given(EXTENSIONS)}


def _choose(model: str | None, cards: dict[str, Model], url: str) -> str:
    """The model to talk to, checked as far as the server says what it has."""
    names = ", ".join(list(cards)[:SHOWN]) + (", ..." if len(cards) > SHOWN else "")
    if model is not None:
        if cards and model not in cards:
            raise InputError(f"--model {model!r} is not at {url}; use {names}")
        return model
    if not cards:
        raise InputError(f"{url} does not say which models it has; name one with --model")
    first = next(iter(cards.values()))
    if len(cards) > 1 and first.owned_by != OWNER:
        raise InputError(f"{url} has several models; choose one with --model: {names}")
    return first.id


def _refused(error: APIStatusError, url: str) -> InputError:
    body = error.body
    message = str(body.get("message") or body) if isinstance(body, dict) else error.message
    if isinstance(error, AuthenticationError | PermissionDeniedError):
        return InputError(
            f"{url} does not take this API key ({message}); give another with --api-key"
        )
    kind = (
        ContextFull if error.status_code in (400, 413) and TOO_LONG.search(message) else InputError
    )
    return kind(f"{url} answers {error.status_code}: {message}")


def _trace(choice: Any) -> dict[str, Any]:
    return getattr(choice, "idlm", None) or {}


def _piece(choice: Any) -> Piece:
    tokens = [(entry["token"], entry["source"]) for entry in _trace(choice).get("trace", ())]
    return Piece(choice.delta.content or "", tokens)
