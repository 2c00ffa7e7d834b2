from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm.attention.base import cache_rows, write_pages
from idlm.attention.torch import TorchAttention
from idlm.decoding.scores import Scores
from tests.attention.oracle import CONSTANTS, DEVICE, RATIOS, Case, case, slow_attention, trash
from tests.attention.oracle import attend as run


def attend(case: Case) -> Tensor:
    return run(TorchAttention(case.pages, case.query.shape[2]), case)


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    example = case([0, 3], 2, 2, 1, 32, 4, causal=False)
    blind = replace(example, visible=torch.zeros_like(example.visible))  # type: ignore[arg-type]
    assert attend(blind)[0].eq(0).all() and attend(blind)[1].isfinite().all()


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 13), min_size=1, max_size=3),
    width=st.integers(1, 6),
    heads=st.sampled_from(RATIOS),
    page=st.sampled_from([1, 3, 4]),
    causal=st.booleans(),
    constants=st.sampled_from(CONSTANTS),
    seed=st.integers(0, 2**20),
)
def test_the_twin_is_the_double_loop(
    lengths: list[int],
    width: int,
    heads: tuple[int, int],
    page: int,
    causal: bool,
    constants: dict[str, Any],
    seed: int,
) -> None:
    example = case(lengths, width, *heads, size=8, page=page, causal=causal, seed=seed)
    example = example.scored(**constants).without_hidden_pages()
    torch.testing.assert_close(attend(example), slow_attention(example))


@pytest.mark.parametrize("causal", [True, False])
def test_the_twin_takes_64_rows_and_more(causal: bool) -> None:
    example = case([5, 21], 64 if not causal else 90, 2, 1, 32, 8, causal)
    torch.testing.assert_close(attend(example), slow_attention(example))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="steps are traced on a CPU only")
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_a_trace_follows_the_width_of_the_table(constants: dict[str, Any]) -> None:
    """A recording must be right for longer prefixes, whose page tables have more columns."""

    def step(
        query: Tensor, key: Tensor, value: Tensor, pages: Tensor, table: Tensor, lengths: Tensor
    ) -> Tensor:
        case = Case(query, key, value, pages, table, lengths, None, Scores(0.5))
        return attend(case.scored(**constants))

    def arguments(example: Case) -> tuple[Tensor, ...]:
        return (
            example.query,
            example.key,
            example.value,
            example.pages,
            example.table,
            example.lengths,
        )

    short, long = (case(n, 3, 4, 2, 8, 4, causal=True, seed=n[0]) for n in ([2, 5], [30, 17]))
    recorded = torch.jit.trace(step, arguments(short), check_trace=False)
    for example in (short, long):
        torch.testing.assert_close(
            recorded(*arguments(example)), step(*arguments(example)), atol=0, rtol=0
        )


@settings(max_examples=30)
@given(
    page=st.sampled_from([1, 3, 16]),
    start=st.integers(0, 20),
    rows=st.integers(1, 9),
    seed=st.integers(0, 2**20),
)
def test_what_is_written_is_read_as_prefix(page: int, start: int, rows: int, seed: int) -> None:
    """A window over rows that are in the cache equals a window that contains them."""
    both = case([start, start], rows + 2, 2, 1, 8, page, causal=True, seed=seed)
    room = torch.arange(-(-(start + rows) // page) * 2).view(2, -1) + both.pages.shape[1]
    pages = torch.cat([both.pages, torch.full_like(both.pages, torch.nan)[:, : room.numel()]], 1)
    pages = torch.cat([pages, pages.new_full((2, room.numel(), *pages.shape[2:]), torch.nan)], 1)
    table = torch.cat([both.table[:, : start // page], room[:, start // page :].to(DEVICE)], 1)
    for slot in range(2 if start % page else 0):  # the page that was begun goes on elsewhere
        pages[:, table[slot, start // page]] = pages[:, both.table[slot, start // page]]
    positions = start + torch.arange(rows, device=DEVICE).expand(2, -1)
    write_pages(pages, both.key[:, :rows], both.value[:, :rows], cache_rows(table, positions, page))
    brought = (of[:, rows:] for of in (both.query, both.key, both.value))
    late = attend(Case(*brought, pages, table, both.lengths + rows, None, both.scores))
    torch.testing.assert_close(late, slow_attention(both)[:, rows:])


def test_rows_for_the_trash_page_leave_the_others_alone() -> None:
    example = case([6], 4, 2, 1, 8, 4, causal=True)
    before = example.pages.clone()
    write_pages(example.pages, example.key, example.value, trash(example))
    assert torch.equal(example.pages[:, 1:].nan_to_num(7), before[:, 1:].nan_to_num(7))
