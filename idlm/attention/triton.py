"""Attention by the Triton kernels, on a GPU in float16, bfloat16 or float32."""

from __future__ import annotations

from torch import Tensor

from idlm.attention.base import QKV, Segment, write_by_slot, write_pages


class TritonAttention:
    """The kernels read prefixes in their pages, so there is nothing to prepare."""

    takes_pieces = True

    def prepare(self, segment: Segment) -> Segment:
        """See `Backend`."""
        return segment

    def attend(self, metadata: Segment, pages: Tensor, qkv: QKV, scale: float) -> Tensor:
        """See `Backend`."""
        if metadata.ends is not None:
            return _pieces(metadata, metadata.ends, pages, qkv, scale)
        from idlm.kernels.window_attention_triton import attend  # not every machine has triton

        of = metadata
        query, key, value = write_by_slot(of, pages, qkv)
        return of.flat(attend(query, key, value, pages, of.table, of.lengths, of.visible, scale))


def _pieces(of: Segment, ends: Tensor, pages: Tensor, qkv: QKV, scale: float) -> Tensor:
    """All pieces of prompts; they read what they have written."""
    from idlm.kernels.prefill_attention_triton import attend  # as above

    write_pages(pages, qkv.key[None], qkv.value[None], of.rows)
    return attend(qkv.query, pages, of.table, of.lengths, ends, scale)
