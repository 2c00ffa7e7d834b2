"""`LookupPlanner`: for each step, whether lookup drafts are verified, and how many.

Every step looks drafts up, so a step that verifies none costs what AR does, and the next step may
still verify some. The choice is made anew for each step, from the lengths of the matches that the
host knows: on a GPU those of a step before.

    AR                     a token for each request
    a plan of MASK rows    what `Planner` expects of it; lookup drafts in place of its own
    a lookup plan          lookup drafts alone: less costly, often more of them, and no drafts
                           for the next step where the match ends

The one with the most expected tokens per second runs. So where nothing matches, nothing is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from idlm.decoding.costs import RunningCosts
from idlm.decoding.lookup import LONGEST, RunningMatches, tokens_after
from idlm.decoding.plan import Figure, Plan, RunningAcceptance, expected_tokens
from idlm.engine.planner import LOOK_SHARE
from idlm.engine.request import Request
from idlm.engine.results import SlotResult


class LookupPlanner:
    """Chooses between a plan of `Planner` and lookup plans.

    Args:
        plans: the lookup plans.
        costs: of all plans, which the steps of `Planner`'s plans correct too.
        acceptance: of the drafts of MASK rows, which `Planner` estimates.
    """

    def __init__(
        self, plans: Sequence[Plan], costs: RunningCosts, acceptance: RunningAcceptance
    ) -> None:
        self.plans, self.costs, self.acceptance = list(plans), costs, acceptance
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
        self._allowance += LOOK_SHARE * seconds
