"""The Triton kernels of the deterministic mode: their tiles and orders of summation do not depend
on the number of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idlm.decoding.scores import Scores
from idlm.kernels.window_attention_triton import Prefix, absorb, base_2, begun


@triton.jit  # type: ignore[untyped-decorator]
def _linear(  # type: ignore[no-untyped-def]
    x, weight, bias, out, rows, inner, outer,
    BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, COLUMNS] of `x` [rows, inner] times the transpose of `weight` [outer, inner].

    The sum always goes over `inner` in the same order.
    """
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inner, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth[None, :] < inner
        a = tl.load(
            x + row[:, None] * inner + depth, mask=inside & (row < rows)[:, None], other=0.0
        )
        b = tl.load(
            weight + column[:, None] * inner + depth,
            mask=inside & (column < outer)[:, None],
            other=0.0,
        )
        total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
    if BIASED:
        total += tl.load(bias + column, mask=column < outer, other=0.0).to(tl.float32)
    tl.store(
        out + row[:, None] * outer + column, total, mask=(row < rows)[:, None] & (column < outer)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with float32 sums: `x` [..., in], `weight` [out, in], `bias` [out]."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty(rows.shape[0], weight.shape[0])
    depth = 32 if x.dtype == torch.float32 else 64
    grid = (triton.cdiv(weight.shape[0], 64), triton.cdiv(rows.shape[0], 16))
    if rows.shape[0]:
        _linear[grid](
            rows, weight.contiguous(), weight if bias is None else bias, out,
            *rows.shape, weight.shape[0],
            BIASED=bias is not None, ROWS=16, COLUMNS=64, DEPTH=depth, num_warps=4,
        )  # fmt: skip
    return out.view(*x.shape[:-1], weight.shape[0])


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, key, value, pages, table, lengths, order, counts, sinks, out, scale, cap, half, columns,
    width, window, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    PAGE: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One row's F query heads of a key/value head, over all keys of the row in order of position.

    `half` is the offset of the values in `pages`; `window` is the sliding window if the layer is
    WINDOWED. Blocks begin at multiples of KEYS, whatever the window hides of them.
    """
    slot = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    row = slot * width + tl.program_id(1)
    head = tl.arange(0, HEADS)
    size = tl.arange(0, SIZE)
    offset = ((row * G + group) * F + head)[:, None] * E + size  # in query and out [B, W, H, E]
    alive = (head < F)[:, None] & (size < E)
    q = tl.load(query + offset, mask=alive, other=0.0)
    top, total = begun(sinks, group * F + tl.minimum(head, F - 1), group >= 0, HEADS, SINKS)
    mixed = tl.zeros([HEADS, SIZE], tl.float32)
    length = tl.load(lengths + slot)
    count = tl.load(counts + row)
    first = count * 0
    if WINDOWED:
        first = tl.maximum(count - window, 0)
    for start in range(first // KEYS * KEYS, count, KEYS):
        # keys 0 .. length - 1 are in the pages; the others are window rows, in the order `order`
        token = start + tl.arange(0, KEYS)
        seen = (token >= first) & (token < count)
        cached = (token < length) & seen
        in_window = (token >= length) & seen
        page = tl.load(table + slot * columns + token // PAGE, mask=cached, other=0)
        window_row = tl.load(order + row * width + token - length, mask=in_window, other=0)
        cached_at = ((page * PAGE + token % PAGE) * G + group)[:, None] * E + size
        window_at = ((slot * width + window_row) * G + group)[:, None] * E + size
        from_pages = cached[:, None] & (size < E)
        from_window = in_window[:, None] & (size < E)
        k = tl.where(
            from_pages,
            tl.load(pages + cached_at, mask=from_pages, other=0.0),
            tl.load(key + window_at, mask=from_window, other=0.0),
        )
        v = tl.load(pages + half + cached_at, mask=from_pages, other=0.0)
        v = tl.where(from_pages, v, tl.load(value + window_at, mask=from_window, other=0.0))
        top, total, mixed = absorb(q, k, v, seen[None, :], top, total, mixed, scale, cap, CAPPED)
    # a row that sees nothing has total 0
    tl.store(out + offset, mixed / tl.where(total > 0, total, 1.0)[:, None], mask=alive)


def keys_of(size: int, dtype: torch.dtype) -> int:
    """Keys of a block, which must fit shared memory; the same on every GPU."""
    return 16 if size > 128 or dtype == torch.float32 else 32


def stages_of(size: int, dtype: torch.dtype) -> int:
    """Stages of the loop over keys; two would not fit shared memory if numbers are large."""
    return 1 if size > 128 and dtype == torch.float32 else 2


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    order: Tensor,
    counts: Tensor,
    scores: Scores,
) -> Tensor:
    """Attention [B, W, H, E] in float16, bfloat16 or float32.

    `order` and `counts` are those of `idlm.attention.invariant.seen_in_order`.
    """
    batch, width, heads, size = query.shape
    pages, table, lengths = prefix
    groups, fold = key.shape[2], heads // key.shape[2]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    _attend[batch * groups, width](
        query.contiguous(), key.contiguous(), value.contiguous(),
        pages, table, lengths, order, counts, query if scores.sinks is None else scores.sinks, out,
        *base_2(scores), pages.stride(0), table.shape[1], width, scores.window or 0,
        WINDOWED=scores.window is not None, CAPPED=scores.softcap is not None,
        SINKS=scores.sinks is not None, PAGE=pages.shape[2], G=groups, F=fold, E=size,
        HEADS=max(16, triton.next_power_of_2(fold)), KEYS=keys_of(size, query.dtype),
        SIZE=max(16, triton.next_power_of_2(size)), num_warps=4,
        num_stages=stages_of(size, query.dtype),
    )  # fmt: skip
    return out
