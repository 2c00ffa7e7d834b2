"""Finds the answer in a text: the letter of a choice, a number or expression, the code."""

from __future__ import annotations

import re

LETTERS = "ABCDEFGHIJ"
SAID = re.compile(
    r"answer\s*(?:is|:)?\s*:?\s*\**\s*\(?\s*\\?(?:boxed\{)?\(?([A-J])\b", re.IGNORECASE
)
ALONE = re.compile(r"(?<![A-Za-z'])\(?([A-J])\)?(?![A-Za-z'])")
FENCE = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
PYTHON = ("", "python", "python3", "py")


def after_thinking(text: str, start: str, end: str, inside: bool = False) -> str:
    """The answer after the thoughts; empty if they never end, all of a text without thoughts.

    Args:
        inside: the prompt has opened the thoughts already.
    """
    if end in text:
        return text.rpartition(end)[2].lstrip()
    return "" if inside or text.lstrip().startswith(start) else text


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}; None if there is none that is closed."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    first = text.index("{", start) + 1
    depth = 1
    for at in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[first:at]
    return None


def letter(text: str, choices: int) -> str | None:
    r"""The letter of the choice that a text ends up with.

    The last "answer is X" counts, else the last \boxed{X}, else the last letter that stands alone.
    """
    known = LETTERS[:choices]
    said = [found.upper() for found in SAID.findall(text)]
    box = boxed(text) or ""
    inside = re.fullmatch(r"\s*(?:\\text\{)?\(?([A-J])\)?\}?\s*", box)
    alone = ALONE.findall(text)
    for found in (said[-1:], inside.groups() if inside else (), alone[-1:]):
        if found and found[0] in known:
            return str(found[0])
    return None


def code(text: str) -> str | None:
    """The first block of Python in a text with fences, None if the text has no fence.

    A block that is not closed counts: the output may have been cut.
    """
    blocks = [body for language, body in FENCE.findall(text) if language.lower() in PYTHON]
    return blocks[0] if blocks else None
