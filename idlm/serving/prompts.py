"""Text and messages become token ids. Special tokens in what a user wrote are text: they never mean anything.

    messages -> placeholders for special strings -> chat template -> cut at the placeholders -> ids of each piece
                                                                        template's own text: specials allowed
                                                                        a user's special string: plain text

A template may use its own special tokens; so it cannot be told afterwards which came from whom, and the user's are
taken out before. Without any, the ids are those of `LLM.chat`.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from transformers import AddedToken, PreTrainedTokenizerBase

from idlm.errors import InputError
from idlm.models.architecture import read_config, read_tokenizer
from idlm.models.sources import first_line, resolve
from idlm.serving.messages import Ready

T = TypeVar("T")
OPEN, CLOSE = "\ue000", "\ue001"
"""Private characters around the number of a special string; a user's own are treated as special strings too."""
PLACEHOLDER = re.compile(f"{OPEN}([0-9]+){CLOSE}")


class Prompts:
    """Encodes what requests hold.

    Args:
        tokenizer: the model's; None: only token ids can be sent.
        name: of the model, for messages.
        context: positions of a sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, name: str, context: int) -> None:
        self.name, self.context = name, context
        self._tokenizer = tokenizer
        # one at a time: the loop stays free, and the machine's other cores are the engine's
        self._thread = ThreadPoolExecutor(1, "prompts")
        if tokenizer is not None:
            specials = _control_strings(tokenizer)
            self._specials = re.compile("|".join(map(re.escape, [*specials, OPEN, CLOSE])))
            self._plain = _without_specials(tokenizer, specials)
            self._longest = context * max(map(len, tokenizer.get_vocab()))

    @classmethod
    def load(cls, model: str) -> Prompts:
        """For a model as `idlm.load` knows it; no weights are read.

        Raises:
            InputError: there is no such model, or its tokenizer is broken.
        """
        folder, _ = resolve(model)
        config = read_config(folder)
        return cls(read_tokenizer(folder, config), model, int(config.max_position_embeddings))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer (untyped: half of its interface is).

        Raises:
            InputError: it has none.
        """
        if self._tokenizer is None:
            raise InputError(f"model {self.name!r} has no tokenizer; send token ids to /v1/completions")
        return self._tokenizer

    @property
    def template(self) -> str:
        """The chat template.

        Raises:
            InputError: the model has none.
        """
        template = self.tokenizer.chat_template
        if not template:
            raise InputError(f"model {self.name!r} has no chat template; use /v1/completions")
        return str(self.tokenizer.get_chat_template())

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what takes long away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. The tokenizer adds what it adds itself (a start token, say); nothing in the text is special.

        Raises:
            InputError: it cannot fit the context, however it is cut into tokens.
        """
        self._check_length(text)
        return list(self._plain(text, add_special_tokens=add_special_tokens).input_ids)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation; `options` are variables of the chat template.

        Raises:
            InputError: the template refuses it, an option's name is not the template's to have, or it is too long.
        """
        literals: list[str] = []
        hidden = [self._hide(value, literals) for value in (messages, tools, options or {})]
        text = self._render(hidden[0], hidden[1], add_generation_prompt, hidden[2])
        self._check_length(text)
        if not literals:
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        pieces = PLACEHOLDER.split(text)
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                ids += self._inner(self._plain, literals[int(piece)])
            elif piece:
                ids += self._inner(self.tokenizer, piece)
        return ids

    def _hide(self, value: Any, literals: list[str]) -> Any:
        """The value with placeholders for the special strings in it, which are added to `literals`."""
        if isinstance(value, str):
            return self._specials.sub(lambda found: _placeholder(found[0], literals), value)
        if isinstance(value, Mapping):
            return {self._hide(key, literals): self._hide(one, literals) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(one, literals) for one in value]
        return value

    def _render(self, messages: Any, tools: Any, add_generation_prompt: bool, options: Mapping[str, Any]) -> str:
        reserved = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) | {"messages"}
        for name in options:
            if name in reserved:
                raise InputError(f"chat_template_kwargs names {name!r}, which is the server's; leave it out")
        template = self.template
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt,
                **options,
            )  # fmt: skip
        except Exception as error:  # whatever a template raises for messages it was not written for
            raise InputError(f"the chat template refuses these messages ({first_line(error)}); change them") from error
        return str(text)

    def _inner(self, tokenizer: Any, piece: str) -> list[int]:
        """Ids of a piece that does not begin the text: after a newline, or some tokenizers put a space before it."""
        newline: list[int] = tokenizer("\n", add_special_tokens=False).input_ids
        ids: list[int] = tokenizer("\n" + piece, add_special_tokens=False).input_ids
        if ids[: len(newline)] == newline:
            return ids[len(newline) :]
        return list(tokenizer(piece, add_special_tokens=False).input_ids)

    def _check_length(self, text: str) -> None:
        self.tokenizer  # noqa: B018  # there has to be one
        if len(text) > self._longest:
            raise InputError(f"a prompt of {len(text)} characters cannot fit {self.context} tokens; shorten it")

    def check(self, ids: Sequence[int], engine: Ready) -> list[int]:
        """Ids as they may go to the engine.

        Raises:
            InputError: there are none or too many, or one is MASK or outside the vocabulary.
        """
        if not 0 < len(ids) < engine.context:
            raise InputError(f"a prompt has {len(ids)} tokens; this model takes 1 to {engine.context - 1}")
        if engine.mask_id in ids:
            raise InputError(f"a prompt holds the MASK token {engine.mask_id}; take it out, it stands for no text")
        if not (min(ids) >= 0 and max(ids) < engine.vocab_size):
            wrong = next(token for token in ids if not 0 <= token < engine.vocab_size)
            shown = wrong if abs(wrong) < 2**64 else "of more than 64 bits"
            raise InputError(f"prompt token {shown} is outside the vocabulary 0..{engine.vocab_size - 1}")
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt's ids, special tokens included; empty without a tokenizer."""
        return "" if self._tokenizer is None else str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of any ids.

        Raises:
            InputError: one is outside the tokenizer's vocabulary, or there is no tokenizer.
        """
        size = len(self.tokenizer)
        for token in ids:
            if not 0 <= token < size:
                raise InputError(f"tokens holds an id outside the vocabulary 0..{size - 1}; take it out")
        return self.decode(ids)


def _control_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The strings that stand for special tokens, MASK among them; the longest first, so that it is found first."""
    added = tokenizer.added_tokens_decoder.values()
    found = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    return sorted(filter(None, found), key=len, reverse=True)


def _without_specials(tokenizer: PreTrainedTokenizerBase, specials: Sequence[str]) -> Any:
    """A copy that takes special strings for text; a copy, because the switch is not safe between threads."""
    plain: Any = copy.deepcopy(tokenizer)
    plain.add_tokens([AddedToken(text, special=True, normalized=False) for text in specials], special_tokens=True)
    plain.split_special_tokens = True
    return plain


def _placeholder(literal: str, literals: list[str]) -> str:
    literals.append(literal)
    return f"{OPEN}{len(literals) - 1}{CLOSE}"
