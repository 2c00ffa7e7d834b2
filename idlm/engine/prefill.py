"""The prompt tokens of a step: `Chunk`s on the host, a `PrefillBatch` on the device.

Shapes: P chunks, T tokens of all chunks, C columns of the page table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt that one step prefills: `tokens` of `slot`, from position `start`."""

    slot: int
    tokens: Sequence[int]
    start: int


class PrefillBatch(NamedTuple):
    """The chunks of a step.

    Attributes:
        widths: the number of tokens of each chunk, known on the host.
        tokens, positions, owner: int64 [T], by token: its id, its position, the number of its
            chunk.
        slots, starts, ends: int64 [P], by chunk: its slot, its first position, the row after its
            last row.
        columns: int64 [C], the columns of the page table that the chunks need.
    """

    widths: tuple[int, ...]
    tokens: Tensor
    positions: Tensor
    owner: Tensor
    slots: Tensor
    starts: Tensor
    ends: Tensor
    columns: Tensor

    @classmethod
    def of(
        cls, chunks: Sequence[Chunk], page_size: int, on_device: Callable[[list[int]], Tensor]
    ) -> PrefillBatch:
        """The batch of `chunks`; `on_device` copies a list of numbers to the device."""
        widths = tuple(len(chunk.tokens) for chunk in chunks)
        longest = max(chunk.start + width for chunk, width in zip(chunks, widths, strict=True))
        numbers = (
            [token for chunk in chunks for token in chunk.tokens],
            [chunk.start + index for chunk in chunks for index in range(len(chunk.tokens))],
            [number for number, width in enumerate(widths) for _ in range(width)],
            [chunk.slot for chunk in chunks],
            [chunk.start for chunk in chunks],
            list(accumulate(widths)),
            list(range(-(-longest // page_size))),
        )
        return cls(widths, *map(on_device, numbers))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All fields but `widths`: the tensors on the device."""
        return self[1:]
