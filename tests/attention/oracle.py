"""Random windows, back-ends run on them, and attention as a plain double loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from idlm.attention.base import QKV, Backend, Segment
from idlm.decoding.scores import Scores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


RATIOS = [(1, 1), (2, 1), (6, 2), (4, 1), (8, 1), (3, 3)]
"""Query heads and key/value heads."""
CONSTANTS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 3, "sinks": True},
    {"window": 20, "softcap": 0.8},
    {"softcap": 2.0, "sinks": True},
]
"""Arguments of `Case.scored`."""
SHAPES = [
    # lengths, width, heads, groups, size, page
    ([0], 1, 1, 1, 32, 4),
    ([0, 1, 3], 4, 2, 1, 32, 4),
    ([4, 5, 8, 17], 7, 6, 2, 64, 4),
    ([63, 64, 65], 3, 4, 1, 40, 16),
    ([130, 0], 16, 8, 1, 80, 16),
    ([31, 70], 64, 3, 1, 96, 32),
    ([9], 33, 8, 1, 128, 8),
    ([200], 5, 4, 1, 192, 64),
    ([40, 7], 16, 8, 4, 256, 16),
]


@dataclass
class Case:
    """The arguments of one call of window attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    pages: Tensor
    table: Tensor
    lengths: Tensor
    visible: Tensor | None
    scores: Scores

    def to(self, dtype: torch.dtype) -> Case:
        rows = (self.query, self.key, self.value, self.pages)
        others = self.table, self.lengths, self.visible, self.scores
        return Case(*(rows_.to(dtype) for rows_ in rows), *others)  # type: ignore[call-arg]

    def scored(
        self, window: int | None = None, softcap: float | None = None, sinks: bool = False
    ) -> Case:
        """The same rows with another sliding window and soft cap, and with sinks."""
        heads = self.query.shape[-2]
        sink = torch.linspace(-2, 3, heads, dtype=torch.float64, device=DEVICE) if sinks else None
        return replace(self, scores=Scores(self.scores.scale, window, softcap, sink))

    def without_hidden_pages(self) -> Case:
        """The same with table entries of the trash page where no row's sliding window reaches, as
        in an engine that frees such pages."""
        table, page = self.table.clone(), self.pages.shape[2]
        for slot, length in enumerate(self.lengths.tolist()):
            if self.scores.window is not None:
                table[slot, : max(0, length + 1 - self.scores.window) // page] = 0
        return replace(self, table=table)


def case(
    lengths: list[int],
    width: int,
    heads: int,
    groups: int,
    size: int,
    page: int,
    causal: bool,
    seed: int = 0,
) -> Case:
    """Random values in float64; every page row that no token stands behind, the trash page's too,
    is NaN."""
    torch.manual_seed(seed)
    batch, columns = len(lengths), max(1, max(-(-length // page) for length in lengths)) + 1
    num_pages = 1 + batch * columns
    pages = torch.full((2, num_pages, page, groups, size), torch.nan, dtype=torch.float64)
    table = (torch.randperm(num_pages - 1) + 1).view(batch, columns)
    for slot, length in enumerate(lengths):
        for token in range(length):
            pages[:, table[slot, token // page], token % page] = torch.randn(
                2, groups, size, dtype=torch.float64
            )
        table[slot, -(-length // page) :] = torch.randint(
            num_pages, (columns - -(-length // page),)
        )
    return Case(
        query=torch.randn(batch, width, heads, size, dtype=torch.float64).to(DEVICE),
        key=torch.randn(batch, width, groups, size, dtype=torch.float64).to(DEVICE),
        value=torch.randn(batch, width, groups, size, dtype=torch.float64).to(DEVICE),
        pages=pages.to(DEVICE),
        table=table.to(DEVICE),
        lengths=torch.tensor(lengths).to(DEVICE),
        visible=None if causal else random_visible(batch, width).to(DEVICE),
        scores=Scores(size**-0.5),
    )


def random_visible(batch: int, width: int) -> Tensor:
    """Random visibility int64 [batch, width]; a row sees itself and about half of the rows before
    it."""
    bits = (torch.rand(batch, width, width) < 0.5).tril() | torch.eye(width, dtype=torch.bool)
    return (bits.long() << torch.arange(width)).sum(-1)


def attend(backend: Backend[Any], case: Case) -> Tensor:
    """As an engine step calls a back-end: [B, W, H, E]. The real rows go to the trash page."""
    segment = Segment(case.table, case.lengths, trash(case), case.visible)
    qkv = QKV(*(rows.flatten(0, 1) for rows in (case.query, case.key, case.value)))
    prepared = backend.prepare(segment, case.scores.window)
    return backend.attend(prepared, case.pages, qkv, case.scores).view(case.query.shape)


def trash(case: Case) -> Tensor:
    """The cache row that nobody reads, for every row of the windows."""
    return torch.zeros(case.query.shape[:2], dtype=torch.int64, device=case.query.device)


def slow_attention(case: Case) -> Tensor:
    """Slot by slot, row by row, head by head, key by key: [B, W, H, E]."""
    out = torch.zeros_like(case.query)
    batch, width, heads, _ = out.shape
    fold = heads // case.key.shape[2]
    for b in range(batch):
        for r in range(width):
            keys, values = seen_rows(case, b, r)
            for h in range(heads) if len(keys) else ():
                scores = keys[:, h // fold] @ case.query[b, r, h] * case.scores.scale
                if (cap := case.scores.softcap) is not None:
                    scores = cap * torch.tanh(scores / cap)
                if case.scores.sinks is not None:
                    scores = torch.cat([scores, case.scores.sinks[h : h + 1]])
                out[b, r, h] = scores.softmax(0)[: len(keys)] @ values[:, h // fold]
    return out


def seen_rows(case: Case, slot: int, row: int) -> tuple[Tensor, Tensor]:
    """The keys and values that one window row sees, in their order: each [seen, G, E]. A sliding
    window leaves the last of them."""
    page = case.pages.shape[2]
    prefix = [
        case.pages[:, case.table[slot, t // page], t % page] for t in range(int(case.lengths[slot]))
    ]
    word = (1 << row + 1) - 1 if case.visible is None else int(case.visible[slot, row])
    width = case.query.shape[1]
    window = [
        torch.stack([case.key[slot, s], case.value[slot, s]]) for s in range(width) if word >> s & 1
    ]
    rows = (
        torch.stack(prefix + window, 1)
        if prefix or window
        else case.pages.new_zeros(2, 0, *case.key.shape[2:])
    )
    return rows[0, -(case.scores.window or 0) :], rows[1, -(case.scores.window or 0) :]
