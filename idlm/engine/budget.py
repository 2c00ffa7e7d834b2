"""`PrefillBudget`: how many prompt tokens a step prefills beside the windows of decoding requests.

A step that also prefills takes longer, and every decoding request waits for it. The budget keeps
that wait below about three decode steps: it is the number of prompt tokens that take about as long
as one decode step, from what both took in the steps before.
"""

from __future__ import annotations

from idlm.decoding.plan import Plan

GAP_SHARE = 1.0
"""Decode steps that the prompt tokens beside decoding requests may take. Requests then wait for
less than three: the estimate comes from earlier chunks, and later chunks attend to a longer
prefix."""
SMOOTHING = 0.2
FIRST_BUDGET = 64
SMALLEST_BUDGET, LARGEST_BUDGET = 16, 4096
MOST_STEPS = 4
"""The most decode steps' worth of prompt tokens that a step takes where prefilling requests
outnumber decoding ones."""
PREFILL_ALONE = 2048
"""Prompt tokens of one step while nobody decodes."""
PREFILL_LATE = 512
"""Prompt tokens of a step where results are read later than it is launched: the host's clock then
measures launches only."""


class PrefillBudget:
    """The budget of an engine's steps.

    Args:
        fixed: prompt tokens beside decoding requests, if the user has set them.
        clocked: whether the seconds given to `observe` are those of the device.
    """

    def __init__(self, fixed: int | None = None, clocked: bool = True) -> None:
        self._fixed, self._clocked = fixed, clocked
        self._decodes: dict[tuple[Plan, int], float] = {}  # seconds of a decode step without chunks
        self._decode_seconds: float | None = None  # of the last kind of step
        self._token_seconds: float | None = None  # of a prompt token

    def tokens(self, decoding: int, prefilling: int) -> int:
        """Prompt tokens of the next step, by the numbers of decoding and prefilling requests.

        More where most requests prefill: else the few that decode would hold up all others.
        """
        if not decoding:
            return PREFILL_ALONE
        if self._fixed is not None:
            return self._fixed
        worth = self.step_worth() if self._clocked else PREFILL_LATE
        return min(worth * min(max(1, prefilling // decoding), MOST_STEPS), PREFILL_ALONE)

    def step_worth(self) -> int:
        """Prompt tokens that take about `GAP_SHARE` decode steps."""
        if self._decode_seconds is None or not self._token_seconds:
            return FIRST_BUDGET
        fitting = int(GAP_SHARE * self._decode_seconds / self._token_seconds)
        return min(max(fitting, SMALLEST_BUDGET), LARGEST_BUDGET)

    def observe(self, plan: Plan, batch: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step of `batch` windows and so many prompt tokens what it took."""
        decode = self._decodes.get((plan, batch)) if batch else 0.0
        if not prompt_tokens:
            decode = self._decodes[plan, batch] = _smooth(decode, seconds)
        elif decode is not None:
            token = max(0.0, seconds - decode) / prompt_tokens
            self._token_seconds = _smooth(self._token_seconds, token)
        elif self._token_seconds is not None:
            # not stored: estimates derived from each other would drift together
            decode = max(0.0, seconds - prompt_tokens * self._token_seconds)
        if batch and decode is not None:
            self._decode_seconds = decode


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else average + SMOOTHING * (value - average)
