"""`Window`: the rows of one decode forward and what each may see.

With v drafts to verify and K = N - 1 masks per outcome, the rows are

    pending, d_1 .. d_v,                    the verify rows: they give p of d_1 .. d_v and of the bonus token
    m_{j,1} .. m_{j,K}  for each outcome j  the masks: they draft K tokens after d_1 .. d_j and the next one

A row sees the cache, itself, and

    d_k       pending, d_1 .. d_k
    m_{j,k}   pending, d_1 .. d_j, m_{j,1} .. m_{j,k}

The layout depends on (N, v, outcomes) alone, so it is built once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from idlm.decoding.errors import InputError

MAX_STRIDE = 64
Branches = str | tuple[int, ...]
"""Which outcomes get masks: "all", "chain" (only that every draft stands), or the numbers of accepted drafts."""


def parse_branches(branches: str | Iterable[int], stride: int) -> Branches:
    """Check a user's stride and branches.

    Raises:
        InputError: the stride is not in 1..64, or the branches are neither "all", "chain" nor numbers in 0..stride-1.
    """
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= MAX_STRIDE:
        raise InputError(f"stride={stride!r} is out of range; use a whole number from 1 (AR) to {MAX_STRIDE}")
    if isinstance(branches, str):
        if branches not in ("all", "chain"):
            raise InputError(f"branches={branches!r} is unknown; use 'all', 'chain' or numbers of accepted drafts")
        return branches
    chosen = tuple(sorted(set(branches)))
    if not chosen or not all(isinstance(j, int) and 0 <= j < stride for j in chosen):
        raise InputError(f"branches={chosen} do not fit stride {stride}; use numbers from 0 to {stride - 1}")
    return chosen


def outcomes(branches: Branches, drafts: int) -> tuple[int, ...]:
    """The outcomes that get masks in a window with `drafts` drafts; never none, or drafting could not start."""
    if branches == "all":
        return tuple(range(drafts + 1))
    chosen = () if isinstance(branches, str) else tuple(j for j in branches if j <= drafts)
    return chosen or (drafts,)


@dataclass(frozen=True)
class Window:
    """A layout: `stride` N, `drafts` v (0 or K), and the outcomes that get masks.

    Attributes:
        offsets: int64 [W], each row's position less the pending token's.
        visible: bool [W, W], row may see row; every row sees the whole cache besides.
    """

    stride: int
    drafts: int
    outcomes: tuple[int, ...]
    offsets: Tensor = field(init=False, repr=False, compare=False)
    visible: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", self._offsets())
        object.__setattr__(self, "visible", self._visible())

    @property
    def masks(self) -> int:
        """Masks per outcome, K = N - 1."""
        return self.stride - 1

    @property
    def verify_rows(self) -> int:
        """The pending token and the drafts: the first 1 + v rows."""
        return 1 + self.drafts

    @property
    def width(self) -> int:
        """All rows, W; N**2 with all outcomes of a full window."""
        return self.verify_rows + len(self.outcomes) * self.masks

    @property
    def mask_rows(self) -> slice:
        """The rows that hold MASK: the gate of the adapter."""
        return slice(self.verify_rows, self.width)

    def branch(self, accepted: int) -> slice | None:
        """The mask rows of the outcome `accepted`, or None where it has no masks: the next window starts cold."""
        if accepted not in self.outcomes or not self.masks:
            return None
        first = self.verify_rows + self.outcomes.index(accepted) * self.masks
        return slice(first, first + self.masks)

    def _offsets(self) -> Tensor:
        verify = torch.arange(self.verify_rows)
        masks = [j + torch.arange(1, self.masks + 1) for j in self.outcomes]
        return torch.cat([verify, *masks])

    def _visible(self) -> Tensor:
        visible = torch.zeros(self.width, self.width, dtype=torch.bool)
        visible[: self.verify_rows, : self.verify_rows] = torch.ones(self.verify_rows, self.verify_rows).tril() > 0
        for number, j in enumerate(self.outcomes):
            first = self.verify_rows + number * self.masks
            rows = slice(first, first + self.masks)
            visible[rows, : j + 1] = True
            visible[rows, rows] = torch.ones(self.masks, self.masks).tril() > 0
        return visible


@lru_cache(maxsize=256)
def window(stride: int, drafts: int, branches: Branches) -> Window:
    """The layout for `drafts` drafts (0 when there are none yet, else stride - 1) under `branches`."""
    return Window(stride, drafts, outcomes(branches, drafts))
