"""Lookup drafts: found as the oracle finds them, and judged so that the law stays exact."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm import SamplingParams
from idlm.decoding import reference
from idlm.decoding.lookup import LONGEST, PRIOR, RunningMatches, look_up, tokens_after
from tests.decoding.laws import fast_law
from tests.decoding.test_verify import (
    FILTERS,
    LENGTH,
    RATIO,
    Accepts,
    Residual,
    V,
    acceptance_chance,
    exact_sequences,
)
from tests.decoding.toy import Toy

DEPTH = 5
RUNS = 600
texts = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), st.integers(0, 99))
def test_a_batch_finds_what_the_oracle_finds(batch: list[list[int]], seed: int) -> None:
    """Small vocabularies give many matches of each length. Columns past a text hold anything."""
    chance = random.Random(seed)
    width = max(2, *map(len, batch)) + chance.randrange(3)
    rows = [text + [chance.randrange(3) for _ in range(width - len(text))] for text in batch]
    lengths = torch.tensor([len(text) for text in batch])
    found = look_up(torch.tensor(rows, dtype=torch.int32), lengths, DEPTH)
    for text, matched, drafts in zip(batch, found.matched.tolist(), found.drafts, strict=True):
        expected, tokens = reference.look_up(text, DEPTH)
        assert matched == expected
        assert not matched or drafts.tolist() == tokens


@pytest.mark.parametrize(
    ("text", "matched", "drafts"),
    [
        ([5], 0, []),
        ([5, 6, 7], 0, []),
        ([5, 6, 5], 1, [6, 5, 6, 5, 6]),
        ([1, 2, 8, 9, 1, 2, 7, 9, 1, 2], 3, [7, 9, 1, 2, 7]),  # 9 1 2: the longest
        ([1, 2, 8, 0, 1, 2, 7, 9, 1, 2], 2, [7, 9, 1, 2, 7]),  # of two matches the last
        ([4] * 20, LONGEST, [4] * 5),
    ],
)
def test_the_longest_match_and_of_equals_the_last(
    text: list[int], matched: int, drafts: list[int]
) -> None:
    assert reference.look_up(text, DEPTH) == (matched, drafts)


@pytest.mark.parametrize("rule", RATIO, ids=["oracle", "batch"])
@pytest.mark.parametrize("params", FILTERS)
@pytest.mark.parametrize("seed", range(3))
def test_the_ratio_rule_gives_exactly_p_for_any_point_mass(
    rule: tuple[Accepts, Residual], params: SamplingParams, seed: int
) -> None:
    """Each token in turn is the draft: accepted with probability p, else replaced by the rest."""
    random_logits = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, V, generator=random_logits, dtype=torch.float64) * 2
    log_p = torch.stack([fast_law(row, params, V) for row in logits])
    for draft in range(V):
        log_q = torch.full((1, V), -math.inf, dtype=torch.float64)
        log_q[0, draft] = 0.0
        accepts, residual = rule
        chance = acceptance_chance(accepts, log_p, log_q, draft)
        assert chance == pytest.approx(float(log_p[0, draft].exp()), abs=1e-12)
        emitted = (1 - chance) * residual(log_p[0], log_q[0]).softmax(dim=-1)
        emitted[draft] += chance
        assert (emitted - log_p[0].exp()).abs().max() < 1e-12


def worst_deviation(params: SamplingParams, runs: int) -> float:
    """As in `test_verify`, with lookup drafts: the prompt repeats, so that most steps have some."""
    toy, prompt = Toy(3, seed=3, sharpness=0.7), [1, 0, 2, 1, 0]
    chances, drafted = exact_sequences(toy, prompt, params), 0
    counts = dict.fromkeys(chances, 0)
    for seed in range(runs):
        request = reference.Request(prompt, params, toy.mask_id, seed=seed)
        decoded = reference.isd(toy, request, 3, "lookup", long=1)
        counts[tuple(decoded.tokens)] += 1
        drafted += sum(decoded.reached)
    assert drafted > runs
    rate = math.log(2 * len(chances) / 1e-6)
    return max(
        abs(counts[tokens] / runs - p)
        / ((rate / 3 + math.sqrt(rate**2 / 9 + 2 * runs * rate * p * (1 - p))) / runs)
        for tokens, p in chances.items()
    )


@pytest.mark.parametrize("verification", ["coupled", "ratio"])
def test_lookup_drafts_give_the_law_of_ar_end_to_end(verification: str) -> None:
    """All 27 outputs of 3 tokens over 3; false-alarm rate at most 1e-6."""
    params = SamplingParams(max_tokens=LENGTH, temperature=0.9, verification=verification)
    assert worst_deviation(params, RUNS) < 1


def test_lookup_drafts_judged_as_if_drawn_from_p_fail_the_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With q = p every draft is accepted, which is wrong for drafts that were not drawn."""

    def flat(request: reference.Request, output: list[int], depth: int, size: int) -> object:
        matched, drafts = reference.look_up([*request.prompt, *output], depth)
        return matched, (drafts, [torch.full((size,), -math.log(size))] * len(drafts))

    monkeypatch.setattr(reference.Request, "look_up", flat)
    params = SamplingParams(max_tokens=LENGTH, temperature=0.9, verification="ratio")
    assert worst_deviation(params, RUNS) > 1


def test_the_chances_are_learnt_by_the_length_of_the_match() -> None:
    running, truth, chance = RunningMatches(), [k / 10 for k in range(1, 9)], random.Random(0)
    assert running.values == pytest.approx(PRIOR)
    for _ in range(4000):
        matched, reached, alive = chance.randint(1, LONGEST), 0, True
        while alive and reached < 4:
            alive = chance.random() < truth[min(matched + reached, LONGEST) - 1]
            reached += 1
        running.update(matched, reached, reached - (not alive))
    # the prior keeps a weight of 8 against 50 recent drafts
    expected = [(50 * t + 8 * p) / 58 for t, p in zip(truth, PRIOR, strict=True)]
    assert running.values == pytest.approx(expected, abs=0.15)


def test_expected_tokens_of_a_step() -> None:
    chances = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert tokens_after({2: 1}, chances, 2) == pytest.approx([1, 1.2, 1 + 0.2 + 0.2 * 0.3])
    long = [1 + sum(0.8**k for k in range(1, n + 1)) for n in range(4)]
    assert tokens_after({8: 2}, chances, 3) == pytest.approx([2 * tokens for tokens in long])
    both = tokens_after({2: 1, 8: 2}, chances, 2)
    assert both[2] == pytest.approx(1 + 0.2 + 0.06 + 2 * long[2])
