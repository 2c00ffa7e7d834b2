"""Thoughts between two tokens, such as <think> and </think>, before the answer.

qwen3         the output has thoughts if it begins with the first token, or the prompt ends
              within them
deepseek_r1   the output always begins with thoughts, whether their first token is there or not
auto          as qwen3, for models whose chat template and vocabulary have these tokens
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Environment, meta

from idlm.errors import InputError
from idlm.params import Thinking
from idlm.serving.prompts import Prompts

START, END = "<think>", "</think>"
PARSERS = ("auto", "none", "qwen3", "deepseek_r1")
SWITCHES = ("enable_thinking", "thinking")
"""Variables of chat templates that turn thoughts on and off."""
EFFORT = "reasoning_effort"
NOT_JINJA = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Marks of transformers in templates, without effect on their text."""


@dataclass(frozen=True)
class Reasoner:
    """The tokens around a model's thoughts.

    Attributes:
        always: every output begins with thoughts, unless the prompt ends after them.
        special: the tokens are special ones, which decoding must keep.
        turn: the special tokens that begin a turn, among others.
    """

    start: int
    end: int
    always: bool
    special: bool
    turn: frozenset[int]

    def thinking(self, prompt: Sequence[int], budget: int | None) -> Thinking | None:
        """The thoughts of an output after `prompt`; None if they have ended there."""
        last = None
        for token in reversed(prompt):
            if token in (self.start, self.end):
                last = token
            if last is not None or token in self.turn:
                break
        if last == self.end:
            return None
        return Thinking(self.start, self.end, last == self.start or self.always, budget)


def find_reasoner(parser: str, prompts: Prompts) -> Reasoner | None:
    """The reasoner that the option `--reasoning-parser` asks for, if any.

    Raises:
        InputError: it is unknown, or the model lacks its tokens.
    """
    if parser not in PARSERS:
        raise InputError(
            f"--reasoning-parser {parser!r} is unknown; use one of {', '.join(PARSERS)}"
        )
    auto = parser == "auto"
    if parser == "none" or (
        auto and not (prompts.has_template and END in str(prompts.tokenizer.chat_template))
    ):
        return None
    tokenizer = prompts.tokenizer
    vocabulary, special = tokenizer.get_vocab(), special_strings(prompts)
    if not {START, END} <= vocabulary.keys():
        if auto:
            return None
        raise InputError(
            f"--reasoning-parser {parser}: {prompts.name!r} has no tokens {START} and {END}; "
            "use none"
        )
    turn = frozenset(vocabulary[token] for token in special - {START, END} if token in vocabulary)
    return Reasoner(
        vocabulary[START], vocabulary[END], parser == "deepseek_r1", END in special, turn
    )


def special_strings(prompts: Prompts) -> set[str]:
    """The texts of a model's special tokens."""
    added = prompts.tokenizer.added_tokens_decoder.values()
    return {str(one) for one in added if one.special} | set(prompts.tokenizer.all_special_tokens)


class ThoughtParser:
    """Splits the output, as it comes, into thoughts and the rest. White space around the thoughts
    is dropped.

    Args:
        start, end: the texts around thoughts.
        open: the output begins within thoughts.
        raw: keep `start`, `end` and the white space; all but what comes after `end` are thoughts.
        whole: give the thoughts in one piece, when they end.
    """

    def __init__(
        self, start: str, end: str, open: bool, *, raw: bool = False, whole: bool = False
    ) -> None:
        self._start, self._end, self._open = start, end, open
        self._raw, self._whole = raw, whole
        self._held = ""
        self._inside: bool | None = None
        """None before the first text."""
        self._edge = ""
        """White space at the end of the thoughts so far."""
        self._first = True
        """Whether white space is dropped, since no other text came in this part."""

    def push(self, text: str) -> tuple[str, str]:
        """Add text; returns the thoughts and the content that are certain now."""
        self._held += text
        if self._inside is None and not self._begin():
            return "", ""
        if not self._inside:
            content, self._held = self._held, ""
            return "", self._trimmed(content)
        at = self._held.find(self._end)
        if at < 0 and self._whole:
            return "", ""
        if at < 0:
            at = len(self._held) - overlap(self._held, self._end)
            thoughts, self._held = self._held[:at], self._held[at:]
            return self._thought(thoughts), ""
        after = at + len(self._end)
        thoughts = self._thought(self._held[: after if self._raw else at])
        content, self._held = self._held[after:], ""
        self._inside, self._first, self._edge = False, not self._raw, ""
        return thoughts, self._trimmed(content)

    def finish(self) -> tuple[str, str]:
        """The rest, at the end of the output."""
        held, self._held = self._held, ""
        if self._inside or (self._inside is None and self._open):
            return self._thought(held), ""
        return "", held

    def _begin(self) -> bool:
        """Whether the first text decides if these are thoughts."""
        text = self._held.lstrip()
        if self._start.startswith(text) and text != self._start:
            return False
        self._inside = self._open
        if text.startswith(self._start):
            self._inside = True
            self._held = self._held if self._raw else text[len(self._start) :]
        self._first = self._inside and not self._raw
        return True

    def _thought(self, text: str) -> str:
        if self._raw:
            return text
        text = self._trimmed(text)
        if not text:
            return ""
        text, self._edge = self._edge + text, ""
        kept = text.rstrip()
        self._edge = text[len(kept) :]
        return kept

    def _trimmed(self, text: str) -> str:
        if self._first:
            text = text.lstrip()
            self._first = not text
        return text


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` are a beginning of `mark`."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


def effort_options(effort: str | None, template: str) -> dict[str, Any]:
    """Variables of a chat template for `reasoning_effort`: the effort itself, and whether to think
    at all. Those that the template does not read are left out."""
    if effort is None:
        return {}
    wanted = {EFFORT: effort} | dict.fromkeys(SWITCHES, effort != "none")
    return {name: wanted[name] for name in wanted if name in _variables(template)}


@lru_cache(16)
def _variables(template: str) -> frozenset[str]:
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    return frozenset(meta.find_undeclared_variables(environment.parse(NOT_JINJA.sub("", template))))
