"""Bad words, allowed tokens, and what is left when everything is banned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from idlm import SamplingParams
from idlm.decoding import reference
from tests.decoding.laws import BOTH
from tests.decoding.toy import Toy

V = 5


def possible(law: Callable[..., Tensor], output: Sequence[int], **fields: Any) -> list[int]:
    log_p = law(torch.zeros(V), SamplingParams(**fields), V, [1, 2], list(output))
    return (log_p > -torch.inf).nonzero().flatten().tolist()


@pytest.mark.parametrize("law", BOTH)
@pytest.mark.parametrize(
    "words, output, banned",
    [
        ([(3,)], [], {3}),
        ([(1, 3)], [], set()),
        ([(2, 3)], [], set()),  # the prompt ends with 2: a word has to be in the output as a whole
        ([(1, 3)], [1], {3}),
        ([(1, 3)], [1, 2], set()),
        ([(1, 3), (0, 1, 2), (1, 4)], [0, 1], {2, 3, 4}),
        ([(1, 1)], [1], {1}),
        ([tuple(range(4)) * 4], list(range(4)) * 3 + [0, 1, 2], {3}),
        ([tuple(range(4)) * 4], list(range(4)) * 2 + [0, 1, 2], set()),
    ],
)
def test_the_last_token_of_a_bad_word_is_banned(
    law: Callable[..., Tensor],
    words: list[tuple[int, ...]],
    output: list[int],
    banned: set[int],
) -> None:
    assert set(range(V)) - set(possible(law, output, bad_words=words)) == banned


@pytest.mark.parametrize("law", BOTH)
def test_only_allowed_tokens_are_possible(law: Callable[..., Tensor]) -> None:
    assert possible(law, [], allowed_token_ids=[1, 4]) == [1, 4]
    assert possible(law, [], allowed_token_ids=[1, 4], banned_tokens=[4]) == [1]
    assert possible(law, [], allowed_token_ids=[1, 4], logit_bias={2: 100.0, 1: -3.0}) == [1, 4]


@pytest.mark.parametrize("branches", ["all", "chain", (0, 2)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_isd_never_writes_a_bad_word(branches: Any, temperature: float, seed: int) -> None:
    toy = Toy(V, seed=seed)
    free = SamplingParams(max_tokens=14, temperature=temperature)
    text = reference.ar(toy, reference.Request([0], free, V, (), seed)).tokens
    words = (tuple(text[3:6]), tuple(text[8:10]))
    params = SamplingParams(max_tokens=14, temperature=temperature, bad_words=words)
    request = reference.Request([0], params, V, (), seed)
    expected = reference.ar(toy, request).tokens
    assert expected != text
    assert not any(
        tuple(expected[at : at + len(word)]) == word for word in words for at in range(14)
    )
    assert reference.isd(toy, request, 4, branches).tokens == expected


@pytest.mark.parametrize("stride", [1, 4])
def test_an_output_ends_before_a_place_without_tokens(stride: int) -> None:
    toy = Toy(V)
    words = [(a, b) for a in (0, 1) for b in (0, 1)]
    params = SamplingParams(max_tokens=9, allowed_token_ids=[0, 1], bad_words=words)
    decoded = reference.isd(toy, reference.Request([2], params, V), stride)
    assert decoded.stuck and len(decoded.tokens) == 1 and decoded.tokens[0] in (0, 1)
