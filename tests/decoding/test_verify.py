"""The verification rules give exactly the law p: enumerated exactly, then end to end with a stated
false-alarm rate."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm import SamplingParams
from idlm.decoding import law, reference, verify
from idlm.decoding.verify import Drafts
from tests.decoding.laws import batch_of_one, fast_law
from tests.decoding.toy import Toy

V = 5
FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.5, top_k=3),
    SamplingParams(temperature=1.4, top_p=0.7),
    SamplingParams(min_p=0.2, logit_bias={1: 1.0}),
    SamplingParams(temperature=0),
]


Accepts = Callable[[Tensor, Tensor, int, float], bool]
"""Whether a rule accepts a draft, given log p [2, V] (the draft's row and the bonus), log q [1, V],
and a chance."""


def oracle_accepts(log_p: Tensor, log_q: Tensor, draft: int, chance: float) -> bool:
    return reference.ratio(log_p[0], draft, log_q[0], chance, torch.zeros(V)) is None


def batch_accepts(log_p: Tensor, log_q: Tensor, draft: int, chance: float) -> bool:
    alone = batch_of_one(SamplingParams(verification="ratio"), V, V)
    drafts = Drafts(torch.tensor([[draft]]), torch.tensor([1]), log_q[None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            verify, "uniform", lambda keys, at: torch.full(at.shape, chance, dtype=torch.float64)
        )
        return bool(verify.verify(alone, log_p[None].clone(), drafts, torch.tensor([3])).accepted)


Residual = Callable[[Tensor, Tensor], Tensor]
RATIO: list[tuple[Accepts, Residual]] = [
    (oracle_accepts, reference.residual),
    (batch_accepts, lambda log_p, log_q: verify.residual(log_p[None], log_q[None])[0]),
]


def laws(seed: int, params_p: SamplingParams, params_q: SamplingParams) -> tuple[Tensor, Tensor]:
    """A random p [2, V] (the draft's and the bonus row) and q [1, V], float64."""
    logits = (
        torch.randn(3, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    )
    rows = [
        fast_law(row, params, V)
        for row, params in zip(logits, (params_p, params_p, params_q), strict=True)
    ]
    return torch.stack(rows[:2]), torch.stack(rows[2:])


def emitted_by_ratio(
    rule: tuple[Accepts, Residual], log_p: Tensor, log_q: Tensor, drawn_from: Tensor
) -> Tensor:
    """The exact law of the first token that the ratio rule emits when drafts are drawn from
    `drawn_from` [V].

    The acceptance threshold is found by bisection on the rule itself, the replacement by its
    residual.
    """
    accepts, residual = rule
    emitted = torch.zeros(V, dtype=torch.float64)
    rest = residual(log_p[0], log_q[0]).softmax(dim=-1)
    for draft in torch.nonzero(drawn_from).flatten().tolist():
        chance = acceptance_chance(accepts, log_p, log_q, draft)
        emitted[draft] += drawn_from[draft] * chance
        emitted += drawn_from[draft] * (1 - chance) * rest
    return emitted


def acceptance_chance(accepts: Accepts, log_p: Tensor, log_q: Tensor, draft: int) -> float:
    """The share of uniform numbers with which the rule accepts `draft`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if accepts(log_p, log_q, draft, middle) else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize("rule", RATIO, ids=["oracle", "batch"])
@pytest.mark.parametrize("params", FILTERS)
@pytest.mark.parametrize("seed", range(8))
def test_ratio_gives_exactly_p(
    rule: tuple[Accepts, Residual], params: SamplingParams, seed: int
) -> None:
    log_p, log_q = laws(seed, params, params)
    assert (
        emitted_by_ratio(rule, log_p, log_q, log_q[0].exp()) - log_p[0].exp()
    ).abs().max() < 1e-12


@pytest.mark.parametrize("rule", RATIO, ids=["oracle", "batch"])
@pytest.mark.parametrize("seed", range(8))
def test_argmax_drafts_under_the_ratio_rule_fail_this_test(
    rule: tuple[Accepts, Residual], seed: int
) -> None:
    """What the published implementation does: draft by argmax, then accept as if q had been
    sampled."""
    log_p, log_q = laws(seed, SamplingParams(), SamplingParams())
    argmax = torch.nn.functional.one_hot(log_q[0].argmax(), V).to(torch.float64)
    assert (emitted_by_ratio(rule, log_p, log_q, argmax) - log_p[0].exp()).abs().max() > 1e-3


@pytest.mark.parametrize("rule", RATIO, ids=["oracle", "batch"])
@pytest.mark.parametrize("seed", range(8))
def test_a_filter_on_one_law_only_fails_this_test(
    rule: tuple[Accepts, Residual], seed: int
) -> None:
    """Drafts drawn from the filtered q, but judged by the unfiltered one."""
    log_p, log_q = laws(seed, SamplingParams(), SamplingParams())
    _, filtered = laws(seed, SamplingParams(), SamplingParams(top_k=2))
    assert (
        emitted_by_ratio(rule, log_p, log_q, filtered[0].exp()) - log_p[0].exp()
    ).abs().max() > 1e-3


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from(FILTERS))
def test_coupled_emits_the_ar_tokens_whatever_the_drafts(
    seed: int, depth: int, params: SamplingParams
) -> None:
    """The oracle's rule draft by draft, and a batch of one."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(depth + 1, V, generator=random, dtype=torch.float64) * 2
    request = reference.Request([0], params, V, seed=seed)
    drafts = torch.randint(V, (depth,), generator=random).tolist()
    tokens = [request.sample(request.law(row, []), 1 + k) for k, row in enumerate(logits)]
    committed, accepted = request.verify([], drafts, [logits[0]] * depth, logits)
    alone = batch_of_one(params, V, V, [0], seed=seed)
    ours = verify.verify(
        alone,
        logits[None],
        Drafts(torch.tensor([drafts]), torch.tensor([depth])),
        torch.tensor([1]),
    )
    batched = ours.tokens[0, : int(ours.accepted) + 1].tolist()
    for output, stood in ((committed, accepted), (batched, int(ours.accepted))):
        assert output[:-1] == drafts[:stood]
        assert output == tokens[: stood + 1]
        assert stood == depth or drafts[stood] != tokens[stood]


def test_relaxed_accepts_more_and_only_likely_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    log_p = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64).log()
    noise = torch.zeros(3)
    assert reference.relaxed(log_p[0], 1, noise, tau=0.7) is None
    assert reference.relaxed(log_p[0], 2, noise, tau=0.7) == 0
    assert reference.coupled(log_p[0], 1, noise) == 0
    monkeypatch.setattr(
        law, "gumbel", lambda keys, at, steps: torch.zeros(*at.shape, 3, dtype=torch.float64)
    )
    loose = SamplingParams(verification="relaxed", tau=0.7)
    for params, draft, accepted in ((loose, 1, 1), (loose, 2, 0), (SamplingParams(), 1, 0)):
        drafts = Drafts(torch.tensor([[draft]]), torch.tensor([1]))
        ours = verify.verify(
            batch_of_one(params, 3, 3), log_p[None].clone(), drafts, torch.tensor([0])
        )
        assert int(ours.accepted) == accepted and (accepted or int(ours.tokens[0, 0]) == 0)


LENGTH = 3
RUNS = 2_500


def exact_sequences(
    toy: Toy, prompt: list[int], params: SamplingParams
) -> dict[tuple[int, ...], float]:
    """The probability of every output of LENGTH tokens under AR's own law."""
    chances = {}
    for tokens in itertools.product(range(toy.vocab_size), repeat=LENGTH):
        text, log_chance = list(prompt), 0.0
        for token in tokens:
            rows = torch.ones(len(text), len(text)).tril() > 0
            logits = toy(torch.tensor(text), torch.arange(len(text)), rows)[-1]
            log_chance += float(fast_law(logits, params, toy.mask_id)[token])
            text.append(token)
        chances[tokens] = math.exp(log_chance)
    return chances


def worst_deviation(toy: Toy, params: SamplingParams, runs: int) -> tuple[float, float]:
    """The largest deviation of a sequence's frequency from its probability, in units of its bound;
    and the level.

    Bernstein's inequality bounds P(|freq - p| > t) by 2 exp(-n t^2 / (2 p (1 - p) + 2 t / 3)); t
    solves it for 1e-6 / (number of sequences), so that by the union bound the whole test has a
    false-alarm rate of at most 1e-6.
    """
    chances = exact_sequences(toy, [1, 0], params)
    counts = dict.fromkeys(chances, 0)
    for seed in range(runs):
        request = reference.Request([1, 0], params, toy.mask_id, seed=seed)
        decoded = reference.isd(toy, request, stride=3)
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
    params = SamplingParams(
        max_tokens=LENGTH, temperature=0.9, top_p=0.95, verification=verification
    )
    assert worst_deviation(Toy(3, seed=3, sharpness=0.7), params, RUNS)[0] < 1


def test_argmax_drafts_fail_the_end_to_end_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test with drafts taken by argmax and judged by the ratio rule: it must fail."""
    monkeypatch.setattr(reference.Request, "draft", argmax_drafts)
    params = SamplingParams(max_tokens=LENGTH, temperature=0.9, top_p=0.95, verification="ratio")
    assert worst_deviation(Toy(3, seed=3, sharpness=0.7), params, RUNS)[0] > 1


def argmax_drafts(
    request: reference.Request, output: list[int], logits: Tensor
) -> tuple[list[int], list[Tensor]]:
    """Drafts as the published implementation takes them."""
    log_q = [request.law(row, output) for row in logits]
    return [int(row.argmax()) for row in log_q], log_q
