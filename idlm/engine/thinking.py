"""Thoughts in the law of a request: their budget, and the guide that begins after them.

The tokens allowed are a function of the output alone, so AR and ISD share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from idlm.engine.guide import Matcher, holds, packed
from idlm.params import Thinking


class ThinkingMatcher:
    """Follows an output that may begin with thoughts; see `Matcher` for the form of its masks.

    Within the budget thoughts may be anything, but before a guide no end token. After it only the
    thoughts' end is allowed. Before its first token an output may begin thoughts or the answer.

    Args:
        guide: of the answer; None: it may be anything.
        ends: the tokens that end an output.
    """

    def __init__(
        self, thinking: Thinking, guide: Matcher | None, vocab_size: int, ends: Iterable[int]
    ) -> None:
        self._thinking, self._guide = thinking, guide
        self._state = thinking.first
        self._anything = packed(torch.ones(vocab_size, dtype=torch.bool))
        self._start, self._end = (_only(one, vocab_size) for one in (thinking.start, thinking.end))
        no_end = torch.ones(vocab_size, dtype=torch.bool)
        no_end[[] if guide is None else sorted(ends)] = False
        self._thoughts = packed(no_end)

    def restricts(self, ahead: int) -> bool:
        """Whether one of the next `ahead` tokens may be restricted."""
        if self._guide is not None:
            return True
        budget = self._thinking.budget
        return self._state is not None and budget is not None and self._state + ahead > budget

    @property
    def error(self) -> str:
        """Why no token is allowed; meaningful only in that case."""
        if self._state is None and self._guide is not None:
            return self._guide.error
        return "the request's bans leave no token that may come in the thoughts"

    def allowed(self, ahead: Sequence[int] = ()) -> Tensor:
        """The tokens allowed after the committed tokens and the tokens `ahead`."""
        state, rest = self._follow(ahead)
        if state is None or state < 0:
            answer = self._anything if self._guide is None else self._guide.allowed(rest)
            return answer if state is None else answer | self._start
        budget = self._thinking.budget
        return self._thoughts if budget is None or state < budget else self._end

    def advance(self, tokens: Sequence[int]) -> int:
        """Append committed tokens up to the first that is not allowed, and return their number."""
        good = 0
        while good < len(tokens) and holds(self.allowed(tokens[:good]), tokens[good]):
            good += 1
        self._state, answer = self._follow(tokens[:good])
        if self._guide is not None:
            self._guide.advance(answer)
        return good

    def _follow(self, tokens: Sequence[int]) -> tuple[int | None, Sequence[int]]:
        """The state after `tokens`, and those of them that belong to the answer."""
        state = self._state
        for at, token in enumerate(tokens):
            if state is None:
                return None, tokens[at:]
            before, state = state, self._thinking.after(state, token)
            if state is None:
                return None, tokens[at + (before >= 0) :]
        return state, ()


def _only(token: int, vocab_size: int) -> Tensor:
    flags = torch.zeros(vocab_size, dtype=torch.bool)
    flags[token] = True
    return packed(flags)
