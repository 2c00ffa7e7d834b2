"""Attention by the Triton kernel, on a GPU in float16, bfloat16 or float32."""

from __future__ import annotations

from torch import Tensor

from idlm.attention.base import QKV, Segment, write_by_slot


class TritonAttention:
    """The kernel reads prefixes in their pages, so there is nothing to prepare."""

    takes_pieces = False

    def prepare(self, segment: Segment) -> Segment:
        """See `Backend`."""
        return segment

    def attend(self, metadata: Segment, pages: Tensor, qkv: QKV, scale: float) -> Tensor:
        """See `Backend`."""
        from idlm.kernels.window_attention_triton import attend  # not every machine has triton

        of = metadata
        query, key, value = write_by_slot(of, pages, qkv)
        return of.flat(attend(query, key, value, pages, of.table, of.lengths, of.visible, scale))
