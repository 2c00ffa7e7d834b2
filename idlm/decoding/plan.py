"""Which plan to run next: the expected tokens of a window, divided by the cost of a step.

Let a_1 .. a_K be the acceptance at each depth of K = N - 1 drafts, and r_k = a_1 * .. * a_k the
probability that the first k are accepted. Let P be the probability that the outcome has a branch,
so that the next window has drafts. A window with drafts commits 1 + r_1 + .. + r_K tokens. A window
without drafts commits 1, and the window after it has drafts. So windows with drafts are a share
1 / (2 - P) of all, and

    tokens per forward = (1 + r_1 + .. + r_K + 1 - P) / (2 - P)

All outcomes have P = 1, the chain has P = r_K. Windows of lookup drafts have no branches; their
expected tokens are those of `idlm.decoding.lookup`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from idlm.decoding.lookup import DEPTH
from idlm.decoding.window import MAX_WIDTH, Branches, outcomes, parse_branches, window
from idlm.errors import InputError


@dataclass(frozen=True)
class Plan:
    """The stride N and the branches of a window. All plans with stride 1 are equal: AR.

    Raises:
        InputError: see `parse_branches`.
    """

    stride: int
    branches: Branches

    def __post_init__(self) -> None:
        branches = parse_branches(self.branches, self.stride)
        object.__setattr__(self, "branches", "all" if self.stride == 1 else branches)

    @property
    def drafts(self) -> int:
        """K = N - 1: the drafts that a window verifies, and the MASK rows of a branch."""
        return self.stride - 1

    @property
    def masks(self) -> int:
        """The MASK rows of a window; 0 for AR and for lookup."""
        return self.width - self.stride

    @cached_property
    def outcomes(self) -> tuple[int, ...]:
        """The outcomes that have a branch if all drafts are valid."""
        return outcomes(self.branches, self.drafts)

    @cached_property
    def width(self) -> int:
        """W, the rows of a window: N**2 for all outcomes, 2N - 1 for the chain, N for lookup, 1 for
        AR."""
        return self.stride + len(self.outcomes) * self.drafts

    @property
    def name(self) -> str:
        """The plan's name: "ar", "all-4", "chain-4", "lookup-4"; "0+3-4" for outcomes 0 and 3 at
        stride 4."""
        if self.stride == 1:
            return "ar"
        branches = (
            self.branches if isinstance(self.branches, str) else "+".join(map(str, self.branches))
        )
        return f"{branches}-{self.stride}"


AR = Plan(1, "all")


def expected_tokens(plan: Plan, acceptance: Sequence[float]) -> float:
    """The expected tokens per forward, windows without drafts included (formula above).

    `acceptance` is by depth. Depths past the end of the list have its last value.

    Raises:
        InputError: the plan drafts and `acceptance` is empty.
    """
    if plan.drafts and not acceptance:
        raise InputError(
            f"acceptance=[] says nothing about {plan.name}; "
            "give at least the one of the first draft"
        )
    reach = [1.0]  # r_0 .. r_K
    for depth in range(plan.drafts):
        reach.append(reach[-1] * acceptance[min(depth, len(acceptance) - 1)])
    reach.append(0.0)  # r_{K+1}: so r_k - r_{k+1} is the probability of outcome k, for k = K too
    drafted = sum(reach[accepted] - reach[accepted + 1] for accepted in plan.outcomes)  # P
    return (sum(reach) + 1 - drafted) / (2 - drafted)


class Figure(NamedTuple):
    """What one step of a plan is expected to bring each request, and its seconds."""

    plan: Plan
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Choice:
    """The plan to run next, and the figures of every candidate: the chosen one first, then by
    falling rate."""

    figures: list[Figure]

    @property
    def plan(self) -> Plan:
        return self.figures[0].plan

    def keep(self, plan: Plan) -> Choice:
        """The same figures with another candidate as the chosen one."""
        return Choice(sorted(self.figures, key=lambda figure: (figure.plan != plan, -figure.rate)))

    @property
    def reason(self) -> str:
        """The figures in one line. It is formatted when it is read, since few steps need it."""
        plan, tokens, seconds = self.figures[0]
        chosen = (
            f"{plan.name}: {tokens:.2f} tokens / {1e3 * seconds:.1f} ms "
            f"= {tokens / seconds:.0f} tok/s"
        )
        others = (
            f"{p.name} {n:.2f} / {1e3 * t:.1f} ms = {n / t:.0f}" for p, n, t in self.figures[1:]
        )
        return "; ".join([chosen, *others])


def choose(
    plans: Iterable[Plan],
    costs: Mapping[Plan, float],
    acceptance: Sequence[float],
    gain: float = 1.0,
) -> Choice:
    """Choose the plan with the most expected tokens per second; of equal plans the narrowest.

    AR is always a candidate.

    Args:
        costs: seconds per step at the present batch size, for every plan and for AR.
        gain: the share of the expected tokens beyond one per step that steps really bring. It is
            below 1 where requests are short: their first window has no drafts yet, and their last
            one may draft past the end.

    Raises:
        KeyError: a plan has no cost.
    """
    candidates = sorted({*plans, AR}, key=lambda plan: plan.width)
    figures = [
        Figure(plan, 1 + gain * (expected_tokens(plan, acceptance) - 1), costs[plan])
        for plan in candidates
    ]
    return Choice(sorted(figures, key=lambda figure: -figure.rate))


class RunningAcceptance:
    """Acceptance by depth over recent steps: accepted / reached, both decayed by `decay` a step.

    The estimate of the depth before counts as `weight` more drafts; at depth 1 that is `prior`. So
    a depth that was never reached has the estimate of the depth before.

    Every step with drafts decays the counts of all depths. The estimate of a depth that is no
    longer drafted thus returns to that of the depth before, and the depth is drafted again. Steps
    without drafts (AR) change nothing: `engine.planner` decides when drafts are tried again.
    """

    def __init__(
        self, depth: int, prior: float = 0.8, weight: float = 4.0, decay: float = 0.99
    ) -> None:
        self.prior, self.weight, self.decay = prior, weight, decay
        self._reached = [0.0] * depth
        self._accepted = [0.0] * depth

    def update(self, reached: Sequence[int], accepted: Sequence[int]) -> None:
        """Count one step: the drafts that were reached and accepted, by depth, of all slots.

        Depths past the end of the lists have none.

        Raises:
            ValueError: more depths than there are, or more accepted than reached.
        """
        if len(reached) != len(accepted) or len(reached) > len(self._reached):
            raise ValueError(
                f"{len(reached)} reached and {len(accepted)} accepted "
                f"for {len(self._reached)} depths"
            )
        if not any(reached):
            return
        self._reached = [self.decay * count for count in self._reached]
        self._accepted = [self.decay * count for count in self._accepted]
        for depth, (tried, kept) in enumerate(zip(reached, accepted, strict=True)):
            if not 0 <= kept <= tried:
                raise ValueError(f"accepted {kept} of {tried} reached drafts at depth {depth + 1}")
            self._reached[depth] += tried
            self._accepted[depth] += kept

    @property
    def values(self) -> list[float]:
        """The estimated acceptance at each depth, from depth 1."""
        values: list[float] = []
        estimate = self.prior
        for reached, accepted in zip(self._reached, self._accepted, strict=True):
            estimate = (accepted + self.weight * estimate) / (reached + self.weight)
            values.append(estimate)
        return values


STRIDES = (2, 3, 4, 6, 8, 12, 16)
"""Strides that the planner tries below the largest."""


def candidates(stride: int) -> list[Plan]:
    """The plans that the planner compares: AR, and for strides up to `stride` the chain and all
    outcomes, if they fit the largest window. At stride 2 the chain is left out."""
    strides = sorted({*(n for n in STRIDES if n < stride), stride} - {1})
    plans = [Plan(n, branches) for n in strides for branches in ("chain", "all")]
    return [
        AR,
        *(
            plan
            for plan in plans
            if plan.width <= MAX_WIDTH and not (plan.stride == 2 and plan.branches == "chain")
        ),
    ]


LOOKUPS = tuple(Plan(n, "lookup") for n in (3, 5, DEPTH + 1))
"""The plans without MASK rows that the planner compares."""


def plans_for(stride: int, branches: str | tuple[int, ...]) -> list[Plan]:
    """The plans that an engine chooses from: `candidates` for "planner", else a single plan. Those
    of lookup drafts are beside them.

    Raises:
        InputError: the stride or the branches are invalid, or the window is wider than MAX_WIDTH.
    """
    if branches == "planner":
        parse_branches("chain", stride)
        return candidates(stride)
    chosen = parse_branches(branches, stride)
    window(stride, chosen)  # raises if it is too wide
    return [Plan(stride, chosen)]
