"""Pieces of prompts in one call of the Triton kernel: the PyTorch twin's, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from idlm.attention.base import QKV, Segment
from idlm.attention.torch import TorchAttention
from idlm.attention.triton import TritonAttention
from idlm.decoding.scores import Scores
from idlm.engine.kv_cache import KVCache
from idlm.engine.prefill import Chunk, PrefillBatch
from tests.attention.oracle import CONSTANTS, DEVICE, RATIOS

kernel = pytest.importorskip(
    "idlm.kernels.prefill_attention_triton", reason="triton is not installed"
)
Piece = tuple[int, int, int]
"""Slot, first position, rows."""


@dataclass
class Pieces:
    """One layer's rows, in float64, and the pages before them."""

    segment: Segment
    qkv: QKV
    pages: Tensor
    scores: Scores = Scores(0.3)

    def to(self, dtype: torch.dtype) -> Pieces:
        qkv = QKV(*(x.to(dtype) for x in self.qkv))
        return Pieces(self.segment, qkv, self.pages.to(dtype), self.scores)


def pieces(
    of: list[Piece], heads: int = 4, groups: int = 2, size: int = 8, page: int = 4, seed: int = 0
) -> Pieces:
    """Random rows; what no piece begins behind is NaN."""
    torch.manual_seed(seed)
    slots = 1 + max(slot for slot, _, _ in of)
    columns = -(-max(start + rows for _, start, rows in of) // page) + 1
    table = (torch.randperm(slots * columns) + 1).view(slots, columns)
    pages = torch.full((2, 1 + slots * columns, page, groups, size), torch.nan).double()
    for slot in range(slots):
        cached = torch.arange(min((start for one, start, _ in of if one == slot), default=0))
        pages[:, table[slot, cached // page], cached % page] = torch.randn(
            2, len(cached), groups, size, dtype=torch.float64
        )
    own = [table[slot, torch.arange(start, start + n) // page] * page for slot, start, n in of]
    offsets = [torch.arange(start, start + n) % page for _, start, n in of]
    widths = [rows for _, _, rows in of]
    segment = Segment(
        table[[slot for slot, _, _ in of]].to(DEVICE),
        torch.tensor([start for _, start, _ in of], device=DEVICE),
        (torch.cat(own) + torch.cat(offsets)).to(DEVICE),
        ends=torch.tensor(list(accumulate(widths)), device=DEVICE),
        widths=widths,
    )
    rows = (torch.randn(sum(widths), n, size).double() for n in (heads, groups, groups))
    return Pieces(segment, QKV(*(x.to(DEVICE) for x in rows)), pages.to(DEVICE))


def twin(one: Pieces) -> tuple[Tensor, Tensor]:
    """One piece after the other, and the pages they leave."""
    pages, mixed, first = one.pages.clone(), [], 0
    backend = TorchAttention(pages, one.qkv.query.shape[1])
    for window in one.segment.windows():
        part = QKV(*(rows[first : first + window.size] for rows in one.qkv))
        mixed.append(
            backend.attend(backend.prepare(window, one.scores.window), pages, part, one.scores)
        )
        first += window.size
    return torch.cat(mixed), pages


def check(one: Pieces, dtype: torch.dtype, **tolerance: float) -> None:
    one = one.to(dtype)
    backend, pages = TritonAttention(), one.pages.clone()
    found = backend.attend(
        backend.prepare(one.segment, one.scores.window), pages, one.qkv, one.scores
    )
    expected, left = twin(one.to(torch.float64))
    torch.testing.assert_close(found.double(), expected, **tolerance)
    torch.testing.assert_close(pages[:, 1:].double(), left[:, 1:], rtol=0, atol=0, equal_nan=True)


PIECES_CONSTANTS = [CONSTANTS[0], *CONSTANTS[2:4]]
CASES: list[list[Piece]] = [
    [(0, 0, 1)],
    [(0, 5, 1), (1, 0, 1), (2, 31, 1)],
    [(0, 0, 300), (1, 17, 3), (2, 0, 40)],
    [(0, 33, 31), (1, 0, 32), (2, 64, 33), (3, 1, 65)],
    [(0, 3, 5), (1, 0, 7), (0, 8, 9), (0, 17, 1)],
]


@pytest.mark.parametrize("constants", PIECES_CONSTANTS, ids=str)
@pytest.mark.parametrize("of", CASES, ids=str)
@pytest.mark.parametrize("heads, groups, size, page", [(4, 1, 32, 16), (3, 3, 40, 3), (7, 1, 8, 1)])
def test_pieces_are_the_twins(
    of: list[Piece], heads: int, groups: int, size: int, page: int, constants: dict[str, Any]
) -> None:
    sinks = torch.linspace(-2, 3, heads, device=DEVICE) if constants.get("sinks") else None
    one = pieces(of, heads, groups, size, page)
    one.scores = Scores(0.3, constants.get("window"), constants.get("softcap"), sinks)
    check(one, torch.float32, atol=2e-5, rtol=1e-4)


@settings(max_examples=25 if DEVICE.type == "cpu" else 8)  # a GPU's are compiled first
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 70)), min_size=1, max_size=6),
    heads=st.sampled_from(RATIOS),
    page=st.sampled_from([1, 3, 16]),
    seed=st.integers(0, 2**20),
)
def test_any_pieces_are_the_twins(
    lengths: list[tuple[int, int]], heads: tuple[int, int], page: int, seed: int
) -> None:
    of = [(slot, start, rows) for slot, (start, rows) in enumerate(lengths)]
    check(pieces(of, *heads, page=page, seed=seed), torch.float32, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pieces_in_half_precision(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies no bfloat16; this needs a GPU")
    rounded = pieces(CASES[3], size=32).to(dtype).to(torch.float64)
    check(rounded, dtype, atol=3e-3, rtol=3e-2)


class Calls(TorchDispatchMode):
    """Counts PyTorch's operations."""

    number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


class Launches:
    """Stands in for the kernel."""

    number = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Launches:
        self.number += 1
        return self

    def __call__(self, *_: object, **__: object) -> None:
        pass


def test_launches_do_not_grow_with_the_number_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    for number in (1, 3, 16):
        launches, calls = Launches(), Calls()
        monkeypatch.setattr(kernel, "_attend", launches)
        cache = KVCache([(4, 2, 8)] * 2, 40, 16, torch.zeros(0, device=DEVICE))
        cache.backend = TritonAttention()
        chunks = [Chunk(slot, [1] * 20, 0) for slot in range(number)]
        batch = PrefillBatch.of(chunks, 16, lambda numbers: torch.tensor(numbers, device=DEVICE))
        table = torch.arange(1, 1 + 2 * number, device=DEVICE).view(number, 2)
        rows = [torch.zeros(1, heads, 20 * number, 8, device=DEVICE) for heads in (4, 2, 2)]
        with calls:
            cache.prepare([cache.pieces(table, batch)], 0)
            for layer in range(2):
                cache.attend(layer, *rows, Scores(0.3))
        counted.append((launches.number, calls.number))
    assert counted == [(2, calls.number)] * 3
