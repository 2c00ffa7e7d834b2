"""`KVCache`: the pages of all layers, and the attention of a forward's rows to them.

The rows of one forward are flat, [1, T]: pieces of prompts, then the real rows of all windows, slot
by slot, then their MASK rows. So the adapter's gate is one slice, and linear layers get plain
matrices:

    piece 0 | piece 1 | ... | B slots x R real rows | B slots x M masks

Pieces come first: if the last piece of a prompt is in the forward, the window of its slot reads the
keys and values that the piece has written. Real rows are written to the pages at their positions.
The next window overwrites rejected drafts, so nothing is trimmed. MASK rows are never written to
the pages.

Shapes as in `idlm.attention.base`; P pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from idlm.attention.base import QKV, Segment, cache_rows
from idlm.attention.choice import choose
from idlm.attention.triton import Products
from idlm.decoding.scores import Scores
from idlm.engine.prefill import PrefillBatch
from idlm.errors import InputError
from idlm.kernels.layer_ops import Turn


class KVCache:
    """Keys and values of every layer, [2, N, page, G, E] each. Page 0 is the trash page.

    Attributes:
        backend: the attention back-end of all forwards.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        pages: int,
        page_size: int,
        like: Tensor,
        deterministic: bool = False,
    ) -> None:
        """`shapes` are (H, G, E) by layer. `like` has the dtype and the device of the keys.
        `deterministic` is that of `choose`."""
        if len(set(shapes)) > 1:
            raise InputError(
                f"layers with attention of different shapes {sorted(set(shapes))} are not supported"
            )
        heads, groups, size = shapes[0]
        self.page_size = page_size
        self.pages = [like.new_zeros(2, pages, page_size, groups, size) for _ in shapes]
        self.backend = choose(self.pages[0], heads, deterministic)
        self._segments: list[Segment] = []
        self._entry = 0
        self._prepared: dict[tuple[int | None, bool], list[tuple[int, Any]]] = {}
        """By sliding window, and whether there are MASK rows: flat rows and metadata of each
        segment."""

    def columns(self, tokens: int) -> int:
        """The number of page-table columns that `tokens` tokens need."""
        return -(-tokens // self.page_size)

    def windows(
        self, table: Tensor, lengths: Tensor, visible: Tensor, positions: Tensor, masks: int
    ) -> Segment:
        """The segment of the slots' windows. Their real rows are written at `positions` int64
        [B, R]; the other arguments are those of `Segment`.

        Rows past the end of the table are written to the trash page.
        """
        end = table.shape[1] * self.page_size
        inside = cache_rows(table, positions.clamp(max=end - 1), self.page_size)
        return Segment(table, lengths, torch.where(positions < end, inside, 0), visible, masks)

    def pieces(self, table: Tensor, batch: PrefillBatch) -> Segment:
        """The segment of prompt pieces; `table` [P, C] has the page table of each piece."""
        column = batch.owner * table.shape[1] + batch.positions // self.page_size
        rows = (
            table.flatten().index_select(0, column) * self.page_size
            + batch.positions % self.page_size
        )
        return Segment(table, batch.starts, rows, ends=batch.ends, widths=batch.widths)

    def prepare(self, segments: Sequence[Segment], entry: int) -> None:
        """Set the segments of the next forward, in the order of its rows. Its MASK rows are in the
        layers from `entry` on."""
        if not self.backend.takes_pieces:
            segments = [window for segment in segments for window in segment.windows()]
        self._segments, self._prepared = list(segments), {}
        self._entry = entry if any(segment.num_masks for segment in segments) else 0

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """Attention of a layer's rows, as `idlm.models.attention.Cache` defines it. Writes the keys
        and values of real rows to the pages."""
        qkv = QKV(*(rows[0].transpose(0, 1) for rows in (query, key, value)))

        def attend(metadata: Any, part: slice) -> Tensor:
            rows = QKV(*(each[part] for each in qkv))
            return self.backend.attend(metadata, self.pages[layer], rows, scores)

        return self._by_segment(layer, scores, attend)[None]

    def attend_products(self, layer: int, products: Products, scores: Scores) -> Tensor:
        """`attend` for a layer's flat rows before norms and rotary embedding: [T, H, E]. The
        back-end must be `TritonAttention`."""
        rows, (cosine, sine), heads = products
        backend: Any = self.backend

        def attend(metadata: Any, part: slice) -> Tensor:
            own = Products(rows[part], Turn(cosine[part], sine[part]), heads)
            mixed: Tensor = backend.attend_products(metadata, self.pages[layer], own, scores)
            return mixed

        return self._by_segment(layer, scores, attend)

    def _by_segment(
        self, layer: int, scores: Scores, attend: Callable[[Any, slice], Tensor]
    ) -> Tensor:
        """The results of each segment's metadata and rows, one below the other."""
        at = scores.window, layer >= self._entry
        mixed, start = [], 0
        for size, metadata in self._prepared.get(at) or self._prepare(*at):
            mixed.append(attend(metadata, slice(start, start + size)))
            start += size
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _prepare(self, window: int | None, masks: bool) -> list[tuple[int, Any]]:
        """What all layers share with this sliding window, with MASK rows or without."""
        segments = [each if masks else each.without_masks() for each in self._segments]
        prepared = [(segment.size, self.backend.prepare(segment, window)) for segment in segments]
        self._prepared[window, masks] = prepared
        return prepared
