"""A closed loop: a fixed number of requests in flight; a finished one is replaced by the next.

A `BenchEngine` is any engine that can run such a loop: `Ours` here, others in `benchmarks/peers`.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter, process_time
from typing import Protocol

import torch

from idlm.config import EngineConfig
from idlm.decoding.plan import Plan, choose
from idlm.engine.engine import Engine
from idlm.engine.llm import LLM, Result
from idlm.evaluation.simulation import simulate_acceptance
from idlm.evaluation.workload import Request
from idlm.models.idlm_model import Idlm

WARM_UP_SECONDS = 60.0
"""More than a server takes, so that no step is recorded while it is measured."""


@dataclass(frozen=True)
class Served:
    """The service of one request, in seconds.

    Attributes:
        ttft: from arrival to the first token.
        tpot: for each token after it.
        worst_gap: the longest wait between the tokens of two steps.
    """

    token_ids: list[int]
    ttft: float
    tpot: float
    worst_gap: float


@dataclass(frozen=True)
class Decoding:
    """What only our own engine reports of a run.

    Attributes:
        plan: the plan of the run; None if the planner chose.
        rows: rows of decode windows, over all requests and steps.
        plans: decode steps by plan.
        host_share: share of the steps' time that the host took for scheduling, text and
            bookkeeping.
        reason: the planner's decision, with figures, for the costs and acceptance with all requests
            in flight.
    """

    plan: Plan | None
    results: list[Result]
    rows: int
    plans: Counter[str]
    host_share: float
    reason: str


@dataclass(frozen=True)
class Run:
    """One run of an engine.

    Attributes:
        peak_memory_mb: of the process on a CPU, of the allocator on a GPU.
    """

    seconds: float
    cpu_seconds: float
    peak_memory_mb: float
    served: list[Served]
    decoding: Decoding | None = None

    @property
    def tokens(self) -> int:
        return sum(len(request.token_ids) for request in self.served)

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run: prefills and the last requests, which run with fewer beside them,
        count."""
        return self.tokens / self.seconds


class BenchEngine(Protocol):
    """An engine in one mode.

    Attributes:
        simulated: whether its acceptance is simulated.
    """

    engine: str
    mode: str
    simulated: bool

    def run(self, requests: Sequence[Request], concurrency: int) -> Run:
        """Serve the requests, `concurrency` of them in flight."""
        ...


@dataclass
class Ours:
    """Our engine in one mode: "ar", "lookup", "chain", "all" or "planner"."""

    llm: LLM
    mode: str
    simulated: bool = False
    engine: str = "idlm"

    def run(self, requests: Sequence[Request], concurrency: int) -> Run:
        device = self.llm.idlm.device
        metrics, planner = self.llm.engine.metrics, self.llm.engine.planner
        single = len(planner.plans) == 1 and self.llm.engine.lookups is None
        plan = planner.plans[0] if single else None
        plans, rows = Counter(metrics.plans), metrics.window_rows
        host, steps = metrics.host_seconds, metrics.step_seconds
        _forget_peak(device)
        started, cpu = perf_counter(), process_time()
        results = closed_loop(self.llm, requests, concurrency)
        seconds, cpu_seconds = perf_counter() - started, process_time() - cpu
        reason = _reason(self.llm.engine, concurrency)
        host_share = (metrics.host_seconds - host) / (metrics.step_seconds - steps)
        decoding = Decoding(
            plan, results, metrics.window_rows - rows, metrics.plans - plans, host_share, reason
        )
        return Run(
            seconds, cpu_seconds, _peak(device), [_served(result) for result in results], decoding
        )


def bench_engines(
    idlm: Idlm,
    modes: Sequence[str],
    stride: int,
    slots: int,
    shares: Sequence[float] | None = None,
    kv_memory: str | None = None,
    weights: str = "auto",
    advance: Callable[[], None] = lambda: None,
) -> list[Ours]:
    """Our engine in each of the modes, over the same weights; `stride` is the planner's largest.

    Each has a KV cache of `kv_memory`. `advance` is called as each one is ready. Raises the errors
    of `LLM`. With `shares`, drafts are
    accepted by chance; see `simulate_acceptance`.
    """
    engines = []
    for mode in modes:
        plain = EngineConfig(*_options(mode, stride, shares is not None), max_num_seqs=slots)
        config = replace(plain, kv_memory=kv_memory, weights=weights)
        llm, simulated = LLM(idlm, config=config), None if mode in ("ar", "lookup") else shares
        if simulated is not None:
            simulate_acceptance(llm.engine, simulated)
        llm.engine.warm_up(WARM_UP_SECONDS)
        engines.append(Ours(llm, mode, simulated is not None))
        advance()
    return engines


def _options(mode: str, stride: int, simulated: bool) -> tuple[int, str, str]:
    """Stride, branches and drafts of an engine. Simulated texts repeat nothing that a model would
    write, so nothing is looked up in them."""
    if mode == "ar":
        return 1, "all", "masks"
    if mode == "lookup":
        return max(2, stride), "planner", "lookup"
    return stride, mode, "masks" if simulated else "auto"


def closed_loop(llm: LLM, requests: Sequence[Request], concurrency: int) -> list[Result]:
    """Serve the requests in a closed loop; results in the order of the requests."""
    engine, waiting = llm.engine, iter(requests)

    def add(count: int) -> list[str]:
        return [
            engine.add(request.prompt_token_ids, request.params, seed=0)
            for request in islice(waiting, count)
        ]

    order = add(concurrency)
    results: dict[str, Result] = {}
    while engine.busy:
        for update in engine.step():
            if update.result is None:
                continue
            results[update.request_id] = update.result
            order += add(1)
    return [results[name] for name in order]


def _reason(engine: Engine, batch: int) -> str:
    """The planner's reason for a full batch; `planner.reason` is that of the run's end, when few
    are left."""
    planner, reasons = engine.planner, [] if engine.lookups is None else [engine.lookups.reason]
    if planner.costs is None:
        return planner.reason
    costs, acceptance = planner.costs.costs(batch), planner.acceptance.values
    usual = choose(planner.plans, costs, acceptance, gain=planner.gain).reason
    return "; ".join([usual, *reasons])


def _served(result: Result) -> Served:
    timing, tokens = result.timing, result.token_ids
    assert timing.first_token is not None and timing.last_token is not None
    tpot = (timing.last_token - timing.first_token) / max(1, len(tokens) - 1)
    return Served(tokens, timing.first_token - timing.arrival, tpot, timing.worst_gap)


def _forget_peak(device: torch.device) -> None:
    """Reset the high-water mark of memory; if Linux refuses, it stays that of the process."""
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
