"""The planner: when it changes plans, what it tries, and what it learns from steps."""

from __future__ import annotations

import pytest

from idlm.decoding.costs import CostTable
from idlm.decoding.plan import AR, Plan, candidates, expected_tokens
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
        plan = planner.choose(batch, batch)
        planner.observe_cost(batch, plan, seconds[plan])
        plans.append(plan)
    return plans


def test_the_first_choice_is_the_best_plan() -> None:
    two = planner({AR: {1: 1.0}, CHAIN: {1: 1.2}})
    assert two.choose(1, 1) == CHAIN


def test_a_change_to_drafts_waits_until_it_has_paid_for_itself() -> None:
    """At batch 8 the chain is a little faster than AR. Its first step verifies nothing, so the
    change costs more than half of such a step; that much time has to be lost first."""
    slow, rate = 2.2, TOKENS / 2.2
    two = planner({AR: {1: 1.0, 8: 1.0}, CHAIN: {1: 9.0, 8: slow}})
    assert two.choose(1, 1) == AR
    plans = run(two, 80, 8, {AR: 1.0, CHAIN: slow})
    first = plans.index(CHAIN)
    price, loss = slow * (1 - 1 / TOKENS), 1 - 1 / rate
    assert price / loss - 8 <= first <= price / loss + 16  # comparisons are 8 steps apart
    assert set(plans[first:]) == {CHAIN}


def test_a_change_to_ar_is_free() -> None:
    two = planner({AR: {1: 1.0, 8: 1.0}, CHAIN: {1: 1.2, 8: 2.6}})
    assert two.choose(1, 1) == CHAIN and two.choose(8, 8) == AR


def test_only_plans_that_are_ready_are_tried() -> None:
    two = planner({AR: {1: 1.0}, CHAIN: {1: 2.6}})
    steps, tried = int(20 / LOOK_SHARE), set()
    for _ in range(steps):
        plan = two.choose(1, 1, ready=lambda plan: plan == AR)
        two.observe_cost(1, plan, 1.0)
        tried.add(plan)
    assert tried == {AR}
    two.choose(1, 1)
    assert CHAIN in {two.choose(1, 1) for _ in range(16)}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_gain_is_the_share_of_expected_tokens_that_steps_bring(share: float) -> None:
    two = planner({AR: {1: 1.0}, CHAIN: {1: 1.2}})
    two.choose(1, 1)
    expected = 10 * (TOKENS - 1)
    for _ in range(1000):
        two.observe_tokens(CHAIN, 10, 10 + share * expected)
    assert two.gain == pytest.approx(share, abs=0.05)
    if not share:
        assert two.choose(2, 2) == AR  # drafts that bring nothing


def test_requests_that_do_not_draft_bring_one_token_a_window() -> None:
    """The chain pays from the point on where it brings as many tokens as it takes AR steps."""
    two = planner({AR: {1: 1.0, 32: 1.0}, CHAIN: {1: 1.2, 32: 1.2}})
    worth = 0.2 / (TOKENS - 1)
    for drafting in range(33):
        fresh = planner({AR: {32: 1.0}, CHAIN: {32: 1.2}})
        assert fresh.choose(32, drafting) == (CHAIN if drafting > 32 * worth else AR)
    assert two.choose(32, 32) == CHAIN


def test_steps_without_drafts_say_how_fast_the_machine_is_not_what_ar_costs() -> None:
    """The machine becomes half as fast while no request drafts, and stays so."""
    two = planner({AR: {8: 1.0}, CHAIN: {8: 1.5}})
    run(two, 100, 8, {AR: 1.0, CHAIN: 1.5})
    for step in range(150):
        assert two.choose(8, 0) == AR
        two.observe_cost(8, AR, 1.0 if step < 50 else 2.0)
    assert two.costs is not None
    assert two.costs.costs(8) == pytest.approx({AR: 2.0, CHAIN: 3.0}, rel=0.01)
    assert two.reason == "ar: no request drafts"
    plans = run(two, 200, 8, {AR: 2.0, CHAIN: 3.0})
    assert plans[0] == CHAIN  # at once: no request has drafts that a change would lose


@pytest.mark.parametrize("error", [0.5, 2.0])
def test_traffic_in_turns_is_never_slower_than_ar(error: float) -> None:
    """Phases of AR and of drafts take turns at growing batches. The table is wrong about the chain
    at every size. The tokens of all steps with drafts, over those of AR in the same time."""
    true = {AR: lambda batch: 1 + 0.05 * batch, CHAIN: lambda batch: 1 + 0.35 * batch}
    sizes = (1, 8, 32, 64)
    table = {AR: {size: true[AR](size) for size in sizes}}
    two = planner(table | {CHAIN: {size: error * true[CHAIN](size) for size in sizes}})
    now, tokens, steps_of_ar, last = 0.0, 0.0, 0.0, AR
    for batch in sizes * 4:
        for drafting, steps in ((0, 100), (batch, 400)):
            for _ in range(steps):
                plan = two.choose(batch, drafting)
                two.observe_cost(batch, plan, true[plan](batch))
                if drafting:
                    now += true[plan](batch)
                    tokens += batch * (1.0 if AR in (plan, last) else TOKENS)
                    steps_of_ar += batch * true[plan](batch) / true[AR](batch)
                last = plan
    assert tokens >= 0.97 * steps_of_ar


def test_ar_is_tried_every_other_time() -> None:
    wide = Plan(4, "all")
    slow = {AR: 1.0, CHAIN: 1.2, wide: 2.0, Plan(3, "chain"): 1.3, Plan(3, "all"): 1.4}
    five = planner({plan: {1: seconds} for plan, seconds in slow.items()})
    assert five.choose(1, 1) == CHAIN
    tried = [plan for plan in run(five, 4000, 1, slow) if plan != CHAIN]
    assert len(tried) >= 12 and {*tried} == {*slow} - {CHAIN}
    assert all((one == AR) != (other == AR) for one, other in zip(tried, tried[1:], strict=False))


@pytest.mark.parametrize("batch, best", [(1, "chain-4"), (32, "ar")])
def test_trials_cost_a_hundredth_of_the_time(batch: int, best: str) -> None:
    """Each step verifies no more drafts than the step before has left."""
    costs = {plan: 1 + 0.08 * plan.width * batch for plan in candidates(4)}
    brought = {plan: expected_tokens(plan, [0.8]) for plan in costs}
    all_plans = planner({plan: {batch: seconds} for plan, seconds in costs.items()})
    plans = run(all_plans, 4000, batch, costs)
    assert all_plans.current.name == best and len(set(plans)) > 1
    pairs = zip(plans[:1] + plans, plans, strict=False)
    tokens = sum(min(brought[before], brought[plan]) for before, plan in pairs)
    rate = tokens / sum(costs[plan] for plan in plans)
    assert rate >= 0.988 * brought[all_plans.current] / costs[all_plans.current]


def test_likely_plans_come_first() -> None:
    wide = Plan(4, "all")
    three = planner({AR: {1: 1.0, 8: 1.0}, wide: {1: 9.0, 8: 9.0}, CHAIN: {1: 1.1, 8: 1.5}})
    assert three.likely(8) == [CHAIN, AR, wide]
