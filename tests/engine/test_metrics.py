"""The budget of prompt tokens beside running requests, from steps of known cost."""

from __future__ import annotations

import pytest

from idlm.decoding.plan import AR, Plan
from idlm.engine.metrics import FIRST_BUDGET, LARGEST_BUDGET, SMALLEST_BUDGET, Metrics

TOKEN = 5e-5


def step(batch: int) -> float:
    """Seconds of a decode step: a share of its own and one a request."""
    return (2e-3 + 5e-4 * batch) if batch else 0.0


def test_nothing_known_and_the_ends_of_the_range() -> None:
    metrics = Metrics()
    assert metrics.prefill_budget() == FIRST_BUDGET
    metrics.count_launch(AR, 0, 100, 100.0)
    metrics.count_launch(AR, 1, 0, 1e-3)
    assert metrics.prefill_budget() == SMALLEST_BUDGET
    metrics.count_launch(AR, 1, 0, 1e9)
    assert metrics.prefill_budget() == LARGEST_BUDGET


def test_prompts_take_about_as_long_as_the_step_they_are_beside() -> None:
    metrics = Metrics()
    metrics.count_launch(AR, 0, 200, 200 * TOKEN)
    metrics.count_launch(AR, 8, 0, step(8))
    assert metrics.prefill_budget() == pytest.approx(step(8) / TOKEN, abs=1)


@pytest.mark.parametrize("plan", [AR, Plan(4, "chain")])
def test_the_budget_follows_a_batch_that_grows_while_every_step_has_prompts(plan: Plan) -> None:
    """A burst of requests: from the first one that decodes on, no step is without prompts until all
    do."""
    metrics = Metrics()
    metrics.count_launch(plan, 0, 200, 200 * TOKEN)
    metrics.count_launch(plan, 1, 0, step(1))
    for batch in range(1, 33):
        budget = metrics.prefill_budget()
        metrics.count_launch(plan, batch, budget, step(batch) + budget * TOKEN)
        assert metrics.prefill_budget() == pytest.approx(step(batch) / TOKEN, rel=0.05)
