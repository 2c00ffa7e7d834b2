from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm.kernels import window_attention as twin
from idlm.kernels.window_attention import WindowMeta, cache_rows, window_attention, window_meta, write_pages
from tests.kernels.oracle import DEVICE, Case, case, slow_attention

RATIOS = [(1, 1), (2, 1), (6, 2), (4, 1), (8, 1), (3, 3)]
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


def attend(case: Case) -> Tensor:
    """As an engine step calls it."""
    width, heads = case.query.shape[1:3]
    meta = window_meta(case.pages, case.table, case.lengths, case.visible, width, heads)
    return window_attention(case.query, case.key, case.value, case.pages, meta, case.scale)


def triton_attend(case: Case, splits: int | None = None) -> Tensor:
    pytest.importorskip("triton", reason="triton is not installed: only the PyTorch twin can be tested")
    from idlm.kernels.window_attention_triton import attend

    c = case
    return attend(c.query, c.key, c.value, c.pages, c.table, c.lengths, c.visible, c.scale, splits)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 13), min_size=1, max_size=3),
    width=st.integers(1, 6),
    heads=st.sampled_from(RATIOS),
    page=st.sampled_from([1, 3, 4]),
    causal=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_twin_is_the_double_loop(
    lengths: list[int], width: int, heads: tuple[int, int], page: int, causal: bool, seed: int
) -> None:
    one = case(lengths, width, *heads, size=8, page=page, causal=causal, seed=seed)
    torch.testing.assert_close(attend(one), slow_attention(one))


@pytest.mark.parametrize("causal", [True, False])
def test_the_twin_takes_64_rows_and_more(causal: bool) -> None:
    one = case([5, 21], 64 if not causal else 90, 2, 1, 32, 8, causal)
    torch.testing.assert_close(attend(one), slow_attention(one))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_the_twin(shape: tuple[list[int], int, int, int, int, int], splits: int, causal: bool) -> None:
    one = case(*shape, causal=causal)
    torch.testing.assert_close(triton_attend(one.to(torch.float32), splits), attend(one).float(), atol=2e-5, rtol=1e-4)


def test_triton_chooses_its_splits() -> None:
    one = case([300], 2, 2, 1, 32, 16, causal=False)
    torch.testing.assert_close(triton_attend(one.to(torch.float32)), attend(one).float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_in_half_precision(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies no bfloat16; this needs a GPU")
    one = case([20, 3], 7, 6, 2, 64, 8, causal=False).to(dtype)
    expected = attend(one.to(torch.float64))
    torch.testing.assert_close(triton_attend(one, 2).double(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_row_that_sees_nothing_gets_zeros(splits: int) -> None:
    one = case([0, 3], 2, 2, 1, 32, 4, causal=False)
    blind = replace(one, visible=torch.zeros_like(one.visible))  # type: ignore[arg-type]
    assert attend(blind)[0].eq(0).all() and attend(blind)[1].isfinite().all()
    assert triton_attend(blind.to(torch.float32), splits)[0].eq(0).all()


def test_a_trace_follows_the_width_of_the_table() -> None:
    """What the engine records once must hold for longer prefixes, whose tables have more columns."""

    def step(query: Tensor, key: Tensor, value: Tensor, pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        meta = window_meta(pages, table, lengths, None, 3, 4)
        return window_attention(query, key, value, pages, meta, 0.5)

    def arguments(one: Case) -> tuple[Tensor, ...]:
        return one.query, one.key, one.value, one.pages, one.table, one.lengths

    short, long = (case(n, 3, 4, 2, 8, 4, causal=True, seed=n[0]) for n in ([2, 5], [30, 17]))
    recorded = torch.jit.trace(step, arguments(short), check_trace=False)
    for one in (short, long):
        torch.testing.assert_close(recorded(*arguments(one)), step(*arguments(one)), atol=0, rtol=0)


@settings(max_examples=30)
@given(page=st.sampled_from([1, 3, 16]), start=st.integers(0, 20), rows=st.integers(1, 9), seed=st.integers(0, 2**20))
def test_what_is_written_is_read_as_prefix(page: int, start: int, rows: int, seed: int) -> None:
    """A window over rows just written equals one that brought them along."""
    both = case([start, start], rows + 2, 2, 1, 8, page, causal=True, seed=seed)
    room = torch.arange(-(-(start + rows) // page) * 2).view(2, -1) + both.pages.shape[1]
    pages = torch.cat([both.pages, torch.full_like(both.pages, torch.nan)[:, : room.numel()]], 1)
    pages = torch.cat([pages, pages.new_full((2, room.numel(), *pages.shape[2:]), torch.nan)], 1)
    table = torch.cat([both.table[:, : start // page], room[:, start // page :].to(DEVICE)], 1)
    for slot in range(2 if start % page else 0):  # the page that was begun goes on elsewhere
        pages[:, table[slot, start // page]] = pages[:, both.table[slot, start // page]]
    positions = start + torch.arange(rows, device=DEVICE).expand(2, -1)
    write_pages(pages, both.key[:, :rows], both.value[:, :rows], cache_rows(table, positions, page))
    meta = window_meta(pages, table, both.lengths + rows, None, 2, 2)
    late = window_attention(both.query[:, rows:], both.key[:, rows:], both.value[:, rows:], pages, meta, both.scale)
    torch.testing.assert_close(late, slow_attention(both)[:, rows:])


def test_rows_for_the_trash_page_leave_the_others_alone() -> None:
    one = case([6], 4, 2, 1, 8, 4, causal=True)
    before = one.pages.clone()
    write_pages(one.pages, one.key, one.value, torch.zeros(1, 4, dtype=torch.int64, device=DEVICE))
    assert torch.equal(one.pages[:, 1:].nan_to_num(7), before[:, 1:].nan_to_num(7))


def test_the_dispatch() -> None:
    """Triton where there is a GPU and a type it has; there the meta needs no mask."""
    one = case([6], 4, 2, 1, 32, 4, causal=True)
    for dtype in (torch.float64, torch.float32):
        meta: WindowMeta = window_meta(one.pages.to(dtype), one.table, one.lengths, None, 4, 2)
        assert (meta.bias is None) == (
            one.pages.is_cuda and dtype == torch.float32 and twin.use_triton(one.pages.float())
        )


@pytest.mark.parametrize(
    ("programs", "prefix", "splits"), [(1, 64, 1), (8, 4096, 32), (8, 40960, 33), (300, 4096, 1), (100, 4096, 2)]
)
def test_splits_fill_the_device_and_no_more(programs: int, prefix: int, splits: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from idlm.kernels.window_attention_triton import split_number

    assert split_number(programs, prefix, keys=64, processors=132) == splits
