"""The planner: when it changes plans, what it tries, and what it learns from steps."""

from __future__ import annotations

import pytest

from idlm.decoding.costs import CostTable
from idlm.decoding.plan import AR, Plan, expected_tokens
from idlm.engine.planner import LOOK_SHARE, Planner

CHAIN = Plan(4, "chain")
TOKENS = expected_tokens(CHAIN, [0.8])
"""2.31 a step, at the acceptance that a planner begins with."""


def planner(seconds: dict[Plan, dict[int, float]]) -> Planner:
    table = CostTable()
    for plan, costs in seconds.items():
        for batch, cost in costs.items():
            table.put(batch, plan, cost)
    return Planner(list(seconds), table)


def run(planner: Planner, steps: int, batch: int, seconds: dict[Plan, float]) -> list[Plan]:
    """The plans of so many steps that take `seconds`, without drafts to learn from."""
    plans = []
    for _ in range(steps):
        plan = planner.choose(batch)
        planner.observe_cost(batch, plan, seconds[plan])
        plans.append(plan)
    return plans


def test_the_first_choice_is_the_best_plan() -> None:
    two = planner({AR: {1: 1.0}, CHAIN: {1: 1.2}})
    assert two.choose(1) == CHAIN


def test_a_change_to_drafts_waits_until_it_has_paid_for_itself() -> None:
    """At batch 8 the chain is a little faster than AR. Its first step verifies nothing, so the
    change costs more than half of such a step; that much time has to be lost first."""
    slow, rate = 2.2, TOKENS / 2.2
    two = planner({AR: {1: 1.0, 8: 1.0}, CHAIN: {1: 9.0, 8: slow}})
    assert two.choose(1) == AR
    plans = run(two, 80, 8, {AR: 1.0, CHAIN: slow})
    first = plans.index(CHAIN)
    price, loss = slow * (1 - 1 / TOKENS), 1 - 1 / rate
    assert price / loss - 8 <= first <= price / loss + 16  # comparisons are 8 steps apart
    assert set(plans[first:]) == {CHAIN}


def test_a_change_to_ar_is_free() -> None:
    two = planner({AR: {1: 1.0, 8: 1.0}, CHAIN: {1: 1.2, 8: 2.6}})
    assert two.choose(1) == CHAIN and two.choose(8) == AR


def test_only_plans_that_are_ready_are_tried() -> None:
    two = planner({AR: {1: 1.0}, CHAIN: {1: 2.6}})
    steps, tried = int(20 / LOOK_SHARE), set()
    for _ in range(steps):
        plan = two.choose(1, ready=lambda plan: plan == AR)
        two.observe_cost(1, plan, 1.0)
        tried.add(plan)
    assert tried == {AR}
    two.choose(1)
    assert CHAIN in {two.choose(1) for _ in range(16)}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_gain_is_the_share_of_expected_tokens_that_steps_bring(share: float) -> None:
    two = planner({AR: {1: 1.0}, CHAIN: {1: 1.2}})
    two.choose(1)
    expected = 10 * (TOKENS - 1)
    for _ in range(1000):
        two.observe_tokens(CHAIN, 10, 10 + share * expected)
    assert two.gain == pytest.approx(share, abs=0.05)
    if not share:
        assert two.choose(2) == AR  # drafts that bring nothing


def test_likely_plans_come_first() -> None:
    wide = Plan(4, "all")
    three = planner({AR: {1: 1.0, 8: 1.0}, wide: {1: 9.0, 8: 9.0}, CHAIN: {1: 1.1, 8: 1.5}})
    assert three.likely(8) == [CHAIN, AR, wide]
