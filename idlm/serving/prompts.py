"""`Prompts`: encodes the prompts of requests, beside the event loop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from idlm.chat_template import PromptEncoder
from idlm.engine.text import BROKEN, TextStream
from idlm.errors import InputError
from idlm.models.architecture import read_config, read_tokenizer
from idlm.models.sources import resolve

T = TypeVar("T")
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""By the character that byte-level tokenizers write for it."""
BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")


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
    def load(cls, model: str) -> Prompts:
        """For a model as `idlm.load` names it, without reading its weights.

        Raises:
            InputError: there is no such model, or its tokenizer is broken.
        """
        folder, _ = resolve(model)
        config = read_config(folder)
        return cls(read_tokenizer(folder, config), model, int(config.max_position_embeddings))

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

    def token(self, token: int) -> str:
        """The text of one token, cached."""
        if token not in self._tokens:
            self._tokens[token] = self.decode([token])
        return self._tokens[token]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token. They may be a part of a character, which has no text."""
        text = self.token(token)
        if BROKEN not in text:
            return text.encode()
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if match := BYTE_FALLBACK.fullmatch(piece):
            return bytes.fromhex(match[1])
        if set(piece) <= set(BYTES):
            return bytes(BYTES[character] for character in piece)
        return text.encode()

    def token_name(self, token: int) -> str:
        """The text of one token, or OpenAI's form of its bytes if it is a part of a character."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def stream(self, skip_special_tokens: bool) -> TextStream | None:
        """Decodes tokens as they come; None without a tokenizer."""
        return None if self._tokenizer is None else TextStream(self._tokenizer, skip_special_tokens)

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
