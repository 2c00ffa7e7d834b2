"""`Window`: the rows of one request in one decode step, and which rows each row sees.

With K = N - 1 drafts to verify and G groups of K MASK rows, the rows are

    pending, d_1 .. d_K    the verify rows: they give p of d_1 .. d_K and of the bonus
    m_{g,1} .. m_{g,K}     for each group g, the MASK rows: they draft the K tokens that follow the
                           token after d_1 .. d_j, where j is the outcome of group g

Each row sees the cache, itself, and

    d_k       pending, d_1 .. d_{k-1}
    m_{g,k}   pending, d_1 .. d_j, m_{g,1} .. m_{g,k-1}

So a row sees each position up to its own once, in order. A sliding window of w leaves it the last w
of these rows and tokens.

N = 3 with all outcomes, for example (x: the row sees the column):

                       p  d1 d2 | m0 m0 | m1 m1 | m2 m2
    pending            x        |       |       |
    d_1                x  x     |       |       |
    d_2                x  x  x  |       |       |
    m_{0,1}            x        | x     |       |
    m_{0,2}            x        | x  x  |       |
    m_{1,1}            x  x     |       | x     |
    m_{1,2}            x  x     |       | x  x  |
    m_{2,1}            x  x  x  |       |       | x
    m_{2,2}            x  x  x  |       |       | x  x

Shapes depend on the stride and the branches alone. Fewer than K drafts may be valid: v = 0 after
the prefill or after an outcome without a branch, and v < K when the stride has just grown. Then the
outcomes are 0 to v. The rows past d_v hold old drafts, which no other row sees, and groups that are
left over repeat the last outcome. So the tables have a row for each v, and a step selects it on the
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
"""The outcomes that get MASK rows: "all", "chain" (only the outcome that all drafts are accepted),
"lookup" (none: the drafts are looked up in the text), or a list of outcomes, each the number of
accepted drafts."""


def parse_branches(branches: str | Iterable[int], stride: int) -> Branches:
    """Check the stride and branches that a user gave; a list of outcomes is sorted.

    Raises:
        InputError: the stride is not in 1..64, or the branches are neither "all", "chain", "lookup"
            nor numbers in 0..stride-1.
    """
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= MAX_STRIDE:
        raise InputError(
            f"stride={stride!r} is out of range; use a whole number from 1 (AR) to {MAX_STRIDE}"
        )
    if isinstance(branches, str):
        if branches not in ("all", "chain", "lookup"):
            raise InputError(
                f"branches={branches!r} is unknown; "
                "use 'all', 'chain', 'lookup' or numbers of accepted drafts"
            )
        return branches
    chosen = tuple(sorted(set(branches)))
    if not chosen or not all(isinstance(j, int) and 0 <= j < stride for j in chosen):
        raise InputError(
            f"branches={chosen} do not fit stride {stride}; use numbers from 0 to {stride - 1}"
        )
    return chosen


def outcomes(branches: Branches, drafts: int) -> tuple[int, ...]:
    """The outcomes that get MASK rows in a window with `drafts` valid drafts.

    There is always at least one, since otherwise a window without drafts would draft nothing; with
    "lookup" there is none.
    """
    if branches == "lookup":
        return ()
    if branches == "all":
        return tuple(range(drafts + 1))
    chosen = () if isinstance(branches, str) else tuple(j for j in branches if j <= drafts)
    return chosen or (drafts,)


@dataclass(frozen=True)
class Window:
    """The tables of a plan: stride N and branches. Their first index is v, the valid drafts.

    Attributes:
        groups: G, the groups of MASK rows: N for all outcomes, 1 for the chain, 0 at stride 1 and
            for lookup.
        offsets: int64 [K + 1, W]: the position of each row, relative to the pending token.
        visible: int64 [K + 1, W], the visibility words: row r sees row s of the window if bit s of
            visible[v, r] is set. Every row also sees the whole cache.
        group: int64 [K + 1, K + 1]: group[v, a] is the group of outcome a, the number of accepted
            drafts; -1 if that outcome has no branch, so that the next window has no drafts.

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
        # for each v, the outcomes with MASK rows; their number differs, so it is padded below
        by_valid = (
            [outcomes(self.branches, v) for v in range(self.stride)] if self.num_masks else [()]
        )
        object.__setattr__(self, "groups", max(map(len, by_valid)))
        if self.width > MAX_WIDTH:
            raise InputError(
                f"stride={self.stride} with branches={self.branches!r} needs {self.width} rows "
                f"and a window holds {MAX_WIDTH}; use a smaller stride"
            )
        group = [[_index(served, j) for j in range(self.stride)] for served in by_valid]
        padded = [served + served[-1:] * (self.groups - len(served)) for served in by_valid]
        offsets = torch.stack([self._offsets(served) for served in padded])
        visible = torch.stack([self._visible(served) for served in padded])
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "visible", visible)
        object.__setattr__(self, "group", torch.tensor(group))

    @property
    def num_masks(self) -> int:
        """K = N - 1: the drafts that a window verifies, and the MASK rows of a group."""
        return self.stride - 1

    @property
    def verify_rows(self) -> int:
        """N, the rows of the pending token and the drafts. They come first."""
        return self.stride

    @property
    def mask_rows(self) -> int:
        """G * K, the MASK rows of all groups. They come last."""
        return self.groups * self.num_masks

    @property
    def width(self) -> int:
        """W, all rows: N**2 for all outcomes, 2N - 1 for the chain."""
        return self.verify_rows + self.mask_rows

    def _offsets(self, served: tuple[int, ...]) -> Tensor:
        """A row [W] of `offsets`. `served` holds the outcome of each group: the MASK rows of
        outcome j follow the token at j, so theirs are j + 1 .. j + K."""
        masks = [j + torch.arange(1, self.stride) for j in served]
        return torch.cat([torch.arange(self.stride), *masks])

    def _visible(self, served: tuple[int, ...]) -> Tensor:
        """A row [W] of `visible`. `served` holds the outcome of each group."""
        seen = torch.zeros(self.width, self.width, dtype=torch.bool)  # [row, column]
        # the verify rows are causal
        seen[: self.stride, : self.stride] = torch.ones(self.stride, self.stride).tril() > 0
        for group, j in enumerate(served):
            rows = slice(
                self.stride + group * self.num_masks, self.stride + (group + 1) * self.num_masks
            )
            seen[rows, : j + 1] = True  # pending, d_1 .. d_j
            seen[rows, rows] = (
                torch.ones(self.num_masks, self.num_masks).tril() > 0
            )  # causal in the group
        # column s becomes bit s; the sum of distinct bits sets them all
        return (seen << torch.arange(self.width)).sum(dim=-1)


def _index(served: tuple[int, ...], accepted: int) -> int:
    return served.index(accepted) if accepted in served else -1


@lru_cache(maxsize=256)
def window(stride: int, branches: Branches) -> Window:
    """The `Window` of a plan; its tables are built once."""
    return Window(stride, branches)
