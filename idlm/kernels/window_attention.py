"""Window attention over a paged cache: every row of a window sees its request's prefix and what its word allows.

Shapes: B slots, W window rows, H query heads, G key/value heads, F = H / G query heads of one key/value head, E head
size, P pages, T rows of a page, M columns of the page table, S = M * T prefix rows a table can name.

    pages [2, P, T, G, E]   one layer's keys, then its values; page 0 is the trash page: what nobody reads goes there
    table int64 [B, M]      token t of slot b is row t % T of page table[b, t // T]
    lengths int64 [B]       how many tokens of the prefix are in the cache; what lies past them is never looked at
    visible int64 [B, W]    bit s of visible[b, r]: row r sees window row s; None: the rows are causal (a prefill chunk)

A step builds a `WindowMeta` once, and every layer uses it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)


class WindowMeta(NamedTuple):
    """What all layers of one step share.

    Attributes:
        table, lengths, visible: as above.
        rows: int64 [B * (S + W)], for the PyTorch twin: the cache row of every prefix token, 0 for one that does not
            exist; W places for the window's own rows follow them.
        bias: [B, 1, W * F, S + W], for the PyTorch twin: 0 where a row sees a key, else -inf.
    """

    table: Tensor
    lengths: Tensor
    visible: Tensor | None
    rows: Tensor | None = None
    bias: Tensor | None = None


def window_meta(
    pages: Tensor, table: Tensor, lengths: Tensor, visible: Tensor | None, width: int, heads: int
) -> WindowMeta:
    """The meta of a step whose windows have `width` rows and whose model has `heads` query heads.

    `pages` are any layer's: only their shape, type and device count.
    """
    if use_triton(pages):
        return WindowMeta(table, lengths, visible)
    _, _, page, groups, _ = pages.shape
    prefix = torch.arange(table.shape[1] * page, device=pages.device)
    cached = prefix < lengths[:, None]
    rows = table.repeat_interleave(page, 1) * page + prefix % page
    seen = cached[:, None].expand(-1, width, -1)
    seen = torch.cat([seen, visible_rows(visible, lengths, width)], 2)
    bias = torch.zeros_like(seen, dtype=pages.dtype).masked_fill_(~seen, -torch.inf)
    return WindowMeta(
        table,
        lengths,
        visible,
        rows=F.pad(rows * cached, (0, width)).flatten(),
        bias=bias.repeat_interleave(heads // groups, 1)[:, None],
    )


def use_triton(pages: Tensor) -> bool:
    """Whether the Triton kernel serves such pages; the PyTorch twin serves all others."""
    return pages.is_cuda and pages.dtype in TRITON_TYPES and find_spec("triton") is not None


def visible_rows(visible: Tensor | None, lengths: Tensor, width: int) -> Tensor:
    """The words as bool [B, W, W]: row may see row."""
    window = torch.arange(width, device=lengths.device)
    if visible is None:
        return (window[:, None] >= window).expand(lengths.shape[0], -1, -1)
    return (visible[..., None] >> window & 1).bool()


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, pages: Tensor, meta: WindowMeta, scale: float
) -> Tensor:
    """Attention of the rows `query` [B, W, H, E] over their prefix and the window's `key`, `value` [B, W, G, E].

    Returns:
        [B, W, H, E]; zeros for a row that sees nothing. Cache rows past a prefix have no influence, not even NaN; the
        window's own rows must be finite.
    """
    if meta.bias is not None:
        return attend_torch(query, key, value, pages, meta, scale)
    from idlm.kernels.window_attention_triton import attend  # here, since not every machine has triton

    return attend(query, key, value, pages, meta.table, meta.lengths, meta.visible, scale)


def attend_torch(query: Tensor, key: Tensor, value: Tensor, pages: Tensor, meta: WindowMeta, scale: float) -> Tensor:
    """The PyTorch twin: copy the prefixes out of their pages, put the window's rows behind them, one SDPA call.

    The F query heads of a key/value head become rows of one product: about 1.3x as fast as `enable_gqa` on a CPU.
    """
    assert meta.rows is not None
    batch, width, heads, size = query.shape
    groups = key.shape[2]
    pages[:, 0, 0].zero_()  # what no token stands behind is read from this row; a NaN there would survive a weight of 0
    gathered = pages.view(2, -1, groups, size).index_select(1, meta.rows)
    keys, values = gathered.view(2, batch, -1, groups, size).unbind()
    keys[:, -width:] = key
    values[:, -width:] = value
    folded = query.view(batch, width, groups, heads // groups, size).transpose(1, 2).reshape(batch, groups, -1, size)
    mixed = F.scaled_dot_product_attention(
        folded, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=meta.bias, scale=scale
    )
    return mixed.view(batch, groups, width, -1, size).transpose(1, 2).reshape(batch, width, heads, size)


def cache_rows(table: Tensor, positions: Tensor, page: int) -> Tensor:
    """The cache rows int64 [B, R] of the tokens at `positions` int64 [B, R], with pages of `page` rows; once a step.

    A row that nobody wants is the trash page's: 0, say.
    """
    return table.gather(1, positions // page) * page + positions % page


def write_pages(pages: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> None:
    """Write `key`, `value` [B, R, G, E] to the cache rows `rows` int64 [B, R] (of `cache_rows`), in place."""
    flat = pages.view(2, -1, *key.shape[2:])
    index = rows.flatten()
    flat[0].index_copy_(0, index, key.flatten(0, 1))
    flat[1].index_copy_(0, index, value.flatten(0, 1))
