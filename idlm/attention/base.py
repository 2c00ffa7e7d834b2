"""What an attention back-end takes and gives: every row of a window sees its request's cached
prefix, and those rows of the window that its visibility names.

Shapes: B slots, R real rows and M masks of a slot, W = R + M window rows, T flat rows, H query
heads, G key/value heads, F = H / G query heads of one key/value head, E head size, N pages, C
columns of a page table, S = C * page prefix tokens that a table can name.

    pages [2, N, page, G, E]   one layer's keys, then its values; page 0 is the trash page: what
                               nobody reads is written there
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Metadata = TypeVar("Metadata")


@dataclass(frozen=True)
class Segment:
    """Rows of one forward: the windows of B slots, or B pieces of prompts.

    The rows of windows lie flat, B * R real ones slot by slot, then B * M masks; those of pieces
    lie one piece after the other. Masks are never written to the pages.

    Attributes:
        table: int64 [B, C]; token t of slot b is row t % page of page table[b, t // page].
        lengths: int64 [B], tokens of the prefix; what lies past them is never looked at.
        rows: int64 [B, R], the cache rows that the real rows are written to; [T] of pieces,
            those that `table` has for them.
        visible: int64 [B, W]; bit s of visible[b, r]: row r sees window row s. None: causal.
        masks: M.
        ends: int64 [B], of pieces: the flat row behind each one's last.
        widths: of pieces: how many rows each has, known to the host.
    """

    table: Tensor
    lengths: Tensor
    rows: Tensor
    visible: Tensor | None = None
    masks: int = 0
    ends: Tensor | None = None
    widths: Sequence[int] = ()

    @property
    def size(self) -> int:
        """Flat rows, T."""
        return self.rows.numel() + self.rows.shape[0] * self.masks

    @property
    def width(self) -> int:
        """Rows of a window, W; not for pieces."""
        return self.rows.shape[1] + self.masks

    def windows(self) -> list[Segment]:
        """Pieces as causal windows, each of a width of its own."""
        if self.ends is None:
            return [self]
        rows = self.rows.split(list(self.widths))
        parts = zip(self.table.split(1), self.lengths.split(1), rows, strict=True)
        return [Segment(table, length, own[None]) for table, length, own in parts]

    def by_slot(self, flat: Tensor) -> Tensor:
        """[T, ...] -> [B, W, ...]."""
        if not self.masks:
            return flat.unflatten(0, (-1, self.rows.shape[1]))
        first = self.rows.numel()
        real = flat[:first].unflatten(0, (-1, self.rows.shape[1]))
        return torch.cat([real, flat[first:].unflatten(0, (-1, self.masks))], dim=1)

    def flat(self, by_slot: Tensor) -> Tensor:
        """[B, W, ...] -> [T, ...]."""
        real = self.rows.shape[1]
        return torch.cat([by_slot[:, :real].flatten(0, 1), by_slot[:, real:].flatten(0, 1)])


class QKV(NamedTuple):
    """Rows of one layer: query [T, H, E], key and value [T, G, E], or all of them [B, W, ., E]."""

    query: Tensor
    key: Tensor
    value: Tensor


class Backend(Protocol[Metadata]):
    """One implementation; its methods do not wait for the device.

    Attributes:
        takes_pieces: whether one call takes pieces of any number and lengths; if not, they come as
            windows, one by one. A step recorded with pieces serves any others only if it does.
    """

    takes_pieces: bool

    def prepare(self, segment: Segment) -> Metadata:
        """What all layers of one step share."""
        ...

    def attend(self, metadata: Metadata, pages: Tensor, qkv: QKV, scale: float) -> Tensor:
        """Write one layer's real rows to its pages and mix the values that each row sees.

        `qkv` is flat, finite and dense along E. Returns [T, H, E]; zeros for a row that sees
        nothing. Cache rows past a prefix have no influence, not even NaN.
        """
        ...


def write_by_slot(segment: Segment, pages: Tensor, qkv: QKV) -> QKV:
    """Write the real rows to the pages, and give all rows as [B, W, ., E]."""
    qkv, real = QKV(*map(segment.by_slot, qkv)), segment.rows.shape[1]
    write_pages(pages, qkv.key[:, :real], qkv.value[:, :real], segment.rows)
    return qkv


def write_pages(pages: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> None:
    """Write `key`, `value` [B, R, G, E] to the cache rows `rows` int64 [B, R], in place."""
    flat = pages.view(2, -1, *key.shape[2:])
    index = rows.flatten()
    flat[0].index_copy_(0, index, key.flatten(0, 1))
    flat[1].index_copy_(0, index, value.flatten(0, 1))


def cache_rows(table: Tensor, positions: Tensor, page: int) -> Tensor:
    """The cache rows int64 [B, R] of the tokens at `positions` int64 [B, R]."""
    return table.gather(1, positions // page) * page + positions % page


def prefix_rows(segment: Segment, page: int) -> tuple[Tensor, Tensor]:
    """The cache row int64 [B, S] of each prefix token, 0 past the prefix; and bool [B, S], which
    ones are cached."""
    prefix = torch.arange(segment.table.shape[1] * page, device=segment.table.device)
    cached = prefix < segment.lengths[:, None]
    return (segment.table.repeat_interleave(page, 1) * page + prefix % page) * cached, cached


def visible_rows(segment: Segment) -> Tensor:
    """The visibility as bool [B, W, W]: row may see row."""
    window = torch.arange(segment.width, device=segment.lengths.device)
    if segment.visible is None:
        return (window[:, None] >= window).expand(segment.lengths.shape[0], -1, -1)
    return (segment.visible[..., None] >> window & 1).bool()
