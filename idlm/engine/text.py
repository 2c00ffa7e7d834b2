"""`TextStream`: the text of one request as its tokens come, and the stop strings that end it.

A token may end in the middle of a character, and a stop string may begin in one token and end in
another. So the text so far is

    returned | may become a stop string | characters whose bytes are not all there
    ---------+--------------------------+-----------------------------------------
     certain |         held: the next tokens tell what becomes of it

Only a window of the last tokens is decoded each time, a *tail* long enough that what comes before
does not matter. Together the pieces are `tokenizer.decode` of all tokens. (The exception: a run of
byte tokens of a tokenizer with byte fallback, whose decoder shows valid characters as broken once a
broken one follows them; what was returned stays.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BROKEN = "\ufffd"
MAX_WINDOW = 24
TAIL = 12
CHARACTER = 4
"""The most bytes, and so the most tokens, of a character."""
Decode = Callable[[list[int]], str]


class TextStream:
    """The text of one request.

    Args:
        tokenizer: of the model.
        skip_special_tokens: leave special tokens out.
        stop: strings of which the first one completed ends the text.
        include_stop: whether that string stays at the end of the text.
        min_tokens: no stop string is looked for in so many first tokens.

    Attributes:
        text: all that was returned so far.
        stopped_at: how many tokens there are up to and including the one that completed a stop
            string; None before.
        stopped_by: that stop string.
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
        """Take the next tokens, and return the text that is certain now. After a stop, tokens are
        ignored.

        Without stop strings it is cheapest to push many tokens at once: nothing is decoded per
        token.
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
        """No more tokens: the text that was held, half characters as the tokenizer decodes them;
        none after a stop."""
        if self.stopped_at is not None:
            return ""
        rest, self._held = self._held + self._decoder.finish(), ""
        return self._return(rest)

    def _search(self, text: str) -> str:
        """Follow the stop strings through new text; return what can no longer become one."""
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
    """Decodes tokens as they come; never returns the first bytes of a character without the rest.

    `_window` holds tokens whose text was returned, `_open` those after them: they end within a
    character, which decodes to a broken one, or to one for each of its bytes, or (byte fallback)
    makes the whole run of bytes look broken.
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
        """What is left, broken or not."""
        rest = self._decode(self._window + self._open)[len(self._text) :]
        self._open = []
        return rest

    def _settle(self, number: int, text: str) -> str:
        """Move the first open tokens to the window, which then has this text; return what that
        adds."""
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
        """Settle what stays broken, for it is more than half a character.

        That is all up to the last place where the text is that of both sides joined: no character
        spans it.
        """
        whole = self._decode(self._window + self._open)
        for number in range(len(self._open) - 1, len(self._open) - 1 - CHARACTER, -1):
            text = self._decode(self._window + self._open[:number])
            if whole == text + self._decode(self._open[number:]):
                return self._settle(number, text)
        return ""

    def _trim(self) -> None:
        """Keep the tail of the window, if it decodes by itself to the end of the text.

        One that begins within a character does not: so as many are tried as a character has bytes.
        """
        for size in range(TAIL, TAIL + CHARACTER):
            text = self._decode(self._window[-size:])
            if self._text.endswith(text) and bool(text) == bool(self._text):
                self._window, self._text = self._window[-size:], text
                return


def _decode_function(tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool) -> Decode:
    """`tokenizer.decode`, without its own overhead (three times the work) where it adds nothing to
    the backend's."""
    stock = getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode
    plain = stock and not tokenizer.clean_up_tokenization_spaces
    decode = tokenizer.backend_tokenizer.decode if plain else tokenizer.decode
    return lambda tokens: str(decode(tokens, skip_special_tokens=skip_special_tokens))


class _Matcher:
    """How much of one stop string the text so far ends with (Knuth, Morris, Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._shorter = [0]
        for place in range(1, len(stop)):
            self._shorter.append(self._extend(self._shorter[place - 1], stop[place]))

    def step(self, character: str) -> bool:
        """Take a character; whether it completes the stop string."""
        self.matched = self._extend(self.matched, character)
        if self.matched < len(self.stop):
            return False
        self.matched = self._shorter[-1]
        return True

    def _extend(self, matched: int, character: str) -> int:
        """The longest beginning of the stop string that ends in `character`, given one that ended
        just before it."""
        while matched and self.stop[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.stop[matched] == character)
