"""`ContiguousCache`: keys and values of one sequence, written in place.

Region of one layer, for a window of W rows whose pending token has position s:

    0 .. s-1            s .. s+v                     s+v+1 .. s+W-1
    committed tokens    pending and drafts           masks (scratch)

The next window starts at its own pending token and overwrites the masks and what was rejected: nothing is trimmed.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ContiguousCache:
    """Keys and values [layers, 1, G, capacity, E]; grows by doubling.

    Attributes:
        start: where the rows of the running forward go.
    """

    def __init__(self) -> None:
        self.start = 0
        self._layers: list[tuple[Tensor, Tensor]] = []

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `idlm.models.attention.KVCache`: S is everything up to the last row written."""
        end = self.start + key.shape[2]
        if layer == len(self._layers):
            self._layers.append((key.new_empty(0), value.new_empty(0)))
        keys, values = (self._room(old, new, end) for old, new in zip(self._layers[layer], (key, value), strict=True))
        self._layers[layer] = keys, values
        keys[:, :, self.start : end] = key
        values[:, :, self.start : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def _room(self, old: Tensor, rows: Tensor, end: int) -> Tensor:
        """A buffer like `old` with room for `end` rows."""
        if old.numel() and old.shape[2] >= end:
            return old
        batch, heads, _, size = rows.shape
        new = rows.new_empty(batch, heads, 2 * end, size)
        if old.numel():
            new[:, :, : old.shape[2]] = old
        return new


def visible_rows(window: Tensor, prefix: int) -> Tensor:
    """What the rows of a window [W, W] see, with `prefix` committed tokens before them: bool [W, prefix + W]."""
    return torch.cat([window.new_ones(window.shape[0], prefix), window], dim=1)
