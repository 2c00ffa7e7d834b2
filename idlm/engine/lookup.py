"""`Lookup`: in a step, the drafts that each slot's own text has; see `idlm.decoding.lookup`.

The search runs on the device, as the last part of every step. So it sees every committed token,
also on a GPU, where the host reads results a step late, and the host neither waits nor searches.
It costs about 50 us on a CPU at one request and 512 tokens.

Shapes: B slots, K drafts, R tokens of a step, C columns of the page table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from idlm.decoding.lookup import look_up
from idlm.engine.slots import Slots, State, staged

LONG = 4
"""The first value of `Lookup.long`."""


class Lookup:
    """The texts of all slots, and their drafts.

    Attributes:
        texts: int32 [slots, tokens], the tokens of each slot. Those past a slot's length mean
            nothing.
        long: int64 [1], the tokens of a match whose drafts take the place of those that MASK rows
            drew.
    """

    def __init__(self, slots: Slots, page_size: int) -> None:
        self.slots, self.page_size = slots, page_size
        drafts, columns = slots.state.drafts, slots.state.table.shape[1]
        wide = columns * page_size + 1 + drafts.shape[1]  # a step writes R tokens, needed or not
        self.texts = torch.zeros(len(drafts), wide, dtype=torch.int32, device=drafts.device)
        self.long, self._long = torch.full((1,), LONG, device=drafts.device), LONG

    @property
    def written(self) -> list[Tensor]:
        """What steps write, or what changes between them."""
        return [self.texts, self.long]

    def replace_from(self, long: int) -> None:
        """Set `long`, for the steps that are launched from now on."""
        if long != self._long:
            self._long = long
            self.long.fill_(long)

    def put(self, slot: int, text: Sequence[int]) -> None:
        """Write the text of a slot's request."""
        self.texts[slot, : len(text)] = staged(text, self.texts.device).to(torch.int32)

    def draft(self, rows: Tensor, before: State, tokens: Tensor, length: Tensor) -> None:
        """Add the `tokens` [B, R] that a step committed to the slots `rows` [B], look up, and write
        the drafts to the slots, where they are better than those that MASK rows have written.

        `before` is the state at the step's start, `length` [B] are the tokens of each text now.
        """
        places = before.length[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.texts.index_put_((rows[:, None], places), tokens.to(torch.int32))
        # the tokens that the step's pages hold, and those that it has committed
        longest = before.table.shape[1] * self.page_size + tokens.shape[1]
        columns = torch.arange(longest, device=tokens.device)
        state = self.slots.state
        drafts, valid = (of.index_select(0, rows) for of in (state.drafts, state.valid))
        depth = drafts.shape[1]
        found = look_up(self.texts[rows[:, None], columns], length, depth)
        taken = before.looking & (found.matched >= torch.where(valid > 0, self.long, 1))
        self.slots.write(
            rows,
            drafts=torch.where(taken[:, None], found.drafts, drafts),
            valid=torch.where(taken, depth, valid),
            matched=found.matched * taken,
        )
