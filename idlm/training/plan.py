"""Which document is in which batch: a function of the seed and the number of the step alone.

    draws      numbered from 0: each is a document. Passes over a source, each in an order of its
               own; of several sources, each draw's is chosen by their weights.
    window     draws that are arranged together
    row        of a batch: one document, or several that are packed one after the other
    batch      rows for one forward
    step       the batches of all ranks for one optimizer step

So a run that goes on after a stop, or that is made longer, has the same steps; nothing but the
number of steps taken has to be kept. What does not fill a step waits for the next window, and no
batch is empty.
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

WINDOW = 16
"""Steps of a window: enough to save padding, few enough to stay shuffled."""
CHUNK = 1024
"""Draws that are made at a time."""


class Share(NamedTuple):
    """The documents first .. stop - 1 are a source; draws are shared by `weight`."""

    first: int
    stop: int
    weight: float = 1.0


class Drawn(NamedTuple):
    """The number of a draw, the index of its document, and the tokens of that."""

    draw: int
    document: int
    length: int


Row = list[Drawn]
T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """What a batch and a step hold.

    Attributes:
        rows: the most rows of a batch; None: no limit.
        tokens: the most tokens of a batch with its padding, rows times the longest; None: no limit.
            Rows and tokens are not both None.
        row_length: the most tokens of a packed row; None: one document a row.
        batches: of a step, on all ranks.
    """

    rows: int | None
    tokens: int | None = None
    row_length: int | None = None
    batches: int = 1

    def fits(self, rows: int, width: int) -> bool:
        """Whether a batch may have so many rows, the longest of `width` tokens. One may always."""
        few = self.rows is None or rows <= self.rows
        return rows == 1 or (few and (self.tokens is None or rows * width <= self.tokens))

    @property
    def texts(self) -> str:
        """What a step takes; steps that take the same have the same texts, however split."""
        if self.tokens is None and self.rows is not None:
            return f"{self.batches * self.rows} rows"
        rows = "" if self.rows is None else f" in at most {self.rows} rows"
        return f"{self.batches} batches of at most {self.tokens} tokens{rows}"

    @property
    def window(self) -> tuple[float, float]:
        """How many draws, or else how many tokens, always fill a window."""
        rows, tokens = self.rows or math.inf, self.tokens or math.inf
        if self.row_length is None:
            return WINDOW * self.batches * rows, WINDOW * self.batches * tokens
        return math.inf, WINDOW * self.batches * min(rows * self.row_length, tokens)


@dataclass(frozen=True)
class Step:
    """The batches of one optimizer step, those of all ranks in turn.

    Attributes:
        documents, tokens: how many it has.
        padded: tokens with the padding.
    """

    batches: list[list[Row]]

    @property
    def documents(self) -> int:
        return sum(len(row) for batch in self.batches for row in batch)

    @property
    def tokens(self) -> int:
        return sum(width(row) for batch in self.batches for row in batch)

    @property
    def padded(self) -> int:
        return sum(len(batch) * max(map(width, batch)) for batch in self.batches)


class Plan:
    """The steps of a run.

    They are made one after the other, so those of a resumed run are made again up to its place:
    about a second for 100,000 documents.
    """

    def __init__(
        self, lengths: Tensor, sources: Sequence[Share], bounds: Bounds, seed: int
    ) -> None:
        self.lengths = array("i", lengths.tolist())
        self.sources, self.bounds, self.seed = sources, bounds, seed
        self._restart()

    def _restart(self) -> None:
        self._steps, self._made = iter(self), 0
        self._last = Step([])

    def step(self, index: int) -> Step:
        """The step with this number, from 0."""
        if index < self._made - 1:
            self._restart()
        while self._made <= index:
            self._last = next(self._steps)
            self._made += 1
        return self._last

    def __iter__(self) -> Iterator[Step]:
        """All steps from the first on, without an end."""
        draws = (
            Drawn(draw, document, self.lengths[document])
            for draw, document in enumerate(documents(self.sources, self.seed))
        )
        left: Row = []
        window = 0
        while True:
            shuffle = random.Random(f"{self.seed}/window/{window}")
            steps, left = arranged(_filled(left, draws, self.bounds), self.bounds, shuffle)
            yield from map(Step, steps)
            window += 1


def documents(sources: Sequence[Share], seed: int) -> Iterator[int]:
    """The document of each draw: shuffled passes over each source. Without an end."""
    passes = [_passes(source, f"{seed}/source/{at}") for at, source in enumerate(sources)]
    weight = torch.tensor([source.weight for source in sources], dtype=torch.float64)
    border = weight.cumsum(0)[:-1] / weight.sum()
    for number in count():
        chance = torch.rand(
            CHUNK, generator=_generator(f"{seed}/choices/{number}"), dtype=torch.float64
        )
        for source in torch.bucketize(chance, border, right=True).tolist():
            yield next(passes[source])


def _passes(source: Share, name: str) -> Iterator[int]:
    for number in count():
        generator = _generator(f"{name}/pass/{number}")
        for part in torch.randperm(source.stop - source.first, generator=generator).split(CHUNK):
            yield from (part + source.first).tolist()


def _generator(name: str) -> torch.Generator:
    """A generator of its own for each name."""
    return torch.Generator().manual_seed(random.Random(name).getrandbits(63))


def _filled(left: Row, draws: Iterator[Drawn], bounds: Bounds) -> Row:
    """What is left of the window before, and new draws up to a full window."""
    drawn = list(left)
    most, tokens = bounds.window
    tokens -= width(drawn)
    while len(drawn) < most and tokens > 0:
        drawn.append(next(draws))
        tokens -= drawn[-1].length
    return drawn


def arranged(
    drawn: Row, bounds: Bounds, shuffle: random.Random
) -> tuple[list[list[list[Row]]], Row]:
    """The steps of a window, each as batches of rows; and the draws that are left over.

    Where any are left over they are random ones, so that none waits forever.
    """
    if bounds.row_length is None:
        rows = [[one] for one in sorted(drawn, key=lambda one: one.length)]
    else:
        rows = pack(drawn, bounds.row_length)
        shuffle.shuffle(rows)
    if bounds.tokens is None and bounds.rows is not None:
        # the rows of a step do not depend on how it is split into batches
        whole, rest = _cut(rows, bounds.batches * bounds.rows)
        shuffle.shuffle(whole)
        return [_cut(step, bounds.rows)[0] for step in whole], [one for row in rest for one in row]
    bounded = list(batches(rows, bounds))
    shuffle.shuffle(bounded)
    steps, others = _cut(bounded, bounds.batches)
    return steps, [one for batch in others for row in batch for one in row]


def pack(drawn: Row, row_length: int) -> list[Row]:
    """Rows of at most `row_length` tokens that hold whole documents: each document, the longest
    first, is put into the fullest row that has room for it (best fit)."""
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # that a row has, and its index; ascending
    for one in sorted(drawn, key=lambda one: (-one.length, one.draw)):
        at = bisect_left(room, (one.length, -1))
        free, row = room.pop(at) if at < len(room) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(one)
        insort(room, (free - one.length, row))
    return rows


def batches(rows: Sequence[Row], bounds: Bounds) -> Iterator[list[Row]]:
    """Neighbouring rows in batches as large as the bounds allow."""
    batch, widest = list[Row](), 0
    for row in rows:
        if batch and not bounds.fits(len(batch) + 1, max(widest, width(row))):
            yield batch
            batch, widest = [], 0
        batch.append(row)
        widest = max(widest, width(row))
    if batch:
        yield batch


def width(row: Row) -> int:
    """The tokens of a row."""
    return sum(one.length for one in row)


def _cut(items: list[T], size: int) -> tuple[list[list[T]], list[T]]:
    """Parts of `size`, and the rest."""
    whole = len(items) // size * size
    return [items[at : at + size] for at in range(0, whole, size)], items[whole:]
