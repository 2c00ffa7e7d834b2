"""Lookup drafts: the tokens that followed the last occurrence of the text's end in the text itself.

They need no MASK rows and no training (prompt lookup: Saxena 2023; Yang et al. 2023, arXiv
2304.04487). For each earlier position, m is the number of tokens up to it that equal the last ones
of the text, up to `LONGEST`. The longest match counts; of equally long ones the last. If it ends d
tokens before the end of the text, draft k is token k of those d tokens, over and over.

The chance that a draft is accepted depends on m, and grows by one match for each accepted draft: if
the first k - 1 drafts of a match of m tokens are right, draft k follows a match of m + k - 1. So
one number for each m is enough (`RunningMatches`), and steps without drafts teach it too: the token
that AR gave either is the first draft or is not.

Shapes: B slots, L columns of a text, K drafts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 8
"""Tokens of a match that count. Longer matches are not accepted more often (entry 43 of the
log)."""
DEPTH = 8
"""K, the most lookup drafts of a window if a planner chooses."""
PRIOR = (0.2, 0.5, 0.6, 0.8, 0.85, 0.85, 0.85, 0.9)
"""The chance of a draft after a match of 1 .. `LONGEST` tokens, before any was seen."""
WEIGHT, DECAY = 8.0, 0.98
"""A prior counts as so many drafts; drafts count less by this rate with each later one."""
OUTSIDE = -1
"""Stands for the tokens before a text."""
BITS = 40


class Found(NamedTuple):
    """What was looked up.

    Attributes:
        matched: int64 [B], the tokens of the match, 0 to `LONGEST`; 0: there are no drafts.
        drafts: int64 [B, K].
    """

    matched: Tensor
    drafts: Tensor


def look_up(text: Tensor, length: Tensor, depth: int) -> Found:
    """The lookup drafts of texts [B, L] with `length` [B] tokens; later columns may hold anything.
    L must be 2 or more.

    All shapes follow from those of the inputs, and no value is read on the host.
    """
    columns = torch.arange(text.shape[1], device=text.device)
    padded = F.pad(text, (LONGEST - 1, 0), value=OUTSIDE)
    places = torch.arange(LONGEST, device=text.device)
    end = padded.gather(1, length[:, None] - 1 + places)  # [B, LONGEST], the last tokens
    # [B, L, LONGEST]: place + 1 where the tokens up to a column differ from the end, else 0
    differs = padded.unfold(1, LONGEST, 1) != end[:, None]
    differs = differs.to(torch.uint8) * (places + 1).to(torch.uint8)
    matched = LONGEST - differs.amax(dim=-1).to(torch.int64)
    # the longest match, then the last: one number has both
    score = (matched << BITS) + columns
    score = torch.where(columns < length[:, None] - 1, score, 0).amax(dim=1)
    matched, at = score >> BITS, score & ((1 << BITS) - 1)
    distance = (length - 1 - at).clamp(min=1)
    ahead = torch.arange(depth, device=text.device) % distance[:, None]
    return Found(matched, text.gather(1, at[:, None] + 1 + ahead).to(torch.int64))


class RunningMatches:
    """The chance that a draft is accepted after a match of m tokens, for m = 1 .. `LONGEST`."""

    def __init__(self) -> None:
        self._reached = [WEIGHT] * LONGEST
        self._accepted = [WEIGHT * share for share in PRIOR]

    def update(self, matched: int, reached: int, accepted: int) -> None:
        """Count the drafts after a match of `matched` tokens: the first `reached` were reached, and
        of them the first `accepted` accepted."""
        for depth in range(reached):
            at = min(matched + depth, LONGEST) - 1
            keep = WEIGHT * (1 - DECAY)  # the prior does not decay, so that no estimate is final
            self._reached[at] = DECAY * self._reached[at] + keep + 1
            self._accepted[at] = DECAY * self._accepted[at] + keep * PRIOR[at] + (depth < accepted)

    def forget(self) -> None:
        """Let all estimates return to the prior a little: where drafts are no longer tried, they
        will be again."""
        for at, share in enumerate(PRIOR):
            self._reached[at] = DECAY * self._reached[at] + (1 - DECAY) * WEIGHT
            self._accepted[at] = DECAY * self._accepted[at] + (1 - DECAY) * WEIGHT * share

    @property
    def values(self) -> list[float]:
        """The estimates, by m."""
        pairs = zip(self._accepted, self._reached, strict=True)
        return [accepted / reached for accepted, reached in pairs]


def tokens_after(matches: Mapping[int, int], chances: list[float], depth: int) -> list[float]:
    """The expected tokens of a step with 0 .. `depth` lookup drafts for each request.

    Args:
        matches: how many requests have a match of m tokens, by m.
        chances: `RunningMatches.values`.
    """
    total = [float(sum(matches.values()))] * (depth + 1)
    for matched, count in matches.items():
        reach, tokens = 1.0, 0.0
        for k in range(1, depth + 1):
            reach *= chances[min(matched + k - 1, LONGEST) - 1]
            tokens += reach
            total[k] += count * tokens
    return total
