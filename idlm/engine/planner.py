"""`Planner`: which plan the next step runs; and the measured costs it decides by."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from idlm.decoding.plan import AR, Choice, CostTable, Plan, RunningAcceptance, choose
from idlm.decoding.window import MAX_WIDTH
from idlm.engine.runner import Runner
from idlm.kernels import native

STRIDES = (2, 3, 4, 6, 8, 12, 16)
MEASURE_SECONDS = 20.0
"""Measuring stops after this long; costs of what is left are taken from the nearest batch size measured."""
MEASURE_ROUNDS = 5
"""Times each plan is measured; the least counts, since noise only ever adds."""
CHOOSE_EVERY = 8
"""Steps between two looks at the costs, unless the batch changes: a look costs a fraction of a millisecond."""


def candidates(stride: int) -> list[Plan]:
    """Plans up to a stride: AR, and the chain and all outcomes of each stride that fit a window."""
    strides = sorted({*(n for n in STRIDES if n < stride), stride} - {1})
    plans = [Plan(n, branches) for n in strides for branches in ("chain", "all")]
    return [
        AR,
        *(plan for plan in plans if plan.width <= MAX_WIDTH and not (plan.stride == 2 and plan.branches == "chain")),
    ]


class Planner:
    """A fixed plan, or the best of several by measured cost and running acceptance."""

    def __init__(self, plans: Sequence[Plan], costs: CostTable | None = None) -> None:
        self.plans = list(plans)
        self.costs = costs
        self.current = self.plans[0]
        self.widest = max(self.plans, key=lambda plan: plan.stride)
        self.acceptance = RunningAcceptance(self.widest.drafts)
        self._choice: Choice | None = None
        self._batch = 0
        self._age = 0

    @property
    def reason(self) -> str:
        """Why the plan in use was chosen, in one line."""
        return f"{self.current.name}: fixed" if self._choice is None else self._choice.reason

    def choose(self, batch: int, drafting: bool = True) -> Plan:
        """The plan for a step of `batch` requests; AR where none of them wants drafts."""
        if not drafting:
            return AR
        if self.costs is None:
            return self.current
        self._age += 1
        if batch != self._batch or self._age >= CHOOSE_EVERY:
            self._batch, self._age = batch, 0
            costs = self.costs.costs(batch)
            choice = choose(self.plans, costs, self.acceptance.values, self.current)
            self.current, self._choice = choice.plan, choice
        return self.current

    def observe(self, reached: Sequence[int], accepted: Sequence[int]) -> None:
        """Learn from a step: drafts looked at and accepted, by depth, over all requests."""
        self.acceptance.update(reached, accepted)


def measured(runner: Runner, plans: Sequence[Plan], slots: int, seconds: float = MEASURE_SECONDS) -> CostTable:
    """Step costs of every plan at several batch sizes; read from the cache where this machine has measured them before.

    The batch sizes are tried from both ends inwards, so that whatever the time allows covers the range.
    """
    place = _cache_file(runner, plans, slots)
    if (known := _read(place)) is not None:
        return known
    table, until = CostTable(), perf_counter() + seconds
    for batch in _batches(slots):
        best = dict.fromkeys(plans, float("inf"))
        for _ in range(MEASURE_ROUNDS):
            for plan in plans:  # in turn, so that what else the machine does hits them alike
                best[plan] = min(best[plan], runner.measure(plan, batch))
            if perf_counter() > until:
                break
        for plan, least in best.items():
            table.put(batch, plan, least)
        if perf_counter() > until:
            break
    _write(place, table)
    return table


def _batches(slots: int) -> list[int]:
    """1, the largest, and powers of four and two between them."""
    sizes = [1, slots, 8, 32, 4, 16, 2, 64]
    return list(dict.fromkeys(size for size in sizes if size <= slots))


def _cache_file(runner: Runner, plans: Sequence[Plan], slots: int) -> Path:
    """Where the costs of this model on this machine lie: one file for each combination of what they depend on."""
    idlm = runner.idlm
    config: dict[str, Any] = idlm.model.config.to_dict()
    where = torch.cuda.get_device_name(idlm.device) if idlm.device.type == "cuda" else platform.processor()
    facts = [config, str(idlm.dtype), idlm.gate is not None, where, platform.node(), torch.__version__]
    linears = runner.core.linears
    facts += [torch.get_num_threads(), slots, [plan.name for plan in plans]]
    facts += [] if linears is None else [linears.format, linears.drafts]
    facts.append(native.facts() if idlm.device.type == "cpu" and native.loaded() else None)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return native.user_cache("costs") / f"{key}.json"


def _read(place: Path) -> CostTable | None:
    try:
        return CostTable.from_json(json.loads(place.read_text()))
    except (OSError, ValueError):
        return None  # not measured yet, or written by another version: measure again


def _write(place: Path, table: CostTable) -> None:
    """Best effort: without a place to write, the next start measures again."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(table.to_json()))
        draft.replace(place)
    except OSError:
        return
