"""A KV cache whose rows are whole blocks: a forward reads committed blocks, and may add its own.

Shapes: B sequences, G key/value heads, H query heads, S columns of the cache, Q rows of a forward,
E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idlm.decoding.scores import Scores
from idlm.models.attention import Visible, attend


class BlockCache:
    """Keys and values of B sequences with at most `columns` tokens; an `attention.Cache`."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._at = self._store = torch.empty(0)
        self._visible: Visible | None = None

    def prepare(self, position: Tensor, known: Tensor, own: Tensor, store: Tensor) -> None:
        """Say what the rows of the next forward are.

        Args:
            position: int64 [B, Q], their positions.
            known: int64 [B], the tokens of the cache that they see.
            own: bool, broadcastable to [B, Q, Q], what they see of each other.
            store: bool [B], whether a sequence's rows are written into the cache.
        """
        batch, rows = position.shape
        columns = torch.arange(self.columns, device=position.device).expand(batch, -1)
        before = (columns < known[:, None])[:, None].expand(-1, rows, -1)
        seen = torch.cat([before, own.expand(batch, rows, rows)], 2)[:, None]
        self._visible = Visible(seen, position, torch.cat([columns, position], 1))
        self._at, self._store = position, store

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """See `attention.Cache`."""
        assert self._visible is not None  # noqa: S101
        kept = self._layers.get(layer)
        if kept is None:
            shape = (*key.shape[:2], self.columns, key.shape[3])
            kept = self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = (torch.cat(pair, 2) for pair in zip(kept, (key, value), strict=True))
        mixed = attend(query, keys, values, self._visible.within(scores.window), scores)
        if bool(self._store.any()):
            for held, new in zip(kept, (key, value), strict=True):
                index = self._at[:, None, :, None].expand_as(new)
                new = torch.where(self._store[:, None, None, None], new, held.gather(2, index))
                held.scatter_(2, index, new)
        return mixed
