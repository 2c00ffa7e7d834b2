"""Chained drafts in the oracle, for every kind of draft head: by exact enumeration the ratio rule
keeps AR's distribution, and the coupled rule gives AR's tokens."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from idlm import SamplingParams
from idlm.decoding import reference
from idlm.decoding.reference_heads import SlowHead
from tests.decoding.toy import Toy

KINDS = ("markov", "selector", "mlp")
V, LENGTH, PROMPT = 3, 3, [1, 0]
RATIO = {
    "plain": SamplingParams(max_tokens=LENGTH, temperature=0.9, verification="ratio"),
    "filters": SamplingParams(
        max_tokens=LENGTH, top_p=0.8, min_p=0.05, logit_bias={1: 0.7}, verification="ratio"
    ),
    "penalties": SamplingParams(
        max_tokens=LENGTH, presence_penalty=1.5, repetition_penalty=1.4, verification="ratio"
    ),
}


class HiddenToy(Toy):
    """Gives [logits, hidden state] of each row."""

    def __call__(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        out, self.out = self.out, torch.eye(8, dtype=torch.float64)
        hidden = super().__call__(tokens, positions, visible)
        self.out = out
        return torch.cat([hidden @ out, hidden], dim=1)


def head_of(toy: Toy, kind: str, top: int) -> SlowHead:
    random = torch.Generator().manual_seed(7)
    shapes = {"before": (5, 8), "hidden": (5, 8), "candidate": (5, 8), "up": (8, 5), "out": (1, 5)}
    weights = {
        f"{name}.weight": torch.randn(*shape, generator=random, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return SlowHead(kind, weights, toy.embedding, toy.out.T, top)


class Tape:
    """Chooses in place of the noise, so that a run can be repeated with every other choice."""

    def __init__(self) -> None:
        self.waiting: list[list[int]] = [[]]
        self.taken: list[int] = []
        self.weight = 1.0

    def rewind(self) -> None:
        self.taken, self.weight = [], 1.0
        self.given = self.waiting.pop()

    def choose(self, chances: list[float]) -> int:
        at = len(self.taken)
        likely = [choice for choice, chance in enumerate(chances) if chance > 0]
        if at >= len(self.given):
            self.waiting += [[*self.taken, choice] for choice in likely[1:]]
            self.taken.append(likely[0])
        else:
            self.taken.append(self.given[at])
        self.weight *= chances[self.taken[-1]]
        return self.taken[-1]


def taped(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle with the tape's choices: its samples, and the acceptance of the ratio rule."""

    def sample(self: object, log_p: Tensor, position: int, stream: int = 0) -> int:
        return tape.choose(log_p.exp().tolist())

    def ratio(log_p: Tensor, draft: int, log_q: Tensor, chance: float, noise: Tensor) -> int | None:
        accept = min(1.0, math.exp(float(log_p[draft] - log_q[draft])))
        if tape.choose([1 - accept, accept]):
            return None
        mass = reference.residual(log_p, log_q).exp()
        return tape.choose((mass / mass.sum()).tolist())

    monkeypatch.setattr(reference.Request, "sample", sample)
    monkeypatch.setattr(reference, "ratio", ratio)


def every_output(
    run: Callable[[], reference.Decoded], monkeypatch: pytest.MonkeyPatch
) -> dict[tuple[int, ...], float]:
    """The probability of each output, summed over all choices of the run."""
    tape, found = Tape(), defaultdict(float)
    with monkeypatch.context() as patched:
        taped(tape, patched)
        while tape.waiting:
            tape.rewind()
            tokens = tuple(run().tokens)
            found[tokens] += tape.weight
    return dict(found)


def isd_outputs(
    kind: str,
    params: SamplingParams,
    monkeypatch: pytest.MonkeyPatch,
    top: int = 2,
    allowed: reference.Allowed | None = None,
) -> dict[tuple[int, ...], float]:
    toy = HiddenToy(V, seed=3, sharpness=0.7)
    head, rows = head_of(toy, kind, top), {}

    def forward(tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        key = (*tokens.tolist(), *positions.tolist(), int(visible.sum()))
        if key not in rows:
            rows[key] = toy(tokens, positions, visible)
        return rows[key]

    scores = lru_cache(None)(
        lambda row, before: head(torch.tensor(row, dtype=torch.float64), before)
    )
    request = reference.Request(
        PROMPT,
        params,
        toy.mask_id,
        allowed=allowed,
        head=lambda row, before: scores(tuple(row.tolist()), before),
    )
    return every_output(lambda: reference.isd(forward, request, 3), monkeypatch)


def ar_outputs(
    params: SamplingParams, allowed: reference.Allowed | None = None
) -> dict[tuple[int, ...], float]:
    """The probability of every output under AR's own law."""
    toy, chances = Toy(V, seed=3, sharpness=0.7), {}
    request = reference.Request(PROMPT, params, toy.mask_id, allowed=allowed)
    for tokens in itertools.product(range(V), repeat=LENGTH):
        log_chance = 0.0
        for k, token in enumerate(tokens):
            text = torch.tensor(PROMPT + list(tokens[:k]))
            rows = torch.ones(len(text), len(text)).tril() > 0
            logits = toy(text, torch.arange(len(text)), rows)[-1]
            log_chance += float(request.law(logits, tokens[:k])[token])
        chances[tokens] = math.exp(log_chance)
    return chances


def deviation(found: dict[tuple[int, ...], float], wanted: dict[tuple[int, ...], float]) -> float:
    return max(abs(found.get(tokens, 0.0) - chance) for tokens, chance in wanted.items())


@pytest.mark.parametrize("params", RATIO.values(), ids=RATIO)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_rule_keeps_the_distribution(
    kind: str, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = isd_outputs(kind, params, monkeypatch)
    assert math.isclose(sum(found.values()), 1, abs_tol=1e-9)
    assert deviation(found, ar_outputs(params)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_guide_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens 0 and 1 take turns with 2."""

    def allowed(output: object) -> Tensor:
        even = len(output) % 2 == 0  # type: ignore[arg-type]
        return torch.tensor([even, even, True])

    params = RATIO["plain"]
    found = isd_outputs(kind, params, monkeypatch, allowed=allowed)
    assert deviation(found, ar_outputs(params, allowed)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_q_that_is_not_the_chained_law_is_noticed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts drawn from the chained law, but judged by that of the MASK rows alone."""
    draft = reference.Request.draft

    def blind(self: reference.Request, output: list[int], rows: Tensor):  # type: ignore[no-untyped-def]
        drafts, _ = draft(self, output, rows)
        laws = [self.law(self.head(row, None), output + drafts[:k]) for k, row in enumerate(rows)]
        return drafts, laws

    monkeypatch.setattr(reference.Request, "draft", blind)
    params = RATIO["plain"]
    assert deviation(isd_outputs(kind, params, monkeypatch), ar_outputs(params)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branches", ["all", "chain"])
def test_the_coupled_rule_gives_the_tokens_of_ar(kind: str, branches: str) -> None:
    toy, hidden = Toy(12, seed=1), HiddenToy(12, seed=1)
    head, changed = head_of(hidden, kind, 5), 0
    for seed in range(12):
        params = SamplingParams(max_tokens=14, temperature=(0.0, 0.9)[seed % 2], top_p=0.95)
        request = reference.Request(PROMPT, params, toy.mask_id, seed=seed)
        ar = reference.ar(toy, request)
        chained = reference.isd(hidden, replace(request, head=head), 4, branches)
        assert chained.tokens == ar.tokens
        changed += chained.accepted != reference.isd(toy, request, 4, branches).accepted
    assert changed
