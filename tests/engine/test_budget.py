"""The budget of prompt tokens beside running requests, from steps of known cost."""

from __future__ import annotations

import pytest

from idlm.decoding.plan import AR, Plan
from idlm.engine.budget import FIRST_BUDGET, LARGEST_BUDGET, SMALLEST_BUDGET, PrefillBudget

TOKEN = 5e-5


def step(batch: int) -> float:
    """Seconds of a decode step: a share of its own and one a request."""
    return (2e-3 + 5e-4 * batch) if batch else 0.0


def test_nothing_known_and_the_ends_of_the_range() -> None:
    budget = PrefillBudget()
    assert budget.step_worth() == FIRST_BUDGET
    budget.observe(AR, 0, 100, 100.0)
    budget.observe(AR, 1, 0, 1e-3)
    assert budget.step_worth() == SMALLEST_BUDGET
    budget.observe(AR, 1, 0, 1e9)
    assert budget.step_worth() == LARGEST_BUDGET


def test_prompts_take_about_as_long_as_the_step_they_are_beside() -> None:
    budget = PrefillBudget()
    budget.observe(AR, 0, 200, 200 * TOKEN)
    budget.observe(AR, 8, 0, step(8))
    assert budget.step_worth() == pytest.approx(step(8) / TOKEN, abs=1)


@pytest.mark.parametrize("plan", [AR, Plan(4, "chain")])
def test_the_budget_follows_a_batch_that_grows_while_every_step_has_prompts(plan: Plan) -> None:
    """A burst of requests: from the first one that decodes on, no step is without prompts until all
    do."""
    budget = PrefillBudget()
    budget.observe(plan, 0, 200, 200 * TOKEN)
    budget.observe(plan, 1, 0, step(1))
    for batch in range(1, 33):
        tokens = budget.step_worth()
        budget.observe(plan, batch, tokens, step(batch) + tokens * TOKEN)
        assert budget.step_worth() == pytest.approx(step(batch) / TOKEN, rel=0.05)
