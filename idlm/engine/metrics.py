"""`Metrics`: what an engine has done so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from idlm.decoding.plan import Plan


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

    @property
    def host_seconds(self) -> float:
        """Time outside launches and waits: scheduling, text, bookkeeping."""
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
