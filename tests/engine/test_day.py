"""The CUDA graphs that a simulated day of traffic asks of the default server."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from idlm.config import EngineConfig
from idlm.decoding.plan import AR, Plan
from idlm.decoding.settings import Features
from idlm.engine import record, runner
from idlm.engine.record import Recorder
from idlm.engine.runner import Runner
from idlm.engine.step import StepKey, StepResult

STEPS = 20_000
COMMON = {
    Features(): 30,
    Features(sampled=True): 40,
    Features(sampled=True, filtered=True): 5,
    Features(sampled=True, filtered=True, ranked=True): 25,
}
RARE = {Features(sampled=True, penalised=True): 3, Features(biased=True): 1}
PLANS = (Plan(4, "all"), Plan(4, "chain"), Plan(3, "chain"), Plan(2, "all"), AR)
SLOTS = EngineConfig().max_num_seqs


def traffic(kinds: dict[Features, int], seed: int) -> Iterator[tuple[Plan, int, int, Features]]:
    """Plan, requests, tokens of the longest and union of features of each step: load rises and
    falls over the day, the planner's choice follows it, and now and then it tries another plan."""
    chance = random.Random(seed)
    live: list[tuple[int, int, Features]] = []
    for number in range(STEPS):
        sun = max(0.0, math.sin((number / STEPS - 0.25) * 2 * math.pi)) ** 2
        load = 2 + 60 * sun * chance.uniform(0.6, 1.4)
        while len(live) < min(SLOTS, load) and chance.random() < 0.5:
            prompt, left = chance.lognormvariate(6.3, 1.1), chance.lognormvariate(5.3, 0.8)
            kind = chance.choices(list(kinds), list(kinds.values()))[0]
            live.append((min(int(prompt), 30_000), int(left), kind))
        if live:
            plan = PLANS[0 if len(live) <= 8 else 1 if len(live) <= 24 else 2]
            plan = chance.choice(PLANS) if chance.random() < 0.03 else plan
            union = Features()
            for _, _, kind in live:
                union |= kind
            yield plan, len(live), max(length for length, _, _ in live), union
        live = [(length + 3, left - 3, kind) for length, left, kind in live if left > 3]


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A runner that believes that it has a GPU with our kernels, and counts what it records."""
    made: list[object] = []
    nothing = StepResult(torch.zeros(1, 5))

    def graph(core: object, key: object, rows: list[int], *_: object) -> object:
        made.append((key, len(rows)))
        return lambda *_: (nothing.packed,)

    monkeypatch.setattr(record, "_Place", object)
    monkeypatch.setattr(record, "_graph", graph)
    monkeypatch.setattr(runner.torch, "arange", lambda number, **_: range(number))
    idlm = SimpleNamespace(device=torch.device("cuda", 0), context=40_960)
    cache = SimpleNamespace(
        backend=SimpleNamespace(takes_pieces=True), columns=lambda tokens: -(-tokens // 16)
    )
    step = SimpleNamespace(idlm=idlm, cache=cache, rules=(None, None), step=lambda *_: nothing)
    slots = SimpleNamespace(spare=SLOTS, state=SimpleNamespace(table=torch.empty(0, 2560)))
    fake = SimpleNamespace(idlm=idlm, model_step=step, slots=slots, _graphs=True, made=made)
    fake._steps = Recorder(step, on=True)  # type: ignore[arg-type]
    fake._on_device = list
    for name in ("_shared", "_context", "_windows"):
        setattr(fake, name, getattr(Runner, name).__get__(fake))
    return fake


def test_a_day_of_common_requests_has_at_most_60_graphs(day: SimpleNamespace) -> None:
    for plan, batch, tokens, features in traffic(COMMON, 0):
        day._windows(StepKey(plan, features), list(range(batch)), tokens, None, ())
    assert 20 < len(day._steps._seen) <= 60
    assert len(day.made) == len(set(day.made)) <= 60, "none is recorded twice"


def test_rare_requests_do_not_make_a_day_of_recordings(day: SimpleNamespace) -> None:
    """More kinds than graphs are kept. A recording takes as long as some ten steps."""
    for plan, batch, tokens, features in traffic(COMMON | RARE, 1):
        day._windows(StepKey(plan, features), list(range(batch)), tokens, None, ())
        assert len(day._steps._recordings) <= 60
    assert len(day._steps._seen) > 60
    assert len(day.made) < 0.01 * STEPS


def test_a_graph_without_our_kernels_keeps_its_context_and_its_features(
    day: SimpleNamespace,
) -> None:
    assert day._context(700) == 40_960
    day.model_step.cache.backend.takes_pieces = False
    assert day._context(700) == 2048
    day.model_step.rules = (None, runner.filtered)
    key = StepKey(AR, Features(sampled=True))
    assert day._shared(key) == key
