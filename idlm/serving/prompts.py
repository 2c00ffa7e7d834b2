"""`Prompts`: the prompts of requests, made token ids beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from idlm.chat_template import PromptEncoder
from idlm.errors import InputError
from idlm.models.architecture import read_config, read_tokenizer
from idlm.models.sources import resolve

T = TypeVar("T")


class Prompts(PromptEncoder):
    """Encodes and decodes for a server, in a thread: the loop stays free, and the other cores are
    the engine's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, name: str, context: int) -> None:
        super().__init__(tokenizer, name, context)
        self.context = context
        self._tokens: dict[int, str] = {}
        self._thread = ThreadPoolExecutor(1, "prompts")
        if tokenizer is not None:
            _ = (
                self._specials,
                self._plain,
                self._longest,
            )  # now, and not in the first request that needs them

    @classmethod
    def load(cls, model: str) -> Prompts:
        """For a model as `idlm.load` knows it; no weights are read.

        Raises:
            InputError: there is no such model, or its tokenizer is broken.
        """
        folder, _ = resolve(model)
        config = read_config(folder)
        return cls(read_tokenizer(folder, config), model, int(config.max_position_embeddings))

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what takes long away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt's ids, special tokens included; empty without a tokenizer."""
        return (
            ""
            if self._tokenizer is None
            else str(self.tokenizer.decode(list(ids), skip_special_tokens=False))
        )

    def token(self, token: int) -> str:
        """The text of one token."""
        if token not in self._tokens:
            self._tokens[token] = self.decode([token])
        return self._tokens[token]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of any ids.

        Raises:
            InputError: one is outside the tokenizer's vocabulary, or there is no tokenizer.
        """
        size = len(self.tokenizer)
        for token in ids:
            if not 0 <= token < size:
                raise InputError(
                    f"tokens holds an id outside the vocabulary 0..{size - 1}; take it out"
                )
        return self.decode(ids)
