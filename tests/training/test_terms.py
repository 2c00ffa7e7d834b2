"""The terms of the loss against loops over single numbers, and their gradient against autograd's;
in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from idlm.training import terms
from idlm.training.terms import Laws, weighted_terms

ROWS, COLUMNS, EXCLUDED = 5, 7, 1
TARGET = torch.tensor([0, 2, 6, 3, 0])


def random_logits() -> Tensor:
    """The logits of MASK rows and of their teachers."""
    torch.manual_seed(0)
    return torch.randn(2, ROWS, COLUMNS, dtype=torch.float64)


def plain(logits: Tensor, laws: Laws, weights: Tensor) -> Tensor:
    """The weighted sum by ordinary operations."""
    q, *teachers = (
        each.index_fill(1, torch.tensor(EXCLUDED), terms.EXCLUDED).log_softmax(1)
        for each in (logits, laws.teacher)
        if each is not None
    )
    found = [-q.gather(1, laws.target[:, None])[:, 0]]
    for p in teachers:
        found += [(p.exp() * (p - q)).sum(1), 0.5 * (p.exp() - q.exp()).abs().sum(1)]
    return (torch.stack(found, dim=1) * weights).sum()


def test_terms_are_their_definitions() -> None:
    logits, teacher = random_logits()
    laws = Laws(TARGET, teacher, EXCLUDED)
    for i in range(ROWS):
        _, (ce, kl, tv) = weighted_terms(
            logits[i : i + 1], laws.part(slice(i, i + 1)), torch.ones(1, 3, dtype=torch.float64)
        )
        odds = [[math.exp(x) for x in each[i].tolist()] for each in (logits, teacher)]
        for each in odds:
            each[EXCLUDED] = 0.0
        q, p = ([x / sum(each) for x in each] for each in odds)
        pairs = [(a, b) for a, b in zip(p, q, strict=True) if a > 0]
        assert ce.item() == pytest.approx(-math.log(q[TARGET[i]]), rel=1e-12)
        assert kl.item() == pytest.approx(sum(a * math.log(a / b) for a, b in pairs), rel=1e-12)
        assert tv.item() == pytest.approx(1 - sum(min(a, b) for a, b in pairs), rel=1e-12)


@pytest.mark.parametrize("block", [1, 2 * COLUMNS, 2**17])
@pytest.mark.parametrize("soft", [True, False])
def test_the_gradient_is_that_of_autograd(
    soft: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terms, "BLOCK", block)
    logits, teacher = random_logits()
    laws = Laws(TARGET, teacher if soft else None, EXCLUDED)
    weights = torch.rand(ROWS, laws.terms, dtype=torch.float64)
    logits.requires_grad_()
    (mine, _), theirs = weighted_terms(logits, laws, weights), plain(logits, laws, weights)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-13)
    one, other = (torch.autograd.grad(3 * each, logits)[0] for each in (mine, theirs))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    assert not one[:, EXCLUDED].any()


def test_the_sums_of_bfloat16_training_are_in_float32() -> None:
    logits, teacher = random_logits().float()
    laws, weights = Laws(TARGET, teacher.bfloat16(), None), torch.ones(ROWS, 3)
    expected = weighted_terms(logits, laws, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = weighted_terms(logits, laws, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
