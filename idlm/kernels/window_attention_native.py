"""The CPU kernel of `idlm.kernels.window_attention` (csrc/window_attention.c)."""

from __future__ import annotations

import torch
from torch import Tensor

from idlm.kernels import native

TYPES = (torch.float32, torch.float64)


def available(pages: Tensor) -> bool:
    """Whether the kernel serves such pages."""
    return pages.device.type == "cpu" and pages.dtype in TYPES and native.loaded()


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
