"""`StepResult`: what a step brings, for the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from idlm.decoding.verify import NOTHING

COUNTS = 5
"""The numbers of a slot in `StepResult.packed`, after its tokens."""


class SlotResult(NamedTuple):
    """One slot's row of a `StepResult`, on the host.

    Attributes:
        tokens: R tokens, of which the first `committed` are committed.
        drafted: the number of drafts verified; accepted: the number accepted.
        matched: the length of the match that the drafts left for the next window were looked up by;
            0 if they were not looked up.
        guess: the first of these drafts.
    """

    tokens: list[int]
    committed: int
    drafted: int
    accepted: int
    matched: int
    guess: int

    @property
    def stuck(self) -> bool:
        """Whether the request's bans leave no token after those committed. It means nothing if the
        request is complete with them."""
        return self.committed <= self.accepted and self.tokens[self.committed] == NOTHING


@dataclass(frozen=True)
class StepResult:
    """The results of a step for the host.

    Attributes:
        packed: int64 [B, R + COUNTS]: R tokens, then the numbers of a `SlotResult`. It is a single
            tensor, so that the host needs a single copy.
        logprobs: those of the R tokens, if requested; see `idlm.decoding.verify.logprobs`.
        prompt: hidden states [T, D] of the prompt tokens prefilled, for prompt logprobs.
    """

    packed: Tensor
    logprobs: tuple[Tensor, ...] = ()
    prompt: Tensor | None = None

    def slots(self) -> Iterator[SlotResult]:
        """The rows of `packed`, which must be on the host."""
        for row in self.packed.tolist():
            yield SlotResult(row[:-COUNTS], *row[-COUNTS:])


class Tally:
    """What the windows of a step show of drafts by MASK rows.

    Attributes:
        reached, accepted: the drafts reached and accepted at each depth.
        windows, tokens: of requests that draft, and the tokens that they committed.
    """

    def __init__(self, depth: int) -> None:
        self.reached, self.accepted = [0] * depth, [0] * depth
        self.windows = self.tokens = 0

    def add(self, slot: SlotResult, drafting: bool) -> None:
        """Count a window."""
        if drafting:
            self.windows, self.tokens = self.windows + 1, self.tokens + slot.committed
        for k in range(min(slot.drafted, slot.accepted + 1)):
            self.reached[k] += 1
            self.accepted[k] += k < slot.accepted
