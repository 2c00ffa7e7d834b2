"""min_tokens: the stop ids are held back, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from idlm import SamplingParams
from idlm.decoding.reference import Request, ar, isd
from tests.decoding.laws import BOTH
from tests.decoding.toy import Toy

V, STOPS = 4, (1, 2)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_no_stop_id_comes_out_before_min_tokens(temperature: float, seed: int) -> None:
    toy = Toy(V, seed=seed)
    free = SamplingParams(max_tokens=9, temperature=temperature)
    held = SamplingParams(max_tokens=9, temperature=temperature, min_tokens=5)
    tokens = ar(toy, Request([0], held, V, STOPS, seed)).tokens
    assert not set(STOPS) & set(tokens[:5]) and len(tokens) >= 5
    banned = SamplingParams(max_tokens=5, temperature=temperature, banned_tokens=STOPS)
    assert tokens[:5] == ar(toy, Request([0], banned, V, (), seed)).tokens
    rest = ar(toy, Request([0, *tokens[:5]], free, V, STOPS, seed)).tokens
    assert rest[: len(tokens) - 5] == tokens[5:]


@pytest.mark.parametrize("branches", ["all", "chain"])
@pytest.mark.parametrize("seed", range(6))
def test_drafts_count_towards_min_tokens(branches: str, seed: int) -> None:
    toy = Toy(V, seed=seed)
    params = SamplingParams(max_tokens=9, temperature=0.8, min_tokens=4)
    request = Request([0], params, V, STOPS, seed)
    assert isd(toy, request, 4, branches).tokens == ar(toy, request).tokens


@pytest.mark.parametrize("law", BOTH)
def test_held_back_ids_have_no_probability(law: Callable[..., Tensor]) -> None:
    params = SamplingParams(logit_bias={1: 50.0}, min_tokens=2)
    held = law(torch.zeros(V), params, V, [0], [3], stop_ids=STOPS)
    assert held.exp().tolist() == pytest.approx([0.5, 0, 0, 0.5])
    free = law(torch.zeros(V), params, V, [0], [3, 3], stop_ids=STOPS)
    assert free.exp().tolist() == pytest.approx([0, 1, 0, 0])
