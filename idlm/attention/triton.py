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
    write_by_slot,
    write_pages,
)
from idlm.decoding.scores import Scores


class TritonMetadata(NamedTuple):
    """A segment, whose `visible` has the sliding window in it; `firsts` int64 [B, W] is the first
    prefix token that each row of a window sees, if there is a sliding window."""

    segment: Segment
    firsts: Tensor | None = None


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
        segment, firsts = metadata
        if segment.ends is not None:
            return _attend_chunks(segment, segment.ends, pages, qkv, scores)
        from idlm.kernels.window_attention_triton import Prefix, attend  # Triton is optional

        query, key, value = write_by_slot(segment, pages, qkv)
        prefix = Prefix(pages, segment.table, segment.lengths)
        return segment.flat(attend(query, key, value, prefix, segment.visible, firsts, scores))


def _attend_chunks(
    segment: Segment, ends: Tensor, pages: Tensor, qkv: QKV, scores: Scores
) -> Tensor:
    """Attention of chunks of prompts; the kernel reads their keys in the pages too."""
    from idlm.kernels.prefill_attention_triton import attend  # Triton is optional

    write_pages(pages, qkv.key[None], qkv.value[None], segment.cache_rows)
    return attend(qkv.query, pages, segment.table, segment.lengths, ends, scores)
