"""`noise.gumbel` and `noise.uniform` for many seeds at once, with most of the arithmetic in place.

Shapes: B slots, R positions of each, V tokens. A slot's `key` is where its seed's stream starts: output number
`stream` of the SplitMix64 generator started with the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idlm.decoding.noise import MANTISSA, MULTIPLY_1, MULTIPLY_2, split_mix


def gumbel_rows(key: Tensor, positions: Tensor, steps: Tensor) -> Tensor:
    """Standard Gumbel noise float64 [B, R, V]; `key` int64 [B], `positions` int64 [B, R].

    `steps` int64 [V] is (token + 1) * GOLDEN, what a token adds to the generator's state.
    """
    words = split_mix(key[:, None], positions)[..., None] + steps
    for bits, factor in ((30, MULTIPLY_1), (27, MULTIPLY_2)):
        words.bitwise_xor_(_shift(words, bits)).mul_(factor)
    words.bitwise_xor_(_shift(words, 31))
    return _unit(words).log_().neg_().log_().neg_()


def uniform_rows(key: Tensor, positions: Tensor) -> Tensor:
    """Numbers in (0, 1), float64 [B, R]."""
    starts = split_mix(key[:, None], positions)
    return _unit(split_mix(starts, torch.zeros_like(starts)))


def _shift(words: Tensor, bits: int) -> Tensor:
    """Logical right shift."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _unit(words: Tensor) -> Tensor:
    return _shift(words, 64 - MANTISSA).to(torch.float64).add_(0.5).mul_(2.0**-MANTISSA)
