"""The colours of tokens by where they came from, and how a text is parted among its tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from unicodedata import category

from rich.text import Text

COLOURS = {"first": "white", "accepted": "green", "corrected": "bold red", "bonus": "bold cyan"}
LEGEND = {
    "accepted": "a draft that AR would have chosen too",
    "corrected": "a wrong draft, replaced",
    "bonus": "the token after the drafts, all accepted",
}

Token = tuple[str, str]
"""A token's own text, and its source as in `Result.sources`."""


class Painter:
    """Colours a text that comes in pieces by the tokens it is made of.

    A token's text alone can differ from what it adds to the whole: a part of a character, a space
    that the tokenizer leaves out, text held back for a stop string. What cannot be told apart has
    the colour of the last token it is of.
    """

    def __init__(self) -> None:
        self._tokens: deque[Token] = deque()
        self._last = "first"

    def paint(self, text: str, tokens: Sequence[Token]) -> Text:
        """The next piece in colour; `tokens` are those that came with it."""
        self._tokens.extend(tokens)
        painted = Text()
        while text and self._tokens:
            own, self._last = self._tokens.popleft()
            end = self._end(text, own)
            if end is None:  # no way to part them
                self._last = self._tokens.pop()[1] if self._tokens else self._last
                self._tokens.clear()
                break
            painted.append(harmless(text[:end]), COLOURS[self._last])
            text = text[end:]
        painted.append(harmless(text), COLOURS[self._last])
        return painted

    def _end(self, text: str, own: str) -> int | None:
        """Where the token ends that the text begins with, perhaps after a space."""
        at = text.find(own)
        return at + len(own) if at >= 0 and not text[:at].strip() else None


def harmless(text: str) -> str:
    """The text without control characters, which could rewrite the terminal."""
    return "".join(
        one if one in "\n\t" or category(one) != "Cc" else "\N{REPLACEMENT CHARACTER}"
        for one in text
    )
