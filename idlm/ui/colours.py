"""Colours of tokens by their source, and the split of a text into its tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from unicodedata import category

from rich.text import Text

COLOURS = {
    "first": "bright_black",
    "accepted": "green",
    "corrected": "bold red",
    "bonus": "bold cyan",
}
LEGEND = {
    "first": "of the first forward, which has no drafts",
    "accepted": "a draft that AR would have chosen too",
    "corrected": "a wrong draft, replaced",
    "bonus": "the token after the drafts, all accepted",
}
"""Colours and words are those of the page in web/."""

Token = tuple[str, str]
"""The text of a token alone, and its source as in `Result.sources`."""


class Painter:
    """Colours a text that comes in pieces by the tokens it is made of.

    The text of a token alone can differ from what it adds to the whole text: a part of a character,
    a space that the tokenizer drops, text held back for a stop string. Text that cannot be assigned
    has the colour of the last token before it.
    """

    def __init__(self) -> None:
        self._tokens: deque[Token] = deque()
        self._last = "first"

    def paint(self, text: str, tokens: Sequence[Token]) -> Text:
        """The next piece in colour; `tokens` are those that came with it."""
        self._tokens.extend(tokens)
        painted = Text()
        while text and self._tokens:
            token_text, self._last = self._tokens.popleft()
            end = self._end(text, token_text)
            if end is None:  # the text does not begin with the token's own
                self._last = self._tokens.pop()[1] if self._tokens else self._last
                self._tokens.clear()
                break
            painted.append(harmless(text[:end]), COLOURS[self._last])
            text = text[end:]
        painted.append(harmless(text), COLOURS[self._last])
        return painted

    def _end(self, text: str, token_text: str) -> int | None:
        """The end of a token at the start of `text`, perhaps after white space; None if it is not
        there."""
        at = text.find(token_text)
        return at + len(token_text) if at >= 0 and not text[:at].strip() else None


def harmless(text: str) -> str:
    """The text without control characters, which could rewrite the terminal."""
    return "".join(
        character
        if character in "\n\t" or category(character) != "Cc"
        else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
