"""`gumbel` and `uniform`: counter-based noise, a pure function of (seed, stream, position, token).

Three SplitMix64 generators (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) are chained. `split_mix(start, n)` is output n of the generator that
`start` seeds:

    key   = split_mix(seed, stream)       one key for each request and stream
    start = split_mix(key, position)
    word  = split_mix(start, token)       64 random bits

The noise depends on no device state, batch or step. So AR and ISD draw the same noise at the same
position, whatever was computed before.

Shapes: B slots, R positions of each, V tokens.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """What a random number is for: the coupled rule uses TOKEN alone, the ratio rule all three."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2


def _signed(word: int) -> int:
    """Reinterpret an unsigned 64-bit word as int64, the only 64-bit type that torch computes in."""
    return word - 2**64 if word >= 2**63 else word


GOLDEN = _signed(0x9E3779B97F4A7C15)
MULTIPLY_1, MULTIPLY_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
MANTISSA = 52
"""Bits of a uniform number. With 0.5 added, even the largest is exact in float64, so below 1."""


def split_mix(start: Tensor, index: Tensor) -> Tensor:
    """Output `index`, from 0, of the generator that `start` seeds; int64, modulo 2**64."""
    return _mix(start + (index + 1) * GOLDEN)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers in the open interval (0, 1), float64 [B, R]; `keys` int64 [B], `positions` int64
    [B, R]."""
    starts = split_mix(keys[:, None], positions)
    return _unit(split_mix(starts, torch.zeros_like(starts)))


def gumbel(keys: Tensor, positions: Tensor, steps: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(u)), float64 [B, R, V]: argmax(log p + noise) samples p.

    `steps` int64 [V] is (token + 1) * GOLDEN: what `split_mix` adds to `start` for each token. It
    is the same for all rows, so it is computed once.
    """
    starts = split_mix(keys[:, None], positions)  # [B, R]
    words = _mix(starts[..., None] + steps)
    return _unit(words).log_().neg_().log_().neg_()


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's output function, in place: the words of a whole vocabulary are large."""
    for bits, factor in ((30, MULTIPLY_1), (27, MULTIPLY_2)):
        words.bitwise_xor_(_shift(words, bits)).mul_(factor)
    return words.bitwise_xor_(_shift(words, 31))


def _shift(words: Tensor, bits: int) -> Tensor:
    """Logical right shift. That of int64 is arithmetic, so the copies of the sign are masked."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _unit(words: Tensor) -> Tensor:
    """Map words to float64 in the open interval (0, 1): (upper bits + 0.5) / 2**MANTISSA."""
    return _shift(words, 64 - MANTISSA).to(torch.float64).add_(0.5).mul_(2.0**-MANTISSA)
