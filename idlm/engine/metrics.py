"""`Metrics`: what an engine has done so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from idlm.decoding.plan import Plan

GAP_SHARE = 1.0
"""Decode steps that the prompt tokens beside running requests may take. Their wait then stays below
three: the estimate comes from the chunks before, and this one sees a longer prefix."""
SMOOTHING = 0.2
FIRST_BUDGET = 64
SMALLEST_BUDGET, LARGEST_BUDGET = 16, 4096


@dataclass
class Metrics:
    """Counters since the start; times in seconds.

    Attributes:
        steps: engine steps that launched something; tokens: committed for callers.
        decode_steps, rows: forwards of running requests, and the requests in them, summed.
        plans: how often each plan was run, by name.
        step_seconds: of all steps; device_seconds: of it, launching and waiting for the device.
    """

    steps: int = 0
    tokens: int = 0
    prefill_tokens: int = 0
    decode_steps: int = 0
    rows: int = 0
    window_rows: int = 0
    preemptions: int = 0
    plans: Counter[str] = field(default_factory=Counter)
    step_seconds: float = 0.0
    device_seconds: float = 0.0
    _decodes: dict[tuple[Plan, int], float] = field(default_factory=dict)
    _decode_seconds: float | None = None
    _prefill_average: float | None = None

    @property
    def host_seconds(self) -> float:
        """Time in which the device had nothing of ours to wait for: scheduling, text, bookkeeping."""
        return self.step_seconds - self.device_seconds

    def count_step(self, seconds: float) -> None:
        """A step ended."""
        self.steps += 1
        self.step_seconds += seconds

    def count_launch(self, plan: Plan, batch: int, prompt_tokens: int, seconds: float) -> None:
        """A forward of `batch` windows and so many prompt tokens was run."""
        self.device_seconds += seconds
        if batch:
            self.decode_steps += 1
            self.rows += batch
            self.window_rows += batch * plan.width
            self.plans[plan.name] += 1
        self.prefill_tokens += prompt_tokens
        self._estimate(plan, batch, prompt_tokens, seconds)

    def _estimate(self, plan: Plan, batch: int, prompt_tokens: int, seconds: float) -> None:
        """Seconds of a prompt token, and of a decode step as this one; while prompts wait, no step
        is without them."""
        alone = self._decodes.get((plan, batch)) if batch else 0.0
        if prompt_tokens and alone is not None:
            average = max(0.0, seconds - alone) / prompt_tokens
            self._prefill_average = _smooth(self._prefill_average, average)
        elif (
            prompt_tokens and self._prefill_average is not None
        ):  # not kept: each would confirm the other's error
            alone = max(0.0, seconds - prompt_tokens * self._prefill_average)
        elif not prompt_tokens:
            alone = self._decodes[plan, batch] = _smooth(alone, seconds)
        if batch and alone is not None:
            self._decode_seconds = alone

    def prefill_budget(self) -> int:
        """Prompt tokens that take about `GAP_SHARE` decode steps, from what both have taken lately."""
        if self._decode_seconds is None or not self._prefill_average:
            return FIRST_BUDGET
        fitting = int(GAP_SHARE * self._decode_seconds / self._prefill_average)
        return min(max(fitting, SMALLEST_BUDGET), LARGEST_BUDGET)


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else average + SMOOTHING * (value - average)
