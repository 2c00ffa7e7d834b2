"""The verification rules give exactly the law p: enumerated exactly, then end to end with a stated false-alarm rate."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm import SamplingParams
from idlm.decoding import reference
from idlm.decoding.law import law
from idlm.decoding.verify import coupled, ratio, relaxed, residual
from tests.decoding.toy import Toy

V = 5
FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.5, top_k=3),
    SamplingParams(temperature=1.4, top_p=0.7),
    SamplingParams(min_p=0.2, logit_bias={1: 1.0}),
    SamplingParams(temperature=0),
]


def laws(seed: int, params_p: SamplingParams, params_q: SamplingParams) -> tuple[Tensor, Tensor]:
    """A random p [2, V] (the draft's and the bonus row) and q [1, V], float64."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    return law(logits[:2], params_p), law(logits[2:], params_q)


def emitted_by_ratio(log_p: Tensor, log_q: Tensor, drawn_from: Tensor) -> Tensor:
    """The exact law of the first token that `ratio` emits when drafts are drawn from `drawn_from` [V].

    The acceptance threshold is found by bisection on `ratio` itself, the replacement by its residual.
    """
    emitted = torch.zeros(V, dtype=torch.float64)
    rest = residual(log_p, log_q)[0].softmax(dim=-1)
    for draft in torch.nonzero(drawn_from).flatten().tolist():
        chance = acceptance_chance(log_p, log_q, draft)
        emitted[draft] += drawn_from[draft] * chance
        emitted += drawn_from[draft] * (1 - chance) * rest
    return emitted


def acceptance_chance(log_p: Tensor, log_q: Tensor, draft: int) -> float:
    """The share of uniform numbers with which `ratio` accepts `draft`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        verdict = ratio(
            log_p, torch.tensor([draft]), log_q, torch.tensor([middle], dtype=torch.float64), torch.zeros(2, V)
        )
        low, high = (middle, high) if int(verdict.accepted) else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize("params", FILTERS)
@pytest.mark.parametrize("seed", range(8))
def test_ratio_gives_exactly_p(params: SamplingParams, seed: int) -> None:
    log_p, log_q = laws(seed, params, params)
    assert (emitted_by_ratio(log_p, log_q, log_q[0].exp()) - log_p[0].exp()).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_argmax_drafts_under_the_ratio_rule_fail_this_test(seed: int) -> None:
    """What the published implementation does: draft by argmax, then accept as if q had been sampled."""
    log_p, log_q = laws(seed, SamplingParams(), SamplingParams())
    argmax = torch.nn.functional.one_hot(log_q[0].argmax(), V).to(torch.float64)
    assert (emitted_by_ratio(log_p, log_q, argmax) - log_p[0].exp()).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(8))
def test_a_filter_on_one_law_only_fails_this_test(seed: int) -> None:
    """Drafts drawn from the filtered q, but judged by the unfiltered one."""
    log_p, log_q = laws(seed, SamplingParams(), SamplingParams())
    _, filtered = laws(seed, SamplingParams(), SamplingParams(top_k=2))
    assert (emitted_by_ratio(log_p, log_q, filtered[0].exp()) - log_p[0].exp()).abs().max() > 1e-3


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from(FILTERS))
def test_coupled_emits_the_ar_tokens_whatever_the_drafts(seed: int, depth: int, params: SamplingParams) -> None:
    random = torch.Generator().manual_seed(seed)
    log_p = law(torch.randn(depth + 1, V, generator=random, dtype=torch.float64) * 2, params)
    noise = torch.randn(depth + 1, V, generator=random, dtype=torch.float64) * (0 if params.greedy else 1)
    drafts = torch.randint(V, (depth,), generator=random)
    verdict = coupled(log_p, drafts, noise)
    tokens = (log_p + noise).argmax(dim=-1).tolist()
    stood = int(verdict.accepted)
    assert [*drafts[:stood].tolist(), int(verdict.token)] == tokens[: stood + 1]
    assert stood == depth or drafts[stood] != tokens[stood]


def test_relaxed_accepts_more_and_only_likely_drafts() -> None:
    log_p = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64).log()
    noise = torch.zeros(2, 3)
    assert int(relaxed(log_p, torch.tensor([1]), noise, tau=0.7).accepted) == 1
    assert int(relaxed(log_p, torch.tensor([2]), noise, tau=0.7).accepted) == 0
    assert int(coupled(log_p, torch.tensor([1]), noise).accepted) == 0


LENGTH = 3
RUNS = 2_500


def exact_sequences(toy: Toy, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every output of LENGTH tokens under AR's own law."""
    chances = {}
    for tokens in itertools.product(range(toy.vocab_size), repeat=LENGTH):
        text, log_chance = list(prompt), 0.0
        for token in tokens:
            rows = torch.ones(len(text), len(text)).tril() > 0
            logits = toy(torch.tensor(text), torch.arange(len(text)), rows)[-1:]
            log_chance += float(law(logits, params)[0, token])
            text.append(token)
        chances[tokens] = math.exp(log_chance)
    return chances


def worst_deviation(toy: Toy, params: SamplingParams, runs: int) -> tuple[float, float]:
    """The largest deviation of a sequence's frequency from its probability, in units of its bound; and the level.

    Bernstein's inequality bounds P(|freq - p| > t) by 2 exp(-n t^2 / (2 p (1 - p) + 2 t / 3)); t solves it for
    1e-6 / (number of sequences), so that by the union bound the whole test has a false-alarm rate of at most 1e-6.
    """
    chances = exact_sequences(toy, [1, 0], params)
    counts = dict.fromkeys(chances, 0)
    for seed in range(runs):
        decoded = reference.isd(toy, [1, 0], params, toy.mask_id, stride=3, seed=seed)
        counts[tuple(decoded.tokens)] += 1
    rate = math.log(2 * len(chances) / 1e-6)
    worst = 0.0
    for tokens, p in chances.items():
        bound = (rate / 3 + math.sqrt(rate**2 / 9 + 2 * runs * rate * p * (1 - p))) / runs
        worst = max(worst, abs(counts[tokens] / runs - p) / bound)
    return worst, rate


@pytest.mark.parametrize("verification", ["coupled", "ratio"])
def test_isd_gives_the_law_of_ar_end_to_end(verification: str) -> None:
    """All 27 outputs of 3 tokens over 3; false-alarm rate at most 1e-6 (see `worst_deviation`)."""
    params = SamplingParams(max_tokens=LENGTH, temperature=0.9, top_p=0.95, verification=verification)
    assert worst_deviation(Toy(3, seed=3, sharpness=0.7), params, RUNS)[0] < 1


def test_argmax_drafts_fail_the_end_to_end_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test with drafts taken by argmax and judged by the ratio rule: it must fail."""
    monkeypatch.setattr(reference, "_draft", argmax_drafts)
    params = SamplingParams(max_tokens=LENGTH, temperature=0.9, top_p=0.95, verification="ratio")
    assert worst_deviation(Toy(3, seed=3, sharpness=0.7), params, RUNS)[0] > 1


def argmax_drafts(request: reference._Request, output: list[int], logits: Tensor) -> tuple[list[int], list[Tensor]]:
    """Drafts as the published implementation takes them."""
    log_q = [request.law(row, output) for row in logits]
    return [int(row.argmax()) for row in log_q], log_q
