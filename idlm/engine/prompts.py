"""`Prompts`: the pieces of prompts that a step prefills, as the device takes them.

Shapes: P pieces, T tokens in all, M columns of the page table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """A piece of a prefill: `tokens` of `slot` from position `start` on."""

    slot: int
    tokens: Sequence[int]
    start: int


class Pieces(NamedTuple):
    """Chunks on the device.

    Attributes:
        tokens, positions, owner: int64 [T]: the tokens, where they stand, and in which chunk.
        slots, starts, ends: int64 [P], by chunk: its slot, its first position, the row behind its last one.
        columns: int64 [M], the columns of the page table that they need.
    """

    tokens: Tensor
    positions: Tensor
    owner: Tensor
    slots: Tensor
    starts: Tensor
    ends: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Prompts:
    """What a step prefills: the pieces, and how long each is, for the host."""

    pieces: Pieces
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], page_size: int, on_device: Callable[[list[int]], Tensor]) -> Prompts:
        """`on_device` makes tensors of numbers."""
        lengths = tuple(len(chunk.tokens) for chunk in chunks)
        longest = max(chunk.start + length for chunk, length in zip(chunks, lengths, strict=True))
        numbers = (
            [token for chunk in chunks for token in chunk.tokens],
            [chunk.start + index for chunk in chunks for index in range(len(chunk.tokens))],
            [number for number, length in enumerate(lengths) for _ in range(length)],
            [chunk.slot for chunk in chunks],
            [chunk.start for chunk in chunks],
            list(accumulate(lengths)),
            list(range(-(-longest // page_size))),
        )
        return cls(Pieces(*map(on_device, numbers)), lengths)
