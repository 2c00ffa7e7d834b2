"""`idlm.decoding.law.choose` as a Triton kernel.

A program computes the noise of each token in a share of a row's vocabulary and keeps the best
token. If the rows are too few to fill the device, a row is split over several programs, and their
best tokens are compared afterwards.

    token of a row:   0 ........ share ........ 2 share ........ V
    program (split)   [    0    ][      1      ][  splits - 1  ]
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from idlm.decoding import noise
from idlm.decoding.noise import Stream
from idlm.decoding.settings import Settings
from idlm.kernels.window_attention_triton import processors

BLOCK = 1024
GOLDEN = tl.constexpr(noise.GOLDEN)
MULTIPLY_1, MULTIPLY_2 = tl.constexpr(noise.MULTIPLY_1), tl.constexpr(noise.MULTIPLY_2)
DROPPED, UNIT = tl.constexpr(64 - noise.MANTISSA), tl.constexpr(2.0**-noise.MANTISSA)
LARGEST = tl.constexpr(2**63 - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _shift(word, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logical right shift of an int64, whose own shift copies the sign."""
    return (word >> bits) & (LARGEST >> (bits - 1))


@triton.jit
def _mix(word):  # type: ignore[no-untyped-def]
    """The output of a SplitMix64 generator in state `word`."""
    word = (word ^ _shift(word, 30)) * MULTIPLY_1
    word = (word ^ _shift(word, 27)) * MULTIPLY_2
    return word ^ _shift(word, 31)


# compiled once for all batches: not anew where a number is 1 or a multiple of 16
@triton.jit(do_not_specialize=["rows", "stream"])  # type: ignore[untyped-decorator]
def _choose(  # type: ignore[no-untyped-def]
    scores, temperatures, keys, positions, bests, ids, rows, vocab, share, key_stride, stream,
    SAMPLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best token and its score, of a share of a row's vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    slot = row // rows
    temperature = tl.load(temperatures + slot)
    position = tl.load(positions + slot) + row % rows
    # a block, not a scalar: scalars of Triton's interpreter warn if a product wraps around
    key = tl.load(keys + slot * key_stride + stream + tl.zeros([1], tl.int64))
    start = _mix(key + (position + 1) * GOLDEN)
    best = tl.full([BLOCK], float("-inf"), tl.float64)
    chosen = tl.full([BLOCK], 0, tl.int64) + vocab  # vocab: no token yet
    begin = tl.program_id(1) * share
    for block in range(begin, tl.minimum(vocab, begin + share), BLOCK):
        token = block + tl.arange(0, BLOCK).to(tl.int64)
        address = scores + row * vocab + token
        score = tl.load(address, mask=token < vocab, other=float("-inf")).to(tl.float64)
        if SAMPLED:
            word = _mix(start + (token + 1) * GOLDEN)
            unit = (_shift(word, DROPPED).to(tl.float64) + 0.5) * UNIT
            score += temperature * -tl.log(-tl.log(unit))
        better = score > best
        best = tl.where(better, score, best)
        chosen = tl.where(better, token, chosen)
    top = tl.max(best, 0)
    offset = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(bests + offset, top)
    tl.store(ids + offset, tl.min(tl.where(best == top, chosen, vocab), 0))  # ties: the smallest id


def choose_rows(
    scores: Tensor,
    settings: Settings,
    sampled: bool,
    stream: Stream,
    position: Tensor,
    splits: int | None = None,
) -> Tensor:
    """Choose a token for each row, as `law.choose`: int64 [B, R].

    `splits` is the number of programs per row; by default as many as fill the device.
    """
    batch, rows, vocab = scores.shape
    if splits is None:
        programs = 4 * processors(scores.device) // max(1, batch * rows)
        splits = max(1, min(programs, triton.cdiv(vocab, 4 * BLOCK)))
    share = triton.cdiv(triton.cdiv(vocab, splits), BLOCK) * BLOCK
    splits = triton.cdiv(vocab, share)
    bests = scores.new_empty(batch, rows, splits, dtype=torch.float64)
    ids = position.new_empty(batch, rows, splits)
    # in `Settings` they are columns of a table
    temperature, keys = settings.temperature.contiguous(), settings.keys.contiguous()
    if batch * rows:
        _choose[batch * rows, splits](
            scores.contiguous(), temperature, keys, position, bests, ids,
            rows, vocab, share, keys.shape[1], int(stream),
            SAMPLED=sampled, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    if splits > 1:
        ids = ids.gather(2, bests.argmax(dim=2, keepdim=True))
    return ids[..., 0].clamp(max=vocab - 1)
