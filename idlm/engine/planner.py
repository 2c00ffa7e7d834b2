"""`Planner`: chooses the plan of the next step by measured costs and running acceptance."""

from __future__ import annotations

from collections.abc import Sequence

from idlm.decoding.costs import CostTable, RunningCosts
from idlm.decoding.plan import AR, Choice, Plan, RunningAcceptance, choose

SETTLING = 6
"""The times of so many steps after a change of plan correct the cost of that plan. The times of
later steps correct the costs of all plans (`RunningCosts`)."""
LOOK_SHARE = 0.01
"""The share of the time that trials of other plans ("looks") may cost."""
WORTH_A_LOOK = 0.5
"""A plan is tried if its expected tokens per second are at least this share of the best plan's."""
CHOOSE_EVERY = 8
"""Steps between two comparisons of all plans. A change of the batch size also causes a comparison,
which takes a fraction of a millisecond."""


class Planner:
    """Chooses the only plan, or the best of several by measured cost and running acceptance.

    Costs are measured when the engine starts. Every step corrects them. From time to time a step
    tries another plan (a look): of the plans that could be the best, the least recently used. The
    expected cost of looks stays below `LOOK_SHARE` of the time.
    """

    def __init__(self, plans: Sequence[Plan], costs: CostTable | None = None) -> None:
        self.plans = list(plans)
        self.costs = None if costs is None else RunningCosts(costs)
        self.current = self.plans[0]
        self.widest = max(self.plans, key=lambda plan: plan.stride)
        self.acceptance = RunningAcceptance(self.widest.drafts)
        self._choice: Choice | None = None
        self._batch = 0
        self._age = 0
        self._settling = 0
        self._look: Plan | None = None
        self._look_steps = 0
        self._allowance = 0.0
        self._seen: dict[Plan, int] = {}
        self._steps = 0

    @property
    def reason(self) -> str:
        """The reason for the current plan, in one line."""
        return f"{self.current.name}: fixed" if self._choice is None else self._choice.reason

    def choose(self, batch: int, drafting: bool = True) -> Plan:
        """The plan for a step of `batch` requests; AR if none of them is `drafting`."""
        if not drafting:
            return AR
        if self.costs is None:
            return self.current
        if self._look is not None and self._look_steps:
            self._look_steps -= 1
            return self._look
        self._look = None
        self._age += 1
        if batch != self._batch or self._age >= CHOOSE_EVERY:
            self._batch, self._age = batch, 0
            costs = self.costs.costs(batch)
            choice = choose(self.plans, costs, self.acceptance.values, self.current)
            if choice.plan != self.current:
                self._settling = SETTLING
            self.current, self._choice = choice.plan, choice
            if self._start_look(choice):
                self._look_steps -= 1
                return self._look or self.current
        return self.current

    def observe(self, reached: Sequence[int], accepted: Sequence[int]) -> None:
        """Count a step's reached and accepted drafts, by depth, of all requests."""
        self.acceptance.update(reached, accepted)

    def observe_cost(self, batch: int, plan: Plan, seconds: float) -> None:
        """Correct the costs with the time of a step. Do not call it for a step that also prefilled
        or was being recorded."""
        if self.costs is None or plan not in self.plans:
            return
        own = plan != self.current or self._settling > 0
        self.costs.observe(batch, plan, seconds, own)
        if plan == self.current and self._settling:
            self._settling -= 1
        self._steps += 1
        self._seen[plan] = self._steps
        self._allowance += LOOK_SHARE * seconds

    def _start_look(self, choice: Choice) -> bool:
        """Begin a look at another plan if its expected cost is within the allowance. True if it
        has begun."""
        best = choice.tokens_per_second
        others = [one for one in choice.figures[1:] if one[1] / one[2] >= WORTH_A_LOOK * best]
        if not others:
            return False
        plan, tokens, seconds = min(others, key=lambda one: self._seen.get(one[0], 0))
        steps, loss = _price(choice, plan, tokens, seconds)
        if loss > self._allowance:
            return False
        self._allowance -= loss
        self._look, self._look_steps = plan, steps
        self._seen[plan] = self._steps
        return True


def _price(choice: Choice, plan: Plan, tokens: float, seconds: float) -> tuple[int, float]:
    """The number of steps of a look at `plan`, and its expected cost in seconds against the best
    plan.

    From AR a look takes two steps: the first makes drafts, the second verifies them. AR makes no
    drafts, so the step after a look at AR commits one token.
    """
    current, _, own = choice.figures[0]
    if current == AR:
        steps, spent, gained = 2, 2 * seconds, 1 + tokens
    elif plan == AR:
        steps, spent, gained = 1, seconds + own, 2.0
    else:
        steps, spent, gained = 1, seconds, min(tokens, choice.figures[0][1])
    return steps, max(spent - gained / choice.tokens_per_second, 0.1 * seconds)
