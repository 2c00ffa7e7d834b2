"""Attention by the Triton kernels, on a GPU in float16, bfloat16 or float32."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from idlm.attention.base import (
    QKV,
    Segment,
    first_keys,
    last_rows,
    visible_rows,
    write_pages,
)
from idlm.decoding.scores import Scores
from idlm.kernels.layer_kernels import ops_for
from idlm.kernels.layer_ops import Heads, Turn


class TritonMetadata(NamedTuple):
    """A segment, whose `visible` has the sliding window in it; `firsts` int64 [B, W] is the first
    prefix token that each row of a window sees, if there is a sliding window."""

    segment: Segment
    firsts: Tensor | None = None


class Products(NamedTuple):
    """Rows [T, (H + 2 G) E] of a layer before the norms of its heads and the rotary embedding:
    queries, keys and values. `turn` has the embedding of each row."""

    rows: Tensor
    turn: Turn
    heads: Heads


class TritonAttention:
    """The kernels read the prefixes in their pages, without a copy; PyTorch writes the new rows."""

    takes_pieces = True

    def prepare(self, segment: Segment, window: int | None = None) -> TritonMetadata:
        """What a sliding window leaves of windows; the kernel for chunks finds it by itself."""
        if window is None or segment.ends is not None:
            return TritonMetadata(segment)
        seen = visible_rows(segment)
        firsts = first_keys(segment, seen, window)
        if segment.visible is not None:
            bits = torch.arange(segment.width, device=seen.device)
            seen = last_rows(seen, window)
            segment = replace(segment, visible=(seen.to(torch.int64) << bits).sum(-1))
        return TritonMetadata(segment, firsts)

    def attend(self, metadata: TritonMetadata, pages: Tensor, qkv: QKV, scores: Scores) -> Tensor:
        rows = metadata.segment.cache_rows
        real = rows.numel()
        write_pages(pages, qkv.key[None, :real], qkv.value[None, :real], rows)
        return _attend(metadata, pages, qkv, scores)

    def attend_products(
        self, metadata: TritonMetadata, pages: Tensor, products: Products, scores: Scores
    ) -> Tensor:
        """`attend` for rows as the layer's product gives them: one kernel norms, rotates and writes
        them."""
        rows, turn, heads = products
        cache_rows = metadata.segment.cache_rows.flatten()
        qkv = QKV(*ops_for(rows).rotate(rows, turn, heads, pages, cache_rows))
        return _attend(metadata, pages, qkv, scores)


def _attend(metadata: TritonMetadata, pages: Tensor, qkv: QKV, scores: Scores) -> Tensor:
    """Attention [T, H, E] of rows whose keys and values are in the pages, but for MASK rows'."""
    from idlm.kernels import prefill_attention_triton, window_attention_triton  # optional

    segment, firsts = metadata
    query, key, value = qkv
    if segment.ends is not None:  # the kernel reads the chunks' own keys in the pages too
        ends = segment.table, segment.lengths, segment.ends
        return prefill_attention_triton.attend(query, pages, *ends, scores)
    prefix = window_attention_triton.Prefix(pages, segment.table, segment.lengths)
    windows = window_attention_triton.Windows(segment.visible, firsts, segment.num_masks)
    return window_attention_triton.attend(query, key, value, prefix, windows, scores)
