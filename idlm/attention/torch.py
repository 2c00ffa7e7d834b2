"""Attention in PyTorch, on any device, in any type; the other back-ends are tested against it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.attention.base import QKV, Segment, prefix_rows, visible_rows, write_by_slot


class TorchMetadata(NamedTuple):
    """See `Backend.prepare`.

    Attributes:
        rows: int64 [B * (S + W)], the cache row of every prefix token, 0 for one that is not
            cached; W places for the window's own rows follow them.
        bias: [B, 1, W * F, S + W], 0 where a row sees a key, else -inf.
    """

    segment: Segment
    rows: Tensor
    bias: Tensor


class TorchAttention:
    """Copies the prefixes out of their pages, puts the windows' rows behind them, and calls SDPA.

    `pages` are any layer's: only their shape, type and device count; `heads` is H.
    """

    takes_pieces = False

    def __init__(self, pages: Tensor, heads: int) -> None:
        self._page, self._dtype, self._fold = pages.shape[2], pages.dtype, heads // pages.shape[3]

    def prepare(self, segment: Segment) -> TorchMetadata:
        """See `Backend`."""
        rows, cached = prefix_rows(segment, self._page)
        seen = torch.cat([cached[:, None].expand(-1, segment.width, -1), visible_rows(segment)], 2)
        bias = torch.zeros_like(seen, dtype=self._dtype).masked_fill_(~seen, -torch.inf)
        return TorchMetadata(
            segment,
            rows=F.pad(rows, (0, segment.width)).flatten(),
            bias=bias.repeat_interleave(self._fold, 1)[:, None],
        )

    def attend(self, metadata: TorchMetadata, pages: Tensor, qkv: QKV, scale: float) -> Tensor:
        """See `Backend`."""
        query, key, value = write_by_slot(metadata.segment, pages, qkv)
        batch, width, heads, size = query.shape
        groups = key.shape[2]
        # rows that are not cached read this one; a NaN there would survive a weight of 0
        pages[:, 0, 0].zero_()
        gathered = pages.view(2, -1, groups, size).index_select(1, metadata.rows)
        keys, values = gathered.view(2, batch, -1, groups, size).unbind()
        keys[:, -width:] = key
        values[:, -width:] = value
        # F query heads of a key/value head as rows of one product: about 1.3x as fast as
        # `enable_gqa` on a CPU
        folded = query.view(batch, width, groups, -1, size).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            folded.reshape(batch, groups, -1, size),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=metadata.bias,
            scale=scale,
        )
        mixed = mixed.view(batch, groups, width, -1, size).transpose(1, 2)
        return metadata.segment.flat(mixed.reshape(batch, width, heads, size))
