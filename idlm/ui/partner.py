"""`Partner`: who answers in a chat; a model in this process, or a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from idlm.errors import InputError
from idlm.ui.colours import Token

Message = dict[str, str]
"""A message: "role" and "content"."""
ANSWER_SHARE = 4
"""At least one part in so many of the context is kept for an answer, if `max_tokens` asks for that
much."""


class ContextFull(InputError):
    """The conversation leaves no room for an answer."""


@dataclass(frozen=True)
class Piece:
    """What comes next of an answer; `tokens` where it is known what it is made of."""

    text: str
    tokens: Sequence[Token] = ()


@dataclass(frozen=True)
class End:
    """The end of an answer; what is not known is None."""

    reason: str | None = None
    tokens: int | None = None
    tpf: float | None = None


class Partner(Protocol):
    """Who answers.

    Attributes:
        name: of the model.
        drafts: whether drafting can be switched off.
        traced: whether pieces say what they are made of.
    """

    name: str
    drafts: bool
    traced: bool

    def answer(self, messages: Sequence[Message], drafting: bool) -> Iterator[Piece | End]:
        """The answer as it comes; its last item is an `End`.

        Raises:
            ContextFull: fewer messages would do. InputError: there is no answer, and why.
        """


def check_room(tokens: int, max_tokens: int, context: int) -> None:
    """Refuse a conversation of so many tokens where it leaves no room for an answer.

    Raises:
        ContextFull: it does not.
    """
    most = context - min(max_tokens, context // ANSWER_SHARE)
    if tokens > most:
        raise ContextFull(
            f"the conversation has {tokens} tokens of {most} that leave room for an answer; say less"
        )
