"""The step costs of each plan on this machine, measured when an engine starts."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from idlm.decoding.costs import CostTable
from idlm.decoding.plan import Plan
from idlm.engine.runner import Runner
from idlm.kernels import native

MEASURE_SECONDS = 3.0
"""The time limit for measuring, by the runner's clock; on a GPU recording does not count. Batch
sizes that were not measured get their costs from those that were."""
MEASURE_ROUNDS, KEPT_ROUNDS = 5, 3
"""How often each plan is measured at each size. The shortest time counts, since noise only adds
time. A table with fewer than KEPT_ROUNDS whole rounds is not saved for the next start."""


def measured_costs(
    runner: Runner, plans: Sequence[Plan], slots: int, seconds: float = MEASURE_SECONDS
) -> CostTable:
    """Step costs of every plan at several batch sizes. They are read from the cache folder if this
    machine has measured them before.

    The first round begins with the smallest and the largest batch size, so that the range is
    covered if the time is up early. The steps of requests correct the costs later.
    """
    place = _cache_file(runner, plans, slots)
    if (known := _read(place)) is not None:
        return known
    table, cuda, spent = CostTable(), runner.idlm.device.type == "cuda", 0.0
    best: dict[tuple[int, Plan], float] = {}
    rounds = 0  # whole ones
    for number, batch in product(range(MEASURE_ROUNDS), _batches(slots, cuda)):
        rounds = number
        if spent > seconds:
            break
        for plan in plans:  # in turn, so that other load on the machine affects all alike
            started = runner.clock()
            step = runner.measure(plan, batch)
            best[batch, plan] = min(best.get((batch, plan), step), step)
            spent += step if cuda else runner.clock() - started
    for (batch, plan), least in best.items():
        table.put(batch, plan, least)
    if rounds >= KEPT_ROUNDS:
        native.write_cache(place, table.to_json())
    return table


def _batches(slots: int, cuda: bool = False) -> list[int]:
    """The batch sizes to measure, in order. There are fewer on a GPU, since each size needs its own
    CUDA graph."""
    sizes = [1, slots, 8] if cuda else [1, slots, 8, 32, 4, 16, 2, 64]
    return list(dict.fromkeys(size for size in sizes if size <= slots))


def _cache_file(runner: Runner, plans: Sequence[Plan], slots: int) -> Path:
    """The cache file. Its name is a hash of everything that the costs depend on: model, machine,
    threads, slots, plans and kernels."""
    idlm = runner.idlm
    config: dict[str, Any] = idlm.model.config.to_dict()
    where = (
        torch.cuda.get_device_name(idlm.device)
        if idlm.device.type == "cuda"
        else platform.processor()
    )
    heads = list(runner.model_step.cache.pages[0].shape[3:])  # fewer on each of several ranks
    node = None if idlm.device.type == "cuda" else platform.node()  # a container's is not stable
    facts = [config, str(idlm.dtype), idlm.gate is not None, idlm.entry]
    facts += [where, node, torch.__version__, heads]
    linears = runner.model_step.products.linears
    facts += [runner.clock.__name__, torch.get_num_threads(), slots, [plan.name for plan in plans]]
    facts += [] if linears is None else [linears.format, linears.drafts]
    facts.append(native.facts() if idlm.device.type == "cpu" and native.loaded() else None)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return native.user_cache("costs") / f"{key}.json"


def _read(place: Path) -> CostTable | None:
    try:
        return CostTable.from_json(json.loads(place.read_text()))
    except (OSError, ValueError):
        return None  # not measured yet, or written by another version: measure again
