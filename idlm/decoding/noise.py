"""`gumbel` and `uniform`: counter-based noise, a pure function of (seed, stream, position, token).

It is a SplitMix64 generator (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)
whose seed comes from SplitMix64 generators: output number `stream` of the one started with the request's seed starts a
second one, whose output number `position` starts the third, whose output number `token` is used. It depends on no
device state, batch or step, so AR and ISD meet the same noise at the same position whatever happened in between.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """What a number is for. Coupled verification uses TOKEN alone; the others keep the ratio rule's draws apart."""

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


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical right shift; int64's own keeps the sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def split_mix(start: Tensor, number: Tensor) -> Tensor:
    """Output `number` (from 0) of the SplitMix64 generator started with `start`; int64, all arithmetic modulo 2**64."""
    word = start + (number + 1) * GOLDEN
    word = (word ^ _shift(word, 30)) * MULTIPLY_1
    word = (word ^ _shift(word, 27)) * MULTIPLY_2
    return word ^ _shift(word, 31)


def _generators(seed: int, stream: Stream, positions: Tensor) -> Tensor:
    """The start of each position's generator, [R]."""
    start = torch.tensor(seed, dtype=torch.int64, device=positions.device)
    return split_mix(split_mix(start, torch.full_like(start, int(stream))), positions.to(torch.int64))


def _unit(words: Tensor) -> Tensor:
    """Words to float64 in (0, 1), both ends excluded."""
    return (_shift(words, 64 - MANTISSA).to(torch.float64) + 0.5) * 2.0**-MANTISSA


def uniform(seed: int, positions: Tensor, stream: Stream = Stream.ACCEPT) -> Tensor:
    """One float64 in (0, 1) for each of `positions` [R]."""
    starts = _generators(seed, stream, positions)
    return _unit(split_mix(starts, torch.zeros_like(starts)))


def gumbel(seed: int, positions: Tensor, vocab_size: int, stream: Stream = Stream.TOKEN) -> Tensor:
    """Standard Gumbel noise -log(-log(u)), float64 [R, V]: argmax(log p + noise) is a sample of p."""
    tokens = torch.arange(vocab_size, dtype=torch.int64, device=positions.device)
    words = split_mix(_generators(seed, stream, positions)[:, None], tokens[None, :])
    return -torch.log(-torch.log(_unit(words)))
