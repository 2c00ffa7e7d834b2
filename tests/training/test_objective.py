"""The objective against the papers' layout written as double loops, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm.models.idlm_model import Idlm
from idlm.training.objective import (
    EXCLUDED,
    Objective,
    Texts,
    Wanted,
    mask_rows,
    soft_term,
    visible,
)
from tests.training import tiny

SHAPES, PHASES = [(1, 7), (5, 9), (3, 1), (4, 12), (2, 2)], [0, 2, 1, 4, 3]


def full_layout_mask(
    prompt: int, length: int, block_size: int, phase: int, window: int | None = None
) -> Tensor:
    """Visibility in the layout [x_t | x_0], [2 length, 2 length], rule by rule."""

    def block(i: int) -> int:
        return (i + phase) // block_size

    seen = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            seen[i, j] = block(j) == block(i) and j <= i
            seen[i, length + j] = block(j) < block(i)
            seen[length + i, length + j] = j <= i
            if window is not None and i - j >= window:
                seen[i, j] = seen[i, length + j] = seen[length + i, length + j] = False
    return seen


def slow_logits(
    idlm: Idlm, text: list[int], prompt: int, block_size: int, phase: int
) -> tuple[Tensor, Tensor]:
    """Logits of both halves [length, V] by one forward over the full layout of one text."""
    length = len(text)
    noisy = [token if i < prompt else idlm.mask_id for i, token in enumerate(text)]
    tokens = torch.tensor([noisy + text])
    positions = torch.arange(length).repeat(2)[None]
    window = idlm.model.config.sliding_window
    seen = full_layout_mask(prompt, length, block_size, phase, window)[None, None]
    logits = idlm.head(idlm.hidden(tokens, positions, seen, slice(prompt, length)))[0]
    if idlm.mask_id < idlm.vocab_size:
        logits = logits.index_fill(-1, torch.tensor(idlm.mask_id), EXCLUDED)
    return logits[:length], logits[length:]


def slow_terms(
    idlm: Idlm, batch: Texts, block_size: int, soft: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The three sums, one token at a time."""
    noisy_sum = clean_sum = soft_sum = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch.prompt)):
        prompt, length = int(batch.prompt[row]), int(batch.length[row])
        text = batch.tokens[row, :length].tolist()
        noisy, clean = slow_logits(
            idlm, text, prompt, block_size, int(batch.phase[row]) % block_size
        )
        for i in range(length - 1):
            target = text[i + 1]
            if i + 1 >= prompt:
                clean_sum = clean_sum - clean[i].softmax(-1)[target].log()
            if i >= prompt:
                noisy_sum = noisy_sum - noisy[i].softmax(-1)[target].log()
                p, q = clean[i].softmax(-1).detach(), noisy[i].softmax(-1)
                for v in range(len(p)):
                    if soft == "kl" and p[v] > 0:
                        soft_sum = soft_sum + p[v] * (p[v].log() - q[v].log())
                    elif soft == "tv":
                        soft_sum = soft_sum + (p[v] - q[v]).abs() / 2
    return noisy_sum, clean_sum, soft_sum


def gradients(idlm: Idlm, loss: Tensor) -> dict[str, Tensor]:
    names = {name: p for name, p in idlm.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(names.values()))
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize(
    ("method", "mask_id"), [("full", tiny.MASK), ("lora", tiny.MASK), ("lora", tiny.VOCAB)]
)
@pytest.mark.parametrize(
    ("block_size", "soft", "window"),
    [(1, "tv", None), (3, "kl", None), (5, "tv", None), (5, "kl", 2), (3, "tv", 4)],
)
def test_loss_and_gradient_equal_the_full_layout(
    method: str, mask_id: int, block_size: int, soft: str, window: int | None
) -> None:
    idlm = tiny.model(method, mask_id=mask_id, window=window)
    batch = tiny.texts(SHAPES, PHASES)
    fast = Objective(idlm, trains_clean=method == "full")(
        batch, Wanted(block_size, clean=True, soft=soft)
    )
    slow = slow_terms(idlm, batch, block_size, soft)
    for mine, reference in zip(fast, slow, strict=True):
        assert mine.item() == pytest.approx(reference.item(), rel=1e-12)

    def total(terms: tuple[Tensor, ...]) -> Tensor:
        # the clean rows of a gated LoRA are the frozen base: no gradient flows there in either form
        return terms[0] + 0.7 * terms[2] + (0.2 * terms[1] if method == "full" else 0.0)

    reference_gradients = gradients(idlm, total(slow))
    assert len(reference_gradients) > 5
    for name, mine in gradients(idlm, total(tuple(fast))).items():
        assert mine.abs().max() > 0, name
        torch.testing.assert_close(mine, reference_gradients[name], rtol=1e-9, atol=1e-11)


def test_clean_rows_of_a_gated_lora_have_no_gradient_and_are_the_base() -> None:
    batch = tiny.texts(SHAPES, PHASES)
    lora, base = tiny.model("lora"), tiny.model("full")
    adapted = Objective(lora, trains_clean=False)(batch, Wanted(3, clean=True)).clean
    assert not adapted.requires_grad
    assert (
        adapted.item()
        == Objective(base, trains_clean=True)(batch, Wanted(0, clean=True)).clean.item()
    )


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.integers(1, 9),
    response=st.integers(1, 14),
    block_size=st.integers(1, 8),
    phase=st.integers(0, 7),
    padding=st.integers(0, 3),
    window=st.sampled_from([None, 1, 2, 3, 7]),
)
def test_mask_equals_the_double_loop(
    prompt: int, response: int, block_size: int, phase: int, padding: int, window: int | None
) -> None:
    length, phase = prompt + response, phase % block_size
    positions, is_row = mask_rows(
        torch.tensor([prompt, 1]), torch.tensor([length, 1 + response + padding])
    )
    width = max(length, 1 + response + padding)
    mine = visible(
        positions, torch.tensor([prompt, 1]), torch.tensor([phase, 0]), block_size, width
    ).within(window)[0, 0]
    full = full_layout_mask(prompt, length, block_size, phase, window)
    rows = int(is_row[0].sum())
    assert rows == response - 1
    for r in range(rows):
        i = prompt + r
        own = [bool(full[i, prompt + s]) for s in range(rows)]
        # what row i sees of the clean prompt rows of x_t it sees in x_0 instead
        text = [bool(full[i, length + j] or (j < prompt and full[i, j])) for j in range(length)]
        assert mine[r, :rows].tolist() == own
        assert not mine[r, rows : positions.shape[1]].any()
        assert mine[r, positions.shape[1] :][:length].tolist() == text
        assert not mine[r, positions.shape[1] + length :].any()


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
            objective.logits(b, block_size, clean=False)[0][row] for b in (batch, other)
        )
    seen = full_layout_mask(4, 14, block_size, phase % block_size)[4 + row]
    sees = bool(seen[14 + change] or (change < 4 and seen[change]))
    assert torch.equal(before, after) != sees


def test_texts_of_one_response_token_have_no_noisy_rows() -> None:
    terms = Objective(tiny.model(), trains_clean=True)(
        tiny.texts([(3, 1), (2, 1)], [0, 1]), Wanted(2, True, "kl")
    )
    assert terms.noisy == 0 and terms.soft == 0 and terms.clean > 0


def test_total_variation_is_one_minus_the_acceptance_rate() -> None:
    noisy, clean = torch.randn(
        2, 50, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).unbind()
    accepted = torch.minimum(noisy.softmax(-1), clean.softmax(-1)).sum()
    assert soft_term(noisy, clean, "tv").item() == pytest.approx(50 - accepted.item())


def test_soft_term_is_finite_beside_an_excluded_token() -> None:
    logits = torch.tensor([[0.5, EXCLUDED, 1.0]], requires_grad=True)
    for kind in ("kl", "tv"):
        distance = soft_term(logits, torch.tensor([[1.0, EXCLUDED, 0.0]]), kind)
        assert (
            torch.isfinite(distance)
            and torch.isfinite(torch.autograd.grad(distance, logits)[0]).all()
        )


def test_measure_counts_every_row_at_its_depth() -> None:
    idlm = tiny.model()
    batch = tiny.texts(SHAPES, PHASES)
    block_size = 3
    rows = torch.zeros(3, block_size, dtype=torch.float64)
    for b in range(len(SHAPES)):
        prompt, length, phase = (
            int(batch.prompt[b]),
            int(batch.length[b]),
            int(batch.phase[b]) % block_size,
        )
        with torch.no_grad():
            noisy, clean = slow_logits(
                idlm, batch.tokens[b, :length].tolist(), prompt, block_size, phase
            )
        for i in range(prompt, length - 1):
            known = max(
                j
                for j in range(i + 1)
                if j < prompt or (j + phase) // block_size < (i + phase) // block_size
            )
            p, q = clean[i].softmax(-1), noisy[i].softmax(-1)
            agree = float(p.argmax() == q.argmax())
            rows[:, i - known - 1] += torch.tensor([1.0, torch.minimum(p, q).sum(), agree])
    assert (rows[0] > 0).all()
    torch.testing.assert_close(Objective(idlm, True).measure(batch, block_size), rows)
