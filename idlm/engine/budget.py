"""`PrefillBudget`: how many prompt tokens a step prefills beside the windows of decoding requests.

A step that also prefills takes longer, and every decoding request waits for it. The budget keeps
that wait below about three decode steps. It is the number of prompt tokens that take about as long
as one decode step. Both times are estimated from earlier steps.
"""

from __future__ import annotations

from idlm.decoding.plan import Plan

GAP_SHARE = 1.0
"""The time that the prompt tokens of a step may take, in decode steps. Inter-token latency then
stays below three decode steps. It can exceed two: the time of a prompt token is estimated from
earlier chunks, and later chunks attend to a longer prefix."""
SMOOTHING = 0.2
FIRST_BUDGET = 64
SMALLEST_BUDGET, LARGEST_BUDGET = 16, 4096
MOST_STEPS = 4
"""The upper bound of the budget, in units of one decode step, if prefilling requests outnumber
decoding requests."""
PREFILL_ALONE = 2048
"""The budget of a step without decoding requests."""
PREFILL_LATE = 512
"""Used in place of `step_worth` if results are read after the next step is launched. The host's
clock then measures launches only."""


class PrefillBudget:
    """Computes the budget of each step.

    Args:
        fixed: the budget of steps with decoding requests, if the user has set it.
        clocked: whether `observe` gets the times of the device, and not of launches only.
    """

    def __init__(self, fixed: int | None = None, clocked: bool = True) -> None:
        self._fixed, self._clocked = fixed, clocked
        self._decodes: dict[tuple[Plan, int], float] = {}  # seconds of a decode step without chunks
        self._decode_seconds: float | None = None  # of the last kind of step
        self._token_seconds: float | None = None  # of a prompt token

    def tokens(self, decoding: int, prefilling: int) -> int:
        """The budget of the next step, given the numbers of decoding and prefilling requests.

        It is larger if most requests prefill. Otherwise a few decoding requests would delay the
        first tokens of many.
        """
        if not decoding:
            return PREFILL_ALONE
        if self._fixed is not None:
            return self._fixed
        worth = self.step_worth() if self._clocked else PREFILL_LATE
        return min(worth * min(max(1, prefilling // decoding), MOST_STEPS), PREFILL_ALONE)

    def step_worth(self) -> int:
        """The number of prompt tokens that take about as long as `GAP_SHARE` decode steps."""
        if self._decode_seconds is None or not self._token_seconds:
            return FIRST_BUDGET
        fitting = int(GAP_SHARE * self._decode_seconds / self._token_seconds)
        return min(max(fitting, SMALLEST_BUDGET), LARGEST_BUDGET)

    def observe(self, plan: Plan, batch: int, prompt_tokens: int, seconds: float) -> None:
        """Update the estimates with a step of `batch` windows and `prompt_tokens` prompt tokens."""
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
