"""The gate that all gated layers of a model share: which rows of the running forward are MASK rows.

Shapes: B batch, Q rows of a forward, M MASK rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

NO_ROWS = slice(0, 0)


class Gate:
    """Which rows of the running forward are MASK rows, and which adapter each uses.

    Attributes:
        rows: the MASK rows, a slice of the Q rows.
        shape: B and Q of the running forward.
        entry: the layer that MASK rows enter at; see `idlm.models.entry`.
        entering: the hidden states [B, M, D] with which they do, if the entry is not 0.
        adapters: the number of adapters of the model.
        adapter: int64 [M], the adapter of each MASK row; used if there are several.
        merged: whether the linear layers' products include the update already.
        free: indexes below `adapters` whose adapter was detached.
    """

    def __init__(self) -> None:
        self.rows = NO_ROWS
        self.shape: tuple[int, ...] = 1, -1
        self.entry = 0
        self.entering: Tensor | None = None
        self.adapters = 1
        self.adapter: Tensor | None = None
        self.merged = False
        self.free: set[int] = set()
        self._factors: dict[tuple[tuple[int, float], ...], Tensor] = {}
        self._columns: dict[tuple[tuple[int, float], ...], tuple[Tensor, Tensor]] = {}

    @property
    def shut(self) -> bool:
        """Whether the forward has no MASK rows."""
        return bool(self.rows.start == self.rows.stop)

    @contextmanager
    def open(
        self, rows: slice, shape: tuple[int, ...] = (1, -1), entering: Tensor | None = None
    ) -> Iterator[None]:
        """Run a forward of tokens of `shape` [B, Q] whose MASK rows are `rows`, a slice of Q."""
        self.rows, self.shape, self.entering = rows, shape, entering
        try:
            yield
        finally:
            self.rows, self.entering, self._factors = NO_ROWS, None, {}

    def factors(self, columns: tuple[tuple[int, float], ...], dtype: torch.dtype) -> Tensor:
        """For each MASK row and each of the `columns`, (adapter, scale): the scale if the row's
        adapter is that of the column, else 0. The layers of a forward share it."""
        if columns not in self._factors:
            assert self.adapter is not None  # noqa: S101
            place = self.adapter.device
            if columns not in self._columns:
                numbers, scales = zip(*columns, strict=True)
                self._columns[columns] = (
                    torch.tensor(numbers, device=place),
                    torch.tensor(scales, device=place, dtype=dtype),
                )
            owner, scale = self._columns[columns]
            self._factors[columns] = self.adapter[:, None].eq(owner) * scale
        return self._factors[columns]

    def select(self, x: Tensor) -> Tensor:
        """The MASK rows of `x` [B, Q, ...], or [B Q, D] as some models flatten it, as a view."""
        if x.dim() == 2:
            x = x.view(*self.shape, x.shape[1])
        return x[:, self.rows]
