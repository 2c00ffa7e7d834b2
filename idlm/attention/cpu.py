"""Attention by the C kernel (csrc/window_attention.c), on a CPU in float32 or float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from idlm.attention.base import QKV, Backend, Segment
from idlm.attention.torch import TorchAttention
from idlm.decoding.scores import Scores
from idlm.kernels import native
from idlm.kernels.choice import Call, faster

TYPES = (torch.float32, torch.float64)
NO_SINKS = torch.empty(0)
TIMED_ROWS, TIMED_TOKENS = 4, 256
"""The timed case: rows of a window, and cached tokens of its prefix."""


class CpuAttention:
    """One call of the kernel writes a segment's real rows and attends."""

    takes_pieces = True

    def prepare(self, segment: Segment, window: int | None = None) -> Segment:
        """The segment itself, with a dense page table: the kernel finds each row's window."""
        return replace(segment, table=segment.table.contiguous())

    def attend(self, metadata: Segment, pages: Tensor, qkv: QKV, scores: Scores) -> Tensor:
        """See `Backend`. The kernel writes the pages too."""
        segment, ops, sinks = metadata, torch.ops.idlm, NO_SINKS
        if scores.sinks is not None:
            sinks = scores.sinks.to(pages.dtype).contiguous()
        inputs = *qkv, pages, segment.cache_rows, segment.table, segment.lengths
        numbers = scores.scale, scores.window or 0, scores.softcap or 0.0
        mixed: Tensor
        if segment.ends is not None:
            mixed = ops.prefill_attention(*inputs, segment.ends, sinks, *numbers)
        else:
            masks = segment.num_masks
            mixed = ops.window_attention(*inputs, segment.visible, sinks, masks, *numbers)
        return mixed


@torch.inference_mode()
def faster_here(pages: Tensor, heads: int) -> bool:
    """Whether the kernel supports these pages and is faster than PyTorch; both times are logged.

    `pages` [2, N, page, G, E] may be any layer's: only shape, type and device are used.
    """
    if pages.device.type != "cpu" or pages.dtype not in TYPES or not native.loaded():
        return False
    _, _, page, groups, size = pages.shape
    trial = pages.new_zeros(2, TIMED_TOKENS // page + 1, page, groups, size)
    qkv = QKV(*(pages.new_zeros(TIMED_ROWS, count, size) for count in (heads, groups, groups)))
    segment = Segment(
        table=torch.arange(trial.shape[1])[None],
        lengths=torch.tensor([TIMED_TOKENS]),
        cache_rows=torch.zeros(1, TIMED_ROWS, dtype=torch.int64),
        visible=(2 ** torch.arange(1, TIMED_ROWS + 1) - 1)[None],  # causal: 1, 11, 111, ...
    )

    def call(backend: Backend[Any]) -> Call:
        return partial(backend.attend, backend.prepare(segment), trial, qkv, Scores(1.0))

    return faster(
        f"window attention {heads}x{size}", call(CpuAttention()), call(TorchAttention(trial, heads))
    )
