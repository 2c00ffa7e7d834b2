"""The training objective as double loops over the papers' full layout, one document at a time."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from idlm.models.idlm_model import Idlm
from idlm.training.layout import MaskRows, Texts, mask_rows
from idlm.training.objective import Objective, Wanted
from idlm.training.terms import EXCLUDED
from tests.heads import slow_head


class Document(NamedTuple):
    """The ids of a document, the ranges of its answers, and its phase."""

    tokens: list[int]
    answers: list[tuple[int, int]]
    phase: int

    @property
    def masked(self) -> list[int]:
        """The positions of its MASK rows, those of answer tokens with a next one."""
        return [i for start, stop in self.answers for i in range(start, stop - 1)]

    @property
    def in_answers(self) -> set[int]:
        """The positions of all its answer tokens."""
        return {i for start, stop in self.answers for i in range(start, stop)}


def documents(texts: Texts) -> list[Document]:
    """The documents of a batch, row by row."""
    found = []
    for row in zip(*(part.tolist() for part in texts), strict=True):
        columns = zip(*row, strict=True)
        for document, group in groupby(columns, lambda column: column[1]):
            if document >= 0:
                tokens, _, position, answer, phase = zip(*group, strict=True)
                assert list(position) == list(range(len(tokens)))
                ranges = [
                    (answer.index(a), answer.index(a) + answer.count(a))
                    for a in dict.fromkeys(answer)
                    if a >= 0
                ]
                found.append(Document(list(tokens), ranges, phase[0]))
    return found


def full_layout_mask(
    answers: list[tuple[int, int]],
    length: int,
    block_size: int,
    phase: int,
    window: int | None = None,
) -> Tensor:
    """Visibility in the layout [x_t | x_0], [2 length, 2 length], rule by rule.

    Answers that ended are known, and what is known is seen in x_0.
    """

    def block(i: int) -> int:
        return (i + phase) // block_size

    seen = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for i in range(length):
        known = max((stop for _, stop in answers if stop <= i), default=0)
        for j in range(length):
            seen[i, j] = block(j) == block(i) and known <= j <= i
            seen[i, length + j] = block(j) < block(i) or j < known
            seen[length + i, length + j] = j <= i
            if window is not None and i - j >= window:
                seen[i, j] = seen[i, length + j] = seen[length + i, length + j] = False
    return seen


def slow_logits(idlm: Idlm, document: Document, block_size: int) -> tuple[Tensor, Tensor]:
    """Logits of both halves [length, V] by one forward over the full layout of one document."""
    text, length = document.tokens, len(document.tokens)
    masks = sorted(document.in_answers)
    noisy = [idlm.mask_id if i in document.in_answers else token for i, token in enumerate(text)]
    # the gate wants the MASK rows side by side, and attention does not mind their order
    order = torch.tensor(masks + [i for i in range(2 * length) if i not in document.in_answers])
    window = getattr(idlm.model.config, "sliding_window", None)
    seen = full_layout_mask(
        document.answers, length, block_size, document.phase % block_size, window
    )
    hidden = idlm.hidden(
        torch.tensor(noisy + text)[order][None],
        torch.arange(length).repeat(2)[order][None],
        seen[order][:, order][None, None],
        slice(0, len(masks)),
    )
    rows = torch.cat([idlm.head(hidden), hidden], dim=2)[0][order.argsort()]
    logits = list(rows[:, : idlm.vocab_size])
    if 0 in idlm.draft_heads:  # each MASK row is given the text's token at its place
        for i in document.masked:
            logits[i] = slow_head(idlm)(rows[i], text[i])
    logits = torch.stack(logits)
    if idlm.mask_id < idlm.vocab_size:
        logits = logits.index_fill(-1, torch.tensor(idlm.mask_id), EXCLUDED)
    return logits[:length], logits[length:]


def slow_terms(idlm: Idlm, batch: Texts, block_size: int) -> tuple[Tensor, ...]:
    """The sum of CE_clean, and CE, KL and TV of each MASK row; one token at a time."""
    clean_sum = zero = torch.zeros((), dtype=torch.float64)
    ce, kl, tv = [], [], []
    for document in documents(batch):
        text = document.tokens
        noisy, clean = slow_logits(idlm, document, block_size)
        for i in range(len(text) - 1):
            target = text[i + 1]
            if i + 1 in document.in_answers:
                clean_sum = clean_sum - clean[i].softmax(-1)[target].log()
            if i in document.masked:
                p, q = clean[i].softmax(-1).detach(), noisy[i].softmax(-1)
                ce.append(-q[target].log())
                kl.append(zero)
                tv.append(zero)
                for v in range(len(p)):
                    if p[v] > 0:
                        kl[-1] = kl[-1] + p[v] * (p[v].log() - q[v].log())
                    tv[-1] = tv[-1] + (p[v] - q[v]).abs() / 2
    return clean_sum, *(torch.stack(rows) if rows else zero[None][:0] for rows in (ce, kl, tv))


def slow_depths(document: Document, block_size: int) -> list[int]:
    """The draft depth 1..b of each MASK row: its place in its block or in its answer."""
    found: list[int] = []
    for start, stop in document.answers:
        for i in range(start, stop - 1):
            new = i == start or (i + document.phase) % block_size == 0
            found.append(1 if new else found[-1] + 1)
    return found


def hidden_of(
    objective: Objective, texts: Texts, block_size: int
) -> tuple[MaskRows | None, Tensor, Tensor]:
    """The MASK rows and their hidden states (none for block size 0), and the hidden states of the
    supervised clean rows."""
    half, clean = objective.clean_half(texts)
    if not block_size:
        return None, clean[:0], clean
    rows = mask_rows(texts, block_size)
    return rows, objective.mask_half(half, rows), clean


def gradients(idlm: Idlm, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each trained parameter by name."""
    modules = [idlm.model, *idlm.draft_heads.values()]
    names = {
        f"{name} of {type(module).__name__}": p
        for module in modules
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    found = torch.autograd.grad(loss, list(names.values()))
    return dict(zip(names, found, strict=True))


def equals_the_loops(idlm: Idlm, method: str, texts: Texts, wanted: Wanted) -> None:
    """Loss, terms and every gradient of the objective are those of the double loops."""
    fast = Objective(idlm, trains_clean=method == "full")(texts, wanted)
    clean, *rows = slow_terms(idlm, texts, wanted.block_size)
    terms = [row.sum() for row in rows]
    weights = (wanted.weights.ce, wanted.weights.kl, wanted.weights.tv)
    noisy = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    for mine, reference in zip(fast, (noisy, clean, *terms), strict=True):
        assert mine.item() == pytest.approx(reference.item(), rel=1e-12)

    def total(noisy: Tensor, clean: Tensor) -> Tensor:
        # the clean rows of a gated LoRA are the frozen base: no gradient flows there in either form
        return noisy + (0.2 * clean if method == "full" else 0.0)

    expected = gradients(idlm, total(noisy, clean))
    assert len(expected) > 5
    for name, mine in gradients(idlm, total(fast.noisy, fast.clean)).items():
        assert mine.abs().max() > 0, name
        torch.testing.assert_close(mine, expected[name], rtol=1e-9, atol=1e-11)
