"""`LookupPlanner`: for each step, whether lookup drafts are verified, and how many.

Every step looks drafts up, so a step that verifies none costs what AR does, and the next step may
still verify some. The choice is made anew for each step, from the lengths of the matches that the
host knows: on a GPU those of a step before.

    AR                     a token for each request
    a plan of MASK rows    what `Planner` expects of it; lookup drafts in place of its own
    a lookup plan          lookup drafts alone: less costly, often more of them, and no drafts
                           for the next step where the match ends

The one with the most expected tokens per second runs. So where nothing matches, nothing is lost. In
a plan of MASK rows, drafts are looked up where the match is long enough to promise more tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from idlm.decoding.costs import RunningCosts
from idlm.decoding.lookup import LONGEST, RunningMatches, tokens_after
from idlm.decoding.plan import Figure, Plan, RunningAcceptance, expected_tokens
from idlm.engine.planner import LOOK_SHARE
from idlm.engine.request import Request
from idlm.engine.results import SlotResult

COMPARE_EVERY = 16
"""Steps between two comparisons of lookup drafts with those of MASK rows."""
MOST_SAVED = 20.0
"""The most time, in steps, that is saved up for trials. Without a match there are none."""


class LookupPlanner:
    """Chooses between a plan of `Planner` and lookup plans.

    Args:
        plans: the lookup plans.
        costs: of all plans, which the steps of `Planner`'s plans correct too.
        acceptance: of the drafts of MASK rows, which `Planner` estimates.
        replace_from: is called with the length of matches whose drafts shall take the place of
            those of MASK rows.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        costs: RunningCosts,
        acceptance: RunningAcceptance,
        replace_from: Callable[[int], None],
    ) -> None:
        self.plans, self.costs, self.acceptance = list(plans), costs, acceptance
        self._replace_from, self._age = replace_from, 0
        self.chances = RunningMatches()
        self._depth = max(plan.drafts for plan in plans)
        self._allowance = 0.0

    @property
    def reason(self) -> str:
        """What it knows, in one line."""
        chances = " ".join(f"{chance:.2f}" for chance in self.chances.values)
        return f"lookup drafts accepted after a match of 1 to {LONGEST} tokens: {chances}"

    def choose(self, usual: Plan, requests: Sequence[Request]) -> Plan:
        """The plan for a step of the decoding `requests`, where `Planner` has chosen `usual`."""
        if usual.masks:
            self._age -= 1
            if self._age < 0:
                self._age = COMPARE_EVERY
                self.chances.forget()
                self._replace_from(self.long(usual))
        matches = Counter(request.matched for request in requests if request.matched)
        if not matches:
            return usual
        first, *others = self._figures(usual, matches, len(requests))
        best = max(others, key=lambda figure: figure.rate)
        if best.rate > first.rate:
            return best.plan
        # the cost of a plan that seems too slow may be wrong: try it for a small share of the time
        loss = best.seconds - best.tokens / first.rate
        if loss > self._allowance:
            return usual
        self._allowance -= loss
        return best.plan

    def long(self, usual: Plan) -> int:
        """The least length of matches after which lookup drafts promise more tokens than those of
        MASK rows in a window of the plan; more than `LONGEST` if none do."""
        depth, chances = usual.drafts, self.chances.values
        masks = expected_tokens(Plan(usual.stride, "all"), self.acceptance.values)
        better = (
            matched
            for matched in range(1, LONGEST + 1)
            if tokens_after({matched: 1}, chances, depth)[depth] > masks
        )
        return next(better, LONGEST + 1)

    def _figures(self, usual: Plan, matches: Mapping[int, int], batch: int) -> list[Figure]:
        """Tokens and seconds of the step, for the usual plan and then for each lookup plan."""
        depth = max(self._depth, usual.drafts)
        tokens = tokens_after(matches, self.chances.values, depth)
        looked = sum(matches.values())
        # MASK rows leave drafts that are worth so many tokens to the next step; a lookup plan
        # leaves some where the match goes on, which is where all of its drafts are accepted
        drafts = expected_tokens(usual, self.acceptance.values) - 1 if usual.masks else 0.0
        of_usual = tokens[usual.drafts] + (batch - looked) * (1 + drafts)
        figures = [Figure(usual, of_usual, self.costs.cost(batch, usual))]
        for plan in self.plans:
            going_on = tokens[plan.drafts] - tokens[plan.drafts - 1]
            of_plan = tokens[plan.drafts] + batch - looked - (looked - going_on) * drafts
            figures.append(Figure(plan, of_plan, self.costs.cost(batch, plan)))
        return figures

    def observe(self, request: Request, slot: SlotResult) -> None:
        """Learn from the window of a request with lookup drafts. If none were verified, AR's token
        still tells whether the first was right."""
        if slot.drafted:
            reached = min(slot.drafted, slot.accepted + 1)
            self.chances.update(request.matched, reached, slot.accepted)
        elif slot.committed:
            self.chances.update(request.matched, 1, int(slot.tokens[0] == request.guess))

    def observe_cost(self, batch: int, plan: Plan, seconds: float) -> None:
        """Correct the cost of a lookup plan with the time of a step, or save up for trials."""
        if plan in self.plans:
            self.costs.observe(batch, plan, seconds, own=True)
        self._allowance = min(self._allowance + LOOK_SHARE * seconds, MOST_SAVED * seconds)
