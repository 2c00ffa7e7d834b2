"""`gumbel` and `uniform`: counter-based noise, a pure function of (seed, stream, position, token).

It is a SplitMix64 generator (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) whose seed comes from SplitMix64 generators: output number `stream` of the
one started with the request's seed, the request's *key*, starts a second one, whose output number
`position` starts the third, whose output number `token` is used. It depends on no device state,
batch or step, so AR and ISD meet the same noise at the same position whatever happened in between.

Shapes: B slots, R positions of each, V tokens.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """What a number is for: the coupled rule uses TOKEN alone, the ratio rule all three."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2


def _signed(word: int) -> int:
    """A 64-bit word as torch's int64 holds it."""
    return word - 2**64 if word >= 2**63 else word


GOLDEN = _signed(0x9E3779B97F4A7C15)
MULTIPLY_1, MULTIPLY_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
MANTISSA = 52
"""Bits of a uniform number: with a half added, the largest below 1 is still exact in float64."""


def split_mix(start: Tensor, number: Tensor) -> Tensor:
    """Output `number`, from 0, of the generator started with `start`; int64, modulo 2**64."""
    return _mix(start + (number + 1) * GOLDEN)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers in (0, 1), float64 [B, R]; `keys` int64 [B], `positions` int64 [B, R]."""
    starts = split_mix(keys[:, None], positions)
    return _unit(split_mix(starts, torch.zeros_like(starts)))


def gumbel(keys: Tensor, positions: Tensor, steps: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(u)), float64 [B, R, V]: argmax(log p + noise) samples p.

    `steps` int64 [V] is (token + 1) * GOLDEN, what a token adds to its generator's state.
    """
    words = _mix(split_mix(keys[:, None], positions)[..., None] + steps)
    return _unit(words).log_().neg_().log_().neg_()


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's output from its state; in place, since a vocabulary of words is large."""
    for bits, factor in ((30, MULTIPLY_1), (27, MULTIPLY_2)):
        words.bitwise_xor_(_shift(words, bits)).mul_(factor)
    return words.bitwise_xor_(_shift(words, 31))


def _shift(words: Tensor, bits: int) -> Tensor:
    """Logical right shift; int64's own keeps the sign."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _unit(words: Tensor) -> Tensor:
    """Words to float64 in (0, 1), both ends excluded."""
    return _shift(words, 64 - MANTISSA).to(torch.float64).add_(0.5).mul_(2.0**-MANTISSA)
