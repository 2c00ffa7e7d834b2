"""`idlm.decoding.law.filtered` as a Triton kernel, without a sort.

A program has a row. It looks for the last score that is kept by halving the range of scores: each
pass over the row gives the weight of all scores from the middle on. The weight of a token is 1 for
top-k, and its probability for top-p. Both ends of the range are moved to scores that occur, so the
search ends when one score is left. Of the tokens that have it, the first are kept.

Sums are float64 in a fixed order, so a row's tokens depend on nothing but the row. They are those
of `law.filtered` unless a mass is as near to `top_p` as `idlm.kernels.keep.DOUBT`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idlm.decoding.settings import Features, Settings

BLOCK = 2048


@triton.jit
def _scaled(row, block, vocab, heat, BLOCK: tl.constexpr):
    """The scores of a block, divided by the temperature; -inf past the vocabulary."""
    token = block + tl.arange(0, BLOCK)
    score = tl.load(row + token, mask=token < vocab, other=float("-inf"))
    return score.to(tl.float64) / heat


@triton.jit
def _weights(value, top, COUNTED: tl.constexpr):
    """1 for each token that is not banned; else its probability, not normalised."""
    if COUNTED:
        weight = tl.where(value > float("-inf"), 1.0, 0.0).to(tl.float64)
    else:
        weight = tl.exp(value - top)
    return weight


@triton.jit
def _sum(
    row, vocab, heat, top, least, STRICT: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The weight of the scores from `least` on, or of those above it, and the lowest of them."""
    total = tl.zeros([BLOCK], tl.float64)
    lowest = tl.full([BLOCK], float("inf"), tl.float64)
    for block in range(0, vocab, BLOCK):
        value = _scaled(row, block, vocab, heat, BLOCK)
        inside = value > least
        if not STRICT:
            inside = (value >= least) & (value > float("-inf"))
        total += tl.where(inside, _weights(value, top, COUNTED), 0.0)
        lowest = tl.where(inside, tl.minimum(lowest, value), lowest)
    return tl.sum(total, 0), tl.min(lowest, 0)


@triton.jit
def _last(
    row, vocab, heat, top, low, goal, COUNTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest score such that the scores from it on weigh `goal` or more. Those from `low` on
    do."""
    high = top
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        weight = tl.zeros([BLOCK], tl.float64)
        above = tl.full([BLOCK], float("inf"), tl.float64)
        below = tl.full([BLOCK], float("-inf"), tl.float64)
        for block in range(0, vocab, BLOCK):
            value = _scaled(row, block, vocab, heat, BLOCK)
            upper = value >= middle
            weight += tl.where(upper, _weights(value, top, COUNTED), 0.0)
            above = tl.where(upper, tl.minimum(above, value), above)
            below = tl.where(upper, below, tl.maximum(below, value))
        enough = tl.sum(weight, 0) >= goal
        low = tl.where(enough, tl.min(above, 0), low)
        high = tl.where(enough, high, tl.maximum(tl.max(below, 0), low))
    return low


@triton.jit
def _write(
    row, kept, vocab, heat, top, last, equals, floor, BLOCK: tl.constexpr
):  # fmt: skip
    """Copy the scores above `last`, and the first `equals` of those equal to it, where the weight
    is `floor` or more; the others become -inf."""
    before = tl.zeros([1], tl.int64)
    for block in range(0, vocab, BLOCK):
        token = block + tl.arange(0, BLOCK)
        value = _scaled(row, block, vocab, heat, BLOCK)
        equal = (value == last).to(tl.int64)
        place = before + tl.cumsum(equal, 0) - equal
        keep = (value > last) | ((equal > 0) & (place < equals))
        keep = keep & (tl.exp(value - top) >= floor)
        before += tl.sum(equal, 0)
        score = tl.load(row + token, mask=token < vocab, other=float("-inf"))
        tl.store(kept + token, tl.where(keep, score, float("-inf")), mask=token < vocab)


@triton.jit
def _copy(row, kept, vocab, BLOCK: tl.constexpr):
    for block in range(0, vocab, BLOCK):
        token = block + tl.arange(0, BLOCK)
        tl.store(kept + token, tl.load(row + token, mask=token < vocab), mask=token < vocab)


# compiled once for all batches: not anew where a number is 1 or a multiple of 16
@triton.jit(do_not_specialize=["rows"])
def _keep(
    scores, kept, temperatures, top_ks, top_ps, min_ps, rows, vocab, BLOCK: tl.constexpr
):  # fmt: skip
    """Filter a row."""
    number = tl.program_id(0).to(tl.int64)
    slot = number // rows
    row, kept = scores + number * vocab, kept + number * vocab
    heat, k = tl.load(temperatures + slot), tl.load(top_ks + slot)
    heat = tl.where(heat > 0, heat, 1.0)
    p, least = tl.load(top_ps + slot), tl.load(min_ps + slot)
    asked = (k < vocab) | (p < 1) | (least > 0)
    top = tl.full([BLOCK], float("-inf"), tl.float64)
    if asked:
        for block in range(0, vocab, BLOCK):
            top = tl.maximum(top, _scaled(row, block, vocab, heat, BLOCK))
    top = tl.max(top, 0)
    if (top > float("-inf")) & (top < float("inf")):
        last = top * 0 + float("-inf")
        if k < vocab:
            count, lowest = _sum(row, vocab, heat, top, last, False, True, BLOCK)
            if k < count:
                last = _last(row, vocab, heat, top, lowest, k.to(tl.float64), True, BLOCK)
        total, low = _sum(row, vocab, heat, top, last, False, False, BLOCK)
        equals = k * 0 + vocab
        if p < 1:
            # a token with less than (1 - p) / V of the mass is not kept: see `keep`
            light = top + tl.log((1 - p) * total / vocab) - 1
            last = _last(row, vocab, heat, top, tl.maximum(low, light), p * total, False, BLOCK)
            above, _ = _sum(row, vocab, heat, top, last, True, False, BLOCK)
            weight = tl.exp(last - top)
            equals = tl.maximum(tl.ceil((p * total - above) / weight), 1.0).to(tl.int64)
        _write(row, kept, vocab, heat, top, last, equals, least, BLOCK)
    else:
        _copy(row, kept, vocab, BLOCK)


def keep_rows(scores: Tensor, settings: Settings, features: Features) -> Tensor:
    """Filter scores [B, R, V], as `law.filtered`."""
    batch, rows, vocab = scores.shape
    scores = scores.contiguous()
    kept = torch.empty_like(scores)
    # in `Settings` they are columns of a table
    columns = (settings.temperature, settings.top_k, settings.top_p, settings.min_p)
    if batch * rows:
        _keep[(batch * rows,)](
            scores, kept, *(column.contiguous() for column in columns), rows, vocab,
            BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return kept
