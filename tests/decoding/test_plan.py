"""The planner's arithmetic against simulation, the closed formulas and plain search."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlm.decoding.costs import CostTable, RunningCosts
from idlm.decoding.plan import AR, Plan, RunningAcceptance, choose, expected_tokens
from idlm.decoding.window import outcomes, window
from idlm.errors import InputError

PLANS = [
    AR,
    Plan(2, "chain"),
    Plan(4, "chain"),
    Plan(4, "all"),
    Plan(8, "chain"),
    Plan(8, "all"),
    Plan(4, (0, 3)),
]
acceptances = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9)
plans = st.builds(Plan, st.integers(1, 9), st.sampled_from(["all", "chain"]))


def simulate(plan: Plan, acceptance: list[float], steps: int = 40_000) -> float:
    """Tokens per step, simulated: draft k is accepted with probability `acceptance[k - 1]`."""
    rng, tokens, valid = random.Random(1), 0, 0
    for _ in range(steps):
        accepted = 0
        while accepted < valid and rng.random() < acceptance[accepted]:
            accepted += 1
        tokens += accepted + 1
        valid = plan.drafts if accepted in outcomes(plan.branches, valid) else 0
    return tokens / steps


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_expected_tokens_against_simulation(plan):
    acceptance = [0.93, 0.8, 0.85, 0.6, 0.9, 0.7, 0.5]
    assert expected_tokens(plan, acceptance) == pytest.approx(simulate(plan, acceptance), rel=0.01)


@given(st.floats(0.0, 1.0), st.integers(2, 9))
def test_closed_formulas_for_equal_acceptance(a, stride):
    powers = [a**k for k in range(stride)]
    assert expected_tokens(Plan(stride, "all"), [a]) == pytest.approx(sum(powers))
    chain = (2 + sum(powers[1:-1])) / (2 - powers[-1])
    assert expected_tokens(Plan(stride, "chain"), [a]) == pytest.approx(chain)


@pytest.mark.parametrize(("stride", "every", "chain"), [(4, 3.44, 2.92), (8, 5.70, 4.09)])
def test_the_documented_figures_at_90_percent(stride, every, chain):
    assert round(expected_tokens(Plan(stride, "all"), [0.9]), 2) == every
    assert round(expected_tokens(Plan(stride, "chain"), [0.9]), 2) == chain


@given(acceptances, st.integers(2, 9))
def test_all_outcomes_never_give_less_than_the_chain(acceptance, stride):
    every, chain = (
        expected_tokens(Plan(stride, branches), acceptance) for branches in ("all", "chain")
    )
    assert 1 <= chain <= every + 1e-12 and every <= stride


def test_short_acceptance_goes_on_with_its_last_value():
    assert expected_tokens(Plan(5, "chain"), [0.9, 0.5]) == expected_tokens(
        Plan(5, "chain"), [0.9, 0.5, 0.5, 0.5]
    )
    assert expected_tokens(AR, []) == 1
    with pytest.raises(InputError, match="says nothing about chain-3"):
        expected_tokens(Plan(3, "chain"), [])


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_width_is_that_of_the_window(plan):
    assert plan.width == window(plan.stride, plan.branches).width


def test_plans_with_stride_1_are_one_plan():
    assert {Plan(1, "all"), Plan(1, "chain"), Plan(1, (0,))} == {AR}
    assert [plan.name for plan in PLANS] == [
        "ar",
        "chain-2",
        "chain-4",
        "all-4",
        "chain-8",
        "all-8",
        "0+3-4",
    ]
    with pytest.raises(InputError, match="stride=0"):
        Plan(0, "all")
    with pytest.raises(InputError, match="branches='tree'"):
        Plan(4, "tree")


@given(st.sets(plans, max_size=6), acceptances, st.data())
def test_the_choice_is_the_fastest_and_of_equals_the_narrowest(candidates, acceptance, data):
    candidates = candidates | {AR}
    costs = {plan: data.draw(st.sampled_from([0.001, 0.002, 0.003])) for plan in candidates}
    choice = choose(candidates - {AR}, costs, acceptance)
    rates = {plan: expected_tokens(plan, acceptance) / costs[plan] for plan in candidates}
    best = max(rates.values())
    assert choice.figures[0].rate == rates[choice.plan] == best
    assert choice.plan.width == min(plan.width for plan in candidates if rates[plan] == best)


def test_the_reason_gives_every_figure_on_one_line():
    costs = {AR: 0.0036, Plan(4, "chain"): 0.007, Plan(4, "all"): 0.0095}
    assert choose(costs, costs, [0.9]).reason == (
        "chain-4: 2.92 tokens / 7.0 ms = 417 tok/s; "
        "all-4 3.44 / 9.5 ms = 362; ar 1.00 / 3.6 ms = 278"
    )


def test_a_plan_without_a_cost_is_an_error():
    with pytest.raises(KeyError):
        choose([Plan(4, "all")], {Plan(4, "all"): 0.1}, [0.9])


def test_the_gain_scales_the_tokens_beyond_one():
    plan = Plan(4, "all")
    costs = {AR: 1.0, plan: 2.0}
    half = choose([plan], costs, [0.9], gain=0.5)
    assert {figure.plan: figure.tokens for figure in half.figures} == {
        AR: 1.0,
        plan: pytest.approx(1 + (expected_tokens(plan, [0.9]) - 1) / 2),
    }
    assert choose([plan], costs, [0.9], gain=0.0).plan == AR


def test_a_kept_plan_comes_first_and_the_others_by_rate():
    costs = {AR: 1.0, Plan(4, "chain"): 1.5, Plan(4, "all"): 2.5}
    choice = choose(costs, costs, [0.9])
    kept = choice.keep(AR)
    assert choice.plan == Plan(4, "chain") and kept.plan == AR
    assert [figure.plan for figure in kept.figures] == [AR, Plan(4, "chain"), Plan(4, "all")]


def test_running_acceptance_starts_at_the_prior_and_finds_the_truth():
    running, rng, truth = RunningAcceptance(3, prior=0.8), random.Random(2), [0.95, 0.6, 0.3]
    assert running.values == pytest.approx([0.8] * 3)
    for _ in range(400):
        reached, accepted, alive = [0] * 3, [0] * 3, 16
        for depth in range(3):
            reached[depth] = alive
            alive = accepted[depth] = sum(rng.random() < truth[depth] for _ in range(alive))
        running.update(reached, accepted)
    assert running.values == pytest.approx(truth, abs=0.05)


def test_a_depth_never_reached_has_the_value_of_the_one_before():
    running = RunningAcceptance(4)
    for _ in range(50):
        running.update([10, 9], [9, 3])
    first, second, third, fourth = running.values
    assert abs(first - 0.9) < 0.02 and abs(second - 1 / 3) < 0.02
    assert third == fourth == second


def test_a_depth_that_is_not_tried_any_more_drifts_back_to_the_one_before():
    running = RunningAcceptance(2, prior=0.8)
    for _ in range(200):
        running.update([1, 1], [1, 0])
    assert running.values[1] < 0.05
    for _ in range(1500):
        running.update([1], [1])
    assert running.values == pytest.approx([1.0, 1.0], abs=0.03)


def test_steps_without_drafts_say_nothing():
    running = RunningAcceptance(2, prior=0.8)
    for _ in range(20):
        running.update([1], [0])
    before = running.values
    for _ in range(1500):
        running.update([0, 0], [0, 0])
        running.update([], [])
    assert running.values == before


def test_newer_steps_count_more():
    running = RunningAcceptance(1, decay=0.9)
    for accepted in [0] * 200 + [1] * 50:
        running.update([1], [accepted])
    assert running.values[0] > 0.9


@pytest.mark.parametrize(
    ("reached", "accepted"), [([1], [2]), ([1, 1], [1]), ([1, 1, 1], [1, 1, 1]), ([1], [-1])]
)
def test_counts_that_cannot_be_are_refused(reached, accepted):
    with pytest.raises(ValueError, match="accepted"):
        RunningAcceptance(2).update(reached, accepted)


def table() -> CostTable:
    costs_table = CostTable()
    for plan, costs in {AR: {8: 0.006, 1: 0.003}, Plan(4, (0, 3)): {1: 0.007}}.items():
        for batch, seconds in costs.items():
            costs_table.put(batch, plan, seconds)
    return costs_table


@pytest.mark.parametrize(("batch", "seconds"), [(1, 0.003), (8, 0.006), (3, 0.003 + 0.003 * 2 / 7)])
def test_cost_is_linear_between_measurements(batch, seconds):
    assert table().cost(batch, AR) == pytest.approx(seconds)


def test_beyond_the_largest_measured_batch_each_row_costs_what_rows_did():
    """From 1 row of AR, 3 ms, to the 10 of the other plan, 7 ms."""
    row = (0.007 - 0.003) / 9
    assert table().per_row == pytest.approx(row)
    assert table().cost(64, AR) == pytest.approx(0.006 + 56 * row)
    assert table().cost(8, Plan(4, (0, 3))) == pytest.approx(0.007 + 7 * 10 * row)


def test_costs_are_those_of_every_plan_at_one_batch_size():
    assert table().costs(8) == {plan: table().cost(8, plan) for plan in (AR, Plan(4, (0, 3)))}
    with pytest.raises(KeyError):
        table().cost(1, Plan(2, "all"))


def test_below_the_smallest_measured_batch_the_smallest_counts():
    made = CostTable()
    made.put(4, AR, 0.004)
    made.put(8, AR, 0.008)
    assert made.cost(1, AR) == made.costs(1)[AR] == 0.004
    made.put(1, AR, 0.002)
    assert made.cost(1, AR) == made.costs(1)[AR] == 0.002


def test_costs_survive_json_and_what_is_no_table_is_refused():
    again = CostTable.from_json(json.loads(json.dumps(table().to_json())))
    assert again.to_json() == table().to_json() and again.plans == table().plans == [
        AR,
        Plan(4, (0, 3)),
    ]
    row = table().to_json()[0]
    for wrong in (
        [{**row, "seconds": -1.0}],
        [{**row, "batch": None}],
        [{"batch": 1}],
        7,
        [{**row, "stride": 99}],
    ):
        with pytest.raises(ValueError):
            CostTable.from_json(wrong)


CHAIN = Plan(4, "chain")


def running_costs(ar: float, chain: float) -> RunningCosts:
    made = CostTable()
    made.put(1, AR, ar)
    made.put(1, CHAIN, chain)
    return RunningCosts(made)


def test_a_slower_machine_makes_every_plan_dearer():
    costs = running_costs(0.01, 0.02)
    for _ in range(100):
        costs.observe(1, CHAIN, 0.06, own=False)
    assert costs.costs(1) == pytest.approx({AR: 0.03, CHAIN: 0.06}, rel=0.01)


def test_a_look_at_another_plan_corrects_that_plan_alone():
    """The table has three times the real cost of AR."""
    costs = running_costs(0.03, 0.02)
    for _ in range(8):
        costs.observe(1, CHAIN, 0.02, own=False)
        costs.observe(1, AR, 0.01, own=True)
    assert costs.cost(1, AR) == pytest.approx(0.01, rel=0.1)
    assert costs.cost(1, CHAIN) == pytest.approx(0.02)


def test_one_step_that_waited_for_something_counts_little():
    costs = running_costs(0.01, 0.02)
    costs.observe(1, AR, 10.0, own=False)
    assert costs.cost(1, AR) < 0.011


def test_an_error_at_one_batch_size_counts_half_at_others():
    costs = running_costs(0.01, 0.02)
    error = 0.08 / costs.cost(32, AR)
    for _ in range(12):
        costs.observe(32, AR, 0.08, own=True)
    assert costs.cost(32, AR) == pytest.approx(0.08, rel=0.05)
    assert costs.cost(1, AR) == pytest.approx(0.01 * error**0.5, rel=0.05)
    assert costs.cost(1, CHAIN) == 0.02
