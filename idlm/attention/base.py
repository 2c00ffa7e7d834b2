"""The interface of attention back-ends.

Each row of a window sees its request's cached prefix, and the window rows that its visibility word
selects. Rows come in two layouts: `flat`, as the model computes them, and `by slot`.

    flat [T, ...]         the real rows slot by slot, then the MASK rows slot by slot
    by slot [B, W, ...]   for each slot, its real rows, then its MASK rows

Shapes: B slots, R real rows and M MASK rows of a slot, W = R + M window rows, T = B * W flat rows,
H query heads, G key/value heads, F = H / G query heads of one key/value head, E head size, N pages,
C columns of a page table, S = C * page prefix tokens that a table can hold.

    pages [2, N, page, G, E]   one layer's keys, then its values. Page 0 is the trash page: rows
                               that must not be cached are written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from idlm.decoding.scores import Scores

Metadata = TypeVar("Metadata")


@dataclass(frozen=True)
class Segment:
    """Rows of one forward: the windows of B slots, or B chunks of prompts ("pieces").

    Windows are flat as described above. The rows of chunks are flat, chunk after chunk; chunks
    differ in their number of rows and have no MASK rows. MASK rows are never written to the pages.

    Attributes:
        table: int64 [B, C]; token t of slot b is row t % page of page table[b, t // page].
        lengths: int64 [B], the prefix tokens of each slot. What lies past them is never read.
        cache_rows: int64 [B, R], where each real row is written: page * page size + row in the
            page; [T] for chunks, the rows that `table` has for them.
        visible: int64 [B, W], visibility words: row r sees window row s if bit s of visible[b, r]
            is set. None: causal.
        num_masks: M.
        ends: int64 [B], chunks only: the flat row after the last of each.
        widths: chunks only: the rows of each, known on the host.
    """

    table: Tensor
    lengths: Tensor
    cache_rows: Tensor
    visible: Tensor | None = None
    num_masks: int = 0
    ends: Tensor | None = None
    widths: Sequence[int] = ()

    @property
    def size(self) -> int:
        """T, the number of flat rows: real rows and MASK rows."""
        return self.cache_rows.numel() + self.cache_rows.shape[0] * self.num_masks

    @property
    def width(self) -> int:
        """W, the rows of a window; undefined for chunks."""
        return self.cache_rows.shape[1] + self.num_masks

    def without_masks(self) -> Segment:
        """The same segment for a layer without MASK rows."""
        if not self.num_masks:
            return self
        real = self.cache_rows.shape[1]
        # kernels read the words as one dense block
        visible = None if self.visible is None else self.visible[:, :real].contiguous()
        return replace(self, visible=visible, num_masks=0)

    def windows(self) -> list[Segment]:
        """A segment of chunks as segments of one causal window each, since their widths differ."""
        if self.ends is None:
            return [self]
        cache_rows = self.cache_rows.split(list(self.widths))
        chunks = zip(self.table.split(1), self.lengths.split(1), cache_rows, strict=True)
        return [Segment(table, length, rows[None]) for table, length, rows in chunks]

    def by_slot(self, flat: Tensor) -> Tensor:
        """Reorder flat rows [T, ...] to [B, W, ...]."""
        if not self.num_masks:
            return flat.unflatten(0, (-1, self.cache_rows.shape[1]))
        real_rows = self.cache_rows.numel()  # B * R
        real = flat[:real_rows].unflatten(0, (-1, self.cache_rows.shape[1]))
        return torch.cat([real, flat[real_rows:].unflatten(0, (-1, self.num_masks))], dim=1)

    def flat(self, by_slot: Tensor) -> Tensor:
        """Reorder rows [B, W, ...] to flat [T, ...]."""
        real = self.cache_rows.shape[1]
        return torch.cat([by_slot[:, :real].flatten(0, 1), by_slot[:, real:].flatten(0, 1)])


class QKV(NamedTuple):
    """The rows of one layer, flat or by slot: query [T, H, E], key and value [T, G, E]; or
    [B, W, H, E] and [B, W, G, E]."""

    query: Tensor
    key: Tensor
    value: Tensor


class Backend(Protocol[Metadata]):
    """An implementation of attention. Its methods do not wait for the device.

    Attributes:
        takes_pieces: whether one call takes any number of chunks of any lengths. If not, chunks
            come as windows, one call each, and a recorded step serves only the lengths that it was
            recorded with.
    """

    takes_pieces: bool

    def prepare(self, segment: Segment, window: int | None = None) -> Metadata:
        """Compute, once per step, what all layers with this sliding window share.

        A row sees the last `window` keys of those that it would see without one, in the order of
        prefix and window rows; None: all. Pages that no row's window reaches are never read.
        """
        ...

    def attend(self, metadata: Metadata, pages: Tensor, qkv: QKV, scores: Scores) -> Tensor:
        """Write one layer's real rows to its pages, then attend: [T, H, E]. The window of `scores`
        is that of `prepare`.

        `qkv` is flat, finite and dense along E. The result is 0 for a row that sees nothing. Cache
        rows past a prefix have no influence, even if they hold NaN.
        """
        ...


def write_by_slot(segment: Segment, pages: Tensor, qkv: QKV) -> QKV:
    """Write the real rows of the flat `qkv` to the pages; return all rows by slot."""
    qkv, real = QKV(*map(segment.by_slot, qkv)), segment.cache_rows.shape[1]
    write_pages(pages, qkv.key[:, :real], qkv.value[:, :real], segment.cache_rows)
    return qkv


def write_pages(pages: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> None:
    """Write `key`, `value` [B, R, G, E] to the cache rows `rows` int64 [B, R], in place."""
    flat = pages.view(2, -1, *key.shape[2:])  # [2, N * page, G, E]
    index = rows.flatten()
    flat[0].index_copy_(0, index, key.flatten(0, 1))
    flat[1].index_copy_(0, index, value.flatten(0, 1))


def cache_rows(table: Tensor, positions: Tensor, page: int) -> Tensor:
    """The cache rows int64 [B, R] of the tokens at `positions` int64 [B, R]."""
    return table.gather(1, positions // page) * page + positions % page


def prefix_rows(segment: Segment, page: int) -> tuple[Tensor, Tensor]:
    """The cache row of each prefix token, int64 [B, S], and which of them are cached, bool [B, S].

    Entries past the prefix are row 0, which is in the trash page.
    """
    prefix = torch.arange(segment.table.shape[1] * page, device=segment.table.device)
    cached = prefix < segment.lengths[:, None]
    return (segment.table.repeat_interleave(page, 1) * page + prefix % page) * cached, cached


def visible_rows(segment: Segment) -> Tensor:
    """The visibility as bool [B, W, W]: entry [b, r, s] is whether row r sees row s, in a layer
    without a sliding window."""
    rows = torch.arange(segment.width, device=segment.lengths.device)
    if segment.visible is None:
        return (rows[:, None] >= rows).expand(segment.lengths.shape[0], -1, -1)
    return (segment.visible[..., None] >> rows & 1).bool()


def last_rows(seen: Tensor, window: int) -> Tensor:
    """Of the window rows that each row sees, bool [B, W, W], the last `window`."""
    return seen & (seen.flip(-1).cumsum(-1).flip(-1) <= window)


def first_keys(segment: Segment, seen: Tensor, window: int) -> Tensor:
    """The first prefix token, int64 [B, W], that a sliding window leaves to each row; `seen` is
    `visible_rows`. It is past the prefix if the window is full of window rows."""
    return (segment.lengths[:, None] + seen.sum(-1) - window).clamp(min=0)
