"""Attention for the deterministic mode: a row's result does not depend on the rows beside it.

The keys of each row are gathered in the order of their positions and split into blocks of `BLOCK`,
from position 0. So the key at position t is always key t % BLOCK of block t // BLOCK, whether it is
in a page or in the window, whatever W, B and C are. The blocks are summed in order.

Shapes, in addition to those of `idlm.attention.base`: L = S + W + 1 rows of a slot's local copy of
its keys, the last of which is zero; K keys of a row, padded to a multiple of BLOCK. B * W rows are
padded to a multiple of TILE.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.attention.base import QKV, Segment, prefix_rows, visible_rows, write_by_slot
from idlm.decoding.scores import Scores
from idlm.kernels.batch_invariant import BLOCK, TILE


def seen_in_order(segment: Segment) -> tuple[Tensor, Tensor]:
    """The window rows that each row sees, in order, int64 [B, W, W], and the number of keys that it
    sees, with the prefix, int64 [B, W].

    Entries after the rows that a row sees have no meaning.
    """
    seen = visible_rows(segment)
    # a stable sort of 0 (seen) and 1 (not seen) moves the seen rows to the front, in order
    order = (~seen).to(torch.uint8).argsort(dim=-1, stable=True)
    return order, segment.lengths[:, None] + seen.sum(-1)


class Seen(NamedTuple):
    """A segment, its `seen_in_order`, and the sliding window; see `Scores`."""

    segment: Segment
    order: Tensor
    counts: Tensor
    window: int | None


class Keys(NamedTuple):
    """`sources`, `firsts` and `counts` of `InvariantMetadata`, of one tile."""

    sources: Tensor
    firsts: Tensor
    counts: Tensor


class InvariantMetadata(NamedTuple):
    """What all layers of a step share.

    Attributes:
        rows: int64 [B * L], the cache row of each local row; 0 for those that are not cached.
        sources: int64 [B * W padded to TILE, K], the key k of each row: an index into the B * L
            local rows of all slots.
        firsts: int64 [B * W padded to TILE], the first key that a sliding window leaves to each
            row; 0 without one.
        counts: int64 [B * W padded to TILE], the number of keys up to the last of each row.
    """

    segment: Segment
    rows: Tensor
    sources: Tensor
    firsts: Tensor
    counts: Tensor


class InvariantAttention:
    """Batch-invariant attention in PyTorch; only the shape of `pages`, any layer's, is used."""

    takes_pieces = False

    def __init__(self, pages: Tensor) -> None:
        self._page = pages.shape[2]

    def prepare(self, segment: Segment, window: int | None = None) -> InvariantMetadata:
        """Where the keys of each row lie, and which it sees."""
        rows, _ = prefix_rows(segment, self._page)
        order, counts = seen_in_order(segment)
        firsts = torch.zeros_like(counts) if window is None else (counts - window).clamp(min=0)
        padding = (0, -counts.numel() % TILE)
        return InvariantMetadata(
            segment,
            rows=F.pad(rows, (0, segment.width + 1)).flatten(),
            sources=_sources(segment, order, (firsts, counts), rows.shape[1]),
            firsts=F.pad(firsts.flatten(), padding),
            counts=F.pad(counts.flatten(), padding),
        )

    def attend(
        self, metadata: InvariantMetadata, pages: Tensor, qkv: QKV, scores: Scores
    ) -> Tensor:
        query, key, value = write_by_slot(metadata.segment, pages, qkv)
        batch, width, heads, size = query.shape
        groups = key.shape[2]
        pages[:, 0, 0].zero_()  # local rows that are not cached read row 0 of the trash page
        local = pages.view(2, -1, groups * size).index_select(1, metadata.rows)
        local = local.view(2, batch, -1, groups, size)  # keys and values [B, L, G, E]
        local[0, :, -width - 1 : -1] = key  # the window rows; the last local row stays zero
        local[1, :, -width - 1 : -1] = value
        queries = (query * scores.scale).reshape(
            batch * width, groups, -1, size
        )  # [B * W, G, F, E]
        queries = F.pad(queries, (0, 0, 0, 0, 0, 0, 0, -batch * width % TILE))
        tiles = zip(
            queries.split(TILE),
            *(rows.split(TILE) for rows in (metadata.sources, metadata.firsts, metadata.counts)),
            strict=True,
        )
        keys_values = local.view(2, -1, size)  # [2, B * L * G, E]
        mixed = torch.cat([_tile(tile, keys_values, Keys(*keys), scores) for tile, *keys in tiles])
        return metadata.segment.flat(mixed[: batch * width].view(batch, width, heads, size))


class InvariantTritonAttention:
    """Batch-invariant attention by a Triton kernel, which reads the pages without a copy."""

    takes_pieces = False

    def prepare(self, segment: Segment, window: int | None = None) -> Seen:
        """Which window rows each row sees, in order."""
        return Seen(segment, *seen_in_order(segment), window)

    def attend(self, metadata: Seen, pages: Tensor, qkv: QKV, scores: Scores) -> Tensor:
        from idlm.kernels.batch_invariant_triton import Prefix, attend  # Triton is optional

        segment, order, counts, _ = metadata
        query, key, value = write_by_slot(segment, pages, qkv)
        prefix = Prefix(pages, segment.table, segment.lengths)
        return segment.flat(attend(query, key, value, prefix, order, counts, scores))


def _sources(segment: Segment, order: Tensor, seen: tuple[Tensor, Tensor], prefix: int) -> Tensor:
    """`InvariantMetadata.sources`: a row's keys are the prefix, then the window rows that it sees,
    with the zero row before its first and after its last. `prefix` is S; `seen` are the firsts and
    counts [B, W]."""
    firsts, counts = (of_rows[..., None] for of_rows in seen)
    batch, width = seen[1].shape
    local = prefix + width + 1  # L
    keys = torch.arange((local + BLOCK - 1) // BLOCK * BLOCK, device=order.device)  # 0 .. K - 1
    # key k past the prefix is number k - length of the window rows that the row sees
    in_window = (keys - segment.lengths[:, None]).clamp(0, width - 1)  # [B, K]
    window = prefix + order.gather(2, in_window[:, None].expand(-1, width, -1))  # [B, W, K]
    source = torch.where(keys < segment.lengths[:, None, None], keys, window)
    source = torch.where((keys >= firsts) & (keys < counts), source, local - 1)
    source = source + local * torch.arange(batch, device=source.device)[:, None, None]
    return F.pad(source.flatten(0, 1), (0, 0, 0, -batch * width % TILE), value=local - 1)


def _tile(query: Tensor, local: Tensor, seen: Keys, constants: Scores) -> Tensor:
    """Attention of one tile of rows: [TILE, H * E].

    `query` is [TILE, G, F, E], `local` the keys and values [2, B * L * G, E], `sources` [TILE, K].
    Every product is [F, E] x [E, BLOCK] or [F, BLOCK] x [BLOCK, E], whatever the batch is. Blocks
    are added in order; those without a key of the row add zeros, which changes no bit.
    """
    tile, groups, fold, size = query.shape
    sources = seen.sources
    # [TILE, G, K]: the row of each key/value head of each key
    index = sources[:, None] * groups + torch.arange(groups, device=sources.device)[:, None]
    keys, values = local.index_select(1, index.flatten()).view(2, -1, BLOCK, size)
    blocks = sources.shape[1] // BLOCK
    queries = query[:, :, None].expand(-1, -1, blocks, -1, -1).reshape(-1, fold, size)
    # [TILE, G, blocks, F, BLOCK]
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(tile, groups, -1, fold, BLOCK)
    if constants.softcap is not None:
        scores = constants.softcap * (scores / constants.softcap).tanh()
    key = torch.arange(sources.shape[1], device=sources.device)
    unseen = (key < seen.firsts[:, None]) | (key >= seen.counts[:, None])
    scores = scores.masked_fill(unseen.view(tile, 1, -1, 1, BLOCK), -torch.inf)
    top = scores.amax((2, 4), keepdim=True)
    sinks = constants.sinks
    if sinks is not None:
        sinks = sinks.to(scores.dtype).view(groups, 1, fold, 1)
        top = torch.maximum(top, sinks)
    top = top.clamp(min=torch.finfo(scores.dtype).min)  # -inf for a row that sees nothing
    weights = (scores - top).exp()
    # cumsum, unlike sum, adds the blocks in order; the total is >= 1 unless the row sees nothing
    total = weights.sum(-1).cumsum(2)[:, :, -1]
    if sinks is not None:
        total = total + (sinks - top)[:, :, 0, :, 0].exp()
    total = total.clamp(min=1)
    mixed = torch.bmm(weights.view(-1, fold, BLOCK), values)
    mixed = mixed.view(tile, groups, -1, fold, size).cumsum(2)[:, :, -1]
    return (mixed / total[..., None]).flatten(1)
