"""The CPU kernel of `idlm.kernels.window_attention` (csrc/window_attention.c)."""

from __future__ import annotations

import torch
from torch import Tensor

from idlm.kernels import native
from idlm.kernels.choice import faster
from idlm.kernels.window_attention import attend_torch, window_meta, write_pages

TYPES = (torch.float32, torch.float64)
TIMED_ROWS, TIMED_TOKENS = 4, 256
"""Rows of a window, and cached tokens before it, that the kernel is timed at."""


def available(pages: Tensor) -> bool:
    """Whether the kernel serves such pages."""
    return pages.device.type == "cpu" and pages.dtype in TYPES and native.loaded()


@torch.inference_mode()
def faster_here(pages: Tensor, heads: int) -> bool:
    """Whether the kernel is faster than the PyTorch twin on windows over such pages; the log says.

    `pages` [2, P, T, G, E] are any layer's: only their shape and type count.
    """
    if not available(pages):
        return False
    _, _, page, groups, size = pages.shape
    own = pages.new_zeros(2, TIMED_TOKENS // page + 1, page, groups, size)
    query, key, value = (pages.new_zeros(TIMED_ROWS, count, size) for count in (heads, groups, groups))
    table, lengths = torch.arange(own.shape[1])[None], torch.tensor([TIMED_TOKENS])
    visible = (2 ** torch.arange(1, TIMED_ROWS + 1) - 1)[None]
    rows = torch.zeros(1, TIMED_ROWS, dtype=torch.int64)

    def ours() -> Tensor:
        return attend(query, key, value, own, rows, table, lengths, visible, 0, 1.0)

    meta = window_meta(own, table, lengths, visible, TIMED_ROWS, heads)

    def theirs() -> Tensor:
        write_pages(own, key[None], value[None], rows)
        return attend_torch(query[None], key[None], value[None], own, meta, 1.0)

    return faster(f"window attention {heads}x{size}", ours, theirs)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    rows: Tensor,
    table: Tensor,
    lengths: Tensor,
    visible: Tensor,
    masks: int,
    scale: float,
) -> Tensor:
    """Write the real rows of windows to the pages and mix the values that each row sees.

    Args:
        query, key, value: [B R + B M, heads, E]: the real rows of all slots, then their masks; dense along E.
        rows: int64 [B, R], the cache rows that the real rows go to.
        table, lengths, visible: as in `window_attention`; masks: M.

    Returns:
        [B R + B M, H, E].
    """
    mixed: Tensor = torch.ops.idlm.window_attention(
        query, key, value, pages, rows, table.contiguous(), lengths, visible, False, masks, scale
    )
    return mixed


def attend_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    rows: Tensor,
    table: Tensor,
    lengths: Tensor,
    ends: Tensor,
    scale: float,
) -> Tensor:
    """The same for causal pieces of prompts of any lengths, one after the other.

    Args:
        query, key, value: [T, heads, E]; rows: int64 [T].
        table, lengths: of each piece, [P, M] and [P]; ends: int64 [P], the row behind its last one.

    Returns:
        [T, H, E].
    """
    mixed: Tensor = torch.ops.idlm.window_attention(
        query, key, value, pages, rows, table.contiguous(), lengths, ends, True, 0, scale
    )
    return mixed
