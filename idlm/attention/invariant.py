"""Attention for the deterministic mode: a row's result does not depend on the rows beside it.

Each row's own keys are gathered in the order of their positions and cut in blocks of `BLOCK` from
position 0 on: the key at position t is always number t % BLOCK of block t // BLOCK, whether it came
from a page or from the window, whatever W, B and C are. The blocks are summed one after the other.

Shapes beside those of `idlm.attention.base`: L = S + W + 1 rows of one slot's keys, K keys of a
row, padded to a multiple of BLOCK; B * W rows are padded to a multiple of TILE.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.attention.base import QKV, Segment, prefix_rows, visible_rows, write_by_slot
from idlm.kernels.batch_invariant import BLOCK, TILE


def seen_in_order(segment: Segment) -> tuple[Tensor, Tensor]:
    """The window rows that a row sees, first to last, int64 [B, W, W], the rest of no account; and
    how many keys it sees in all, [B, W]."""
    seen = visible_rows(segment)
    order = (~seen).to(torch.uint8).argsort(dim=-1, stable=True)
    return order, segment.lengths[:, None] + seen.sum(-1)


Seen = tuple[Segment, Tensor, Tensor]
"""A segment and `seen_in_order` of it."""


class InvariantMetadata(NamedTuple):
    """See `Backend.prepare`.

    Attributes:
        rows: int64 [B * L], as those of `TorchMetadata`, and one more that holds zeros.
        sources: int64 [rows, K], which of all slots' L rows is a row's key number k.
        counts: int64 [rows], how many keys a row sees.
    """

    segment: Segment
    rows: Tensor
    sources: Tensor
    counts: Tensor


class InvariantAttention:
    """In PyTorch; `pages` are any layer's: only their shape counts."""

    takes_pieces = False

    def __init__(self, pages: Tensor) -> None:
        self._page = pages.shape[2]

    def prepare(self, segment: Segment) -> InvariantMetadata:
        """See `Backend`."""
        rows, _ = prefix_rows(segment, self._page)
        order, counts = seen_in_order(segment)
        return InvariantMetadata(
            segment,
            rows=F.pad(rows, (0, segment.width + 1)).flatten(),
            sources=_sources(segment, order, counts, rows.shape[1]),
            counts=F.pad(counts.flatten(), (0, -counts.numel() % TILE)),
        )

    def attend(self, metadata: InvariantMetadata, pages: Tensor, qkv: QKV, scale: float) -> Tensor:
        """See `Backend`."""
        query, key, value = write_by_slot(metadata.segment, pages, qkv)
        batch, width, heads, size = query.shape
        groups = key.shape[2]
        pages[:, 0, 0].zero_()  # rows that are not cached read this one
        local = pages.view(2, -1, groups * size).index_select(1, metadata.rows)
        local = local.view(2, batch, -1, groups, size)
        local[0, :, -width - 1 : -1] = key
        local[1, :, -width - 1 : -1] = value
        rows = (query * scale).reshape(batch * width, groups, -1, size)
        rows = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, -batch * width % TILE))
        tiles = zip(
            rows.split(TILE), metadata.sources.split(TILE), metadata.counts.split(TILE), strict=True
        )
        mixed = torch.cat([_tile(tile, local.view(2, -1, size), *of) for tile, *of in tiles])
        return metadata.segment.flat(mixed[: batch * width].view(batch, width, heads, size))


class InvariantTritonAttention:
    """The same by a Triton kernel that needs no sources."""

    takes_pieces = False

    def prepare(self, segment: Segment) -> Seen:
        """See `Backend`."""
        return segment, *seen_in_order(segment)

    def attend(self, metadata: Seen, pages: Tensor, qkv: QKV, scale: float) -> Tensor:
        """See `Backend`."""
        from idlm.kernels.batch_invariant_triton import attend  # not every machine has triton

        of, order, counts = metadata
        query, key, value = write_by_slot(of, pages, qkv)
        return of.flat(attend(query, key, value, pages, of.table, of.lengths, order, counts, scale))


def _sources(segment: Segment, order: Tensor, counts: Tensor, prefix: int) -> Tensor:
    """A row's keys: the prefix, then the window rows it sees, then zeros."""
    batch, width = counts.shape
    local = prefix + width + 1
    keys = torch.arange((local + BLOCK - 1) // BLOCK * BLOCK, device=order.device)
    after = (keys - segment.lengths[:, None]).clamp(0, width - 1)
    window = prefix + order.gather(2, after[:, None].expand(-1, width, -1))
    source = torch.where(keys < segment.lengths[:, None, None], keys, window)
    source = torch.where(keys < counts[..., None], source, local - 1)
    source = source + local * torch.arange(batch, device=source.device)[:, None, None]
    return F.pad(source.flatten(0, 1), (0, 0, 0, -batch * width % TILE), value=local - 1)


def _tile(query: Tensor, local: Tensor, sources: Tensor, counts: Tensor) -> Tensor:
    """One tile: `query` [TILE, G, F, E] over its keys `local` [2, B * L * G, E] at `sources`
    [TILE, K]: [TILE, H * E].

    Every product is [F, E] x [E, BLOCK] or [F, BLOCK] x [BLOCK, E]; blocks are added first to last,
    so that blocks that a row does not reach add zeros at the end and change nothing.
    """
    tile, groups, fold, size = query.shape
    index = sources[:, None] * groups + torch.arange(groups, device=sources.device)[:, None]
    keys, values = local.index_select(1, index.flatten()).view(2, -1, BLOCK, size)
    blocks = sources.shape[1] // BLOCK
    queries = query[:, :, None].expand(-1, -1, blocks, -1, -1).reshape(-1, fold, size)
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(tile, groups, -1, fold, BLOCK)
    unseen = torch.arange(sources.shape[1], device=sources.device) >= counts[:, None]
    scores = scores.masked_fill(unseen.view(tile, 1, -1, 1, BLOCK), -torch.inf)
    top = scores.amax((2, 4), keepdim=True)
    top = top.clamp(min=torch.finfo(scores.dtype).min)  # a row may see nothing
    weights = (scores - top).exp()
    # 1 or more, unless the row sees nothing
    total = weights.sum(-1).cumsum(2)[:, :, -1].clamp(min=1)
    mixed = torch.bmm(weights.view(-1, fold, BLOCK), values)
    mixed = mixed.view(tile, groups, -1, fold, size).cumsum(2)[:, :, -1]
    return (mixed / total[..., None]).flatten(1)
