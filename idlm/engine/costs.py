"""The step costs of each plan on this machine, measured when an engine starts."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from idlm.decoding.costs import CostTable
from idlm.decoding.plan import Plan
from idlm.engine.runner import Runner
from idlm.kernels import native

MEASURE_SECONDS = 3.0
"""The time limit for measuring; on a GPU recording does not count. Batch sizes that were not
measured get the costs of the nearest size."""
MEASURE_ROUNDS, KEPT_ROUNDS = 5, 3
"""How often each plan is measured. The shortest time counts, since noise only adds time. A table
with fewer than KEPT_ROUNDS rounds is not saved for the next start."""


def measured_costs(
    runner: Runner, plans: Sequence[Plan], slots: int, seconds: float = MEASURE_SECONDS
) -> CostTable:
    """Step costs of every plan at several batch sizes. They are read from the cache folder if this
    machine has measured them before.

    The smallest and the largest batch size are measured first, then sizes between them, so that
    the range is covered when the time is up. The steps of requests correct the other costs later.
    """
    place = _cache_file(runner, plans, slots)
    if (known := _read(place)) is not None:
        return known
    table, cuda, spent, rounds = CostTable(), runner.idlm.device.type == "cuda", 0.0, MEASURE_ROUNDS
    for batch in _batches(slots, cuda):
        best = dict.fromkeys(plans, float("inf"))
        for number in range(MEASURE_ROUNDS):
            for plan in plans:  # in turn, so that other load on the machine affects all alike
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
    node = None if idlm.device.type == "cuda" else platform.node()  # a container's is not stable
    facts = [config, str(idlm.dtype), idlm.gate is not None, idlm.entry]
    facts += [where, node, torch.__version__]
    linears = runner.model_step.products.linears
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
