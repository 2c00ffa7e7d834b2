"""Engines under load, in turn, and the figures of each.

Engines run A B A B ... within one call, so that disturbances of the machine affect them alike;
ratios are taken round by round. Every round has new requests, the same for all engines, so that no
prefix cache profits from the round before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from statistics import median

from idlm.decoding.plan import expected_tokens
from idlm.evaluation.closed_loop import BenchEngine, Decoding, Run
from idlm.evaluation.metrics import summary, tpf_decode
from idlm.evaluation.workload import Draw

Row = dict[str, object]


def bench(
    engines: Sequence[BenchEngine],
    draw: Draw,
    concurrencies: Sequence[int],
    count: int,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """A row for each concurrency and engine.

    Args:
        draw: gives the requests of a round.
        count: requests of a round; at least twice those in flight are used.
        repeats: rounds that count, after one to warm up.
        advance: called after each run.
    """
    rows: list[Row] = []
    for concurrency in concurrencies:
        runs: list[list[Run]] = [[] for _ in engines]
        for seed in range(repeats + 1):
            requests = draw(max(count, 2 * concurrency), seed)
            for engine, laps in zip(engines, runs, strict=True):
                laps.append(engine.run(requests, concurrency))
                advance()
        counted = [laps[1:] for laps in runs]
        pairs = list(zip(engines, counted, strict=True))
        ar = next((laps for engine, laps in pairs if _is_ar(engine)), None)
        rows += [row(engine, concurrency, laps, ar) for engine, laps in pairs]
    return rows


def _is_ar(engine: BenchEngine) -> bool:
    return (engine.engine, engine.mode) == ("idlm", "ar")


def row(
    engine: BenchEngine, concurrency: int, runs: Sequence[Run], ar: Sequence[Run] | None
) -> Row:
    """The figures of one engine: medians over rounds, or over all requests of all rounds.

    None for unknown figures. `same_as_ar` is the share of requests with AR's tokens; simulated
    acceptance has none. Ratios are of the same round.
    """
    rates = [run.tokens_per_second for run in runs]
    served = [request for run in runs for request in run.served]
    return {
        "engine": engine.engine,
        "mode": engine.mode,
        "simulated": engine.simulated,
        "concurrency": concurrency,
        "tokens_per_second": median(rates),
        "tokens_per_second_range": [min(rates), max(rates)],
        **_against(runs, ar),
        **({"same_as_ar": None} if engine.simulated else {}),
        **_decoded([run.decoding for run in runs if run.decoding is not None]),
        **_latency("ttft_ms", [request.ttft for request in served]),
        **_latency("tpot_ms", [request.tpot for request in served]),
        "worst_gap_ms": 1e3 * max(request.worst_gap for request in served),
        "peak_memory_mb": max(run.peak_memory_mb for run in runs),
        "tokens_per_cpu_second": median(run.tokens / run.cpu_seconds for run in runs),
        "requests": len(served),
        "tokens": sum(run.tokens for run in runs),
    }


def _against(runs: Sequence[Run], ar: Sequence[Run] | None) -> Row:
    if ar is None:
        return {"speedup_over_ar": None, "speedup_range": None, "same_as_ar": None}
    ratios = [
        run.tokens_per_second / other.tokens_per_second for run, other in zip(runs, ar, strict=True)
    ]
    pairs = [
        pair
        for run, other in zip(runs, ar, strict=True)
        for pair in zip(run.served, other.served, strict=True)
    ]
    same = sum(mine.token_ids == theirs.token_ids for mine, theirs in pairs)
    return {
        "speedup_over_ar": median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "same_as_ar": same / len(pairs),
    }


def _decoded(runs: Sequence[Decoding]) -> Row:
    """Figures that only our engine reports.

    `tpf` counts prefills and windows cut short by the end of a request; `tpf_decode` does not, and
    is what `tpf_expected` predicts from the acceptance. FLOPs per token are window rows for each
    token; AR has one.
    """
    if not runs:
        names = (
            "tpf",
            "tpf_decode",
            "tpf_expected",
            "acceptance",
            "flops_per_token_over_ar",
            "plans",
            "host_share",
            "reason",
        )
        return dict.fromkeys(names)
    results = [result for run in runs for result in run.results]
    totals, plan = summary(results), runs[0].plan
    acceptance = [share for share in totals["acceptance"] if share is not None]
    return {
        "tpf": totals["tpf"],
        "tpf_decode": tpf_decode(results),
        "tpf_expected": None
        if plan is None or (plan.drafts and not acceptance)
        else expected_tokens(plan, acceptance),
        "acceptance": totals["acceptance"],
        "flops_per_token_over_ar": sum(run.rows for run in runs) / totals["tokens"],
        "plans": dict(sum((run.plans for run in runs), Counter())),
        "host_share": median(run.host_share for run in runs),
        "reason": runs[-1].reason,
    }


def _latency(name: str, seconds: Sequence[float]) -> Row:
    ordered = sorted(seconds)
    return {
        name: 1e3 * median(ordered),
        f"{name}_p99": 1e3 * ordered[ceil(0.99 * len(ordered)) - 1],
    }
