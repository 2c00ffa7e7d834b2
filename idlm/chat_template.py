"""Prompts become token ids here and nowhere else: a text, messages under the chat template, or ids
that are checked.

Special tokens in what a message says are text: they never mean anything.

    messages -> placeholders for special strings -> chat template -> cut at the placeholders -> ids
    of each piece
                                                                        template's own text:
                                                                        specials allowed a message's
                                                                        special string: plain text

A template uses special tokens of its own, and once it is rendered nobody can tell whose they are.
So those of the messages are taken out before.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from transformers import AddedToken, PreTrainedTokenizerBase

from idlm.errors import InputError

Message = Mapping[str, Any]
OPEN, CLOSE = "\ue000", "\ue001"
"""Private characters around the number of a special string; those in a message are treated as
special strings too."""
PLACEHOLDER = re.compile(f"{OPEN}([0-9]+){CLOSE}")


class Bounds(Protocol):
    """What a model says of the ids that it takes."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def mask_id(self) -> int: ...  # noqa: D102
    @property
    def context(self) -> int: ...  # noqa: D102


def check_ids(ids: Iterable[object], model: Bounds) -> list[int]:
    """The ids of a prompt.

    Raises:
        InputError: there are none or too many, or one is MASK, outside the vocabulary, or no whole
            number.
    """
    tokens = _whole_numbers(ids, "prompt")
    if not 0 < len(tokens) < model.context:
        raise InputError(
            f"a prompt has {len(tokens)} tokens; this model takes 1 to {model.context - 1}"
        )
    if model.mask_id in tokens:
        raise InputError(
            f"a prompt holds the MASK token {model.mask_id}; take it out, it stands for no text"
        )
    return check_tokens(tokens, model.vocab_size)


def check_tokens(ids: Iterable[object], vocab_size: int, what: str = "prompt") -> list[int]:
    """Ids of a vocabulary, however many.

    Raises:
        InputError: one is none; `what` says of what it is a token.
    """
    tokens = _whole_numbers(ids, what)
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        shown = wrong if abs(wrong) < 2**64 else "of more than 64 bits"
        raise InputError(f"{what} token {shown} is outside the vocabulary 0..{vocab_size - 1}")
    return tokens


def _whole_numbers(ids: Iterable[object], what: str) -> list[int]:
    tokens: list[Any] = list(ids)
    if not set(map(type, tokens)) <= {int}:
        wrong = next(token for token in tokens if type(token) is not int)
        raise InputError(f"{what} token {wrong!r} is not a whole number; give text or token ids")
    return tokens


class PromptEncoder:
    """Encodes texts and messages for one model.

    Args:
        tokenizer: the model's; None: it takes token ids only.
        name: of the model, for messages.
        context: positions of a sequence: a text that cannot fit them is refused before it is cut
            into tokens. None: no text is too long.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, name: str, context: int | None = None
    ) -> None:
        self.name, self._context = name, context
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer (untyped: half of its interface is).

        Raises:
            InputError: it has none.
        """
        if self._tokenizer is None:
            raise InputError(f"model {self.name!r} has no tokenizer; give the prompt as token ids")
        return self._tokenizer

    @property
    def template(self) -> str:
        """The chat template.

        Raises:
            InputError: the model has none.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                f"model {self.name!r} has no chat template; give a text instead of messages"
            )
        return str(self.tokenizer.get_chat_template())

    @property
    def has_template(self) -> bool:
        """Whether messages can be encoded."""
        return self._tokenizer is not None and bool(self.tokenizer.chat_template)

    def text(self, text: str, add_special_tokens: bool = True, trusted: bool = False) -> list[int]:
        """Ids of a text.

        Args:
            add_special_tokens: what the tokenizer adds itself, such as a start token.
            trusted: special tokens in the text are special, for a caller who wrote it all; else
                they are text.

        Raises:
            InputError: it cannot fit the context, however it is cut into tokens; or there is no
                tokenizer.
        """
        tokenizer = self.tokenizer if trusted else self._plain
        self._check_length(text)
        return list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation; `options` are variables of the chat template.

        Raises:
            InputError: the template refuses it, an option has a name of `apply_chat_template`, or
                it is too long; or there is no template.
        """
        text, literals = self._render(messages, tools, add_generation_prompt, options or {})
        return self._pieces(text, literals) if literals else self._whole([text])[0]

    def chats(self, conversations: Iterable[Sequence[Message]]) -> list[list[int]]:
        """Ids of many conversations, each up to where the answer begins; faster than one by one.

        Raises:
            InputError: as `chat`.
        """
        rendered = [self._render(messages, None, True, {}) for messages in conversations]
        whole = iter(self._whole([text for text, literals in rendered if not literals]))
        return [
            self._pieces(text, literals) if literals else next(whole) for text, literals in rendered
        ]

    def _render(
        self, messages: Any, tools: Any, add_generation_prompt: bool, options: Mapping[str, Any]
    ) -> tuple[str, list[str]]:
        """The conversation as a text, and the special strings whose placeholders are in it."""
        template, literals = self.template, list[str]()
        reserved = (
            set(inspect.signature(self.tokenizer.apply_chat_template).parameters)
            if options
            else set()
        )
        for name in options:
            if name in reserved | {"messages"}:
                raise InputError(
                    f"chat_template_kwargs names {name!r}, which is the server's; leave it out"
                )
        messages, tools, options = (
            self._hide(value, literals) for value in (messages, tools, options)
        )
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt,
                **options,
            )  # fmt: skip
        except Exception as error:  # whatever a template raises for messages it was not written for
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"the chat template refuses these messages ({reason}); change them"
            ) from error
        self._check_length(text)
        return str(text), literals

    def _hide(self, value: Any, literals: list[str]) -> Any:
        """The value with placeholders for the special strings in it, which are added to `literals`."""
        if isinstance(value, str):
            return self._specials.sub(lambda found: _placeholder(found[0], literals), value)
        if isinstance(value, Mapping):
            return {
                self._hide(key, literals): self._hide(one, literals) for key, one in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._hide(one, literals) for one in value]
        return value

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, add_special_tokens=False).input_ids) if texts else []

    def _pieces(self, text: str, literals: list[str]) -> list[int]:
        """Ids of a rendered text with placeholders."""
        ids: list[int] = []
        for place, piece in enumerate(PLACEHOLDER.split(text)):
            if place % 2:
                ids += _inner(self._plain, literals[int(piece)])
            elif piece:
                ids += _inner(self.tokenizer, piece)
        return ids

    def _check_length(self, text: str) -> None:
        if self._context is not None and len(text) > self._context * self._longest:
            raise InputError(
                f"a prompt of {len(text)} characters cannot fit {self._context} tokens; shorten it"
            )

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def _control_strings(self) -> list[str]:
        """What stands for special tokens, MASK among them; the longest first, so that it is found
        first."""
        added = self.tokenizer.added_tokens_decoder.values()
        found = {str(token) for token in added if token.special} | set(
            self.tokenizer.all_special_tokens
        )
        return sorted(filter(None, found), key=len, reverse=True)

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, [*self._control_strings, OPEN, CLOSE])))

    @cached_property
    def _plain(self) -> Any:
        """A copy that takes special strings for text; a copy, because the switch is not safe
        between threads."""
        plain = copy.deepcopy(self.tokenizer)
        specials = [
            AddedToken(text, special=True, normalized=False) for text in self._control_strings
        ]
        plain.add_tokens(specials, special_tokens=True)
        plain.split_special_tokens = True
        return plain


def _inner(tokenizer: Any, piece: str) -> list[int]:
    """Ids of a piece that does not begin the text: after a newline, or some tokenizers put a space
    before it."""
    newline: list[int] = tokenizer("\n", add_special_tokens=False).input_ids
    ids: list[int] = tokenizer("\n" + piece, add_special_tokens=False).input_ids
    if ids[: len(newline)] == newline:
        return ids[len(newline) :]
    return list(tokenizer(piece, add_special_tokens=False).input_ids)


def _placeholder(literal: str, literals: list[str]) -> str:
    literals.append(literal)
    return f"{OPEN}{len(literals) - 1}{CLOSE}"
