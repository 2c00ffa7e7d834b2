"""The Triton kernels of `idlm.kernels.layer_ops`, for float16, bfloat16 and float32.

They compute in float32 and round where PyTorch's operators would.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idlm.kernels.layer_ops import Heads, Turn, Update

INNER = 1024
"""Outputs of a program of `_swiglu`."""
ROWS, COLUMNS = 16, 64
"""The tile of `_update`."""


@triton.jit
def _rounded(x, like):  # type: ignore[no-untyped-def]
    """x rounded to the type of the numbers that `like` points to, in float32."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["size"])
def _norm(  # type: ignore[no-untyped-def]
    x, more, weight, total, out, size, epsilon, ADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """The RMS norm of a row; if ADDED, of its sum with that of `more`, which goes to `total`."""
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    values = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        values += tl.load(more + row + column, mask=inside, other=0.0).to(tl.float32)
        values = _rounded(values, total)
        tl.store(total + row + column, values, mask=inside)
    rate = tl.rsqrt(tl.sum(values * values, 0) / size + epsilon)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, factor * _rounded(values * rate, out), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _swiglu(x, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of a row of `out` [T, size]; a row of `x` has the gate, then the other factor."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(x + 2 * row * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + (2 * row + 1) * size + column, mask=inside, other=0.0).to(tl.float32)
    opened = _rounded(gate / (1.0 + tl.exp(-gate)), out)
    tl.store(out + row * size + column, opened * up, mask=inside)


@triton.jit(do_not_specialize=["written"])
def _rotate(  # type: ignore[no-untyped-def]
    rows, cosine, sine, query_norm, key_norm, cache_rows, pages, query, key, value,
    epsilon, half, written, NORMED: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    E: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One head of a row. `half` is the offset of the values in `pages`; rows below `written` are
    written to them."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    size = tl.arange(0, SIZE)
    inside = size < E
    first = size < E // 2
    partner = tl.where(first, size + E // 2, size - E // 2)
    source = rows + (row * (H + 2 * G) + head) * E
    x = tl.load(source + size, mask=inside, other=0.0).to(tl.float32)
    if head < H + G:
        y = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            rate = tl.rsqrt(tl.sum(x * x, 0) / E + epsilon)
            if head < H:
                factor = tl.load(query_norm + size, mask=inside, other=0.0).to(tl.float32)
                across = tl.load(query_norm + partner, mask=inside, other=0.0).to(tl.float32)
            else:
                factor = tl.load(key_norm + size, mask=inside, other=0.0).to(tl.float32)
                across = tl.load(key_norm + partner, mask=inside, other=0.0).to(tl.float32)
            x = _rounded(factor * _rounded(x * rate, rows), rows)
            y = _rounded(across * _rounded(y * rate, rows), rows)
        c = tl.load(cosine + row * E + size, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sine + row * E + size, mask=inside, other=0.0).to(tl.float32)
        x = _rounded(x * c, rows) + _rounded(tl.where(first, -y, y) * s, rows)
    if head < H:
        tl.store(query + (row * H + head) * E + size, x, mask=inside)
    else:
        is_value = (head - H) // G
        target = (row * G + (head - H) % G) * E + size
        if is_value == 0:
            tl.store(key + target, x, mask=inside)
        else:
            tl.store(value + target, x, mask=inside)
        if row < written:
            place = (tl.load(cache_rows + row) * G + (head - H) % G) * E + size
            tl.store(pages + is_value * half + place, x, mask=inside)


@triton.jit(do_not_specialize=["rows", "stride", "n0", "n1", "n2", "adapters"])
def _update(  # type: ignore[no-untyped-def]
    y, low, b, adapter, owners, scales, rows, stride, rank, n0, n1, n2, adapters,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of y [rows, .], whose rows are `stride` apart, within one of PARTS layers of n0, n1
    and n2 outputs."""
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(n0, COLUMNS)
    tiles1 = tl.cdiv(n1, COLUMNS)
    part = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
    begin = tl.where(part == 0, 0, tl.where(part == 1, n0, n0 + n1))
    width = tl.where(part == 0, n0, tl.where(part == 1, n1, n2))
    tile -= tl.where(part == 0, 0, tl.where(part == 1, tiles0, tiles0 + tiles1))
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    own = tl.load(adapter + row, mask=row < rows, other=0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rank, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = (depth < rank)[None, :]
        owner = tl.load(owners + part * rank + depth, mask=depth < rank, other=-1)
        is_own = inside & (row < rows)[:, None] & (owner[None, :] == own[:, None])
        x = tl.load(low + row[:, None] * (PARTS * rank) + part * rank + depth, is_own, other=0.0)
        w = tl.load(
            b + (begin + column).to(tl.int64)[:, None] * rank + depth,
            mask=inside & (column < width)[:, None],
            other=0.0,
        )
        total = tl.dot(x, tl.trans(w), total, input_precision="tf32x3")
    scale = tl.load(scales + part * adapters + own, mask=row < rows, other=0.0)
    place = y + row[:, None] * stride + begin + column
    inside = (row < rows)[:, None] & (column < width)
    before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, before + total * scale[:, None], mask=inside)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    out = torch.empty_like(x)
    _norm[(len(x),)](
        x, x, weight, out, out, x.shape[1], epsilon, ADDED=False, **row_block(x.shape[1])
    )
    return out


def add_norm(x: Tensor, more: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    total, out = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[1]
    _norm[(len(x),)](x, more, weight, total, out, size, epsilon, ADDED=True, **row_block(size))
    return total, out


def row_block(size: int) -> dict[str, int]:
    """A block for a whole row, and its warps."""
    block = int(triton.next_power_of_2(size))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def swiglu(x: Tensor) -> Tensor:
    rows, size = len(x), x.shape[1] // 2
    out = x.new_empty(rows, size)
    _swiglu[(rows, triton.cdiv(size, INNER))](x, out, size, BLOCK=INNER, num_warps=4)
    return out


def rotate(
    rows: Tensor, turn: Turn, heads: Heads, pages: Tensor, cache_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of, groups, query_norm, key_norm, epsilon = heads
    count, size = len(rows), pages.shape[-1]
    query, key = rows.new_empty(count, of, size), rows.new_empty(count, groups, size)
    value = torch.empty_like(key)
    _rotate[(count, of + 2 * groups)](
        rows, turn.cosine, turn.sine, rows if query_norm is None else query_norm,
        rows if key_norm is None else key_norm, cache_rows, pages, query, key, value, epsilon,
        pages.stride(0), len(cache_rows), NORMED=query_norm is not None, H=of, G=groups, E=size,
        SIZE=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    return query, key, value


def update(y: Tensor, low: Tensor, of: Update, adapter: Tensor) -> None:
    widths = (*of.widths, 0, 0)[:3]
    tiles = sum(triton.cdiv(width, COLUMNS) for width in widths)
    _update[tiles, triton.cdiv(len(y), ROWS)](
        y, low, of.b, adapter, of.owners, of.scales, len(y), y.stride(0), of.b.shape[1], *widths,
        of.scales.shape[1], PARTS=len(of.widths), ROWS=ROWS, COLUMNS=COLUMNS,
        DEPTH=depth_of(y.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip


def depth_of(dtype: torch.dtype) -> int:
    """The ranks that `_update` multiplies at once."""
    return 32 if dtype == torch.float32 else 64
