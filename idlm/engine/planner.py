"""`Planner`: which plan the next step runs; and the measured costs it decides by."""

from __future__ import annotations

from collections.abc import Sequence

from idlm.decoding.costs import CostTable, RunningCosts
from idlm.decoding.plan import AR, Choice, Plan, RunningAcceptance, choose

SETTLING = 6
"""Steps after a change of plan whose times tell of the plan and not of the machine."""
LOOK_SHARE = 0.01
"""Share of the time that looks at other plans may cost."""
WORTH_A_LOOK = 0.5
"""A plan is looked at if it is expected to bring at least this share of the best one's tokens."""
CHOOSE_EVERY = 8
"""Steps between two looks at the costs, unless the batch changes: a look costs a fraction of a
millisecond."""


class Planner:
    """A fixed plan, or the best of several by measured cost and running acceptance.

    Costs are measured when the engine starts and corrected by every step since. Now and then a step
    runs another plan, the one not seen for longest among those that could be the best: what such
    looks are expected to cost stays below `LOOK_SHARE` of the time.
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
        """Why the plan in use was chosen, in one line."""
        return f"{self.current.name}: fixed" if self._choice is None else self._choice.reason

    def choose(self, batch: int, drafting: bool = True) -> Plan:
        """The plan for a step of `batch` requests; AR where none of them wants drafts."""
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
        """Learn from a step: drafts looked at and accepted, by depth, over all requests."""
        self.acceptance.update(reached, accepted)

    def observe_cost(self, batch: int, plan: Plan, seconds: float) -> None:
        """Learn from a step what it took; not of one that prefilled, or was recorded, as well."""
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
        """Take up another plan for a look, if the allowance pays for it."""
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
    """Steps of a look at `plan`, and the seconds by which it is expected to bring less.

    Drafts have to be made before they can be judged, so from AR a look takes two steps; and AR
    leaves none, so the step after a look at it commits one token.
    """
    current, _, own = choice.figures[0]
    if current == AR:
        steps, spent, gained = 2, 2 * seconds, 1 + tokens
    elif plan == AR:
        steps, spent, gained = 1, seconds + own, 2.0
    else:
        steps, spent, gained = 1, seconds, min(tokens, choice.figures[0][1])
    return steps, max(spent - gained / choice.tokens_per_second, 0.1 * seconds)
