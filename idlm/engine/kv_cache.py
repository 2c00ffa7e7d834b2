"""`KVCache`: the pages of all layers, and the attention of a batch of windows and of pieces of prompts over them.

Rows of one forward lie flat, [1, T]: the pieces of prompts, then the windows' real rows, slot by slot, then their MASK
rows, so that the adapter's gate is one slice and the linear layers see plain matrices:

    piece 0 | piece 1 | ... | B slots x R real rows | B slots x M masks

Pieces come first: the window of a slot whose prompt ends in this very forward sees what they have written. Real rows
are written to the pages at their positions; the next window overwrites what was rejected, so there is nothing to trim.
MASK rows never enter the pages.

Shapes: B slots, R real rows and M masks a slot, W = R + M, P pieces, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idlm.errors import InputError
from idlm.kernels import window_attention_native as native
from idlm.kernels.batch_invariant import InvariantMeta, invariant_attention, invariant_meta
from idlm.kernels.window_attention import WindowMeta, cache_rows, window_attention, window_meta, write_pages


@dataclass(frozen=True)
class Segment:
    """Rows that one call of the attention takes: windows of one shape, one piece of a prompt, or all pieces at once.

    Attributes:
        masks: M.
        meta: what each row sees.
        rows: int64 [B, R], the cache rows that the real rows are written to; [T] for all pieces at once.
        ends: int64 [P], for all pieces at once: where each of them ends.
    """

    masks: int
    meta: WindowMeta | InvariantMeta
    rows: Tensor
    ends: Tensor | None = None

    @property
    def size(self) -> int:
        """Flat rows."""
        return self.rows.numel() + self.rows.shape[0] * self.masks


class KVCache:
    """Keys and values of every layer, [2, pages, page, G, E] each; page 0 takes what nobody wants.

    Attributes:
        segments: what the running forward's rows are; set before each forward.
    """

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
        self.pages = [like.new_zeros(2, pages, page_size, groups, size) for _ in shapes]
        self.native = not deterministic and native.faster_here(self.pages[0], self.heads)
        self.segments: Sequence[Segment] = ()

    def columns(self, tokens: int) -> int:
        """Page-table columns that `tokens` tokens need."""
        return -(-tokens // self.page_size)

    def windows(self, table: Tensor, prefix: Tensor, words: Tensor, positions: Tensor, masks: int) -> Segment:
        """The windows of slots with `prefix` [B] cached tokens and page tables `table` [B, M].

        The real rows go to `positions` int64 [B, R]; to the trash page where the table does not reach. `words` as in
        `window_meta`.
        """
        end = table.shape[1] * self.page_size
        inside = cache_rows(table, positions.clamp(max=end - 1), self.page_size)
        rows = torch.where(positions < end, inside, 0)
        return Segment(masks, self._meta(table, prefix, words, positions.shape[1] + masks), rows)

    def pieces(
        self, table: Tensor, starts: Tensor, positions: Tensor, owner: Tensor, ends: Tensor, lengths: Sequence[int]
    ) -> list[Segment]:
        """Causal pieces of prompts: from `starts` [P] on, with the page tables `table` [P, M].

        Their rows, at `positions` [T] of piece `owner` [T], end at `ends` [P]; `lengths` are the same to the host.
        """
        column = owner * table.shape[1] + positions // self.page_size
        rows = table.flatten().index_select(0, column) * self.page_size + positions % self.page_size
        if self.native:
            return [Segment(0, WindowMeta(table, starts, None), rows, ends)]
        parts = zip(table.split(1), starts.split(1), rows.split(list(lengths)), strict=True)
        return [Segment(0, self._meta(one, start, None, len(part)), part[None]) for one, start, part in parts]

    def _meta(self, table: Tensor, prefix: Tensor, words: Tensor | None, width: int) -> WindowMeta | InvariantMeta:
        if self.native:
            return WindowMeta(table, prefix, words)
        meta = invariant_meta if self._deterministic else window_meta
        return meta(self.pages[0], table, prefix, words, width, self.heads)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `idlm.models.attention.Cache`; the rows lie as the head of this file says."""
        rows = [one[0].transpose(0, 1) for one in (query, key, value)]
        if len(self.segments) == 1:
            return self._segment(self.segments[0], layer, rows, scale)[None]
        mixed, start = [], 0
        for segment in self.segments:
            part = [one[start : start + segment.size] for one in rows]
            mixed.append(self._segment(segment, layer, part, scale))
            start = start + segment.size
        return torch.cat(mixed)[None]

    def _segment(self, segment: Segment, layer: int, rows: list[Tensor], scale: float) -> Tensor:
        """Write one segment's rows [B R + B M, heads, E] and mix the values that each sees."""
        pages, meta, real = self.pages[layer], segment.meta, segment.rows.shape[-1]
        if self.native and isinstance(meta, WindowMeta):
            return _native(segment, meta, pages, rows, scale)
        query, key, value = (_by_slot(one, segment) for one in rows)
        write_pages(pages, key[:, :real], value[:, :real], segment.rows)
        if isinstance(meta, InvariantMeta):
            mixed = invariant_attention(query, key, value, pages, meta, scale)
        else:
            mixed = window_attention(query, key, value, pages, meta, scale)
        return torch.cat([mixed[:, :real].flatten(0, 1), mixed[:, real:].flatten(0, 1)])


def _native(segment: Segment, meta: WindowMeta, pages: Tensor, rows: list[Tensor], scale: float) -> Tensor:
    query, key, value = rows
    if segment.ends is not None:
        return native.attend_pieces(
            query, key, value, pages, segment.rows, meta.table, meta.lengths, segment.ends, scale
        )
    assert meta.visible is not None  # noqa: S101
    return native.attend(
        query, key, value, pages, segment.rows, meta.table, meta.lengths, meta.visible, segment.masks, scale
    )


def _by_slot(rows: Tensor, segment: Segment) -> Tensor:
    """[B R + B M, ...] -> [B, R + M, ...]."""
    if not segment.masks:
        return rows.unflatten(0, (-1, segment.rows.shape[1]))
    first = segment.rows.numel()
    real, masks = rows[:first].unflatten(0, (-1, segment.rows.shape[1])), rows[first:].unflatten(0, (-1, segment.masks))
    return torch.cat([real, masks], dim=1)
