"""`KVCache`: the pages of all layers, and what the rows of the running forward see of them.

Rows of one forward lie flat, [1, T]: the pieces of prompts, then the windows' real rows, slot by
slot, then their MASK rows, so that the adapter's gate is one slice and the linear layers see plain
matrices:

    piece 0 | piece 1 | ... | B slots x R real rows | B slots x M masks

Pieces come first: the window of a slot whose prompt ends in this very forward sees what they have
written. Real rows are written to the pages at their positions; the next window overwrites what was
rejected, so there is nothing to trim. MASK rows never enter the pages.

Shapes as in `idlm.attention.base`; P pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from idlm.attention.base import QKV, Segment, cache_rows
from idlm.attention.choice import choose
from idlm.engine.prefill import PrefillBatch
from idlm.errors import InputError


class KVCache:
    """Keys and values of every layer, [2, N, page, G, E] each; page 0 takes what nobody wants.

    Attributes:
        backend: the attention, the same for every forward.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        pages: int,
        page_size: int,
        like: Tensor,
        deterministic: bool = False,
    ) -> None:
        """`shapes` are (H, G, E) by layer; `like` has the type and the device of the keys;
        `deterministic` as in `choose`."""
        if len(set(shapes)) > 1:
            raise InputError(
                f"layers with attention of different shapes {sorted(set(shapes))} are not supported"
            )
        heads, groups, size = shapes[0]
        self.page_size = page_size
        self.pages = [like.new_zeros(2, pages, page_size, groups, size) for _ in shapes]
        self.backend = choose(self.pages[0], heads, deterministic)
        self._prepared: list[tuple[int, Any]] = []  # flat rows and metadata, by segment

    def columns(self, tokens: int) -> int:
        """Page-table columns that `tokens` tokens need."""
        return -(-tokens // self.page_size)

    def windows(
        self, table: Tensor, lengths: Tensor, visible: Tensor, positions: Tensor, masks: int
    ) -> Segment:
        """The windows of slots whose real rows go to `positions` int64 [B, R]; the rest as in
        `Segment`.

        Rows past the end of the table go to the trash page.
        """
        end = table.shape[1] * self.page_size
        inside = cache_rows(table, positions.clamp(max=end - 1), self.page_size)
        return Segment(table, lengths, torch.where(positions < end, inside, 0), visible, masks)

    def pieces(self, table: Tensor, batch: PrefillBatch) -> Segment:
        """The pieces of prompts, with the page tables `table` [P, C]."""
        column = batch.owner * table.shape[1] + batch.positions // self.page_size
        rows = (
            table.flatten().index_select(0, column) * self.page_size
            + batch.positions % self.page_size
        )
        return Segment(table, batch.starts, rows, ends=batch.ends, widths=batch.widths)

    def prepare(self, segments: Sequence[Segment]) -> None:
        """Say what the rows of the next forward are."""
        if not self.backend.takes_pieces:
            segments = [window for segment in segments for window in segment.windows()]
        self._prepared = [(segment.size, self.backend.prepare(segment)) for segment in segments]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `idlm.models.attention.Cache`."""
        pages, qkv = (
            self.pages[layer],
            QKV(*(rows[0].transpose(0, 1) for rows in (query, key, value))),
        )
        if len(self._prepared) == 1:
            return self.backend.attend(self._prepared[0][1], pages, qkv, scale)[None]
        mixed, start = [], 0
        for size, metadata in self._prepared:
            part = QKV(*(rows[start : start + size] for rows in qkv))
            mixed.append(self.backend.attend(metadata, pages, part, scale))
            start = start + size
        return torch.cat(mixed)[None]
