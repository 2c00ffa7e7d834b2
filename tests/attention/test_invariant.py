from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import idlm
from idlm.attention.base import QKV, Segment, cache_rows
from idlm.attention.invariant import InvariantAttention, InvariantTritonAttention
from idlm.decoding.scores import Scores
from idlm.kernels.batch_invariant import batch_invariant
from idlm.models.idlm_model import Idlm
from tests.attention.oracle import CONSTANTS, Case, case, slow_attention
from tests.attention.oracle import attend as run


def attend(case: Case) -> Tensor:
    return run(InvariantAttention(case.pages), case)


def triton_attend(case: Case) -> Tensor:
    pytest.importorskip(
        "triton", reason="triton is not installed: only the PyTorch twin can be tested"
    )
    return run(InvariantTritonAttention(), case)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 5, 63, 64, 70]), min_size=1, max_size=3),
    width=st.integers(1, 6),
    heads=st.sampled_from([(1, 1), (6, 2), (8, 1)]),
    page=st.sampled_from([1, 4]),
    causal=st.booleans(),
    constants=st.sampled_from(CONSTANTS),
)
def test_attention_is_the_double_loop(
    lengths: list[int],
    width: int,
    heads: tuple[int, int],
    page: int,
    causal: bool,
    constants: dict[str, Any],
) -> None:
    example = case(lengths, width, *heads, size=8, page=page, causal=causal)
    example = example.scored(**constants).without_hidden_pages()
    torch.testing.assert_close(attend(example), slow_attention(example))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "shape", [([0, 3], 1, 1, 1, 32, 4), ([40, 31], 3, 6, 2, 80, 16), ([9], 5, 8, 1, 128, 8)]
)
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_triton_attention_is_the_twin(
    shape: tuple[list[int], int, int, int, int, int], causal: bool, constants: dict[str, Any]
) -> None:
    example = case(*shape, causal=causal).scored(**constants).without_hidden_pages()
    torch.testing.assert_close(
        triton_attend(example.to(torch.float32)), attend(example).float(), atol=2e-5, rtol=1e-4
    )


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    example = case([0, 3], 2, 2, 1, 32, 4, causal=False)
    blind = replace(example, visible=torch.zeros_like(example.visible))  # type: ignore[arg-type]
    assert attend(blind)[0].eq(0).all() and attend(blind)[1].ne(0).all()
    assert triton_attend(blind.to(torch.float32))[0].eq(0).all()


@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
@pytest.mark.parametrize(
    ("kernel", "length"), [(attend, 0), (attend, 60), (attend, 70), (triton_attend, 30)]
)
def test_attention_of_a_row_is_the_same_in_every_window(
    kernel: Callable[[Case], Tensor], length: int, constants: dict[str, Any]
) -> None:
    """A text is cached up to `length`; its next rows come in windows of different widths, alone or
    beside other texts."""
    text = case([length], 9, 6, 2, 32, 4, causal=True).to(torch.float32).scored(**constants)
    expected = kernel(text)
    for width in (1, 4):
        others = case([40, 3], width, 6, 2, 32, 4, causal=True, seed=1).to(torch.float32)
        for slot in (0, 2):
            part = kernel(beside(cut(text, width), others, slot))
            assert torch.equal(part[slot], expected[0, :width])


def cut(example: Case, width: int) -> Case:
    """`example` with the first `width` rows of its window."""
    return replace(
        example,
        query=example.query[:, :width],
        key=example.key[:, :width],
        value=example.value[:, :width],
    )


def beside(example: Case, others: Case, slot: int) -> Case:
    """`example` as slot `slot` among `others`; their pages are concatenated."""
    first = example.pages.shape[1]
    columns = max(example.table.shape[1], others.table.shape[1])
    tables = (
        F.pad(example.table, (0, columns - example.table.shape[1])),
        F.pad(others.table + first, (0, columns - others.table.shape[1])),
    )

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([b[:slot], a, b[slot:]])

    return Case(
        query=mixed(example.query, others.query),
        key=mixed(example.key, others.key),
        value=mixed(example.value, others.value),
        pages=torch.cat([example.pages, others.pages], 1),
        table=mixed(*tables),
        lengths=mixed(example.lengths, others.lengths),
        visible=None,
        scores=example.scores,
    )


class InvariantCache:
    """One layer set of pages for the bundled model; every forward brings the same number of rows
    for each slot."""

    def __init__(self, model: Idlm, slots: int) -> None:
        config = model.model.config
        shape = (2, 1 + 8 * slots, 16, config.num_key_value_heads, config.head_dim)
        self.pages = [torch.zeros(shape) for _ in range(config.num_hidden_layers)]
        self.table = 1 + torch.arange(8 * slots).view(slots, 8)
        self.lengths = torch.zeros(slots, dtype=torch.int64)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        batch, _, width, _ = query.shape
        rows = cache_rows(self.table, self.lengths[:, None] + torch.arange(width), 16)
        backend, segment = (
            InvariantAttention(self.pages[layer]),
            Segment(self.table, self.lengths, rows),
        )
        qkv = QKV(*(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)))
        return backend.attend(backend.prepare(segment), self.pages[layer], qkv, scores).unflatten(
            0, (batch, width)
        )


def logits(model: Idlm, texts: Tensor, widths: list[int]) -> Tensor:
    """The model's logits [B, T, V] of `texts` [B, T], fed in pieces of `widths` rows."""
    cache, out, start = InvariantCache(model, texts.shape[0]), [], 0
    for width in widths:
        positions = torch.arange(start, start + width).expand(texts.shape[0], -1)
        hidden = model.hidden(texts[:, start : start + width], positions, None, cache=cache)
        out.append(model.head(hidden))
        start += width
        cache.lengths += width
    return torch.cat(out, 1)


@torch.inference_mode()
def test_logits_of_the_bundled_model_do_not_depend_on_batch_or_width() -> None:
    """Bit-equal float32 logits for 1, 3 and 8 texts side by side and for windows of 1, 7 and 16
    rows."""
    model = idlm.load("nano")
    torch.manual_seed(0)
    texts = torch.randint(10, model.vocab_size, (8, 80))
    prompt = 40
    with batch_invariant():
        expected = logits(model, texts[:1], [prompt] + [1] * 16)[0]
        for batch, widths in [
            (1, [7, 7, 2]),
            (3, [1, 7, 7, 1]),
            (3, [16]),
            (8, [16]),
            (8, [7, 9]),
            (8, [1] * 3 + [13]),
        ]:
            for slot in {0, batch - 1}:
                order = torch.cat([texts[1 : slot + 1], texts[:1], texts[slot + 1 : batch]])
                found = logits(model, order, [prompt, *widths])[slot]
                assert torch.equal(found, expected), (batch, widths, slot)


@torch.inference_mode()
def test_without_the_mode_they_do() -> None:
    """The test above can fail: the default kernels round differently."""
    model = idlm.load("nano")
    text = torch.randint(10, model.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(logits(model, text, [40] + [1] * 20), logits(model, text, [40, 20]))
