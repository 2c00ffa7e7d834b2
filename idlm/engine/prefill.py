"""The prompt rows of a step: a `Chunk` for the scheduler, a `PrefillBatch` for the device.

Shapes: P pieces, T tokens in all, C columns of the page table.
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


class PrefillBatch(NamedTuple):
    """The chunks of a step.

    Attributes:
        widths: how many tokens each chunk has, known to the host.
        tokens, positions, owner: int64 [T]: the tokens, where they stand, and in which chunk.
        slots, starts, ends: int64 [P], by chunk: its slot, its first position, the row behind its
            last one.
        columns: int64 [C], the columns of the page table that they need.
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
        """`on_device` makes tensors of numbers."""
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
        """What lies on the device."""
        return self[1:]
