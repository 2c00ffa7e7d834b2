"""The objective against the papers' layout written as double loops, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm.training.layout import Texts, dense, mask_rows, seen_by_masks
from idlm.training.losses import RowWeights
from idlm.training.objective import Objective, Wanted
from tests.training import tiny
from tests.training.reference import (
    documents,
    equals_the_loops,
    full_layout_mask,
    hidden_of,
    slow_depths,
    slow_logits,
)

SHAPES, PHASES = [(1, 7), (5, 9), (3, 1), (4, 12), (2, 2)], [0, 2, 1, 4, 3]
PACKED: list[list[tuple[int, ...]]] = [
    [(1, 7), (2, 3, 4, 5, 1)],
    [(3, 1), (1, 2, 1, 4, 0, 3), (2, 6)],
]
BATCHES = {"alone": tiny.texts(SHAPES, PHASES), "packed": tiny.packed(PACKED, PHASES)}


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize(
    ("method", "mask_id"), [("full", tiny.MASK), ("lora", tiny.MASK), ("lora", tiny.VOCAB)]
)
@pytest.mark.parametrize(
    ("block_size", "weights", "window"),
    [
        (1, (1.0, 0.0, 0.7), None),
        (3, (1.0, 0.7, 0.0), 4),
        (5, (0.0, 0.3, 0.9), None),
        (5, (1.0, 0.2, 0.4), 2),
    ],
)
def test_loss_and_gradient_equal_the_full_layout(
    method: str,
    mask_id: int,
    block_size: int,
    weights: tuple[float, float, float],
    window: int | None,
    layout: str,
) -> None:
    idlm = tiny.model(method, mask_id=mask_id, window=window)
    batch = BATCHES[layout]
    wanted = Wanted(block_size, clean=True, soft=True, weights=RowWeights(*weights))
    equals_the_loops(idlm, method, batch, wanted)


def test_clean_rows_of_a_gated_lora_have_no_gradient_and_are_the_base() -> None:
    batch = tiny.texts(SHAPES, PHASES)
    lora, base = tiny.model("lora"), tiny.model("full")
    adapted = Objective(lora, trains_clean=False)(batch, Wanted(3, clean=True)).clean
    assert not adapted.requires_grad
    assert (
        adapted.item()
        == Objective(base, trains_clean=True)(batch, Wanted(0, clean=True)).clean.item()
    )


@st.composite
def rows_of_documents(draw: st.DrawFn) -> Texts:
    part, shape = st.integers(0, 7), st.integers(1, 7)
    documents = st.tuples(shape, shape, part, shape, part).map(lambda s: s if s[3] else s[:2])
    rows = draw(st.lists(st.lists(documents, min_size=1, max_size=3), min_size=1, max_size=2))
    return tiny.packed(rows, draw(st.lists(st.integers(0, 9), min_size=6, max_size=6)))


@settings(max_examples=60, deadline=None)
@given(
    texts=rows_of_documents(),
    block_size=st.integers(1, 8),
    window=st.sampled_from([None, 1, 2, 3, 7]),
)
def test_what_mask_rows_see_equals_the_double_loop(
    texts: Texts, block_size: int, window: int | None
) -> None:
    rows, at = mask_rows(texts, block_size), iter(documents(texts))
    count, width = rows.real.shape[1], texts.tokens.shape[1]
    own, text = (seen.within(window) for seen in seen_by_masks(rows))
    sees_own, sees_text = dense(own, count), dense(text, width)
    for b in range(len(texts.tokens)):
        row = column = 0
        for _ in range(int(texts.document[b].max()) + 1):
            document = next(at)
            length = len(document.tokens)
            phase = document.phase % block_size
            full = full_layout_mask(document.answers, length, block_size, phase, window)
            for i in document.masked:
                masks, clean = torch.zeros(count), torch.zeros(width)
                for place, j in enumerate(document.masked, row - document.masked.index(i)):
                    masks[place] = full[i, j]
                for j in range(length):
                    # what row i sees of the clean rows of x_t it sees in x_0 instead
                    clean[column + j] = full[i, length + j] or (
                        full[i, j] and j not in document.in_answers
                    )
                assert rows.real[b, row] and rows.column[b, row] == column + i
                assert sees_own[b, row].tolist() == masks.bool().tolist()
                assert sees_text[b, row].tolist() == clean.bool().tolist()
                row += 1
            column += length
        assert not rows.real[b, row:].any()


@settings(max_examples=25, deadline=None)
@given(
    block_size=st.integers(1, 6),
    phase=st.integers(0, 5),
    row=st.integers(0, 8),
    change=st.integers(0, 13),
)
def test_mask_row_depends_on_nothing_it_may_not_see(
    block_size: int, phase: int, row: int, change: int
) -> None:
    idlm = tiny.model("full")
    objective = Objective(idlm, trains_clean=True)
    batch = tiny.texts([(4, 10)], [phase])
    other = batch._replace(tokens=batch.tokens.clone())
    other.tokens[0, change] = (other.tokens[0, change] + 1) % tiny.MASK
    with torch.no_grad():
        before, after = (
            objective.log_law(hidden_of(objective, b, block_size)[1])[row] for b in (batch, other)
        )
    seen = full_layout_mask([(4, 14)], 14, block_size, phase % block_size)[4 + row]
    sees = bool(seen[14 + change] or (change < 4 and seen[change]))
    assert torch.equal(before, after) != sees


def test_texts_of_one_response_token_have_no_noisy_rows() -> None:
    terms = Objective(tiny.model(), trains_clean=True)(
        tiny.texts([(3, 1), (2, 1)], [0, 1]),
        Wanted(2, clean=True, soft=True, weights=RowWeights(1, 1, 1)),
    )
    assert terms.noisy == terms.ce == terms.kl == terms.tv == 0 and terms.clean > 0
    terms.noisy.backward()  # as data parallelism needs it


@pytest.mark.parametrize("layout", BATCHES)
def test_measure_counts_every_row_at_its_depth(layout: str) -> None:
    idlm, batch, block_size = tiny.model(), BATCHES[layout], 3
    rows = torch.zeros(3, block_size, dtype=torch.float64)
    for document in documents(batch):
        with torch.no_grad():
            noisy, clean = slow_logits(idlm, document, block_size)
        for i, depth in zip(document.masked, slow_depths(document, block_size), strict=True):
            p, q = clean[i].softmax(-1), noisy[i].softmax(-1)
            agree = float(p.argmax() == q.argmax())
            rows[:, depth - 1] += torch.tensor([1.0, torch.minimum(p, q).sum(), agree])
    assert (rows[0] > 0).all()
    torch.testing.assert_close(Objective(idlm, True).measure(batch, block_size), rows)
