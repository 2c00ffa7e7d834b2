"""The cost of a step: a table that is measured at the start, and corrections from running steps.

The seconds of a step of plan p for b requests are estimated as

    table(p, b) * own(p, b) * drift

`drift` is the state of the machine and the load: other processes, clock rate, longer prefixes, a
slower law. It is learned from the steps of the running plan. `own` is the error of the table for
one plan. It is learned from the first steps after a switch to that plan and from trial steps, since
the machine has hardly changed between the two. A part of it counts at all batch sizes: an error at
one size is likely to be one at others too, where the plan may not have been tried yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import exp, log
from typing import Any

from idlm.decoding.plan import Plan

OWN_RATE, DRIFT_RATE = 0.5, 0.1
"""Learning rates: the share of a step's log error that a correction takes over."""
PLAN_SHARE = 0.5
"""The part of a plan's own error that is taken over for all batch sizes."""
MOST = log(2.0)
"""Bound on the log error of a single step, since a step may have waited for something else."""


class CostTable:
    """Measured seconds per step, by plan and batch size."""

    def __init__(self) -> None:
        self._seconds: dict[Plan, dict[int, float]] = {}
        self._at: dict[int, dict[Plan, float]] = {}

    def put(self, batch: int, plan: Plan, seconds: float) -> None:
        """Store a measurement; it replaces an earlier one.

        Raises:
            ValueError: the batch or the seconds are not above 0.
        """
        if batch < 1 or not 0 < seconds < float("inf"):
            raise ValueError(f"{plan.name} at batch {batch} cannot take {seconds} seconds")
        measured = {**self._seconds.get(plan, {}), batch: seconds}
        self._seconds[plan] = dict(sorted(measured.items()))
        self._at.clear()

    @property
    def plans(self) -> list[Plan]:
        """The plans that have a measurement."""
        return list(self._seconds)

    def cost(self, batch: int, plan: Plan) -> float:
        """Seconds per step, by linear interpolation between measured batch sizes.

        Below the smallest batch size the cost is constant; above the largest, each further row
        adds `per_row`.

        Raises:
            KeyError: the plan was never measured.
        """
        measured = self._seconds[plan]
        below = max((size for size in measured if size <= batch), default=min(measured))
        above = min((size for size in measured if size >= batch), default=below)
        if above == below:
            return measured[below] + self.per_row * max(0, batch - below) * plan.width
        share = max(0, batch - below) / (above - below)
        return measured[below] + share * (measured[above] - measured[below])

    @property
    def per_row(self) -> float:
        """Seconds per further row: the slope between the measurements of fewest and most rows."""
        points = [
            (size * plan.width, seconds)
            for plan, measured in self._seconds.items()
            for size, seconds in measured.items()
        ]
        (fewest, least), (most, longest) = min(points), max(points)
        return max(0.0, longest - least) / max(1, most - fewest)

    def costs(self, batch: int) -> Mapping[Plan, float]:
        """The cost of every plan, for `choose`; cached by batch size."""
        if batch not in self._at:
            self._at[batch] = {plan: self.cost(batch, plan) for plan in self._seconds}
        return self._at[batch]

    def to_json(self) -> list[dict[str, Any]]:
        """The measurements as rows for `json.dump`."""
        return [
            {"stride": plan.stride, "branches": plan.branches, "batch": batch, "seconds": seconds}
            for plan, measured in self._seconds.items()
            for batch, seconds in measured.items()
        ]

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> CostTable:
        """Rebuild a table from the rows of `to_json`.

        Raises:
            ValueError: the rows are not such a table.
        """
        table = cls()
        try:
            for row in rows:
                table.put(row["batch"], Plan(row["stride"], row["branches"]), row["seconds"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a table of costs: {error!r}") from None
        return table


class RunningCosts:
    """A cost table with the corrections `drift` and `own`, which start at 1."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self._drift = 0.0
        self._own: dict[Plan | tuple[Plan, int], float] = {}

    def cost(self, batch: int, plan: Plan) -> float:
        """Corrected seconds per step.

        Raises:
            KeyError: the plan was never measured.
        """
        own = self._own.get(plan, 0.0) + self._own.get(_key(plan, batch), 0.0)
        return self.table.cost(batch, plan) * exp(self._drift + own)

    def costs(self, batch: int) -> Mapping[Plan, float]:
        """The corrected cost of every plan, for `choose`."""
        return {plan: self.cost(batch, plan) for plan in self.table.plans}

    def observe(self, batch: int, plan: Plan, seconds: float, own: bool) -> None:
        """Learn from a step that has run: correct `own` of its plan, or `drift`."""
        error = log(seconds / self.cost(batch, plan))
        error = min(max(error, -MOST), MOST)
        if own:
            for key, share in ((plan, PLAN_SHARE), (_key(plan, batch), 1 - PLAN_SHARE)):
                self._own[key] = self._own.get(key, 0.0) + OWN_RATE * share * error
        else:
            self._drift += DRIFT_RATE * error


def _key(plan: Plan, batch: int) -> tuple[Plan, int]:
    """The key of a correction: batches of 1, 2-3, 4-7, ... share one."""
    return plan, batch.bit_length()
