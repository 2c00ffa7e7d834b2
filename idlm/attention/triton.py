"""Attention by the Triton kernels, on a GPU in float16, bfloat16 or float32."""

from __future__ import annotations

from torch import Tensor

from idlm.attention.base import QKV, Segment, write_by_slot, write_pages


class TritonAttention:
    """The kernels read the prefixes in their pages, without a copy; PyTorch writes the new rows."""

    takes_pieces = True

    def prepare(self, segment: Segment) -> Segment:
        """The segment itself: the kernels read the page table."""
        return segment

    def attend(self, metadata: Segment, pages: Tensor, qkv: QKV, scale: float) -> Tensor:
        if metadata.ends is not None:
            return _attend_chunks(metadata, metadata.ends, pages, qkv, scale)
        from idlm.kernels.window_attention_triton import attend  # Triton is optional

        segment = metadata
        query, key, value = write_by_slot(segment, pages, qkv)
        mixed = attend(
            query, key, value, pages, segment.table, segment.lengths, segment.visible, scale
        )
        return segment.flat(mixed)


def _attend_chunks(segment: Segment, ends: Tensor, pages: Tensor, qkv: QKV, scale: float) -> Tensor:
    """Attention of chunks of prompts; the kernel reads their keys in the pages too."""
    from idlm.kernels.prefill_attention_triton import attend  # Triton is optional

    write_pages(pages, qkv.key[None], qkv.value[None], segment.cache_rows)
    return attend(qkv.query, pages, segment.table, segment.lengths, ends, scale)
