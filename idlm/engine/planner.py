"""`Planner`: chooses the plan of the next step by measured costs and running acceptance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from idlm.decoding.costs import CostTable, RunningCosts
from idlm.decoding.plan import (
    AR,
    Choice,
    Figure,
    Plan,
    RunningAcceptance,
    choose,
    expected_tokens,
)

SETTLING = 6
"""The times of so many steps after a change of plan correct the cost of that plan. The times of
later steps correct the costs of all plans (`RunningCosts`)."""
LOOK_SHARE = 0.01
"""The share of the time that trials of other plans ("looks") may cost."""
WORTH_A_LOOK = 0.5
"""A plan is tried if its expected tokens per second are at least this share of the best plan's."""
GAIN_DECAY, GAIN_WEIGHT = 0.99, 32.0
"""The running gain (see `choose`) forgets at this rate a step, and counts so many tokens at 1."""
LIKELY_ACCEPTANCE = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
"""The acceptance of drafts for which `Planner.likely` compares the plans."""
CHOOSE_EVERY = 8
"""Steps between two comparisons of all plans. A change of the batch size also causes a comparison,
which takes a fraction of a millisecond."""


class Planner:
    """Chooses the only plan, or the best of several by measured cost and running acceptance.

    Costs are measured when the engine starts. Every step corrects them. From time to time a step
    tries another plan (a look): in turn AR, and of the other plans that could be the best the least
    recently used. The expected cost of looks stays below `LOOK_SHARE` of the time.

    While no request drafts, AR is the current plan, and its steps correct the costs of all plans.
    The next choice is then as free as the first one: no request has drafts to lose.
    """

    def __init__(self, plans: Sequence[Plan], costs: CostTable | None = None) -> None:
        self.plans = list(plans)
        self.costs = None if costs is None else RunningCosts(costs)
        self.current = self.plans[0]
        self.widest = max(self.plans, key=lambda plan: plan.stride)
        self.acceptance = RunningAcceptance(self.widest.drafts)
        self._brought = self._expected = GAIN_WEIGHT
        self._choice: Choice | None = None
        self._lost = 0.0
        self._batch = (0, 0)
        self._age = 0
        self._settling = 0
        self._look: Plan | None = None
        self._looked = False  # whether the last look was at AR
        self._look_steps = 0
        self._allowance = 0.0
        self._seen: dict[Plan, int] = {}
        self._steps = 0

    @property
    def reason(self) -> str:
        """The reason for the current plan, in one line."""
        if self.costs is None:
            return f"{self.current.name}: fixed"
        return "ar: no request drafts" if self._choice is None else self._choice.reason

    @property
    def gain(self) -> float:
        """The running share of the expected tokens beyond one per step that steps bring to requests
        that draft."""
        return self._brought / self._expected

    def likely(self, largest: int) -> list[Plan]:
        """All plans; those that are best at some acceptance and batch size up to `largest` come
        first, the most frequent one at the head."""
        if self.costs is None:
            return self.plans
        best = Counter(
            choose(self.plans, self.costs.costs(1 << power), [acceptance]).plan
            for power in range(largest.bit_length())
            for acceptance in LIKELY_ACCEPTANCE
        )
        return sorted(self.plans, key=lambda plan: -best[plan])

    def choose(
        self,
        batch: int,
        drafting: int,
        ready: Callable[[Plan], bool] = lambda _: True,
    ) -> Plan:
        """The plan for a step of `batch` requests, of which `drafting` draft; AR if none does.

        `ready` tells whether a step with a plan runs at its full speed at once, and whether its
        time would be observed. Other plans are not tried; they are only chosen.
        """
        if self.costs is None:
            return self.current if drafting else AR
        if not drafting:
            self._rest()
            return AR
        if self._look is not None and self._look_steps:
            self._look_steps -= 1
            return self._look
        self._look = None
        self._age += 1
        if (batch, drafting) != self._batch or self._age >= CHOOSE_EVERY:
            values, costs = self.acceptance.values, self.costs.costs(batch)
            # the windows of requests that do not draft commit one token
            self._change(choose(self.plans, costs, values, self.gain * drafting / batch))
            self._batch, self._age = (batch, drafting), 0
            if self._start_look(ready):
                self._look_steps -= 1
                return self._look or self.current
        return self.current

    def _rest(self) -> None:
        """Make AR the current plan, until a request drafts again."""
        self._settle(AR)
        self._choice, self._look, self._batch = None, None, (0, 0)

    def _settle(self, plan: Plan) -> None:
        """Make `plan` the current one. Its first steps tell its cost beside that of the plan before
        it, unless it is the first of all."""
        if plan != self.current:
            self._settling = SETTLING if self._steps else 0
        self._lost, self.current = 0.0, plan

    def _change(self, choice: Choice) -> None:
        """Change to the best plan once the time lost without it has reached the price of the
        change. So plans of nearly the same speed do not alternate."""
        best = choice.figures[0]
        now = next(figure for figure in choice.figures if figure.plan == self.current)
        # without an earlier choice there is nothing to lose: no request has drafts yet
        if self._choice is not None and best.plan != now.plan:
            self._lost += self._age * now.seconds * (1 - now.rate / best.rate)
            if self._lost < _price(now, best):
                self._choice = choice.keep(now.plan)
                return
        self._settle(best.plan)
        self._choice = choice

    def observe(self, reached: Sequence[int], accepted: Sequence[int]) -> None:
        """Count a step's reached and accepted drafts, by depth, of all requests."""
        self.acceptance.update(reached, accepted)

    def observe_tokens(self, plan: Plan, windows: int, tokens: int) -> None:
        """Correct the gain with the tokens that the windows of requests that draft committed in a
        step. Do not call it for a step after AR, which left no drafts."""
        if self.costs is None or not plan.drafts:
            return
        expected = windows * (expected_tokens(plan, self.acceptance.values) - 1)
        self._brought += (1 - GAIN_DECAY) * (GAIN_WEIGHT - self._brought) + tokens - windows
        self._expected += (1 - GAIN_DECAY) * (GAIN_WEIGHT - self._expected) + expected

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
        if self._choice is not None:
            self._allowance += LOOK_SHARE * seconds

    def _start_look(self, ready: Callable[[Plan], bool]) -> bool:
        """Begin a look at another plan if its expected cost is within the allowance. True if it
        has begun."""
        assert self._choice is not None  # noqa: S101
        now, *others = self._choice.figures
        others = [
            other for other in others if other.rate >= WORTH_A_LOOK * now.rate and ready(other.plan)
        ]
        if not others:
            return False

        def order(figure: Figure) -> tuple[bool, int]:
            # AR every other time, since no plan may be slower than AR
            return self._looked == (figure.plan == AR), self._seen.get(figure.plan, 0)

        other = min(others, key=order)
        steps, loss = _look(now, other)
        if loss > self._allowance:
            return False
        self._allowance -= loss
        self._look, self._look_steps = other.plan, steps
        self._seen[other.plan], self._looked = self._steps, other.plan == AR
        return True


def _price(now: Figure, new: Figure) -> float:
    """The seconds that the first step of a new plan loses against its later ones.

    It verifies only the drafts that the plan before has left. AR leaves none and verifies none.
    """
    first = 1.0 if AR in (now.plan, new.plan) else min(now.tokens, new.tokens)
    return new.seconds - first / new.rate


def _look(now: Figure, other: Figure) -> tuple[int, float]:
    """The number of steps of a look at another plan, and its expected cost in seconds against
    staying with the plan that runs.

    From AR a look takes two steps: the first makes drafts, the second verifies them. From another
    plan it takes one, and the step after it verifies only what the look has drafted.
    """
    if now.plan == AR:
        steps, spent, gained = 2, 2 * other.seconds, 1 + other.tokens
    else:
        steps, spent = 1, other.seconds + now.seconds
        gained = 2 * min(other.tokens, now.tokens)
    return steps, max(spent - gained / now.rate, 0.1 * other.seconds)
