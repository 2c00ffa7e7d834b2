"""The law, batched and the oracle's, against filters written token by token and transformers'
processors."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from idlm import InputError, SamplingParams
from idlm.decoding.law import Law, history
from idlm.decoding.settings import Features, Settings
from tests.decoding.laws import BOTH, batch_of_one, fast_law, slow_law

V = 12


def by_definition(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int], mask_id: int
) -> list[float]:
    """One row, in Python floats, straight from the definitions."""
    scores = list(logits)
    for token in range(V):
        if token in prompt or token in output:
            rate = params.repetition_penalty
            scores[token] = scores[token] / rate if scores[token] > 0 else scores[token] * rate
        scores[token] -= params.frequency_penalty * output.count(
            token
        ) + params.presence_penalty * (token in output)
        scores[token] += params.logit_bias.get(token, 0.0)
        if token in params.banned_tokens or token == mask_id:
            scores[token] = -math.inf
    if params.temperature == 0:
        best = scores.index(max(scores))
        return [1.0 if token == best else 0.0 for token in range(V)]
    weights = [math.exp(score / params.temperature) for score in scores]
    keep = sorted(range(V), key=lambda token: -weights[token])
    if params.top_k > 0:
        kth = weights[keep[min(params.top_k, V) - 1]]
        keep = [token for token in keep if weights[token] >= kth]
    total, before, nucleus = sum(weights[token] for token in keep), 0.0, []
    for token in keep:
        if before >= params.top_p and nucleus:
            break
        nucleus.append(token)
        before += weights[token] / total
    kept = sum(weights[token] for token in nucleus)
    floor = params.min_p * weights[nucleus[0]] / kept
    nucleus = [token for token in nucleus if weights[token] / kept >= floor]
    kept = sum(weights[token] for token in nucleus)
    return [weights[token] / kept if token in nucleus else 0.0 for token in range(V)]


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[float], SamplingParams, list[int], list[int]]:
    tokens = st.lists(st.integers(0, V - 2), max_size=8)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, -1, 1, 3, 100])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.5, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.1, 0.6])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4, -0.2])),
        logit_bias=draw(st.sampled_from([{}, {1: 3.0, 4: -2.0}])),
        banned_tokens=draw(st.sampled_from([(), (0, 5)])),
    )
    seed = draw(st.integers(0, 2**31))
    logits = torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return logits.tolist(), params, draw(tokens), draw(tokens)


@pytest.mark.parametrize("law", BOTH)
@settings(max_examples=400, deadline=None)
@given(request=requests())
def test_law_equals_the_definitions(
    law: Callable[..., Tensor], request: tuple[list[float], SamplingParams, list[int], list[int]]
) -> None:
    logits, params, prompt, output = request
    mask_id = V - 1
    row = torch.tensor(logits, dtype=torch.float64)
    ours = law(row, params, mask_id, prompt, output).exp()
    expected = torch.tensor(
        by_definition(logits, params, prompt, output, mask_id), dtype=torch.float64
    )
    assert torch.allclose(ours, expected, atol=1e-12, rtol=0)
    assert ours[mask_id] == 0


@pytest.mark.parametrize("law", BOTH)
@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p", [(0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1, 6, 0.7, 0.2)]
)
def test_law_equals_transformers_processors(
    law: Callable[..., Tensor], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    torch.manual_seed(0)
    logits, prompt = torch.randn(6, V, dtype=torch.float64) * 2, [1, 2, 3]
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=1.4
    )
    processors = [
        RepetitionPenaltyLogitsProcessor(1.4),
        TemperatureLogitsWarper(float(temperature)),
    ]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [MinPLogitsWarper(min_p)] if min_p else []
    scores = logits
    for processor in processors:
        scores = processor(torch.tensor([prompt] * 6), scores)
    rows = torch.stack([law(row, params, V, prompt) for row in logits])
    assert torch.allclose(rows.exp(), scores.softmax(dim=-1), atol=1e-12)


def test_history_of_a_draft_counts_the_drafts_before_it() -> None:
    law = batch_of_one(SamplingParams(presence_penalty=1.0), 5, 5, [1], [2, 2])
    seen, counts = history(law.settings, torch.tensor([[3, 2]]), rows=3)
    assert counts[0].tolist() == [[0, 0, 2, 0, 0], [0, 0, 2, 1, 0], [0, 0, 3, 1, 0]]
    assert seen[0].int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0]]
    last_seen, last_counts = history(law.settings, torch.tensor([[3, 2]]), rows=1)
    assert torch.equal(last_seen, seen[:, 2:]) and torch.equal(last_counts, counts[:, 2:])


def test_logits_are_left_alone() -> None:
    """By the oracle; the batched law writes to the column of MASK, and to no other."""
    params = SamplingParams(logit_bias={1: 5.0}, banned_tokens=(2,), presence_penalty=0.5, top_k=2)
    logits = torch.zeros(4)
    slow_law(logits, params, 3, [0])
    assert torch.equal(logits, torch.zeros(4))
    fast_law(logits, params, 4, [0])
    assert torch.equal(logits, torch.zeros(4))
    fast_law(logits, params, 3, [0])
    assert logits.tolist() == [0, 0, 0, -math.inf]


@pytest.mark.parametrize("ahead", [None, torch.tensor([[1]])])
def test_penalties_without_history_are_a_bug(ahead: Tensor | None) -> None:
    law = Law(Settings.empty(1, 4, 4), Features(penalised=True))
    with pytest.raises(ValueError, match="history"):
        law.scores(torch.zeros(1, 1, 4), torch.tensor([0]), ahead)
    law = batch_of_one(SamplingParams(presence_penalty=1.0), 4, 4)
    with pytest.raises(ValueError, match="history"):
        law.scores(torch.zeros(1, 1, 4), torch.tensor([0]))


@pytest.mark.parametrize("name", ["logit_bias", "banned_tokens", "stop_token_ids"])
def test_ids_outside_the_vocabulary_are_refused(name: str) -> None:
    params = SamplingParams(**{name: {9: 1.0} if name == "logit_bias" else (9,)})
    params.check_vocabulary(10)
    with pytest.raises(InputError, match=f"{name} names token 9"):
        params.check_vocabulary(9)
