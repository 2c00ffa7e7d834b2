"""`Window`: the rows of one decode forward and what each may see.

With K = N - 1 drafts to verify and G groups of K masks, the rows are

    pending, d_1 .. d_K                     the verify rows: they give p of d_1 .. d_K and of the
    bonus token m_{g,1} .. m_{g,K}  for each group g    the masks: they draft K tokens after d_1 ..
    d_j and the next one,
                                            where j is the outcome that group g serves

A row sees the cache, itself, and

    d_k       pending, d_1 .. d_k
    m_{g,k}   pending, d_1 .. d_j, m_{g,1} .. m_{g,k}

Shapes depend on (N, branches) alone. Only v <= K of the drafts may be valid: none before the first
masks or after the chain broke, fewer when the stride has just grown. Then the outcomes are 0..v,
the rows past d_v hold leftovers that nothing else sees, and groups without an outcome of their own
repeat the last one's. So each v has its own row of the tables below, and a step picks it on the
device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from idlm.errors import InputError

MAX_STRIDE = 64
MAX_WIDTH = 64
"""Rows of a window whose visibility fits a 64-bit word."""
Branches = str | tuple[int, ...]
"""Which outcomes get masks: "all", "chain" (only that every draft stands), or the numbers of
accepted drafts."""


def parse_branches(branches: str | Iterable[int], stride: int) -> Branches:
    """Check a user's stride and branches.

    Raises:
        InputError: the stride is not in 1..64, or the branches are neither "all", "chain" nor
            numbers in 0..stride-1.
    """
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= MAX_STRIDE:
        raise InputError(
            f"stride={stride!r} is out of range; use a whole number from 1 (AR) to {MAX_STRIDE}"
        )
    if isinstance(branches, str):
        if branches not in ("all", "chain"):
            raise InputError(
                f"branches={branches!r} is unknown; use 'all', 'chain' or numbers of accepted drafts"
            )
        return branches
    chosen = tuple(sorted(set(branches)))
    if not chosen or not all(isinstance(j, int) and 0 <= j < stride for j in chosen):
        raise InputError(
            f"branches={chosen} do not fit stride {stride}; use numbers from 0 to {stride - 1}"
        )
    return chosen


def outcomes(branches: Branches, drafts: int) -> tuple[int, ...]:
    """The outcomes that get masks in a window with `drafts` drafts; never none, or drafting could
    not start."""
    if branches == "all":
        return tuple(range(drafts + 1))
    chosen = () if isinstance(branches, str) else tuple(j for j in branches if j <= drafts)
    return chosen or (drafts,)


@dataclass(frozen=True)
class Window:
    """The layout of a plan: stride N and branches.

    Attributes:
        groups: G, sets of masks; N with all outcomes, 1 for the chain, 0 at stride 1.
        offsets: int64 [K + 1, W], by number of valid drafts: each row's position less the pending
            token's.
        visible: int64 [K + 1, W]: row r may see row s of the window where bit s of visible[v, r] is
            set; it sees the whole cache besides.
        group: int64 [K + 1, K + 1], by valid drafts and accepted ones: the group of that outcome,
            or -1 where it has none and the next window starts without drafts.

    Raises:
        InputError: more than 64 rows.
    """

    stride: int
    branches: Branches
    groups: int = field(init=False)
    offsets: Tensor = field(init=False, repr=False, compare=False)
    visible: Tensor = field(init=False, repr=False, compare=False)
    group: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        served = [outcomes(self.branches, v) for v in range(self.stride)] if self.masks else [()]
        object.__setattr__(self, "groups", max(map(len, served)))
        if self.width > MAX_WIDTH:
            raise InputError(
                f"stride={self.stride} with branches={self.branches!r} needs {self.width} rows and a "
                f"window holds {MAX_WIDTH}; use a smaller stride"
            )
        table = [[_index(chosen, j) for j in range(self.stride)] for chosen in served]
        served = [chosen + chosen[-1:] * (self.groups - len(chosen)) for chosen in served]
        object.__setattr__(
            self, "offsets", torch.stack([self._offsets(chosen) for chosen in served])
        )
        object.__setattr__(
            self, "visible", torch.stack([self._visible(chosen) for chosen in served])
        )
        object.__setattr__(self, "group", torch.tensor(table))

    @property
    def masks(self) -> int:
        """Masks per group, and drafts: K = N - 1."""
        return self.stride - 1

    @property
    def verify_rows(self) -> int:
        """The pending token and the drafts: the first N rows."""
        return self.stride

    @property
    def mask_rows(self) -> int:
        """The rows that hold MASK: all others."""
        return self.groups * self.masks

    @property
    def width(self) -> int:
        """All rows, W; N**2 with all outcomes, 2 N - 1 for the chain."""
        return self.verify_rows + self.mask_rows

    def _offsets(self, served: tuple[int, ...]) -> Tensor:
        masks = [j + torch.arange(1, self.stride) for j in served]
        return torch.cat([torch.arange(self.stride), *masks])

    def _visible(self, served: tuple[int, ...]) -> Tensor:
        seen = torch.zeros(self.width, self.width, dtype=torch.bool)
        seen[: self.stride, : self.stride] = torch.ones(self.stride, self.stride).tril() > 0
        for number, j in enumerate(served):
            rows = slice(self.stride + number * self.masks, self.stride + (number + 1) * self.masks)
            seen[rows, : j + 1] = True
            seen[rows, rows] = torch.ones(self.masks, self.masks).tril() > 0
        return (seen << torch.arange(self.width)).sum(dim=-1)


def _index(served: tuple[int, ...], accepted: int) -> int:
    return served.index(accepted) if accepted in served else -1


@lru_cache(maxsize=256)
def window(stride: int, branches: Branches) -> Window:
    """The layout of a plan, made once."""
    return Window(stride, branches)
