"""Triton attention for prompt pieces of any number and length; shapes as in `idlm.attention.base`.

The keys and values of the pieces are already in the pages, so a program reads pages only. It has a
tile of the width * F query rows of one piece and one key/value head, and reads the keys up to its
last row.

    piece p: rows ends[p - 1] .. ends[p] - 1, at positions starts[p], starts[p] + 1, ...
    tiles:   the first tile of piece p is number ends[p - 1] * F // ROWS + p

By this formula each piece has enough tiles, and at most one of them is empty. The kernel finds the
piece of a tile by itself, so a launch depends only on the numbers of rows and pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from idlm.decoding.scores import Scores
from idlm.kernels.window_attention_triton import absorb, base_2, begun, tile_sizes


@triton.jit
def _first_tile(ends, piece, F: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number of a piece's first tile, and the piece's first row."""
    begin = tl.load(ends + piece - 1, mask=piece > 0, other=0)
    return begin * F // ROWS + piece, begin


# compile once for all batches: no special versions for values that are 1 or multiples of 16
@triton.jit(
    do_not_specialize=["pieces", "columns", "window"],
    do_not_specialize_on_alignment=["table", "starts", "ends"],
)
def _attend(  # type: ignore[no-untyped-def]
    query, pages, table, starts, ends, sinks, out, scale, cap, half, pieces, columns, window,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    PAGE: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows. `half` is the offset of the values in `pages`; `window` is the
    sliding window if the layer is WINDOWED."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    piece = tile * 0
    last = piece + pieces - 1
    while piece < last:  # find the last piece whose first tile is not after this tile
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
    top, total = begun(sinks, group * F + row % F, tile >= 0, ROWS, SINKS)
    mixed = tl.zeros([ROWS, SIZE], tl.float32)

    start = tl.load(starts + piece)
    end = start + tl.minimum(width, (first + ROWS - 1) // F + 1)
    end = tl.where(first < width * F, end, 0)
    oldest = start * 0
    if WINDOWED:
        oldest = tl.maximum(start + first // F + 1 - window, 0)
    for at in range(oldest, end, KEYS):
        other = at + tl.arange(0, KEYS)
        written = other < end
        page = tl.load(table + piece.to(tl.int64) * columns + other // PAGE, mask=written, other=0)
        source = ((page * PAGE + other % PAGE) * G + group)[:, None] * E + size
        loaded = written[:, None] & (size < E)
        k = tl.load(pages + source, mask=loaded, other=0.0)
        v = tl.load(pages + half + source, mask=loaded, other=0.0)
        seen = other[None, :] <= (start + token)[:, None]
        if WINDOWED:
            seen = seen & (other[None, :] > (start + token)[:, None] - window)
        top, total, mixed = absorb(q, k, v, seen, top, total, mixed, scale, cap, CAPPED)
    tl.store(out + place, mixed / tl.where(total > 0, total, 1.0)[:, None], mask=stored)


def attend(
    query: Tensor, pages: Tensor, table: Tensor, starts: Tensor, ends: Tensor, scores: Scores
) -> Tensor:
    """Attention [T, H, E] in float16, bfloat16 or float32; `starts` and `ends` are int64 [P]."""
    rows, heads, size = query.shape
    groups, pieces = pages.shape[3], ends.numel()
    fold = heads // groups
    tile, keys = tile_sizes(rows * fold, size, query.dtype)
    out = query.new_empty(query.shape)
    _attend[rows * fold // tile + pieces, groups](
        query.contiguous(), pages, table, starts, ends,
        query if scores.sinks is None else scores.sinks, out, *base_2(scores),
        pages.stride(0), pieces, table.shape[1], scores.window or 0,
        WINDOWED=scores.window is not None, CAPPED=scores.softcap is not None,
        SINKS=scores.sinks is not None,
        PAGE=pages.shape[2], G=groups, F=fold, E=size, ROWS=tile, KEYS=keys,
        SIZE=max(16, triton.next_power_of_2(size)), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
