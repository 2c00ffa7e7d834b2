"""The text of a token alone, and where tokens begin in the text of all."""

from __future__ import annotations

from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from idlm.engine.text import BROKEN, BYTE_TOKEN, TextStream, has_byte_tokens

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
"""The byte that a character of a byte-level vocabulary stands for."""


class TokenTexts:
    """What each token adds inside a text; special tokens are shown.

    A tokenizer may drop a space at the start of a text, so a token is decoded after another.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._byte_tokens = has_byte_tokens(tokenizer)

    @cached_property
    def _before(self) -> list[int]:
        return list(self._tokenizer("a", add_special_tokens=False).input_ids[-1:])

    def bytes(self, token: int) -> bytes:
        """The token's bytes, which may be a part of a character."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if self._byte_tokens and (match := BYTE_TOKEN.fullmatch(name)):
            return bytes([int(match[1], 16)])
        before = self._decode(self._before)
        text = self._decode([*self._before, token])[len(before) :]
        if BROKEN in text and BYTE_OF.keys() >= set(name):
            return bytes(BYTE_OF[character] for character in name)
        return text.encode()

    def text(self, token: int) -> str:
        r"""The token's text; "bytes:\xe2\x82", as in OpenAI's API, for a part of a character."""
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


class Offsets:
    """Where tokens begin in the text of all of them, in characters.

    A token within a character begins where the character does.

    Args:
        start: the offset of the first token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True, start: int = 0
    ) -> None:
        self._stream = TextStream(tokenizer, skip_special_tokens)
        self._start = start
        self._end = start

    def push(self, token: int) -> int:
        """Append a token; returns its offset."""
        begin = self._end
        self._stream.push([token])
        whole = self._stream.undecided().rstrip(BROKEN)
        # a run of byte tokens looks broken until its last character is whole
        self._end = max(begin, self._start + len(self._stream.text) + len(whole))
        return begin
