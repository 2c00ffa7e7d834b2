"""Attention of prompt pieces, any number and lengths of them at once; shapes are explained in
`idlm.attention.base`.

The pieces' own keys and values are in the pages already, so one program walks over the pages alone:
it holds a tile of the width * F query rows of one piece and one key/value head, and reads the keys
up to its last row.

    piece p: rows ends[p - 1] .. ends[p] - 1, at positions starts[p], starts[p] + 1, ...
    tiles:   those of piece p begin at number ends[p - 1] * F // ROWS + p

By that formula a piece has tiles enough, at most one of them empty, and the kernel finds the piece
of a tile by itself: launches depend on the numbers of rows and pieces alone.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from idlm.kernels.window_attention_triton import absorb, tile_sizes


@triton.jit
def _first_tile(ends, piece, F: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number of a piece's first tile, and the piece's first row."""
    begin = tl.load(ends + piece - 1, mask=piece > 0, other=0)
    return begin * F // ROWS + piece, begin


# compiled once for all batches: not anew where a number is 1 or a multiple of 16
@triton.jit(
    do_not_specialize=["pieces", "columns"],
    do_not_specialize_on_alignment=["table", "starts", "ends"],
)
def _attend(  # type: ignore[no-untyped-def]
    query, pages, table, starts, ends, out, scale, half, pieces, columns,
    PAGE: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One tile of rows over all keys that it sees; `half` is where the values begin in `pages`."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    piece = tile * 0
    last = piece + pieces - 1
    while piece < last:  # the last piece whose first tile is not behind this one
        middle = (piece + last + 1) // 2
        number, _ = _first_tile(ends, middle, F, ROWS)
        piece = tl.where(number <= tile, middle, piece)
        last = tl.where(number <= tile, last, middle - 1)
    number, begin = _first_tile(ends, piece, F, ROWS)
    first = (tile - number) * ROWS
    width = tl.load(ends + piece) - begin
    row = first + tl.arange(0, ROWS)
    token = row // F
    alive = token < width
    size = tl.arange(0, SIZE)
    place = (((begin + token) * G + group) * F + row % F)[:, None] * E + size
    stored = alive[:, None] & (size < E)
    q = tl.load(query + place, mask=stored, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, SIZE], tl.float32)

    start = tl.load(starts + piece)
    end = start + tl.minimum(width, (first + ROWS - 1) // F + 1)
    end = tl.where(first < width * F, end, 0)
    for at in range(0, end, KEYS):
        other = at + tl.arange(0, KEYS)
        written = other < end
        page = tl.load(table + piece.to(tl.int64) * columns + other // PAGE, mask=written, other=0)
        source = ((page * PAGE + other % PAGE) * G + group)[:, None] * E + size
        loaded = written[:, None] & (size < E)
        k = tl.load(pages + source, mask=loaded, other=0.0)
        v = tl.load(pages + half + source, mask=loaded, other=0.0)
        seen = other[None, :] <= (start + token)[:, None]
        top, total, mixed = absorb(q, k, v, seen, top, total, mixed, scale)
    tl.store(out + place, mixed / tl.where(total > 0, total, 1.0)[:, None], mask=stored)


def attend(
    query: Tensor, pages: Tensor, table: Tensor, starts: Tensor, ends: Tensor, scale: float
) -> Tensor:
    """Attention [T, H, E] in float16, bfloat16 or float32; `starts` and `ends` int64 [P]."""
    rows, heads, size = query.shape
    groups, pieces = pages.shape[3], ends.numel()
    fold = heads // groups
    tile, keys = tile_sizes(rows * fold, size, query.dtype)
    out = query.new_empty(query.shape)
    _attend[rows * fold // tile + pieces, groups](
        query.contiguous(), pages, table, starts, ends, out, scale * math.log2(math.e),
        pages.stride(0), pieces, table.shape[1],
        PAGE=pages.shape[2], G=groups, F=fold, E=size, ROWS=tile, KEYS=keys,
        SIZE=max(16, triton.next_power_of_2(size)), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
