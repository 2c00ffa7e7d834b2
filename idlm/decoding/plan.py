"""The planner: how many tokens a window is worth, what it costs, and which one to run next.

With per-depth acceptance a_1 .. a_K of K = N - 1 drafts, r_k = a_1 * .. * a_k the chance that the
first k stand, and P the chance that the outcome has masks (so that the next window has drafts), a
window with drafts commits 1 + r_1 + .. + r_K tokens; one without commits 1 and always leaves
drafts. Windows with drafts are 1 / (2 - P) of all:

    tokens per forward = (1 + r_1 + .. + r_K + 1 - P) / (2 - P)

All outcomes: P = 1. Chain: P = r_K. DESIGN section 4 gives the same formulas for equal a_k.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from idlm.decoding.window import MAX_WIDTH, Branches, outcomes, parse_branches, window
from idlm.errors import InputError


@dataclass(frozen=True)
class Plan:
    """A window to run: `stride` N and the outcomes that get masks. All plans with stride 1 are the
    same: AR.

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
        """Drafts a window verifies, and masks an outcome has: K = N - 1."""
        return self.stride - 1

    @cached_property
    def outcomes(self) -> tuple[int, ...]:
        """The numbers of accepted drafts that get masks, when all drafts are valid."""
        return outcomes(self.branches, self.drafts)

    @cached_property
    def width(self) -> int:
        """Rows of a window: N**2 for all outcomes, 2N - 1 for the chain, 1 for AR."""
        return self.stride + len(self.outcomes) * self.drafts

    @property
    def name(self) -> str:
        """For people: "ar", "all-4", "chain-4"; "0+3-4" for the outcomes 0 and 3 at stride 4."""
        if self.stride == 1:
            return "ar"
        branches = (
            self.branches if isinstance(self.branches, str) else "+".join(map(str, self.branches))
        )
        return f"{branches}-{self.stride}"


AR = Plan(1, "all")


def expected_tokens(plan: Plan, acceptance: Sequence[float]) -> float:
    """Tokens a forward commits in the long run, windows without drafts counted.

    `acceptance` is by depth; a list shorter than the drafts goes on with its last value.

    Raises:
        InputError: the plan drafts and `acceptance` is empty.
    """
    if plan.drafts and not acceptance:
        raise InputError(
            f"acceptance=[] says nothing about {plan.name}; give at least the one of the first draft"
        )
    reach = [1.0]
    for depth in range(plan.drafts):
        reach.append(reach[-1] * acceptance[min(depth, len(acceptance) - 1)])
    reach.append(0.0)
    drafted = sum(reach[accepted] - reach[accepted + 1] for accepted in plan.outcomes)
    return (sum(reach) + 1 - drafted) / (2 - drafted)


@dataclass(frozen=True)
class Choice:
    """What to run next, what it is expected to give *each* running request, and why.

    Attributes:
        figures: of every candidate, the chosen one first, then the fastest first: plan, tokens a
            step, seconds a step.
    """

    plan: Plan
    tokens_per_second: float
    figures: list[tuple[Plan, float, float]] = field(repr=False)

    @property
    def reason(self) -> str:
        """One line with all figures; made when it is read, not for every step."""
        plan, tokens, seconds = self.figures[0]
        first = f"{plan.name}: {tokens:.2f} tokens / {1e3 * seconds:.1f} ms = {tokens / seconds:.0f} tok/s"
        others = (
            f"{p.name} {n:.2f} / {1e3 * t:.1f} ms = {n / t:.0f}" for p, n, t in self.figures[1:]
        )
        return "; ".join([first, *others])


def choose(
    plans: Iterable[Plan],
    costs: Mapping[Plan, float],
    acceptance: Sequence[float],
    current: Plan | None = None,
    margin: float = 0.03,
) -> Choice:
    """The plan, AR included, with the most expected tokens per second; of equals the narrowest.

    So that the plan does not flap, `current` stays until another is more than `margin` (a share)
    faster, or AR is faster at all: the margin is never spent on being slower than AR.

    Args:
        costs: seconds of a step at the present batch size, of every plan and of AR.

    Raises:
        KeyError: a plan has no cost.
    """
    candidates = sorted({*plans, AR}, key=lambda plan: plan.width)
    figures = [(plan, expected_tokens(plan, acceptance), costs[plan]) for plan in candidates]
    figures.sort(key=lambda figure: -figure[1] / figure[2])
    rates = {plan: tokens / seconds for plan, tokens, seconds in figures}
    best = figures[0][0]
    if (
        current in rates
        and rates[best] <= rates[current] * (1 + margin)
        and rates[current] >= rates[AR]
    ):
        best = current
    figures.sort(key=lambda figure: figure[0] != best)
    return Choice(best, rates[best], figures)


class RunningAcceptance:
    """Acceptance by depth over the last steps: accepted / reached, both fading by `decay` a step.

    A depth's estimate starts from the one of the depth before (the first one's from `prior`) as if
    `weight` drafts had shown it; a depth never reached therefore has the value of the depth before.
    Counts fade in every step with drafts, at all depths: one that is not tried any more drifts back
    to its start, and so gets tried again. Steps without drafts (AR) say nothing, so nothing fades:
    trying drafts again has a price, which `engine.planner` pays in small looks.
    """

    def __init__(
        self, depth: int, prior: float = 0.8, weight: float = 4.0, decay: float = 0.99
    ) -> None:
        self.prior, self.weight, self.decay = prior, weight, decay
        self._reached = [0.0] * depth
        self._accepted = [0.0] * depth

    def update(self, reached: Sequence[int], accepted: Sequence[int]) -> None:
        """Count one step: drafts looked at and drafts accepted, by depth, over all slots; missing
        depths are 0.

        Raises:
            ValueError: more depths than there are, or more accepted than reached.
        """
        if len(reached) != len(accepted) or len(reached) > len(self._reached):
            raise ValueError(
                f"{len(reached)} reached and {len(accepted)} accepted for {len(self._reached)} depths"
            )
        if not any(reached):
            return
        self._reached = [self.decay * count for count in self._reached]
        self._accepted = [self.decay * count for count in self._accepted]
        for depth, (looked, stood) in enumerate(zip(reached, accepted, strict=True)):
            if not 0 <= stood <= looked:
                raise ValueError(
                    f"accepted {stood} of {looked} reached drafts at depth {depth + 1}"
                )
            self._reached[depth] += looked
            self._accepted[depth] += stood

    @property
    def values(self) -> list[float]:
        """The estimates, by depth."""
        values: list[float] = []
        before = self.prior
        for reached, accepted in zip(self._reached, self._accepted, strict=True):
            before = (accepted + self.weight * before) / (reached + self.weight)
            values.append(before)
        return values


STRIDES = (2, 3, 4, 6, 8, 12, 16)
"""Strides that the planner tries below the largest."""


def candidates(stride: int) -> list[Plan]:
    """The plans up to a stride that fit a window: AR, and each stride's chain and all outcomes."""
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


def plans_for(stride: int, branches: str | tuple[int, ...]) -> list[Plan]:
    """The plans that an engine chooses from: several for "planner", else the one asked for.

    Raises:
        InputError: the stride or the branches are wrong, or too wide for a window.
    """
    if branches == "planner":
        parse_branches("chain", stride)
        return candidates(stride)
    chosen = parse_branches(branches, stride)
    window(stride, chosen)  # refuses one that is too wide
    return [Plan(stride, chosen)]
