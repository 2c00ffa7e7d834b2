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

from idlm.decoding.costs import CostTable, RunningCosts
from idlm.decoding.plan import AR, Choice, Plan, RunningAcceptance, choose
from idlm.decoding.window import MAX_WIDTH
from idlm.engine.runner import Runner
from idlm.kernels import native

STRIDES = (2, 3, 4, 6, 8, 12, 16)
MEASURE_SECONDS = 3.0
"""Measuring stops after this long, on a GPU without the time that recording takes; costs of what is
left are taken from the nearest batch size."""
MEASURE_ROUNDS, KEPT_ROUNDS = 5, 3
"""Times each plan is measured; the least counts, since noise only ever adds. With fewer than
KEPT_ROUNDS the table is not kept for the next start."""
SETTLING = 6
"""Steps after a change of plan whose times tell of the plan and not of the machine."""
LOOK_SHARE = 0.01
"""Share of the time that looks at other plans may cost."""
WORTH_A_LOOK = 0.5
"""A plan is looked at if it is expected to bring at least this share of the best one's tokens."""
CHOOSE_EVERY = 8
"""Steps between two looks at the costs, unless the batch changes: a look costs a fraction of a
millisecond."""


def candidates(stride: int) -> list[Plan]:
    """Plans up to a stride: AR, and the chain and all outcomes of each stride that fit a window."""
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


class Planner:
    """A fixed plan, or the best of several by measured cost and running acceptance.

    Costs are measured when the engine starts and corrected by every step since. Now and then a step
    runs another plan, the one not seen for longest among those that could be the best: what such
    looks are expected to cost stays below `LOOK_SHARE` of the time.
    """

    def __init__(self, plans: Sequence[Plan], costs: CostTable | None = None) -> None:
        self.plans = list(plans)
        self.costs = None if costs is None else RunningCosts(costs)
        self.current = self.plans[0]
        self.widest = max(self.plans, key=lambda plan: plan.stride)
        self.acceptance = RunningAcceptance(self.widest.drafts)
        self._choice: Choice | None = None
        self._batch = 0
        self._age = 0
        self._settling = 0
        self._look: Plan | None = None
        self._look_steps = 0
        self._allowance = 0.0
        self._seen: dict[Plan, int] = {}
        self._steps = 0

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
        if self._look is not None and self._look_steps:
            self._look_steps -= 1
            return self._look
        self._look = None
        self._age += 1
        if batch != self._batch or self._age >= CHOOSE_EVERY:
            self._batch, self._age = batch, 0
            costs = self.costs.costs(batch)
            choice = choose(self.plans, costs, self.acceptance.values, self.current)
            if choice.plan != self.current:
                self._settling = SETTLING
            self.current, self._choice = choice.plan, choice
            if self._start_look(choice):
                self._look_steps -= 1
                return self._look or self.current
        return self.current

    def observe(self, reached: Sequence[int], accepted: Sequence[int]) -> None:
        """Learn from a step: drafts looked at and accepted, by depth, over all requests."""
        self.acceptance.update(reached, accepted)

    def observe_cost(self, batch: int, plan: Plan, seconds: float) -> None:
        """Learn from a step what it took; not of one that prefilled, or was recorded, as well."""
        if self.costs is None or plan not in self.plans:
            return
        own = plan != self.current or self._settling > 0
        self.costs.observe(batch, plan, seconds, own)
        if plan == self.current and self._settling:
            self._settling -= 1
        self._steps += 1
        self._seen[plan] = self._steps
        self._allowance += LOOK_SHARE * seconds

    def _start_look(self, choice: Choice) -> bool:
        """Take up another plan for a look, if the allowance pays for it."""
        best = choice.tokens_per_second
        others = [one for one in choice.figures[1:] if one[1] / one[2] >= WORTH_A_LOOK * best]
        if not others:
            return False
        plan, tokens, seconds = min(others, key=lambda one: self._seen.get(one[0], 0))
        steps, loss = _price(choice, plan, tokens, seconds)
        if loss > self._allowance:
            return False
        self._allowance -= loss
        self._look, self._look_steps = plan, steps
        self._seen[plan] = self._steps
        return True


def _price(choice: Choice, plan: Plan, tokens: float, seconds: float) -> tuple[int, float]:
    """Steps of a look at `plan`, and the seconds by which it is expected to bring less.

    Drafts have to be made before they can be judged, so from AR a look takes two steps; and AR
    leaves none, so the step after a look at it commits one token.
    """
    current, _, own = choice.figures[0]
    if current == AR:
        steps, spent, gained = 2, 2 * seconds, 1 + tokens
    elif plan == AR:
        steps, spent, gained = 1, seconds + own, 2.0
    else:
        steps, spent, gained = 1, seconds, min(tokens, choice.figures[0][1])
    return steps, max(spent - gained / choice.tokens_per_second, 0.1 * seconds)


def measured(
    runner: Runner, plans: Sequence[Plan], slots: int, seconds: float = MEASURE_SECONDS
) -> CostTable:
    """Step costs of every plan at several batch sizes; read from the cache where this machine has
    measured them before, several times each.

    The batch sizes are tried from both ends inwards, so that whatever the time allows covers the
    range; what it does not is learnt from the steps that run.
    """
    place = _cache_file(runner, plans, slots)
    if (known := _read(place)) is not None:
        return known
    table, cuda, spent, rounds = CostTable(), runner.idlm.device.type == "cuda", 0.0, MEASURE_ROUNDS
    for batch in _batches(slots, cuda):
        best = dict.fromkeys(plans, float("inf"))
        for number in range(MEASURE_ROUNDS):
            for plan in plans:  # in turn, so that what else the machine does hits them alike
                started = perf_counter()
                step = runner.measure(plan, batch)
                best[plan] = min(best[plan], step)
                spent += step if cuda else perf_counter() - started
            if spent > seconds:
                rounds = min(rounds, number + 1)
                break
        for plan, least in best.items():
            table.put(batch, plan, least)
        if spent > seconds:
            break
    if rounds >= KEPT_ROUNDS:
        _write(place, table)
    return table


def _batches(slots: int, cuda: bool = False) -> list[int]:
    """1, the largest, and powers of four and two between them; fewer on a GPU, where each is a
    graph of its own."""
    sizes = [1, slots, 8] if cuda else [1, slots, 8, 32, 4, 16, 2, 64]
    return list(dict.fromkeys(size for size in sizes if size <= slots))


def _cache_file(runner: Runner, plans: Sequence[Plan], slots: int) -> Path:
    """Where the costs of this model on this machine lie: one file for each combination of what they
    depend on."""
    idlm = runner.idlm
    config: dict[str, Any] = idlm.model.config.to_dict()
    where = (
        torch.cuda.get_device_name(idlm.device)
        if idlm.device.type == "cuda"
        else platform.processor()
    )
    node = None if idlm.device.type == "cuda" else platform.node()  # a container's is new each time
    facts = [config, str(idlm.dtype), idlm.gate is not None, where, node, torch.__version__]
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
