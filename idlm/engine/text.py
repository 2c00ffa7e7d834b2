"""`TextStream`: decodes the tokens of a request as they come, and finds stop strings.

A token may end within a character, and a stop string may span several tokens. So the text so far is

    returned | may become a stop string | characters whose bytes are not all there
    ---------+--------------------------+-----------------------------------------
     certain |         held: the next tokens decide

Each call decodes only the last tokens, enough of them that earlier tokens do not matter. The pieces
together equal `tokenizer.decode` of all tokens. There is an exception: with byte fallback, the
decoder shows valid characters of a run of byte tokens as broken if a broken character follows.
Characters that were returned before are not taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BROKEN = "\ufffd"
MAX_WINDOW = 24
TAIL = 12
CHARACTER = 4
"""The most bytes of a character, and so the most tokens."""
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
        stopped_at: the number of tokens up to and including the token that completed a stop
            string; None if there is no stop.
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
        special = (
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        )
        left_out = frozenset(special if skip_special_tokens else ())
        self._decoder = _Decoder(_decode_function(tokenizer, skip_special_tokens), left_out)
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
            return self._return(self._decoder.push(tokens))
        certain = ""
        for token in tokens:
            if self.stopped_at is not None:
                break
            self._tokens += 1
            certain += self._search(self._decoder.push([token]))
        return self._return(certain)

    def finish(self) -> str:
        """End the text and return the rest that was held. Incomplete characters are decoded as the
        tokenizer does. After a stop the rest is empty."""
        if self.stopped_at is not None:
            return ""
        rest, self._held = self._held + self._decoder.finish(), ""
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
        keep = len(text) - max(matcher.matched for matcher in self._matchers)
        self._held = text[keep:]
        return text[:keep]

    def _return(self, text: str) -> str:
        self.text += text
        return text


class _Decoder:
    """Decodes tokens as they come; returns only whole characters.

    `_window` holds tokens whose text was returned. `_open` holds later tokens, which end within a
    character. They decode to one broken character, to one for each byte, or (byte fallback) to a
    run of bytes that all look broken.
    """

    def __init__(self, decode: Decode, left_out: frozenset[int]) -> None:
        self._decode = decode
        self._left_out = left_out
        self._window: list[int] = []
        self._open: list[int] = []
        self._text = ""

    def push(self, tokens: Sequence[int]) -> str:
        """The whole characters that `tokens` complete."""
        # the bytes on both sides of a token that is left out may be one character
        self._open += [token for token in tokens if token not in self._left_out]
        for number in range(len(self._open), max(-1, len(self._open) - CHARACTER), -1):
            text = self._decode(self._window + self._open[:number])
            if not text.endswith(BROKEN):
                return self._settle(number, text)
        return self._give_up()

    def finish(self) -> str:
        """The text of the open tokens, with broken characters."""
        rest = self._decode(self._window + self._open)[len(self._text) :]
        self._open = []
        return rest

    def _settle(self, number: int, text: str) -> str:
        """Move the first `number` open tokens to the window, which then decodes to `text`; return
        the new part of it."""
        new = text[len(self._text) :]
        if (
            new or not text
        ):  # tokens without text are forgotten, or many of them would fill the window
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
    """A function equal to `tokenizer.decode`. It calls the tokenizer's backend if the result is the
    same, since `tokenizer.decode` takes three times as long."""
    stock = getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode
    plain = stock and not tokenizer.clean_up_tokenization_spaces
    decode = tokenizer.backend_tokenizer.decode if plain else tokenizer.decode
    return lambda tokens: str(decode(tokens, skip_special_tokens=skip_special_tokens))


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
