"""`Metrics`: counters of an engine's steps, tokens and times."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from idlm.decoding.plan import Plan


@dataclass
class Metrics:
    """Counters since the engine's start. Times are in seconds.

    Attributes:
        steps: engine steps that launched a forward.
        tokens: tokens that results have received.
        prefill_tokens: prompt tokens that were prefilled.
        decode_steps: forwards with at least one window.
        rows: windows in these forwards, summed.
        window_rows: rows of these windows, summed.
        preemptions: requests that were pre-empted.
        plans: the number of forwards with each plan, by the plan's name.
        step_seconds: the time of all steps.
        device_seconds: the part of it spent on launches and on waiting for the device.
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

    @property
    def host_seconds(self) -> float:
        """The time outside launches and waits: scheduling, text and bookkeeping."""
        return self.step_seconds - self.device_seconds

    def count_step(self, seconds: float) -> None:
        """Count an engine step that launched a forward and took `seconds`."""
        self.steps += 1
        self.step_seconds += seconds

    def count_launch(self, plan: Plan, batch: int, prompt_tokens: int) -> None:
        """Count a forward of `batch` windows and `prompt_tokens` prompt tokens."""
        if batch:
            self.decode_steps += 1
            self.rows += batch
            self.window_rows += batch * plan.width
            self.plans[plan.name] += 1
        self.prefill_tokens += prompt_tokens
