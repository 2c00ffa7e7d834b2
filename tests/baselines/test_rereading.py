"""The two laws of a clean text, against forwards of one row each."""

from __future__ import annotations

import pytest
import torch

from idlm.baselines.rereading import (
    left_to_right,
    noisy_and_clean,
    reference_mask,
    reference_tokens,
)
from tests.baselines.slow import probabilities
from tests.training import tiny
from tests.training.test_diffusion import BLOCK, slow_block_mask

TEXT, FIRST = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 2


def law_of(logits: torch.Tensor) -> torch.Tensor:
    return logits.index_fill(-1, torch.tensor(tiny.MASK), -torch.inf).softmax(-1)


def test_masks_are_those_of_the_loops() -> None:
    number = torch.arange(6) // BLOCK
    assert torch.equal(noisy_and_clean(number), slow_block_mask(6))
    found = reference_mask(number)
    for query in range(18):
        for key in range(18):
            (kind, i), (other, j) = divmod(query, 6), divmod(key, 6)
            earlier, same = j // BLOCK < i // BLOCK, j // BLOCK == i // BLOCK
            wanted = {
                (0, 0): earlier or same,
                (1, 0): earlier,
                (2, 0): earlier,
                (1, 1): same and j <= i,
                (2, 1): same and j < i,
                (2, 2): i == j,
            }.get((kind, other), False)
            assert bool(found[query, key]) == wanted, (query, key)


@pytest.mark.parametrize("block", [1, 3, 4, None])
def test_left_to_right_masks_the_rest(block: int | None) -> None:
    idlm, end = tiny.model(), 14
    found = left_to_right(idlm, TEXT, FIRST, block, end)
    for at in range(FIRST, len(TEXT)):
        stop = end if block is None else (at // block + 1) * block
        text = TEXT[:at] + [tiny.MASK] * (stop - at)
        law = probabilities(idlm, text, lambda i, j: block is None or j // block <= i // block)
        torch.testing.assert_close(law_of(found[at - FIRST]), law[at])


@pytest.mark.parametrize("block", [1, 3, 4, None])
def test_reference_rows_see_no_later_token(block: int | None) -> None:
    """A MASK row is that of its text without what follows, read causally in its block."""
    idlm = tiny.model()
    found = reference_tokens(idlm, TEXT, FIRST, block)

    def number(at: int) -> int:
        return int(at >= FIRST) if block is None else at // block

    for at in range(FIRST, len(TEXT)):

        def sees(i: int, j: int, at: int = at) -> bool:
            causal = number(i) == number(at) and number(j) == number(at)
            return j <= i if causal else number(j) <= number(i)

        law = probabilities(idlm, TEXT[:at] + [tiny.MASK], sees)
        torch.testing.assert_close(law_of(found[at - FIRST]), law[at])


def test_with_blocks_of_one_both_are_the_same() -> None:
    idlm = tiny.model()
    both = left_to_right(idlm, TEXT, FIRST, 1), reference_tokens(idlm, TEXT, FIRST, 1)
    torch.testing.assert_close(*both)
