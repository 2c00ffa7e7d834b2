"""`Prompts`: encodes the prompts of requests, beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from idlm.chat_template import PromptEncoder
from idlm.engine.token_text import Offsets, TokenTexts
from idlm.errors import InputError
from idlm.models.architecture import context_length, read_config, read_tokenizer
from idlm.models.sources import resolve

T = TypeVar("T")


class Prompts(PromptEncoder):
    """Encodes and decodes in one thread: the event loop stays free, and so do the engine's
    cores."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, name: str, context: int) -> None:
        super().__init__(tokenizer, name, context)
        self.context = context
        self._tokens: dict[int, str] = {}
        self._thread = ThreadPoolExecutor(1, "prompts")
        if tokenizer is not None:
            # cached properties: computed now and not in the first request that needs them
            _ = (self._specials, self._plain, self._longest)

    @classmethod
    def load(cls, model: str, max_model_len: int | None = None) -> Prompts:
        """For a model as `idlm.load` names it, without reading its weights.

        Raises:
            InputError: there is no such model, or its tokenizer is broken.
        """
        folder, _ = resolve(model)
        config = read_config(folder, max_model_len)
        context = context_length(config, max_model_len)
        return cls(read_tokenizer(folder, config), model, context)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in the thread, one piece of work after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included; "" without a tokenizer."""
        return (
            ""
            if self._tokenizer is None
            else str(self.tokenizer.decode(list(ids), skip_special_tokens=False))
        )

    @cached_property
    def _texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)

    def token(self, token: int) -> str:
        """The text of one token, cached; "" without a tokenizer."""
        if token not in self._tokens:
            self._tokens[token] = "" if self._tokenizer is None else self._texts.text(token)
        return self._tokens[token]

    def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer's configuration as JSON has it, without paths of this machine.

        Raises:
            InputError: the model has none.
        """
        tokenizer = self.tokenizer
        kept = {
            name: value
            for name, value in tokenizer.init_kwargs.items()
            if not name.endswith(("_file", "name_or_path"))
        }
        kept |= tokenizer.special_tokens_map
        kept |= {"tokenizer_class": type(tokenizer).__name__}
        if self.has_template:
            kept["chat_template"] = self.template_for(tools=False)
        return {name: _as_json(value) for name, value in kept.items()}

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be a part of a character."""
        return b"" if self._tokenizer is None else self._texts.bytes(token)

    def offsets(self, start: int = 0, skip_special_tokens: bool = True) -> Callable[[int], int]:
        """A function from each token of a text in turn to where it begins, in characters; the text
        begins at `start`."""
        if self._tokenizer is None:
            return lambda token: start
        return Offsets(self.tokenizer, skip_special_tokens, start).push

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids of a client.

        Raises:
            InputError: an id is outside the vocabulary, or there is no tokenizer.
        """
        size = len(self.tokenizer)
        for token in ids:
            if not 0 <= token < size:
                raise InputError(
                    f"tokens holds an id outside the vocabulary 0..{size - 1}; take it out"
                )
        return self.decode(ids)


def _as_json(value: Any) -> Any:
    """A value of a tokenizer's configuration; special tokens become their texts."""
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
