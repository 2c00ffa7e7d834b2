"""`ChatBackend`: the model that answers in a chat, in this process or behind a URL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from idlm.errors import InputError
from idlm.ui.colours import Token

Message = dict[str, str]
"""A message: "role" and "content"."""
ANSWER_SHARE = 4
"""At least 1 / ANSWER_SHARE of the context is kept for an answer, unless `max_tokens` is less."""


class ContextFull(InputError):
    """The conversation leaves no room for an answer."""


@dataclass(frozen=True)
class Piece:
    """The next part of an answer; `tokens` if the backend reports what the text is made of."""

    text: str
    tokens: Sequence[Token] = ()


@dataclass(frozen=True)
class End:
    """The end of an answer; None for figures that the backend does not report."""

    reason: str | None = None
    tokens: int | None = None
    tpf: float | None = None


class ChatBackend(Protocol):
    """A model that answers.

    Attributes:
        name: of the model.
        drafts: whether drafting can be switched off.
        traced: whether pieces have their tokens.
    """

    name: str
    drafts: bool
    traced: bool

    def answer(self, messages: Sequence[Message], drafting: bool) -> Iterator[Piece | End]:
        """The answer as it comes; its last item is an `End`.

        Raises:
            ContextFull: the conversation is too long. InputError: there is no answer, for another
                reason.
        """


def check_room(tokens: int, max_tokens: int, context: int) -> None:
    """Refuse a conversation of `tokens` tokens that leaves no room for an answer.

    Raises:
        ContextFull: it is too long.
    """
    most = context - min(max_tokens, context // ANSWER_SHARE)
    if tokens > most:
        raise ContextFull(
            f"the conversation has {tokens} tokens of {most} that leave room for an answer; "
            "say less"
        )
