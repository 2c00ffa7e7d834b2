"""`KVCache`: the pages of all layers, and the attention of a batch of windows over them.

Rows of one forward lie flat, [1, T]: the real rows of every segment first, slot by slot, then the MASK rows of every
segment, so that the adapter's gate is one slice and the linear layers see plain matrices:

    segment 0: B slots x R real rows | segment 1 ... || segment 0: B slots x M masks | segment 1 ...

Real rows are written to the pages at their positions; the next window overwrites what was rejected, so there is nothing
to trim. MASK rows never enter the pages.

Shapes: B slots, R real rows and M masks a slot, W = R + M, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idlm.decoding.errors import InputError
from idlm.kernels import window_attention_native as native
from idlm.kernels.batch_invariant import InvariantMeta, invariant_attention, invariant_meta
from idlm.kernels.window_attention import WindowMeta, cache_rows, window_attention, window_meta, write_pages


@dataclass(frozen=True)
class Segment:
    """Slots whose windows have one shape.

    Attributes:
        masks: M.
        meta: what each row sees.
        rows: int64 [B, R], the cache rows that the real rows are written to.
    """

    masks: int
    meta: WindowMeta | InvariantMeta
    rows: Tensor


class KVCache:
    """Keys and values of every layer, [2, pages, page, G, E] each; page 0 takes what nobody wants.

    Attributes:
        segments: what the running forward's rows are; set before each forward.
    """

    _segments: Sequence[Segment]
    _places: list[Tensor]

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        pages: int,
        page_size: int,
        like: Tensor,
        deterministic: bool = False,
    ) -> None:
        """`shapes` are (H, G, E) by layer; `like` has the type and the device of the keys.

        `deterministic`: attention whose sums do not depend on the batch; see `idlm.kernels.batch_invariant`.
        """
        if len(set(shapes)) > 1:
            raise InputError(f"layers with attention of different shapes {sorted(set(shapes))} are not supported")
        self.heads, groups, size = shapes[0]
        self.page_size = page_size
        self._deterministic = deterministic
        self._native = not deterministic and native.available(like)
        self.pages = [like.new_zeros(2, pages, page_size, groups, size) for _ in shapes]
        self.segments = ()

    @property
    def segments(self) -> Sequence[Segment]:
        """See above."""
        return self._segments

    @segments.setter
    def segments(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._places = _places(segments) if len(segments) > 1 else []

    def columns(self, tokens: int) -> int:
        """Page-table columns that `tokens` tokens need."""
        return -(-tokens // self.page_size)

    def segment(self, table: Tensor, prefix: Tensor, words: Tensor | None, positions: Tensor, masks: int) -> Segment:
        """The windows of slots with `prefix` [B] cached tokens and page tables `table` [B, M].

        The real rows go to `positions` int64 [B, R]; to the trash page where the table does not reach. `words` as in
        `window_meta`.
        """
        width = positions.shape[1] + masks
        end = table.shape[1] * self.page_size
        inside = cache_rows(table, positions.clamp(max=end - 1), self.page_size)
        rows = torch.where(positions < end, inside, 0)
        if self._native:
            return Segment(masks, WindowMeta(table, prefix, words), rows)
        meta = invariant_meta if self._deterministic else window_meta
        return Segment(masks, meta(self.pages[0], table, prefix, words, width, self.heads), rows)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `idlm.models.attention.Cache`; the rows lie as the head of this file says."""
        rows = [one[0].transpose(0, 1) for one in (query, key, value)]
        if len(self.segments) == 1:
            return self._segment(self.segments[0], layer, rows, scale)[None]
        mixed = query.new_empty(rows[0].shape)
        for segment, place in zip(self.segments, self._places, strict=True):
            mixed[place] = self._segment(segment, layer, [one[place] for one in rows], scale)
        return mixed[None]

    def _segment(self, segment: Segment, layer: int, rows: list[Tensor], scale: float) -> Tensor:
        """Write one segment's rows [B R + B M, heads, E] and mix the values that each sees."""
        pages, meta, real = self.pages[layer], segment.meta, segment.rows.shape[1]
        if self._native and isinstance(meta, WindowMeta):
            query, key, value = rows
            table, lengths, words = meta.table, meta.lengths, meta.visible
            return native.attend(query, key, value, pages, segment.rows, table, lengths, words, segment.masks, scale)
        query, key, value = (_by_slot(one, segment) for one in rows)
        write_pages(pages, key[:, :real], value[:, :real], segment.rows)
        if isinstance(meta, InvariantMeta):
            mixed = invariant_attention(query, key, value, pages, meta, scale)
        else:
            mixed = window_attention(query, key, value, pages, meta, scale)
        return torch.cat([mixed[:, :real].flatten(0, 1), mixed[:, real:].flatten(0, 1)])


def _by_slot(rows: Tensor, segment: Segment) -> Tensor:
    """[B R + B M, ...] -> [B, R + M, ...]."""
    if not segment.masks:
        return rows.unflatten(0, (-1, segment.rows.shape[1]))
    first = segment.rows.numel()
    real, masks = rows[:first].unflatten(0, (-1, segment.rows.shape[1])), rows[first:].unflatten(0, (-1, segment.masks))
    return torch.cat([real, masks], dim=1)


def _places(segments: Sequence[Segment]) -> list[Tensor]:
    """The flat rows of each segment: its real ones, then its masks."""
    real = [s.rows.numel() for s in segments]
    masks = [s.rows.shape[0] * s.masks for s in segments]
    rows = torch.arange(sum(real) + sum(masks), device=segments[0].rows.device).split(real + masks)
    return [torch.cat([rows[i], rows[len(segments) + i]]) for i in range(len(segments))]
