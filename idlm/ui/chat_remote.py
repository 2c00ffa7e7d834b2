"""A chat backend behind a URL: any server with OpenAI's API, through OpenAI's own client."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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
from idlm.ui.backend import ContextFull, End, Message, Piece, check_room

OWNER, AR_SUFFIX = "idlm", ":ar"
"""Marks of an idlm server: the owner of its models, and the suffix of the AR model's name."""
TOO_LONG = re.compile(r"context|a prompt (has|of) [0-9]+", re.IGNORECASE)
"""Messages of servers about a conversation that is too long; they share no error code for it."""
STANDARD = (
    *("temperature", "top_p", "stop", "presence_penalty", "frequency_penalty"),
    *("seed", "logit_bias"),
)
EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "verification")
"""Fields that are sent only if they are given: OpenAI's, and extensions of vLLM and idlm."""
SHOWN = 10


class RemoteBackend:
    """A model of a server.

    Args:
        url: of the API; /v1 is added to a URL without a path.
        key: the API key, for servers that need one.
        model: its name on the server; None: the only model, or the first of an idlm server.
        given: the fields of `SamplingParams` that the user gave; the server has its own defaults
            for the others, except for `max_tokens`.

    Raises:
        InputError: the server cannot be reached, refuses the key, or has no such model.
    """

    def __init__(
        self, url: str, key: str | None, model: str | None, given: Mapping[str, Any]
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise InputError(
                f"--url {url!r} is no URL of a server; write for example http://127.0.0.1:8000/v1"
            )
        if urlsplit(url).path in ("", "/"):
            url = url.rstrip("/") + "/v1"
        self._url = url
        self._client = OpenAI(base_url=url, api_key=key or "none")
        self._fields = request_fields(given)
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
        """The server's models; an empty list if it does not list them."""
        try:
            with self._input_errors():
                return list(self._client.models.list())
        except InputError as error:
            if isinstance(error.__cause__, NotFoundError):
                return []
            raise

    def answer(self, messages: Sequence[Message], drafting: bool) -> Iterator[Piece | End]:
        with self._input_errors():
            if self._context is not None:
                check_room(self._count(messages), self._fields["max_tokens"], self._context)
            yield from self._stream(messages, self.name if drafting else self._ar or self.name)

    def _count(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation, by /tokenize of an idlm server."""
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
    def _input_errors(self) -> Iterator[None]:
        """Turns errors of OpenAI's client into InputError."""
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
        # the HTTP library raises errors of its own, and the response may not be JSON
        except Exception as error:
            raise InputError(
                f"{self._url} gave no answer of OpenAI's API ({first_line(error)}); check the URL"
            ) from error


def request_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams` as fields of a request.

    Raises:
        InputError: one has no such field.
    """
    if given.get("banned_tokens"):
        raise InputError(
            "--banned-token cannot be sent to a server; use --logit-bias TOKEN_ID=-100"
        )

    def those(names: Sequence[str]) -> dict[str, Any]:
        return {name: given[name] for name in names if name in given}

    always = {"max_tokens": given.get("max_tokens", SamplingParams().max_tokens)}
    return {**always, **those(STANDARD), "extra_body": those(EXTENSIONS)}


def _choose(model: str | None, cards: dict[str, Model], url: str) -> str:
    """The name of the model, checked if the server lists its models."""
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
