"""A closed loop: a fixed number of requests in flight, each finished one replaced by the next; and
what that run shows.

A `Contestant` is any engine that can be run so: `Ours` here, others in `benchmarks/peers`.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter, process_time
from typing import Protocol

import torch

from idlm.config import EngineConfig
from idlm.decoding.plan import Plan, choose
from idlm.engine.llm import LLM, Result
from idlm.engine.planner import Planner
from idlm.evaluation.simulation import simulate_acceptance
from idlm.evaluation.workload import Request
from idlm.models.idlm_model import Idlm

WARM_UP_SECONDS = 60.0
"""More than a server takes: a plan's first steps, which are recorded, are no part of what is
measured."""


@dataclass(frozen=True)
class Served:
    """How one request was served: seconds to its first token, per token after it, and the worst
    wait between steps."""

    token_ids: list[int]
    ttft: float
    tpot: float
    worst_gap: float


@dataclass(frozen=True)
class Decoding:
    """What only our own engine tells of a run.

    Attributes:
        plan: the one that was run; None where the planner chose.
        rows: rows of decode windows, over all requests and steps.
        plans: decode steps by plan.
        host_share: of the steps' time, what the host took for scheduling, text and bookkeeping.
        reason: what the planner makes of its costs and acceptance with all requests in flight.
    """

    plan: Plan | None
    results: list[Result]
    rows: int
    plans: Counter[str]
    host_share: float
    reason: str


@dataclass(frozen=True)
class Run:
    """One run of a contestant; `peak_memory_mb` is the process's on a CPU, the allocator's on a
    GPU."""

    seconds: float
    cpu_seconds: float
    peak_memory_mb: float
    served: list[Served]
    decoding: Decoding | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all requests."""
        return sum(len(one.token_ids) for one in self.served)

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run, prefills and the thinning out at its end included."""
        return self.tokens / self.seconds


class Contestant(Protocol):
    """An engine in one mode; `simulated` where its acceptance is not a model's."""

    engine: str
    mode: str
    simulated: bool

    def run(self, requests: Sequence[Request], concurrency: int) -> Run:
        """Serve the requests, `concurrency` of them in flight."""
        ...


@dataclass
class Ours:
    """Our engine in one mode: "ar", "chain", "all" or "planner"."""

    llm: LLM
    mode: str
    simulated: bool = False
    engine: str = "idlm"

    def run(self, requests: Sequence[Request], concurrency: int) -> Run:
        """See `Contestant`."""
        device = self.llm.idlm.device
        metrics, planner = self.llm.engine.metrics, self.llm.engine.planner
        plan = planner.plans[0] if len(planner.plans) == 1 else None
        plans, rows = Counter(metrics.plans), metrics.window_rows
        host, steps = metrics.host_seconds, metrics.step_seconds
        _forget_peak(device)
        started, cpu = perf_counter(), process_time()
        results = closed_loop(self.llm, requests, concurrency)
        seconds, cpu_seconds = perf_counter() - started, process_time() - cpu
        reason = _reason(planner, concurrency)
        host_share = (metrics.host_seconds - host) / (metrics.step_seconds - steps)
        decoding = Decoding(
            plan, results, metrics.window_rows - rows, metrics.plans - plans, host_share, reason
        )
        return Run(
            seconds, cpu_seconds, _peak(device), [_served(result) for result in results], decoding
        )


def contestants(
    idlm: Idlm,
    modes: Sequence[str],
    stride: int,
    slots: int,
    shares: Sequence[float] | None = None,
    kv_memory: str | None = None,
    weights: str = "auto",
) -> list[Ours]:
    """Our engine in each of the modes, over the same weights; `stride` is the planner's largest.

    Each has its own KV cache of `kv_memory`. Raises what `LLM` raises. With `shares`, drafts are
    accepted by chance; see `simulate_acceptance`.
    """
    found = []
    for mode in modes:
        n, branches = (1, "all") if mode == "ar" else (stride, mode)
        config = EngineConfig(n, branches, max_num_seqs=slots, kv_memory=kv_memory, weights=weights)
        llm, simulated = LLM(idlm, config=config), None if mode == "ar" else shares
        if simulated is not None:
            simulate_acceptance(llm.engine, simulated)
        llm.engine.warm_up(WARM_UP_SECONDS)
        found.append(Ours(llm, mode, simulated is not None))
    return found


def closed_loop(llm: LLM, requests: Sequence[Request], concurrency: int) -> list[Result]:
    """Serve the requests, each finished one replaced by the next; results in the order of the
    requests."""
    engine, waiting = llm.engine, iter(requests)
    order = [
        engine.add(one.prompt_token_ids, one.params, seed=0) for one in islice(waiting, concurrency)
    ]
    results: dict[str, Result] = {}
    while engine.busy:
        for update in engine.step():
            if update.result is None:
                continue
            results[update.request_id] = update.result
            order += [
                engine.add(one.prompt_token_ids, one.params, seed=0) for one in islice(waiting, 1)
            ]
    return [results[name] for name in order]


def _reason(planner: Planner, batch: int) -> str:
    """The planner's own last reason would be that of the run's end, when few are left."""
    if planner.costs is None:
        return planner.reason
    return choose(planner.plans, planner.costs.costs(batch), planner.acceptance.values).reason


def _served(result: Result) -> Served:
    timing, tokens = result.timing, result.token_ids
    assert timing.first_token is not None and timing.last_token is not None
    tpot = (timing.last_token - timing.first_token) / max(1, len(tokens) - 1)
    return Served(tokens, timing.first_token - timing.arrival, tpot, timing.worst_gap)


def _forget_peak(device: torch.device) -> None:
    """Start the high-water mark of memory anew; where Linux does not let us, it stays the
    process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> float:
    """The high-water mark of memory, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
