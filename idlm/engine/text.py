"""`TextStream`: decodes the tokens of a request as they come, and finds stop strings.

A token may end within a character, and a stop string may span several tokens. So the text so far is

    returned | may become a stop string | the clean-up may join it | characters that are not whole
    ---------+--------------------------+--------------------------+------------------------------
     certain |                     held: the next tokens decide

Each call decodes only the last tokens, enough of them that earlier tokens do not matter. The pieces
together equal `tokenizer.decode` of all tokens, for every kind of tokenizer:

* Byte-level: a character is whole when its last byte is there.
* Byte fallback: the decoder shows all of a run of byte tokens as broken if one character of it is,
  so the whole run is held until it ends.
* `clean_up_tokenization_spaces` joins "is n't" when "n't" is whole, so "is n" is held at " n".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BROKEN = "\ufffd"
MAX_WINDOW = 24
TAIL = 12
CHARACTER = 4
"""The most bytes of a character, and so the most tokens."""
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
JOINABLE = frozenset(("", "n", "n'", "'", "'v", "v", "'r", "r"))
"""All beginnings and middles of what `clean_up_tokenization` joins to the word before: n't 'm 's
've 're and ' between spaces. Its other rules join one character."""
Decode = Callable[[list[int]], str]


class TextStream:
    """The text of one request.

    Args:
        tokenizer: the model's tokenizer.
        skip_special_tokens: leave special tokens out.
        stop: stop strings; the first that is complete ends the text.
        include_stop: keep the stop string at the end of the text.
        min_tokens: stop strings that are complete within so many first tokens do not count.

    Attributes:
        text: the text returned so far.
        stopped_at: the number of tokens up to and including the one that made a stop string
            certain; None if there is no stop.
        stopped_by: the stop string that ended the text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.text = ""
        self.stopped_at: int | None = None
        self.stopped_by = ""
        self._decoder = _Decoder(tokenizer, skip_special_tokens)
        self._clean_up = _CleanUp(tokenizer)
        self._matchers = [_Matcher(text) for text in stop]
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Append tokens and return the text that has become certain. Tokens after a stop are
        ignored.

        Without stop strings all tokens of a call are decoded together.
        """
        if not self._matchers:
            return self._return(self._clean_up.push(self._decoder.push(tokens)))
        certain = ""
        for token in tokens:
            if self.stopped_at is not None:
                break
            self._tokens += 1
            certain += self._search(self._clean_up.push(self._decoder.push([token])))
        return self._return(certain)

    def undecided(self) -> str:
        """The text that is held, as it would be if no token followed. Characters that are not whole
        are decoded as the tokenizer does."""
        return self._held + self._clean_up.rest(self._decoder.rest())

    def finish(self) -> str:
        """End the text and return the rest that was held. After a stop the rest is empty."""
        if self.stopped_at is not None:
            return ""
        rest = self._search(self._clean_up.rest(self._decoder.rest()))
        rest, self._held = rest + self._held, ""
        self._decoder.clear()
        self._clean_up.clear()
        return self._return(rest)

    def _search(self, text: str) -> str:
        """Search new text for stop strings; return the text that cannot be part of one any more."""
        for place, character in enumerate(text):
            complete = [matcher.stop for matcher in self._matchers if matcher.step(character)]
            if complete and self._tokens > self._min_tokens:
                self.stopped_at, self.stopped_by = self._tokens, max(complete, key=len)
                until = self._held + text[: place + 1]
                self._held = ""
                return until if self._include_stop else until[: -len(self.stopped_by)]
        text = self._held + text
        keep = len(text) - max((matcher.matched for matcher in self._matchers), default=0)
        self._held = text[keep:]
        return text[:keep]

    def _return(self, text: str) -> str:
        self.text += text
        return text


class _Decoder:
    """Decodes tokens as they come; returns only text that later tokens do not change, but for the
    clean-up.

    `_window` holds tokens whose text was returned. `_open` holds later tokens, which end within a
    character or within a run of byte tokens. Tokens that the tokenizer leaves out are in neither,
    since the bytes on both sides of them may be one character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool) -> None:
        self._decode = _decode_function(tokenizer, skip_special_tokens)
        self._name = _name_function(tokenizer)
        special = (
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        )
        self._left_out = frozenset(special if skip_special_tokens else ())
        self._byte_tokens = has_byte_tokens(tokenizer)
        self._window: list[int] = []
        self._open: list[int] = []
        self._run = 0  # the byte tokens at the end of `_open`
        self._text = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns the text that no later token can change."""
        for token in tokens:
            name = None if token in self._left_out else self._name(token)
            if name is not None:
                self._open.append(token)
                is_byte = self._byte_tokens and BYTE_TOKEN.fullmatch(name)
                self._run = self._run + 1 if is_byte else 0
        ready = len(self._open) - self._run
        if ready == 0:
            return ""
        if self._byte_tokens:  # all other tokens are whole characters
            return self._settle(ready, self._decode(self._window + self._open[:ready]))
        for number in range(ready, max(-1, ready - CHARACTER), -1):
            text = self._decode(self._window + self._open[:number])
            if not text.endswith(BROKEN):
                return self._settle(number, text)
        return self._give_up()

    def rest(self) -> str:
        """The text of the open tokens as if no token followed."""
        return self._decode(self._window + self._open)[len(self._text) :] if self._open else ""

    def clear(self) -> None:
        """Forget the open tokens."""
        self._open, self._run = [], 0

    def _settle(self, number: int, text: str) -> str:
        """Move the first `number` open tokens to the window, which then decodes to `text`; return
        the new part of it."""
        new = text[len(self._text) :]
        self._window += self._open[:number]
        self._text = text
        del self._open[:number]
        if len(self._window) > MAX_WINDOW:
            self._trim()
        return new

    def _give_up(self) -> str:
        """Settle bytes that stay broken, since they are more than a part of a character.

        They are settled up to the last place that no character spans: the text of both sides
        joined there equals the whole text.
        """
        whole = self._decode(self._window + self._open)
        for number in range(len(self._open) - 1, len(self._open) - 1 - CHARACTER, -1):
            text = self._decode(self._window + self._open[:number])
            if whole == text + self._decode(self._open[number:]):
                return self._settle(number, text)
        return ""

    def _trim(self) -> None:
        """Keep only the tail of the window, if its text is the end of the window's text.

        A tail that begins within a character fails, so as many sizes are tried as a character has
        bytes.
        """
        for size in range(TAIL, TAIL + CHARACTER):
            text = self._decode(self._window[-size:])
            if self._text.endswith(text) and bool(text) == bool(self._text):
                self._window, self._text = self._window[-size:], text
                return


def _decode_function(tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool) -> Decode:
    """A function equal to `tokenizer.decode` without its clean-up. It calls the tokenizer's backend
    if the result is the same, since `tokenizer.decode` takes three times as long."""
    if getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode:
        backend = tokenizer.backend_tokenizer
        return lambda tokens: str(backend.decode(tokens, skip_special_tokens=skip_special_tokens))
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return lambda tokens: str(tokenizer.decode(tokens, **options))


def _name_function(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str | None]:
    """A function from a token to its string in the vocabulary; None for a row of the model that is
    no token, which decodes to nothing."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        name: Callable[[int], str | None] = tokenizer.backend_tokenizer.id_to_token
        return name
    return _names(tokenizer).get


@lru_cache(2)
def _names(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {number: name for name, number in tokenizer.get_vocab().items()}


def has_byte_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tokens like <0x0A> stand for bytes (byte fallback)."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        find = tokenizer.backend_tokenizer.token_to_id
        return all(find(name) is not None for name in ("<0x00>", "<0xFF>"))
    return {"<0x00>", "<0xFF>"} <= set(_names(tokenizer).values())


class _CleanUp:
    """The clean-up of `tokenizer.decode`, in pieces: `push` returns what no later text changes.

    The clean-up removes spaces before some words. A rule begins with a space, so it acts across a
    place of the text only if the word that ends there is `JOINABLE`. The text can be cut at any
    other place.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._clean = tokenizer.clean_up_tokenization if _cleans_up(tokenizer) else None
        self._held = ""

    def push(self, text: str) -> str:
        if self._clean is None:
            return text
        text = self._held + text
        end = len(text)
        while (space := text.rfind(" ", 0, end)) >= 0 and text[space + 1 : end] in JOINABLE:
            end = space
        self._held = text[end:]
        return str(self._clean(text[:end]))

    def rest(self, text: str) -> str:
        """What is held, followed by `text`, as if no text followed."""
        return text if self._clean is None else str(self._clean(self._held + text))

    def clear(self) -> None:
        self._held = ""


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `tokenizer.decode` cleans up; transformers leaves BPE out unless it is forced."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    bpe = backend is not None and type(backend.model).__name__ == "BPE"
    return bool(tokenizer.clean_up_tokenization_spaces) and (
        not bpe or bool(getattr(tokenizer, forced, True))
    )


class _Matcher:
    """Matches one stop string (Knuth, Morris, Pratt). The text ends with the first `matched`
    characters of it."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._shorter = [0]
        for place in range(1, len(stop)):
            self._shorter.append(self._extend(self._shorter[place - 1], stop[place]))

    def step(self, character: str) -> bool:
        """Append a character to the text; True if it completes the stop string."""
        self.matched = self._extend(self.matched, character)
        if self.matched < len(self.stop):
            return False
        self.matched = self._shorter[-1]
        return True

    def _extend(self, matched: int, character: str) -> int:
        """The length of the longest prefix of the stop string that the text ends with after
        `character`, given the length `matched` before it."""
        while matched and self.stop[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.stop[matched] == character)
