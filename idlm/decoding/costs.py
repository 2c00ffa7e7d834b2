"""What a step costs: a table measured beforehand, and its correction by the steps that really run.

Seconds of a step of plan p for b requests are estimated as

    table(p, b) * own(p, b) * drift

`drift` is the machine: another process, a lower clock, longer prefixes, a dearer law. `own` is what
the table has wrong about one plan. The plan that runs tells of the machine; a plan that has only
just been taken up, or is looked at for a step, tells of itself, since the machine has hardly
changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import exp, log
from typing import Any

from idlm.decoding.plan import Plan

OWN_RATE, DRIFT_RATE = 0.5, 0.1
"""Shares of a step's error, in logarithms, that are taken over."""
MOST = log(2.0)
"""The error of one step that counts at most: a step may have waited for anything."""


class CostTable:
    """Measured seconds of a step, by plan and batch size."""

    def __init__(self) -> None:
        self._seconds: dict[Plan, dict[int, float]] = {}
        self._at: dict[int, dict[Plan, float]] = {}

    def put(self, batch: int, plan: Plan, seconds: float) -> None:
        """Store a measurement; the newest counts.

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
        """Every plan that was measured at all."""
        return list(self._seconds)

    def cost(self, batch: int, plan: Plan) -> float:
        """Seconds of a step: linear between the nearest measured batch sizes; below them the
        smallest one's; beyond them what the further rows cost at the rate of `per_row`.

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
        """Seconds of a further row, between the measurements of the fewest and the most rows."""
        points = [
            (size * plan.width, seconds)
            for plan, measured in self._seconds.items()
            for size, seconds in measured.items()
        ]
        (fewest, least), (most, longest) = min(points), max(points)
        return max(0.0, longest - least) / max(1, most - fewest)

    def costs(self, batch: int) -> Mapping[Plan, float]:
        """`cost` of every plan: what `choose` takes. Worked out once for each batch size."""
        if batch not in self._at:
            self._at[batch] = {plan: self.cost(batch, plan) for plan in self._seconds}
        return self._at[batch]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain lists, dictionaries and numbers, for `json.dump`."""
        return [
            {"stride": plan.stride, "branches": plan.branches, "batch": batch, "seconds": seconds}
            for plan, measured in self._seconds.items()
            for batch, seconds in measured.items()
        ]

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> CostTable:
        """The table that `to_json` wrote.

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
    """The table, corrected by every step since."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self._drift = 0.0
        self._own: dict[tuple[Plan, int], float] = {}

    def cost(self, batch: int, plan: Plan) -> float:
        """Seconds of a step.

        Raises:
            KeyError: the plan was never measured.
        """
        return self.table.cost(batch, plan) * exp(
            self._drift + self._own.get(_key(plan, batch), 0.0)
        )

    def costs(self, batch: int) -> Mapping[Plan, float]:
        """`cost` of every plan."""
        return {plan: self.cost(batch, plan) for plan in self.table.plans}

    def observe(self, batch: int, plan: Plan, seconds: float, own: bool) -> None:
        """Learn from a step that has run: of the plan itself where `own`, else of the machine."""
        error = log(seconds / self.cost(batch, plan))
        error = min(max(error, -MOST), MOST)
        if own:
            key = _key(plan, batch)
            self._own[key] = self._own.get(key, 0.0) + OWN_RATE * error
        else:
            self._drift += DRIFT_RATE * error


def _key(plan: Plan, batch: int) -> tuple[Plan, int]:
    """Batches of 1, 2-3, 4-7, ... are corrected together."""
    return plan, batch.bit_length()
