"""`idlm.decoding.law.choose` as a Triton kernel.

A program has a share of a row's vocabulary and keeps the best token. It computes the noise of each
token in float32, with an error below `BOUND`, and in float64 only for blocks of tokens of which one
may be as good as the best so far: a few of each share. So the choice is that of float64, which few
GPUs compute fast. If the rows are too few to fill the device, a row is split over several programs,
and their best tokens are compared afterwards.

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
NEAR_1 = tl.constexpr(2.0**-6)
BOUND = tl.constexpr(2.0**-12)
"""The error of `_rough` is below this. With u = 1 - v, E = -log u and the noise -log E: u and v
have relative errors below 2^-23. For v < 2^-6 the series of E leaves out less than v^3 / 3 < 2^-19
of it. Else E > 2^-6, and errors of log u below 2^-21 (even of an approximate `log`) are 2^-15 of E.
So -log E has an error below 2^-15, and one of its own `log` below 2^-16, as it is at most 37."""
SLACK = tl.constexpr(2.0**-20)
"""Relative error of a float32 score and of its sum with noise of 40 temperatures at most; several
times the true one. TINY is more than what float32 flushes to 0."""
TINY = tl.constexpr(1e-36)


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


@triton.jit
def _bits(start, token):  # type: ignore[no-untyped-def]
    """The random number of tokens, an integer of MANTISSA bits."""
    return _shift(_mix(start + (token + 1) * GOLDEN), DROPPED)


@triton.jit
def _noise(bits):  # type: ignore[no-untyped-def]
    """The noise, as `idlm.decoding.noise.gumbel`."""
    return -tl.log(-tl.log((bits.to(tl.float64) + 0.5) * UNIT))


@triton.jit
def _rough(bits):  # type: ignore[no-untyped-def]
    """The noise in float32, with an error below BOUND."""
    unit = (bits.to(tl.float32) + 0.5) * UNIT
    rest = bits ^ (LARGEST >> (DROPPED - 1))
    rest = (rest.to(tl.float32) + 0.5) * UNIT  # 1 - unit, which float32 cannot subtract
    series = rest * (1 + rest * (0.5 + rest * (1 / 3)))
    return -tl.log(tl.where(rest < NEAR_1, series, -tl.log(unit)))


@triton.jit
def _reach(score, temperature, start, token, SAMPLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """An upper bound of what tokens reach with their noise, float32."""
    score, heat = score.to(tl.float32), temperature.to(tl.float32)
    size = tl.minimum(tl.abs(score), 1e38)  # finite, so that -inf stays
    reach = score + SLACK * size + (SLACK * 40) * heat + TINY
    if SAMPLED:  # noqa: SIM102 - known when compiled; the temperature is not
        if heat > 0:
            reach += heat * (_rough(_bits(start, token)) + BOUND)
    return reach


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
    top = tl.max(best, 0)
    chosen = tl.full([BLOCK], 0, tl.int64) + vocab  # vocab: no token yet
    begin = tl.program_id(1) * share
    for block in range(begin, tl.minimum(vocab, begin + share), BLOCK):
        token = block + tl.arange(0, BLOCK).to(tl.int64)
        score = tl.load(scores + row * vocab + token, mask=token < vocab, other=float("-inf"))
        reach = tl.max(_reach(score, temperature, start, token, SAMPLED), 0)
        if reach.to(tl.float64) >= top:
            value = score.to(tl.float64)
            if SAMPLED:  # noqa: SIM102
                if temperature > 0:
                    value += temperature * _noise(_bits(start, token))
            better = value > best
            best = tl.where(better, value, best)
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
