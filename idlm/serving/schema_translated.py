"""What the requests of /v1/responses and /v1/messages share: they become a `ChatRequest`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError
from pydantic_core import PydanticCustomError

from idlm.errors import InputError
from idlm.serving.errors import ApiError
from idlm.serving.schema import Generation
from idlm.serving.schema_chat import ChatRequest
from idlm.serving.strict import validation_error

UNUSED = frozenset({"n", "max_tokens", "stop", "stream_options", "idlm", "metadata"})
"""Fields of `Generation` that are not passed on as they are."""
PICTURES = ("input_image", "input_file", "input_audio", "image", "document")


TEXT_OR_LIST = Discriminator(lambda value: "[text]" if isinstance(value, str) else "[list]")
"""For fields that take a text or a list: what is neither is no list."""


class Lenient(BaseModel):
    """A part of a conversation's history: what is not known in it has no effect."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class Translated(Generation):
    """A request of another API, with the extensions of chat requests."""

    n: Literal[1] | None = None
    stop: None = None
    # what follows has no place in the responses of these APIs
    idlm: None = None  # type: ignore[assignment]
    prompt_logprobs: None = None
    return_token_ids: None = None
    # these have a field of their own for it
    response_format: None = None

    def chat_fields(self) -> dict[str, Any]:
        """The fields that chat has under the same name, as they were sent."""
        names = Generation.model_fields.keys() - UNUSED
        return self.model_dump(include=set(names), exclude_unset=True, by_alias=True)


def chat_request(fields: dict[str, Any]) -> ChatRequest:
    """The translated request, with the checks of chat.

    Raises:
        ApiError: 400: chat refuses a field.
    """
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise validation_error(errors, fields) from None


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a field of chat name the field that it was translated from."""
    try:
        yield
    except (ApiError, InputError) as error:
        error.param = names.get(error.param or "", error.param)
        raise


def system_first(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with all instructions at their beginning as one; many templates take one."""
    at = next(
        (at for at, one in enumerate(messages) if one["role"] not in ("system", "developer")),
        len(messages),
    )
    if at < 2:
        return list(messages)
    text = "\n\n".join(one["content"] for one in messages[:at])
    return [{"role": "system", "content": text}, *messages[at:]]


def known_type(value: object, known: Collection[str], what: str) -> object:
    """Refuse an object whose `type` is not known, by its name.

    Raises:
        PydanticCustomError: it is not in `known`; objects without a type pass.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is None or (isinstance(kind, str) and kind in known):
        return value
    reason = ""
    if kind in PICTURES:
        reason = "; the model reads text only"
    elif what == "tool":
        reason = "; only functions, which the client runs, are supported"
    context = {"what": what, "kind": repr(kind)[:60], "reason": reason, "known": ", ".join(known)}
    raise PydanticCustomError(
        "unsupported_type",
        "the {what} type {kind} is not supported{reason}; use {known}",
        context,
    )
