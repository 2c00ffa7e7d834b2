"""Attention in PyTorch, for any device and type; the reference for the other back-ends."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.attention.base import (
    QKV,
    Segment,
    first_keys,
    last_rows,
    prefix_rows,
    visible_rows,
    write_by_slot,
)
from idlm.decoding.scores import Scores


class TorchMetadata(NamedTuple):
    """The keys of each slot are its S prefix tokens, then its W window rows.

    Attributes:
        rows: int64 [B * (S + W)], the cache row of each key; 0 for prefix tokens that no row
            sees, and for the window rows, which `attend` fills in.
        bias: [B, 1, W * F, S + W], 0 if a row sees a key, else -inf.
    """

    segment: Segment
    rows: Tensor
    bias: Tensor


class TorchAttention:
    """Gathers the prefixes from their pages, appends the window rows, and calls SDPA.

    `pages` may be any layer's: only shape and type are used. `heads` is H.
    """

    takes_pieces = False

    def __init__(self, pages: Tensor, heads: int) -> None:
        self._page, self._dtype, self._fold = pages.shape[2], pages.dtype, heads // pages.shape[3]

    def prepare(self, segment: Segment, window: int | None = None) -> TorchMetadata:
        """The cache rows to gather, and which keys each row sees as an additive mask."""
        rows, cached = prefix_rows(segment, self._page)  # [B, S]
        seen, prefix = visible_rows(segment), cached[:, None].expand(-1, segment.width, -1)
        if window is not None:
            first = first_keys(segment, seen, window)[..., None]  # [B, W, 1]
            prefix = prefix & (torch.arange(rows.shape[1], device=rows.device) >= first)
            seen, rows = last_rows(seen, window), rows * prefix.any(1)
        seen = torch.cat([prefix, seen], 2)  # [B, W, S + W]
        bias = torch.zeros_like(seen, dtype=self._dtype).masked_fill_(~seen, -torch.inf)
        return TorchMetadata(
            segment,
            rows=F.pad(rows, (0, segment.width)).flatten(),
            bias=bias.repeat_interleave(self._fold, 1)[:, None],  # F query heads share a row's mask
        )

    def attend(self, metadata: TorchMetadata, pages: Tensor, qkv: QKV, scores: Scores) -> Tensor:
        query, key, value = write_by_slot(metadata.segment, pages, qkv)
        batch, width, heads, size = query.shape
        groups = key.shape[2]
        # Keys that no row sees read row 0 of the trash page with weight 0. Clear it, because
        # NaN * 0 = NaN.
        pages[:, 0, 0].zero_()
        gathered = pages.view(2, -1, groups, size).index_select(1, metadata.rows)
        keys, values = gathered.view(2, batch, -1, groups, size).unbind()  # [B, S + W, G, E] each
        keys[:, -width:] = key
        values[:, -width:] = value
        # Fold the F query heads of a key/value head into the rows, [B, G, W * F, E]: about 1.3x as
        # fast as `enable_gqa` on a CPU.
        folded = query.view(batch, width, groups, -1, size).transpose(1, 2)
        rows = folded.reshape(batch, groups, -1, size), keys.transpose(1, 2), values.transpose(1, 2)
        mixed = _mixed(*rows, metadata.bias, scores)
        mixed = mixed.view(batch, groups, width, -1, size).transpose(1, 2)  # [B, W, G, F, E]
        return metadata.segment.flat(mixed.reshape(batch, width, heads, size))


def _mixed(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scores: Scores) -> Tensor:
    """Attention [B, G, W * F, E] of folded queries; keys and values are [B, G, S + W, E]."""
    if scores.plain:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scores.scale)
    sinks = None
    if scores.sinks is not None:  # [H] -> [G, W * F, 1], since the rows are window row x head
        sinks = scores.sinks.view(key.shape[1], 1, -1)
        sinks = sinks.expand(-1, query.shape[2] // sinks.shape[2], -1).flatten(1)[..., None]
    return scores.weights(query @ key.mT, bias, sinks).to(value.dtype) @ value
