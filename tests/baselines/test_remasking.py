"""The rules that choose tokens, by hand."""

from __future__ import annotations

import pytest
import torch

from idlm.baselines.remasking import Step, committed, edited, transfer_counts


def test_steps_share_the_tokens() -> None:
    assert transfer_counts(4, 4) == [1, 1, 1, 1]
    assert transfer_counts(32, 5) == [7, 7, 6, 6, 6]
    assert transfer_counts(3, 4) == [1, 1, 1, 0]


STEP = Step(
    masked=torch.tensor([[True, False, True, True], [True, True, False, True]]),
    drawn=torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]]),
    probability=torch.tensor([[0.2, 0.99, 0.95, 0.91], [0.3, 0.6, 0.99, 0.4]]),
    entropy=torch.tensor([[0.9, 0.0, 0.2, 0.25], [2.0, 1.0, 0.0, 1.5]]),
)


@pytest.mark.parametrize(
    ("strategy", "threshold", "count", "places"),
    [
        ("sequential", 0.0, 1, ([0], [0])),
        ("sequential", 0.0, 2, ([0, 2], [0, 1])),
        ("static", 0.0, 1, ([2], [1])),
        ("static", 0.0, 2, ([2, 3], [1, 3])),
        ("dynamic", 0.9, 1, ([2, 3], [1])),  # both confident; none is, so the best one
        ("dynamic", 0.92, 2, ([2, 3], [1, 3])),  # one confident, fewer than two: the best two
        ("dynamic", 0.1, 1, ([0, 2, 3], [0, 1, 3])),
        ("dynamic", 0.1, 4, ([0, 2, 3], [0, 1, 3])),  # no more than there are
        ("entropy", 0.45, 1, ([2, 3], [1])),  # .2 + .25; at least one
        ("entropy", 2.5, 1, ([0, 2, 3], [1, 3])),
    ],
)
def test_strategies(strategy, threshold: float, count: int, places) -> None:
    counts = torch.tensor([count, count])
    found = committed(STEP, counts, strategy, threshold)
    assert tuple(row.nonzero().flatten().tolist() for row in found) == places


def test_of_equal_ones_the_first() -> None:
    even = STEP._replace(probability=torch.full((2, 4), 0.5))
    found = committed(even, torch.tensor([1, 2]), "static", 0.0)
    assert [row.nonzero().flatten().tolist() for row in found] == [[0], [0, 1]]


def test_two_thresholds() -> None:
    tokens = torch.tensor([[22, 3, 22, 22], [22, 22, 7, 22]])
    editable = torch.tensor([[True] * 4, [True] * 4])
    unmasked, replaced = edited(STEP, tokens, editable, unmask=0.9, edit=0.98)
    assert [row.nonzero().flatten().tolist() for row in unmasked] == [[2, 3], [1]]
    assert [row.nonzero().flatten().tolist() for row in replaced] == [[1], []]  # 7 stays 7
    fixed = editable & ~torch.tensor([[False, True, False, False]])
    assert not edited(STEP, tokens, fixed, 0.9, 0.98)[1].any()
    assert not edited(STEP, tokens, editable, 0.9, 1.0)[1].any()
