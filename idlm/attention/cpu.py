"""Attention by the C kernel (csrc/window_attention.c), on a CPU in float32 or float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from idlm.attention.base import QKV, Backend, Segment
from idlm.attention.torch import TorchAttention
from idlm.kernels import native
from idlm.kernels.choice import Call, faster

TYPES = (torch.float32, torch.float64)
TIMED_ROWS, TIMED_TOKENS = 4, 256
"""Rows of a window, and cached tokens before it, that the kernel is timed at."""


class CpuAttention:
    """One call of the kernel writes a segment's real rows and attends."""

    takes_pieces = True

    def prepare(self, segment: Segment) -> Segment:
        """See `Backend`."""
        return replace(segment, table=segment.table.contiguous())

    def attend(self, metadata: Segment, pages: Tensor, qkv: QKV, scale: float) -> Tensor:
        """See `Backend`."""
        of, ops = metadata, torch.ops.idlm
        inputs = *qkv, pages, of.rows, of.table, of.lengths
        mixed: Tensor
        if of.ends is not None:
            mixed = ops.prefill_attention(*inputs, of.ends, scale)
        else:
            mixed = ops.window_attention(*inputs, of.visible, of.masks, scale)
        return mixed


@torch.inference_mode()
def faster_here(pages: Tensor, heads: int) -> bool:
    """Whether the kernel serves such pages and is faster than PyTorch; the log has both times.

    `pages` [2, N, page, G, E] are any layer's: only their shape, type and device count.
    """
    if pages.device.type != "cpu" or pages.dtype not in TYPES or not native.loaded():
        return False
    _, _, page, groups, size = pages.shape
    own = pages.new_zeros(2, TIMED_TOKENS // page + 1, page, groups, size)
    qkv = QKV(*(pages.new_zeros(TIMED_ROWS, count, size) for count in (heads, groups, groups)))
    segment = Segment(
        table=torch.arange(own.shape[1])[None],
        lengths=torch.tensor([TIMED_TOKENS]),
        rows=torch.zeros(1, TIMED_ROWS, dtype=torch.int64),
        visible=(2 ** torch.arange(1, TIMED_ROWS + 1) - 1)[None],
    )

    def call(backend: Backend[Any]) -> Call:
        return partial(backend.attend, backend.prepare(segment), own, qkv, 1.0)

    return faster(
        f"window attention {heads}x{size}", call(CpuAttention()), call(TorchAttention(own, heads))
    )
