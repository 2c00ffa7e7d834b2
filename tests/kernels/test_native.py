"""The C kernels against the PyTorch twin and against what stock model code computes."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm.decoding.params import SamplingParams
from idlm.engine.build import build_engine
from idlm.engine.llm import LLM
from idlm.kernels import fused, native
from idlm.kernels import window_attention_native as kernel
from idlm.kernels.window_attention import attend_torch, window_meta, write_pages
from tests.engine.tiny import tiny_idlm
from tests.kernels.oracle import Case, case
from tests.kernels.test_window_attention import RATIOS, SHAPES

pytestmark = pytest.mark.skipif(not native.loaded(), reason="no C compiler: there is nothing to test")


def twin(one: Case, rows: Tensor, real: int) -> tuple[Tensor, Tensor]:
    """What the PyTorch twin makes of the windows, and the pages it leaves."""
    pages = one.pages.clone()
    write_pages(pages, one.key[:, :real], one.value[:, :real], rows)
    width, heads = one.query.shape[1:3]
    meta = window_meta(pages, one.table, one.lengths, one.visible, width, heads)
    return attend_torch(one.query, one.key, one.value, pages.clone(), meta, one.scale), pages


def flat(windows: Tensor, real: int) -> Tensor:
    """[B, W, ...] -> the real rows of all slots, then their masks."""
    return torch.cat([windows[:, :real].flatten(0, 1), windows[:, real:].flatten(0, 1)])


def attend(one: Case, pages: Tensor, rows: Tensor, real: int) -> Tensor:
    """Windows; where the rows are causal, as pieces of prompts."""
    query, key, value = (flat(tensor, real) for tensor in (one.query, one.key, one.value))
    width = one.query.shape[1]
    if one.visible is None:
        ends = torch.arange(1, len(one.lengths) + 1) * width
        return kernel.attend_pieces(query, key, value, pages, rows.flatten(), one.table, one.lengths, ends, one.scale)
    return kernel.attend(query, key, value, pages, rows, one.table, one.lengths, one.visible, width - real, one.scale)


def check(one: Case, real: int, **tolerance: float) -> None:
    real = one.query.shape[1] if one.visible is None else real  # pieces have no masks
    rows = torch.zeros(len(one.lengths), real, dtype=torch.int64)  # the trash page's first row: nobody reads it
    expected, left = twin(one, rows, real)
    pages = one.pages.clone()
    torch.testing.assert_close(attend(one, pages, rows, real), flat(expected, real), **tolerance)
    torch.testing.assert_close(pages, left, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    width=st.integers(1, 24),
    heads=st.sampled_from(RATIOS),
    page=st.sampled_from([1, 3, 16]),
    size=st.sampled_from([2, 8, 20]),
    causal=st.booleans(),
    real=st.integers(1, 24),
    seed=st.integers(0, 2**20),
)
def test_attention_is_the_twin(
    lengths: list[int], width: int, heads: tuple[int, int], page: int, size: int, causal: bool, real: int, seed: int
) -> None:
    check(case(lengths, width, *heads, size=size, page=page, causal=causal, seed=seed), min(real, width))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_of_real_shapes(
    shape: tuple[list[int], int, int, int, int, int], causal: bool, dtype: torch.dtype
) -> None:
    one = case(*shape, causal=causal).to(dtype)
    check(one, max(1, shape[1] // 2), **({} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 1e-4}))


def test_attention_on_several_threads_is_bit_equal() -> None:
    one, threads = case([40, 7, 90], 40, 6, 2, 32, 16, causal=True), torch.get_num_threads()
    rows = torch.zeros(3, 40, dtype=torch.int64)
    try:
        found = []
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(attend(one, one.pages.clone(), rows, 40))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 50)), min_size=1, max_size=5),
    heads=st.sampled_from(RATIOS),
    page=st.sampled_from([1, 3, 16]),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_pieces_of_unequal_length_are_the_twins_one_by_one(
    pieces: list[tuple[int, int]], heads: tuple[int, int], page: int, threads: int, seed: int
) -> None:
    lengths, widths = [start for start, _ in pieces], [width for _, width in pieces]
    one, before = case(lengths, max(widths), *heads, size=8, page=page, causal=True, seed=seed), torch.get_num_threads()
    whole, _ = twin(one, torch.zeros(len(pieces), max(widths), dtype=torch.int64), max(widths))
    query, key, value = (
        torch.cat([rows[:width] for rows, width in zip(tensor, widths, strict=True)])
        for tensor in (one.query, one.key, one.value)
    )
    ends, trash = torch.tensor(widths).cumsum(0), torch.zeros(sum(widths), dtype=torch.int64)
    try:
        torch.set_num_threads(threads)
        found = kernel.attend_pieces(query, key, value, one.pages, trash, one.table, one.lengths, ends, one.scale)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, torch.cat([rows[:n] for rows, n in zip(whole, widths, strict=True)]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_does_not_depend_on_its_window(dtype: torch.dtype) -> None:
    """Alone, after its predecessors were cached, a row gets the very bits that it gets in a window with them."""
    both = case([20], 7, 6, 2, 32, 4, causal=True).to(dtype)
    pages = torch.cat([both.pages, torch.zeros_like(both.pages)], 1)
    table = torch.cat([both.table, torch.arange(both.pages.shape[1], pages.shape[1])[None]], 1)
    table[:, 5:] = torch.arange(both.pages.shape[1], both.pages.shape[1] + table.shape[1] - 5)
    places = (table[0, torch.arange(20, 27) // 4] * 4 + torch.arange(20, 27) % 4)[None]
    inputs = [one[0] for one in (both.query, both.key, both.value)]
    ends = torch.tensor([7])
    together = kernel.attend_pieces(*inputs, pages, places[0], table, both.lengths, ends, both.scale)
    alone = kernel.attend_pieces(
        *(one[6:] for one in inputs), pages, places[0, 6:], table, both.lengths + 6, ends - 6, both.scale
    )
    assert torch.equal(alone[0], together[6])


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    one = case([0], 2, 2, 1, 32, 4, causal=False)
    blind = torch.zeros(1, 2, dtype=torch.int64)
    inputs = [tensor[0] for tensor in (one.query, one.key, one.value)]
    mixed = kernel.attend(
        *inputs, one.pages, torch.zeros(1, 2, dtype=torch.int64), one.table, one.lengths, blind, 0, 1.0
    )
    assert mixed.eq(0).all()


def test_the_fused_operations() -> None:
    torch.manual_seed(0)
    rows, up, weight = torch.randn(1, 5, 37), torch.randn(1, 5, 37), torch.randn(37)
    plain = weight * (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6))
    torch.testing.assert_close(torch.ops.idlm.rms_norm(rows, weight, torch.tensor(1e-6)), plain)
    torch.testing.assert_close(torch.ops.idlm.swiglu(rows, up), torch.nn.functional.silu(rows) * up)
    heads, (cosine, sine) = torch.randn(1, 5, 3, 8).transpose(1, 2), torch.randn(2, 1, 1, 5, 8)
    turned = torch.cat([-heads[..., 4:], heads[..., :4]], -1)
    torch.testing.assert_close(torch.ops.idlm.rotate(heads, cosine, sine), heads * cosine + turned * sine)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    inner=st.integers(1, 70),
    out=st.integers(1, 300),
    by_rows=st.booleans(),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_products_of_few_rows(rows: int, inner: int, out: int, by_rows: bool, threads: int, seed: int) -> None:
    """Of weights laid out either way; a row's bits do not depend on the rows beside it or on the threads."""
    torch.manual_seed(seed)
    x, weight, before = torch.randn(1, rows, inner), torch.randn(out, inner), torch.get_num_threads()
    laid_out = weight if by_rows else weight.t().contiguous().t()
    try:
        torch.set_num_threads(threads)
        found = torch.ops.idlm.linear(x, laid_out)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight), rtol=1e-4, atol=1e-4)
    row = seed % rows
    assert torch.equal(found[:, row : row + 1], torch.ops.idlm.linear(x[:, row : row + 1], laid_out))


def test_a_long_product_goes_in_narrow_panels() -> None:
    x, weight = torch.randn(17, 5000), torch.randn(300, 5000)
    torch.testing.assert_close(
        torch.ops.idlm.linear(x, weight.t().contiguous().t()), x @ weight.t(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("mistral", 5), ("qwen2", 5), ("qwen3", 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recordings_use_them(family: str, norms: int, dtype: torch.dtype) -> None:
    """Two layers: two norms each, two more of heads in Qwen3, and the last; in float64 nothing is touched."""
    idlm = tiny_idlm(family, adapter=False)
    idlm.model.to(dtype).requires_grad_(False)
    tokens = torch.arange(6)[None] % 20

    class Blind:
        """A cache that mixes nothing: what is fused lies around the attention."""

        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            return (query + key.sum() + value.sum()).transpose(1, 2)

    def hidden(tokens: Tensor) -> Tensor:
        return idlm.hidden(tokens, torch.arange(6)[None], None, cache=Blind())

    with torch.inference_mode():
        recorded = torch.jit.trace(hidden, (tokens,), check_trace=False)
        fused.fuse(recorded.graph, dtype)
        found = Counter(node.kind() for node in recorded.graph.nodes())
        expected = (norms, 4, 2) if dtype == torch.float32 else (0, 0, 0)
        assert tuple(found[f"idlm::{name}"] for name in ("rms_norm", "rotate", "swiglu")) == expected
        torch.testing.assert_close(recorded(tokens), hidden(tokens))


def test_a_recording_drafts_as_the_step_it_was_made_from() -> None:
    """Adapters add to the linear layers' outputs in place: nothing that is fused may move across that."""
    found = []
    for record in (True, False):
        idlm = tiny_idlm("qwen3")
        idlm.model.float()
        engine = build_engine(idlm, 4, "all", max_num_seqs=4, record=record)
        for seed in range(4):
            engine.add([5, 6, 7 + seed], SamplingParams(max_tokens=40, temperature=0.7, ignore_eos=True), seed)
        results = [update.result for update in engine.run() if update.result is not None]
        found.append(sorted((one.token_ids, one.forwards, one.reached, one.accepted) for one in results))
    assert found[0] == found[1]


def test_without_a_compiler_the_twins_serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    idlm, prompt, greedy = tiny_idlm("qwen3"), [5, 6, 7], SamplingParams(temperature=0)
    with_kernels = LLM(idlm, max_num_seqs=2).generate(prompt, greedy)[0].token_ids
    monkeypatch.setenv("CC", "/no/such/compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (native.loaded, native.int8_pays)
    for one in caches:
        one.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "idlm"):
            assert LLM(idlm, max_num_seqs=2).generate(prompt, greedy)[0].token_ids == with_kernels
        assert "/no/such/compiler" in caplog.text
        assert not native.loaded()
    finally:
        monkeypatch.undo()
        for one in caches:
            one.cache_clear()
    assert native.loaded()  # again
