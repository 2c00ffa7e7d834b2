"""The kernel of `idlm.attention.triton`; `idlm.attention.base` explains the shapes.

A program holds a tile of the W * F query rows of a slot's key/value head, so that a prefix key is
read once for all rows of the window. It loops over a share of the paged prefix with an online
softmax in float32. The last share includes the window rows. If slots and heads are too few to fill
the device, the prefix is split over several programs (split-K), and a second kernel joins their
results.

    token t of the prefix:  0 ........ share ........ 2 share ........ length | window rows 0 .. W-1
    program (split)         [    0    ][      1      ][          splits - 1                        ]
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from idlm.decoding.scores import Scores

MOST_TOKENS = 2**62
"""More than any page table holds."""


class Prefix(NamedTuple):
    """What is cached of each slot: a layer's `pages`, the `table` of the slots' pages, and the
    `lengths` of the prefixes in tokens."""

    pages: Tensor
    table: Tensor
    lengths: Tensor


class Windows(NamedTuple):
    """What the rows of windows see: `visible` int64 [B, W], the first prefix token `firsts` int64
    [B, W] that a sliding window leaves to each row, and the number of `masks` M among the W rows of
    a window; see `idlm.attention.base`."""

    visible: Tensor | None = None
    firsts: Tensor | None = None
    masks: int = 0


@triton.jit
def flat_row(slot, row, slots, real, width):  # type: ignore[no-untyped-def]
    """The flat row of row `row` of a slot's window, which has `real` real rows."""
    mask_row = slots * real + slot * (width - real) + row - real
    return tl.where(row < real, slot * real + row, mask_row)


@triton.jit
def begun(sinks, head, here, ROWS: tl.constexpr, SINKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """`top` and `total` of `absorb` before any key: those of the sinks, if the layer has SINKS and
    they are counted `here`."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634  # log2(e)
        top = tl.where(here, sink, top)
        total = tl.where(here, total + 1.0, total)
    return top, total


@triton.jit
def absorb(  # type: ignore[no-untyped-def]
    query, keys, values, seen, top, total, mixed, scale, cap, CAPPED: tl.constexpr
):
    """Add a block of keys to the online softmax.

    `top` [rows] is the largest score so far, `total` [rows] the sum of the weights relative to it,
    `mixed` [rows, SIZE] the weighted sum of values. Scores are base 2: `scale`, and `cap` if they
    are CAPPED, include log2(e).
    """
    scores = tl.dot(query, tl.trans(keys), input_precision="tf32x3") * scale
    if CAPPED:  # cap * tanh(scores / cap); 2.885390082 is 2 log2(e)
        shrunk = tl.exp2(tl.abs(scores) * (-2.885390082 / cap))
        capped = cap * (1.0 - shrunk) / (1.0 + shrunk)
        scores = tl.where(scores < 0, -capped, capped)
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen nothing yet: exp2(-inf - -inf) would be NaN
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None] + tl.dot(
        weights.to(values.dtype), values, input_precision="tf32x3"
    )
    return new_top, total, mixed


# Without these lists Triton compiles again for arguments that are 1 or multiples of 16.
@triton.jit(
    do_not_specialize=["columns", "real", "width", "splits", "window"],
    do_not_specialize_on_alignment=["table", "lengths", "visible", "firsts"],
)
def _attend(  # type: ignore[no-untyped-def]
    query, key, value, pages, table, lengths, visible, firsts, sinks, partial, weights, scale, cap,
    half, columns, real, width, splits, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    PAGE: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A tile of query rows over a share of the keys; `half` is the offset of the values in `pages`.
    Rows are flat; `real` of the `width` rows of a window are no MASK rows.

    `firsts` [B, W] is the first prefix token that the sliding window leaves to each row, if the
    layer is WINDOWED; then `visible` has the window in it. The result is stored normalised in
    `partial`, and log2 of the softmax's sum in `weights`.
    """
    slot = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    split = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    window_row = row // F
    alive = window_row < width
    size = tl.arange(0, SIZE)
    slots = tl.num_programs(0) // G
    query_row = (flat_row(slot, window_row, slots, real, width) * G + group) * F + row % F
    q = tl.load(query + query_row[:, None] * E + size, mask=alive[:, None] & (size < E), other=0.0)
    top, total = begun(sinks, group * F + row % F, split == splits - 1, ROWS, SINKS)
    mixed = tl.zeros([ROWS, SIZE], tl.float32)
    length = tl.load(lengths + slot)
    oldest = length * 0
    if WINDOWED:
        first = tl.load(firsts + slot * width + window_row, mask=alive, other=length)
        oldest = tl.minimum(tl.min(first, 0), length)
    share = tl.cdiv(tl.cdiv(length - oldest, splits), KEYS) * KEYS
    from_token = oldest + split * share
    for start in range(from_token, tl.minimum(length, from_token + share), KEYS):
        token = start + tl.arange(0, KEYS)
        cached = token < length
        page = tl.load(table + slot * columns + token // PAGE, mask=cached, other=0)
        source = ((page * PAGE + token % PAGE) * G + group)[:, None] * E + size
        loaded = cached[:, None] & (size < E)
        k = tl.load(pages + source, mask=loaded, other=0.0)
        v = tl.load(pages + half + source, mask=loaded, other=0.0)
        seen = cached[None, :]
        if WINDOWED:
            seen = seen & (token[None, :] >= first[:, None])
        top, total, mixed = absorb(q, k, v, seen, top, total, mixed, scale, cap, CAPPED)
    if split == splits - 1:  # the window rows
        end = width
        if CAUSAL:  # the tile's last row sees no row after itself
            end = tl.minimum(width, (tl.program_id(1) * ROWS + ROWS - 1) // F + 1)
        for begin in range(0, end, KEYS):
            key_row = begin + tl.arange(0, KEYS)
            source = (flat_row(slot, key_row, slots, real, width) * G + group)[:, None] * E + size
            loaded = (key_row < width)[:, None] & (size < E)
            k = tl.load(key + source, mask=loaded, other=0.0)
            v = tl.load(value + source, mask=loaded, other=0.0)
            if CAUSAL:
                seen = key_row[None, :] <= window_row[:, None]
                if WINDOWED:
                    seen = seen & (key_row[None, :] > window_row[:, None] - window)
            else:
                words = tl.load(visible + slot * width + window_row, mask=alive, other=0)
                seen = ((words[:, None] >> key_row[None, :]) & 1) != 0
            seen = seen & (key_row < width)[None, :]
            top, total, mixed = absorb(q, k, v, seen, top, total, mixed, scale, cap, CAPPED)
    # `partial` is [splits, T, H, E], `weights` [splits, T, H]
    query_row += split * slots.to(tl.int64) * width * G * F
    # a row that sees nothing: the result is 0 and its weight too, since `top` is -inf
    total = tl.where(total > 0, total, 1.0)
    tl.store(
        partial + query_row[:, None] * E + size,
        mixed / total[:, None],
        mask=alive[:, None] & (size < E),
    )
    tl.store(weights + query_row, top + tl.log2(total), mask=alive)


@triton.jit(do_not_specialize=["rows", "splits"])
def _join(  # type: ignore[no-untyped-def]
    partial, weights, out, rows, splits, E: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr
):
    """Join the splits' results of a row: their mean, weighted by 2 ** `weights`.

    A loop reads SPLITS of them at once.
    """
    row = tl.program_id(0).to(tl.int64)
    size = tl.arange(0, SIZE)
    top = tl.full([SPLITS], float("-inf"), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        weight = tl.load(weights + split * rows + row, mask=split < splits, other=float("-inf"))
        top = tl.maximum(top, weight)
    largest = tl.max(top, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([SPLITS], tl.float32)
    mixed = tl.zeros([SPLITS, SIZE], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        alive = split < splits
        weight = tl.load(weights + split * rows + row, mask=alive, other=float("-inf"))
        weight = tl.exp2(weight - largest)
        source = (split * rows + row)[:, None] * E + size
        loaded = tl.load(partial + source, mask=alive[:, None] & (size < E), other=0.0)
        total += weight
        mixed += weight[:, None] * loaded
    weight_sum = tl.sum(total, 0)
    mean = tl.sum(mixed, 0) / tl.where(weight_sum > 0, weight_sum, 1.0)
    tl.store(out + row * E + size, mean, mask=size < E)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    windows: Windows,
    scores: Scores,
    splits: int | None = None,
) -> Tensor:
    """Attention [T, H, E] of flat rows in float16, bfloat16 or float32.

    `windows.firsts` is needed if there is a sliding window. `splits` is the number of programs per
    prefix; by default as many as fill the device.
    """
    (total, heads, size), groups = query.shape, key.shape[1]
    pages, table, lengths = prefix
    visible, firsts, masks = windows
    batch, rows = len(lengths), total * heads
    width = total // batch
    tile, keys = tile_sizes(width * heads // groups, size, query.dtype)
    tiles = triton.cdiv(width * heads // groups, tile)
    if splits is None:
        most = min(table.shape[1] * pages.shape[2], scores.window or MOST_TOKENS)
        splits = split_number(batch * groups * tiles, most, keys, processors(query.device))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    partial = out if splits == 1 else query.new_empty(splits, rows, size, dtype=torch.float32)
    weights = query.new_empty(splits, rows, dtype=torch.float32)
    padded = max(16, triton.next_power_of_2(size))
    _attend[batch * groups, tiles, splits](
        query.contiguous(), key.contiguous(), value.contiguous(), pages, table, lengths,
        lengths if visible is None else visible, lengths if firsts is None else firsts,
        query if scores.sinks is None else scores.sinks, partial, weights, *base_2(scores),
        pages.stride(0), table.shape[1], width - masks, width, splits, scores.window or 0,
        CAUSAL=visible is None, WINDOWED=firsts is not None, CAPPED=scores.softcap is not None,
        SINKS=scores.sinks is not None, PAGE=pages.shape[2], G=groups, F=heads // groups, E=size,
        ROWS=tile, KEYS=keys, SIZE=padded, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _join[(rows,)](partial, weights, out, rows, splits, E=size, SPLITS=16, SIZE=padded)
    return out


def base_2(scores: Scores) -> tuple[float, float]:
    """Scale and soft cap of scores in base 2; without a soft cap the latter is 1 and not used."""
    return scores.scale * math.log2(math.e), (scores.softcap or math.log(2)) * math.log2(math.e)


def tile_sizes(rows: int, size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Query rows and keys of a tile.

    float32 gets half of both: it needs twice the shared memory, and tf32x3 is three products. The
    tiles of every size fit the 99 KiB of consumer GPUs (`benchmarks.kernel_budgets`).
    """
    divisor = 2 if dtype == torch.float32 else 1
    keys, most = (64, 64 // divisor) if size <= 128 else (32, 64 // divisor**2)
    return min(most, max(16, triton.next_power_of_2(rows))), keys // divisor


def split_number(programs: int, prefix: int, keys: int, processors: int) -> int:
    """Programs per prefix: enough for two on each multiprocessor, if each has two blocks of keys.

    It depends on shapes alone, not on the present lengths, so that a recorded graph stays valid.
    `prefix` is the number of tokens that a page table can hold.
    """
    return max(1, min(2 * processors // programs, prefix // (2 * keys)))


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for Triton's interpreter."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )
